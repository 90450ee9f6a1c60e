"""Which axes of an equation go together: elementwise, reductions, windows, contractions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxcompress import compat
from jaxcompress.pruning.structure import elementwise, shapes
from jaxcompress.pruning.structure.labels import UNIT, Axis, Factor, flagged, length
from jaxcompress.pruning.structure.walk import (
    Outcome,
    Product,
    Run,
    Value,
    Walk,
    constant,
    shape_of,
)

Rule = Callable[[Walk, compat.JaxprEqn, list[Value]], Outcome]

# Random numbers and keys: what they are depends on how many there are.
_RANDOM = frozenset({
    "random_bits", "random_clone", "random_fold_in", "random_gamma", "random_seed",
    "random_split", "random_unwrap", "random_wrap", "rng_bit_generator", "rng_uniform",
    "threefry2x32",
})  # fmt: skip
_PASSING = frozenset({"broadcast_in_dim", "reshape", "squeeze", "transpose", "slice", "copy"})


def without_axes(eqn: compat.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    """The outputs of an equation of which no operand depends on an argument."""
    known = None
    if ins and all(value.known is not None for value in ins):
        if eqn.primitive.name in _PASSING:
            known = ins[0].known
        elif eqn.primitive.name in elementwise.NAMES and len(eqn.outvars) == 1:
            known = elementwise.at(eqn, [value.known for value in ins])
    return [constant(known) for _ in eqn.outvars]


def find(eqn: compat.JaxprEqn) -> Rule:
    """The rule of an equation."""
    name = eqn.primitive.name
    if name in _RANDOM:
        return _random
    if any(0 in shape_of(v) for v in (*eqn.invars, *eqn.outvars)):
        return _unknown
    if name in elementwise.NAMES:
        return _elementwise
    return RULES.get(name) or shapes.RULES.get(name) or _unknown


def _random(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    _pin_all(walk, ins, f"it takes part in random numbers, {walk.table.place}")
    return Outcome([constant() for _ in eqn.outvars])


def _unknown(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    why = f"it is not known what happens to it {walk.table.place}"
    _pin_all(walk, ins, why)
    return Outcome([Value(tuple(walk.table.axes(shape_of(v), why))) for v in eqn.outvars])


def _pin_all(walk: Walk, ins: Sequence[Value], why: str) -> None:
    for value in ins:
        for axis in value.axes:
            walk.table.pin(axis, why)


def _elementwise(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    if len(eqn.outvars) > 1:  # a barrier around several values
        return Outcome(list(ins))
    ndim = len(shape_of(eqn.outvars[0]))
    axes = []
    for a in range(ndim):
        there = [value.axes[a] for value in ins if value.axes and value.axes[a] != UNIT]
        for other in there[1:]:
            walk.table.unify(there[0], other)
        axes.append(there[0] if there else UNIT)
    known = [value.known for value in ins]
    found: dict[tuple[bool, ...], bool] = {}  # by which operands are zero

    def zero(there: tuple[bool, ...]) -> bool:
        if there not in found:
            values = [0 if z else x for z, x in zip(there, known)]
            found[there] = elementwise.is_zero(eqn, values)
        return found[there]

    return Outcome([Value(tuple(_zeros(walk, ins, a, axis, zero) for a, axis in enumerate(axes)))])


def _zeros(walk: Walk, ins: list[Value], a: int, axis: Axis, zero: Callable[..., bool]) -> Axis:
    """The axis of the outcome, flagged where it is zero."""
    if axis == UNIT:
        return axis
    there = [walk.table.resolve(value.axes[a]) if value.axes else UNIT for value in ins]
    axis = walk.table.resolve(axis)

    def flag(s: int, f: int, factor: Factor) -> bool:
        same = [_factor(own, s, f) for own in there]
        return zero(tuple(x is not None and x.group == factor.group and x.zero for x in same))

    return tuple(
        tuple(factor._replace(zero=flag(s, f, factor)) for f, factor in enumerate(segment))
        for s, segment in enumerate(axis)
    )


def _factor(axis: Axis, s: int, f: int) -> Factor | None:
    return axis[s][f] if s < len(axis) and f < len(axis[s]) else None


# Reductions.


def _reduce_sum(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    for a in eqn.params["axes"]:
        need_zero(walk, ins[0].axes[a])
    return _reduced(eqn, ins[0], eqn.params["axes"])


def need_zero(walk: Walk, axis: Axis) -> None:
    """Pins what a sum would see of removed channels."""
    walk.table.pin_groups(
        walk.table.nonzero(axis),
        f"a sum over it would see what removed channels hold, {walk.table.place}",
    )


def _reduce(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    why = f"it is reduced over, {walk.table.place}"
    for a in eqn.params["axes"]:
        walk.table.pin(ins[0].axes[a], why)
    return _reduced(eqn, ins[0], eqn.params["axes"])


def _arg_reduce(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    out = _reduce(walk, eqn, ins).outs[0]
    return Outcome([Value(tuple(flagged(axis, False) for axis in out.axes))])


def _reduced(eqn: compat.JaxprEqn, value: Value, gone: Sequence[int]) -> Outcome:
    axes = tuple(axis for a, axis in enumerate(value.axes) if a not in gone)
    return Outcome([Value(axes) for _ in eqn.outvars])


def _along(name: str) -> Rule:
    """Along one axis each place depends on others; all operands share the axes."""

    def rule(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
        why = f"its places depend on each other, {walk.table.place}"
        ndim = len(shape_of(eqn.invars[0]))
        axis = eqn.params[name] % ndim
        for value in ins:
            for a, (one, other) in enumerate(zip(ins[0].axes, value.axes)):
                if a == axis:
                    walk.table.pin(other, why)
                else:
                    walk.table.unify(one, other)
        outs = []
        for v in eqn.outvars:
            axes = [flagged(x, False) for x in ins[0].axes]
            if shape_of(v)[axis] != shape_of(eqn.invars[0])[axis]:
                axes[axis] = walk.table.axis(shape_of(v)[axis], why)
            outs.append(Value(tuple(axes)))
        return Outcome(outs)

    return rule


def _top_k(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    return _along("axis" if "axis" in eqn.params else "dimension")(walk, eqn, ins)


def _window(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    p = eqn.params
    out = []
    for a, axis in enumerate(ins[0].axes):
        plain = (p["window_dimensions"][a], p["window_strides"][a], *p["padding"][a]) == (
            1,
            1,
            0,
            0,
        )
        dilated = p["base_dilation"][a] != 1
        if plain and not dilated:
            out.append(axis if "sum" in eqn.primitive.name else flagged(axis, False))
            continue
        why = f"a window moves over it, {walk.table.place}"
        walk.table.pin(axis, why)
        out.append(walk.table.axis(shape_of(eqn.outvars[0])[a], why))
    return Outcome([Value(tuple(out))])


# Contractions.


def _dot_general(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    (left, right), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    a, b = ins[0].axes, ins[1].axes
    table = walk.table
    for i, j in (*zip(left, right), *zip(left_batch, right_batch)):
        table.unify(a[i], b[j])
    for i, j in zip(left, right):
        need_zero(walk, either(walk, a[i], b[j]))
    batch = [either(walk, a[i], b[j]) for i, j in zip(left_batch, right_batch)]
    rest = [x for i, x in enumerate(a) if i not in (*left, *left_batch)]
    other = [x for j, x in enumerate(b) if j not in (*right, *right_batch)]
    axes = (*batch, *rest, *other)
    walk.products.append(Product(walk.times, (*axes, *(a[i] for i in left))))
    return Outcome([Value(axes)])


def either(walk: Walk, a: Axis, b: Axis) -> Axis:
    """The axis of a product of two, zero where one of them is."""
    a, b = walk.table.resolve(a), walk.table.resolve(b)
    out = []
    for s, segment in enumerate(a):
        factors = []
        for f, factor in enumerate(segment):
            same = _factor(b, s, f)
            zero = same is not None and same.group == factor.group and same.zero
            factors.append(factor._replace(zero=factor.zero or zero))
        out.append(tuple(factors))
    return tuple(out)


def _conv(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    p = eqn.params
    if p["batch_group_count"] != 1:
        return _unknown(walk, eqn, ins)
    table, groups = walk.table, p["feature_group_count"]
    lhs, rhs, out = p["dimension_numbers"]
    x, kernel = ins[0].axes, ins[1].axes
    why = f"a window moves over it, {table.place}"
    for axis in (*(x[a] for a in lhs[2:]), *(kernel[a] for a in rhs[2:])):
        table.pin(axis, why)
    shape = shape_of(eqn.outvars[0])
    axes = [table.axis(n, why) for n in shape]
    axes[out[0]] = x[lhs[0]]
    if groups == 1:
        table.unify(x[lhs[1]], kernel[rhs[1]])
        need_zero(walk, either(walk, x[lhs[1]], kernel[rhs[1]]))
        axes[out[1]] = kernel[rhs[0]]
        run: Run | None = None
        each = UNIT
    else:
        each, axes[out[1]] = _grouped(walk, x[lhs[1]], kernel[rhs[1]], kernel[rhs[0]], groups)

        def run(arrays: list[Any]) -> list[Any]:
            return compat.bind_with(eqn, arrays, feature_group_count=walk.kept.size(each))

    # Of the spatial axes those of the outcome count, and those of the kernel.
    inner = tuple(kernel[a] for a in (rhs[1], *rhs[2:]))
    walk.products.append(Product(walk.times, (*axes, *inner)))
    return Outcome([Value(tuple(axes))], run)


def _grouped(walk: Walk, x: Axis, inner: Axis, outer: Axis, groups: int) -> tuple[Axis, Axis]:
    """Couples the groups of a grouped convolution: their axis, and that of the outcome."""
    table = walk.table
    each = table.axis(groups)
    per_group = table.axis(length(x) // groups)
    outs = table.axis(length(outer) // groups)
    table.unify(merged(each, per_group), x)
    table.unify(merged(each, outs), outer)
    table.unify(per_group, inner)
    # Summed over are the inputs of one group: zero by the kernel, if not by the input.
    summed = table.resolve(inner)
    seen = {f.group for s in table.resolve(x) for f in s if f.zero}
    need_zero(
        walk, tuple(tuple(f._replace(zero=f.zero or f.group in seen) for f in s) for s in summed)
    )
    there = {f.group for s in table.resolve(outer) for f in s if f.zero}
    there |= seen & set(table.groups(each))
    out = table.resolve(merged(each, outs))
    return each, tuple(tuple(f._replace(zero=f.group in there) for f in s) for s in out)


def merged(slow: Axis, fast: Axis) -> Axis:
    """Two axes of one group each, merged into one."""
    return ((*slow[0], *fast[0]),)


RULES: dict[str, Rule] = {
    "reduce_sum": _reduce_sum,
    "reduce_max": _reduce,
    "reduce_min": _reduce,
    "reduce_prod": _reduce,
    "reduce_and": _reduce,
    "reduce_or": _reduce,
    "reduce_xor": _reduce,
    "argmax": _arg_reduce,
    "argmin": _arg_reduce,
    "cumsum": _along("axis"),
    "cumprod": _along("axis"),
    "cummax": _along("axis"),
    "cummin": _along("axis"),
    "cumlogsumexp": _along("axis"),
    "sort": _along("dimension"),
    "top_k": _top_k,
    "reduce_window_sum": _window,
    "reduce_window_max": _window,
    "reduce_window_min": _window,
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
}
