"""Sparse training with Flax Linen and its `TrainState`: one line of the loop changes.

    python examples/loop_linen.py

Gradients of four small batches are accumulated for each update, which `sparsify` counts as one.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _digits import load
from flax.training.train_state import TrainState

import jaxcompress as jc


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(10)(x)


@jax.jit
def train_step(state: TrainState, images: jax.Array, labels: jax.Array) -> TrainState:
    def loss(params):
        logits = state.apply_fn({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


def main() -> dict[str, float]:
    """Trains, stores what is left, and tests the file."""
    images, labels, test_images, test_labels = load()
    model = MLP()
    tx = jc.sparsify(  # around the optimizer that was there
        optax.MultiSteps(optax.adamw(3e-3), every_k_schedule=4),
        jc.pruning.magnitude(allocation="erk"),
        jc.pruning.cubic_schedule(0.9, end=200, every=10),
        {"**/kernel": "unstructured"},
    )
    params = model.init(jax.random.key(0), images[:1])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    rng = np.random.default_rng(0)
    for _ in range(1200):
        batch = rng.integers(0, len(labels), 50)
        state = train_step(state, images[batch], labels[batch])
    print(jc.pruning.sparsity_report(state.opt_state))

    small = jc.compress(state.params, {"**/kernel": jc.Prune()})
    print(jc.summary(state.params, small))
    logits = jax.jit(jc.compressed(model.apply))({"params": small}, test_images)
    accuracy = float(jnp.mean(jnp.argmax(logits, axis=-1) == test_labels))
    print(f"{100 * accuracy:.1f}% of the test images")
    return {
        "accuracy": accuracy,
        "sparsity": jc.pruning.sparsity_report(state.opt_state).sparsity,
        "updates": int(state.opt_state.step),
    }


if __name__ == "__main__":
    main()
