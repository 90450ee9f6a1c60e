"""Exactly which weights stay: the k-th largest score without a sort."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def kept_count(size: int, sparsity: float) -> int:
    """How many of `size` values stay: `round(size * (1 - sparsity))`, halves to even.

    Example:
      >>> kept_count(10, 0.9), kept_count(3, 0.5)
      (1, 2)
    """
    return round(size * (1 - sparsity))


def order_bits(scores: jax.Array) -> jax.Array:
    """Non-negative floats as uint32 keys in the same order; exact for all float dtypes up to 32."""
    magnitude = jnp.abs(scores.astype(jnp.float32))
    return lax.bitcast_convert_type(magnitude, jnp.uint32)


def top_mask(scores: jax.Array, k: int) -> jax.Array:
    """A mask of the k largest scores by magnitude, ties broken by the lowest index.

    Bisects on the bits of the k-th largest float: 32 counting passes that need only scalar sums,
    so that a sharded array is never gathered; then on the index among its equals.

    Args:
      scores: any shape; non-negative or signed, magnitudes count. No NaN.
      k: how many to keep, `0 <= k <= scores.size`; static.

    Returns:
      Booleans in the shape of `scores`, exactly k of them true.

    Example:
      >>> import jax.numpy as jnp
      >>> top_mask(jnp.array([1.0, -3.0, 2.0, 2.0]), 2).tolist()
      [False, True, True, False]
    """
    if k <= 0 or scores.size == 0:
        return jnp.zeros(scores.shape, bool)
    keys = order_bits(scores)

    def bit(n: jax.Array, threshold: jax.Array) -> jax.Array:
        trial = threshold | (jnp.uint32(1) << (jnp.uint32(31) - n.astype(jnp.uint32)))
        return jnp.where(jnp.sum(keys >= trial) >= k, trial, threshold)

    # The greatest threshold that at least k keys reach is the k-th largest key.
    threshold = lax.fori_loop(0, 32, bit, jnp.uint32(0))
    above, equal = keys > threshold, keys == threshold
    ties = k - jnp.sum(above)
    index = _linear_index(scores.shape)

    def index_bit(n: jax.Array, bound: jax.Array) -> jax.Array:
        trial = bound | (jnp.uint32(1) << (jnp.uint32(31) - n.astype(jnp.uint32)))
        return jnp.where(jnp.sum(equal & (index < trial)) <= ties, trial, bound)

    # The greatest bound below which at most `ties` equals lie holds exactly that many.
    bound = lax.fori_loop(0, 32, index_bit, jnp.uint32(0))
    return above | (equal & (index < bound))


def _linear_index(shape: tuple[int, ...]) -> jax.Array:
    """The row-major index of each place; elementwise, so it shards like the array it is for."""
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in range(len(shape) - 1, -1, -1):
        index = index + lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
        stride *= shape[axis]
    return index


def n_of_m_mask(scores: jax.Array, n: int, m: int, axis: int) -> jax.Array:
    """Keeps the n largest of each m consecutive magnitudes along an axis, ties by lowest index.

    A last group of fewer than m keeps n of them, or all.

    References:
      Mishra et al., *Accelerating Sparse Deep Neural Networks*, 2021.

    Example:
      >>> import jax.numpy as jnp
      >>> n_of_m_mask(jnp.array([1.0, 4.0, -3.0, 2.0, 5.0]), 2, 4, -1).tolist()
      [False, True, True, False, True]
    """
    length = scores.shape[axis]
    # Integer keys, because some backends compare subnormal floats as zeros.
    moved = jnp.moveaxis(order_bits(scores).astype(jnp.int32), axis, -1)
    padding = [(0, 0)] * (moved.ndim - 1) + [(0, -length % m)]
    groups = jnp.pad(moved, padding, constant_values=-1)
    groups = groups.reshape(*groups.shape[:-1], groups.shape[-1] // m, m)
    rank = jnp.zeros(groups.shape, jnp.int32)
    place = jnp.arange(m)
    for j in range(m):  # m is small: each value's rank is how many beat it
        other = groups[..., j : j + 1]
        rank += ((other > groups) | ((other == groups) & (j < place))).astype(jnp.int32)
    mask = (rank < n).reshape(*moved.shape[:-1], -1)[..., :length]
    return jnp.moveaxis(mask, -1, axis)
