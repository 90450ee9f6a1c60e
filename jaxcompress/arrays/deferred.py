"""Calls that rebuild a compressed operand only while they run.

`x @ dequantize(codes, scale)` is small on paper and large in practice, twice over:

* XLA:CPU's concurrency-optimized scheduler sees that `dequantize(codes, scale)` waits for nothing
  and computes it for every layer of a program at once, before the first layer runs;
* reverse-mode differentiation keeps the dense weight of every layer as a residual.

`deferred(fun, *args)` answers both with one primitive. No intermediate of `fun` is saved for a
backward pass: the residuals are the arguments, and the backward pass rebuilds the dense operand in
a deferred call of its own. And on one CPU device it lowers to a branch that is always taken, which
the compiler can neither inline nor reorder into, so the dense operand lives only inside it. The
operand meets the very same `dot_general` as without, so values are equal bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex

from jaxcompress import compat
from jaxcompress.arrays.convolution import with_ordered_convolutions


def deferred(fun: Callable[..., Any], *args: Any) -> Any:
    """Returns `fun(*args)`, keeping what `fun` computes on the way alive only while it runs.

    Args:
      fun: a pure function of pytrees of arrays; it must not close over traced values.
      *args: pytrees of arrays: those that `fun` expands and those the expanded operand meets.

    Returns:
      what `fun` returns. Differentiable to any order in both modes, and batchable: what `fun`
      computes from arguments that are not batched is not batched either.

    Examples:
      >>> import jax.numpy as jnp
      >>> codes, scale = jnp.array([[2, -1]], jnp.int8), jnp.array([0.5, 0.25])
      >>> deferred(lambda c, s, x: x @ (c * s), codes, scale, jnp.ones((1, 1)))
      Array([[ 1.  , -0.25]], dtype=float32)
    """
    leaves, in_tree = jax.tree.flatten(args)
    out_tree = None

    def flat(*leaves):
        nonlocal out_tree
        outs, out_tree = jax.tree.flatten(fun(*jax.tree.unflatten(in_tree, leaves)))
        return outs

    outs = _bind(flat, leaves)
    return jax.tree.unflatten(out_tree, outs)


def deferred_primitive(
    primitive: compat.Primitive,
    index: int,
    leaf: Any,
    operands: Sequence[Any],
    params: dict[str, Any],
) -> Any:
    """Binds a primitive with a leaf's dense array among its operands, in a deferred call.

    Args:
      primitive: a primitive of one output, such as `lax.dot_general_p`.
      index: the leaf's place among the operands.
      leaf: a `CompressedArray`.
      operands: the operands; `operands[index]` is not read.
      params: the primitive's parameters.

    Returns:
      the one output, equal bit for bit to that of the primitive on `leaf.materialize()`.
    """
    small, tree = jax.tree.flatten(leaf)
    args = [*small, *(x for i, x in enumerate(operands) if i != index)]
    jaxpr, used = _traced(
        primitive,
        index,
        tree,
        tuple(jax.typeof(x) for x in args),
        tuple(sorted(params.items(), key=lambda item: item[0])),
        jax.sharding.get_abstract_mesh(),
    )
    return deferred_p.bind(*(a for a, u in zip(args, used, strict=True) if u), jaxpr=jaxpr)[0]


@functools.lru_cache(maxsize=1024)
def _traced(
    primitive: compat.Primitive,
    index: int,
    tree: Any,
    avals: tuple[Any, ...],
    params: Any,
    mesh: Any,
) -> tuple[compat.ClosedJaxpr, list[bool]]:
    """The jaxpr of one expansion, traced once for all layers of the same shapes."""
    del mesh  # a part of the key only: the avals may be sharded over it

    def run(*args):
        operands = list(args[tree.num_leaves :])
        leaf = jax.tree.unflatten(tree, args[: tree.num_leaves])
        operands.insert(index, leaf.materialize())
        return [primitive.bind(*operands, **dict(params))]

    return _pruned(jax.make_jaxpr(run)(*avals))


deferred_p = compat.Primitive("deferred")
deferred_p.multiple_results = True


def _bind(fun: Callable[..., Any], args: Sequence[Any]) -> list[Any]:
    """Traces `fun` and binds the primitive to the arguments that `fun` uses."""
    jaxpr, used = _pruned(jax.make_jaxpr(fun)(*args))
    return deferred_p.bind(*(a for a, u in zip(args, used, strict=True) if u), jaxpr=jaxpr)


def _pruned(closed: compat.ClosedJaxpr) -> tuple[compat.ClosedJaxpr, list[bool]]:
    """`closed` without dead equations and unused inputs, and which inputs are used.

    The tangent of a dot in its activations does not need those activations: an unused argument
    would be kept as a residual all the same.
    """
    jaxpr = closed.jaxpr
    live = {v for v in jaxpr.outvars if isinstance(v, compat.Var)}
    eqns = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(v in live for v in eqn.outvars):
            live.update(v for v in eqn.invars if isinstance(v, compat.Var))
            eqns.append(eqn)
    used = [v in live for v in jaxpr.invars]
    invars = [v for v, keep in zip(jaxpr.invars, used, strict=True) if keep]
    small = compat.with_equations(jaxpr, invars, eqns[::-1])
    return compat.ClosedJaxpr(small, closed.consts), used


@deferred_p.def_impl
def _impl(*args, jaxpr):
    return jex.jaxpr_as_fun(jaxpr)(*args)


@deferred_p.def_abstract_eval
def _abstract_eval(*_, jaxpr):
    return jaxpr.out_avals


def _jvp(primals, tangents, moving, *, jaxpr):
    fun = jex.jaxpr_as_fun(jaxpr)
    outs = deferred_p.bind(*primals, jaxpr=jaxpr)

    def tangent(*args):
        point, moves = args[: len(primals)], args[len(primals) :]

        def along(*values):
            full = list(point)
            for i, value in zip(moving, values, strict=True):
                full[i] = value
            return fun(*full)

        return jax.jvp(along, tuple(point[i] for i in moving), tuple(moves))[1]

    return outs, _bind(tangent, [*primals, *(tangents[i] for i in moving)])


def _transpose(cts, args, linear, *, jaxpr):
    fun = jex.jaxpr_as_fun(jaxpr)
    avals = [a for a, lin in zip(args, linear, strict=True) if lin]
    known = [a for a, lin in zip(args, linear, strict=True) if not lin]

    def transposed(*values):
        point, cts = values[: len(known)], values[len(known) :]

        def of_linear(*moves):
            rest, moving = iter(point), iter(moves)
            return fun(*(next(moving if lin else rest) for lin in linear))

        return jax.linear_transpose(of_linear, *avals)(list(cts))

    outs = iter(_bind(transposed, [*known, *cts]))
    return [next(outs) if lin else None for lin in linear]


def _batch(vmap, args, dims, *, jaxpr):
    if all(dim is None for dim in dims):
        outs = deferred_p.bind(*args, jaxpr=jaxpr)
        return outs, [None] * len(outs)
    outs = _bind(vmap(jex.jaxpr_as_fun(jaxpr)), args)
    return outs, [0] * len(outs)


def _branch(*args, jaxpr):
    """The function as the branch taken of a conditional that no pass over HLO can decide."""
    taken = _opaque_true(args)
    if taken is None:
        return _impl(*args, jaxpr=jaxpr)

    def never(*_):
        return [jnp.zeros(out.shape, out.dtype) for out in jaxpr.out_avals]

    return lax.cond(taken, with_ordered_convolutions(jaxpr), never, *args)


def _opaque_true(arrays: Sequence[jax.Array]) -> jax.Array | None:
    """True, computed from the first element of every array; None if all arrays are empty.

    k * (k + 1) is even for every k, also modulo 256. Integers, so that no NaN can get in, and
    every array, so that one that happens to be constant does not decide it.
    """
    key = None
    for array in arrays:
        if not array.size or jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended):
            continue
        first = lax.slice(array, (0,) * array.ndim, (1,) * array.ndim).reshape(())
        first = first.real if jnp.iscomplexobj(first) else first
        if jnp.issubdtype(first.dtype, jnp.floating):
            first = lax.bitcast_convert_type(first, f"uint{8 * first.dtype.itemsize}")
        first = first.astype(jnp.uint8)
        key = first if key is None else key + first
    return None if key is None else (key * (key + jnp.uint8(1))) & jnp.uint8(1) == 0


compat.register_derivatives(deferred_p, _jvp, _transpose)
compat.register_batching(deferred_p, _batch)
# The branch is for one CPU device. Across devices its predicate would have to be communicated, and
# elsewhere the compiler fuses the expansion into the dot, where a branch would be in its way.
compat.register_lowering(deferred_p, _impl, _branch)
