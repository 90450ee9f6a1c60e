"""The shape of a tree as plain JSON, and back: what a file's header says of its tensors."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import CompressedArray, array_type, is_compressed
from jaxcompress.arrays.layout import Layout
from jaxcompress.checkpoint.container import CODES
from jaxcompress.errors import FileError
from jaxcompress.lazy import LazyArray
from jaxcompress.rules import is_wrapper_key, path_str


class Sink(Protocol):
    """Where `encode` puts arrays."""

    def put(self, name: str, array: Any, layout: Layout | None, held: bool) -> dict[str, Any]:
        """Takes an array; what comes back is what its node must say besides the name.

        `held` tells whether the caller keeps the array until all is written.
        """
        ...


@dataclasses.dataclass
class Encoder:
    """Describes a tree as JSON and puts its arrays under their paths into a sink.

    An array or leaf that occurs at several places is put once; all places name it.

    Attributes:
      sink: takes the arrays.
      load: reads a lazy leaf.
      done: called with the path of each leaf that is through.
    """

    sink: Sink
    load: Callable[[LazyArray], Any] = LazyArray.load
    done: Callable[[str], None] = lambda path: None
    _names: set[str] = dataclasses.field(default_factory=set)
    _nodes: dict[int, tuple[Any, Any]] = dataclasses.field(default_factory=dict)

    def encode(self, tree: Any, path: str = "", held: bool = True) -> Any:
        """The description of a tree.

        Dicts (by sorted keys), lists and tuples keep their kind. Other containers (NNX state,
        frozen dicts, named tuples) become dicts of their children, and wrappers of one value become
        the value.

        Raises:
          FileError: for a leaf that is no array, number or string; names its path.
        """
        if tree is None:
            return None
        if isinstance(tree, _LEAVES):
            return self._leaf(tree, path, held)  # np.float64 is a float as well
        if isinstance(tree, (bool, int, float, str)):
            return {"value": tree}
        kind, children = _branches(tree, path)
        if kind == "wrapper":
            return self.encode(children[0][1], path, held)
        nodes = [(name, self.encode(x, _join(path, str(name)), held)) for name, x in children]
        return {kind: [list(pair) for pair in nodes] if kind == "dict" else [x for _, x in nodes]}

    def _leaf(self, leaf: Any, path: str, held: bool) -> Any:
        known = self._nodes.get(id(leaf))
        if known is not None:
            return known[0]
        if isinstance(leaf, LazyArray):
            node = self._loaded(self.load(leaf), path, held=False)
        else:
            node = self._loaded(leaf, path, held)
        if held:  # and so its id stays its own
            self._nodes[id(leaf)] = node, leaf
        self.done(path)
        return node

    def _loaded(self, leaf: Any, path: str, held: bool) -> Any:
        if not isinstance(leaf, _LEAVES):  # a lazy leaf may give a plain value
            return self.encode(leaf, path, held)
        if not is_compressed(leaf):
            return self._array(leaf, path, None, held)
        return self._compressed(leaf, path, leaf.layouts(), held)

    def _array(self, array: Any, path: str, layout: Layout | None, held: bool) -> Any:
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            raise FileError(f"{path}: a random key cannot be saved; save jax.random.key_data(key)")
        known = self._nodes.get(id(array))
        if known is not None:
            return known[0]
        name = path or "array"
        # An integer and a string key may read alike, and one name is the header's own.
        while name in self._names or name == "__metadata__":
            name += "'"
        node = {"array": name}
        dtype = np.dtype(array.dtype)
        if dtype.name not in CODES:
            if dtype.itemsize != 1 or not _is_dtype(dtype.name) or dtype.names:
                raise FileError(f"{path}: arrays of dtype {dtype} cannot be saved")
            node["dtype"] = dtype.name
        self._names.add(name)
        node.update(self.sink.put(name, array, layout, held))
        if held:
            self._nodes[id(array)] = node, array
        return node

    def _compressed(
        self, leaf: CompressedArray, path: str, layouts: Mapping[str, Layout], held: bool
    ) -> Any:
        def child(name: str) -> Any:
            value, where = getattr(leaf, name), f"{path}.{name}"
            if is_compressed(value):
                # What its owner knows of the child's bytes is more than what it knows itself.
                inner = value.layouts()
                if name in layouts:
                    inner = dict.fromkeys(inner, layouts[name])
                return self._compressed(value, where, inner, held)
            if value is None:
                return None
            if not isinstance(value, (jax.Array, np.ndarray, np.generic)):
                raise FileError(f"{where} is {value!r}; a child of a leaf is an array, or static")
            return self._array(value, where, layouts.get(name), held)

        return {
            "form": leaf.form,
            "shape": list(leaf.shape),
            "dtype": np.dtype(leaf.dtype).name,
            "static": {n: _to_json(getattr(leaf, n), f"{path}.{n}") for n in leaf.static},
            "children": {name: child(name) for name in leaf.children},
        }


def _branches(tree: Any, path: str) -> tuple[str, list[tuple[Any, Any]]]:
    """The children of a container in the order of the file, and what it becomes there."""
    if isinstance(tree, Mapping):
        for name in tree:
            if not isinstance(name, (str, int)) or isinstance(name, bool):
                raise FileError(f"{path or 'the tree'}: key {name!r} is neither string nor integer")
        names = sorted(tree, key=lambda name: (isinstance(name, str), name))
        return "dict", [(name, tree[name]) for name in names]
    if type(tree) in (list, tuple):
        return type(tree).__name__, list(enumerate(tree))
    children = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)[0]
    if len(children) == 1 and children[0][1] is tree:
        raise FileError(
            f"{path or 'the tree'}: a {type(tree).__name__} cannot be saved; keep arrays, numbers "
            "and strings in the tree"
        )
    wrapped = len(children) == 1 and is_wrapper_key(children[0][0][0])
    return "wrapper" if wrapped else "dict", [(path_str(keys), child) for keys, child in children]


_LEAVES = (CompressedArray, LazyArray, jax.Array, np.ndarray, np.generic)


def leaves_in_order(tree: Any, path: str = "") -> Iterator[Any]:
    """The arrays and compressed leaves of a tree in the order in which an `Encoder` takes them."""
    if isinstance(tree, _LEAVES):
        yield tree
    elif tree is not None and not isinstance(tree, (bool, int, float, str)):
        kind, children = _branches(tree, path)
        for name, child in children:
            yield from leaves_in_order(child, path if kind == "wrapper" else _join(path, str(name)))


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _to_json(value: Any, path: str) -> Any:
    if isinstance(value, (np.dtype, type)):
        return {"dtype": np.dtype(value).name}
    if isinstance(value, tuple):
        return {"tuple": [_to_json(v, path) for v in value]}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise FileError(f"{path}: static value {value!r} is no plain value, dtype or tuple of them")


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"dtype"}:
            return as_dtype(value["dtype"])
        if set(value) == {"tuple"}:
            return tuple(_from_json(v) for v in value["tuple"])
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise FileError(f"the header holds {value!r} where a plain value belongs")


def _is_dtype(name: str) -> bool:
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
                            out[name] = self._node(child, _join(where, str(name)))
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
        return [self._node(x, _join(where, str(i))) for i, x in enumerate(items)]

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
        return _shape(node["shape"]), as_dtype(node["dtype"]), form

    def _later(self, node: dict[str, Any], where: str) -> LazyArray:
        if "array" in node:
            shape, dtype = self.source.info(node)
        else:
            shape, dtype = _shape(node["shape"]), as_dtype(node["dtype"])

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
            if not (child is None or is_compressed(child) or isinstance(child, _ARRAYS)):
                raise FileError(f"{damaged}: its {name} is {child!r} and no array")
        static = {name: _from_json(value) for name, value in node["static"].items()}
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
    for name, child in node.get("children", {}).items():
        yield from named_arrays(child, name if kind == "dense" else kind)


def leaf_nodes(node: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """The arrays and compressed leaves of a description with their paths."""
    match node:
        case {"dict": [*items]}:
            for name, child in items:
                yield from leaf_nodes(child, _join(where, str(name)))
        case {"list": [*items]} | {"tuple": [*items]}:
            for i, child in enumerate(items):
                yield from leaf_nodes(child, _join(where, str(i)))
        case {"array": _} | {"form": _}:
            yield where, node


def _shape(sizes: list[Any]) -> tuple[int, ...]:
    if not all(isinstance(n, int) and n >= 0 for n in sizes):
        raise FileError(f"the header names an impossible shape {sizes}")
    return tuple(sizes)
