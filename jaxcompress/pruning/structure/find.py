"""`groups(fn, params, ...)`: which channels of which leaves go together."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxcompress.pruning.structure.function import Labelled, label, leaves_of
from jaxcompress.pruning.structure.labels import Axis, Table
from jaxcompress.pruning.structure.members import Group, Member, parts_of
from jaxcompress.tables import Tabular

if TYPE_CHECKING:  # rich is imported when a table is drawn, not with the package
    from rich.table import Table as RichTable

# An axis as a count: a sum of products of numbers, groups (negative, from -1) and further sums.
Count = tuple[tuple[Any, ...], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Groups(Tabular):
    """The groups of a function; prints in a terminal, shows in a notebook.

    Attributes:
      groups: those that have a place in the params, removable or pinned.
      shapes: of the leaves, by path.
      itemsizes: the bytes of one value, by path.
      axes: for each leaf and axis what it is made of, by path.
      products: the multiplications of the function, `(times, what it runs over)` each.
    """

    groups: tuple[Group, ...]
    shapes: Mapping[str, tuple[int, ...]]
    itemsizes: Mapping[str, int]
    axes: Mapping[str, tuple[Count, ...]]
    products: tuple[tuple[int, tuple[Count, ...]], ...]

    @property
    def removable(self) -> tuple[Group, ...]:
        """The groups from which channels can be removed."""
        return tuple(group for group in self.groups if group.pinned is None)

    def of(self, path: str, axis: int) -> tuple[Group, ...]:
        """The groups that an axis of a leaf is made of, in order."""
        axis %= len(self.shapes[path])
        own = [
            (member.offset, -member.block, group)
            for group in self.groups
            for member in group.members
            if (member.path, member.axis) == (path, axis)
        ]
        return tuple(group for *_, group in sorted(own, key=lambda x: x[:2]))

    def parameters(self, kept: Mapping[Group, int] | None = None) -> int:
        """How many parameters there are, where this many channels of some groups stay."""
        return sum(self._per_leaf(kept).values())

    def nbytes(self, kept: Mapping[Group, int] | None = None) -> int:
        """How many bytes the parameters take, likewise."""
        found = self._per_leaf(kept)
        return sum(n * self.itemsizes[path] for path, n in found.items())

    def multiplications(self, kept: Mapping[Group, int] | None = None) -> int:
        """How many multiplications the contractions of the function take, likewise.

        Of its loops without a fixed length one turn is counted, and of branches all.
        """
        counts = self._counts(kept)
        return sum(
            times * math.prod(amount(axis, counts) for axis in axes)
            for times, axes in self.products
        )

    def _per_leaf(self, kept: Mapping[Group, int] | None) -> dict[str, int]:
        counts = self._counts(kept)
        return {
            path: math.prod(amount(axis, counts) for axis in axes)
            for path, axes in self.axes.items()
        }

    def _counts(self, kept: Mapping[Group, int] | None) -> list[int]:
        kept = kept or {}
        return [kept.get(group, group.size) for group in self.groups]

    def dot(self, pinned: bool = False) -> str:
        """The groups as a graph in the language of Graphviz: groups, leaves, and axes between.

        Args:
          pinned: whether to draw groups from which nothing can be removed.
        """
        lines = ["graph groups {", "  rankdir=LR;", "  node [shape=box];"]
        for n, group in enumerate(self.groups):
            if group.pinned is not None and not pinned:
                continue
            style = (
                ', style=dashed, tooltip="' + _quoted(group.pinned) + '"' if group.pinned else ""
            )
            lines.append(f'  g{n} [label="{group.size} channels", shape=ellipse{style}];')
            for member in group.members:
                text = _line(member).removeprefix(member.path)
                lines.append(f'  g{n} -- "{_quoted(member.path)}" [label="{_quoted(text)}"];')
        return "\n".join([*lines, "}"])

    def __rich__(self) -> RichTable:
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title="groups")
        table.add_column("channels", justify="right")
        table.add_column("leaves", overflow="fold")
        table.add_column("pinned", overflow="fold")
        for group in sorted(self.groups, key=lambda g: g.pinned is not None):
            lines = "\n".join(map(_line, group.members))
            style = "dim" if group.pinned else None
            table.add_row(f"{group.size:,}", Text(lines), Text(group.pinned or ""), style=style)
        return table

    def __repr__(self) -> str:
        free = self.removable
        return (
            f"Groups({len(free)} removable of {sum(group.size for group in free)} channels, "
            f"{len(self.groups) - len(free)} pinned)"
        )


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _line(member: Member) -> str:
    text = f"{member.path}[{member.axis}]"
    if member.offset:
        text += f" from {member.offset}"
    if member.block > 1:
        text += f" in blocks of {member.block}"
    times = math.prod(times for times, _ in member.repeats)
    return text + (f", {times} times" if times > 1 else "")


def amount(axis: Count, kept: Sequence[int]) -> int:
    """How many places of an axis stay, where this many channels of each group do."""
    return sum(math.prod(_amount(factor, kept) for factor in segment) for segment in axis)


def _amount(factor: Any, kept: Sequence[int]) -> int:
    if isinstance(factor, tuple):
        return amount(factor, kept)
    return kept[-1 - factor] if factor < 0 else factor


def groups(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Groups:
    """Finds which channels of which leaves can be removed, and what goes with them.

    The function is traced, never run. Each axis of each value is followed through its jaxpr: axes
    that an equation ties together are one group, an axis that turns out to be of several
    parts (heads and their depth, the pieces of a concatenation) is split. An axis is pinned, with
    the reason, where its removal would be seen: arguments and results, what is reduced over other
    than by a sum of zeros, and whatever meets an operation that is not known.

    What is removed is zero in all of its leaves in the masked model (`mask_channels`). A sum over
    removed channels that are zero thus keeps its value, and a mean its divisor: the layer norm or
    RMS norm of a model whose width is reduced still divides by the full width. (Where the masked
    model divides zero by zero at a removed channel, as by a norm without an epsilon, it has a NaN
    there, and the smaller one has not.)

    Args:
      fn: a function of `params` and the other arguments, such as a Linen module's `apply`, as it
        is run after training.
      params: its first argument, arrays or shapes; with Flax the variables, batch statistics
        included.
      *args: the other arguments: arrays, shapes, or static values.
      **kwargs: likewise.

    Returns:
      `Groups`, to print, and to `plan` with.

    Raises:
      CompressError: for params that hold compressed leaves or no arrays.

    References:
      Fang et al., *DepGraph: Towards Any Structural Pruning*, 2023.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> params = {"up": jnp.ones((4, 16)), "bias": jnp.ones(16), "down": jnp.ones((16, 2))}
      >>> apply = lambda p, x: jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]
      >>> groups(apply, params, jnp.ones((1, 4)))
      Groups(1 removable of 16 channels, 2 pinned)
    """
    leaves = leaves_of(params)
    found = label(fn, params, [x.shape for _, x in leaves], args, kwargs)
    table = found.walk.table
    for value in found.outs:
        for axis in value.axes:
            table.pin(axis, "it is an axis of the result")
    members, sizes = members_of(found)
    order = list(members)
    made = tuple(
        Group(sizes[number], tuple(members[number]), table.pins.get(number)) for number in order
    )
    places = {number: -1 - n for n, number in enumerate(order)}
    count = lambda axes: tuple(_count(table, axis, places) for axis in axes)
    return Groups(
        made,
        {path: tuple(x.shape) for path, x in leaves},
        {path: x.dtype.itemsize for path, x in leaves},
        {path: count(axes) for path, axes in zip(found.paths, found.axes)},
        tuple((p.times, count(p.axes)) for p in found.walk.products),
    )


def members_of(found: Labelled) -> tuple[dict[int, list[Member]], dict[int, int]]:
    """The members of each group that has a place in the params, and its size."""
    members: dict[int, list[Member]] = collections.defaultdict(list)
    sizes = {}
    for path, axes in zip(found.paths, found.axes):
        for n, axis in enumerate(axes):
            for number, size, where in parts_of(found.walk.table, axis):
                members[number].append(dataclasses.replace(where, path=path, axis=n))
                sizes[number] = size
    return members, sizes


def _count(table: Table, axis: Axis, places: Mapping[int, int]) -> Count:
    out = []
    for segment in table.resolve(axis):
        factors: list[Any] = []
        for factor in segment:
            inner = table.bound.get(factor.group)
            if inner is not None:
                factors.append(_count(table, inner, places))
            else:
                factors.append(places.get(factor.group, factor.size))
        out.append(tuple(factors))
    return tuple(out)
