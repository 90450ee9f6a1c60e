"""Sparse training with Flax NNX and its `nnx.Optimizer`: one line of the loop changes.

python examples/loop_nnx.py
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _digits import load
from flax import nnx

import jaxcompress as jc


class MLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.relu(self.hidden(x)))


@nnx.jit
def train_step(model: MLP, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array) -> None:
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    optimizer.update(model, nnx.grad(loss)(model))


def main() -> dict[str, float]:
    """Trains, stores what is left, and tests it."""
    images, labels, test_images, test_labels = load()
    model = MLP(nnx.Rngs(0))
    tx = jc.sparsify(  # around the optimizer that was there
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3)),
        jc.pruning.magnitude(),
        jc.pruning.cubic_schedule(0.5, end=200, every=10),
        {"hidden/kernel": "2:4", "head/kernel": None},
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    rng = np.random.default_rng(0)
    for _ in range(400):
        batch = rng.integers(0, len(labels), 100)
        train_step(model, optimizer, images[batch], labels[batch])

    graph, state = nnx.split(model)
    small = jc.compress(state, {"hidden/kernel": jc.Prune(0.5, pattern="2:4")})
    print(jc.summary(state, small))
    run = jax.jit(jc.compressed(lambda state, x: nnx.merge(graph, state)(x)))
    logits = run(small, test_images)
    accuracy = float(jnp.mean(jnp.argmax(logits, axis=-1) == test_labels))
    print(f"{100 * accuracy:.1f}% of the test images")
    groups = np.asarray(model.hidden.kernel[...] != 0).reshape(16, 4, 128).sum(axis=1)
    same = bool(jnp.all(logits == jax.jit(lambda m, x: m(x))(model, test_images)))
    return {"accuracy": accuracy, "most_of_four": int(groups.max()), "same": same}


if __name__ == "__main__":
    main()
