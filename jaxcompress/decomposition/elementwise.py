"""Low rank where each weight counts for itself, by alternating least squares."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.decomposition.modes import matmul
from jaxcompress.decomposition.weighted import fisher_svd
from jaxcompress.errors import SpecError
from jaxcompress.numerics import unit_scale
from jaxcompress.specs import is_count

# The ridge of each least-squares problem, as a share of the mean of its diagonal.
_RIDGE = 1e-6


class WeightedFactors(NamedTuple):
    """What `weighted_low_rank` found.

    Attributes:
      left: `[..., K, rank]`.
      right: `[..., rank, N]`.
      errors: float32 `[..., steps + 1]`, the error at the start and after each step.
    """

    left: jax.Array
    right: jax.Array
    errors: jax.Array


def weighted_low_rank(
    w: jax.Array, weights: jax.Array, rank: int, *, steps: int = 10
) -> WeightedFactors:
    """Low rank in a metric of its own for each weight, such as the diagonal of the Fisher.

        minimize sum_ij f_ij (w - L R)_ij**2

    There is no closed form. From `fisher_svd` on, a step solves for all rows of L with R fixed, and
    then for all columns of R, each a least-squares problem in `rank` unknowns, so that the error
    does not rise. It takes `K N rank**2` multiplications and `(K + N) rank**2` values.

    Args:
      w: `[..., K, N]` of any float dtype.
      weights: `[..., K, N]`, non-negative.
      rank: from 1 to `min(K, N)`; static.
      steps: how often both factors are solved for; static.

    Returns:
      The factors, in the dtype of `w`, and the error on the way.

    Raises:
      SpecError: for shapes that do not fit, and an impossible rank or number of steps.

    References:
      Srebro and Jaakkola, *Weighted Low-Rank Approximations*, 2003.

    Examples:
      >>> import jax.numpy as jnp
      >>> w = jnp.array([[1.0, 1.0], [1.0, 9.0]])  # of rank one but for its last weight,
      >>> weights = jnp.array([[1.0, 1.0], [1.0, 0.0]])  # which does not count
      >>> found = weighted_low_rank(w, weights, 1, steps=60)
      >>> bool(found.errors[-1] < 1e-3)
      True
    """
    if w.shape != weights.shape:
        raise SpecError(
            f"weighted_low_rank: weights {tuple(w.shape)} and what they count "
            f"{tuple(weights.shape)}: write one number for each weight"
        )
    if not is_count(steps, 1):
        raise SpecError(f"steps={steps!r}: write a whole number of at least 1")
    left, right = fisher_svd(w, weights, rank)
    one = functools.partial(_alternated, steps=steps)
    for _ in w.shape[:-2]:
        one = jax.vmap(one)
    found = one(w.astype(jnp.float32), weights, *(x.astype(jnp.float32) for x in (left, right)))
    return WeightedFactors(found[0].astype(w.dtype), found[1].astype(w.dtype), found[2])


def _alternated(
    w: jax.Array, f: jax.Array, left: jax.Array, right: jax.Array, steps: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    scale, inverse = unit_scale(jnp.max(jnp.abs(w)))
    size, shrink = unit_scale(jnp.max(f))
    w, f = w * inverse, f.astype(jnp.float32) * shrink
    root = jnp.sqrt(scale)

    def error(left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.sum(f * jnp.square(w - matmul(left, right)))

    def step(state: Any, _: None) -> Any:
        left, right = state
        left = _solved(w, f, left, right)
        right = _solved(w.T, f.T, right.T, left.T).T
        return (left, right), error(left, right)

    start = (left / root, right / root)
    (left, right), errors = lax.scan(step, start, None, length=steps)
    errors = jnp.concatenate([error(*start)[None], errors]) * scale * size * scale
    return left * root, right * root, errors


def _solved(w: jax.Array, f: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """The best left factor for a right one: `L_i += (R F_i R')^-1 R F_i (w_i - L_i R)'`.

    What is solved for is the change, so that the ridge costs steps and no accuracy.
    """
    normal = jnp.einsum("kn,rn,sn->krs", f, right, right, precision=lax.Precision.HIGHEST)
    gap = matmul(f * (w - matmul(left, right)), right.T)
    mean = jnp.mean(jnp.diagonal(normal, axis1=-2, axis2=-1), axis=-1)
    ridge = jnp.where(mean > 0, _RIDGE * mean, 1.0)[:, None, None] * jnp.eye(right.shape[0])
    return left + jnp.linalg.solve(normal + ridge, gap[..., None])[..., 0]
