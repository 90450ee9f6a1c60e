"""`save` and `load`: a tree in one safetensors file."""

from __future__ import annotations

import contextlib
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.layout import Layout
from jaxcompress.checkpoint.container import (
    CODES,
    DTYPES,
    Container,
    Entry,
    Spool,
    as_json,
    bytes_of,
    open_container,
    parse_json,
    write_container,
)
from jaxcompress.checkpoint.decoder import Decoder, damage_told
from jaxcompress.checkpoint.encoder import Encoder, leaves_in_order
from jaxcompress.checkpoint.nodes import (
    array_nodes,
    as_dtype,
    as_shape,
    leaf_nodes,
    named_arrays,
)
from jaxcompress.checkpoint.streams import decode_array, encode_array
from jaxcompress.errors import FileError
from jaxcompress.lazy import Ahead, LazyArray
from jaxcompress.progress import progress_bar
from jaxcompress.rules import flatten

if TYPE_CHECKING:  # a recipe stands above files, and a plan is read when it is asked for
    from jaxcompress.pruning.structure.plans import Plan
    from jaxcompress.recipes.recipe import Recipe

VERSION = 2
_KEY = "jaxcompress"
# What a coded stream says of itself in the header; less is not worth the time.
_WORTH = 96


def save(
    path: str | os.PathLike[str],
    tree: Any,
    metadata: Mapping[str, str] | None = None,
    *,
    coded: bool = False,
    recipe: Recipe | None = None,
    plan: Plan | None = None,
    progress: bool = False,
) -> None:
    """Writes a tree, compressed leaves in their small form, to one safetensors file.

    The file is an ordinary safetensors file: its tensors are the dense leaves and the children of
    the compressed ones, named by path, and its header's metadata hold the structure of the tree
    and the forms of its leaves, with a checksum of each tensor and of the header itself. It is
    written beside the target and renamed, so that a reader never sees half of it and an older file
    stays until the new one is whole. Equal trees give equal bytes: keys are sorted. A leaf that
    occurs at several places is stored once.

    Args:
      path: the file to write.
      tree: a pytree of arrays, compressed leaves, numbers and strings. Dicts, lists and tuples come
        back as they are; other containers come back as dicts (see `load`'s `like`). Lazy leaves are
        read, or compressed, one at a time, and never held together.
      metadata: further strings for the header, returned by `read_metadata`.
      coded: entropy-code each tensor that becomes smaller by it: lossless, to about the entropy of
        the codes, indices, masks and scales, at some 40 MB of codes per second when it is
        loaded. Other readers of safetensors then see coded bytes.
      recipe: the recipe that made the tree, to keep inside; `Recipe.of_file` reads it.
      plan: the plan by which channels were removed from the tree (`jaxcompress.pruning.plan`), to
        keep inside; `read_plan` reads it, and `jaxcompress.pruning.shrunk` makes of it the
        function that runs the tree.
      progress: show a progress bar on standard error.

    Raises:
      FileError: for a leaf that cannot be saved, or metadata that are no strings.
      CompressError: for a plan that is not that of the tree.
      OSError: when the folder is missing or the disk is full; an older file is left whole.

    References:
      Duda, *Asymmetric numeral systems*, 2013; Bamler, *Understanding Entropy Coding With
      Asymmetric Numeral Systems (ANS): a Statistician's Perspective*, 2022 (`constriction`).

    Examples:
      >>> import tempfile, os, jax.numpy as jnp, jaxcompress as jc
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "small.safetensors")
      ...     jc.save(path, {"kernel": jc.Quantize("int8")(jnp.ones((64, 64)))})
      ...     jc.load(path)
      {'kernel': QuantizedArray(float32[64, 64], int8)}
    """
    path = Path(path)
    strings = _checked(metadata or {})
    ours: dict[str, Any] = {}
    if recipe is not None:
        ours["recipe"] = recipe.to_yaml()
    if plan is not None:
        plan.check([(where, np.shape(leaf)) for where, leaf in flatten(tree)[0]], whole=False)
        ours["plan"] = plan.to_json()
    try:
        _save(path, tree, strings, coded, ours, progress)
    except RecursionError as error:
        raise FileError(f"{path}: the tree is nested too deeply to be saved") from error


def _save(
    path: Path,
    tree: Any,
    strings: Mapping[str, str],
    coded: bool,
    more: Mapping[str, str],
    progress: bool,
) -> None:
    leaves = list({id(leaf): leaf for leaf in leaves_in_order(tree)}.values())
    ahead = Ahead([leaf for leaf in leaves if isinstance(leaf, LazyArray)])
    with contextlib.closing(_Writer(path, coded)) as writer, contextlib.closing(ahead):
        with progress_bar(progress, "writing", len(leaves) or None) as advance:
            described = Encoder(writer, ahead.load, advance).encode(tree)

        def describe(checksums: list[str]) -> dict[str, str]:
            ours = {"version": VERSION, "crc32": checksums, "tree": described, **more}
            return {_KEY: as_json(ours), **strings}

        write_container(path, writer.entries, describe)


def _checked(metadata: Mapping[str, str]) -> dict[str, str]:
    for name, value in metadata.items():
        if not isinstance(name, str) or not isinstance(value, str) or name.startswith(_KEY):
            raise FileError(
                f"metadata {name!r}: {value!r} must be strings, with names that do not begin with "
                f"{_KEY!r}; use json.dumps for anything richer"
            )
    return dict(sorted(metadata.items()))


class _Writer:
    """Takes the arrays of a tree: coded ones, and those that nobody keeps, go to the disk."""

    def __init__(self, path: Path, coded: bool) -> None:
        self.entries: list[Entry] = []
        self._coded = coded
        self._spool = Spool(path)

    def put(self, name: str, array: Any, layout: Layout | None, held: bool) -> dict[str, Any]:
        shape, dtype = tuple(array.shape), np.dtype(array.dtype)
        if self._coded and math.prod(shape) * dtype.itemsize > _WORTH:
            found = encode_array(_on_host(array), layout)
            if found is not None and len(found[1]) + _WORTH < math.prod(shape) * dtype.itemsize:
                how, data = found
                write = self._spool.put(data)
                self.entries.append(Entry(name, "U8", (len(data),), len(data), write))
                return {"shape": list(shape), "dtype": dtype.name, "coded": how}
        code, nbytes = CODES.get(dtype.name, "U8"), math.prod(shape) * dtype.itemsize

        # What the caller keeps comes from its device when it is written, one at a time.
        write = bytes_of(lambda: _raw(array)) if held else self._spool.put(_raw(array))
        self.entries.append(Entry(name, code, shape, nbytes, write))
        return {}

    def close(self) -> None:
        self._spool.close()


def _on_host(array: Any) -> np.ndarray:
    """An array as numpy has it, in little-endian order."""
    host = np.asarray(array)
    return np.ascontiguousarray(host.astype(host.dtype.newbyteorder("<"), copy=False)).reshape(
        host.shape
    )


def _raw(array: Any) -> memoryview:
    return _on_host(array).reshape(-1).view(np.uint8).data


class _File:
    """The arrays of an opened file."""

    def __init__(self, container: Container, checksums: list[str]) -> None:
        self.path = container.path
        self._container = container
        self._checksums = dict(zip(container.tensors, checksums))

    def info(self, node: Mapping[str, Any]) -> tuple[tuple[int, ...], np.dtype]:
        name = node["array"]
        tensor = self._container.tensors.get(name)
        if tensor is None:
            raise FileError(f"{self.path}: the header names a tensor {name!r} that is not there")
        if "coded" in node:
            return as_shape(node["shape"]), as_dtype(node["dtype"])
        if tensor.code not in DTYPES:
            raise FileError(f"{self.path}: tensor {name!r} has the unknown dtype {tensor.code!r}")
        stored = jnp.dtype(DTYPES[tensor.code])
        return tensor.shape, as_dtype(node["dtype"]) if "dtype" in node else stored

    def read(self, node: Mapping[str, Any]) -> np.ndarray:
        shape, dtype = self.info(node)
        name = node["array"]
        data = self._container.read(name)
        if f"{zlib.crc32(data.data):08x}" != self._checksums[name]:
            raise FileError(f"{self.path}: tensor {name!r} is damaged: its checksum does not match")
        if "coded" in node:
            return decode_array(node["coded"], data.data, shape, dtype)
        return data.view(dtype.newbyteorder("<")).reshape(shape).astype(dtype, copy=False)


def is_ours(container: Container) -> bool:
    """Whether `save` wrote a file."""
    return _KEY in container.metadata


def _ours(container: Container) -> dict[str, Any]:
    """What `save` wrote into a header."""
    path = container.path
    text = container.metadata.get(_KEY)
    if text is None:
        raise FileError(
            f"{path}: a safetensors file that jaxcompress did not write; read it with "
            "jc.open_params and pass the tree to jc.compress"
        )
    header = parse_json(path, text)
    version = header.get("version")
    if version != VERSION:
        raise FileError(
            f"{path}: written in version {version!r} of the format, this jaxcompress reads "
            f"version {VERSION}; " + ("save it anew" if version == 1 else "update jaxcompress")
        )
    if not container.checked:
        raise FileError(f"{path}: the header has no checksum; it was written anew by another tool")
    return header


def _described(container: Container) -> tuple[Any, list[str]]:
    """The tree in a header and the checksums of its tensors."""
    path, header = container.path, _ours(container)
    checksums = header.get("crc32")
    if not isinstance(checksums, list) or len(checksums) != len(container.tensors):
        raise FileError(f"{path}: the header is damaged: it has not one checksum for each tensor")
    return header.get("tree"), checksums


def load(path: str | os.PathLike[str], *, lazy: bool = False, like: Any = None) -> Any:
    """Reads a tree that `save` wrote, its leaves in their small form.

    Nothing in the file is executed, no other file is read, and every byte that is used has been
    checked against its checksum.

    Args:
      path: the file.
      lazy: leave each leaf in the file as a `LazyArray` with its shape and dtype, which reads it
        on `load()`; `compress` reads such leaves one at a time. The file may be replaced by
        another meanwhile, but not changed.
      like: a tree whose containers the result should have (NNX state, named tuples, frozen
        dicts); its leaves only count by their paths.

    Returns:
      The tree. What was one leaf at several places is one again.

    Raises:
      FileNotFoundError: when there is no such file.
      FileError: when it is truncated, damaged, from a newer version, not ours, or holds a form of
        leaf that no imported package registers.
    """
    container = open_container(Path(path))
    described, checksums = _described(container)
    tree = Decoder(_File(container, checksums), lazy=lazy).decode(described)
    return tree if like is None else _into(container.path, like, tree)


def map_arrays(path: str | os.PathLike[str], *, check: bool = True) -> dict[str, np.ndarray]:
    """The tensors of a file that `save` wrote, by name and mapped into memory.

    Each is read once to be checked, and then where it is looked at; memory is the system's to take
    back. All of them hold one open file.

    Args:
      path: the file.
      check: whether to check the tensors; the header is, in any case.

    Raises:
      FileNotFoundError: when there is no such file.
      FileError: as `load`, and for tensors that are coded.
    """
    container = open_container(Path(path))
    described, checksums = _described(container)
    file, sums, out = _File(container, checksums), dict(zip(container.tensors, checksums)), {}
    with damage_told(container.path):
        for node in array_nodes(described):
            name, (shape, dtype) = node["array"], file.info(node)
            if "coded" in node:
                raise FileError(f"{path}: tensor {name!r} is coded, so it cannot be mapped")
            data = container.mapped(name)
            if check and f"{zlib.crc32(data.data):08x}" != sums[name]:
                raise FileError(f"{path}: tensor {name!r} is damaged: its checksum does not match")
            out[name] = data.view(dtype.newbyteorder("<")).reshape(shape)
    return out


class StoredLeaf(NamedTuple):
    """What a header says of one leaf.

    Attributes:
      path: where it lies in the tree.
      shape: of the dense array.
      dtype: of the dense array.
      form: its description, or its bare name when no imported package registers it.
      memory: bytes once loaded.
      parts: bytes in the file by kind of tensor: `dense`, or a child such as `codes` or `scale`.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    form: str
    memory: int
    parts: dict[str, int]


def load_shapes(path: str | os.PathLike[str]) -> Any:
    """The tree in a file with `jax.ShapeDtypeStruct`s for arrays, from its header alone."""
    container = open_container(Path(path))
    described, checksums = _described(container)
    return Decoder(_File(container, checksums), shapes=True).decode(described)


def stored_leaves(path: str | os.PathLike[str]) -> list[StoredLeaf]:
    """The leaves in a file, from its header alone.

    A leaf that occurs at several places takes its bytes where it comes first.

    Raises:
      FileError: as `load`, but for damage outside of the header.
    """
    container = open_container(Path(path))
    described, checksums = _described(container)
    decoder = Decoder(_File(container, checksums), shapes=True)
    counted: set[str] = set()
    out = []
    with damage_told(container.path):
        for where, node in leaf_nodes(described):
            parts: dict[str, int] = {}
            for kind, name in named_arrays(node):
                if name not in counted:
                    counted.add(name)
                    tensor = container.tensors[name]
                    parts[kind] = parts.get(kind, 0) + tensor.stop - tensor.start
            shape, dtype, form = decoder.facts(node, where)
            out.append(StoredLeaf(where, shape, dtype, form, decoder.nbytes(node), parts))
    return out


def _into(path: Path, like: Any, tree: Any) -> Any:
    """The leaves of `tree` in the containers of `like`, matched by path."""
    leaves = flatten(tree)[0]
    loaded = dict(leaves)
    wanted, structure = flatten(like)
    if len(loaded) < len(leaves):
        raise FileError(f"{path} holds two leaves of one path; load it without `like`")
    missing = [name for name, _ in wanted if name not in loaded]
    extra = sorted(set(loaded) - {name for name, _ in wanted})
    if missing or extra:
        raise FileError(
            f"{path} does not hold the tree of `like`: missing {missing[:3]}, extra {extra[:3]}"
        )
    return jax.tree.unflatten(structure, [loaded[name] for name, _ in wanted])


def read_recipe(path: str | os.PathLike[str]) -> str | None:
    """The YAML of the recipe that `save` was given, or None."""
    container = open_container(Path(path))
    text = _ours(container).get("recipe")
    if text is not None and not isinstance(text, str):
        raise FileError(f"{path}: the header is damaged: its recipe is no text")
    return text


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """The plan by which channels were removed from the tree in a file.

    With it and the function of the whole model, another process runs the tree:
    `jaxcompress.pruning.shrunk(fn, jc.read_plan(path))(jc.load(path), x)`.

    Args:
      path: a file that `save` was given a plan for.

    Raises:
      FileNotFoundError: when there is no such file.
      FileError: for a file without a plan, or as `load`.

    Examples:
      >>> import tempfile, os, jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.pruning.structure import LeafPlan, Plan, shrink_params, shrunk
      >>> plan, fn = Plan((LeafPlan("w", (3,), ((0, 2),)),)), lambda p: jnp.sum(p["w"]) / 3
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "small.safetensors")
      ...     jc.save(path, shrink_params({"w": jnp.array([1.0, 4.0, 5.0])}, plan), plan=plan)
      ...     shrunk(fn, read_plan(path))(jc.load(path))
      Array(2., dtype=float32)
    """
    plan = stored_plan(path)
    if plan is None:
        raise FileError(
            f"{path}: no plan was saved in it; save what `shrink` left with jc.save(path, params, "
            "plan=plan)"
        )
    return plan


def stored_plan(path: str | os.PathLike[str]) -> Plan | None:
    """As `read_plan`, and None for a file of ours without a plan."""
    from jaxcompress.pruning.structure.plans import Plan

    text = _ours(open_container(Path(path))).get("plan")
    try:
        return None if text is None else Plan.from_json(text)
    except FileError as error:
        raise FileError(f"{path}: the header is damaged: {error}") from None


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The strings that `save` was given as `metadata`."""
    strings = open_container(Path(path)).metadata
    return {k: v for k, v in strings.items() if not k.startswith(_KEY)}
