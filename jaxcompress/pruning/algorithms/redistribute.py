"""Regrowth that moves weights from leaf to leaf: sparse momentum, dynamic reparameterization."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.errors import SpecError
from jaxcompress.pruning.algorithms.base import Algorithm, Moment, check_share, draws, where_finite
from jaxcompress.pruning.algorithms.regrow import Regrow, active_units, survivors
from jaxcompress.pruning.choice import Choice
from jaxcompress.pruning.select import top_mask


@dataclasses.dataclass(frozen=True)
class Redistribute(Regrow):
    """Regrowth that moves weights from leaf to leaf; the total stays.

    Here a stack of layers counts as one leaf.
    """

    apart: ClassVar[bool] = False

    def check(self, choice: Choice) -> None:
        super().check(choice)
        total = sum(math.prod(site.shape) for site in choice.sites)
        if total >= 2**31:
            raise SpecError(f"{total} weights are too many to move between leaves: split the rules")
        for site in choice.sites:
            if site.pattern.m:
                raise SpecError(
                    f"{site.path}: {site.pattern.kind!r} fixes how many weights a leaf keeps, and "
                    "this algorithm moves them between leaves: write rigl() or set_(), or "
                    "'unstructured'"
                )

    def numbers(
        self, moment: Moment, units: Sequence[jax.Array], left: Sequence[jax.Array], memory: Any
    ) -> jax.Array:
        """How much of the growth each leaf deserves, non-negative float32 `[leaves]`."""
        raise NotImplementedError

    def left(
        self, choice: Choice, units: Sequence[jax.Array], moment: Moment, memory: Any
    ) -> tuple[list[jax.Array], Any]:
        """The units that stay, and the memory."""
        active = active_units(choice, moment.masks)
        share = jnp.where(moment.first, 1.0, self.share(moment.step))
        # Where the schedule tightens, all leaves give up the same share of their weights.
        there = jnp.sum(jnp.stack([jnp.sum(x, dtype=jnp.int32) for x in active]))
        room = jnp.minimum(_total(choice, moment.counts) / jnp.maximum(there, 1), 1.0)
        share = 1 - (1 - share) * room
        return [
            survivors(dataclasses.replace(site, batch_ndim=0), x, on, share)
            for site, x, on in zip(choice.sites, units, active)
        ], memory

    def choose(self, choice: Choice, moment: Moment, memory: Any) -> tuple[list[jax.Array], Any]:
        units = choice.pooled(moment.weights)
        left, memory = self.left(choice, units, moment, memory)
        total = _total(choice, moment.counts)
        stay = jnp.stack([jnp.sum(x, dtype=jnp.int32) for x in left])
        sizes = jnp.asarray([x.size for x in units], jnp.int32)
        wanted = jnp.where(
            moment.first,
            _first_counts(choice, moment.counts).astype(jnp.float32),
            self.numbers(moment, units, left, memory),
        )
        # A schedule that tightens may leave less than stayed: then the smallest go as well.
        less = total < jnp.sum(stay)
        change = shared_out(
            jnp.abs(total - jnp.sum(stay)),
            jnp.where(less, stay.astype(jnp.float32), wanted),
            jnp.where(less, stay, sizes - stay),
        )
        counts = stay + jnp.where(less, -change, change)
        new = self.comes(units, moment, memory)
        masks: list[jax.Array] = []
        for i, (x, stays, y) in enumerate(zip(units, left, new)):
            if masks:  # one leaf after the other, so that what is in between is held for one
                (x, stays, y), _ = lax.optimization_barrier(((x, stays, y), masks[-1]))
            old = jnp.where(less, jnp.abs(x.astype(jnp.float32)), jnp.inf)
            ranked = jnp.where(stays, old, jnp.where(less, -1.0, y))
            masks.append(top_mask(ranked, counts[i], signed=True))
        return choice.spread(masks), memory


def _total(choice: Choice, counts: Sequence[Any]) -> jax.Array:
    return jnp.sum(_first_counts(choice, counts))


def _first_counts(choice: Choice, counts: Sequence[Any]) -> jax.Array:
    """How many units of each leaf shall stay by the allocation, `[leaves]`."""
    layers = [math.prod(site.shape[: site.batch_ndim]) for site in choice.sites]
    each = [jnp.asarray(n).astype(jnp.int32) * k for n, k in zip(counts, layers)]
    return jnp.stack(each)


def shared_out(total: jax.Array, weights: jax.Array, room: jax.Array) -> jax.Array:
    """Whole numbers in proportion to weights, no more than there is room for, exact in total.

    Args:
      total: what is shared out, int32; at most the sum of `room`.
      weights: non-negative float32 `[n]`; all zero: in proportion to the room.
      room: int32 `[n]`.

    Returns:
      int32 `[n]`. What rounding down or a lack of room leaves over goes to the first ones that have
      room.

    Examples:
      >>> import jax.numpy as jnp
      >>> shared_out(jnp.int32(10), jnp.array([3.0, 1.0]), jnp.array([5, 9])).tolist()
      [5, 5]
    """
    weights = jnp.where(jnp.sum(weights) > 0, weights, room.astype(jnp.float32))
    whole = jnp.maximum(jnp.sum(weights), jnp.finfo(jnp.float32).tiny)
    fair = jnp.floor(weights / whole * total.astype(jnp.float32)).astype(jnp.int32)
    out = jnp.clip(fair, 0, room)

    def settle(rest: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Rounding of large numbers to float32 may have shared out too much: taken back here.
        more = jnp.clip(rest, -out[i], room[i] - out[i])
        return rest - more, out[i] + more

    return lax.scan(settle, total - jnp.sum(out), jnp.arange(len(room)))[1]


@dataclasses.dataclass(frozen=True)
class _Snfs(Redistribute):
    momentum: float

    def init(self, weights: Sequence[jax.Array]) -> Any:
        return [jnp.zeros_like(w, dtype=jnp.float32) for w in weights]

    def follow(self, memory: Any, weights: Any, grads: Any, masks: Any, step: Any) -> Any:
        beta = self.momentum
        return [
            where_finite(beta * m + (1 - beta) * g.astype(jnp.float32), m)
            for m, g in zip(memory, grads)
        ]

    def choose(self, choice: Choice, moment: Moment, memory: Any) -> tuple[list[jax.Array], Any]:
        return super().choose(choice, moment, choice.pooled(memory))[0], memory

    def numbers(
        self, moment: Moment, units: Sequence[jax.Array], left: Sequence[jax.Array], memory: Any
    ) -> jax.Array:
        sums = [jnp.sum(jnp.abs(m), where=x) for m, x in zip(memory, left)]
        return jnp.stack([s / jnp.maximum(jnp.sum(x), 1) for s, x in zip(sums, left)])

    def growth(self, weights: list[jax.Array], moment: Moment, memory: Any) -> Sequence[jax.Array]:
        return memory


def snfs(
    *,
    drop: float = 0.3,
    end: int | None = None,
    momentum: float = 0.9,
    initial: str = "random",
    allocation: str = "uniform",
    seed: int = 0,
) -> Algorithm:
    """Sparse networks from scratch: weights go where the momentum is large.

    `m <- beta m + (1 - beta) g` over the dense gradients, kept in the state. At a choice a share of
    each leaf's weights goes by `|w|`; the growth is divided among leaves by the mean `|m|` of the
    weights that stay, and in each leaf those of largest `|m|` come. The total is exact.

    Args:
      drop: the share that goes at first.
      end: the update at which none go any more, along half a cosine; None: the share stays.
      momentum: beta.
      initial: the first masks: `random`, or by `magnitude`.
      allocation: of the first masks.
      seed: of the first masks.

    References:
      Dettmers and Zettlemoyer, *Sparse Networks from Scratch: Faster Training without Losing
      Performance*, 2019.

    Examples:
      >>> snfs(momentum=0.95).momentum
      0.95
    """
    check_share("momentum", momentum)
    return _Snfs("local", allocation, drop, end, initial, seed, momentum)


@dataclasses.dataclass(frozen=True)
class _Dsr(Redistribute):
    threshold: float
    tolerance: float

    def init(self, weights: Sequence[jax.Array]) -> Any:
        return jnp.float32(self.threshold)

    def left(
        self, choice: Choice, units: Sequence[jax.Array], moment: Moment, memory: Any
    ) -> tuple[list[jax.Array], Any]:
        active = active_units(choice, moment.masks)
        large = [on & (jnp.abs(x) >= memory) for x, on in zip(units, active)]
        count = lambda masks: jnp.sum(jnp.stack([jnp.sum(x, dtype=jnp.int32) for x in masks]))
        there = count(active)
        gone = (there - count(large)).astype(jnp.float32)
        aim = self.share(moment.step) * there.astype(jnp.float32)
        double, halve = gone < aim * (1 - self.tolerance), gone > aim * (1 + self.tolerance)
        then = memory * jnp.where(double, 2.0, jnp.where(halve, 0.5, 1.0))
        keep = [x & ~moment.first for x in large]
        return keep, jnp.where(moment.first, memory, then)

    def numbers(
        self, moment: Moment, units: Sequence[jax.Array], left: Sequence[jax.Array], memory: Any
    ) -> jax.Array:
        return jnp.stack([jnp.sum(x, dtype=jnp.int32) for x in left]).astype(jnp.float32)

    def growth(self, weights: list[jax.Array], moment: Moment, memory: Any) -> Sequence[jax.Array]:
        return draws(weights, moment, self.seed)


def dsr(
    *,
    drop: float = 0.1,
    threshold: float = 1e-3,
    tolerance: float = 0.1,
    end: int | None = None,
    initial: str = "random",
    allocation: str = "uniform",
    seed: int = 0,
) -> Algorithm:
    """Dynamic sparse reparameterization: one adaptive threshold, random growth.

    At a choice all weights below H go. H doubles when fewer than `(1 - tolerance) drop` of them
    did, and halves when more than `(1 + tolerance) drop`. As many random weights come, divided
    among leaves by how many weights these have left. The total is exact.

    Args:
      drop: the share that shall go at a choice.
      threshold: the first H.
      tolerance: how far the share may be off before H changes.
      end: the update at which none shall go any more, along half a cosine; None: the share stays.
      initial: the first masks: `random`, or by `magnitude`.
      allocation: of the first masks.
      seed: of all draws.

    References:
      Mostafa and Wang, *Parameter Efficient Training of Deep Convolutional Neural Networks by
      Dynamic Sparse Reparameterization*, 2019.

    Examples:
      >>> dsr(threshold=1e-2).threshold
      0.01
    """
    check_share("tolerance", tolerance)
    if not threshold > 0:
        raise SpecError(f"threshold={threshold!r}: write a magnitude above zero, such as 1e-3")
    return _Dsr("local", allocation, drop, end, initial, seed, threshold, tolerance)
