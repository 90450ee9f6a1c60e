"""Pruning, fake quantization and a teacher in one jitted step, on plain params.

    python examples/loop_plain.py

A teacher is trained, then a smaller student whose kernels are pruned by the optimizer wrapper and
rounded to int4 by a trainable leaf, on the teacher's soft targets. `finalize` gives the stored
form; its logits are those of the trained student, bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _digits import load

import jaxcompress as jc


def init(key: jax.Array, *widths: int) -> Any:
    keys = jax.random.split(key, len(widths) - 1)
    return [
        {"kernel": jax.random.normal(k, (n, m)) * (2 / n) ** 0.5, "bias": jnp.zeros(m)}
        for k, n, m in zip(keys, widths, widths[1:])
    ]


def network(params: Any, x: jax.Array) -> jax.Array:
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def fit(
    params: Any, loss: Callable[[Any, jax.Array], jax.Array], tx: Any, size: int, steps: int
) -> tuple[Any, Any]:
    """A loop as it always was: 50 steps at a time in one scan, buffers donated."""
    trained, fixed = jc.partition(params)  # the same tree, where nothing is compressed

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def some_steps(trained, state, batches):
        def step(carry, batch):
            trained, state = carry
            grads = jax.grad(lambda t: loss(jc.combine(t, fixed), batch))(trained)
            updates, state = tx.update(grads, state, trained)
            return (optax.apply_updates(trained, updates), state), None

        return jax.lax.scan(step, (trained, state), batches)[0]

    state, rng = tx.init(trained), np.random.default_rng(0)
    for _ in range(steps // 50):
        trained, state = some_steps(trained, state, rng.integers(0, size, (50, 100)))
    return jc.combine(trained, fixed), state


def main() -> dict[str, float]:
    """Trains both, stores the student, and tests it."""
    images, labels, test_images, test_labels = load()
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    run = jax.jit(jc.compressed(network))

    def hard(params, batch):
        logits = network(params, images[batch])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()

    teacher = init(jax.random.key(0), 64, 256, 256, 10)
    teacher, _ = fit(teacher, hard, optax.adam(1e-3), len(labels), 600)
    targets = run(teacher, images)

    def soft(params, batch):
        logits = jc.compressed(network)(params, images[batch])
        return jc.distillation.soft_targets(logits, targets[batch], temperature=4.0).mean()

    student = init(jax.random.key(1), 64, 64, 10)
    student = jc.compress(student, {"**/kernel": jc.FakeQuantize("int4", group_size=16)})
    tx = jc.sparsify(
        optax.adam(3e-3),
        jc.pruning.magnitude(scope="global"),
        jc.pruning.cubic_schedule(0.8, end=600, every=20),
        {"**/kernel": "unstructured"},
    )
    student, state = fit(student, soft, tx, len(labels), 900)
    final = jc.finalize(student)
    print(jc.pruning.sparsity_report(state))
    print(jc.summary(jc.decompress(final), final))

    logits = run(final, test_images)
    score = lambda logits: float(jnp.mean(jnp.argmax(logits, axis=-1) == test_labels))
    found = {
        "teacher": score(run(teacher, test_images)),
        "student": score(logits),
        "same": bool(jnp.all(logits == run(student, test_images))),
        "ratio": jc.nbytes(teacher) / jc.nbytes(final),
        "sparsity": jc.pruning.sparsity_report(state).sparsity,
    }
    print(f"teacher {100 * found['teacher']:.1f}%, student {100 * found['student']:.1f}%, "
          f"{found['ratio']:.0f} times smaller")  # fmt: skip
    return found


if __name__ == "__main__":
    main()
