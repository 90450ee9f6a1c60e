"""`rebuild(module, plan, params, ...)`: the module itself, made with smaller widths."""

from __future__ import annotations

import functools
import heapq
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from jaxcompress.arguments import apart
from jaxcompress.errors import CompressError
from jaxcompress.pruning.structure.function import leaves_of
from jaxcompress.pruning.structure.plans import Plan
from jaxcompress.pruning.structure.sameness import difference
from jaxcompress.pruning.structure.shrinking import shrunk
from jaxcompress.pruning.structure.widths import Place, widths, with_widths
from jaxcompress.rules import flatten

_TRIED = 400  # choices of widths, of which each takes a trace of the initialization
Shapes = dict[str, tuple[int, ...]]


def rebuild(module: Any, plan: Plan, params: Any, *args: Any, **kwargs: Any) -> Any:
    """The module made anew with the widths that a plan leaves, where that is the same function.

    A smaller function from `shrunk` needs nothing of this. A module with smaller widths is for
    whoever wants one: to train on with its own code, or to hand it on without a plan.

    The whole numbers in the fields of the module (and in tuples, dicts, dataclasses and modules
    that these hold) are tried until its initialization gives the shapes of the plan. What comes out
    is then compared with `shrunk`, number by number in the programs and on random weights, and
    refused unless it is equal: a layer norm over a width from which channels are removed divides
    by the full width in the masked model and by the smaller one in a rebuilt module, and so
    does the scale of attention where the depth of heads is removed from. Such a model stays
    with `shrunk`.

    Args:
      module: a Linen module whose `apply` the plan is of; or `functools.partial(Class, ...)`, from
        which `rngs=nnx.Rngs(0)` makes an NNX module, whose whole state the plan is of.
      plan: from `plan`.
      params: the smaller leaves, as `shrink_params` gives them.
      *args: the other arguments of the call, arrays or shapes; those of `init` as well.
      **kwargs: likewise, such as `train=False`.

    Returns:
      The Linen module, to run with these params; or the NNX module that has them.

    Raises:
      CompressError: where no choice of widths gives the shapes, such as when layers that share a
        field lose different channels; it lists the new shapes, by which the module is made by hand.
        Where a choice does and is another function; it says where. For params of another plan.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jaxcompress.pruning.structure import groups, plan, shrink_params
      >>> model, x = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(2)]), jnp.ones((1, 4))
      >>> params = model.init(jax.random.key(0), x)
      >>> half = plan(groups(model.apply, params, x), params, 0.5)
      >>> small = rebuild(model, half, shrink_params(params, half), x)
      >>> small.layers[0].features
      8
    """
    kind = _kind(module)
    shapes = functools.partial(kind.shapes, args=args, kwargs=kwargs)
    plan.check(list(shapes(module).items()), whole=True)
    plan.check([(path, tuple(x.shape)) for path, x in leaves_of(params)], whole=False)
    want = shrunk(kind.function(module), plan)
    refused = None
    for chosen in _choices(module, plan, shapes):
        new = with_widths(module, chosen)
        why = difference(want, kind.function(new), params, args, kwargs)
        if why is None:
            return kind.made(new, params)
        refused = refused or why
    if refused is not None:
        raise CompressError(
            f"a module with the widths of the plan is not the masked model: {refused}; run the "
            "smaller params with shrunk(fn, plan), which keeps what the masked model computes"
        )
    changed = [leaf for leaf in plan.leaves if leaf.small != leaf.shape]
    lines = [f"  {leaf.path}: {leaf.shape} -> {leaf.small}" for leaf in changed]
    raise CompressError(
        "no choice of the whole numbers in the fields of the module was found that gives the "
        "shapes of the plan; run the params with shrunk(fn, plan), or make the module by hand:\n"
        + "\n".join(lines)
    )


def _choices(
    module: Any, plan: Plan, shapes: Callable[[Any], Shapes]
) -> Iterator[dict[Place, int]]:
    """The changes of widths that give the shapes of the plan, from few changes to many."""
    wanted, old = plan.shapes, widths(module)
    pairs = {
        (n, m)
        for leaf in plan.leaves for n, m in zip(leaf.shape, leaf.small) if n != m
    }  # fmt: skip
    free = {place: found for place, n in old.items() if (found := _smaller(n, pairs))}
    # The nearest first. What cannot be made alone may be a step on the way to what can.
    start = _distance(shapes(module), wanted)
    queue: list[tuple[int, int, int, dict[Place, int]]] = [(start, 0, 0, {})]
    seen, order = {frozenset[Any]()}, itertools.count(1)
    while queue:
        far, count, _, changes = heapq.heappop(queue)
        if far == 0:
            yield changes
        for place, n in ((p, n) for p, found in free.items() if p not in changes for n in found):
            more = {**changes, place: n}
            if frozenset(more.items()) in seen or len(seen) > _TRIED:
                continue
            seen.add(frozenset(more.items()))
            try:
                there = _distance(shapes(with_widths(module, more)), wanted)
            except Exception:  # whatever a module raises for widths that do not fit each other
                there = far + 1
            heapq.heappush(queue, (there, count + 1, next(order), more))


def _smaller(n: int, pairs: set[tuple[int, int]]) -> list[int]:
    """What a width may become where axes of some sizes do, which are it, parts or multiples."""
    fits = lambda old, new: n > 0 and (old % n == 0 or n % old == 0) and n * new % old == 0
    return sorted({n * new // old for old, new in pairs if fits(old, new)} - {0})


def _distance(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> int:
    """How many axes differ."""
    far = len(found.keys() - wanted.keys())
    for path, shape in wanted.items():
        there = found.get(path, ())
        same = len(there) == len(shape)
        far += sum(a != b for a, b in zip(there, shape)) if same else 1 + len(shape)
    return far


def _kind(module: Any) -> Any:
    if "flax" in sys.modules:
        import flax.linen as nn

        if isinstance(module, nn.Module):
            return _Linen()
        if isinstance(module, functools.partial):
            from flax import nnx

            if isinstance(module.func, type) and issubclass(module.func, nnx.Module):
                return _Nnx()
    raise CompressError(
        f"{module!r} is no module that can be made anew: give a Linen module, or a "
        "functools.partial of the class of an NNX module with all but its rngs"
    )


class _Linen:
    def shapes(self, module: Any, args: Any, kwargs: Any) -> Shapes:
        arrays, full = apart((args, kwargs))

        def init(key: Any, arrays: Any) -> Any:
            args, kwargs = full(arrays)
            return module.init(key, *args, **kwargs)

        made = jax.eval_shape(init, jax.random.key(0), arrays)
        return {path: tuple(x.shape) for path, x in flatten(made)[0]}

    def function(self, module: Any) -> Callable[..., Any]:
        apply: Callable[..., Any] = module.apply
        return apply

    def made(self, module: Any, params: Any) -> Any:
        return module


class _Nnx:
    def _split(self, make: Any) -> tuple[Any, Any]:
        from flax import nnx

        return nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))

    def shapes(self, module: Any, args: Any, kwargs: Any) -> Shapes:
        return {path: tuple(x.shape) for path, x in flatten(self._split(module)[1])[0]}

    def function(self, module: Any) -> Callable[..., Any]:
        from flax import nnx

        graph, _ = self._split(module)
        return lambda state, *args, **kwargs: nnx.merge(graph, state)(*args, **kwargs)

    def made(self, module: Any, params: Any) -> Any:
        from flax import nnx

        return nnx.merge(self._split(module)[0], params)
