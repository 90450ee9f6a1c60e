"""A step of distillation against the student's own step and the teacher's forward pass.

python benchmarks/teacher_step.py [--quick]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxcompress as jc
from jaxcompress.distillation import soft_targets
from jaxcompress.distillation.taps import tap

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import _lenet5  # isort: skip
import _resnet8  # isort: skip
from common import Row, interleaved, row, show  # isort: skip

BATCH = 64


def batch() -> tuple[jax.Array, jax.Array]:
    """Images and labels of random numbers."""
    images, labels = jax.random.split(jax.random.key(0))
    return (
        jax.random.uniform(images, (BATCH, 784)),
        jax.random.randint(labels, (BATCH,), 0, 10),
    )


def hard(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


class Loop:
    """A training loop of a student whose state is donated; `teach` makes its loss."""

    def __init__(self, params: Any, loss: Callable[..., jax.Array], *rest: Any):
        tx = optax.adam(1e-3)
        self.rest = (*rest, *batch())
        params = jax.tree.map(jnp.copy, params)
        self.state = (params, tx.init(params))

        def step(state, *rest):
            params, opt_state = state
            grads = jax.grad(loss)(params, *rest)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        self.step = jax.jit(step, donate_argnums=0).lower(self.state, *self.rest).compile()

    def __call__(self) -> Any:
        self.state = self.step(self.state, *self.rest)
        return self.state


def lenet() -> dict[str, Callable[[], Any]]:
    """LeNet-5 taught by another, by its predictions."""
    student, teacher = _lenet5.init(0), _lenet5.init(1)
    network = _lenet5.network

    def alone(params, images, labels):
        return hard(network(params, images), labels)

    def taught(params, teacher, images, labels):
        logits = network(params, images)
        soft = soft_targets(logits, network(teacher, images), temperature=4.0)
        return hard(logits, labels) + jnp.mean(soft)

    return candidates(student, teacher, network, alone, taught)


def resnet(widths: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    """ResNet-8 taught by a wider one, by its predictions and what its blocks give."""
    images = batch()[0]
    small, large = _resnet8.ResNet8(), _resnet8.ResNet8(widths=widths)
    student, teacher = (m.init(jax.random.key(i), images) for i, m in enumerate((small, large)))
    stats = {"batch_stats": student["batch_stats"]}

    names = [f"block{i}_norm2" for i in range(3)]
    mine, theirs = tap(small.apply, names), tap(large.apply, names)

    def alone(params, images, labels):
        return hard(small.apply({"params": params, **stats}, images), labels)

    def taught(params, teacher, images, labels):
        logits, ours = mine({"params": params, **stats}, images)
        targets, found = theirs(teacher, images)
        loss = hard(logits, labels) + jnp.mean(soft_targets(logits, targets, temperature=4.0))
        for name in names:  # attention maps: what is left of channels, of unit length
            s, t = (jnp.mean(x[name] ** 2, -1).reshape(BATCH, -1) for x in (ours, found))
            unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
            loss += jnp.mean((unit(s) - jax.lax.stop_gradient(unit(t))) ** 2)
        return loss

    return candidates(student["params"], teacher, large.apply, alone, taught)


def candidates(student, teacher, network, alone, taught) -> dict[str, Callable[[], Any]]:
    images = batch()[0]
    forward = jax.jit(network).lower(teacher, images).compile()
    return {
        "alone": Loop(student, alone),
        "teacher": lambda: forward(teacher, images),
        "taught": Loop(student, taught, teacher),
    }


def quantized() -> dict[str, Callable[[], Any]]:
    """LeNet-5 in int4, as it trains, taught by the one it was made of."""
    teacher = _lenet5.init(0)
    small = jc.compress(teacher, {"**/kernel": jc.FakeQuantize("int4", axis=-1)})
    trained, fixed = jc.partition(small)
    network = jc.compressed(_lenet5.network)

    def alone(trained, images, labels):
        return hard(network(jc.combine(trained, fixed), images), labels)

    def taught(trained, teacher, images, labels):
        logits = network(jc.combine(trained, fixed), images)
        soft = soft_targets(logits, _lenet5.network(teacher, images), temperature=4.0)
        return hard(logits, labels) + jnp.mean(soft)

    return candidates(trained, teacher, _lenet5.network, alone, taught)


def run(quick: bool = False) -> list[Row]:
    """All rows."""
    models = {
        "LeNet-5": lenet(),
        "LeNet-5, int4 student": quantized(),
        "ResNet-8, teacher of twice its width, three taps": resnet((32, 64, 128)),
    }
    rows = []
    for what, both in models.items():
        t = interleaved(both, rounds=9 if quick else 41)
        rows.append(
            row(
                f"distilled step, {what}, batch {BATCH}",
                t["taught"],
                "student's step + teacher's forward",
                t["alone"] + t["teacher"],
                at_most=1.05,
            )
        )
    return rows


def main() -> None:
    show("teacher in the step", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
