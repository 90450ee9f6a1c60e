"""The walk over a jaxpr: it labels the axes of all values, and makes what runs on the small ones.

Both at once, equation by equation: a rule says which axes of an equation go together and what its
outputs are made of, and how the equation runs when channels are removed. Only when the whole
function was walked is it known what can be removed, so what runs is made first and called later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxcompress import compat
from jaxcompress.errors import CompressError
from jaxcompress.interpret import last_uses
from jaxcompress.pruning.structure.labels import Axis, Table, length

Run = Callable[[list[Any]], list[Any]]
Shape = tuple[int, ...]


class Value(NamedTuple):
    """What the walk knows of a value.

    Attributes:
      axes: what its axes are made of.
      known: its one value, where all of its places have the same that the walk knows.
      whole: that it depends on no argument, such as a constant, a position or a random number. Then
        it has no axes yet: it is computed as it was, and what is left of it is taken wherever it
        meets channels.
      tag: what a `Follower` says of it.
    """

    axes: tuple[Axis, ...] = ()
    known: Any = None
    whole: bool = False
    tag: Any = None


def constant(known: Any = None) -> Value:
    """A value that depends on no argument."""
    return Value((), known, True)


def shape_of(v: Any) -> Shape:
    """The shape of a variable."""
    return v.aval.shape


class Outcome(NamedTuple):
    """What a rule says of an equation: its outputs, and how it runs, unless as it is."""

    outs: list[Value]
    run: Run | None = None


class Product(NamedTuple):
    """Multiplications of an equation: `times` the places of all axes."""

    times: int
    axes: tuple[Axis, ...]


class Follower:
    """Goes along with a walk, and puts tags on values."""

    def entered(self, jaxpr: compat.Jaxpr) -> None:
        """A jaxpr is about to be walked; the same one may be several times."""

    def tag(self, walk: Walk, eqn: compat.JaxprEqn, ins: Sequence[Value]) -> Any:
        """The tag of the only output of an equation that is no call, loop or branch."""

    def sliced(self, tag: Any) -> Any:
        """The tag of a slice of a value that a `scan` runs over."""


class Kept:
    """Which channels of each group stay, and so which places of an axis."""

    def __init__(self, table: Table, channels: dict[int, np.ndarray]) -> None:
        self.table = table
        self.channels = channels

    def places(self, axis: Axis) -> np.ndarray:
        """The places that stay, in order."""
        parts, start = [], 0
        for segment in self.table.resolve(axis):
            places = np.zeros(1, np.int64)
            for factor in segment:
                inner = self._factor(factor.group, factor.size)
                places = (places[:, None] * factor.size + inner).reshape(-1)
            parts.append(places + start)
            start += length((segment,))
        return np.concatenate(parts)

    def _factor(self, group: int, size: int) -> np.ndarray:
        inner = self.table.bound.get(group)
        if inner is not None:
            return self.places(inner)
        found = self.channels.get(group)
        return np.arange(size) if found is None else found

    def size(self, axis: Axis) -> int:
        """How many places stay."""
        return sum(
            int(np.prod([len(self._factor(f.group, f.size)) for f in segment], dtype=np.int64))
            for segment in self.table.resolve(axis)
        )

    def shape(self, axes: Sequence[Axis]) -> Shape:
        """How many places of each axis stay."""
        return tuple(map(self.size, axes))

    def take(self, x: Any, axes: Sequence[Axis]) -> Any:
        """What stays of an array that has all places."""
        for a, axis in enumerate(axes):
            if self.size(axis) != x.shape[a]:
                x = jnp.take(x, self.places(axis), axis=a, mode="clip")
        return x


class Walk:
    """One walk over a function."""

    def __init__(self, follower: Follower | None = None) -> None:
        self.follower = follower or Follower()
        self.table = Table()
        self.kept = Kept(self.table, {})
        self.products: list[Product] = []
        self.sizes: dict[int, int] = {}
        self.times = 1  # how often the equations at hand run

    def labelled(self, value: Value, shape: Sequence[int]) -> Value:
        """The value with axes, new ones where it had none."""
        if not value.whole:
            return value
        zero = value.known is not None and not np.any(value.known)
        return Value(tuple(self.table.axes(shape, zero=zero)), value.known)

    def fitted(self, x: Any, value: Value, axes: Sequence[Axis]) -> Any:
        """An array in the sizes of these axes, whether they were taken from it already or not."""
        if not value.whole:
            return x
        shape = self.kept.shape(axes)
        if tuple(np.shape(x)) == shape:
            return x
        if value.known is not None:
            return jnp.full(shape, value.known, x.dtype)
        return self.kept.take(x, axes)

    def fit_all(
        self, arrays: Sequence[Any], own: Sequence[Value], to: Sequence[Value]
    ) -> list[Any]:
        """Arrays as these other values have them; what is whole there stays so."""
        return [x if b.whole else self.fitted(x, a, b.axes) for x, a, b in zip(arrays, own, to)]

    def untouched(self, values: Sequence[Value]) -> bool:
        """Whether nothing is removed from any of these."""
        axes = [axis for value in values for axis in value.axes]
        return all(self.kept.size(axis) == length(axis) for axis in axes)

    def jaxpr(
        self, jaxpr: compat.Jaxpr, consts: Sequence[Any], ins: Sequence[Value]
    ) -> tuple[list[Value], Run]:
        """Labels what a jaxpr computes from values, and makes what computes it from arrays."""
        env: dict[Any, Value] = dict(zip(jaxpr.invars, ins))
        env.update((v, constant()) for v in jaxpr.constvars)
        self.follower.entered(jaxpr)

        def known(v: Any) -> Value:
            if isinstance(v, compat.Literal):
                return constant(v.val if np.ndim(v.val) == 0 else None)
            return env[v]

        steps = []
        for eqn in jaxpr.eqns:
            outs, step = self._equation(eqn, [known(v) for v in eqn.invars])
            env.update(zip(eqn.outvars, outs))
            steps.append(step)
        done = last_uses(jaxpr)

        def run(args: list[Any]) -> list[Any]:
            arrays: dict[Any, Any] = dict(zip(jaxpr.constvars, consts))
            arrays.update(zip(jaxpr.invars, args))
            read = lambda v: v.val if isinstance(v, compat.Literal) else arrays[v]
            for n, (eqn, step) in enumerate(zip(jaxpr.eqns, steps)):
                with compat.context(eqn):
                    found = step([read(v) for v in eqn.invars])
                arrays.update(zip(eqn.outvars, found))
                for v in done.get(n, ()):
                    arrays.pop(v, None)
            return [read(v) for v in jaxpr.outvars]

        return [known(v) for v in jaxpr.outvars], run

    def _equation(self, eqn: compat.JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run]:
        from jaxcompress.pruning.structure import control, rules

        name = eqn.primitive.name
        self.table.place = f"in {compat.place(eqn)}"
        as_it_is = lambda arrays: compat.bind(eqn, arrays)
        if all(value.whole for value in ins):
            return rules.without_axes(eqn, ins), as_it_is
        if name in control.RULES:
            outcome = control.RULES[name](self, eqn, ins)
            return outcome.outs, outcome.run or as_it_is
        shapes = list(map(shape_of, eqn.invars))
        whole = [self.labelled(value, shape) for value, shape in zip(ins, shapes)]
        outcome = rules.find(eqn)(self, eqn, whole)
        inner = outcome.run or as_it_is
        tag = self.follower.tag(self, eqn, ins)
        outs = outcome.outs if tag is None else [outcome.outs[0]._replace(tag=tag)]

        def run(arrays: list[Any]) -> list[Any]:
            fit = zip(arrays, ins, whole)
            return inner([self.fitted(x, value, w.axes) for x, value, w in fit])

        return outs, run

    def keep(self, channels: dict[int, np.ndarray], sizes: dict[int, int]) -> None:
        """Settles which channels stay; from now on these groups may not be taken apart."""
        self.kept.channels = channels
        self.sizes = sizes
        self.table.frozen = frozenset(channels)
        self.check()

    def check(self) -> None:
        """Refuses a plan that removes what the function cannot do without."""
        for group, channels in self.kept.channels.items():
            why = self.table.pins.get(group)
            if why is not None and len(channels) < self.sizes[group]:
                raise CompressError(
                    f"the plan removes channels that this function cannot do without: {why}"
                )
