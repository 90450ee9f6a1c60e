"""Functions with derivatives of their own: these are walked when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxcompress import compat
from jaxcompress.pruning.structure.labels import flagged
from jaxcompress.pruning.structure.walk import Outcome, Value, Walk

Rule = Callable[[Walk, compat.JaxprEqn, list[Value]], Outcome]


def _custom_jvp(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    body, consts = compat.open_jaxpr(eqn.params["call_jaxpr"])
    outs, inner = walk.jaxpr(body, consts, ins)
    n = eqn.params["num_consts"]
    # What depends on no argument, or is no float, has no tangent.
    moving = [
        not value.whole and compat.has_tangent(v) for value, v in zip(ins[n:], eqn.invars[n:])
    ]

    def run(arrays: list[Any]) -> list[Any]:
        if walk.untouched([*ins, *outs]):
            return compat.bind(eqn, arrays)
        small = jax.custom_jvp(lambda *x: inner([*arrays[:n], *x]))

        @small.defjvp
        def _(primals: Any, tangents: Any) -> Any:
            jaxpr, closed, zeros = compat.jvp_jaxpr(eqn, [not m for m in moving])
            own = [value for value, m in zip(ins[n:], moving) if m]
            values, derivative = walk.jaxpr(jaxpr, closed, [*ins[n:], *own])
            walk.check()
            there = [t for t, m in zip(tangents, moving) if m]
            found = derivative([*primals, *there])
            first = found[: len(outs)]
            rest = iter(zip(values[len(outs) :], found[len(outs) :]))
            moved = []
            for x, out, zero in zip(first, outs, zeros):
                if zero:
                    moved.append(compat.zero_tangent(x))
                    continue
                value, y = next(rest)
                moved.append(walk.fitted(y, value, out.axes))
            return first, moved

        return list(small(*arrays[n:]))

    return Outcome(outs, run)


def _custom_vjp(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    body, consts = compat.open_jaxpr(eqn.params["call_jaxpr"])
    outs, inner = walk.jaxpr(body, consts, ins)
    n = eqn.params["num_consts"]

    def run(arrays: list[Any]) -> list[Any]:
        if walk.untouched([*ins, *outs]):
            return compat.bind(eqn, arrays)
        small = jax.custom_vjp(lambda *x: inner([*arrays[:n], *x]))
        small.defvjp(*_passes(walk, eqn, ins[n:], outs))
        return list(small(*arrays[n:]))

    return Outcome(outs, run)


def _passes(
    walk: Walk, eqn: compat.JaxprEqn, ins: Sequence[Value], outs: Sequence[Value]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Both passes of a `custom_vjp` function, on the small values."""
    held: list[tuple[Value, Any]] = []  # of each residual, as the forward pass finds them

    def forward(*x: Any) -> Any:
        jaxpr, closed, forwarded = compat.vjp_forward(eqn)
        values, compute = walk.jaxpr(jaxpr, closed, ins)
        walk.check()
        found = compute(list(x))
        count = len(found) - len(outs)
        computed = iter(zip(values, jaxpr.outvars, found))
        given = list(zip(ins, eqn.invars[-len(ins) :], x))
        every = [next(computed) if f is None else given[f] for f in forwarded]
        held[:] = [(value, v) for value, v, _ in every]
        return walk.fit_all(found[count:], values[count:], outs), [y for *_, y in every]

    def backward(residuals: Any, cotangents: Any) -> Any:
        # Where a channel is removed, a cotangent need not be zero.
        moving = [Value(tuple(flagged(axis, False) for axis in out.axes)) for out in outs]
        like = [*(v for _, v in held), *eqn.outvars]
        closed, none = compat.vjp_backward(eqn, like)
        values, compute = walk.jaxpr(
            closed.jaxpr, closed.consts, [*(value for value, _ in held), *moving]
        )
        walk.check()
        found = iter(zip(values, compute([*residuals, *cotangents])))
        out = []
        for value, zero in zip(ins, none):
            own, y = (None, None) if zero else next(found)
            out.append(y if own is None or value.whole else walk.fitted(y, own, value.axes))
        return tuple(out)

    return forward, backward


RULES: dict[str, Rule] = {"custom_jvp_call": _custom_jvp, "custom_vjp_call": _custom_vjp}
