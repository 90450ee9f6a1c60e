"""`LowRank`: a kernel as the product of two thin ones."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.low_rank import LowRankArray
from jaxcompress.decomposition.svd import squared_singular_values, truncated_svd
from jaxcompress.errors import SpecError, ValuesNeededError
from jaxcompress.numerics import unit_scale
from jaxcompress.specs import LeafContext, Plan, Spec, is_count, register_spec


@register_spec("low_rank")
@dataclasses.dataclass(frozen=True, repr=False)
class LowRank(Spec):
    """The best approximation of a kernel by two factors, a truncated SVD.

    The kernel is read as a matrix of its input by its output axes, `[in, out]` with several axes
    joined, and becomes `left @ right` with `r (in + out)` values. Each weight of a stack has its
    own factors, of one rank.

    Args:
      rank: the rank r, from 1 to `min(in, out)`.
      energy: in place of a rank, the share of the squared singular values to keep, in (0, 1]:
        the least r with `sum_{i<=r} s_i**2 >= energy * sum_i s_i**2` (in a stack, the largest).

    Raises:
      SpecError: unless exactly one of `rank` and `energy` is given and possible for the leaf.

    References:
      Denton et al., *Exploiting Linear Structure Within Convolutional Networks*, 2014.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> jc.LowRank(energy=0.99)(jnp.outer(jnp.arange(6.0), jnp.ones(4)))
      LowRankArray(float32[6, 4], rank 1)
    """

    rank: int | None = None
    _: dataclasses.KW_ONLY
    energy: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.rank is None) == (self.energy is None):
            raise SpecError("write one of rank and energy: LowRank(64) or LowRank(energy=0.9)")
        if self.rank is not None and not is_count(self.rank, 1):
            raise SpecError(f"rank={self.rank!r}: write a whole number of at least 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise SpecError(f"energy={self.energy}: write a share in (0, 1], such as 0.95")

    def plan(self, leaf: Any, context: LeafContext) -> Plan:
        """Settles the split of the axes and the rank."""
        if leaf.ndim < 2:
            raise SpecError(
                f"{context.path}: shape {leaf.shape} is no matrix and has no low rank; let the "
                "rule match kernels only, such as '**/kernel'"
            )
        left_ndim = _split(context, leaf)
        batch = context.axes.batch_ndim(leaf.ndim)
        middle = batch + left_ndim
        full = min(math.prod(leaf.shape[batch:middle]), math.prod(leaf.shape[middle:]))
        if self.rank is not None and self.rank > full:
            raise SpecError(
                f"{context.path}: rank {self.rank} is impossible for a "
                f"{math.prod(leaf.shape[batch:middle])} x {math.prod(leaf.shape[middle:])} "
                f"matrix; write at most {full}"
            )
        rank = self.rank if self.rank is not None else self._by_energy(leaf, batch, middle, context)
        return _LowRankPlan(rank, batch, left_ndim)

    def _by_energy(self, leaf: Any, batch: int, middle: int, context: LeafContext) -> int:
        if isinstance(leaf, jax.core.Tracer):
            raise ValuesNeededError(
                f"{context.path}: a rank by energy reads the values, which jit hides; compress "
                "outside of jit or write LowRank(rank=...)"
            )
        squares = np.asarray(_spectrum(leaf, batch, middle), np.float64)
        squares = squares.reshape(-1, squares.shape[-1])
        share = np.cumsum(squares, axis=-1)
        # The float64 sum's own last place decides whether energy=1 asks for a zero more.
        wanted = (self.energy or 1.0) * share[:, -1:] * (1 - 1e-12)
        return int(np.max(np.argmax(share >= wanted, axis=-1))) + 1


def _split(context: LeafContext, leaf: Any) -> int:
    """The number of axes of the left factor: the inputs', or the outputs' where they come first."""
    for first, last in (context.axes, context.axes[::-1]):
        if first and last and max(first) < min(last):
            return len(first)
    raise SpecError(
        f"{context.path}: input axes {context.axes.input} and output axes {context.axes.output} "
        f"of shape {leaf.shape} do not form a matrix"
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _spectrum(leaf: jax.Array, batch: int, middle: int) -> jax.Array:
    matrix = _matrix(leaf, batch, middle).astype(jnp.float32)
    # Shares are what counts, and the squares of the largest magnitude must not overflow.
    _, inverse = unit_scale(jnp.max(jnp.abs(matrix), axis=(-1, -2), keepdims=True))
    return squared_singular_values(matrix * inverse)


def _matrix(leaf: jax.Array, batch: int, middle: int) -> jax.Array:
    shape = leaf.shape
    return leaf.reshape(*shape[:batch], math.prod(shape[batch:middle]), math.prod(shape[middle:]))


@dataclasses.dataclass(frozen=True)
class _LowRankPlan(Plan):
    rank: int
    batch_ndim: int
    left_ndim: int

    def apply(self, leaf: jax.Array, key: jax.Array | None) -> LowRankArray:
        batch, middle = self.batch_ndim, self.batch_ndim + self.left_ndim
        left, right = truncated_svd(_matrix(leaf, batch, middle), self.rank)
        shape = leaf.shape
        return LowRankArray.of(
            left.reshape(*shape[:middle], self.rank),
            right.reshape(*shape[:batch], self.rank, *shape[middle:]),
            left_ndim=self.left_ndim,
            right_ndim=leaf.ndim - middle,
        )
