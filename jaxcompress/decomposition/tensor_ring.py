"""Tensor rings: a tensor train that closes on itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.decomposition.modes import (
    check_array,
    check_ranks,
    left_basis,
    matmul,
    proximal,
    scaled,
)

_Cores = tuple[jax.Array, ...]


def tensor_ring(
    x: jax.Array,
    ranks: int | Sequence[int],
    *,
    iterations: int = 20,
    tolerance: float = 1e-6,
    key: jax.Array | None = None,
) -> _Cores:
    """A ring of cores: `x[i1, .., id] ~ trace(G1[i1] @ .. @ Gd[id])`.

    Successive SVDs give the first cores (TR-SVD): the leading `r_1 r_2` left singular vectors of
    the unfolding `[n_1, others]` are the first, then as in a tensor train. Alternating least
    squares goes on from there (TR-ALS): the best core among fixed others solves a system of
    `r_k r_{k+1}` unknowns, with the proximal step of `cp`. Where an unfolding has not as many
    singular vectors as the ranks ask for, the rest begins with normal values.

    Args:
      x: an array of floats with at least two axes.
      ranks: `(r_1, .., r_d)`, of which `r_k` is between the cores k-1 and k, and `r_1` closes the
        ring; or one for all; static.
      iterations: the largest number of sweeps over all cores; 0 leaves the TR-SVD.
      tolerance: ends where a sweep lowers `|x - approximation| / |x|` by less; 0: never.
      key: draws the normal values; None: a fixed one.

    Returns:
      d cores `[r_k, n_k, r_{k+1}]` in the dtype of x, with `r_{d+1} = r_1`, all of one norm.

    Raises:
      SpecError: for an integer array, less than two axes, or ranks that are not d numbers.

    References:
      Zhao et al., *Tensor Ring Decomposition*, 2016.

    Examples:
      >>> import jax
      >>> x = jax.random.normal(jax.random.key(0), (4, 5, 6))
      >>> [core.shape for core in tensor_ring(x, (2, 2, 3))]
      [(2, 4, 2), (2, 5, 3), (3, 6, 2)]
    """
    check_array(x, "tensor_ring")
    ranks = check_ranks(ranks, x.ndim, "tensor_ring")
    if x.size == 0:
        after = (*ranks[1:], ranks[0])
        return tuple(jnp.zeros(s, x.dtype) for s in zip(ranks, x.shape, after, strict=True))
    key = jax.random.key(0) if key is None else key
    return _tensor_ring(x, key, iterations, tolerance, ranks)


@functools.partial(jax.jit, static_argnums=4)
def _tensor_ring(
    x: jax.Array, key: jax.Array, iterations: Any, tolerance: Any, ranks: tuple[int, ...]
) -> _Cores:
    a, scale = scaled(x)
    norm = jnp.maximum(jnp.sqrt(jnp.sum(a**2)), 1e-30)

    def step(state: tuple) -> tuple:
        i, cores, error, _ = state
        for k in range(a.ndim):
            cores = (*cores[:k], _solve(a, cores, k), *cores[k + 1 :])
        now = jnp.sqrt(jnp.sum((a - _expand(cores)) ** 2)) / norm
        return i + 1, cores, now, (error - now >= tolerance) | (tolerance <= 0)

    start = (0, _successive(a, ranks, key), jnp.inf, True)
    _, cores, _, _ = lax.while_loop(lambda s: (s[0] < iterations) & s[-1], step, start)
    return tuple(c.astype(x.dtype) for c in _of_one_norm(cores, scale))


def _successive(a: jax.Array, ranks: tuple[int, ...], key: jax.Array) -> _Cores:
    """The TR-SVD."""
    edges, keys = (*ranks, ranks[0]), jax.random.split(key, a.ndim)
    u, rest = _cut(a.reshape(a.shape[0], -1), edges[0] * edges[1], keys[0])
    cores = [u.reshape(a.shape[0], edges[0], edges[1]).transpose(1, 0, 2)]
    rest = jnp.moveaxis(rest.reshape(edges[0], -1), 0, 1)  # what closes the ring comes last
    for k in range(1, a.ndim - 1):
        n = a.shape[k]
        u, rest = _cut(rest.reshape(edges[k] * n, -1), edges[k + 1], keys[k])
        cores.append(u.reshape(edges[k], n, edges[k + 1]))
    cores.append(rest.reshape(edges[-2], a.shape[-1], edges[-1]))
    return tuple(cores)


def _cut(matrix: jax.Array, rank: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`[m, n] ~ u @ rest` with as many columns of u as asked for; those too many meet zeros."""
    m, n = matrix.shape
    u = left_basis(matrix, min(rank, m, n))
    rest = matmul(u.T, matrix)
    more = rank - u.shape[1]
    u = jnp.concatenate([u, jax.random.normal(key, (m, more)) / math.sqrt(m)], axis=1)
    return u, jnp.pad(rest, ((0, more), (0, 0)))


def _solve(a: jax.Array, cores: _Cores, k: int) -> jax.Array:
    """The best core k among the others."""
    others = cores[k + 1 :] + cores[:k]
    # The axes as the ring meets them from k on.
    t = a.transpose(*range(k, a.ndim), *range(k))
    n, first, last = a.shape[k], others[0].shape[0], others[-1].shape[2]
    # t: [n_k, rank after k, rank so far, axes to come]; pairs: the same for the square of a chain.
    t = _einsum("knR,pnc->kpcR", t.reshape(n, others[0].shape[1], -1), others[0])
    square = _einsum("pnc,qnd->pqcd", others[0], others[0])
    for core in others[1:]:
        t = _einsum("kpcnR,cnd->kpdR", t.reshape(*t.shape[:3], core.shape[1], -1), core)
        square = _einsum("pqcd,cne,dnf->pqef", square, core, core)
    size = first * last
    gram = square.transpose(0, 2, 1, 3).reshape(size, size)
    old = cores[k].transpose(1, 2, 0).reshape(n, size)
    new = proximal(gram, t.reshape(n, size), old)
    return new.reshape(n, first, last).transpose(2, 0, 1)


def _einsum(subscripts: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, *operands, precision=lax.Precision.HIGHEST)


def _expand(cores: _Cores) -> jax.Array:
    t = cores[0]
    for core in cores[1:-1]:
        t = _einsum("aNb,bnc->aNnc", t, core).reshape(t.shape[0], -1, core.shape[2])
    return _einsum("aNb,bna->Nn", t, cores[-1]).reshape(tuple(c.shape[1] for c in cores))


def _of_one_norm(cores: _Cores, scale: jax.Array) -> _Cores:
    norms = [jnp.sqrt(jnp.sum(c**2)) for c in cores]
    share = scale ** (1 / len(cores))
    for norm in norms:
        share = share * norm ** (1 / len(cores))
    return tuple(c * (share / jnp.where(n > 0, n, 1.0)) for c, n in zip(cores, norms, strict=True))
