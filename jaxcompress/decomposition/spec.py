"""`LowRank`: a kernel as the product of two thin ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.low_rank import LowRankArray
from jaxcompress.decomposition.ranks import check_possible, check_saving, energy_rank, vbmf
from jaxcompress.decomposition.sides import Sides
from jaxcompress.decomposition.svd import squared_singular_values, truncated_svd
from jaxcompress.errors import SpecError, ValuesNeededError
from jaxcompress.numerics import unit_scale
from jaxcompress.specs import LeafContext, Plan, Spec, is_count, is_number, register_spec


@register_spec("low_rank")
@dataclasses.dataclass(frozen=True, repr=False)
class LowRank(Spec):
    """The best approximation of a kernel by two factors, a truncated SVD.

    The kernel is read as a matrix of its input by its output axes, `[in, out]` with several axes
    joined, and becomes `left @ right` with `r (in + out)` values. Each weight of a stack has its
    own factors, of one rank.

    Args:
      rank: the rank r, from 1 to `min(in, out)`; or `"vbmf"`, for as many singular values as stand
        out of the noise (see `jaxcompress.decomposition.ranks.vbmf`), in a stack the largest, and
        at least 1.
      energy: in place of a rank, the share of the squared singular values to keep, in (0, 1]:
        the least r with `sum_{i<=r} s_i**2 >= energy * sum_i s_i**2` (in a stack, the largest).
      allow_larger: whether the factors of a given rank may take as much as the dense kernel or
        more, as they may where the rank follows from the values.

    Raises:
      SpecError: unless exactly one of `rank` and `energy` is given and possible for the leaf, and
        for a given rank of `r (in + out) >= in * out` without `allow_larger`.

    References:
      Denton et al., *Exploiting Linear Structure Within Convolutional Networks*, 2014; Nakajima,
      Sugiyama, Babacan and Tomioka, *Global Analytic Solution of Fully-observed Variational
      Bayesian Matrix Factorization*, 2013.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> jc.LowRank(energy=0.99)(jnp.outer(jnp.arange(6.0), jnp.ones(4)))
      LowRankArray(float32[6, 4], rank 1)
    """

    rank: int | str | None = None
    _: dataclasses.KW_ONLY
    energy: float | None = None
    allow_larger: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(
            type(self).__name__, None if self.rank == "vbmf" else self.rank, self.energy,
            self.allow_larger, given=self.rank is not None,
        )  # fmt: skip

    def plan(self, leaf: Any, context: LeafContext) -> Plan:
        """Settles the split of the axes and the rank."""
        sides = Sides.of(leaf, context)
        if isinstance(self.rank, int):
            check_possible(self.rank, *sides.sizes, context.path)
            if not self.allow_larger:
                check_saving(self.rank, *sides.sizes, context.path)
            return _LowRankPlan(self.rank, sides)
        return _LowRankPlan(self._by_values(leaf, sides, context.path), sides)

    def _by_values(self, leaf: Any, sides: Sides, path: str) -> int:
        check_readable(leaf, path, type(self).__name__)
        if self.energy is not None:
            return energy_rank(_spectrum(sides.matrix(leaf)), self.energy)
        matrices = np.asarray(sides.matrix(leaf).astype(jnp.float32))
        found = [vbmf(x).rank for x in matrices.reshape(-1, *sides.sizes)]
        return max(1, *found, 1)


def check_choice(
    name: str, rank: Any, energy: Any, allow_larger: Any, *, given: bool | None = None
) -> None:
    """Refuses what is not one of a rank and an energy; `given` where a rank is, but no number.

    Raises:
      SpecError: says what to write.
    """
    given = rank is not None if given is None else given
    if given == (energy is not None):
        raise SpecError(f"write one of rank and energy: {name}(64) or {name}(energy=0.9)")
    if rank is not None and not is_count(rank, 1):
        raise SpecError(f"rank={rank!r}: write a whole number of at least 1")
    if energy is not None and not (is_number(energy, 0, 1) and energy > 0):
        raise SpecError(f"energy={energy}: write a share in (0, 1], such as 0.95")
    if not isinstance(allow_larger, bool):
        raise SpecError(f"allow_larger={allow_larger!r}: write True or False")


def check_readable(leaf: Any, path: str, name: str) -> None:
    """Refuses a leaf without values where a rank follows from them.

    Raises:
      ValuesNeededError: says what to write.
    """
    if isinstance(leaf, jax.core.Tracer):
        raise ValuesNeededError(
            f"{path}: a rank that is not given reads the values, which jit hides; compress outside "
            f"of jit or write it, as in {name}(16)"
        )


@jax.jit
def _spectrum(matrix: jax.Array) -> jax.Array:
    matrix = matrix.astype(jnp.float32)
    # Shares are what counts, and the squares of the largest magnitude must not overflow.
    _, inverse = unit_scale(jnp.max(jnp.abs(matrix), axis=(-1, -2), keepdims=True))
    return squared_singular_values(matrix * inverse)


@dataclasses.dataclass(frozen=True)
class _LowRankPlan(Plan):
    rank: int
    sides: Sides

    def apply(self, leaf: jax.Array, key: jax.Array | None) -> LowRankArray:
        return self.sides.factors(*truncated_svd(self.sides.matrix(leaf), self.rank))
