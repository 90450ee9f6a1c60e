"""The shape of a tree as plain JSON: what a file's header says of its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import CompressedArray, is_compressed
from jaxcompress.arrays.layout import Layout
from jaxcompress.checkpoint.container import CODES
from jaxcompress.checkpoint.nodes import is_dtype, join
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
        nodes = [(name, self.encode(x, join(path, str(name)), held)) for name, x in children]
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
        if isinstance(leaf, CompressedArray):
            return self._compressed(leaf, path, leaf.layouts(), held)
        if isinstance(leaf, _LEAVES):
            return self._array(leaf, path, None, held)
        return self.encode(leaf, path, held)  # a lazy leaf may give a plain value

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
            if dtype.itemsize != 1 or not is_dtype(dtype.name) or dtype.names:
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
        def child(name: str, value: Any, where: str) -> Any:
            if type(value) is tuple:
                parts = enumerate(value)
                return {"tuple": [child(name, x, f"{where}.{i}") for i, x in parts]}
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

        children = {
            name: child(name, getattr(leaf, name), f"{path}.{name}") for name in leaf.children
        }
        return {
            "form": leaf.form,
            "shape": list(leaf.shape),
            "dtype": np.dtype(leaf.dtype).name,
            "static": {n: _to_json(getattr(leaf, n), f"{path}.{n}") for n in leaf.static},
            "children": children,
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
            yield from leaves_in_order(child, path if kind == "wrapper" else join(path, str(name)))


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
