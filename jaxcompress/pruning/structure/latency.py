"""A plan for a share of the time that a model takes, measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcompress import compat
from jaxcompress.arguments import apart
from jaxcompress.errors import SpecError
from jaxcompress.pruning.checks import check_share
from jaxcompress.pruning.structure.find import groups
from jaxcompress.pruning.structure.planning import plan
from jaxcompress.pruning.structure.plans import Plan
from jaxcompress.pruning.structure.shrinking import shrink

Measure = Callable[[Callable[..., Any], Any], float]


class Trial(NamedTuple):
    """A plan that was measured.

    Attributes:
      keep: the share of channels that it was asked to keep.
      cost: what `measure` gave over what it gave for the whole model.
      plan: the plan.
    """

    keep: float
    cost: float
    plan: Plan


def plan_for_latency(
    fn: Callable[..., Any],
    params: Any,
    args: Sequence[Any],
    scores: Any,
    share: float = 0.5,
    *,
    measure: Measure | None = None,
    trials: int = 8,
    tolerance: float = 0.02,
    **options: Any,
) -> tuple[Plan, tuple[Trial, ...]]:
    """The plan that keeps the most channels within a share of the measured time.

    Multiplications say little of time: a kernel of 9 channels may take as long as one of 16. So
    models are made and timed, one after the other: each takes the share of channels where a
    straight line between the slowest that is fast enough and the fastest that is not would meet the
    target, or the middle where one of the two stays. The search ends with a model that takes
    between `share * (1 - tolerance)` and `share`, or with the best of all trials.

    Args:
      fn: a function of params and other arguments.
      params: its params.
      args: the other arguments, which the function is timed on: arrays.
      scores: a tree of the structure of the params, as `plan` takes it.
      share: of the time that the whole model takes.
      measure: `measure(fn, params)`, the cost of a model in any unit, such as the time on a phone
        or its energy; None: the time of the jitted function on `args` on this device, in turns
        with the whole model, so that what else the machine does meets both.
      trials: how many models are measured at most, the whole one left out.
      tolerance: how much of the target may be left over.
      **options: of `plan`, such as `round_to=16`, `allocation="global"` or `only`.

    Returns:
      The plan, and all trials in their order.

    Raises:
      SpecError: for a share that not even the fewest channels meet, or an option that is none.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"up": jnp.ones((4, 16)), "down": jnp.ones((16, 2))}
      >>> apply = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
      >>> width = lambda fn, params: params["up"].shape[1]
      >>> x = jnp.ones((1, 4))
      >>> plan_for_latency(apply, params, (x,), params, 0.5, measure=width)[0].shapes
      {'down': (8, 2), 'up': (4, 8)}
    """
    target = check_share("share", share, "the share of the time that the model may take")
    if not isinstance(trials, int) or trials < 1:
        raise SpecError(f"trials={trials!r}: write a whole number of at least 1")
    if not 0 <= tolerance < 1:
        raise SpecError(f"tolerance={tolerance!r}: write a number from 0 up to 1")
    if options.keys() & {"keep", "budget"}:
        raise SpecError("the budget is the measured time: leave out keep and budget")
    found = groups(fn, params, *args)
    measure = measure or Clock(fn, params, args)
    whole = _measured(measure, fn, params)
    seen: dict[Plan, float] = {plan(found, scores, 1.0, **options): 1.0}
    done: list[Trial] = []

    def cost(keep: float) -> Trial:
        made = plan(found, scores, keep, **options)
        if made not in seen:
            seen[made] = _measured(measure, *shrink(fn, params, made)) / whole
            done.append(Trial(keep, seen[made], made))
        return Trial(keep, seen[made], made)

    best = _search(cost, target, tolerance, lambda: len(done) < trials)
    if best is None:
        least = min(done, key=lambda trial: trial.cost)
        raise SpecError(
            f"share={share:g} of the time cannot be met: with {least.keep:.3g} of the channels it "
            f"is {least.cost:.3g}"
        )
    return best.plan, tuple(done)


def _search(
    cost: Callable[[float], Trial], target: float, tolerance: float, more: Callable[[], bool]
) -> Trial | None:
    """The slowest trial within the target, or None."""
    high = cost(1.0)
    if high.cost <= target:
        return high
    low: Trial | None = None
    keep = target  # as if time were that of channels
    turns = 0
    before: bool | None = None
    while more() and turns < 64 and keep >= 1e-3:
        turns += 1  # plans that were measured before cost nothing, but end some time
        trial = cost(keep)
        fits = trial.cost <= target
        again, before = fits == before, fits
        if not fits:
            high = trial
        else:
            low = trial
            if trial.cost >= target * (1 - tolerance):
                break
        if low is None:
            keep = trial.keep / 2
            continue
        if high.keep - low.keep < 1e-3:
            break
        # Where one end stays, as at a jump, the middle; and never too near to either end.
        slope = (target - low.cost) / max(high.cost - low.cost, 1e-9)
        slope = 0.5 if again else min(max(slope, 0.1), 0.9)
        keep = low.keep + (high.keep - low.keep) * slope
    return low


def _measured(measure: Measure, fn: Callable[..., Any], params: Any) -> float:
    found = float(measure(fn, params))
    if not found > 0 or not np.isfinite(found):
        raise SpecError(f"measure gave {found!r}, and a cost is a positive number")
    return found


class Clock:
    """Measures a jitted function over the whole model's, in turns: the whole model takes 1.

    Args:
      fn: the function.
      params: the whole params.
      args: what it is run on.
      rounds: how often either is run; the median of the ratios counts.
      seconds: how long a round is at least, in which each is called over and over.

    Examples:
      >>> import jax.numpy as jnp
      >>> clock = Clock(lambda p, x: x @ p, jnp.ones((4, 4)), (jnp.ones((1, 4)),), rounds=3)
      >>> clock(lambda p, x: x @ p, jnp.ones((4, 2))) > 0
      True
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        params: Any,
        args: Sequence[Any],
        *,
        rounds: int = 21,
        seconds: float = 0.002,
    ):
        self.args, self.rounds, self.seconds = tuple(args), rounds, seconds
        self.whole = self._compiled(fn, params)

    def __call__(self, fn: Callable[..., Any], params: Any) -> float:
        """The median of the ratios of its time to that of the whole model."""
        run = self._compiled(fn, params)
        once = max(self._time(self.whole, 1), 1e-7)
        calls = min(max(1, round(self.seconds / once)), 1000)
        self._time(run, 1)
        pairs = [
            (self._time(self.whole, calls), self._time(run, calls)) for _ in range(self.rounds)
        ]
        return float(np.median([mine / max(whole, 1e-9) for whole, mine in pairs]))

    def _compiled(self, fn: Callable[..., Any], params: Any) -> Callable[[], Any]:
        arrays, full = apart(self.args, compat.is_traceable)

        def flat(params: Any, arrays: list[Any]) -> Any:
            return fn(params, *full(arrays))

        compiled = jax.jit(flat).lower(params, arrays).compile()
        run = lambda: compiled(params, arrays)
        jax.block_until_ready(run())
        return run

    def _time(self, run: Callable[[], Any], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(run())
        return time.perf_counter() - start
