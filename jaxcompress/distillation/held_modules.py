"""NNX modules in the arguments of a function that is traced: as states, and changed after."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

import jax

from jaxcompress import compat


def unbound(fn: Any) -> tuple[Any, ...]:
    """An NNX module or its bound method as a function, and the module."""
    if "flax.nnx" in sys.modules:
        from flax import nnx

        if isinstance(fn, nnx.Module):
            call = lambda module, *args, **kwargs: module(*args, **kwargs)
            return call, fn
        if inspect.ismethod(fn) and isinstance(fn.__self__, nnx.Module):
            name = fn.__name__
            call = lambda module, *args, **kwargs: getattr(module, name)(*args, **kwargs)
            return call, fn.__self__
    return (fn,)


class Held:
    """The NNX modules in the arguments: apart while they are traced, as values and changes.

    Random streams (`nnx.Rngs`) as well, whose counters change.
    """

    def __init__(self) -> None:
        self.modules: list[Any] = []
        self.graphs: list[Any] = []

    def take(self, x: Any) -> Any:
        """An argument, or what stands for it."""
        from flax import nnx

        if not isinstance(x, nnx.Pytree):
            return x
        graph, state = nnx.split(x)
        self.modules.append(x)
        self.graphs.append(graph)
        return _State(len(self.modules) - 1, state)

    def run(self, fn: Any, args: Any, kwargs: Any) -> tuple[Any, list[Any]]:
        """What `fn` returns on modules made anew, and the states in which it leaves them."""
        if not self.modules:
            return fn(*args, **kwargs), []
        from flax import nnx

        made: dict[int, Any] = {}

        def give(x: Any) -> Any:
            if not isinstance(x, _State):
                return x
            return made.setdefault(x.place, nnx.merge(self.graphs[x.place], x.state))

        ours = lambda x: isinstance(x, _State)
        args, kwargs = jax.tree.map(give, (args, kwargs), is_leaf=ours)
        before = [_values(made[i]) for i in range(len(made))]
        out = fn(*args, **kwargs)
        after = [_values(made[i]) for i in range(len(made))]
        # Only what changed: a module may be one that cannot be changed where the caller is.
        return out, [
            {path: x for path, x in new.items() if x is not old.get(path)}
            for old, new in zip(before, after)
        ]

    def update(self, changed: list[Any]) -> None:
        """Gives the modules their new states."""
        for module, values in zip(self.modules, changed):
            if values:
                from flax import nnx

                nnx.update(module, nnx.from_flat_state(values))


def _values(module: Any) -> dict[Any, Any]:
    """The values of a module's variables, by path."""
    from flax import nnx

    return {path: x.get_value() for path, x in nnx.to_flat_state(nnx.state(module))}


@functools.partial(compat.register_node, data=("state",), static=("place",))
class _State:
    """The state of an NNX module in its place."""

    def __init__(self, place: int, state: Any) -> None:
        self.place, self.state = place, state


def hold(args: Any, kwargs: Any) -> tuple[Held, Any, Any]:
    """Arguments with the state of each NNX module in its place, and the modules."""
    held = Held()
    if "flax.nnx" in sys.modules:
        from flax import nnx

        ours = lambda x: isinstance(x, nnx.Pytree)
        args, kwargs = jax.tree.map(held.take, (args, kwargs), is_leaf=ours)
    return held, args, kwargs
