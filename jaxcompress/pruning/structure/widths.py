"""The whole numbers that a module is made with: in its fields, and in what these hold."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

# Where a number lies: names of fields, keys and places, the outermost first.
Place = tuple[Any, ...]

_OWN = ("parent", "name")  # fields of a Linen module that are not its user's


def widths(x: Any) -> dict[Place, int]:
    """The whole numbers in a module, a partial call, a dataclass or a plain container.

    Examples:
      >>> widths(functools.partial(print, 3, (64, 32), sep=True))
      {('args', 0): 3, ('args', 1, 0): 64, ('args', 1, 1): 32}
    """
    if type(x) is int:
        return {(): x}
    found = ((key, widths(child)) for key, child in _parts(x).items())
    return {(key, *place): n for key, inner in found for place, n in inner.items()}


def with_widths(x: Any, new: Mapping[Place, int]) -> Any:
    """The same made with other numbers at some places.

    Examples:
      >>> with_widths({"features": [64, 32]}, {("features", 1): 16})
      {'features': [64, 16]}
    """
    if () in new:
        return new[()]
    inner: dict[Any, dict[Place, int]] = {}
    for (key, *rest), n in new.items():
        inner.setdefault(key, {})[tuple(rest)] = n
    parts = _parts(x)
    changes = {key: with_widths(parts[key], numbers) for key, numbers in inner.items()}
    return _changed(x, parts, changes) if changes else x


def _parts(x: Any) -> dict[Any, Any]:
    if isinstance(x, functools.partial):
        return {"args": x.args, "keywords": x.keywords}
    if isinstance(x, (tuple, list)):
        return dict(enumerate(x))
    if isinstance(x, Mapping):
        return dict(x)
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        own = _OWN if hasattr(x, "clone") else ()
        names = [f.name for f in dataclasses.fields(x) if f.init and f.name not in own]
        return {name: getattr(x, name) for name in names if hasattr(x, name)}
    return {}


def _changed(x: Any, parts: dict[Any, Any], changes: dict[Any, Any]) -> Any:
    if isinstance(x, functools.partial):
        args, keywords = ({**parts, **changes}[name] for name in ("args", "keywords"))
        return functools.partial(x.func, *args, **keywords)
    if isinstance(x, (tuple, list)):
        items = {**parts, **changes}.values()
        return x._make(items) if hasattr(x, "_make") else type(x)(items)  # a named tuple has it
    if isinstance(x, Mapping):
        return type(x)({**parts, **changes})  # type: ignore[call-arg]
    return x.clone(**changes) if hasattr(x, "clone") else dataclasses.replace(x, **changes)
