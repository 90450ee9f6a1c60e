"""Factors of large symmetric matrices, in products rather than in LAPACK where those are faster."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.lowering import by_devices

# Columns at a time: LAPACK's threads meet those of XLA on the same cores from a few hundred on.
_COLUMNS = 128
# Halved at least so often as to have parts of this size, for loops go over whole matrices.
_PART = 1024

_HIGHEST = lax.Precision.HIGHEST


def cholesky(matrix: jax.Array) -> jax.Array:
    """The lower Cholesky factor of `[K, K]`, NaN where there is none.

    On one CPU device in blocks of columns, whose work is in products: it took a third of the time
    of one large factorization for 2048 inputs.

    Examples:
      >>> import jax.numpy as jnp
      >>> cholesky(jnp.array([[4.0, 2.0], [2.0, 5.0]])).tolist()
      [[2.0, 0.0], [1.0, 2.0]]
    """
    if matrix.shape[0] <= _COLUMNS:
        return lax.linalg.cholesky(matrix)
    return by_devices(lax.linalg.cholesky, _halved)(matrix)


def _halved(matrix: jax.Array) -> jax.Array:
    """The factor by those of two halves of the columns, or by columns."""
    size = matrix.shape[0]
    if size <= _PART:
        return _by_columns(matrix)
    half = _middle(size)
    first = _halved(matrix[:half, :half])
    below = lax.linalg.triangular_solve(
        first, matrix[half:, :half], left_side=False, lower=True, transpose_a=True
    )
    second = _halved(matrix[half:, half:] - jnp.matmul(below, below.T, precision=_HIGHEST))
    return jnp.block([[first, jnp.zeros((half, size - half), matrix.dtype)], [below, second]])


def _by_columns(matrix: jax.Array) -> jax.Array:
    size = matrix.shape[0]
    # Filled up by ones on the diagonal, which change nothing.
    more = -size % _COLUMNS
    fill = jnp.where(jnp.arange(size + more) < size, 0.0, 1.0).astype(matrix.dtype)
    whole = jnp.pad(matrix, (0, more)) + jnp.diag(fill)
    rows = jnp.arange(size + more)[:, None]

    def step(j: Any, root: jax.Array) -> jax.Array:
        start = j * _COLUMNS
        before = lax.dynamic_slice_in_dim(root, start, _COLUMNS)
        part = lax.dynamic_slice_in_dim(whole, start, _COLUMNS, axis=1)
        part = part - jnp.matmul(root, before.T, precision=_HIGHEST)
        corner = lax.linalg.cholesky(lax.dynamic_slice_in_dim(part, start, _COLUMNS))
        part = lax.linalg.triangular_solve(
            corner, part, left_side=False, lower=True, transpose_a=True
        )
        part = jnp.where(rows >= start + _COLUMNS, part, 0.0)
        part = lax.dynamic_update_slice_in_dim(part, corner, start, axis=0)
        return lax.dynamic_update_slice_in_dim(root, part, start, axis=1)

    root = lax.fori_loop(0, whole.shape[0] // _COLUMNS, step, jnp.zeros_like(whole))
    return root[:size, :size]


def upper_inverse(root: jax.Array) -> jax.Array:
    """The inverse of an upper triangular `[K, K]`, by those of its halves where it is large.

    Examples:
      >>> import jax.numpy as jnp
      >>> upper_inverse(jnp.array([[2.0, 1.0], [0.0, 4.0]])).tolist()
      [[0.5, -0.125], [0.0, 0.25]]
    """
    size = root.shape[0]
    if size <= _PART:
        eye = jnp.eye(size, dtype=root.dtype)
        return lax.linalg.triangular_solve(root, eye, left_side=True, lower=False)
    half = _middle(size)
    first, second = upper_inverse(root[:half, :half]), upper_inverse(root[half:, half:])
    across = jnp.matmul(root[:half, half:], second, precision=_HIGHEST)
    across = -jnp.matmul(first, across, precision=_HIGHEST)
    return jnp.block([[first, across], [jnp.zeros((size - half, half), root.dtype), second]])


def _middle(size: int) -> int:
    return -(-size // (2 * _COLUMNS)) * _COLUMNS
