"""Which axes of an equation go together: those that move and are cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax import lax

from jaxcompress import compat
from jaxcompress.pruning.structure import joins
from jaxcompress.pruning.structure.labels import UNIT, Axis, Factor, Table, flagged, length, width
from jaxcompress.pruning.structure.walk import Outcome, Value, Walk, shape_of

Rule = Callable[[Walk, compat.JaxprEqn, list[Value]], Outcome]


def _transpose(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    return Outcome([Value(tuple(ins[0].axes[a] for a in eqn.params["permutation"]))])


def _squeeze(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    gone = eqn.params["dimensions"]
    return Outcome([Value(tuple(x for a, x in enumerate(ins[0].axes) if a not in gone))])


def _broadcast_in_dim(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    shape, old = eqn.params["shape"], shape_of(eqn.invars[0])
    axes = walk.table.axes(shape)
    for a, b in enumerate(eqn.params["broadcast_dimensions"]):
        if old[a] == shape[b]:
            axes[b] = ins[0].axes[a]

    def run(arrays: list[Any]) -> list[Any]:
        return compat.bind_with(eqn, arrays, shape=walk.kept.shape(axes))

    return Outcome([Value(tuple(axes))], run)


def _reshape(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    new, table = eqn.params["new_sizes"], walk.table
    found = None
    if eqn.params.get("dimensions") is None:
        found = _reshaped(table, [table.resolve(axis) for axis in ins[0].axes], new)
    if found is None:
        why = f"it is taken apart {table.place}"
        for axis in ins[0].axes:
            table.pin(axis, why)
        found = table.axes(new, why)
    axes = found

    def run(arrays: list[Any]) -> list[Any]:
        return [lax.reshape(arrays[0], walk.kept.shape(axes))]

    return Outcome([Value(tuple(axes))], run)


def _reshaped(table: Table, old: Sequence[Axis], new: Sequence[int]) -> list[Axis] | None:
    """The axes after a reshape, in blocks that keep their places; None where they do not fit."""
    rest, out = [axis for axis in old if axis != UNIT], []
    n = 0
    while n < len(new):
        if new[n] == 1:
            out.append(UNIT)
            n += 1
        elif rest and length(rest[0]) == new[n]:
            out.append(rest.pop(0))
            n += 1
        else:
            block = _block(rest, new[n:])
            if block is None:
                return None
            before, after = block
            found = _split(table, rest[:before], new[n : n + after])
            out += found
            rest, n = rest[before:], n + after
    return out


def _block(old: Sequence[Axis], new: Sequence[int]) -> tuple[int, int] | None:
    """How many of the old and of the new axes hold the same places, at least one of each."""
    if not old:
        return None
    i = j = 1
    a, b = length(old[0]), new[0]
    while a != b:
        if a < b:
            if i == len(old):
                return None
            a, i = a * length(old[i]), i + 1
        else:
            if j == len(new):
                return None
            b, j = b * new[j], j + 1
    return i, j


def _split(table: Table, old: Sequence[Axis], new: Sequence[int]) -> list[Axis]:
    """The axes of one block, pinned where a group would be torn."""
    factors = [factor for axis in old for factor in table.one_segment(axis)]
    out: list[Axis] = []
    for n in new:
        taken: list[Factor] = []
        while width(taken) < n:
            factor, missing = factors.pop(0), n // width(taken)
            if factor.size > missing:
                parts = None
                if n % width(taken) == 0 and factor.size % missing == 0:
                    parts = table.divided(factor, factor.size // missing)
                if parts is None:
                    return _torn(table, old, new)
                factors = [*parts, *factors]
            else:
                taken.append(factor)
        if width(taken) != n:
            return _torn(table, old, new)
        out.append((tuple(taken),))
    return out


def _torn(table: Table, old: Sequence[Axis], new: Sequence[int]) -> list[Axis]:
    why = f"it is taken apart {table.place}"
    for axis in old:
        table.pin(axis, why)
    return table.axes(new, why)


# What is cut.


def _part(walk: Walk, axis: Axis, start: int, limit: int, stride: int) -> tuple[Axis, bool]:
    """The axis of a slice, and whether its places are those of the params and may be removed."""
    table, n = walk.table, length(axis)
    if (start, limit, stride) == (0, n, 1):
        return axis, True
    count = -(-(limit - start) // stride)
    why = table.pinned(axis) or f"it is sliced {table.place}"
    if table.pinned(axis) is None:
        if stride == 1 and table.cut(axis, start) and table.cut(axis, limit):
            return _between(table.resolve(axis), start, limit), True
        if stride > 1 and n % stride == 0 and start < stride and count == n // stride:
            together = table.axis(stride, f"its places take turns {table.place}")
            slow = table.axis(count)
            table.unify(((*slow[0], *together[0]),), axis)
            zero = not any(True for _ in table.nonzero(axis))
            return flagged(table.resolve(slow), zero), True
    table.pin(axis, why)
    return table.axis(count, why), False


def _between(axis: Axis, start: int, limit: int) -> Axis:
    out, at = [], 0
    for segment in axis:
        if start <= at < limit:
            out.append(segment)
        at += width(segment)
    return tuple(out)


def _slice(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    p = eqn.params
    starts, limits = p["start_indices"], p["limit_indices"]
    strides = p["strides"] or (1,) * len(starts)
    old = ins[0].axes
    axes = [_part(walk, *cut)[0] for cut in zip(old, starts, limits, strides)]

    def run(arrays: list[Any]) -> list[Any]:
        places = [walk.kept.places(axis) for axis in old]
        low = [int((x < start).sum()) for x, start in zip(places, starts)]
        high = [int((x < limit).sum()) for x, limit in zip(places, limits)]
        # Where a stride takes turns, what comes before the first turn stays as it is.
        low = [start if by > 1 else n for n, start, by in zip(low, starts, strides)]
        return [lax.slice(arrays[0], low, high, strides)]

    return Outcome([Value(tuple(axes))], run)


def _split_axis(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    sizes, where = [int(n) for n in eqn.params["sizes"]], eqn.params["axis"]
    parts, start = [], 0
    for n in sizes:
        parts.append(_part(walk, ins[0].axes[where], start, start + n, 1)[0])
        start += n
    axes = ins[0].axes
    outs = [Value((*axes[:where], part, *axes[where + 1 :])) for part in parts]

    def run(arrays: list[Any]) -> list[Any]:
        return compat.bind_with(eqn, arrays, sizes=tuple(map(walk.kept.size, parts)))

    return Outcome(outs, run)


def _rev(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    for a in eqn.params["dimensions"]:
        walk.table.pin(ins[0].axes[a], f"it is reversed {walk.table.place}")
    return Outcome([Value(ins[0].axes)])


def _windows(walk: Walk, axes: Sequence[Axis], sizes: Sequence[int], still: Any) -> list[Axis]:
    """The axes of a window of these sizes: the same where it spans all, else pinned."""
    out = []
    for a, (axis, n) in enumerate(zip(axes, sizes)):
        if n == length(axis) and still(a):
            out.append(axis)
            continue
        why = f"it is looked up {walk.table.place}"
        walk.table.pin(axis, why)
        out.append(walk.table.axis(n, why))
    return out


def _dynamic_slice(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    axes = _windows(walk, ins[0].axes, eqn.params["slice_sizes"], lambda a: True)

    def run(arrays: list[Any]) -> list[Any]:
        return compat.bind_with(eqn, arrays, slice_sizes=walk.kept.shape(axes))

    return Outcome([Value(tuple(axes))], run)


def _dynamic_update_slice(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    axes = []
    for axis, update in zip(ins[0].axes, ins[1].axes):
        if length(axis) == length(update):
            walk.table.unify(axis, update)
            axes.append(walk.table.all_zero((axis, update)))
            continue
        why = f"parts of it are written {walk.table.place}"
        walk.table.pin(axis, why)
        walk.table.pin(update, why)
        axes.append(axis)
    return Outcome([Value(tuple(axes))])


def _gather(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    table, axes, indices = walk.table, ins[0].axes, ins[1].axes
    batch = dict(zip(numbers.start_indices_batching_dims, numbers.operand_batching_dims))
    for a, b in batch.items():
        table.unify(indices[a], axes[b])
    inner = [
        a for a in range(len(axes)) if a not in (*batch.values(), *numbers.collapsed_slice_dims)
    ]
    still = lambda a: a not in numbers.start_index_map
    whole = [axis if a in batch.values() else UNIT for a, axis in enumerate(axes)]
    for a, axis in enumerate(axes):
        if a not in batch.values():
            whole[a] = _windows(walk, [axis], [sizes[a]], lambda _, a=a: still(a))[0]
    ndim = len(shape_of(eqn.outvars[0]))
    outer = iter([flagged(axis, False) for axis in indices[:-1]])
    offset = iter([whole[a] for a in inner])
    out = tuple(next(offset if n in numbers.offset_dims else outer) for n in range(ndim))

    def run(arrays: list[Any]) -> list[Any]:
        small = tuple(
            1 if a in batch.values() else walk.kept.size(axis) for a, axis in enumerate(whole)
        )
        return compat.bind_with(eqn, arrays, slice_sizes=small)

    return Outcome([Value(out)], run)


RULES: dict[str, Rule] = {
    **joins.RULES,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": _reshape,
    "slice": _slice,
    "split": _split_axis,
    "rev": _rev,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
}
