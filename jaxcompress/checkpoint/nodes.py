"""The JSON of a header: what it may hold, and walks over it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress.errors import FileError


def join(path: str, name: str) -> str:
    """The path of a child."""
    return f"{path}/{name}" if path else name


def from_json(value: Any) -> Any:
    """A static value of a leaf: plain, a dtype, or a tuple of them."""
    if isinstance(value, dict):
        if set(value) == {"dtype"}:
            return as_dtype(value["dtype"])
        if set(value) == {"tuple"}:
            return tuple(from_json(v) for v in value["tuple"])
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise FileError(f"the header holds {value!r} where a plain value belongs")


def is_dtype(name: str) -> bool:
    """Whether `as_dtype` knows a name."""
    with contextlib.suppress(FileError):
        as_dtype(name)
        return True
    return False


def as_dtype(name: Any) -> np.dtype:
    """A dtype by its plain name; anything else is refused."""
    # Numpy reads more than names, structured dtypes among them.
    if isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9_]*", name):
        with contextlib.suppress(TypeError):
            dtype = jnp.dtype(name)
            if dtype.name == name and dtype.kind in "biufcV":
                return dtype
    raise FileError(f"the header names an unknown dtype {name!r}")


_ARRAY_KEYS = {"array", "dtype", "shape", "coded"}


def array_nodes(node: Any) -> Iterator[dict[str, Any]]:
    """All nodes of arrays below a node, as often as they come."""
    if isinstance(node, dict):
        if isinstance(node.get("array"), str):
            if not set(node) <= _ARRAY_KEYS:
                raise FileError(f"the header says of an array what is not known: {sorted(node)}")
            yield node
            return
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from array_nodes(child)


def named_arrays(node: Any, kind: str = "dense") -> Iterator[tuple[str, str]]:
    """The names of a leaf's arrays, each with the child of the leaf that it belongs to."""
    if not isinstance(node, dict):
        return
    if "array" in node:
        yield kind, node["array"]
    for child in node.get("tuple", []):
        yield from named_arrays(child, kind)
    for name, child in node.get("children", {}).items():
        yield from named_arrays(child, name if kind == "dense" else kind)


def leaf_nodes(node: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """The arrays and compressed leaves of a description with their paths."""
    match node:
        case {"dict": [*items]}:
            for name, child in items:
                yield from leaf_nodes(child, join(where, str(name)))
        case {"list": [*items]} | {"tuple": [*items]}:
            for i, child in enumerate(items):
                yield from leaf_nodes(child, join(where, str(i)))
        case {"array": _} | {"form": _}:
            yield where, node


def as_shape(sizes: list[Any]) -> tuple[int, ...]:
    """A shape, whose sizes are whole numbers of at least zero."""
    if not all(isinstance(n, int) and n >= 0 for n in sizes):
        raise FileError(f"the header names an impossible shape {sizes}")
    return tuple(sizes)
