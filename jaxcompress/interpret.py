"""`compressed(fn)`: any JAX function on a tree with compressed leaves, by one walk over its jaxpr.

The function is traced on the dense shapes, and the jaxpr is evaluated equation by equation. An
equation that meets a compressed leaf is handed to the leaf's rule; one that has none materializes
that leaf. Control flow is rebuilt with jax's own functions, so that a leaf stays small inside a
loop or a stack of layers. All of this happens while tracing: the compiled program is what one
would have written by hand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress import compat
from jaxcompress.arguments import apart
from jaxcompress.arrays.base import is_compressed, materialize, try_rules
from jaxcompress.errors import SpecError
from jaxcompress.rules import default_axes, flatten, match
from jaxcompress.specs import LeafContext, Spec

F = TypeVar("F", bound=Callable[..., Any])


def compressed(fn: F, *, activations: Mapping[str, Spec | None] | None = None) -> F:
    """Makes `fn` accept compressed leaves wherever it accepts arrays.

    The value and the gradient equal those of `fn` on the decompressed tree. Under `jit`, a
    leaf is expanded no earlier and no further than its type's rules need: a low-rank kernel runs as
    two thin products, an embedding table gives up only the rows that are looked up.

    Arguments that are not arrays (flags, names, callables) are static, whether positional or by
    keyword; arrays are traced, and everything else about `fn` stays: mutable collections, random
    keys, any pytree in and out. The result is retraced at each call outside of `jit`, so wrap the
    outermost function: `jax.jit(jc.compressed(model.apply))`.

    Args:
      fn: a function of pytrees, such as a Linen module's `apply` or a loss.
      activations: rules for the leaves of the first argument, such as
        `{"**/kernel": QuantizeInput("int8")}`: what each of these weights meets is quantized.

    Returns:
      A function of the same arguments and results.

    Raises:
      RuleError: when the result is called, for a rule of `activations` that matches nothing.
      SpecError: likewise, where a spec does not fit its leaf.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> params = {"kernel": jnp.ones((64, 32)), "bias": jnp.zeros(32)}
      >>> apply = lambda p, x: x @ p["kernel"] + p["bias"]
      >>> small = jc.compress(params, {"kernel": jc.LowRank(rank=2)})
      >>> y = jax.jit(jc.compressed(apply))(small, jnp.ones((1, 64)))
      >>> y.shape, bool(jnp.allclose(y, 64.0, rtol=1e-5))
      ((1, 32), True)
    """
    run = walked(fn, Control())
    if not activations:
        return run

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not args:
            raise SpecError("activations are those of the first argument: give it by position")
        return run(_with_inputs(args[0], activations), *args[1:], **kwargs)

    return wrapped  # type: ignore[return-value]


def _with_inputs(tree: Any, rules: Mapping[str, Spec | None]) -> Any:
    """A tree with the specs of some rules around its leaves."""
    leaves, structure = flatten(tree)
    hits = match(rules, [path for path, _ in leaves])
    out = []
    for (path, leaf), hit in zip(leaves, hits):
        if hit is not None and hit[1] is not None:
            leaf = leaf if is_compressed(leaf) else jnp.asarray(leaf)
            leaf = hit[1](leaf, LeafContext(path, default_axes(path, leaf.ndim)))
        out.append(leaf)
    return jax.tree.unflatten(structure, out)


class Control:
    """The control flow that the walk rebuilds; a walk with further outputs puts its own here."""

    # Whether to go into the body of a `custom_jvp` or `custom_vjp` function, which loses its rule.
    forward_only = False

    def enters(self, eqn: compat.JaxprEqn) -> bool:
        """Whether to rebuild an equation that meets no leaf."""
        return False

    def own(self, eqn: compat.JaxprEqn, operands: list[Any]) -> Any:
        """The outputs of an equation that this walk has a rule for, or NotImplemented."""
        return NotImplemented

    def scan(self, step: Any, init: Any, xs: Any, **options: Any) -> Any:
        """`lax.scan`."""
        return lax.scan(step, init, xs, **options)

    def while_loop(self, test: Any, step: Any, init: Any) -> Any:
        """`lax.while_loop`."""
        return lax.while_loop(test, step, init)

    def switch(self, index: Any, branches: Sequence[Any], *operands: Any) -> Any:
        """`lax.switch`."""
        return lax.switch(index, branches, *operands)

    def checkpoint(self, body: Any, **options: Any) -> Any:
        """`jax.checkpoint`."""
        # Derivatives of the rebuilt function are taken when it is differentiated, not now.
        return jax.checkpoint(body, **options)


def walked(fn: F, control: Control) -> F:
    """`compressed(fn)`, with the control flow of `control`."""

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        traced = lambda x: is_compressed(x) or compat.is_traceable(x)
        arrays, full = apart((args, kwargs), traced, is_leaf=is_compressed)
        if not any(map(is_compressed, arrays)):
            return fn(*args, **kwargs)

        def flat(*arrays: Any) -> Any:
            args, kwargs = full(arrays)
            return fn(*args, **kwargs)

        operands = [x if is_compressed(x) else jnp.asarray(x) for x in arrays]
        closed, out_shape = jax.make_jaxpr(flat, return_shape=True)(*map(_dense_aval, operands))
        outs = evaluate(closed.jaxpr, closed.consts, operands, control)
        # A constant of the jaxpr is not yet a jax array.
        outs = [jnp.asarray(materialize(x)) for x in outs]
        return jax.tree.unflatten(jax.tree.structure(out_shape), outs)

    return wrapped  # type: ignore[return-value]


def _dense_aval(x: Any) -> Any:
    """An argument, or for a leaf the type of its dense array, shardings and mesh axes included."""
    if not is_compressed(x):
        return x
    small, tree = jax.tree.flatten(x)
    return _materialized_type(tree, tuple(map(jax.typeof, small)), jax.sharding.get_abstract_mesh())


@functools.lru_cache(maxsize=1024)
def _materialized_type(tree: Any, types: tuple[Any, ...], mesh: Any) -> Any:
    del mesh  # a part of the key only: the types may be sharded over it
    run = lambda *small: jax.tree.unflatten(tree, small).materialize()
    return jax.make_jaxpr(run)(*types).out_avals[0]


def evaluate(
    jaxpr: compat.Jaxpr, consts: Sequence[Any], args: Sequence[Any], control: Control
) -> list[Any]:
    """Evaluates a jaxpr on arrays and compressed leaves; its outputs may be either."""
    env: dict[Any, Any] = {}
    last_use = last_uses(jaxpr)

    def read(v: Any) -> Any:
        return v.val if isinstance(v, compat.Literal) else env[v]

    env.update(zip(jaxpr.constvars, consts))
    env.update(zip(jaxpr.invars, args))
    for n, eqn in enumerate(jaxpr.eqns):
        operands = [read(v) for v in eqn.invars]
        with compat.context(eqn):
            outs = _evaluate_equation(eqn, operands, control)
        env.update(zip(eqn.outvars, outs))
        for v in last_use.get(n, ()):  # a leaf nobody reads again must not be held
            env.pop(v, None)
    return [read(v) for v in jaxpr.outvars]


def last_uses(jaxpr: compat.Jaxpr) -> dict[int, list[Any]]:
    """For the number of an equation the variables that nobody reads after it."""
    seen = {v for v in jaxpr.outvars if not isinstance(v, compat.Literal)}
    last: dict[int, list[Any]] = {}
    for n in range(len(jaxpr.eqns) - 1, -1, -1):
        for v in jaxpr.eqns[n].invars:
            if not isinstance(v, compat.Literal) and v not in seen:
                seen.add(v)
                last.setdefault(n, []).append(v)
    return last


def _evaluate_equation(eqn: compat.JaxprEqn, operands: list[Any], control: Control) -> list[Any]:
    if not any(map(is_compressed, operands)) and not control.enters(eqn):
        return compat.bind(eqn, operands)
    found = control.own(eqn, operands)
    if found is not NotImplemented:
        return found
    name = eqn.primitive.name
    if name in CONTROL_FLOW:
        return CONTROL_FLOW[name](eqn.params, operands, control)
    if control.forward_only and name in _CUSTOM_RULES:
        return _inline(eqn.params, operands, control)
    out = try_rules(name, operands, eqn.params)
    if out is not NotImplemented:
        return [out]
    # custom_jvp and custom_vjp calls end up here too: they keep their own rule, which a walk
    # through their body would lose, so the leaf is materialized for them.
    return compat.bind(eqn, [materialize(x) for x in operands])


def _dense_body(jaxpr: Any, control: Control) -> Callable[..., list[Any]]:
    """The body of a control-flow equation as a function whose outputs are dense."""
    body, consts = compat.open_jaxpr(jaxpr)

    def run(*args: Any) -> list[Any]:
        return [materialize(x) for x in evaluate(body, consts, args, control)]

    return run


def _inline(params: dict[str, Any], operands: list[Any], control: Control) -> list[Any]:
    jaxpr = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
    body, consts = compat.open_jaxpr(jaxpr)
    return evaluate(body, consts, operands, control)


def _remat(params: dict[str, Any], operands: list[Any], control: Control) -> list[Any]:
    options = {name: params[name] for name in ("prevent_cse", "policy")}
    return control.checkpoint(_dense_body(params["jaxpr"], control), **options)(*operands)


def _loop_invariant(body: compat.Jaxpr, consts: int, carry: int, operands: list[Any]) -> list[bool]:
    """Which carried leaves a loop hands on unchanged, so that they may be constants of it."""
    ins = body.invars[consts : consts + carry]
    return [
        is_compressed(x) and v_in is v_out for x, v_in, v_out in zip(operands, ins, body.outvars)
    ]


def _split(values: Sequence[Any], fixed: Sequence[bool]) -> tuple[list[Any], list[Any]]:
    return (
        [v for v, f in zip(values, fixed) if not f],
        [v for v, f in zip(values, fixed) if f],
    )


def _merge(moving: Sequence[Any], still: Sequence[Any], fixed: Sequence[bool]) -> list[Any]:
    a, b = iter(moving), iter(still)
    return [next(b) if f else next(a) for f in fixed]


def _scan(params: dict[str, Any], operands: list[Any], control: Control) -> list[Any]:
    n_consts, n_carry = compat.scan_counts(params)
    body, body_consts = compat.open_jaxpr(params["jaxpr"])
    consts = operands[:n_consts]
    carry = operands[n_consts : n_consts + n_carry]
    xs = [_scannable(x) for x in operands[n_consts + n_carry :]]
    fixed = _loop_invariant(body, n_consts, n_carry, carry)
    moving, still = _split(carry, fixed)

    def step(moving: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        args = [*consts, *_merge(moving, still, fixed), *xs]
        outs = evaluate(body, body_consts, args, control)
        moved, _ = _split(outs[:n_carry], fixed)
        return [materialize(x) for x in moved], [materialize(x) for x in outs[n_carry:]]

    moved, ys = control.scan(
        step,
        [materialize(x) for x in moving],
        xs,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*_merge(moved, still, fixed), *ys]


def _scannable(x: Any) -> Any:
    """A leaf that `scan` can slice along its first axis, or its dense array."""
    return x if not is_compressed(x) or x.batch_ndim > 0 else x.materialize()


def _while(params: dict[str, Any], operands: list[Any], control: Control) -> list[Any]:
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts = operands[:n_cond], operands[n_cond : n_cond + n_body]
    carry = operands[n_cond + n_body :]
    body, closed = compat.open_jaxpr(params["body_jaxpr"])
    fixed = _loop_invariant(body, n_body, len(carry), carry)
    moving, still = _split(carry, fixed)
    test = _dense_body(params["cond_jaxpr"], control)

    def cond_fun(moving: list[Any]) -> Any:
        return test(*cond_consts, *_merge(moving, still, fixed))[0]

    def body_fun(moving: list[Any]) -> list[Any]:
        outs = evaluate(body, closed, [*body_consts, *_merge(moving, still, fixed)], control)
        return [materialize(x) for x in _split(outs, fixed)[0]]

    moved = control.while_loop(cond_fun, body_fun, [materialize(x) for x in moving])
    return _merge(moved, still, fixed)


def _cond(params: dict[str, Any], operands: list[Any], control: Control) -> list[Any]:
    index, *rest = operands
    branches = [_dense_body(b, control) for b in params["branches"]]
    return control.switch(index, branches, *rest)


_CUSTOM_RULES = ("custom_jvp_call", "custom_vjp_call")

CONTROL_FLOW: dict[str, Callable[[dict[str, Any], list[Any], Control], list[Any]]] = {
    "jit": _inline,
    "pjit": _inline,
    "closed_call": _inline,
    "core_call": _inline,
    "remat": _remat,
    "remat2": _remat,
    "checkpoint": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
