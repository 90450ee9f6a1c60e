"""Tucker decompositions: a small core and a factor for each mode."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.decomposition.modes import (
    check_array,
    check_ranks,
    contract,
    left_basis,
    scaled,
    through,
    unfold,
)
from jaxcompress.decomposition.subspace import amplified, ritz
from jaxcompress.errors import SpecError

# Products with the unfolding for each factor and sweep; the sweeps carry the basis on.
_DEGREE = 4


def hosvd(
    x: jax.Array, ranks: int | Sequence[int], modes: Sequence[int] | None = None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The sequentially truncated higher-order SVD: `x ~ core x_1 f1 .. x_d fd`.

    Mode by mode, the longest cut first, the factor is the leading left singular vectors of the
    unfolding of what is left, which is then projected on them. The squared error is at most the
    sum over the modes of the squares of the singular values left out of each unfolding of x, so
    the error is at most `sqrt(d)` times the least possible.

    Args:
      x: an array of floats with at least one axis.
      ranks: one for each mode, at most its size; or one for all, at most the smallest.
      modes: the axes with a factor; None: all. The others stay whole.

    Returns:
      The core, x with the modes' sizes replaced by their ranks, and one factor `[n_k, r_k]` with
      orthonormal columns for each of `modes`, in the dtype of x.

    Raises:
      SpecError: for an integer array, a mode that is missing or given twice, or ranks that do
        not fit the modes.

    References:
      De Lathauwer, De Moor and Vandewalle, *A Multilinear Singular Value Decomposition*, 2000;
      Vannieuwenhoven, Vandebril and Meerbergen, *A New Truncation Strategy for the Higher-Order
      Singular Value Decomposition*, 2012.

    Examples:
      >>> import jax
      >>> core, factors = hosvd(jax.random.normal(jax.random.key(0), (4, 5, 6)), (2, 3, 4))
      >>> core.shape, [f.shape for f in factors]
      ((2, 3, 4), [(4, 2), (5, 3), (6, 4)])
    """
    return tucker(x, ranks, modes, iterations=0)


def tucker(
    x: jax.Array,
    ranks: int | Sequence[int],
    modes: Sequence[int] | None = None,
    *,
    iterations: int = 20,
    tolerance: float = 1e-6,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The Tucker decomposition by higher-order orthogonal iteration: `x ~ core x_1 f1 .. x_d fd`.

    From `hosvd` on, each factor in turn becomes more nearly the leading left singular vectors of
    the unfolding of `y`, x projected on all other factors: a round of filtered subspace iteration,
    a polynomial in `y y'`, from where it was before. Since the factors are orthonormal,
    `|x - approximation|**2 = |x|**2 - |core|**2`.

    Args:
      x: an array of floats with at least one axis.
      ranks: one for each mode, at most its size; or one for all, at most the smallest.
      modes: the axes with a factor; None: all. The others stay whole.
      iterations: the largest number of sweeps over all factors; 0 gives `hosvd`.
      tolerance: ends where a sweep raises `|core|**2 / |x|**2` by less; 0: never.

    Returns:
      The core, x with the modes' sizes replaced by their ranks, and one factor `[n_k, r_k]` with
      orthonormal columns for each of `modes`, in the dtype of x.

    Raises:
      SpecError: for an integer array, a mode that is missing or given twice, or ranks that do
        not fit the modes.

    References:
      Tucker, *Some Mathematical Notes on Three-Mode Factor Analysis*, 1966; De Lathauwer,
      De Moor and Vandewalle, *On the Best Rank-1 and Rank-(R1, R2, .., RN) Approximation of
      Higher-Order Tensors*, 2000.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> x = jax.random.normal(jax.random.key(0), (4, 5, 6))
      >>> core, (a, c) = tucker(x, (4, 6), modes=(0, 2))
      >>> core.shape, bool(jnp.allclose(jnp.einsum("ajc,ia,kc->ijk", core, a, c), x, atol=1e-5))
      ((4, 5, 6), True)
    """
    check_array(x, "tucker", 1)
    modes, ranks = checked(x, ranks, modes, "tucker")
    if x.size == 0:
        core = list(x.shape)
        for rank, mode in zip(ranks, modes, strict=True):
            core[mode] = rank
        factors = tuple(jnp.zeros((x.shape[m], r), x.dtype) for r, m in zip(ranks, modes))
        return jnp.zeros(core, x.dtype), factors
    return _tucker(x, iterations, tolerance, ranks, modes)


def tucker2(
    kernel: jax.Array,
    ranks: tuple[int, int],
    *,
    iterations: int = 20,
    tolerance: float = 1e-6,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The Tucker decomposition of the last two axes, the inputs and outputs of a convolution.

    A kernel `[*window, in, out]` becomes a convolution of one pixel `in -> r_in`, one with the
    window `r_in -> r_out`, and one of one pixel `r_out -> out`.

    Args:
      kernel: `[*window, in, out]` of floats.
      ranks: `(r_in, r_out)`, at most `(in, out)`.
      iterations: as in `tucker`.
      tolerance: as in `tucker`.

    Returns:
      The core `[*window, r_in, r_out]` and the factors `[in, r_in]` and `[out, r_out]`.

    Raises:
      SpecError: as `tucker`, or for less than two axes.

    References:
      Kim et al., *Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile
      Applications*, 2016.

    Examples:
      >>> import jax
      >>> core, (a, b) = tucker2(jax.random.normal(jax.random.key(0), (3, 3, 8, 6)), (4, 2))
      >>> core.shape, a.shape, b.shape
      ((3, 3, 4, 2), (8, 4), (6, 2))
    """
    check_array(kernel, "tucker2")
    core, (left, right) = tucker(
        kernel, ranks, (-2, -1), iterations=iterations, tolerance=tolerance
    )
    return core, (left, right)


def checked(
    x: jax.Array, ranks: int | Sequence[int], modes: Sequence[int] | None, name: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The modes as numbers that are not negative, and a possible rank for each."""
    given = range(x.ndim) if modes is None else modes
    out = tuple(m + x.ndim if m < 0 else m for m in given)
    if len(set(out)) < len(out) or not all(0 <= m < x.ndim for m in out):
        raise SpecError(f"{name}: modes {modes} of {x.ndim} axes; write each once, below {x.ndim}")
    ranks = check_ranks(ranks, len(out), name)
    for rank, mode in zip(ranks, out, strict=True):
        if rank > max(1, x.shape[mode]):
            raise SpecError(
                f"{name}: rank {rank} is impossible for axis {mode} of shape {x.shape}; "
                f"write at most {x.shape[mode]}"
            )
    return out, ranks


@functools.partial(jax.jit, static_argnums=(3, 4))
def _tucker(
    x: jax.Array, iterations: Any, tolerance: Any, ranks: tuple[int, ...], modes: tuple[int, ...]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    a, scale = scaled(x)
    factors, core = sequential(a, ranks, modes)
    if len(modes) > 1:
        norm = jnp.maximum(jnp.sum(a**2), 1e-30)

        def step(state: tuple) -> tuple:
            i, factors, core, energy, _ = state
            factors, core = sweep(a, factors, modes)
            now = jnp.sum(core**2) / norm
            return i + 1, factors, core, now, (now - energy >= tolerance) | (tolerance <= 0)

        start = (0, factors, core, jnp.sum(core**2) / norm, True)
        _, factors, core, _, _ = lax.while_loop(
            lambda state: (state[0] < iterations) & state[-1], step, start
        )
    return (core * scale).astype(x.dtype), tuple(f.astype(x.dtype) for f in factors)


def sequential(
    a: jax.Array, ranks: tuple[int, ...], modes: tuple[int, ...]
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """The factors of the sequentially truncated SVD, and the core."""
    factors: dict[int, jax.Array] = {}
    # Those that shrink the array most come first, which saves most of the work.
    for mode, rank in sorted(zip(modes, ranks, strict=True), key=lambda p: p[1] / a.shape[p[0]]):
        factors[mode] = left_basis(unfold(a, mode), rank)
        a = contract(a, factors[mode], mode)
    return tuple(factors[m] for m in modes), a


def sweep(
    a: jax.Array, factors: tuple[jax.Array, ...], modes: tuple[int, ...]
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Every factor once, from the one before, and the core."""
    new = list(factors)
    core = a
    for i, mode in enumerate(modes):
        y = a
        for j, other in enumerate(modes):
            if j != i:
                y = contract(y, new[j], other)
        matrix = unfold(y, mode)
        apply = functools.partial(through, matrix)
        new[i] = amplified(apply, *ritz(apply, new[i]), _DEGREE)
        core = y
    return tuple(new), contract(core, new[-1], modes[-1])
