"""Singular value decomposition from products with a random matrix."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxcompress.decomposition.modes import (
    check_array,
    check_rank,
    matmul,
    orthonormal,
    scaled,
)
from jaxcompress.decomposition.subspace import leading
from jaxcompress.errors import SpecError


def randomized_svd(
    w: jax.Array,
    rank: int,
    *,
    oversample: int = 8,
    power: int = 2,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The nearest product of two factors, nearly: `w ~ left @ right`, in few products with w.

    The range is that of `(w w')**power w g` with g normal `[n, rank + oversample]`, orthonormal
    after each product. The expected squared error without power iterations is at most
    `1 + rank / (oversample - 1)` times the best, and approaches it as `power` grows; `svd` goes on
    until it is there.

    Args:
      w: `[m, n]` of floats; `vmap` for a stack.
      rank: from 1 to `min(m, n)`; static.
      oversample: columns of g more than the rank, cut to `min(m, n)`.
      power: products with `w w'`; 0 suits spectra that decay fast.
      key: draws g; None: a fixed one.

    Returns:
      `left` `[m, rank]` and `right` `[rank, n]` in the dtype of w, balanced as by
      `truncated_svd`.

    Raises:
      SpecError: for an integer array, another number of axes, or a rank that is impossible.

    References:
      Halko, Martinsson and Tropp, *Finding Structure with Randomness*, 2011.

    Examples:
      >>> import jax.numpy as jnp
      >>> w = jnp.outer(jnp.arange(3.0), jnp.arange(4.0))
      >>> left, right = randomized_svd(w, 1)
      >>> left.shape, right.shape, bool(jnp.allclose(left @ right, w, atol=1e-5))
      ((3, 1), (1, 4), True)
    """
    rank = _checked(w, rank, "randomized_svd")
    key = jax.random.key(0) if key is None else key
    return _randomized_svd(w, key, rank, min(rank + oversample, *w.shape), power)


def svd(
    w: jax.Array, rank: int, *, tolerance: float = 4e-6, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The leading singular vectors and values: `w ~ (u * s) @ vt`, without the other ones.

    A random subspace of `1.25 rank + 16` columns is filtered by Chebyshev polynomials of the Gram
    matrix (`subspace.amplified`) until the rounds to come would lower the squared error by less
    than `tolerance` times what is left. Where the subspace would hold more than half of all
    directions, the Gram matrix is decomposed whole. The error exceeds the least possible by less
    than 1e-5 of it and a small multiple of `eps |w|`.

    Args:
      w: `[m, n]` of floats; `vmap` for a stack.
      rank: from 1 to `min(m, n)`; static.
      tolerance: the relative fall of the squared error yet to come that ends it.
      key: draws the first subspace; None: a fixed one.

    Returns:
      `u` `[m, rank]` and `vt` `[rank, n]` in the dtype of w, orthonormal in float32, and `s`
      `[rank]`, descending, in float32.

    Raises:
      SpecError: for an integer array, another number of axes, or a rank that is impossible.

    References:
      Zhou, Saad, Tiago and Chelikowsky, *Self-Consistent-Field Calculations Using
      Chebyshev-Filtered Subspace Iteration*, 2006.

    Examples:
      >>> import jax.numpy as jnp
      >>> u, s, vt = svd(jnp.diag(jnp.array([3.0, 1.0, 2.0])), 2)
      >>> s.round(4).tolist(), u.shape, vt.shape
      ([3.0, 2.0], (3, 2), (2, 3))
    """
    rank = _checked(w, rank, "svd")
    return _svd(w, jax.random.key(0) if key is None else key, rank, tolerance)


def _checked(w: jax.Array, rank: int, name: str) -> int:
    check_array(w, name)
    if w.ndim != 2:
        raise SpecError(f"{name}: shape {w.shape}; write one matrix, and vmap for a stack")
    if check_rank(rank, name) > min(w.shape):
        raise SpecError(f"{name}: rank {rank} of shape {w.shape}; write at most {min(w.shape)}")
    return int(rank)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _randomized_svd(
    w: jax.Array, key: jax.Array, rank: int, width: int, power: int
) -> tuple[jax.Array, jax.Array]:
    a, scale = scaled(w)
    q = orthonormal(matmul(a, jax.random.normal(key, (w.shape[1], width))))
    for _ in range(power):
        q = orthonormal(matmul(a, orthonormal(matmul(a.T, q))))
    b = matmul(q.T, a)
    values, rotation = jnp.linalg.eigh(matmul(b, b.T))
    values, rotation = values[::-1][:rank], rotation[:, ::-1][:, :rank]
    eps, tiny = jnp.finfo(jnp.float32).eps, jnp.finfo(jnp.float32).tiny
    root = jnp.maximum(values, eps * values[0] + tiny) ** 0.25
    left = matmul(q, rotation) * (root * jnp.sqrt(scale))
    right = matmul(rotation.T, b) * (jnp.sqrt(scale) / root)[:, None]
    return left.astype(w.dtype), right.astype(w.dtype)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _svd(
    w: jax.Array, key: jax.Array, rank: int, tolerance: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    a, scale = scaled(w)
    wide = w.shape[1] > w.shape[0]
    a = a.T if wide else a  # [long, short]
    v = leading(a, rank, tolerance, key)
    u = orthonormal(matmul(a, v))
    # Exact within the subspace: the small factor has the rounding of its size alone.
    inner, s, vt = jnp.linalg.svd(matmul(u.T, a), full_matrices=False)
    u = matmul(u, inner)
    u, vt = (vt.T, u.T) if wide else (u, vt)
    return u.astype(w.dtype), s * scale, vt.astype(w.dtype)
