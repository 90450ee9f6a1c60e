"""What `sparsify` removes: the scores of weights and how they are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from jaxcompress.errors import SpecError
from jaxcompress.pruning.allocation import allocation

SCOPES = ("local", "global")


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """Which weights go, when it is settled how many: those of least score.

    Subclasses define `scores`.

    Attributes:
      scope: `local` compares within each weight, `global` among all that the rules name.
      allocation: how a local budget is divided, `uniform` or `erk`.
    """

    scope: str
    allocation: str

    def __post_init__(self) -> None:
        allocation(self.allocation)
        if self.scope not in SCOPES:
            raise SpecError(f"scope={self.scope!r}: write one of {', '.join(SCOPES)}")
        if self.scope == "global" and self.allocation != "uniform":
            raise SpecError(
                f"allocation={self.allocation!r} divides a budget among leaves, which "
                "scope='global' does by itself: leave one of them out"
            )

    def scores(self, params: Sequence[jax.Array]) -> list[jax.Array]:
        """A score for each weight of each leaf; its magnitude counts."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class _Magnitude(Algorithm):
    def scores(self, params: Sequence[jax.Array]) -> list[jax.Array]:
        return list(params)


def magnitude(*, scope: str = "local", allocation: str = "uniform") -> Algorithm:
    """The smallest `|w|` go.

    Args:
      scope: `local` compares the weights within each leaf (of a stack, within each layer);
        `global` compares all weights that the rules name, so that leaves of small weights become
        sparser than others.
      allocation: of a local budget: `uniform`, the same sparsity for each leaf, or `erk`, by
        which small kernels are pruned less (see `erk`).

    Raises:
      SpecError: for another scope or allocation, or a global one with an allocation.

    References:
      Hagiwara, *A Simple and Effective Method for Removal of Hidden Units and Weights*, 1994; Han
      et al., *Learning both Weights and Connections for Efficient Neural Networks*, 2015.

    Example:
      >>> magnitude(scope="global").scope
      'global'
    """
    return _Magnitude(scope, allocation)
