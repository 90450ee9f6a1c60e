"""Block-term decomposition: an array as a sum of Tucker terms."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.decomposition.modes import (
    check_array,
    check_rank,
    contract,
    matmul,
    proximal,
    scaled,
    unfold,
)
from jaxcompress.decomposition.tucker import checked, sequential

# Steps of conjugate gradients for the cores in a sweep; they go on from the last sweep's.
_STEPS = 6

_Terms = tuple[jax.Array, tuple[jax.Array, ...]]


def block_term(
    x: jax.Array,
    terms: int,
    ranks: int | Sequence[int],
    modes: Sequence[int] | None = None,
    *,
    iterations: int = 50,
    tolerance: float = 1e-6,
) -> _Terms:
    """A sum of Tucker terms: `x ~ sum_t core[t] x_1 f1[t] .. x_d fd[t]`.

    The terms begin one after the other, each as `hosvd` of what those before leave. Then least
    squares in turns: the factors of one mode, those of all terms together, solve a system of
    `terms * r_k` unknowns with the proximal step of `cp`; are made orthonormal, their triangles
    going into the cores; and the cores of all terms together take a few steps of conjugate
    gradients. No turn raises the error. One term is a Tucker decomposition, ranks of one are `cp`.

    Args:
      x: an array of floats with at least one axis.
      terms: the number of terms.
      ranks: one for each mode, at most its size; or one for all.
      modes: the axes with factors; None: all. The others stay whole.
      iterations: the largest number of sweeps; 0 leaves the terms as they begin.
      tolerance: ends where a sweep lowers `|x - approximation| / |x|` by less; 0: never.

    Returns:
      The cores `[terms, ..]`, of the shape of x with the modes' sizes replaced by their ranks, and
      one factor `[terms, n_k, r_k]` for each of `modes`, with orthonormal columns within a term,
      in the dtype of x.

    Raises:
      SpecError: for an integer array, modes or ranks that do not fit, or no terms.

    References:
      De Lathauwer, *Decompositions of a Higher-Order Tensor in Block Terms*, 2008; Ye et al.,
      *Learning Compact Recurrent Neural Networks with Block-Term Tensor Decomposition*, 2018.

    Examples:
      >>> import jax
      >>> x = jax.random.normal(jax.random.key(0), (4, 5, 6))
      >>> core, factors = block_term(x, 2, (2, 2, 3))
      >>> core.shape, [f.shape for f in factors]
      ((2, 2, 2, 3), [(2, 4, 2), (2, 5, 2), (2, 6, 3)])
    """
    check_array(x, "block_term", 1)
    terms = check_rank(terms, "block_term")
    modes, ranks = checked(x, ranks, modes, "block_term")
    if x.size == 0:
        core = list(x.shape)
        for mode, rank in zip(modes, ranks, strict=True):
            core[mode] = rank
        factors = [jnp.zeros((terms, x.shape[m], r), x.dtype) for m, r in zip(modes, ranks)]
        return jnp.zeros((terms, *core), x.dtype), tuple(factors)
    return _block_term(x, iterations, tolerance, terms, ranks, modes)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _block_term(
    x: jax.Array,
    iterations: Any,
    tolerance: Any,
    terms: int,
    ranks: tuple[int, ...],
    modes: tuple[int, ...],
) -> _Terms:
    a, scale = scaled(x)
    norm = jnp.maximum(jnp.sqrt(jnp.sum(a**2)), 1e-30)

    def step(state: tuple) -> tuple:
        i, core, factors, error, _ = state
        core, factors = _sweep(a, core, factors, modes)
        now = jnp.sqrt(jnp.sum((a - _expand(core, factors, modes)) ** 2)) / norm
        return i + 1, core, factors, now, (error - now >= tolerance) | (tolerance <= 0)

    start = (0, *_deflated(a, terms, ranks, modes), jnp.inf, True)
    _, core, factors, _, _ = lax.while_loop(lambda s: (s[0] < iterations) & s[-1], step, start)
    return (core * scale).astype(x.dtype), tuple(f.astype(x.dtype) for f in factors)


def _deflated(a: jax.Array, terms: int, ranks: tuple[int, ...], modes: tuple[int, ...]) -> _Terms:
    """Each term of what the ones before leave."""

    def step(rest: jax.Array, _: None) -> tuple[jax.Array, _Terms]:
        factors, core = sequential(rest, ranks, modes)
        return rest - _term(core, factors, modes), (core, factors)

    return lax.scan(step, a, None, length=terms)[1]


def _term(core: jax.Array, factors: tuple[jax.Array, ...], modes: tuple[int, ...]) -> jax.Array:
    for factor, mode in zip(factors, modes, strict=True):
        core = contract(core, factor.T, mode)
    return core


def _expand(core: jax.Array, factors: tuple[jax.Array, ...], modes: tuple[int, ...]) -> jax.Array:
    return jnp.sum(jax.vmap(lambda c, f: _term(c, f, modes))(core, factors), axis=0)


def _sweep(
    a: jax.Array, core: jax.Array, factors: tuple[jax.Array, ...], modes: tuple[int, ...]
) -> _Terms:
    """The factors of each mode, then the cores."""
    new = list(factors)
    for i in range(len(modes)):
        core, new[i] = _solve(a, core, tuple(new), modes, i)
    fixed = tuple(new)

    def project(y: jax.Array) -> jax.Array:
        return jax.vmap(lambda f: _term(y, tuple(u.T for u in f), modes))(fixed)

    core, _ = jax.scipy.sparse.linalg.cg(
        lambda c: project(_expand(c, fixed, modes)), project(a), x0=core, tol=1e-6, maxiter=_STEPS
    )
    return core, fixed


def _solve(
    a: jax.Array, core: jax.Array, factors: tuple[jax.Array, ...], modes: tuple[int, ...], i: int
) -> tuple[jax.Array, jax.Array]:
    """The best factors of a mode in all terms, orthonormal, and the cores that go with them."""
    mode, (terms, n, rank) = modes[i], factors[i].shape
    other_modes = modes[:i] + modes[i + 1 :]
    others = factors[:i] + factors[i + 1 :]
    rows = jax.vmap(lambda c, f: unfold(_term(c, f, other_modes), mode))(core, others)
    rows = rows.reshape(terms * rank, -1)
    old = factors[i].transpose(1, 0, 2).reshape(n, terms * rank)
    joint = proximal(matmul(rows, rows.T), matmul(unfold(a, mode), rows.T), old)
    basis, triangle = jnp.linalg.qr(joint.reshape(n, terms, rank).transpose(1, 0, 2))
    return jax.vmap(lambda c, r: contract(c, r.T, mode))(core, triangle), basis
