"""What `sparsify` removes: the scores of weights and how they are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from jaxcompress.pruning.choice import check_choice


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """Which weights go, when it is settled how many: those of least score.

    Subclasses define `scores`.

    Attributes:
      scope: `local` compares within each weight, `global` among all that the rules name.
      allocation: how a local budget is divided, `uniform`, `erk` or `lamp`.
    """

    scope: str
    allocation: str

    def __post_init__(self) -> None:
        check_choice(self.scope, self.allocation)

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
        which small kernels are pruned less (see `erk`), or `lamp`, one threshold on magnitudes
        relative to all larger ones of a weight (it sorts each leaf).

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
