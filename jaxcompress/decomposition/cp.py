"""CP decomposition: an array as a sum of rank-one terms."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.decomposition.modes import (
    check_array,
    check_rank,
    contract,
    left_basis,
    matmul,
    proximal,
    scaled,
    unfold,
)
from jaxcompress.errors import SpecError
from jaxcompress.specs import is_count

_Terms = tuple[tuple[jax.Array, ...], jax.Array]
_INITS = ("svd", "random")


def cp(
    x: jax.Array,
    rank: int,
    *,
    iterations: int = 50,
    tolerance: float = 1e-6,
    init: str = "svd",
    key: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """A sum of `rank` outer products: `x[i1, .., id] ~ sum_r f1[i1, r] * .. * fd[id, r]`.

    Alternating least squares: with all factors but one fixed, the best one solves
    `f_k G = M`, where `M[i, r]` is x contracted with the column r of every other factor, and G is
    the elementwise product of their Gram matrices. The other factors have columns of length one,
    so G has ones on its diagonal; the system solved is `f_k (G + c I) = M + c old_f_k` with
    `c = 1e-6 trace(G)`, a proximal step: it never raises the error, has the same fixed points, and
    is solvable where columns coincide. A sweep costs two products of x with a factor, and two like
    these to compare.

    After each sweep a step `sqrt(sweep)` times as long is tried and taken where its error is less.

    The result is a local optimum and depends on where it began. Terms that grow while they
    cancel are the known weakness of CP; see `tucker` for what has none.

    Args:
      x: an array of floats with at least two axes.
      rank: the number of terms, at least 1; static. It may exceed every axis.
      iterations: the largest number of sweeps over all factors.
      tolerance: ends where a sweep lowers `|x - approximation| / |x|` by less; 0: never.
      init: "svd", the leading left singular vectors of each unfolding, filled up with normal
        values where an axis has fewer than `rank`; or "random", normal values.
      key: draws the normal values; None: a fixed one.

    Returns:
      One factor `[n_k, rank]` for each axis, in the dtype of x. The length of a term is spread
      evenly over its columns.

    Raises:
      SpecError: for an integer array, less than two axes, a rank below 1 or another `init`.

    References:
      Lebedev et al., *Speeding-up Convolutional Neural Networks Using Fine-tuned
      CP-Decomposition*, 2014; Kolda and Bader, *Tensor Decompositions and Applications*, 2009;
      Harshman, *Foundations of the PARAFAC Procedure*, 1970 (the longer step).

    Examples:
      >>> import jax.numpy as jnp
      >>> x = jnp.einsum("i,j,k->ijk", jnp.arange(3.0), jnp.ones(4), jnp.arange(5.0))
      >>> a, b, c = cp(x, 1)
      >>> a.shape, bool(jnp.allclose(jnp.einsum("ir,jr,kr->ijk", a, b, c), x, atol=1e-5))
      ((3, 1), True)
    """
    check_array(x, "cp")
    rank = check_rank(rank, "cp")
    if not is_count(iterations, 1):
        raise SpecError(f"cp: iterations={iterations!r}; write a whole number of at least 1")
    if init not in _INITS:
        raise SpecError(f"cp: init={init!r}; write one of {', '.join(_INITS)}")
    if x.size == 0:
        return tuple(jnp.zeros((n, rank), x.dtype) for n in x.shape)
    key = jax.random.key(0) if key is None else key
    return _cp(x, key, iterations, tolerance, rank, init)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _cp(
    x: jax.Array, key: jax.Array, iterations: Any, tolerance: Any, rank: int, init: str
) -> tuple[jax.Array, ...]:
    a, scale = scaled(x)
    norm = jnp.sqrt(jnp.sum(a**2))

    def error_of(factors: tuple[jax.Array, ...], weights: jax.Array) -> jax.Array:
        # From the residual itself: a difference of squares says nothing below sqrt(eps).
        return jnp.sqrt(jnp.sum((a - _expand(factors, weights)) ** 2)) / jnp.maximum(norm, 1e-30)

    def step(state: tuple) -> tuple:
        i, old, error, _ = state
        new = _sweep(a, *old)
        far = _beyond(old, new, jnp.sqrt(i + 1.0))
        errors = error_of(*new), error_of(*far)
        best = jax.tree.map(lambda n, f: jnp.where(errors[1] < errors[0], f, n), new, far)
        now = jnp.minimum(*errors)
        return i + 1, best, now, (error - now >= tolerance) | (tolerance <= 0)

    start = (0, (_initial(a, rank, init, key), jnp.ones(rank)), jnp.inf, True)
    _, (factors, weights), _, _ = lax.while_loop(
        lambda state: (state[0] < iterations) & state[-1], step, start
    )
    share = (weights * scale) ** (1 / x.ndim)
    return tuple((f * share).astype(x.dtype) for f in factors)


def _initial(a: jax.Array, rank: int, init: str, key: jax.Array) -> tuple[jax.Array, ...]:
    factors = []
    for mode, k in enumerate(jax.random.split(key, a.ndim)):
        n = a.shape[mode]
        factor = jax.random.normal(k, (n, rank))
        if init == "svd":
            basis = left_basis(unfold(a, mode), min(n, rank))
            factor = jnp.concatenate([basis, factor[:, basis.shape[1] :]], axis=1)
        factors.append(_unit_columns(factor)[0])
    return tuple(factors)


def _unit_columns(f: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Columns of length one, or zero, and their lengths."""
    length = jnp.sqrt(jnp.sum(f**2, axis=0))
    return f / jnp.where(length > 0, length, 1.0), length


def _beyond(old: _Terms, new: _Terms, times: jax.Array) -> _Terms:
    """A longer step in the direction of the last sweep."""
    factors, weights = jax.tree.map(lambda o, n: o + times * (n - o), old, new)
    pairs = [_unit_columns(f) for f in factors]
    for _, length in pairs:
        weights = weights * length
    return tuple(f for f, _ in pairs), weights


def _sweep(
    a: jax.Array, factors: tuple[jax.Array, ...], weights: jax.Array
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Every factor once: all but that of the longest axis share the product of x with it."""
    *others, longest = sorted(range(a.ndim), key=lambda mode: a.shape[mode])
    new = list(factors)
    shared = _without(a, new[longest], longest)
    for mode in others:
        new[mode], weights = _solve(_gathered(shared, new, longest, mode), new, weights, mode)
    last = _gathered(_without(a, new[others[-1]], others[-1]), new, others[-1], longest)
    new[longest], weights = _solve(last, new, weights, longest)
    return tuple(new), weights


def _without(a: jax.Array, factor: jax.Array, mode: int) -> jax.Array:
    """`[other axes.., rank]`: x contracted along a mode with each column."""
    return jnp.moveaxis(contract(a, factor, mode), mode, -1)


def _gathered(t: jax.Array, factors: list[jax.Array], gone: int, mode: int) -> jax.Array:
    """`[n_mode, rank]`: what `_without` left, contracted with the column r of the others too."""
    for other in reversed(range(len(factors))):
        if other not in (gone, mode):
            axis = other - (gone < other)
            t = jnp.sum(t * factors[other].reshape(_spread(t.ndim, axis, factors[other])), axis)
    return t


def _spread(ndim: int, axis: int, factor: jax.Array) -> tuple[int, ...]:
    return tuple(
        factor.shape[0] if i == axis else factor.shape[1] if i == ndim - 1 else 1
        for i in range(ndim)
    )


def _solve(
    m: jax.Array, factors: list[jax.Array], weights: jax.Array, mode: int
) -> tuple[jax.Array, jax.Array]:
    """The best factor of a mode, as columns of length one and their lengths."""
    grams = [matmul(f.T, f) for k, f in enumerate(factors) if k != mode]
    gram = functools.reduce(jnp.multiply, grams)
    return _unit_columns(proximal(gram, m, factors[mode] * weights))


def _expand(factors: tuple[jax.Array, ...], weights: jax.Array) -> jax.Array:
    """The array, by one product of the rows of the first half with those of the second."""
    middle = len(factors) // 2
    left, right = _rows(factors[:middle]) * weights, _rows(factors[middle:])
    return matmul(left, right.T).reshape(tuple(f.shape[0] for f in factors))


def _rows(factors: tuple[jax.Array, ...]) -> jax.Array:
    """`[product of n_k, rank]`: the products of their rows."""
    out = factors[0]
    for f in factors[1:]:
        out = (out[:, None] * f).reshape(math.prod((out.shape[0], f.shape[0])), f.shape[1])
    return out
