"""What an axis of a value is made of, and which of its places go together.

An axis is a sequence of segments, one after the other, as a concatenation makes them. A segment is
a product of factors, the slowest first, as a reshape merges them. A factor is a group of channels:
whatever is made of the same group loses the same channels. Groups start coarse and are refined:
where an axis of 384 turns out to be 12 heads of 32, its group becomes the product of two; where it
is cut, the sum of two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxcompress.errors import CompressError


class Factor(NamedTuple):
    """A group as a part of an axis.

    Attributes:
      size: how many channels it has.
      group: its number.
      zero: whether the value is zero wherever a channel of this group is removed.
    """

    size: int
    group: int
    zero: bool = False


Segment = tuple[Factor, ...]
Axis = tuple[Segment, ...]

UNIT: Axis = ((),)  # an axis of one place


def length(axis: Axis) -> int:
    """How many places an axis has."""
    return sum(map(width, axis))


def width(segment: Sequence[Factor]) -> int:
    """How many places a segment has."""
    return math.prod(factor.size for factor in segment)


def flagged(axis: Axis, zero: bool) -> Axis:
    """The axis of a value that is zero where a channel is removed, or that is not."""
    return tuple(tuple(f._replace(zero=zero) for f in segment) for segment in axis)


def _bare(axis: Axis) -> Axis:
    return flagged(axis, False)


class Table:
    """All groups of a walk: what each turned out to be, and what forbids to remove from it."""

    def __init__(self) -> None:
        self.count = 0
        self.bound: dict[int, Axis] = {}
        self.pins: dict[int, str] = {}
        self.frozen: frozenset[int] = frozenset()
        self.place = ""  # of the equation at hand, for reasons

    # Making.

    def group(self, why: str | None = None) -> int:
        """A new group, pinned if there is a reason."""
        self.count += 1
        if why is not None:
            self.pins[self.count] = why
        return self.count

    def axis(self, n: int, why: str | None = None, zero: bool = False) -> Axis:
        """A new axis of one group."""
        return UNIT if n == 1 else ((Factor(n, self.group(why), zero),),)

    def axes(self, shape: Sequence[int], why: str | None = None, zero: bool = False) -> list[Axis]:
        """New axes, one for each of a shape."""
        return [self.axis(n, why, zero) for n in shape]

    # Reading.

    def resolve(self, axis: Axis) -> Axis:
        """The axis in the groups of today.

        A sum within a product is taken apart only where it is the slowest factor; elsewhere its
        factor stays whole, for its parts take turns.
        """
        if not any(f.group in self.bound for segment in axis for f in segment):
            return axis
        out: list[Segment] = []
        for segment in axis:
            out += self._resolve_segment(segment)
        return tuple(out)

    def _resolve_segment(self, segment: Segment) -> list[Segment]:
        tail: tuple[Factor, ...] = ()
        for n in range(len(segment) - 1, -1, -1):
            factor = segment[n]
            found = self.bound.get(factor.group)
            if found is None:
                tail = (factor, *tail)
                continue
            found = self.bound[factor.group] = self.resolve(found)
            parts = [tuple(f._replace(zero=factor.zero) for f in part) for part in found]
            if len(parts) == 1:
                tail = (*parts[0], *tail)
            elif n == 0:
                return [(*part, *tail) for part in parts]
            else:
                tail = (factor, *tail)
        return [tail]

    def groups(self, axis: Axis) -> Iterator[int]:
        """The groups that an axis is made of, those of taking turns included."""
        for segment in self.resolve(axis):
            for factor in segment:
                inner = self.bound.get(factor.group)
                if inner is None:
                    yield factor.group
                else:
                    yield from self.groups(inner)

    def nonzero(self, axis: Axis) -> Iterator[int]:
        """The groups on whose removed channels a value need not be zero."""
        for segment in self.resolve(axis):
            for factor in segment:
                if not factor.zero:
                    yield from self.groups(((factor,),))

    def pinned(self, axis: Axis) -> str | None:
        """Why nothing can be removed from an axis, or None if something can."""
        why = "it has one place"
        for group in self.groups(axis):
            if group not in self.pins:
                return None
            why = self.pins[group]
        return why

    # Changing.

    def pin(self, axis: Axis, why: str) -> None:
        """Forbids to remove anything from an axis."""
        self.pin_groups(self.groups(axis), why)

    def pin_groups(self, groups: Iterator[int], why: str) -> None:
        """Forbids to remove anything from some groups; the first reason stays."""
        for group in list(groups):
            self.pins.setdefault(group, why)

    def bind(self, group: int, axis: Axis) -> None:
        """A group turns out to be what this axis is."""
        if group in set(self.groups(axis)):
            self.pin(axis, f"channels of different places would be the same, {self.place}")
            return
        if group in self.frozen:
            raise CompressError(
                f"a derivative of the function takes channels apart ({self.place}) that are "
                "removed from its params; plan with groups of a function that takes it"
            )
        if group in self.pins:
            self.pin(axis, self.pins[group])
        self.bound[group] = _bare(axis)

    def unify(self, a: Axis, b: Axis) -> None:
        """Channels at the same places of two axes go together from now on."""
        a, b = self.resolve(a), self.resolve(b)
        if _bare(a) == _bare(b):
            return
        if length(a) != length(b):
            self._conflict(a, b)
        elif self._single(a) and not (self._single(b) and a[0][0].group in self.frozen):
            self.bind(a[0][0].group, b)
        elif self._single(b):
            self.bind(b[0][0].group, a)
        elif len(a) == len(b) == 1:
            self._unify_products(a[0], b[0])
        else:
            self._unify_sums(a, b)

    def _single(self, axis: Axis) -> bool:
        """Whether an axis is one group that is not yet known to be anything else."""
        return len(axis) == 1 and len(axis[0]) == 1 and axis[0][0].group not in self.bound

    def _conflict(self, a: Axis, b: Axis) -> None:
        why = f"its parts do not line up with those of another axis, {self.place}"
        self.pin(a, why)
        self.pin(b, why)

    def _unify_sums(self, a: Axis, b: Axis) -> None:
        start = 0
        for x, y in zip(a, b):
            if width(x) != width(y):
                longer, at = (b, width(x)) if width(x) < width(y) else (a, width(y))
                if not self.cut(longer, start + at):
                    return self._conflict(a, b)
                return self.unify(a, b)
            start += width(x)
        for x, y in zip(a, b):
            self.unify((x,), (y,))
        return None

    def _unify_products(self, a: Segment, b: Segment) -> None:
        x, y = a[-1], b[-1]
        if x.size == y.size:
            self.unify(((x,),), ((y,),))
            self.unify((a[:-1],), (b[:-1],))
        elif not self._divide(*((x, y.size) if x.size > y.size else (y, x.size))):
            self._conflict((a,), (b,))
        else:
            self.unify((a,), (b,))

    def _divide(self, factor: Factor, fast: int) -> bool:
        """Makes a group the product of two, the faster one of a given size, if it can be."""
        if factor.size % fast or factor.group in self.bound:
            return False
        slow = Factor(factor.size // fast, self.group())
        self.bind(factor.group, ((slow, Factor(fast, self.group())),))
        return True

    def one_segment(self, axis: Axis) -> Segment:
        """The factors of an axis; one factor for all of it, if it has several segments."""
        axis = self.resolve(axis)
        if len(axis) == 1:
            return axis[0]
        whole = self.group()
        self.bind(whole, axis)
        zero = all(factor.zero for segment in axis for factor in segment)
        return (Factor(length(axis), whole, zero),)

    def divided(self, factor: Factor, fast: int) -> Segment | None:
        """A factor as the product of two, the faster one of a given size, or None."""
        return self.resolve(((factor,),))[0] if self._divide(factor, fast) else None

    def cut(self, axis: Axis, at: int) -> bool:
        """Sees to it that a segment ends before a place of an axis; whether that could be."""
        axis = self.resolve(axis)
        for segment in axis:
            n = width(segment)
            if at in (0, n):
                return True
            if at < n:
                first = segment[0]
                inner = width(segment[1:])
                if at % inner or first.group in self.bound:
                    return False
                head = at // inner
                parts = [self.axis(head), self.axis(first.size - head)]
                self.bind(first.group, tuple(p for part in parts for p in part))
                return True
            at -= n
        return True

    def all_zero(self, there: Sequence[Axis]) -> Axis:
        """The first of several axes that go together, flagged where all of them are."""
        resolved = [self.resolve(axis) for axis in there]
        if any(_bare(axis) != _bare(resolved[0]) for axis in resolved):
            return _bare(resolved[0])
        flags = [[f.zero for segment in axis for f in segment] for axis in resolved]
        it = iter([all(column) for column in zip(*flags)])
        return tuple(tuple(f._replace(zero=next(it)) for f in segment) for segment in resolved[0])
