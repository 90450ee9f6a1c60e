"""Sparse from the first update to the last: some weights go, as many others come in their place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.errors import SpecError
from jaxcompress.pruning.algorithms.base import Algorithm, Moment, check_share, draws
from jaxcompress.pruning.choice import Choice
from jaxcompress.pruning.select import top_mask
from jaxcompress.pruning.sites import Site
from jaxcompress.specs import is_count

INITIAL = ("random", "magnitude")


@dataclasses.dataclass(frozen=True)
class Regrow(Algorithm):
    """Drops the smallest of the weights that are there, and grows those of largest score.

    Attributes:
      drop: the share of the weights that goes at a choice.
      end: the update at which this has come down to none, along half a cosine; None: it stays.
      initial: the first masks: `random`, or by `magnitude`.
      seed: of all draws.
    """

    drop: float
    end: int | None
    initial: str
    seed: int

    regrows: ClassVar[bool] = True
    apart: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("drop", self.drop)
        if self.initial not in INITIAL:
            raise SpecError(f"initial={self.initial!r}: write one of {', '.join(INITIAL)}")
        if self.end is not None and not is_count(self.end, 1):
            raise SpecError(f"end={self.end!r}: write a whole number of updates, or None")

    def check(self, choice: Choice) -> None:
        if choice.together:
            raise SpecError(
                f"allocation={self.allocation!r} compares all weights anew, which would undo what "
                "grew: write 'uniform' or 'erk'"
            )

    def share(self, step: jax.Array) -> jax.Array:
        """The share that goes at an update: `drop (1 + cos(pi t / end)) / 2`."""
        if self.end is None:
            return jnp.float32(self.drop)
        way = jnp.minimum(step.astype(jnp.float32) / self.end, 1.0)
        return self.drop * 0.5 * (1 + jnp.cos(math.pi * way))

    def growth(self, weights: list[jax.Array], moment: Moment, memory: Any) -> Sequence[jax.Array]:
        """Scores of what may grow, by magnitude; of units."""
        raise NotImplementedError

    def starts(self, units: list[jax.Array], moment: Moment) -> Sequence[jax.Array]:
        """Scores for the first masks."""
        if self.initial == "magnitude":
            return units
        return draws(units, moment, self.seed + 1)

    def comes(self, units: list[jax.Array], moment: Moment, memory: Any) -> list[jax.Array]:
        """Scores of what may come, at the first choice or a later one: finite magnitudes."""
        return lax.cond(
            moment.first,
            lambda: [_finite(x) for x in self.starts(units, moment)],
            lambda: [_finite(x) for x in self.growth(units, moment, memory)],
        )

    def choose(self, choice: Choice, moment: Moment, memory: Any) -> tuple[list[jax.Array], Any]:
        units = choice.pooled(moment.weights)
        # Draws take most memory, so they come before all that is held besides.
        units, new = lax.optimization_barrier((units, self.comes(units, moment, memory)))
        active = active_units(choice, moment.masks)
        share = jnp.where(moment.first, 1.0, self.share(moment.step))
        limits = _limits(choice, moment.counts)
        left = [
            survivors(site, x, on, share, limit)
            for site, x, on, limit in zip(choice.sites, units, active, limits)
        ]
        scores = [
            _then(site, x, stays, y) for site, x, stays, y in zip(choice.sites, units, left, new)
        ]
        return choice.spread(choice.take(scores, moment.counts)), memory


def _then(site: Site, old: jax.Array, stays: jax.Array, new: jax.Array) -> jax.Array:
    """Scores by which what stays comes before all that is new."""
    if not site.pattern.m:
        top = jnp.max(new, initial=0.0)
        return jnp.where(stays, jnp.where(top > 0, 2 * top, 1.0), new)
    # A group may have no place for all that stays in it: the largest of these come first.
    return jnp.where(stays, 1 + _relative(old), 0.5 * _relative(new))


def _relative(x: jax.Array) -> jax.Array:
    """Magnitudes from 0 to 1, in their order; 0 for what is not finite."""
    x = _finite(x)
    top = jnp.max(x, initial=0.0)
    return x / jnp.where(top > 0, top, 1.0)


def _finite(x: jax.Array) -> jax.Array:
    """Magnitudes in float32; 0 for what is not finite."""
    x = jnp.abs(x.astype(jnp.float32))
    return jnp.where(jnp.isfinite(x), x, 0.0)


def _limits(choice: Choice, counts: Sequence[Any]) -> list[Any]:
    """How many units of each weight may stay at most, where that is known; None elsewhere."""
    if choice.together:
        return [None] * len(counts)
    return [None if site.pattern.m else n for site, n in zip(choice.sites, counts)]


def active_units(choice: Choice, masks: Sequence[jax.Array]) -> list[jax.Array]:
    """Which units are there, from the masks of the weights."""
    return [x != 0 for x in choice.pooled(masks)]


def survivors(
    site: Site, scores: jax.Array, active: jax.Array, share: jax.Array, limit: Any = None
) -> jax.Array:
    """The active units that stay when a share of them goes: those of largest magnitude.

    Where the schedule leaves room for no more than `limit` of each weight, a share of these goes.
    """

    def one(scores: jax.Array, active: jax.Array) -> jax.Array:
        count = jnp.sum(active, dtype=jnp.uint32)
        if limit is not None:
            count = jnp.minimum(count, jnp.asarray(limit).astype(jnp.uint32))
        gone = jnp.round(share * count.astype(jnp.float32)).astype(jnp.uint32)
        # What is there and zero, as what has just grown may be, comes before what is not there.
        least = jnp.finfo(jnp.float32).smallest_normal
        size = jnp.maximum(jnp.abs(scores.astype(jnp.float32)), least)
        return top_mask(jnp.where(active, size, 0.0), count - jnp.minimum(gone, count))

    for _ in range(site.batch_ndim):
        one = jax.vmap(one)
    return one(scores, active)


@dataclasses.dataclass(frozen=True)
class _Set(Regrow):
    def growth(self, weights: list[jax.Array], moment: Moment, memory: Any) -> Sequence[jax.Array]:
        return draws(weights, moment, self.seed)


@dataclasses.dataclass(frozen=True)
class _RigL(Regrow):
    def choose(self, choice: Choice, moment: Moment, memory: Any) -> tuple[list[jax.Array], Any]:
        return super().choose(choice, moment, choice.pooled(moment.grads))[0], memory

    def growth(self, weights: list[jax.Array], moment: Moment, memory: Any) -> Sequence[jax.Array]:
        return [jnp.abs(g.astype(jnp.float32)) for g in memory]


@dataclasses.dataclass(frozen=True)
class _Gse(_RigL):
    explored: float

    def growth(self, weights: list[jax.Array], moment: Moment, memory: Any) -> Sequence[jax.Array]:
        drawn = draws(weights, moment, self.seed)
        scores = super().growth(weights, moment, memory)
        # Weights outside of the sample come after all within it, and among them any.
        return [jnp.where(u < self.explored, 1.0 + _relative(s), u) for u, s in zip(drawn, scores)]


def set_(
    *,
    drop: float = 0.3,
    end: int | None = None,
    initial: str = "random",
    allocation: str = "erk",
    seed: int = 0,
) -> Algorithm:
    """SET: at each choice the smallest weights go and random ones come.

    The masks have `round(n (1 - sparsity))` weights after every update. New weights begin at zero,
    and so do the moments that the wrapped optimizer keeps of them.

    Args:
      drop: the share of a leaf's weights that goes at a choice, `zeta`.
      end: the update at which no more go, reached along half a cosine; None: always `drop`.
      initial: the first masks: `random`, or by `magnitude`.
      allocation: how the budget is divided among leaves, see `magnitude`.
      seed: of all draws.

    Raises:
      SpecError: for a share outside of 0 to 1, or other names.

    References:
      Mocanu et al., *Scalable Training of Artificial Neural Networks with Adaptive Sparse
      Connectivity Inspired by Network Science*, 2018.

    Examples:
      >>> import optax, jaxcompress as jc
      >>> tx = jc.sparsify(
      ...     optax.adam(1e-3), jc.pruning.set_(), jc.pruning.periodic(0.9, every=100),
      ...     {"**/kernel": "unstructured"},
      ... )
    """
    return _Set("local", allocation, drop, end, initial, seed)


def rigl(
    *,
    drop: float = 0.3,
    end: int | None = None,
    initial: str = "random",
    allocation: str = "erk",
    seed: int = 0,
) -> Algorithm:
    """RigL: at each choice the smallest weights go and those of largest gradient come.

    At update t a share `drop (1 + cos(pi t / end)) / 2` of each leaf's weights goes, by `|w|`. As
    many come, by `|g|` of this update's gradient among all that did not stay. (In an accumulation,
    of its first gradient.) New weights begin at zero, and so do the moments of the wrapped
    optimizer; weights that go and come at once stay as they are.

    Args:
      drop: the share that goes at first.
      end: the update at which none go any more, three quarters of the training or so; None: the
        share stays.
      initial: the first masks: `random`, or by `magnitude` for trained weights.
      allocation: how the budget is divided among leaves, see `magnitude`.
      seed: of the first masks.

    Raises:
      SpecError: for a share outside of 0 to 1, or other names.

    References:
      Evci et al., *Rigging the Lottery: Making All Tickets Winners*, 2020.

    Examples:
      >>> import optax, jaxcompress as jc
      >>> tx = jc.sparsify(
      ...     optax.adam(1e-3), jc.pruning.rigl(end=7_500),
      ...     jc.pruning.periodic(0.9, every=100, end=7_500), {"**/kernel": "unstructured"},
      ... )
    """
    return _RigL("local", allocation, drop, end, initial, seed)


def gse(
    *,
    drop: float = 0.3,
    end: int | None = None,
    explored: float = 0.1,
    initial: str = "random",
    allocation: str = "erk",
    seed: int = 0,
) -> Algorithm:
    """Guided stochastic exploration: RigL that looks for gradients in a random sample only.

    Args:
      drop: as in `rigl`.
      end: as in `rigl`.
      explored: the share of the weights that is looked at; where it has too few, any others come.
      initial: as in `rigl`.
      allocation: as in `rigl`.
      seed: of all draws.

    References:
      Heddes et al., *Always-Sparse Training by Growing Connections with Guided Stochastic
      Exploration*, 2024.

    Examples:
      >>> gse(explored=0.2).explored
      0.2
    """
    check_share("explored", explored)
    return _Gse("local", allocation, drop, end, initial, seed, explored)
