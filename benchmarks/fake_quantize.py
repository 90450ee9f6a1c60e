"""Training steps with fake-quantized kernels against plain ones.

python benchmarks/fake_quantize.py [--quick]
"""

from __future__ import annotations

import sys
from typing import Any

import jax
import optax

import jaxcompress as jc

from common import Row, interleaved, row, show  # isort: skip
from sparsify import BATCH, LAYERS, RULES, WIDTH, loss, network  # isort: skip


class Loop:
    """A training loop on one kind of leaf, whose state is donated from step to step."""

    def __init__(self, spec: jc.Spec | None, tx: optax.GradientTransformation):
        params, *self.batch = network()
        trained, fixed = jc.partition(jc.compress(params, {"**/kernel": spec}))
        fn = jc.compressed(loss)

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


def run(quick: bool = False) -> list[Row]:
    """All rows."""
    adam = optax.adam(1e-3)
    sparse = jc.sparsify(
        adam, jc.pruning.magnitude(), jc.pruning.periodic(0.9, every=10), RULES
    )
    candidates = {
        "plain": Loop(None, adam),
        "int8 per channel": Loop(jc.FakeQuantize("int8"), adam),
        "int8 per channel, static range": Loop(jc.FakeQuantize("int8", range="static"), adam),
        "int4 groups of 64": Loop(jc.FakeQuantize("int4", group_size=64), adam),
        "uint4 groups of 32, affine": Loop(
            jc.FakeQuantize("uint4", group_size=32, symmetric=False), adam
        ),
        "int8 per channel and sparsify": Loop(jc.FakeQuantize("int8"), sparse),
    }
    t = interleaved(candidates, rounds=9 if quick else 41)
    what = f"{LAYERS} Dense({WIDTH}), batch {BATCH}"
    rows = []
    for name in list(candidates)[1:]:
        bound = 1.25 if name == "int8 per channel" else None
        rows.append(
            row(f"training step, {name}, {what}", t[name], "plain step", t["plain"], at_most=bound)
        )
    return rows


def main() -> None:
    show("fake quantization", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
