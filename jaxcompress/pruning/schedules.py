"""How sparse after how many updates, and at which of them the masks are chosen anew."""

from __future__ import annotations

import dataclasses
import numbers

import jax
import jax.numpy as jnp

from jaxcompress.errors import SpecError
from jaxcompress.numerics import divide
from jaxcompress.specs import is_count

_NEVER = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The sparsity `s(t) = final + (initial - final) r(t)` at update t, counted from zero.

    `r` is the share of the way that remains, 1 at `begin` and 0 from `end` on; subclasses define
    it. Before `begin` nothing is pruned. The masks are chosen anew at `begin`, every `every`
    updates from there, and at `end`, so that the final sparsity is exact whatever the interval.

    Attributes:
      final: the sparsity to reach, from 0 to 1.
      initial: the sparsity at `begin`.
      begin: the update at which pruning begins.
      end: the last update at which masks are chosen.
      every: updates between two choices.

    Raises:
      SpecError: for a sparsity outside of 0 to 1, or steps that are no such order.
    """

    final: float
    initial: float
    begin: int
    end: int
    every: int

    def __post_init__(self) -> None:
        for name in ("final", "initial"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Real) or not 0 <= float(value) <= 1:
                raise SpecError(
                    f"{'sparsity' if name == 'final' else name}={value!r}: write the share to "
                    "remove, from 0 to 1, such as 0.9"
                )
        for name, least in (("begin", 0), ("end", self.begin), ("every", 1)):
            if not is_count(getattr(self, name), least, _NEVER):
                raise SpecError(
                    f"{name}={getattr(self, name)!r}: write a whole number of updates, at least "
                    f"{least}"
                )

    def remaining(self, step: jax.Array) -> jax.Array:
        """`r(step)`, float32 from 1 to 0; must be 0 at `end`."""
        raise NotImplementedError

    @property
    def loosens(self) -> bool:
        """Whether more weights may be asked for than were there before."""
        return self.initial > self.final

    def sparsity(self, step: int | jax.Array) -> jax.Array:
        """`s(step)` in float32, as a plot of the schedule shows it."""
        step = jnp.asarray(step, jnp.int32)
        now = self.final + (self.initial - self.final) * self.remaining(step)
        return jnp.where(step < self.begin, 0.0, now)

    def kept(self, first: int, last: int, step: jax.Array) -> jax.Array:
        """How many weights stay: `last + round(r(step) (first - last))`, uint32.

        Args:
          first: how many stay at the sparsity `initial`; exact at `begin`.
          last: how many stay at the sparsity `final`; exact from `end` on.
          step: the update.
        """
        share, whole = self.remaining(step), abs(first - last)
        way = jnp.minimum(jnp.round(share * jnp.float32(whole)), 2.0**32 - 2**8)
        way = jnp.minimum(way.astype(jnp.uint32), jnp.uint32(whole))
        way = jnp.where(share == 1, jnp.uint32(whole), way)
        return jnp.uint32(last) + way if first >= last else jnp.uint32(last) - way

    def refreshes(self, step: int | jax.Array) -> jax.Array:
        """Whether the masks are chosen anew at this update."""
        step = jnp.asarray(step, jnp.int32)
        due = ((step - self.begin) % self.every == 0) | (step == self.end)
        return due & (step >= self.begin) & (step <= self.end)


@dataclasses.dataclass(frozen=True)
class _Cubic(Schedule):
    def remaining(self, step: jax.Array) -> jax.Array:
        left = jnp.clip(self.end - step, 0, self.end - self.begin).astype(jnp.float32)
        share = divide(left, float(max(1, self.end - self.begin)))
        return share * share * share


@dataclasses.dataclass(frozen=True)
class _Exponential(Schedule):
    def remaining(self, step: jax.Array) -> jax.Array:
        left = jnp.clip(self.end - step, 0, self.end - self.begin).astype(jnp.float32)
        way = 1 - divide(left, float(max(1, self.end - self.begin)))
        # The densities are d_i (d_f / d_i)**way, of which this is the share between d_f and d_i.
        first, last = 1 - self.initial, 1 - self.final
        if first == last:
            return jnp.zeros(jnp.shape(step), jnp.float32)
        now = first * jnp.float32(last / first) ** way
        share = jnp.clip((now - last) / (first - last), 0.0, 1.0)
        return jnp.where(way >= 1, 0.0, jnp.where(way <= 0, 1.0, share))


@dataclasses.dataclass(frozen=True)
class _Iterative(Schedule):
    rounds: int

    def remaining(self, step: jax.Array) -> jax.Array:
        length = max(1, self.every)
        done = jnp.clip((step - self.begin) // length + 1, 0, self.rounds).astype(jnp.float32)
        last, first = 1 - self.final, 1 - self.initial
        if first == last:
            return jnp.zeros(jnp.shape(step), jnp.float32)
        now = first * jnp.float32(last / first) ** divide(done, float(self.rounds))
        share = jnp.clip((now - last) / (first - last), 0.0, 1.0)
        return jnp.where(done >= self.rounds, 0.0, share)


@dataclasses.dataclass(frozen=True)
class _Cyclic(Schedule):
    dense: int
    sparse: int

    @property
    def loosens(self) -> bool:
        return True

    def _phase(self, step: jax.Array) -> jax.Array:
        """The place within a cycle, sparse first; from `end` on the network stays sparse."""
        place = (jnp.minimum(step, self.end) - self.begin) % (self.sparse + self.dense)
        return jnp.where(step >= self.end, 0, place)

    def remaining(self, step: jax.Array) -> jax.Array:
        return (self._phase(jnp.asarray(step)) >= self.sparse).astype(jnp.float32)

    def refreshes(self, step: int | jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.int32)
        place = self._phase(step)
        due = (place == 0) | (place == self.sparse)
        return due & (step >= self.begin) & (step <= self.end)


@dataclasses.dataclass(frozen=True)
class _Constant(Schedule):
    def remaining(self, step: jax.Array) -> jax.Array:
        return jnp.zeros(jnp.shape(step), jnp.float32)


def cubic_schedule(
    sparsity: float, *, end: int, begin: int = 0, every: int = 100, initial: float = 0.0
) -> Schedule:
    """Gradual pruning: fast while there is much to remove, slow towards the end.

    `s(t) = s_f + (s_i - s_f) (1 - (t - begin) / (end - begin))**3` from `begin` to `end`.

    Args:
      sparsity: `s_f`, the share of weights that is removed in the end.
      end: the update at which it is reached. Leave some training after it.
      begin: the first update that prunes.
      every: updates between two choices of masks.
      initial: `s_i`, the share removed at `begin`.

    References:
      Zhu and Gupta, *To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model
      Compression*, 2017.

    Examples:
      >>> schedule = cubic_schedule(0.8, begin=100, end=500)
      >>> tuple(f"{schedule.sparsity(t):.3f}" for t in (99, 100, 300, 500, 1000))
      ('0.000', '0.000', '0.700', '0.800', '0.800')
    """
    return _Cubic(sparsity, initial, begin, end, every)


def exponential_schedule(
    sparsity: float, *, end: int, begin: int = 0, every: int = 100, initial: float = 0.0
) -> Schedule:
    """Gradual pruning that removes the same share of what is left at each step.

    `1 - s(t) = (1 - s_i) ((1 - s_f) / (1 - s_i))**((t - begin) / (end - begin))`.

    Args:
      sparsity: `s_f`, below 1.
      end: the update at which it is reached.
      begin: the first update that prunes.
      every: updates between two choices of masks.
      initial: `s_i`.

    Examples:
      >>> schedule = exponential_schedule(0.75, end=200)
      >>> tuple(f"{schedule.sparsity(t):.3f}" for t in (0, 100, 200))
      ('0.000', '0.500', '0.750')
    """
    schedule = _Exponential(sparsity, initial, begin, end, every)
    _check_open(schedule)
    return schedule


def iterative_schedule(
    sparsity: float, *, rounds: int, every: int, begin: int = 0, initial: float = 0.0
) -> Schedule:
    """Rounds of pruning and training: each removes the same share of what is left.

    After round k of n, `1 - s = (1 - s_i) ((1 - s_f) / (1 - s_i))**(k / n)`; a round is `every`
    updates long and begins with its removal.

    Args:
      sparsity: `s_f`, below 1, that of the last round.
      rounds: n.
      every: updates in a round.
      begin: the first update that prunes.
      initial: `s_i`.

    References:
      Han et al., *Learning both Weights and Connections for Efficient Neural Networks*, 2015.

    Examples:
      >>> schedule = iterative_schedule(0.75, rounds=2, every=100)
      >>> tuple(f"{schedule.sparsity(t):.3f}" for t in (0, 99, 100, 500))
      ('0.500', '0.500', '0.750', '0.750')
    """
    if not is_count(rounds, 1):
        raise SpecError(f"rounds={rounds!r}: write a whole number of at least 1")
    if not is_count(every, 1):
        raise SpecError(f"every={every!r}: write a whole number of updates, at least 1")
    end = begin + (rounds - 1) * every
    schedule = _Iterative(sparsity, initial, begin, end, every, rounds)
    _check_open(schedule)
    return schedule


def _check_open(schedule: Schedule) -> None:
    if schedule.final == 1 or schedule.initial == 1:
        raise SpecError("sparsity=1 is in no number of equal shares: write one below 1")


def cyclic_schedule(sparsity: float, *, sparse: int, dense: int, begin: int, end: int) -> Schedule:
    """Sparse and dense phases in turn; sparse from `end` on.

    From `begin` on, `sparse` updates with the masks of the phase's first update, then `dense`
    updates without, and so on. With `magnitude()` this is AC/DC.

    Args:
      sparsity: that of the sparse phases.
      sparse: updates in a sparse phase.
      dense: updates in a dense phase.
      begin: the first update of the first sparse phase, after a dense warm-up.
      end: the update at which the last sparse phase begins, which has no end.

    References:
      Peste et al., *AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks*,
      2021.

    Examples:
      >>> schedule = cyclic_schedule(0.9, sparse=2, dense=3, begin=1, end=8)
      >>> "".join("s" if schedule.sparsity(t) > 0 else "d" for t in range(12))
      'dssdddssssss'
    """
    for name, value in {"sparse": sparse, "dense": dense}.items():
        if not is_count(value, 1):
            raise SpecError(f"{name}={value!r}: write a whole number of updates, at least 1")
    return _Cyclic(sparsity, 0.0, begin, end, 1, dense, sparse)


def one_shot(sparsity: float, *, at: int = 0) -> Schedule:
    """All at once, at update `at`; the masks stay from there on.

    Examples:
      >>> schedule = one_shot(0.5, at=10)
      >>> tuple(float(schedule.sparsity(t)) for t in (9, 10, 11))
      (0.0, 0.5, 0.5)
    """
    return _Constant(sparsity, sparsity, at, at, 1)


def periodic(sparsity: float, *, every: int, begin: int = 0, end: int | None = None) -> Schedule:
    """One sparsity, but the masks are chosen anew every `every` updates.

    Args:
      sparsity: the share of weights that is removed from `begin` on.
      every: updates between two choices of masks.
      begin: the first update that prunes.
      end: the last update at which masks are chosen; None: never the last.

    Examples:
      >>> schedule = periodic(0.5, every=4, begin=2)
      >>> tuple(t for t in range(12) if schedule.refreshes(t))
      (2, 6, 10)
    """
    return _Constant(sparsity, sparsity, begin, _NEVER if end is None else end, every)
