"""Robust principal component analysis: low rank plus sparse, both found by convex optimization."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.errors import SpecError
from jaxcompress.numerics import unit_scale
from jaxcompress.specs import is_count, is_number


class RobustPCA(NamedTuple):
    """`w ~ low_rank + sparse`.

    Attributes:
      low_rank: `[..., m, n]` in the dtype of w.
      sparse: the same; zero where the other explains w.
      rank: int32 `[...]`, the singular values that are left.
      residual: float32 `[...]`, `|w - low_rank - sparse| / |w|`; 0 where w is.
      iterations: int32 `[...]`.
    """

    low_rank: jax.Array
    sparse: jax.Array
    rank: jax.Array
    residual: jax.Array
    iterations: jax.Array


class _State(NamedTuple):
    sparse: jax.Array
    low: jax.Array
    multiplier: jax.Array
    penalty: jax.Array
    rank: jax.Array
    residual: jax.Array
    iteration: jax.Array


def robust_pca(
    w: jax.Array,
    *,
    weight: float | None = None,
    growth: float = 1.5,
    tolerance: float = 1e-6,
    max_iterations: int = 200,
) -> RobustPCA:
    """Splits matrices into a low-rank and a sparse part: principal component pursuit.

    Minimizes `|L|_* + lambda |S|_1` subject to `L + S = w`, where `|.|_*` is the sum of the
    singular values and `|.|_1` that of magnitudes. With lambda = `1 / sqrt(max(m, n))` it recovers
    both parts exactly, with high probability, for a low-rank part whose singular vectors are spread
    out and a sparse part at random places. Solved by the inexact augmented Lagrangian: in turn
    singular values are shrunk by `1 / mu` and entries by `lambda / mu`, the multiplier moves by
    `mu (w - L - S)`, and mu grows by a constant factor up to 1e7 times its start.

    Computed in float32. Neither rank nor count is chosen; `LowRankPlusSparse` has both given.

    Args:
      w: `[..., m, n]`, floating and finite; each matrix of a stack by itself.
      weight: lambda; None: the above.
      growth: of mu in each iteration, above 1; a smaller one is slower and more exact.
      tolerance: it stops when `|w - L - S| <= tolerance |w|`. Not below float32's rounding.
      max_iterations: it stops then at the latest.

    Returns:
      Both parts, and how far it came.

    Raises:
      SpecError: for no matrix, or settings that cannot be.

    References:
      Candes, Li, Ma and Wright, *Robust Principal Component Analysis?*, 2011; Lin, Chen and Ma,
      *The Augmented Lagrange Multiplier Method for Exact Recovery of Corrupted Low-Rank Matrices*,
      2010.

    Examples:
      >>> import jax.numpy as jnp
      >>> low = jnp.ones((20, 20))
      >>> found = robust_pca(low.at[3, 4].set(50.0))
      >>> int(found.rank), int(jnp.sum(found.sparse != 0)), round(float(found.sparse[3, 4]), 3)
      (1, 1, 49.0)
    """
    if w.ndim < 2 or not jnp.issubdtype(w.dtype, jnp.floating):
        raise SpecError(f"robust_pca takes floating matrices, not {w.dtype}{list(w.shape)}")
    if weight is not None and not (is_number(weight, 0) and weight > 0):
        raise SpecError(f"weight={weight!r}: write a number above 0, or None")
    if not (is_number(growth, 1) and growth > 1):
        raise SpecError(f"growth={growth!r}: write a number above 1, such as 1.5")
    if not is_number(tolerance, 1e-7):
        raise SpecError(f"tolerance={tolerance!r}: write a number of at least 1e-7")
    if not is_count(max_iterations, 1):
        raise SpecError(f"max_iterations={max_iterations!r}: write at least 1")
    if 0 in w.shape:
        lead = w.shape[:-2]
        none = jnp.zeros(lead, jnp.int32)
        return RobustPCA(w, w, none, jnp.zeros(lead, jnp.float32), none)
    lam = max(w.shape[-2:]) ** -0.5 if weight is None else float(weight)
    one = lambda x: _pursue(x, lam, growth, tolerance, max_iterations)
    for _ in range(w.ndim - 2):
        one = jax.vmap(one)
    return one(w)


def _pursue(
    w: jax.Array, lam: float, growth: float, tolerance: float, max_iterations: int
) -> RobustPCA:
    wide = w.astype(jnp.float32)
    scale, inverse = unit_scale(jnp.max(jnp.abs(wide)))
    a = wide * inverse
    total = jnp.linalg.norm(a)
    spectral = jnp.maximum(jnp.linalg.norm(a, 2), jnp.finfo(jnp.float32).tiny)
    start = 1.25 / spectral

    def step(state: _State) -> _State:
        low, rank = _shrunk(a - state.sparse + state.multiplier / state.penalty, 1 / state.penalty)
        away = a - low + state.multiplier / state.penalty
        sparse = jnp.sign(away) * jnp.maximum(jnp.abs(away) - lam / state.penalty, 0.0)
        left = a - low - sparse
        return _State(
            sparse, low, state.multiplier + state.penalty * left,
            jnp.minimum(growth * state.penalty, 1e7 * start), rank,
            jnp.linalg.norm(left) / total, state.iteration + 1,
        )  # fmt: skip

    def unfinished(state: _State) -> jax.Array:
        return (state.residual > tolerance) & (state.iteration < max_iterations)

    zero = jnp.zeros_like(a)
    dual = a / jnp.maximum(spectral, jnp.max(jnp.abs(a)) / lam)
    first = jnp.where(total > 0, jnp.float32(jnp.inf), 0.0)  # nothing to do for zeros
    begin = _State(zero, zero, dual, start, jnp.int32(0), first, jnp.int32(0))
    end = lax.while_loop(unfinished, step, begin)
    low, sparse = ((x * scale).astype(w.dtype) for x in (end.low, end.sparse))
    return RobustPCA(low, sparse, end.rank, end.residual, end.iteration)


def _shrunk(x: jax.Array, by: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Singular values less a number, or zero, and how many are left."""
    u, s, v = jnp.linalg.svd(x, full_matrices=False)
    s = jnp.maximum(s - by, 0.0)
    low = jnp.matmul(u * s, v, precision=lax.Precision.HIGHEST)
    return low, jnp.sum(s > 0).astype(jnp.int32)
