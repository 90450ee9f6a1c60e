"""Curvature of a loss, to be summed over batches: the Hessian's diagonal, squared gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.gradients.batches import each_example
from jaxcompress.gradients.weights import Weights, float32, placed_like


def hessian_diagonal(
    loss: Callable[..., jax.Array], weights: Weights, args: tuple[Any, ...], extra: Any
) -> list[jax.Array]:
    """The mean over probes of `z * (H z)`, one probe after the other.

    A term of `mean_over_batches`, whose extra are the keys of the probes. Summed over a leaf, it
    estimates the trace of its block of H.
    """
    keys, batch = extra
    values = weights.values
    grad = lambda values: jax.grad(loss)(values, *args)

    def probe(sums: list[jax.Array], key: jax.Array) -> tuple[list[jax.Array], None]:
        parts = jax.random.split(jax.random.fold_in(key, batch), len(values))
        signs = [
            placed_like(x, jax.random.rademacher(k, x.shape, x.dtype))
            for k, x in zip(parts, values)
        ]
        curved = jax.jvp(grad, (values,), (signs,))[1]
        return [s + float32(z) * float32(c) for s, z, c in zip(sums, signs, curved)], None

    # Placed like the weights, which on a mesh with Explicit axes is a part of the carry's type.
    start = [jnp.zeros_like(x, dtype=jnp.float32) for x in values]
    sums, _ = jax.lax.scan(probe, start, keys)
    return [x / keys.shape[0] for x in sums]


def squared_gradients(
    loss: Callable[..., jax.Array], weights: Weights, args: tuple[Any, ...], extra: Any
) -> list[jax.Array]:
    """The mean over examples of the square of each one's gradient: the Fisher's diagonal."""
    return [jnp.mean(jnp.square(g), axis=0) for g in each_example(loss, weights, args)]
