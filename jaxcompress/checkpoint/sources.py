"""`open_params`: the weights that other tools wrote, lazily where their format allows."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.checkpoint.container import (
    DTYPES,
    Container,
    is_name,
    looks_like_safetensors,
    open_container,
    parse_json,
    refuse_pickle,
)
from jaxcompress.checkpoint.decoder import as_array
from jaxcompress.checkpoint.file import is_ours, load
from jaxcompress.errors import FileError
from jaxcompress.lazy import LazyArray


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights from a file or folder.

    Attributes:
      kind: `jaxcompress`, `safetensors`, `hugging face`, `npz`, `msgpack` or `orbax`.
      tree: nested dicts of lazy or loaded leaves.
      files: what is read for it.
      separator: what stood between the keys in the file's names, or None for a real tree.
    """

    kind: str
    tree: Any
    files: tuple[Path, ...]
    separator: str | None = None


def open_params(path: Any) -> Any:
    """Opens the weights in a file or folder of any known kind as a tree of lazy leaves.

    Known are files of `save`; safetensors files; a Hugging Face folder with one of them, or with
    several and an index; `.npz` files; Flax `.msgpack` files (read as a whole); and Orbax folders.
    Names such as `encoder.layer.0.weight` or `encoder/kernel` become nested dicts. Nothing is
    executed: pickles are refused, also inside of other files, and an index cannot name a file
    outside of its folder.

    Args:
      path: the file or folder.

    Returns:
      The tree; `compress` and `save` read it leaf by leaf.

    Raises:
      FileNotFoundError: when there is nothing.
      FileError: when it is damaged, or of another kind.

    Examples:
      >>> import tempfile, os, numpy as np, jaxcompress as jc
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "params.npz")
      ...     np.savez(path, **{"dense/kernel": np.ones((4, 2), np.float32)})
      ...     jc.open_params(path)
      {'dense': {'kernel': LazyArray(float32[4, 2])}}
    """
    return open_source(path).tree


def open_source(path: Any) -> Source:
    """What `open_params` opens, with its kind."""
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if path.name.endswith(".safetensors.index.json"):
        return _open_sharded(path)
    if looks_like_safetensors(path):  # whatever it is called
        container = open_container(path)
        if is_ours(container):
            separator = container.metadata.get(SEPARATOR)
            return Source("jaxcompress", load(path, lazy=True), (path,), separator)
        return _named("safetensors", _lazy_tensors(container, container.tensors), path)
    with open(path, "rb") as file:
        first = file.read(8)
    if path.suffix == ".msgpack":
        return _open_msgpack(path)
    if first[:4] == b"PK\x03\x04":
        return _open_npz(path)
    if path.suffix in (".npz", ".npy"):
        raise FileError(f"{path}: not a whole npz file; write one with np.savez")
    if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"):
        refuse_pickle(path, b"\x80\x04")
    open_container(path)  # says what is wrong with it
    raise FileError(f"{path}: not a whole safetensors file")


# The key under which the command line keeps a source's separator in the metadata of its output.
SEPARATOR = "separator"
_DEEPEST = 100  # more parts make a name no tree


def _named(kind: str, leaves: Mapping[str, Any], *files: Path) -> Source:
    """Leaves by names with separators, as nested dicts where the names allow it."""
    separator = "/" if any("/" in name for name in leaves) else "."
    flat = Source(kind, dict(leaves), files, "/")
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split(separator)
        if len(parents) > _DEEPEST:
            return flat
        place: Any = tree
        for key in parents:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                return flat
        if last in place:  # one name goes on where another ends
            return flat
        place[last] = leaf
    return Source(kind, tree, files, separator)


def _lazy_tensors(container: Container, names: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    def one(name: str) -> LazyArray:
        code, shape, start, stop = container.tensors[name]
        if code not in DTYPES:
            raise FileError(
                f"{container.path}: tensor {name!r} has dtype {code!r}, which is not read"
            )
        dtype = np.dtype(jnp.dtype(DTYPES[code]))

        def read() -> Any:
            data = container.read(name).view(dtype.newbyteorder("<"))
            return as_array(data.reshape(shape).astype(dtype, copy=False))

        return LazyArray(shape, dtype, stop - start, read)

    return {name: one(name) for name in names}


def _open_folder(path: Path) -> Source:
    indices = sorted(path.glob("*.safetensors.index.json"))
    files = sorted(path.glob("*.safetensors"))
    if len(indices) == 1:
        return _open_sharded(indices[0])
    if len(files) == 1 and not indices:
        return open_source(files[0])
    if len(files) > 1 or indices:
        names = ", ".join(x.name for x in (indices or files)[:4])
        raise FileError(f"{path} holds several models ({names}); name the one to open")
    if (path / "_METADATA").exists() or (path / "_CHECKPOINT_METADATA").exists():
        return _open_orbax(path)
    msgpacks = sorted(path.glob("*.msgpack"))
    if len(msgpacks) == 1:
        return _open_msgpack(msgpacks[0])
    steps = sorted(x.name for x in path.iterdir() if x.is_dir())
    hint = f"; name one of its folders, such as {path / steps[-1]}" if steps else ""
    raise FileError(f"{path} holds no weights that are known: no safetensors, no Orbax{hint}")


def _open_sharded(index: Path) -> Source:
    """A Hugging Face index: which of the files beside it holds each tensor."""
    weight_map = parse_json(index, index.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileError(f"{index}: there is no 'weight_map' from tensors to files")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not is_name(shard):
            raise FileError(
                f"{index}: {name!r} lies in {shard!r}, which is no file beside the index; write "
                "the plain name of one"
            )
        shards.setdefault(shard, []).append(name)
    leaves: dict[str, Any] = {}
    for shard, names in shards.items():
        if not (index.parent / shard).exists():
            raise FileError(f"{index}: the file {shard!r} that it names is missing")
        container = open_container(index.parent / shard)
        if is_ours(container):
            raise FileError(f"{index}: {shard!r} is a file of jaxcompress; open it by itself")
        missing = [name for name in names if name not in container.tensors]
        if missing:
            raise FileError(f"{index}: {shard!r} does not hold {missing[0]!r}")
        leaves.update(_lazy_tensors(container, names))
    files = (index, *(index.parent / shard for shard in shards))
    return _named("hugging face", {name: leaves[name] for name in weight_map}, *files)


def _open_npz(path: Path) -> Source:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            others = [info.filename for info in infos if not info.filename.endswith(".npy")]
            if others:
                refuse_pickle(path, b"PK\x03\x04")
            names = [info.filename.removesuffix(".npy") for info in infos]
            if len(set(names)) < len(names):
                raise FileError(f"{path}: it holds an array twice; which one counts?")
            leaves = {name: _lazy_member(path, archive, name) for name in names}
    except FileError:
        raise
    except Exception as error:  # zip, zlib and numpy's parser of headers raise much
        raise FileError(f"{path}: not a whole npz file: {error}") from error
    return _named("npz", leaves, path)


def _lazy_member(path: Path, archive: zipfile.ZipFile, name: str) -> LazyArray:
    info = archive.getinfo(name + ".npy")
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise FileError(f"{path}: array {name!r} is of the unknown version {version}")
        shape, _, dtype = read_header(file)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if dtype.hasobject:
            raise FileError(
                f"{path}: array {name!r} holds pickled objects, which could run code; save arrays "
                "of numbers"
            )
        if dtype.kind not in "biufc":
            raise FileError(
                f"{path}: array {name!r} has dtype {dtype}; numpy does not keep bfloat16, so cast "
                "to float32 before np.savez"
            )
        if file.tell() + nbytes != info.file_size:
            raise FileError(f"{path}: array {name!r} is not as long as its header says")

    def read() -> Any:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return as_array(arrays[name])
        except Exception as error:
            raise FileError(f"{path}: array {name!r} is damaged: {error}") from error

    return LazyArray(tuple(shape), dtype.newbyteorder("="), nbytes, read)


def _open_msgpack(path: Path) -> Source:
    from flax import serialization

    data = path.read_bytes()
    refuse_pickle(path, data[:8])
    try:
        tree = serialization.msgpack_restore(data)
    except Exception as error:  # it raises much, depending on where the bytes go wrong
        raise FileError(f"{path}: not a whole Flax msgpack file: {error}") from error
    if not isinstance(tree, dict):
        raise FileError(f"{path}: a Flax msgpack file holds a dict of arrays, not {tree!r:.40}")
    return Source("msgpack", tree, (path,))


@contextlib.contextmanager
def _orbax_quiet() -> Iterator[Any]:
    """Orbax's reader, without what it tells of its own progress."""
    import orbax.checkpoint as ocp

    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield ocp
    finally:
        logger.setLevel(level)


def _open_orbax(path: Path) -> Source:
    with _orbax_quiet() as ocp:
        try:
            found = ocp.PyTreeCheckpointer().metadata(path.absolute())
            tree = getattr(found.item_metadata, "tree", None)
        except Exception as error:  # a damaged folder shows in many ways
            raise FileError(f"{path}: not a whole Orbax checkpoint: {error}") from error
    if tree is None:
        raise FileError(f"{path}: an Orbax checkpoint without a tree of arrays")
    leaves, structure = jax.tree.flatten(tree)

    def one(i: int) -> Any:
        shape, dtype = getattr(leaves[i], "shape", None), getattr(leaves[i], "dtype", None)
        if shape is None or dtype is None:
            return _read_orbax(path, structure, i)
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        return LazyArray(
            tuple(shape), np.dtype(dtype), nbytes, lambda: _read_orbax(path, structure, i)
        )

    found = jax.tree.unflatten(structure, [one(i) for i in range(len(leaves))])
    return Source("orbax", found, (path,))


def _read_orbax(path: Path, structure: Any, i: int) -> Any:
    """One leaf of a checkpoint, all others left where they are."""
    with _orbax_quiet() as ocp:
        wanted = [ocp.PLACEHOLDER] * structure.num_leaves
        wanted[i] = 0
        item = jax.tree.unflatten(structure, wanted)
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        args = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
        try:
            found = ocp.PyTreeCheckpointer().restore(path.absolute(), args=args)
        except Exception as error:
            raise FileError(f"{path}: not a whole Orbax checkpoint: {error}") from error
    return as_array(np.asarray(jax.tree.leaves(found)[i]))
