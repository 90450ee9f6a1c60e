"""Truncated singular value decomposition, through the smaller Gram matrix."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxcompress.decomposition.modes import check_array, check_rank, matmul
from jaxcompress.decomposition.subspace import leading, width_of
from jaxcompress.errors import SpecError
from jaxcompress.numerics import unit_scale

# From this many columns on, a filtered subspace of few is less work than `eigh` of all.
_LARGE = 512


def squared_singular_values(w: jax.Array) -> jax.Array:
    """The squares of all singular values of `[..., m, n]`, descending, in float32.

    They are eigenvalues of the smaller Gram matrix; each is exact to about
    `eps * n * s_max**2`, which is what a rank by energy needs.

    Examples:
      >>> import jax.numpy as jnp
      >>> squared_singular_values(jnp.diag(jnp.array([3.0, 1.0]))).round(4).tolist()
      [9.0, 1.0]
    """
    w = w.astype(jnp.float32)
    w = w if w.shape[-1] <= w.shape[-2] else jnp.swapaxes(w, -1, -2)
    gram = matmul(jnp.swapaxes(w, -1, -2), w)
    return jnp.maximum(jnp.linalg.eigvalsh(gram)[..., ::-1], 0.0)


def truncated_svd(w: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """The nearest product of two factors of a given rank: `w ~ left @ right`.

    With `w = U S V'`, `left = U_r S_r**0.5` and `right = S_r**0.5 V_r'`, so that both factors have
    the same scale. The leading right vectors come from the Gram matrix of the shorter side, whose
    `eigh` is some thirty times faster than `jnp.linalg.svd`; a Gram matrix blurs directions
    below `sqrt(eps) * s_max`, so the subspace is refined by one step of block power iteration,
    orthonormalized, and `w` projected on it. The squared error exceeds the best possible one
    (Eckart and Young, 1936) by at most a small multiple of `eps * |w|**2`. The vectors of a large
    matrix at a small rank come from the filtered subspace of `randomized.svd` instead, within 1e-5
    of the least error.

    Args:
      w: `[..., m, n]` of any float dtype.
      rank: from 1 to `min(m, n)`; static.

    Returns:
      `left` `[..., m, rank]` and `right` `[..., rank, n]`, in the dtype of `w`.

    Raises:
      SpecError: for an integer array, fewer than two axes, or a rank that is impossible.

    References:
      Eckart and Young, *The approximation of one matrix by another of lower rank*, 1936;
      Halko, Martinsson and Tropp, *Finding Structure with Randomness*, 2011 (refinement).

    Examples:
      >>> import jax.numpy as jnp
      >>> w = jnp.outer(jnp.arange(3.0), jnp.arange(4.0))
      >>> left, right = truncated_svd(w, 1)
      >>> left.shape, right.shape, bool(jnp.allclose(left @ right, w, atol=1e-5))
      ((3, 1), (1, 4), True)
    """
    check_array(w, "truncated_svd")
    if check_rank(rank, "truncated_svd") > min(w.shape[-2:]):
        raise SpecError(
            f"truncated_svd: rank {rank} of shape {w.shape}; write at most {min(w.shape[-2:])}"
        )
    wide = w.shape[-1] > w.shape[-2]
    a = w.astype(jnp.float32)
    a = jnp.swapaxes(a, -1, -2) if wide else a  # [..., long, short]
    # Scaled to the largest magnitude, so that squaring neither overflows nor underflows.
    scale, inverse = unit_scale(jnp.max(jnp.abs(a), axis=(-1, -2), keepdims=True))
    a = a * inverse
    v = _leading(a, rank)
    q, _ = jnp.linalg.qr(matmul(a, v))  # [..., long, rank]
    b = matmul(jnp.swapaxes(q, -1, -2), a)  # [..., rank, short]
    left, right = balanced(q, b)
    left, right = left * jnp.sqrt(scale), right * jnp.sqrt(scale)
    if wide:
        left, right = jnp.swapaxes(right, -1, -2), jnp.swapaxes(left, -1, -2)
    return left.astype(w.dtype), right.astype(w.dtype)


def balanced(q: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two factors of the product `q @ b` of the same scale, `U S**0.5` and `S**0.5 V'`.

    Args:
      q: float32 `[..., m, r]` with orthonormal columns.
      b: float32 `[..., r, n]`, of magnitudes near 1: its squares are summed.

    Examples:
      >>> import jax.numpy as jnp
      >>> left, right = balanced(jnp.array([[1.0], [0.0]]), jnp.array([[0.0, 4.0]]))
      >>> abs(left).tolist(), abs(right).tolist()
      ([[2.0], [0.0]], [[0.0, 2.0]])
    """
    # The rows of b carry the singular values, up to a rotation.
    values, rotation = jnp.linalg.eigh(matmul(b, jnp.swapaxes(b, -1, -2)))
    rotation, values = rotation[..., ::-1], jnp.maximum(values[..., ::-1], 0.0)
    floor = jnp.finfo(jnp.float32).eps * values[..., :1] + jnp.finfo(jnp.float32).tiny
    root = jnp.maximum(values, floor)[..., None, :] ** 0.25
    right = matmul(jnp.swapaxes(rotation, -1, -2), b) / jnp.swapaxes(root, -1, -2)
    return matmul(q, rotation) * root, right


def _leading(a: jax.Array, rank: int) -> jax.Array:
    """The leading right singular vectors `[..., short, rank]` of `[..., long, short]`."""
    if a.shape[-1] >= _LARGE and 2 * width_of(rank) <= a.shape[-1]:
        one = functools.partial(leading, rank=rank, tolerance=4e-6, key=jax.random.key(0))
        return jnp.vectorize(one, signature="(m,n)->(n,r)")(a)
    _, v = jnp.linalg.eigh(matmul(jnp.swapaxes(a, -1, -2), a))
    return v[..., ::-1][..., :rank]
