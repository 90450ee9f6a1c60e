"""Training steps with fake-quantized kernels against plain ones, and against qwix.

python benchmarks/fake_quantize.py [--quick]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import qwix

import jaxcompress as jc

from common import Row, interleaved, row, show  # isort: skip
from sparsify import BATCH, LAYERS, RULES, WIDTH, loss, network  # isort: skip


class Loop:
    """A training loop whose state is donated from step to step."""

    def __init__(self, fn: Callable[..., Any], params: Any, tx: optax.GradientTransformation):
        self.batch = network()[1:]
        trained, fixed = jc.partition(params)
        trained = jax.tree.map(jnp.copy, trained)

        def step(state, x, y):
            trained, opt_state = state
            grads = jax.grad(lambda t: fn(jc.combine(t, fixed), x, y))(trained)
            updates, opt_state = tx.update(grads, opt_state, trained)
            return optax.apply_updates(trained, updates), opt_state

        self.state = (trained, tx.init(trained))
        self.step = jax.jit(step, donate_argnums=0).lower(self.state, *self.batch).compile()

    def __call__(self) -> Any:
        self.state = self.step(self.state, *self.batch)
        return self.state


class Network(nn.Module):
    """The same network in Linen, which is what qwix rewrites."""

    @nn.compact
    def __call__(self, x):
        for i in range(LAYERS):
            x = nn.relu(nn.Dense(WIDTH, name=f"layer_{i}")(x))
        return x


def qwix_loop(params: Any, tx: optax.GradientTransformation) -> Loop:
    """Quantization-aware training by qwix: int8 weights per channel, as ours."""
    rule = qwix.QtRule(module_path=".*", weight_qtype="int8")
    model = qwix.quantize_model(Network(), qwix.QtProvider([rule]))
    return Loop(lambda p, x, y: jnp.mean((model.apply({"params": p}, x) - y) ** 2), params, tx)


def run(quick: bool = False) -> list[Row]:
    """All rows."""
    adam, params = optax.adam(1e-3), network()[0]
    sparse = jc.sparsify(adam, jc.pruning.magnitude(), jc.pruning.periodic(0.9, every=10), RULES)
    specs = {
        "int8 per channel": jc.FakeQuantize("int8"),
        "int8 per channel, static range": jc.FakeQuantize("int8", range="static"),
        "int4 groups of 64": jc.FakeQuantize("int4", group_size=64),
        "uint4 groups of 32, affine": jc.FakeQuantize("uint4", group_size=32, symmetric=False),
    }
    fn = jc.compressed(loss)
    fake = lambda spec: jc.compress(params, {"**/kernel": spec})
    candidates = {
        "plain": Loop(loss, params, adam),
        "qwix": qwix_loop(params, adam),
        **{name: Loop(fn, fake(spec), adam) for name, spec in specs.items()},
        "int8 per channel, under sparsify": Loop(fn, fake(jc.FakeQuantize("int8")), sparse),
    }
    t = interleaved(candidates, rounds=9 if quick else 41)
    what = f"{LAYERS} Dense({WIDTH}), batch {BATCH}"
    rows = [
        row(
            f"training step, {name}, {what}",
            t[name],
            "plain step",
            t["plain"],
            at_most=1.25 if name == "int8 per channel" else None,
        )
        for name in candidates
        if name not in ("plain", "qwix")
    ]
    rows.append(
        row(
            f"training step, int8 per channel, {what}",
            t["int8 per channel"],
            "qwix 0.1.8 QAT",
            t["qwix"],
            at_least=1,
        )
    )
    return rows


def main() -> None:
    show("fake quantization", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
