"""Soft k-means, differentiable through all of its iterations, without a table that is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Vectors for which a table of weights, one for each centroid, exists at a time.
_BLOCK = 1 << 13


def attention(vectors: jax.Array, centroids: jax.Array, tau: jax.Array | float) -> jax.Array:
    """How much each vector belongs to each centroid: `softmax_j(-|w_i - c_j|^2 / tau)`.

    Args:
      vectors: `[n, d]`.
      centroids: `[k, d]`.
      tau: the temperature, in squared units of the vectors; towards 0 the nearest one gets all.

    Returns:
      float32 `[n, k]`, rows that sum to 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> attention(jnp.array([[0.0], [0.5]]), jnp.array([[0.0], [1.0]]), 0.01)[1].tolist()
      [0.5, 0.5]
    """
    w, c = vectors.astype(jnp.float32), centroids.astype(jnp.float32)
    apart = jnp.sum((w[:, None, :] - c) ** 2, axis=-1)
    # The nearest one first, so that a small temperature divides no large number.
    apart = apart - lax.stop_gradient(jnp.min(apart, axis=-1, keepdims=True))
    # Annealed to nothing, the nearest one gets all.
    return jax.nn.softmax(-apart / jnp.maximum(tau, jnp.finfo(jnp.float32).tiny), axis=-1)


def soft_kmeans(
    vectors: jax.Array, centroids: jax.Array, tau: jax.Array | float, iterations: int
) -> jax.Array:
    """The centroids after some iterations of soft k-means.

    `a = attention(w, c)`, `c_j <- sum_i a_ij w_i / sum_i a_ij`, in float32. All of it is
    differentiable; backward, the attention of a block of vectors is computed anew, so that what is
    kept are the k centroids of each iteration.

    Args:
      vectors: `[n, d]`, any float dtype.
      centroids: `[k, d]`, where they start.
      tau: the temperature.
      iterations: how many; static.

    Returns:
      float32 `[k, d]`. A centroid to which nothing belongs stays.

    References:
      Cho, Alizadeh-Vahid, Adya and Rastegari, *DKM: Differentiable K-Means Clustering Layer for
      Neural Network Compression*, 2022.

    Examples:
      >>> import jax.numpy as jnp
      >>> w = jnp.array([[0.0], [1.0], [10.0], [12.0]])
      >>> soft_kmeans(w, jnp.array([[0.0], [9.0]]), 1e-3, 3).tolist()
      [[0.5], [11.0]]
    """
    if not vectors.shape[0]:
        return centroids.astype(jnp.float32)
    blocks, inside = _blocks(vectors)

    @jax.checkpoint
    def sums(c: jax.Array, block: jax.Array, inside: jax.Array) -> Any:
        a = attention(block, c, tau) * inside[:, None]
        return jnp.matmul(a.T, block, precision=lax.Precision.HIGHEST), jnp.sum(a, axis=0)

    def step(c: jax.Array, _: None) -> tuple[jax.Array, None]:
        zeros = jnp.zeros_like(c), jnp.zeros(c.shape[0], jnp.float32)
        add = lambda total, xs: (jax.tree.map(jnp.add, total, sums(c, *xs)), None)
        (top, bottom), _ = lax.scan(add, zeros, (blocks, inside))
        some = bottom > jnp.finfo(jnp.float32).tiny
        return jnp.where(some[:, None], top / jnp.where(some, bottom, 1)[:, None], c), None

    return lax.scan(step, centroids.astype(jnp.float32), None, length=iterations)[0]


def soft_values(vectors: jax.Array, centroids: jax.Array, tau: jax.Array | float) -> jax.Array:
    """Each vector as the mean of the centroids that it belongs to, `attention @ centroids`.

    Args:
      vectors: `[n, d]`.
      centroids: `[k, d]`.
      tau: the temperature.

    Returns:
      float32 `[n, d]`.

    Examples:
      >>> import jax.numpy as jnp
      >>> soft_values(jnp.array([[0.1], [0.5]]), jnp.array([[0.0], [1.0]]), 1e-3).tolist()
      [[0.0], [0.5]]
    """
    centroids = centroids.astype(jnp.float32)

    def one(block: jax.Array) -> jax.Array:
        a = attention(block, centroids, tau)
        return jnp.matmul(a, centroids, precision=lax.Precision.HIGHEST)

    return _by_block(one, vectors)


def soft_histogram(vectors: jax.Array, centroids: jax.Array, tau: jax.Array | float) -> jax.Array:
    """The share of each centroid, the mean of `attention` over all vectors; float32 `[k]`.

    Examples:
      >>> import jax.numpy as jnp
      >>> w = jnp.array([[0.0], [0.1], [0.2], [1.0]])
      >>> soft_histogram(w, jnp.array([[0.0], [1.0]]), 1e-3).tolist()
      [0.75, 0.25]
    """
    n = vectors.shape[0]
    if not n:
        return jnp.full(centroids.shape[0], 1 / centroids.shape[0], jnp.float32)
    blocks, inside = _blocks(vectors)
    one = jax.checkpoint(
        lambda block, inside: jnp.sum(attention(block, centroids, tau) * inside[:, None], axis=0)
    )
    add = lambda total, xs: (total + one(*xs), None)
    total = lax.scan(add, jnp.zeros(centroids.shape[0], jnp.float32), (blocks, inside))[0]
    return total / n


def _by_block(fn: Callable[[jax.Array], jax.Array], vectors: jax.Array) -> jax.Array:
    n = vectors.shape[0]
    if not n:
        return jnp.zeros(vectors.shape, jnp.float32)
    out = lax.map(jax.checkpoint(fn), _blocks(vectors)[0])
    return out.reshape(-1, *out.shape[2:])[:n]


def _blocks(vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Vectors in float32 in blocks of equal size, and 1 where there is one, 0 where filled up."""
    n = vectors.shape[0]
    size = max(1, min(_BLOCK, n))
    padded = jnp.pad(vectors.astype(jnp.float32), ((0, -n % size), (0, 0)))
    inside = (jnp.arange(padded.shape[0]) < n).astype(jnp.float32)
    return padded.reshape(-1, size, vectors.shape[1]), inside.reshape(-1, size)
