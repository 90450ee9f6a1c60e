"""Orthogonal Hadamard transforms of any length, in blocks, without a matrix of that length."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import compat

# The largest factor that is kept as a matrix.
_LARGEST = 256


@functools.lru_cache(maxsize=256)
def factors(n: int) -> tuple[int, int, int]:
    """`(blocks, order, power)` with `n = blocks * order * power` for a transform of length n.

    The transform is `blocks` times the Kronecker product of Paley's matrix of that order (1 for
    none) and Sylvester's of size `power`, a power of two. With m the odd part of n, the order is
    the least `2**j m` up to 256 that divides n and is one more than a prime of the form `4 k + 3`:
    then there is one block. Where there is none, the blocks are m of the largest power of two.

    Examples:
      >>> factors(64), factors(384), factors(1536), factors(7), factors(100)
      ((1, 1, 64), (1, 12, 32), (1, 12, 128), (7, 1, 1), (25, 1, 4))
    """
    power = n & -n
    odd = n // power if n else 0
    if odd <= 1:
        return 1, 1, n
    order = 4 * odd
    while order <= _LARGEST and n % order == 0:
        if _is_prime(order - 1):
            return 1, order, n // order
        order *= 2
    return odd, 1, power


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


@functools.lru_cache(maxsize=32)
def paley(order: int) -> np.ndarray:
    """Paley's first Hadamard matrix, for an order one more than a prime of the form `4 k + 3`.

    `H = I + [[0, 1'], [-1, Q]]`, where `Q[i, j]` is the Legendre symbol of `i - j`: entries are
    +1 and -1, and `H H' = order I`. Of order 1: `[[1]]`.

    References:
      Paley, *On Orthogonal Matrices*, 1933.

    Examples:
      >>> h = paley(12)
      >>> bool(np.array_equal(h @ h.T, 12 * np.eye(12)))
      True
    """
    if order == 1:
        return np.ones((1, 1), np.int8)
    q = order - 1
    squares = {k * k % q for k in range(1, q)}
    legendre = np.array([0, *(1 if k in squares else -1 for k in range(1, q))])
    places = np.arange(q)
    out = np.zeros((order, order), np.int8)
    out[0, 1:], out[1:, 0] = 1, -1
    out[1:, 1:] = legendre[(places[:, None] - places[None, :]) % q]
    return out + np.eye(order, dtype=np.int8)


def transform(x: jax.Array, *, axis: int = -1, transposed: bool = False) -> jax.Array:
    """`x H` along an axis, with H the orthogonal block Hadamard matrix of its length.

    In `n (log2(power) + order)` additions a row rather than `n**2`; see `factors`. H is scaled so
    that `H H' = I`.

    Args:
      x: any floating array. It is computed in float32 at least, and rounded once.
      axis: the transformed axis.
      transposed: `x H'`, which undoes it.

    Returns:
      An array of the shape and dtype of `x`.

    References:
      Fino and Algazi, *Unified Matrix Treatment of the Fast Walsh-Hadamard Transform*, 1976.

    Examples:
      >>> import jax.numpy as jnp
      >>> transform(jnp.array([1.0, 0.0, 0.0, 0.0])).tolist()
      [0.5, 0.5, 0.5, 0.5]
    """
    if x.size == 0:
        return x
    # A reshape of a split axis has no type on an Explicit mesh.
    return compat.auto_like(lambda x: _transformed(x, axis, transposed), (x,), x)


def _transformed(x: jax.Array, axis: int, transposed: bool) -> jax.Array:
    n = x.shape[axis]
    blocks, order, power = factors(n)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = jnp.moveaxis(x, axis, -1).astype(wide)
    shape = y.shape
    half = 1
    while half < power:
        y = y.reshape(*shape[:-1], n // (2 * half), 2, half)
        a, b = y[..., 0, :], y[..., 1, :]
        y = jnp.stack([a + b, a - b], axis=-2)
        half *= 2
    if order > 1:
        matrix = paley(order).T if transposed else paley(order)
        y = y.reshape(*shape[:-1], blocks, order, power)
        y = jnp.einsum(
            "...ip,ij->...jp", y, jnp.asarray(matrix, wide), precision=jax.lax.Precision.HIGHEST
        )
    y = y.reshape(shape) * (1 / math.sqrt(order * power))
    return jnp.moveaxis(y.astype(x.dtype), -1, axis)
