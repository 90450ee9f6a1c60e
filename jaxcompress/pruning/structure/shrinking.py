"""The masked model, the smaller one, and the state of its optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arguments import apart
from jaxcompress.errors import CompressError
from jaxcompress.optimizer_state import owner
from jaxcompress.pruning.structure.find import members_of
from jaxcompress.pruning.structure.function import Labelled, label, leaves_of
from jaxcompress.pruning.structure.plans import LeafPlan, Plan


def mask_channels(params: Any, plan: Plan) -> Any:
    """The params with zeros where a plan removes channels: in all leaves where they lie.

    So not only what makes a removed channel is zero, but also what reads it: nothing that the
    channel may still hold (the activation of zero, a shift) is seen by anyone. `shrink` is equal
    to this to rounding.

    Args:
      params: in the structure and the shapes of the plan.
      plan: from `plan`.

    Returns:
      Params of the same shapes.

    Raises:
      CompressError: for params that the plan was not made for.

    Examples:
      >>> import jax.numpy as jnp
      >>> leaf = LeafPlan("w", (3,), ((0, 2),))
      >>> mask_channels({"w": jnp.ones(3)}, Plan((leaf,)))["w"].tolist()
      [1.0, 0.0, 1.0]
    """
    return _each(params, plan, _masked, whole=True)


def _masked(x: Any, leaf: LeafPlan) -> Any:
    for axis, kept in enumerate(leaf.kept):
        if kept is not None:
            there = np.zeros(leaf.shape[axis], bool)
            there[list(kept)] = True
            there = there.reshape([-1 if a == axis else 1 for a in range(len(leaf.shape))])
            x = jnp.where(there, x, jnp.zeros((), x.dtype))
    return x


def taken(x: Any, leaf: LeafPlan) -> Any:
    """What stays of a leaf: an array, or a shape."""
    for axis, kept in enumerate(leaf.kept):
        if kept is not None:
            if isinstance(x, jax.ShapeDtypeStruct):
                shape = (*x.shape[:axis], len(kept), *x.shape[axis + 1 :])
                x = jax.ShapeDtypeStruct(shape, x.dtype)
            else:
                x = jnp.take(jnp.asarray(x), np.asarray(kept), axis=axis)
    return x


def _each(params: Any, plan: Plan, change: Callable[[Any, LeafPlan], Any], whole: bool) -> Any:
    leaves = leaves_of(params)
    plan.check([(path, tuple(x.shape)) for path, x in leaves], whole)
    out = [change(x, leaf) for (_, x), leaf in zip(leaves, plan.leaves)]
    return jax.tree.unflatten(jax.tree.structure(params), out)


def shrink_params(params: Any, plan: Plan) -> Any:
    """The smaller leaves alone: what stays of each.

    Args:
      params: in the structure and the shapes of the plan, arrays or shapes.
      plan: from `plan`.

    Raises:
      CompressError: for params that the plan was not made for.

    Examples:
      >>> import jax.numpy as jnp
      >>> leaf = LeafPlan("w", (3,), ((0, 2),))
      >>> shrink_params({"w": jnp.arange(3)}, Plan((leaf,)))["w"].tolist()
      [0, 2]
    """
    return _each(params, plan, taken, whole=True)


def shrunk(fn: Callable[..., Any], plan: Plan) -> Callable[..., Any]:
    """The function on smaller leaves, from the function on whole ones.

    It is traced on the shapes of the whole leaves, and its jaxpr evaluated on the smaller ones: the
    shapes that its equations hold are rewritten, and of constants (positions, rotary tables, random
    numbers) those places are taken that belong to what stays. It may be any function of the same
    params, such as a loss or a step of training, at any batch size. It is traced at each call
    outside of `jit`, so wrap the outermost function.

    Args:
      fn: a function of the params and other arguments.
      plan: from `plan`.

    Returns:
      A function of smaller params and the same arguments. What it returns is of smaller shape
      where an axis of the result was one of a removed channel, such as new batch statistics.

    Raises:
      CompressError: when it is called, where a plan removes what the function cannot do without.

    Examples:
      >>> import jax.numpy as jnp
      >>> small = shrunk(lambda p: jnp.sum(p["w"]) / 3, Plan((LeafPlan("w", (3,), ((0, 2),)),)))
      >>> round(float(small({"w": jnp.array([1.0, 5.0])})), 6)
      2.0
    """

    @functools.wraps(fn)
    def small(params: Any, *args: Any, **kwargs: Any) -> Any:
        leaves = leaves_of(params)
        plan.check([(path, tuple(x.shape)) for path, x in leaves], whole=False)
        found = label(fn, params, [leaf.shape for leaf in plan.leaves], args, kwargs)
        settle(found, plan)
        outs = found.run([*(x for _, x in leaves), *apart((args, kwargs))[0]])
        return jax.tree.unflatten(found.structure, [jnp.asarray(x) for x in outs])

    return small


def settle(found: Labelled, plan: Plan) -> None:
    """Settles which channels of the groups of a function stay, from what stays of its leaves."""
    members, sizes = members_of(found)
    kept = {leaf.path: leaf.kept for leaf in plan.leaves}
    channels = {}
    for number, where in members.items():
        stays = np.zeros(sizes[number], bool)
        for member in where:
            there = kept[member.path][member.axis]
            if there is None:
                stays[:] = True
                break
            places = member.places(np.arange(sizes[number]))
            stays |= np.isin(places, there).any(axis=1)
        channels[number] = np.flatnonzero(stays)
    found.walk.keep(channels, sizes)
    for leaf, axes in zip(plan.leaves, found.axes):
        for n, (axis, there) in enumerate(zip(axes, leaf.kept)):
            size = leaf.shape[n] if there is None else len(there)
            places = found.walk.kept.places(axis)
            if len(places) != size or (there is not None and list(places) != list(there)):
                raise CompressError(
                    f"the plan removes places of axis {n} of {leaf.path} that in this function "
                    "go together with others; plan with the groups of this function"
                )


def shrink(fn: Callable[..., Any], params: Any, plan: Plan) -> tuple[Callable[..., Any], Any]:
    """A smaller model: the function that runs smaller leaves, and these leaves.

    It equals `fn` on the masked params (`mask_channels`) to rounding, value and gradient of what
    stays.

    Args:
      fn: the function whose groups the plan is of.
      params: its params.
      plan: from `plan`.

    Returns:
      `(fn, params)`, the first as `shrunk` gives it, the second as `shrink_params` does.

    Raises:
      CompressError: for params that the plan was not made for.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.array([1.0, 2.0, 5.0])}
      >>> plan = Plan((LeafPlan("w", (3,), ((0, 2),)),))
      >>> small, fewer = shrink(lambda p: jnp.sum(p["w"]), params, plan)
      >>> float(small(fewer))
      6.0
    """
    return shrunk(fn, plan), shrink_params(params, plan)


def shrink_state(state: Any, params: Any, plan: Plan) -> Any:
    """The state of an optimizer for the smaller leaves, so that training goes on.

    A part of the state belongs to a leaf of the params if its path ends like that leaf's, as `mu`
    and `nu` of any optax state do, and if it has its shape; what stays of it is taken. Other parts
    (counts, scalars) stay as they are.

    Args:
      state: of an optimizer, for the whole params.
      params: the whole params as the optimizer was given them, arrays or shapes.
      plan: from `plan`, for these params. With Linen, whose plan is of all variables and whose
        optimizer has the params alone, `plan.under("params")`.

    Raises:
      CompressError: for a part that belongs to a smaller leaf and has another shape, such as a
        factored second moment (begin it anew with the optimizer's `init`), and for parts that lie
        elsewhere than in the params.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> params = {"w": jnp.ones(3)}
      >>> state = optax.adam(0.1).init(params)
      >>> shrink_state(state, params, Plan((LeafPlan("w", (3,), ((0, 2),)),)))[0].mu["w"].shape
      (2,)
    """
    leaves = leaves_of(params)
    plan.check([(path, tuple(x.shape)) for path, x in leaves], whole=True)
    paths = [tuple(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    parts, structure = jax.tree_util.tree_flatten_with_path(state)
    smaller = {
        (path[-1:], leaf.shape)
        for path, leaf in zip(paths, plan.leaves)
        if leaf.small != leaf.shape
    }
    out = []
    for path, x in parts:
        place = owner(tuple(path), paths)
        leaf = None if place is None else plan.leaves[place]
        if leaf is None and (tuple(path[-1:]), np.shape(x)) in smaller:
            raise CompressError(
                f"{jax.tree_util.keystr(path)} of the optimizer's state looks like a part of a "
                "smaller leaf, and lies elsewhere than in the params; give the params that the "
                'optimizer was given, and their plan, such as plan.under("params")'
            )
        if leaf is None or leaf.small == leaf.shape or np.size(x) <= 1:
            out.append(x)
        elif tuple(x.shape) == leaf.shape:
            out.append(taken(x, leaf))
        else:
            raise CompressError(
                f"{jax.tree_util.keystr(path)} of the optimizer's state has shape "
                f"{tuple(x.shape)} and {leaf.path} has {leaf.shape}, so that it is not known what "
                "to remove; begin it anew with the optimizer's `init` on the smaller params"
            )
    return jax.tree.unflatten(structure, out)
