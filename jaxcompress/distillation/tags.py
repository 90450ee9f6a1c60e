"""Names for what the modules of Flax return, put into the jaxpr while a function is traced.

A tag is an equation that returns what it is given. It goes where the value goes: into the body of
a `scan`, through `vmap` and `grad`. So whoever walks the jaxpr finds it (see `taps.py`), and no
value leaves the trace that it belongs to. Whoever wants what modules are given hears of their calls
instead (`listening`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from jaxcompress import compat

tag_p = compat.identity_primitive("tap")


@dataclasses.dataclass(frozen=True, eq=False)
class Tag:
    """One call of one method; compared by identity.

    Attributes:
      name: the path of the module, with the name of the method unless that is `__call__`.
      depth: how many taps were around the call; the innermost has the highest.
      structure: of what the method returned.
      places: which of its leaves are arrays, and in the jaxpr.
      rest: the other leaves.
    """

    name: str
    depth: int
    structure: Any
    places: tuple[int, ...]
    rest: tuple[Any, ...]

    def restored(self, arrays: Any) -> Any:
        """What the method returned."""
        leaves, found = list(self.rest), iter(arrays)
        for place in self.places:
            leaves.insert(place, next(found))
        return jax.tree.unflatten(self.structure, leaves)


Listener = Callable[[Any, str, Sequence[Any], Mapping[str, Any]], None]


class _State(threading.local):
    """What is traced in this thread: the methods that run, outermost first, and who asks."""

    def __init__(self) -> None:
        self.depth = 0
        self.listeners: list[Listener] = []
        self.running: list[tuple[int, str]] = []
        self.modules = 0


_state = _State()
# A part of the keys of jax's caches: a jitted function has tags only where it is asked for them.
_traced = jax.make_user_context(0)


@contextlib.contextmanager
def tagging() -> Iterator[int]:
    """Tags what the modules that run within return; yields the depth of the tags."""
    with _around_modules():
        _state.depth += 1
        try:
            with _traced(_state.depth):
                yield _state.depth
        finally:
            _state.depth -= 1


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Calls `listener(module, path, args, kwargs)` before each `__call__` of a module within."""
    with _around_modules():
        _state.listeners.append(listener)
        try:
            yield
        finally:
            _state.listeners.pop()


@contextlib.contextmanager
def _around_modules() -> Iterator[None]:
    """Our code around the methods of modules, once."""
    if _asked():
        yield
    else:
        with _linen(), _nnx():
            yield


def _asked() -> bool:
    return bool(_state.depth or _state.listeners)


def _tell(module: Any, path: Any, method: str, args: Sequence[Any], kwargs: Any) -> None:
    if method == "__call__":
        for listener in _state.listeners:
            listener(module, "/".join(map(str, path)), args, kwargs)


def _tagged(name: str, value: Any) -> Any:
    """`value` with a tag for each tap around it."""
    leaves, structure = jax.tree.flatten(value)
    places = tuple(i for i, x in enumerate(leaves) if isinstance(x, jax.core.Tracer))
    if not places:
        return value
    rest = tuple(x for x in leaves if not isinstance(x, jax.core.Tracer))
    arrays = [leaves[i] for i in places]
    for depth in range(1, _state.depth + 1):
        tag = Tag(name, depth, structure, places, rest)
        arrays = tag_p.bind(*arrays, tag=tag)
    for place, x in zip(places, arrays):
        leaves[place] = x
    return jax.tree.unflatten(structure, leaves)


def _seen(method: str) -> bool:
    return method == "__call__" or not (method.startswith("_") or method == "setup")


def _named(path: Any, method: str) -> str:
    keys = [str(key) for key in path]
    return "/".join(keys if keys and method == "__call__" else [*keys, method])


@contextlib.contextmanager
def _running(module: Any, method: str) -> Iterator[bool]:
    """Whether this is a call of its own, and not that of the method that it overrides."""
    key = (id(module), method)
    own = key not in _state.running
    _state.running.append(key)
    try:
        yield own
    finally:
        _state.running.pop()


@contextlib.contextmanager
def _linen() -> Iterator[None]:
    """Tags what the methods of Linen modules return."""
    if "flax.linen" not in sys.modules:  # whoever has no module of it needs no import of it
        yield
        return
    import flax.linen as nn

    def interceptor(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, name = context.module, context.method_name
        with _running(module, name) as own:
            if own and module.scope is not None:
                _tell(module, module.path, name, args, kwargs)
            out = method(*args, **kwargs)
        if not own or module.scope is None or not _seen(name):
            return out
        return _tagged(_named(module.path, name), out)

    with nn.intercept_methods(interceptor):
        yield


# NNX has no interceptors, so methods are wrapped as `nnx.capture` does, and for as long.
_wrapping = threading.RLock()
_PATH = "_jaxcompress_path"
_NO_METHODS = (type, staticmethod, classmethod)


@contextlib.contextmanager
def _nnx() -> Iterator[None]:
    """Tags what the methods of NNX modules return."""
    if "flax.nnx" not in sys.modules:
        yield
        return
    from flax import nnx

    with _wrapping, contextlib.ExitStack() as stack:
        for cls in _subclasses(nnx.Module):
            for name, method in list(vars(cls).items()):
                if _seen(name) and callable(method) and not isinstance(method, _NO_METHODS):
                    stack.callback(setattr, cls, name, method)
                    setattr(cls, name, _wrapped(name, method))
        yield


def _subclasses(cls: type) -> set[type]:
    found: set[type] = set(cls.__subclasses__())
    return found.union(*map(_subclasses, found))


def _wrapped(name: str, method: Any) -> Any:
    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _asked():  # another thread
            return method(self, *args, **kwargs)
        with _placed(self), _running(self, name) as own:
            path = vars(self).get(_PATH, (type(self).__name__,))
            if own:
                _tell(self, path, name, args, kwargs)
            out = method(self, *args, **kwargs)
        return _tagged(_named(path, name), out) if own else out

    return wrapper


@contextlib.contextmanager
def _placed(module: Any) -> Iterator[None]:
    """Tells the modules within an outermost one their paths while it runs.

    Each holds its path as an attribute, which is static: so nnx's transforms, which make modules
    anew inside of `scan` or `remat`, hand it on.
    """
    from flax import nnx

    placed: list[Any] = []
    if not _state.modules:
        for path, found in nnx.iter_modules(module):
            vars(found)[_PATH] = path
            placed.append(found)
    _state.modules += 1
    try:
        yield
    finally:
        _state.modules -= 1
        for found in placed:
            vars(found).pop(_PATH, None)
