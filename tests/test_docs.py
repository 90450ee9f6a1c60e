"""The code of the README and of the guides runs, block after block, on a small model."""

import re
import shlex
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

import jaxcompress as jc
from jaxcompress.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    *(
        f"docs/{name}.md"
        for name in (
            "index",
            "guide",
            "pruning",
            "solvers",
            "gates",
            "iterative",
            "structured-removal",
            "removal-in-use",
            "quantization",
            "mixed-precision",
            "decomposition",
            "adapters",
            "sharing",
            "soft-sharing",
            "distillation",
            "distillation-losses",
            "distillation-schemes",
            "training",
            "statistics",
            "command-line",
            "design",
        )
    ),
]


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(64)(nn.softmax(nn.Dense(64)(x)))


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(64)(nn.gelu(nn.Dense(128)(x)))


class Model(nn.Module):
    """Has the names that the pages' rules match."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(32, 64)(ids)
        x = Mlp(name="mlp")(Attention(name="attention")(x))
        x = nn.BatchNorm(use_running_average=True)(x)
        return nn.Dense(8, name="head")(x)


def blocks(page, language="python"):
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the pages take for granted."""
    monkeypatch.chdir(tmp_path)
    model, inputs = Model(), jnp.arange(6).reshape(2, 3)
    variables = model.init(jax.random.key(0), inputs)
    tensors = {k: np.asarray(v) for k, v in flatten_dict(variables["params"], sep=".").items()}
    safetensors.numpy.save_file(tensors, "model.safetensors")
    rules = {"**/kernel": jc.LowRank(4), "**/embedding": jc.Codebook(3)}
    small = jc.compress(variables, rules)
    trainable, _ = jc.partition(small)
    tx = optax.adam(1e-3)

    def loss_fn(variables, batch):
        return jnp.mean(jc.compressed(model.apply)(variables, batch) ** 2)

    return {
        "jc": jc, "jax": jax, "jnp": jnp, "optax": optax, "model": model, "inputs": inputs,
        "x": inputs, "batch": inputs, "params": variables, "variables": variables, "rules": rules,
        "small": small, "tx": tx, "opt_state": tx.init(trainable), "loss_fn": loss_fn, "apply": jax.jit(jc.compressed(model.apply)),
    }  # fmt: skip


# Pages that are run by `make test`; the others compile much and are left to `make test-slow`.
QUICK = {
    "README.md",
    *(f"docs/{name}.md" for name in ("index", "guide", "training", "distillation")),
}


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=pytest.mark.slow) if p not in QUICK else p for p in PAGES]
)
def test_the_code_of_a_page_runs(page, names, capsys):
    found = blocks(page)
    assert found
    for code in found:
        # The README's stand-in for the reader's own tree.
        code = re.sub(r"^params = \.\.\..*$", "", code, flags=re.MULTILINE)
        exec(compile(code, page, "exec"), names)
    if page == "README.md":
        assert names["logits"].shape == (2, 3, 8)
        assert "total" in capsys.readouterr().out
        assert jc.nbytes(names["small"]) < jc.nbytes(names["params"]) / 3
    if page == "docs/guide.md":
        before = names["trainable"]
        after, _, loss = names["step"](before, names["opt_state"], names["batch"])
        assert loss > 0
        assert jax.tree.structure(after) == jax.tree.structure(before)
    if page == "docs/training.md":
        assert bool(jnp.all(names["same"]))
        assert names["loss"] > 0
        report = jc.pruning.sparsity_report(names["opt_state"])
        assert len(report.rows) == 5
        after, _, _ = names["train_step"](
            names["params"], names["tx"].init(names["params"]), names["batch"]
        )
        assert jax.tree.structure(after) == jax.tree.structure(names["params"])
    if page == "docs/statistics.md":
        assert len(names["stats"]) == 6
        assert set(names["some"]) == {p for p in names["stats"] if "mlp" in p}


def test_the_commands_of_the_page_run(names, capsys):
    lines = [x for block in blocks("docs/command-line.md", "bash") for x in block.splitlines()]
    assert len(lines) == 6
    for line in lines:
        program, *args = shlex.split(line.split(" > ")[0])
        assert program == "jaxcompress"
        if args[0].startswith("--print"):
            with pytest.raises(SystemExit):
                main(args)
        else:
            assert main(args) == 0
    assert Path("small.png").exists()
    assert Path("back.safetensors").exists()
    (recipe,) = blocks("docs/command-line.md", "yaml")
    assert jc.compress(names["params"], jc.Recipe.from_yaml(recipe)) is not None
