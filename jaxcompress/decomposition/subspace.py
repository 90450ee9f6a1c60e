"""Leading eigenvectors of a large symmetric matrix, by filtered subspace iteration."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.decomposition.modes import matmul, orthonormal, through

# log(1 / eps): what rounding leaves of the least wanted direction where the largest grows by more.
_GROWTH = 16.0
# Products with the Gram matrix between two orthonormalizations, and the most rounds of them.
_DEGREE, _ROUNDS = 12, 32


def ritz(
    apply: Callable[[jax.Array], jax.Array], q: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best eigenpairs within a basis: values, descending, vectors, and G times those."""
    z = apply(q)
    values, rotation = jnp.linalg.eigh(matmul(q.T, z))
    rotation = rotation[:, ::-1]
    return values[::-1], matmul(q, rotation), matmul(z, rotation)


def singular(a: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`ritz` of `a' a` by the singular values of `a q`, which tell small ones from rounding."""
    y = matmul(a, q)
    _, s, vt = jnp.linalg.svd(jnp.linalg.qr(y, mode="r"))
    return s**2, matmul(q, vt.T), matmul(a.T, matmul(y, vt.T))


def amplified(
    apply: Callable[[jax.Array], jax.Array],
    values: jax.Array,
    q: jax.Array,
    z: jax.Array,
    degree: int,
) -> jax.Array:
    """An orthonormal basis closer to the leading eigenvectors of a positive semidefinite G.

    `T_d(2 G / b - 1) q` with Chebyshev's polynomial and b the least Ritz value: what lies below b
    stays within one, what lies above grows as fast as a polynomial can. The degree d is at most
    `degree`, and less where the largest would grow beyond what float32 can tell apart.

    Args:
      apply: `q -> G q`.
      values: from `ritz`.
      q: from `ritz`, `[n, r]`.
      z: from `ritz`, `G q`.
      degree: at least 1.

    References:
      Zhou, Saad, Tiago and Chelikowsky, *Self-Consistent-Field Calculations Using
      Chebyshev-Filtered Subspace Iteration*, 2006.
    """
    largest = jnp.maximum(values[0], 1e-30)
    # Not below what rounding makes of zero eigenvalues.
    cut = jnp.maximum(values[-1], 1e-6 * largest)
    ratio = 2 * largest / cut - 1
    growth = jnp.log(ratio + jnp.sqrt(jnp.maximum(ratio**2 - 1, 0.0)))
    turns = jnp.clip(_GROWTH / jnp.maximum(growth, 1e-3), 1, degree).astype(jnp.int32)

    def step(_: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        before, now = pair
        return now, (4 / cut) * apply(now) - 2 * now - before

    _, out = lax.fori_loop(1, turns, step, (q, (2 / cut) * z - q))
    return orthonormal(out)


def width_of(rank: int) -> int:
    """The columns of the subspace in which `rank` eigenvectors are sought."""
    return rank + rank // 4 + 16


def leading(a: jax.Array, rank: int, tolerance: float, key: jax.Array) -> jax.Array:
    """The leading right singular vectors `[short, rank]` of a matrix `[long, short]`.

    See `svd`. Of largest magnitude near one, since it is squared.
    """
    short, width = a.shape[1], width_of(rank)
    if 2 * width > short:
        _, v = jnp.linalg.eigh(matmul(a.T, a))
        return v[:, ::-1][:, :rank]
    apply = functools.partial(through, a.T)

    def left_out(q: jax.Array) -> jax.Array:
        # From the residual itself: a difference of squares says nothing below sqrt(eps).
        q = q[:, :rank]
        return jnp.sum((a - matmul(matmul(a, q), q.T)) ** 2)

    def step(state: tuple) -> tuple:
        i, (values, q, z), before, last, _ = state
        triple = singular(a, amplified(apply, values, q, z, _DEGREE))
        now = left_out(triple[1])
        fall = before - now
        # Falls shrink at least geometrically: what is to come is fall**2 / (last - fall) at most.
        done = (fall <= tolerance * now) | (fall**2 <= tolerance * now * (last - fall))
        return i + 1, triple, now, fall, ~done

    start = singular(a, orthonormal(apply(jax.random.normal(key, (short, width)))))
    state = (0, start, left_out(start[1]), 0.0, True)
    _, (_, q, _), _, _, _ = lax.while_loop(
        lambda state: (state[0] < _ROUNDS) & state[-1], step, state
    )
    return q[:, :rank]
