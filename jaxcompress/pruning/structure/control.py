"""Calls, loops and branches: their bodies are walked, and rebuilt on the small values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress import compat
from jaxcompress.pruning.structure import custom
from jaxcompress.pruning.structure.walk import Outcome, Run, Value, Walk, constant, shape_of

Rule = Callable[[Walk, compat.JaxprEqn, list[Value]], Outcome]
Body = Callable[[list[Value]], tuple[list[Value], Run]]


def _call(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    p = eqn.params
    body, consts = compat.open_jaxpr(p["jaxpr"] if "jaxpr" in p else p["call_jaxpr"])
    return Outcome(*walk.jaxpr(body, consts, ins))


def _remat(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    body, consts = compat.open_jaxpr(eqn.params["jaxpr"])
    outs, run = walk.jaxpr(body, consts, ins)
    options = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
    return Outcome(outs, lambda arrays: jax.checkpoint(lambda *x: run(list(x)), **options)(*arrays))


def _meet(walk: Walk, values: Sequence[Value], shape: Sequence[int]) -> Value:
    """What is true of all of several values that take the same place."""
    if all(value.whole for value in values):
        same = all(value.known is not None and value.known == values[0].known for value in values)
        return constant(values[0].known if same else None)
    axes = [walk.labelled(value, shape).axes for value in values]
    for other in axes[1:]:
        for a, b in zip(axes[0], other):
            walk.table.unify(a, b)
    return Value(tuple(walk.table.all_zero(there) for there in zip(*axes)))


def _plain(walk: Walk, value: Value) -> Any:
    """A value in the groups of today, to see whether it changed."""
    return value.known, value.whole, tuple(map(walk.table.resolve, value.axes))


def _settled(
    walk: Walk, body: Body, carry: list[Value], shapes: Sequence[Sequence[int]]
) -> tuple[list[Value], list[Value], Run]:
    """Walks a body until what it carries on is what it was given."""
    products = len(walk.products)
    carry = [value._replace(tag=None) for value in carry]  # true of the first turn alone
    while True:
        outs, run = body(carry)
        after = [_meet(walk, (x, y), shape) for x, y, shape in zip(carry, outs, shapes)]
        if all(_plain(walk, x) == _plain(walk, y) for x, y in zip(carry, after)):
            return carry, outs, run
        carry = after
        del walk.products[products:]


def _scan(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    p = eqn.params
    n_consts, n_carry = compat.scan_counts(p)
    jaxpr, closed = compat.open_jaxpr(p["jaxpr"])
    consts, init = ins[:n_consts], ins[n_consts : n_consts + n_carry]
    shapes = list(map(shape_of, jaxpr.invars[n_consts : n_consts + n_carry]))
    why = f"it is looped over {walk.table.place}"
    slices = [_sliced(walk, value, why) for value in ins[n_consts + n_carry :]]
    before, walk.times = walk.times, walk.times * p["length"]
    body = lambda carry: walk.jaxpr(jaxpr, closed, [*consts, *carry, *slices])
    carry, outs, inner = _settled(walk, body, list(init), shapes)
    walk.times = before
    stacked = []
    for y in outs[n_carry:]:
        around = walk.table.axis(p["length"], why)
        stacked.append(y if y.whole else Value((around, *y.axes)))

    def run(arrays: list[Any]) -> list[Any]:
        def step(state: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
            found = inner([*arrays[:n_consts], *state, *xs])
            return walk.fit_all(found[:n_carry], outs, carry), found[n_carry:]

        start = walk.fit_all(arrays[n_consts : n_consts + n_carry], init, carry)
        start = [jnp.asarray(x) for x in start]
        state, ys = lax.scan(
            step,
            start,
            arrays[n_consts + n_carry :],
            length=p["length"],
            reverse=p["reverse"],
            unroll=p["unroll"],
        )
        return [*state, *ys]

    return Outcome([*carry, *stacked], run)


def _sliced(walk: Walk, value: Value, why: str) -> Value:
    """What a loop sees of a value that it runs over."""
    if value.whole:
        return value
    walk.table.pin(value.axes[0], why)
    return Value(value.axes[1:], tag=walk.follower.sliced(value.tag))


def _while(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    test_consts, consts, init = ins[:n_cond], ins[n_cond : n_cond + n_body], ins[n_cond + n_body :]
    jaxpr, closed = compat.open_jaxpr(p["body_jaxpr"])
    test_jaxpr, test_closed = compat.open_jaxpr(p["cond_jaxpr"])
    shapes = list(map(shape_of, jaxpr.invars[n_body:]))
    body = lambda carry: walk.jaxpr(jaxpr, closed, [*consts, *carry])
    carry, outs, inner = _settled(walk, body, list(init), shapes)
    _, test = walk.jaxpr(test_jaxpr, test_closed, [*test_consts, *carry])

    def run(arrays: list[Any]) -> list[Any]:
        first, fixed, start = (
            arrays[:n_cond],
            arrays[n_cond : n_cond + n_body],
            arrays[n_cond + n_body :],
        )
        start = [jnp.asarray(x) for x in walk.fit_all(start, init, carry)]
        step = lambda state: walk.fit_all(inner([*fixed, *state]), outs, carry)
        return lax.while_loop(lambda state: test([*first, *state])[0], step, start)

    return Outcome(carry, run)


def _cond(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    walked = []
    for branch in eqn.params["branches"]:
        jaxpr, closed = compat.open_jaxpr(branch)
        walked.append(walk.jaxpr(jaxpr, closed, ins[1:]))
    shapes = list(map(shape_of, eqn.outvars))
    found = zip(shapes, zip(*(outs for outs, _ in walked)))
    outs = [_meet(walk, there, shape) for shape, there in found]

    def run(arrays: list[Any]) -> list[Any]:
        def branch(own: list[Value], inner: Run) -> Any:
            return lambda *x: [jnp.asarray(y) for y in walk.fit_all(inner(list(x)), own, outs)]

        return lax.switch(arrays[0], [branch(*each) for each in walked], *arrays[1:])

    return Outcome(outs, run)


def _tap(walk: Walk, eqn: compat.JaxprEqn, ins: list[Value]) -> Outcome:
    """A tag of `jaxcompress.distillation.tap`, which returns what it is given."""
    return Outcome(list(ins))


RULES: dict[str, Rule] = {
    "tap": _tap,
    "jit": _call,
    "pjit": _call,
    "closed_call": _call,
    "core_call": _call,
    "remat": _remat,
    "remat2": _remat,
    "checkpoint": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    **custom.RULES,
}
