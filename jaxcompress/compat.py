"""Everything that depends on the version of jax, in one place.

The walk over a jaxpr needs four facts that are not part of jax's stable interface: how an
equation is bound again, how many constants and carries a `scan` equation has, in which context an
equation was traced, and what kind of value a traced function accepts. The primitive of
`arrays/deferred.py` needs to cut a jaxpr, to register its rules, and to know for how many devices
it is lowered. They differ between jax 0.10 and 0.12, or may in the next; nothing outside this file
knows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.extend.core as jex_core
import numpy as np
from jax.interpreters import ad, batching, mlir

Jaxpr = jex_core.Jaxpr
ClosedJaxpr = jex_core.ClosedJaxpr
Primitive = jex_core.Primitive
Var = jex_core.Var
JaxprEqn = jex_core.JaxprEqn
Literal = jex_core.Literal


T = TypeVar("T")


def register_node(cls: type[T], data: Sequence[str], static: Sequence[str] = ()) -> type[T]:
    """Registers a dataclass as a pytree node.

    Not by `jax.tree_util.register_dataclass`: in jax 0.10, two such classes with equal static
    fields have equal tree structures, so that a jitted function may run the program that it
    compiled for the other class.

    Args:
      cls: the class; made anew from its fields by name.
      data: the fields that hold arrays, other nodes or None.
      static: all others, hashable.
    """
    data, static = tuple(data), tuple(static)
    keys = tuple(jax.tree_util.GetAttrKey(name) for name in data)
    meta = lambda x: tuple(getattr(x, name) for name in static)
    jax.tree_util.register_pytree_with_keys(
        cls,
        lambda x: (tuple((k, getattr(x, name)) for k, name in zip(keys, data)), meta(x)),
        lambda aux, found: cls(**dict(zip(data, found)), **dict(zip(static, aux))),
        lambda x: (tuple(getattr(x, name) for name in data), meta(x)),
    )
    return cls


def bind(eqn: JaxprEqn, args: Sequence[Any]) -> list[Any]:
    """Binds an equation's primitive to other arguments; always returns a list."""
    outs = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
    return list(outs) if eqn.primitive.multiple_results else [outs]


def bind_with(eqn: JaxprEqn, args: Sequence[Any], **changed: Any) -> list[Any]:
    """Binds an equation's primitive to other arguments with some parameters changed."""
    outs = eqn.primitive.bind(*args, **{**eqn.primitive.get_bind_params(eqn.params), **changed})
    return list(outs) if eqn.primitive.multiple_results else [outs]


def context(eqn: JaxprEqn) -> contextlib.AbstractContextManager[Any]:
    """The context (mesh, compute type, ...) an equation was traced in."""
    return eqn.ctx.manager if eqn.ctx is not None else contextlib.nullcontext()


def place(eqn: JaxprEqn) -> str:
    """Which equation this is, for a message: its primitive, and the module or line it is of."""
    scope = str(eqn.source_info.name_stack)
    return f"{eqn.primitive.name} of {scope}" if scope else eqn.primitive.name


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """The body and the constants of a jaxpr that an equation carries, closed or not."""
    if hasattr(jaxpr, "consts") and hasattr(jaxpr, "jaxpr"):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, ()


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """The numbers of constants and of carried values of a `scan` equation."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(list(consts.vals)), len(list(carry.vals))


def is_traceable(x: Any) -> bool:
    """Whether `x` is an array (concrete, traced, numpy or a typed PRNG key)."""
    return isinstance(x, (jax.Array, np.ndarray, np.generic))


def is_explicit(x: jax.Array) -> bool:
    """Whether the type of `x` says where it lies, on a mesh with Explicit axes."""
    return jax.sharding.AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def look_up(table: jax.Array, indices: jax.Array) -> jax.Array:
    """`table[indices]` for indices that are in bounds, placed like the indices.

    On a mesh with Explicit axes a look-up must be told where its outcome lies.
    """
    place = jax.typeof(indices).sharding if is_explicit(indices) else None
    return table.at[indices].get(mode="promise_in_bounds", out_sharding=place)


def iota_like(like: jax.Array, axis: int) -> jax.Array:
    """The index along one axis at each place of an array, uint32, placed like the array."""
    place = jax.typeof(like).sharding if is_explicit(like) else None
    return jax.lax.broadcasted_iota(jax.numpy.uint32, like.shape, axis, out_sharding=place)


def auto(fn: Callable[[jax.Array], Any], x: jax.Array) -> Any:
    """`fn(x)`; where x lies by Explicit axes, with Auto ones inside and a replicated outcome."""
    if not is_explicit(x):
        return fn(x)
    spec = jax.sharding.PartitionSpec()
    return jax.sharding.auto_axes(fn, out_sharding=spec)(x)


def auto_like(fn: Callable[..., Any], args: Any, like: Any) -> Any:
    """`fn(*args)`; where any of these lie by Explicit axes, with Auto ones inside.

    Its outcome then lies like `like`, of the same structure.
    """
    explicit = [x for x in jax.tree.leaves(args) if is_explicit(x)]
    if not explicit:
        return fn(*args)
    places = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, like)
    # Without a mesh in the context, nothing would be made Auto.
    with jax.sharding.use_abstract_mesh(jax.typeof(explicit[0]).sharding.mesh):
        return jax.sharding.auto_axes(fn, out_sharding=places)(*args)


def with_equations(jaxpr: Jaxpr, invars: Sequence[Any], eqns: Sequence[JaxprEqn]) -> Jaxpr:
    """A jaxpr with fewer inputs and equations; the names of its arguments no longer fit."""
    debug = jaxpr.debug_info._replace(arg_names=None) if jaxpr.debug_info else None
    return jaxpr.replace(invars=list(invars), eqns=list(eqns), debug_info=debug)


def register_derivatives(
    primitive: Primitive,
    jvp: Callable[..., Any],
    transpose: Callable[..., Any],
) -> None:
    """Registers how a primitive of several results is differentiated.

    Args:
      primitive: the primitive.
      jvp: `jvp(primals, tangents, moving, **params)` returns outputs and their tangents;
        `moving` lists the inputs whose tangent is not zero, and only theirs may be read.
      transpose: `transpose(cotangents, args, linear, **params)` returns a cotangent for each
        input, None for those that are not linear; `args[i]` is an aval where `linear[i]`.
    """

    def of_jvp(primals: Any, tangents: Any, **params: Any) -> Any:
        moving = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]
        return jvp(primals, tangents, moving, **params)

    def of_transpose(cts: Any, *args: Any, **params: Any) -> Any:
        linear = [ad.is_undefined_primal(a) for a in args]
        args = tuple(a.aval if lin else a for a, lin in zip(args, linear, strict=True))
        return transpose([ad.instantiate_zeros(ct) for ct in cts], args, linear, **params)

    ad.primitive_jvps[primitive] = of_jvp
    ad.primitive_transposes[primitive] = of_transpose


def register_batching(primitive: Primitive, rule: Callable[..., Any]) -> None:
    """Registers `rule(vmap, args, dims, **params)`; `vmap` maps a function as the caller's does."""

    def batch(axis_data: Any, args: Any, dims: Any, **params: Any) -> Any:
        def vmap(fun: Callable[..., Any]) -> Callable[..., Any]:
            return jax.vmap(
                fun,
                in_axes=tuple(dims),
                axis_size=axis_data.size,
                axis_name=axis_data.name,
                spmd_axis_name=axis_data.spmd_name,
            )

        return rule(vmap, args, dims, **params)

    batching.fancy_primitive_batchers[primitive] = batch


def identity_primitive(name: str) -> Primitive:
    """A primitive that returns its arguments, whatever its parameters.

    Tangents pass it by, and what `vmap` maps comes out with the mapped axis first.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(lambda *args, **_: list(args))
    primitive.def_abstract_eval(lambda *avals, **_: list(avals))

    def jvp(primals: Any, tangents: Any, **params: Any) -> Any:
        return primitive.bind(*primals, **params), list(tangents)

    def batch(args: Any, dims: Any, **params: Any) -> Any:
        mapped = [d is not None for d in dims]
        args = [jax.numpy.moveaxis(x, d, 0) if m else x for x, d, m in zip(args, dims, mapped)]
        return primitive.bind(*args, **params), [0 if m else d for d, m in zip(dims, mapped)]

    def transpose(cts: Any, *args: Any, **_: Any) -> Any:
        return [ct if ad.is_undefined_primal(a) else None for ct, a in zip(cts, args)]

    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, lambda ctx, *args, **_: list(args))
    return primitive


def checkpoint_name(eqn: JaxprEqn) -> str | None:
    """The name that `jax.ad_checkpoint.checkpoint_name` put on the value of an equation."""
    return eqn.params["name"] if eqn.primitive.name == "name" else None


def _carried(eqn: JaxprEqn) -> Iterator[Any]:
    for param in eqn.params.values():
        for found in param if isinstance(param, (tuple, list)) else (param,):
            if isinstance(found, (Jaxpr, ClosedJaxpr)):
                yield found


def sub_jaxprs(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """The jaxprs that an equation carries."""
    for found in _carried(eqn):
        yield open_jaxpr(found)[0]


def constants(jaxpr: Any) -> list[Any]:
    """The constants of a jaxpr, closed or not, and of those within it."""
    body, consts = open_jaxpr(jaxpr)
    within = [constants(found) for eqn in body.eqns for found in _carried(eqn)]
    return sum(within, list(consts))


def register_lowering(
    primitive: Primitive, everywhere: Callable[..., Any], one_cpu: Callable[..., Any]
) -> None:
    """Registers the functions that a primitive lowers to: one for a single CPU device."""
    plain = mlir.lower_fun(everywhere, multiple_results=True)
    single = mlir.lower_fun(one_cpu, multiple_results=True)

    def lower_cpu(ctx: Any, *args: Any, **params: Any) -> Any:
        devices = getattr(ctx.module_context.axis_context, "num_devices", None)
        return (single if devices == 1 else plain)(ctx, *args, **params)

    mlir.register_lowering(primitive, plain)
    mlir.register_lowering(primitive, lower_cpu, platform="cpu")


def jvp_jaxpr(eqn: JaxprEqn, zeros: Sequence[bool]) -> tuple[Jaxpr, Sequence[Any], Sequence[bool]]:
    """The derivative of a `custom_jvp_call` equation.

    Args:
      eqn: the equation.
      zeros: which of its operands, constants left out, have no tangent.

    Returns:
      A jaxpr from the operands and the tangents that there are to the outputs and their tangents,
      its constants, and which outputs have no tangent.
    """
    return eqn.params["jvp_jaxpr_fun"].call_wrapped(*zeros)


def vjp_forward(eqn: JaxprEqn) -> tuple[Jaxpr, Sequence[Any], Sequence[int | None]]:
    """The forward pass of a `custom_vjp_call` equation.

    Returns:
      A jaxpr from the operands, constants left out, to residuals and outputs; its constants; and
      for each residual the operand that it is, or None for the next that the jaxpr computes.
    """
    count = len(eqn.invars) - eqn.params["num_consts"]
    jaxpr, consts = eqn.params["fwd_jaxpr_thunk"].call_wrapped(*[True] * count)
    return jaxpr, consts, eqn.params["out_trees"]()[2]


def vjp_backward(eqn: JaxprEqn, like: Sequence[Any]) -> tuple[ClosedJaxpr, list[bool]]:
    """The backward pass of a `custom_vjp_call` equation.

    Args:
      eqn: the equation, whose forward pass was asked for before.
      like: variables or arrays of the types of residuals and cotangents.

    Returns:
      A jaxpr from these to the cotangents that there are, and which operands have none.
    """
    none: list[bool] = []

    def run(*args: Any) -> list[Any]:
        found = eqn.params["bwd"].call_wrapped(*args)
        none[:] = [isinstance(x, ad.Zero) for x in found]
        return [x for x in found if not isinstance(x, ad.Zero)]

    types = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in like]
    return jax.make_jaxpr(run)(*types), none


def dtype_of(v: Any) -> Any:
    """The dtype of a variable of a jaxpr."""
    return v.aval.dtype


def has_tangent(v: Any) -> bool:
    """Whether a variable of a jaxpr is of a type that is differentiated."""
    return bool(jax.numpy.issubdtype(v.aval.dtype, jax.numpy.inexact))


def zero_tangent(x: jax.Array) -> Any:
    """The tangent of what does not move."""
    kind = jax.dtypes.float0
    moves = jax.numpy.issubdtype(x.dtype, jax.numpy.inexact)
    return jax.numpy.zeros_like(x) if moves else np.zeros(x.shape, kind)
