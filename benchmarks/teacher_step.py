"""A step of distillation against the student's own step and the teacher's forward pass.

    python benchmarks/teacher_step.py [--quick]

The student's own step has the same losses, of targets that are there already: what is left is what
the teacher costs. Beside it the student's step on labels alone, so that the losses count too.
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
from jaxcompress.distillation import attention_transfer, soft_targets
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
    """A training loop of a student whose state is donated."""

    def __init__(self, params: Any, loss: Callable[..., jax.Array], *rest: Any):
        tx = optax.adam(1e-3)
        self.rest = rest
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


def candidates(student, teacher, see, look, distance) -> dict[str, Callable[[], Any]]:
    """What is timed.

    Args:
      student: params that are trained.
      teacher: params.
      see: from the student's params and images to logits and features.
      look: the teacher's.
      distance: the loss of what both give.
    """
    images, labels = batch()
    forward = jax.jit(look)

    def given(params, target, images, labels):
        seen = see(params, images)
        return hard(seen[0], labels) + distance(seen, target)

    def taught(params, teacher, images, labels):
        return given(params, look(teacher, images), images, labels)

    def alone(params, images, labels):
        return hard(see(params, images)[0], labels)

    return {
        "alone": Loop(student, alone, images, labels),
        "given": Loop(student, given, forward(teacher, images), images, labels),
        "teacher": lambda: forward(teacher, images),
        "taught": Loop(student, taught, teacher, images, labels),
    }


def soft(seen, target) -> jax.Array:
    return jnp.mean(soft_targets(seen[0], target[0], temperature=4.0))


def logits_of(network) -> Callable[..., Any]:
    return lambda params, images: (network(params, images), {})


def lenet() -> dict[str, Callable[[], Any]]:
    """LeNet-5 taught by another, by its predictions."""
    see = logits_of(_lenet5.network)
    return candidates(_lenet5.init(0), _lenet5.init(1), see, see, soft)


def quantized() -> dict[str, Callable[[], Any]]:
    """LeNet-5 in int4, as it trains, taught by the one it was made of."""
    teacher = _lenet5.init(0)
    small = jc.compress(teacher, {"**/kernel": jc.FakeQuantize("int4", axis=-1)})
    trained, fixed = jc.partition(small)
    network = jc.compressed(_lenet5.network)
    see = logits_of(lambda trained, images: network(jc.combine(trained, fixed), images))
    return candidates(trained, teacher, see, logits_of(_lenet5.network), soft)


def resnet(widths: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    """ResNet-8 taught by a wider one, by its predictions and what its blocks give."""
    images = batch()[0]
    small, large = _resnet8.ResNet8(), _resnet8.ResNet8(widths=widths)
    student, teacher = (m.init(jax.random.key(i), images) for i, m in enumerate((small, large)))
    stats = {"batch_stats": student["batch_stats"]}
    names = [f"block{i}_norm2" for i in range(3)]
    mine, look = tap(small.apply, names), tap(large.apply, names)
    see = lambda params, images: mine({"params": params, **stats}, images)

    def distance(seen, target):
        maps = [attention_transfer(seen[1][n], target[1][n], squared=True) for n in names]
        return soft(seen, target) + 100 * jnp.mean(sum(maps))

    return candidates(student["params"], teacher, see, look, distance)


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
        what = f"distilled step, {what}, batch {BATCH}"
        teacher = t["teacher"]
        rows += [
            row(what, t["taught"], "student's step, its targets given + teacher's forward",
                t["given"] + teacher, at_most=1.05),
            row(what, t["taught"], "student's step on labels + teacher's forward",
                t["alone"] + teacher),
        ]  # fmt: skip
    return rows


def main() -> None:
    show("teacher in the step", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
