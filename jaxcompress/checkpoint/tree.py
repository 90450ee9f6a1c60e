"""The shape of a tree as plain JSON, and back: what a file's header says of its tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import CompressedArray, array_type, is_compressed
from jaxcompress.errors import FileError
from jaxcompress.lazy import LazyArray
from jaxcompress.rules import is_wrapper_key, path_str

# Names of the dtypes that a safetensors file knows and numpy can hold.
NATIVE = {
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
    "float16", "bfloat16", "float32", "float64", "complex64",
}  # fmt: skip


def encode(tree: Any, tensors: dict[str, Any], path: str = "") -> Any:
    """Describes a tree as JSON and collects its arrays under their paths in `tensors`.

    Dicts (by sorted keys), lists and tuples keep their kind. Other containers (NNX state, frozen
    dicts, named tuples) become dicts of their children, and wrappers of one value become the value.

    Raises:
      FileError: for a leaf that is no array, number or string; names its path.
    """
    if tree is None:
        return None
    if is_compressed(tree):
        return _encode_leaf(tree, tensors, path)
    if isinstance(tree, LazyArray):
        return encode(tree.load(), tensors, path)
    if isinstance(tree, (jax.Array, np.ndarray, np.generic)):  # np.float64 is a float as well
        return _encode_array(tree, tensors, path)
    if isinstance(tree, (bool, int, float, str)):
        return {"value": tree}
    if isinstance(tree, Mapping):
        for name in tree:
            if not isinstance(name, (str, int)) or isinstance(name, bool):
                raise FileError(f"{path or 'the tree'}: key {name!r} is neither string nor integer")
        names = sorted(tree, key=lambda name: (isinstance(name, str), name))
        return {
            "dict": [[name, encode(tree[name], tensors, _join(path, str(name)))] for name in names]
        }
    if type(tree) in (list, tuple):
        items = [encode(x, tensors, _join(path, str(i))) for i, x in enumerate(tree)]
        return {"list" if type(tree) is list else "tuple": items}
    children = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)[0]
    if len(children) == 1 and children[0][1] is tree:
        raise FileError(
            f"{path or 'the tree'}: a {type(tree).__name__} cannot be saved; keep arrays, numbers "
            "and strings in the tree"
        )
    if len(children) == 1 and is_wrapper_key(children[0][0][0]):
        return encode(children[0][1], tensors, path)
    named = [(path_str(keys), child) for keys, child in children]
    return {"dict": [[name, encode(child, tensors, _join(path, name))] for name, child in named]}


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _encode_array(array: Any, tensors: dict[str, Any], path: str) -> Any:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        raise FileError(f"{path}: a random key cannot be saved; save jax.random.key_data(key)")
    name = path or "array"
    # An integer and a string key may read alike, and one name is the header's own.
    while name in tensors or name == "__metadata__":
        name += "'"
    node = {"array": name}
    dtype = np.dtype(array.dtype)
    if dtype.name not in NATIVE:
        if dtype.itemsize != 1 or dtype.kind not in "Vf":
            raise FileError(f"{path}: arrays of dtype {dtype} cannot be saved")
        node["dtype"] = dtype.name
    tensors[name] = array
    return node


def _encode_leaf(leaf: CompressedArray, tensors: dict[str, Any], path: str) -> Any:
    return {
        "form": leaf.form,
        "shape": list(leaf.shape),
        "dtype": np.dtype(leaf.dtype).name,
        "static": {name: _to_json(getattr(leaf, name), f"{path}.{name}") for name in leaf.static},
        "children": {
            name: encode(getattr(leaf, name), tensors, f"{path}.{name}") for name in leaf.children
        },
    }


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
            return _dtype(value["dtype"])
        if set(value) == {"tuple"}:
            return tuple(_from_json(v) for v in value["tuple"])
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise FileError(f"the header holds {value!r} where a plain value belongs")


def _dtype(name: Any) -> np.dtype:
    # Numpy reads more than names, structured dtypes among them.
    if isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9_]*", name):
        with contextlib.suppress(TypeError):
            dtype = jnp.dtype(name)
            if dtype.name == name and dtype.kind in "biufcV":
                return dtype
    raise FileError(f"the header names an unknown dtype {name!r}")


@dataclasses.dataclass(frozen=True)
class Reader:
    """How a tensor is read, and what the file says of it.

    Attributes:
      path: the file, for messages.
      info: shape and dtype of a tensor, by name.
      read: the tensor, by name.
    """

    path: Path
    info: Callable[[str], tuple[tuple[int, ...], np.dtype]]
    read: Callable[[str], np.ndarray]


@contextlib.contextmanager
def _damage_told(reader: Reader) -> Iterator[None]:
    """Whatever a damaged description sets off becomes one kind of error."""
    try:
        yield
    except FileError as error:
        told = str(error)
        raise FileError(told if str(reader.path) in told else f"{reader.path}: {told}") from error
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise FileError(f"{reader.path}: the header is damaged: {error!r}") from error


def decode(node: Any, reader: Reader, *, lazy: bool) -> Any:
    """Builds the tree that `encode` described.

    Raises:
      FileError: when the description is damaged or names a form that is not registered.
    """
    with _damage_told(reader):
        return _decode(node, reader, lazy, "")


def _decode(node: Any, reader: Reader, lazy: bool, where: str) -> Any:
    """One node; `where` is its path, for messages."""
    match node:
        case None:
            return None
        case {"value": value} if isinstance(value, (bool, int, float, str)):
            return value
        case {"dict": [*items]}:
            out = {}
            for item in items:
                match item:
                    case [str() | int() as name, child]:
                        out[name] = _decode(child, reader, lazy, _join(where, str(name)))
                    case _:
                        raise FileError("the header's tree is damaged: a dict item is no pair")
            return out
        case {"list": [*items]}:
            return _decode_items(items, reader, lazy, where)
        case {"tuple": [*items]}:
            return tuple(_decode_items(items, reader, lazy, where))
        case {"array": str() as name}:
            shape, dtype = reader.info(name)
            if "dtype" in node:
                dtype = _dtype(node["dtype"])
            if lazy:
                size = math.prod(shape) * dtype.itemsize
                return LazyArray(shape, dtype, size, lambda: _later(_read_array, node, reader))
            return _read_array(node, reader)
        case {"form": str(), "static": dict(), "children": dict(), "shape": list(), "dtype": _}:
            if lazy:
                size = sum(_nbytes(child, reader) for child in node["children"].values())
                shape, dtype = _shape(node["shape"]), _dtype(node["dtype"])
                return LazyArray(
                    shape, dtype, size, lambda: _later(_read_leaf, node, reader, where)
                )
            return _read_leaf(node, reader, where)
    raise FileError("the header's tree is damaged: an unknown kind of node")


def _decode_items(items: list[Any], reader: Reader, lazy: bool, where: str) -> list[Any]:
    return [_decode(x, reader, lazy, _join(where, str(i))) for i, x in enumerate(items)]


def _later(read: Callable[..., Any], node: Any, reader: Reader, *where: str) -> Any:
    with _damage_told(reader):
        return read(node, reader, *where)


def _shape(sizes: list[Any]) -> tuple[int, ...]:
    if not all(isinstance(n, int) and n >= 0 for n in sizes):
        raise FileError(f"the header names an impossible shape {sizes}")
    return tuple(sizes)


def _nbytes(node: Any, reader: Reader) -> int:
    if node is None:
        return 0
    if "array" in node:
        shape, dtype = reader.info(node["array"])
        return math.prod(shape) * dtype.itemsize
    return sum(_nbytes(child, reader) for child in node.get("children", {}).values())


def _read_array(node: dict[str, Any], reader: Reader) -> jax.Array | np.ndarray:
    array = reader.read(node["array"])
    if "dtype" in node:
        array = array.view(_dtype(node["dtype"]))
    # Without `jax_enable_x64` a jax array has no 64-bit dtype, and would lose half of the value.
    narrowed = jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype
    return array if narrowed else jnp.asarray(array)


def _read_leaf(node: dict[str, Any], reader: Reader, where: str) -> CompressedArray:
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
            f"{damaged}: its fields {sorted(node['children'])} and {sorted(node['static'])} are "
            f"not those of {cls.__name__}, {sorted(cls.children)} and {sorted(cls.static)}"
        )
    children = {
        name: _decode(child, reader, False, f"{where}.{name}")
        for name, child in node["children"].items()
    }
    for name, child in children.items():
        if not (
            child is None or is_compressed(child) or isinstance(child, (jax.Array, np.ndarray))
        ):
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
