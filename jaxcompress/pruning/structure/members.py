"""Where the channels of a group lie in the leaves of the params."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from jaxcompress.pruning.structure.labels import Axis, Table, width


@dataclasses.dataclass(frozen=True)
class Member:
    """The channels of a group along one axis of one leaf.

    Channel i has the places from `offset + i * block` up to `block` more, and the same again for
    each repeat.

    Attributes:
      path: of the leaf.
      axis: its axis, counted from the front.
      offset: the first place of the first channel.
      block: how many places beside each other a channel has.
      repeats: `(times, stride)` for each further loop over places, the slowest first.
    """

    path: str
    axis: int
    offset: int = 0
    block: int = 1
    repeats: tuple[tuple[int, int], ...] = ()

    def places(self, channels: np.ndarray) -> np.ndarray:
        """The places of some channels, `[channels, places of each]`."""
        starts = np.zeros(1, np.int64)
        for times, stride in self.repeats:
            starts = (starts[:, None] + stride * np.arange(times)).reshape(-1)
        inner = (starts[:, None] + np.arange(self.block)).reshape(-1)
        return self.offset + self.block * np.asarray(channels)[:, None] + inner


@dataclasses.dataclass(frozen=True)
class Group:
    """Channels that are removed from several leaves together.

    Attributes:
      size: how many channels there are.
      members: where they lie.
      pinned: why none of them can be removed, or None.
    """

    size: int
    members: tuple[Member, ...]
    pinned: str | None = None

    @property
    def name(self) -> str:
        """The first of its members, as `path[axis]`."""
        return f"{self.members[0].path}[{self.members[0].axis}]"


def parts_of(table: Table, axis: Axis) -> Iterator[tuple[int, int, Member]]:
    """The groups that an axis is made of, `(group, size, where)`; the path is left out."""
    yield from _parts(table, axis, 0, 1, ())


def _parts(
    table: Table, axis: Axis, offset: int, scale: int, repeats: tuple[tuple[int, int], ...]
) -> Iterator[tuple[int, int, Member]]:
    for segment in table.resolve(axis):
        inner, around = width(segment), repeats
        for factor in segment:
            inner //= factor.size
            found = table.bound.get(factor.group)
            if found is not None:
                yield from _parts(table, found, offset, scale * inner, around)
            else:
                where = Member("", 0, offset, scale * inner, around)
                yield factor.group, factor.size, where
            around = (*around, (factor.size, scale * inner))
        offset += scale * width(segment)
