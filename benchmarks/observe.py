"""Input statistics of MiniLM against its forward pass and the Gram products alone.

python benchmarks/observe.py [--quick]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.observe import _Step

from common import Row, interleaved, row, show  # isort: skip

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from _minilm_model import MiniLM, load_params, load_tokenizer, tokenize
from assets import fetch

BATCH = 10


def batch() -> tuple[jax.Array, jax.Array]:
    """The tokens of ten Lee documents and their mask."""
    texts = (fetch("similarity") / "lee.cor").read_text("latin-1").splitlines()
    return tuple(map(jnp.asarray, tokenize(load_tokenizer(fetch("minilm")), texts[:BATCH])))


def products(params: Any, tokens: jax.Array) -> Any:
    """A function of the Gram products that the kernels ask for, each input once, and its input.

    Query, key and value share theirs.
    """
    kernels = {
        "/".join(k.key for k in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
        if path[-1].key == "kernel" and path[-2].key not in ("key", "value")
    }
    widths = [
        leaf.shape[0] * (leaf.shape[1] if path.endswith("out/kernel") and leaf.ndim == 3 else 1)
        for path, leaf in kernels.items()
    ]
    inputs = [jax.random.normal(jax.random.key(n), (tokens.size, k)) for n, k in enumerate(widths)]
    sums = [jnp.zeros((k, k)) for k in widths]

    def run(sums, inputs):
        return [s + x.T @ x for s, x in zip(sums, inputs)]

    run = jax.jit(run, donate_argnums=0)
    state = {"sums": sums}

    def once():
        state["sums"] = run(state["sums"], inputs)
        return state["sums"]

    return once


def run(quick: bool = False) -> list[Row]:
    """All rows."""
    model, params = MiniLM(), load_params(fetch("minilm"))
    tokens, mask = batch()

    def apply(params, tokens, mask):
        return model.apply({"params": params}, tokens, mask)

    forward = jax.jit(apply).lower(params, tokens, mask).compile()
    candidates = {
        "forward": lambda: forward(params, tokens, mask),
        "products": products(params, tokens),
    }
    steps = {"gram": ("gram",), "abs_max": ("abs_max",), "histogram": ("histogram",)}
    paths = ["/".join(k.key for k in path)
             for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]  # fmt: skip
    temporaries = {}
    for name, names in steps.items():
        step = _Step(apply, names, paths)
        state = {"sums": step(None, params, (tokens, mask))[0]}

        def once(step=step, state=state):
            state["sums"], found = step(state["sums"], params, (tokens, mask))
            return state["sums"], found

        candidates[name] = once
        leaves, tree = jax.tree.flatten((tokens, mask))
        static = (tree, (None,) * len(leaves))
        compiled = step._run.lower(state["sums"], params, leaves, static).compile()
        temporaries[name] = compiled.memory_analysis().temp_size_in_bytes
    t = interleaved(candidates, rounds=3 if quick else 15)
    what = f"of MiniLM, {BATCH} documents"
    bound = t["forward"] + t["products"]
    mine = forward.memory_analysis().temp_size_in_bytes
    return [
        row(f"observe gram {what}", t["gram"], "forward + products", bound, at_most=2),
        row(f"observe gram {what}", t["gram"], "forward", t["forward"]),
        row(f"observe abs_max {what}", t["abs_max"], "forward", t["forward"]),
        row(f"observe histogram {what}", t["histogram"], "forward", t["forward"]),
        row(
            f"temporaries of observe gram {what}",
            temporaries["gram"] / 1e6,
            "forward's",
            mine / 1e6,
            at_most=2,
            unit="MB",
        ),
    ]


def main() -> None:
    show("observe", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
