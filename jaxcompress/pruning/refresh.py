"""Choosing masks anew in a training step, so that a step without a choice costs next to nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress import compat
from jaxcompress.pruning.algorithms import Algorithm, Moment
from jaxcompress.pruning.choice import Choice
from jaxcompress.pruning.schedules import Schedule
from jaxcompress.pruning.select import has_nan


class Held(NamedTuple):
    """What a choice may change; lists have an entry a pruned leaf.

    Attributes:
      masks: the masks.
      own: what the algorithm remembers.
      nan: whether the leaf held a NaN at the choice, bool `[leaves]`.
      moments: the parts of the optimizer's state that belong to the leaf.
    """

    masks: list[jax.Array]
    own: Any
    nan: jax.Array
    moments: list[list[jax.Array]]


def refreshed(
    algorithm: Algorithm,
    schedule: Schedule,
    choice: Choice,
    due: jax.Array,
    step: jax.Array,
    held: Held,
    weights: Sequence[jax.Array],
    grads: Sequence[jax.Array],
    starts: Sequence[Sequence[jax.Array]],
) -> Held:
    """What is held after a choice if one is due, else what it was.

    Leaves that are chosen without a look at the others are each chosen in a loop of their own:
    then the gradient of one need not be kept until that of the last is there, and the largest of
    what the choices of several leaves need in between is kept, not the sum.

    Args:
      algorithm: what goes and what comes.
      schedule: how much goes.
      choice: the leaves.
      due: whether a choice is due.
      step: the number of the update, int32.
      held: see `Held`.
      weights: the weights, or the dense copy.
      grads: their gradients.
      starts: the moments as `init` makes them, to which those of weights that come are set back.
    """
    # On the host and once: how many stay at either end of the schedule.
    ends = choice.counts((schedule.initial, schedule.final), lambda first, last: (first, last))
    sites = choice.sites
    alone = algorithm.apart and not choice.together
    groups = [[i] for i in range(len(sites))] if alone else [list(range(len(sites)))]
    parts = []
    for group in groups:
        pick = lambda xs, group=group: [xs[i] for i in group]
        own = pick(held.own) if alone and held.own else held.own
        mine = Held(pick(held.masks), own, held.nan[jnp.array(group)], pick(held.moments))

        def choose(masks: Any, own: Any, step: Any, weights: Any, grads: Any, group=group) -> Any:
            few = choice.of(group)
            counts = [schedule.kept(a, b, step) for a, b in (ends[i] for i in group)]
            moment = Moment(weights, grads, masks, counts, step, step == schedule.begin, group)
            new, own = algorithm.choose(few, moment, own)
            return new, own, jnp.stack([has_nan(x) for x in weights])

        parts.append(_if_due(due, choose, mine, step, pick(weights), pick(grads), pick(starts)))
    if len(parts) == 1:
        return parts[0]
    own = [x for part in parts for x in part.own] if held.own else held.own
    return Held(
        [x for part in parts for x in part.masks],
        own,
        jnp.concatenate([part.nan for part in parts]),
        [x for part in parts for x in part.moments],
    )


def _if_due(
    due: jax.Array, choose: Any, held: Held, step: Any, weights: Any, grads: Any, starts: Any
) -> Held:
    def turn(i: jax.Array, held: Held) -> Held:
        like = (held.masks, held.own, held.nan)
        # A sort or a draw has no place on Explicit axes; the outcome lies as what it replaces.
        args = (held.masks, held.own, step, weights, grads)
        # Always true: what a conditional holds, a compiler does not take out of the loop.
        new, own, nan = lax.cond(i == 0, lambda: compat.auto_like(choose, args, like), lambda: like)
        moments = []
        for before, after, mine, fresh in zip(held.masks, new, held.moments, starts):
            back = after & ~before
            moments.append([jnp.where(back, s, x) for x, s in zip(mine, fresh)])
        return Held(new, own, nan, moments)

    # A loop of one turn or none: where a conditional would copy what it does not change, a loop
    # hands it on in place.
    return lax.fori_loop(0, due.astype(jnp.int32), turn, held)
