"""A function of params, with the axes of all of its values labelled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jaxcompress.arguments import apart, is_array
from jaxcompress.arrays.base import is_compressed
from jaxcompress.errors import CompressError
from jaxcompress.pruning.structure.labels import Axis
from jaxcompress.pruning.structure.walk import Follower, Run, Value, Walk
from jaxcompress.rules import flatten


class Labelled(NamedTuple):
    """A labelled function.

    Attributes:
      walk: the walk that labelled it.
      paths: of the leaves of its params.
      axes: of each of these leaves.
      outs: what it returns.
      run: computes its flat outputs from the flat arrays of params and arguments.
      structure: of what it returns.
    """

    walk: Walk
    paths: list[str]
    axes: list[tuple[Axis, ...]]
    outs: list[Value]
    run: Run
    structure: Any


def leaves_of(params: Any) -> list[tuple[str, Any]]:
    """The leaves of params with their paths.

    Raises:
      CompressError: for a leaf that is compressed or no array.
    """
    found, _ = flatten(params)
    for path, leaf in found:
        if is_compressed(leaf):
            raise CompressError(
                f"{path} is a {type(leaf).__name__}: remove channels from the dense params first, "
                "and compress what is left; jc.compressed(shrunk(fn, plan)) runs that"
            )
        if not is_array(leaf):
            raise CompressError(f"{path} is {leaf!r}, and params are arrays")
    return found


def label(
    fn: Callable[..., Any],
    params: Any,
    shapes: Sequence[tuple[int, ...]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    follower: Follower | None = None,
    tags: Sequence[Any] | None = None,
) -> Labelled:
    """Labels a function.

    Args:
      fn: the function.
      params: its first argument.
      shapes: the shapes that its leaves have where nothing is removed.
      args: the other arguments; what is no array is static.
      kwargs: likewise.
      follower: goes along with the walk.
      tags: of the leaves, for it.
    """
    leaves = leaves_of(params)
    tree = jax.tree.structure(params)
    arrays, full = apart((args, kwargs))

    def flat(leaves: list[Any], arrays: list[Any]) -> Any:
        args, kwargs = full(arrays)
        return fn(jax.tree.unflatten(tree, leaves), *args, **kwargs)

    whole = [
        jax.ShapeDtypeStruct(shape, x.dtype, weak_type=getattr(x, "weak_type", False))
        for shape, (_, x) in zip(shapes, leaves)
    ]
    closed, out = jax.make_jaxpr(flat, return_shape=True)(whole, arrays)
    walk = Walk(follower)
    axes = [tuple(walk.table.axes(x.shape, zero=True)) for x in whole]
    ins = [Value(found, tag=tag) for found, tag in zip(axes, tags or [None] * len(axes))]
    for n, v in enumerate(closed.jaxpr.invars[len(ins) :]):
        why = f"it is an axis of array {n} of the arguments"
        ins.append(Value(tuple(walk.table.axes(v.aval.shape, why))))
    outs, run = walk.jaxpr(closed.jaxpr, closed.consts, ins)
    return Labelled(walk, [path for path, _ in leaves], axes, outs, run, jax.tree.structure(out))
