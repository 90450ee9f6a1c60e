"""Steps on the modes of an array that the decompositions share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.errors import SpecError
from jaxcompress.numerics import unit_scale
from jaxcompress.specs import is_count


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product in full float32 precision."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def scaled(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`x` in float32 over a power of two near its largest magnitude, and that power of two."""
    a = x.astype(jnp.float32)
    scale, inverse = unit_scale(jnp.max(jnp.abs(a), initial=0.0))
    return a * inverse, scale


def unfold(x: jax.Array, mode: int) -> jax.Array:
    """The matrix `[n_mode, others]` of an array.

    Examples:
      >>> import jax.numpy as jnp
      >>> unfold(jnp.ones((2, 3, 4)), 1).shape
      (3, 8)
    """
    others = math.prod(x.shape[:mode] + x.shape[mode + 1 :])
    return jnp.moveaxis(x, mode, 0).reshape(x.shape[mode], others)


def contract(x: jax.Array, factor: jax.Array, mode: int) -> jax.Array:
    """`x` with a mode of n values taken to r by a factor `[n, r]`.

    Examples:
      >>> import jax.numpy as jnp
      >>> contract(jnp.ones((2, 3, 4)), jnp.ones((3, 5)), 1).shape
      (2, 5, 4)
    """
    numbers = (((mode,), (0,)), ((), ()))
    out = lax.dot_general(x, factor, numbers, precision=lax.Precision.HIGHEST)
    return jnp.moveaxis(out, -1, mode)


def orthonormal(a: jax.Array) -> jax.Array:
    """An orthonormal basis of the columns, from first to last; filled up where they depend."""
    return jnp.linalg.qr(a)[0]


def left_basis(a: jax.Array, rank: int) -> jax.Array:
    """An orthonormal basis `[m, rank]` of the leading left singular vectors of `[m, n]`.

    They come from the Gram matrix of the shorter side and one step of power iteration, which
    brings back the directions that squaring blurs; see `truncated_svd`. `rank` is at most m.
    """
    m, n = a.shape
    if n < m and rank <= n:
        _, v = jnp.linalg.eigh(matmul(a.T, a))
        return orthonormal(matmul(a, v[:, ::-1][:, :rank]))
    _, u = jnp.linalg.eigh(matmul(a, a.T))
    return orthonormal(matmul(a, matmul(a.T, u[:, ::-1][:, :rank])))


def through(matrix: jax.Array, q: jax.Array) -> jax.Array:
    """The Gram matrix of the rows times q, without squaring it."""
    return matmul(matrix, matmul(matrix.T, q))


def proximal(gram: jax.Array, right: jax.Array, old: jax.Array) -> jax.Array:
    """The factor f nearest to `f gram = right`, from an old one: `f (gram + c I) = right + c old`.

    With `c = 1e-6 trace(gram)`, well above the rounding of the Cholesky factor, a singular system
    is solvable too. A least squares error of which this is the normal equation never rises, and
    f stays where `f gram = right`.
    """
    size = gram.shape[0]
    ridge = 1e-6 * jnp.trace(gram) + 1e-30
    shifted = gram + ridge * jnp.eye(size)
    return jax.scipy.linalg.solve(shifted, (right + ridge * old).T, assume_a="pos").T


def check_array(x: Any, name: str, order: int = 2) -> None:
    """Refuses what is no array of floats of at least some order."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise SpecError(f"{name}: dtype {x.dtype} has no factors; cast to float32 first")
    if x.ndim < order:
        raise SpecError(f"{name}: shape {x.shape} has {x.ndim} axes; write at least {order}")


def check_rank(rank: Any, name: str) -> int:
    """A rank, which is a whole number of at least 1."""
    if not is_count(rank, 1):
        raise SpecError(f"{name}: rank {rank!r}; write a whole number of at least 1")
    return int(rank)


def check_ranks(ranks: Any, count: int, name: str) -> tuple[int, ...]:
    """As many ranks as wanted, or one that stands for all."""
    if not isinstance(ranks, Sequence):
        return (check_rank(ranks, name),) * count
    if len(ranks) != count:
        raise SpecError(f"{name}: {len(ranks)} ranks {tuple(ranks)}; write {count} or one for all")
    return tuple(check_rank(r, name) for r in ranks)
