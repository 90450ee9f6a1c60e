"""Which units stay, given a score of each: one step for every score, pattern and schedule."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.errors import SpecError
from jaxcompress.pruning.allocation import ALLOCATIONS, check_allocation, lamp
from jaxcompress.pruning.select import kept_count, n_of_m_mask, top_mask, top_masks
from jaxcompress.pruning.sites import Site

SCOPES = ("local", "global")

# How many stay: of an n:m leaf in each m, of another in each weight; under one threshold for
# all of these, the same total at each.
Counts = list[Any]


@dataclasses.dataclass(frozen=True)
class Choice:
    """Chooses units of some leaves by their scores.

    Attributes:
      sites: the leaves.
      scope: `local` compares within each weight, `global` among all leaves without an n:m pattern.
      allocation: how a local budget is divided; `lamp` is a global threshold on scores that are
        comparable between leaves.
    """

    sites: tuple[Site, ...]
    scope: str = "local"
    allocation: str = "uniform"

    @property
    def together(self) -> bool:
        """Whether one threshold is for all."""
        return self.scope == "global" or self.allocation == "lamp"

    @property
    def free(self) -> list[int]:
        """The numbers of the sites without an n:m pattern."""
        return [i for i, site in enumerate(self.sites) if not site.pattern.m]

    def of(self, numbers: Sequence[int]) -> Choice:
        """The choice among some of the leaves."""
        return dataclasses.replace(self, sites=tuple(self.sites[i] for i in numbers))

    def counts(self, sparsities: Sequence[float], between: Callable[..., Any]) -> Counts:
        """How many units stay.

        Args:
          sparsities: one or several, for which numbers are counted exactly, on the host.
          between: from the numbers at those sparsities the one that is wanted, which may be traced.
        """
        out: Counts = [None] * len(self.sites)
        for i, site in enumerate(self.sites):
            if m := site.pattern.m:
                out[i] = between(*(max(site.pattern.n, kept_count(m, s)) for s in sparsities))
        free = [self.sites[i] for i in self.free]
        if self.together:
            total = sum(math.prod(_stacked(site)) for site in free)
            chosen = between(*(kept_count(total, s) for s in sparsities))
            ends = [[chosen] * len(free)]
            pick: Callable[..., Any] = lambda count: count
        else:
            ends, pick = [_local_counts(free, self.allocation, s) for s in sparsities], between
        for i, *numbers in zip(self.free, *ends):
            out[i] = pick(*numbers)
        return out

    def pooled(self, scores: Sequence[jax.Array], signed: bool = False) -> list[jax.Array]:
        """The scores of the units from those of the weights."""
        return [site.pattern.pooled(x, signed) for site, x in zip(self.sites, scores)]

    def take(
        self, scores: Sequence[jax.Array], counts: Counts, signed: bool = False
    ) -> list[jax.Array]:
        """Masks of the units of largest score, ties by the lowest index."""
        masks: list[Any] = [None] * len(self.sites)
        for i, (site, count) in enumerate(zip(self.sites, counts)):
            if m := site.pattern.m:
                count = jnp.asarray(count, jnp.int32)
                masks[i] = n_of_m_mask(scores[i], count, m, site.pattern.axis, signed)
        free = self.free
        if free and self.together:
            ranked = [scores[i] for i in free]
            if self.allocation == "lamp":
                ranked = [
                    _per_weight(functools.partial(lamp, signed=signed), self.sites[i])(x)
                    for i, x in zip(free, ranked)
                ]
            for i, mask in zip(free, top_masks(ranked, counts[free[0]], signed)):
                masks[i] = mask
            return masks
        for i in free:
            select = functools.partial(top_mask, k=counts[i], signed=signed)
            masks[i] = _per_weight(select, self.sites[i])(scores[i])
        return masks

    def spread(self, masks: Sequence[jax.Array]) -> list[jax.Array]:
        """The masks of the weights from those of the units."""
        return [
            site.pattern.spread(mask, site.weight_shape) for site, mask in zip(self.sites, masks)
        ]


def check_choice(scope: str, allocated: str) -> None:
    """Refuses names that are not known, and a scope that leaves nothing to allocate.

    Raises:
      SpecError: saying what to write.
    """
    check_allocation(allocated)
    if scope not in SCOPES:
        raise SpecError(f"scope={scope!r}: write one of {', '.join(SCOPES)}")
    if scope == "global" and allocated != "uniform":
        raise SpecError(
            f"allocation={allocated!r} divides a budget among leaves, which "
            "scope='global' does by itself: leave one of them out"
        )


def check_units(choice: Choice) -> None:
    """Refuses to rank single weights and whole units under one threshold.

    Raises:
      SpecError: naming the leaves.
    """
    free = [choice.sites[i] for i in choice.free]
    kinds = {site.pattern.kind: site.path for site in free}
    if choice.together and len(kinds) > 1:
        listed = ", ".join(f"{path!r}: {kind!r}" for kind, path in kinds.items())
        raise SpecError(
            f"one threshold cannot rank units of several kinds ({listed}): write one pattern for "
            "all, or scope='local'"
        )


def _per_weight(fn: Callable[[jax.Array], jax.Array], site: Site) -> Callable[..., jax.Array]:
    for _ in range(site.batch_ndim):
        fn = jax.vmap(fn)
    return fn


def _stacked(site: Site) -> tuple[int, ...]:
    return (*site.shape[: site.batch_ndim], *site.unit_shape)


def _local_counts(sites: Sequence[Site], name: str, sparsity: float) -> list[int]:
    """How many units stay in one weight of each leaf; the weights of a stack count each."""
    shapes, owner = [], []
    for i, site in enumerate(sites):
        layers = math.prod(site.shape[: site.batch_ndim])
        shapes += [site.unit_shape] * layers
        owner += [i] * layers
    counts: dict[int, int] = {}
    for i, count in zip(owner, ALLOCATIONS[name](shapes, sparsity)):
        # A remainder given to some layers of a stack is not enough for all.
        counts[i] = min(count, counts.get(i, count))
    return [counts.get(i, 0) for i in range(len(sites))]
