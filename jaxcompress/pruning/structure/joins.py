"""Which axes of an equation go together: those that are joined, repeated and padded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxcompress import compat
from jaxcompress.pruning.structure.labels import UNIT, Axis, Table, flagged, length
from jaxcompress.pruning.structure.walk import Outcome, Value, Walk

Rule = Callable[[Walk, compat.JaxprEqn, list[Value]], Outcome]


def _concatenate(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    where, table = eqn.params["dimension"], walk.table
    axes = []
    for a in range(len(ins[0].axes)):
        there = [value.axes[a] for value in ins]
        if a == where:
            axes.append(_joined(table, there))
            continue
        for other in there[1:]:
            table.unify(there[0], other)
        axes.append(table.all_zero(there))
    return Outcome([Value(tuple(axes))])


def _joined(table: Table, parts: Sequence[Axis]) -> Axis:
    why = [table.pinned(part) for part in parts]
    if all(w is not None for w in why):
        return table.axis(sum(map(length, parts)), f"{why[0]}; joined {table.place}")
    return tuple(segment for part in parts for segment in table.resolve(part))


def _pad(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    table = walk.table
    zero = ins[1].known is not None and ins[1].known == 0
    axes = []
    for axis, (low, high, inside) in zip(ins[0].axes, eqn.params["padding_config"]):
        if (low, high, inside) == (0, 0, 0):
            axes.append(axis if zero else flagged(axis, False))
            continue
        why = f"it is padded {table.place}"
        if table.pinned(axis) or inside or min(low, high) < 0:
            table.pin(axis, why)
            n = length(axis)
            axes.append(table.axis(n + low + high + inside * (n - 1), why))
            continue
        pads = [table.axis(n, why) if n else () for n in (low, high)]
        axes.append((*pads[0], *table.resolve(axis), *pads[1]))
    return Outcome([Value(tuple(axes))])


def _stack(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    table, axes = walk.table, []
    for there in zip(*(value.axes for value in ins)):
        for other in there[1:]:
            table.unify(there[0], other)
        axes.append(table.all_zero(there))
    axes.insert(eqn.params["axis"], table.axis(len(ins), f"several are stacked {table.place}"))
    return Outcome([Value(tuple(axes))])


def _unstack(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    where = eqn.params["axis"]
    walk.table.pin(ins[0].axes[where], f"it is taken apart {walk.table.place}")
    axes = tuple(axis for a, axis in enumerate(ins[0].axes) if a != where)
    return Outcome([Value(axes) for _ in eqn.outvars])


def _tile(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    table = walk.table
    times = [table.axis(n) for n in eqn.params["reps"]]
    axes = [
        axis if n == UNIT else ((*n[0], *table.one_segment(axis)),)
        for n, axis in zip(times, ins[0].axes)
    ]

    def run(arrays: list[Any]) -> list[Any]:
        return compat.bind_with(eqn, arrays, reps=walk.kept.shape(times))

    return Outcome([Value(tuple(axes))], run)


RULES: dict[str, Rule] = {
    "concatenate": _concatenate,
    "pad": _pad,
    "stack": _stack,
    "unstack": _unstack,
    "tile": _tile,
}
