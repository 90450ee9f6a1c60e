"""From the JSON in a file's header back to a tree."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import CompressedArray, array_type, is_compressed
from jaxcompress.checkpoint.nodes import array_nodes, as_dtype, as_shape, from_json, join
from jaxcompress.errors import FileError
from jaxcompress.lazy import LazyArray


class Source(Protocol):
    """Where `Decoder` takes arrays from."""

    path: Path

    def info(self, node: Mapping[str, Any]) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and dtype of the array of a node."""
        ...

    def read(self, node: Mapping[str, Any]) -> np.ndarray:
        """The array of a node."""
        ...


@contextlib.contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """Whatever a damaged description sets off becomes one kind of error."""
    try:
        yield
    except FileError as error:
        told = str(error)
        raise FileError(told if str(path) in told else f"{path}: {told}") from error
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise FileError(f"{path}: the header is damaged: {error!r}") from error
    except (MemoryError, OverflowError) as error:
        raise FileError(f"{path}: it holds more than there is memory for: {error}") from error


@dataclasses.dataclass
class Decoder:
    """Builds the tree that an `Encoder` described.

    A leaf that several places name is read once and is the same object at all of them.

    Attributes:
      source: gives the arrays.
      lazy: whether leaves stay in the file.
      shapes: whether arrays are shapes alone, and nothing is read.
    """

    source: Source
    lazy: bool = False
    shapes: bool = False
    _repeated: frozenset[str] = frozenset()
    _shared: dict[str, Any] = dataclasses.field(default_factory=dict)

    def decode(self, node: Any) -> Any:
        """The tree.

        Raises:
          FileError: when the description is damaged or names a form that is not registered.
        """
        with damage_told(self.source.path):
            named = collections.defaultdict(list)
            for child in array_nodes(node):
                named[child["array"]].append(child)
            for name, nodes in named.items():
                if any(other != nodes[0] for other in nodes):
                    raise FileError(f"the header says two things of tensor {name!r}")
            self._repeated = frozenset(name for name, nodes in named.items() if len(nodes) > 1)
            return self._node(node, "")

    def _node(self, node: Any, where: str) -> Any:
        """One node; `where` is its path, for messages."""
        match node:
            case None:
                return None
            case {"value": value} if isinstance(value, (bool, int, float, str)):
                return value
            case {"dict": [*items]}:
                out: dict[Any, Any] = {}
                for item in items:
                    match item:
                        case [str() | int() as name, child] if _is_new_key(name, out):
                            out[name] = self._node(child, join(where, str(name)))
                        case _:
                            raise FileError("the header's tree is damaged: a dict item is no pair")
                return out
            case {"list": [*items]}:
                return self._items(items, where)
            case {"tuple": [*items]}:
                return tuple(self._items(items, where))
            case {"array": str()} | {
                "form": str(), "static": dict(), "children": dict(), "shape": list(), "dtype": _
            }:  # fmt: skip
                return self._once(node, where)
        raise FileError("the header's tree is damaged: an unknown kind of node")

    def _items(self, items: list[Any], where: str) -> list[Any]:
        return [self._node(x, join(where, str(i))) for i, x in enumerate(items)]

    def _once(self, node: dict[str, Any], where: str) -> Any:
        """A leaf; what is alike in several places is one object."""
        key = ""
        if any(child["array"] in self._repeated for child in array_nodes(node)):
            key = json.dumps(node, sort_keys=True)
            if key in self._shared:
                return self._shared[key]
        leaf = self._later(node, where) if self.lazy else self._leaf(node, where)
        if key:
            self._shared[key] = leaf
        return leaf

    def facts(self, node: dict[str, Any], where: str) -> tuple[tuple[int, ...], np.dtype, str]:
        """Shape, dtype and description of a leaf; nothing is read."""
        if "array" in node:
            return *self.source.info(node), "dense"
        form = str(node["form"])
        if array_type(form) is not None:
            form = Decoder(self.source, shapes=True)._compressed(node, where).describe()
        return as_shape(node["shape"]), as_dtype(node["dtype"]), form

    def _later(self, node: dict[str, Any], where: str) -> LazyArray:
        if "array" in node:
            shape, dtype = self.source.info(node)
        else:
            shape, dtype = as_shape(node["shape"]), as_dtype(node["dtype"])

        def load() -> Any:
            with damage_told(self.source.path):
                return Decoder(self.source, lazy=False)._leaf(node, where)

        return LazyArray(shape, dtype, self.nbytes(node), load)

    def _leaf(self, node: dict[str, Any], where: str) -> Any:
        if "array" in node:
            return self._array(node)
        return self._compressed(node, where)

    def nbytes(self, node: Any) -> int:
        """The bytes of a node's arrays once loaded."""
        if node is None:
            return 0
        if "array" in node:
            shape, dtype = self.source.info(node)
            return math.prod(shape) * dtype.itemsize
        if "tuple" in node:
            return sum(self.nbytes(child) for child in node["tuple"])
        return sum(self.nbytes(child) for child in node.get("children", {}).values())

    def _array(self, node: dict[str, Any]) -> Any:
        if self.shapes:
            return jax.ShapeDtypeStruct(*self.source.info(node))
        return as_array(self.source.read(node))

    def _compressed(self, node: dict[str, Any], where: str) -> CompressedArray:
        form = node["form"]
        cls = array_type(form)
        if cls is None:
            raise FileError(
                f"{where or 'the tree'} is a leaf of form {form!r}, which is not registered here; "
                "import the package that defines it before loading"
            )
        damaged = f"{where or 'the tree'}, a {form!r} leaf, is damaged"
        if set(node["children"]) != set(cls.children) or set(node["static"]) != set(cls.static):
            raise FileError(
                f"{damaged}: its fields {sorted(node['children'])} and {sorted(node['static'])} "
                f"are not those of {cls.__name__}, {sorted(cls.children)} and {sorted(cls.static)}"
            )
        children = {
            name: self._node(child, f"{where}.{name}") for name, child in node["children"].items()
        }
        for name, child in children.items():
            parts = child if isinstance(child, tuple) else (child,)
            if not all(x is None or is_compressed(x) or isinstance(x, _ARRAYS) for x in parts):
                raise FileError(f"{damaged}: its {name} is {child!r} and no array")
        static = {name: from_json(value) for name, value in node["static"].items()}
        try:
            leaf = cls(**children, **static)
            shape, dtype = list(leaf.shape), np.dtype(leaf.dtype)
            # What the leaf would compute is traced, so that damage shows here and not in a model.
            dense = jax.eval_shape(lambda x: x.materialize(), leaf)
            fits = shape == list(dense.shape) and dtype == dense.dtype
        except FileError:
            raise
        except Exception as error:
            raise FileError(f"{damaged}: {error}") from error
        if not fits or shape != node["shape"] or dtype.name != node["dtype"]:
            raise FileError(
                f"{damaged}: its parts make {dtype.name}{shape}, the header says "
                f"{node['dtype']}{node['shape']}"
            )
        return leaf


def _is_new_key(name: str | int, items: dict[Any, Any]) -> bool:
    return not isinstance(name, bool) and name not in items


def as_array(array: np.ndarray) -> jax.Array | np.ndarray:
    """A jax array, where jax has the dtype; else the numpy array."""
    # Without `jax_enable_x64` a jax array has no 64-bit dtype, and half of each value is lost.
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        return array
    try:
        return jnp.asarray(array)
    except jax.errors.JaxRuntimeError:  # a dtype of six bits, on some backends
        return array


_ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
