"""`save` and `load`: a tree in one safetensors file."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
from jax import numpy as jnp

from jaxcompress.checkpoint.tree import Reader, decode, encode
from jaxcompress.errors import FileError

VERSION = 1
_KEY = "jaxcompress"

# Names of the dtypes in a safetensors header.
_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16",
    "U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
}  # fmt: skip
_CODES = {name: code for code, name in _DTYPES.items()}


def save(
    path: str | os.PathLike[str], tree: Any, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a tree, compressed leaves in their small form, to one safetensors file.

    The file is an ordinary safetensors file: its tensors are the dense leaves and the children of
    the compressed ones, named by path, and its header's metadata hold the structure of the tree
    and the forms of its leaves. It is written beside the target and renamed, so that a reader never
    sees half of it and an older file stays until the new one is whole. Equal trees give
    equal bytes: keys are sorted.

    Args:
      path: the file to write.
      tree: a pytree of arrays, compressed leaves, numbers and strings. Dicts, lists and tuples come
        back as they are; other containers come back as dicts (see `load`'s `like`).
      metadata: further strings for the header, returned by `read_metadata`.

    Raises:
      FileError: for a leaf that cannot be saved, or metadata that are no strings.
      OSError: when the folder is missing or the disk is full; an older file is left whole.

    Example:
      >>> import tempfile, os, jax.numpy as jnp, jaxcompress as jc
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "small.safetensors")
      ...     jc.save(path, {"kernel": jc.Quantize("int8")(jnp.ones((64, 64)))})
      ...     jc.load(path)
      {'kernel': QuantizedArray(float32[64, 64], int8)}
    """
    tensors: dict[str, Any] = {}
    described = encode(tree, tensors)
    header = {_KEY: _json({"version": VERSION, "tree": described})}
    for name, value in (metadata or {}).items():
        if not isinstance(name, str) or not isinstance(value, str) or name == _KEY:
            raise FileError(
                f"metadata {name!r}: {value!r} must be strings, and not named {_KEY!r}; "
                "use json.dumps for anything richer"
            )
        header[name] = value
    # The widest dtypes come first, so that every tensor lies at a multiple of its item size.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    _write(Path(path), {name: tensors[name] for name in names}, header)


def _json(value: Any) -> str:
    """JSON in UTF-8, which readers of the format insist on: no half of a surrogate pair."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 20) : error.end + 20]
        raise FileError(f"{near!r} is no valid text and cannot be saved: {error}") from error
    return text


def _header(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """The head of a safetensors file, up to the first tensor.

    Written here because the library keeps metadata in a hash map, in another order each time.
    """
    head: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, array in tensors.items():
        start, end = end, end + array.size * array.dtype.itemsize
        code = _CODES.get(array.dtype.name, "U8")
        head[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [start, end]}
    text = _json(head).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Writes beside the target, flushes to the disk, and renames."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(_header(tensors, metadata))
            for array in tensors.values():  # one at a time comes from its device
                file.write(_raw(array))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _raw(array: Any) -> memoryview:
    little = np.asarray(array).astype(np.dtype(array.dtype).newbyteorder("<"), copy=False)
    return np.ascontiguousarray(little).reshape(-1).view(np.uint8).data


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


@contextlib.contextmanager
def _opened(path: Path) -> Any:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except FileNotFoundError:
        raise
    except (safetensors.SafetensorError, OSError) as error:
        raise FileError(f"{path}: not a whole safetensors file: {error}") from error


def _described(path: Path, file: Any) -> Any:
    text = (file.metadata() or {}).get(_KEY)
    if text is None:
        raise FileError(
            f"{path}: a safetensors file that jaxcompress did not write; read it with "
            "safetensors.numpy.load_file and pass the tree to jc.compress"
        )
    try:
        header = json.loads(text)
        version, tree = header["version"], header["tree"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FileError(f"{path}: the header is damaged: {error!r}") from error
    if version != VERSION:
        raise FileError(
            f"{path}: written in version {version!r} of the format, this jaxcompress reads "
            f"version {VERSION}; update jaxcompress"
        )
    return tree


def load(path: str | os.PathLike[str], *, lazy: bool = False, like: Any = None) -> Any:
    """Reads a tree that `save` wrote, its leaves in their small form.

    Nothing in the file is executed, and no other file is read.

    Args:
      path: the file.
      lazy: leave each leaf in the file as a `LazyArray` with its shape and dtype, which reads it
        on `load()`; `compress` reads such leaves one at a time. The file must stay as it is.
      like: a tree whose containers the result should have (NNX state, named tuples, frozen
        dicts); its leaves only count by their paths.

    Returns:
      The tree.

    Raises:
      FileNotFoundError: when there is no such file.
      FileError: when it is truncated, damaged, from a newer version, not ours, or holds a form of
        leaf that no imported package registers.
    """
    path = Path(path)
    if path.is_dir():
        raise FileError(f"{path} is a folder; name the file in it")
    with _opened(path) as file:
        described = _described(path, file)
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        infos = {name: (tuple(v.get_shape()), v.get_dtype()) for name, v in views.items()}

        def info(name: str) -> tuple[tuple[int, ...], np.dtype]:
            if name not in infos:
                raise FileError(f"{path}: the header names a tensor {name!r} that is not there")
            shape, code = infos[name]
            if code not in _DTYPES:
                raise FileError(f"{path}: tensor {name!r} has the unknown dtype {code!r}")
            return shape, jnp.dtype(_DTYPES[code])

        def read(name: str) -> np.ndarray:
            info(name)
            return file.get_tensor(name)

        def read_later(name: str) -> np.ndarray:
            with _opened(path) as again:
                return again.get_tensor(name)

        tree = decode(described, Reader(path, info, read_later if lazy else read), lazy=lazy)
    return tree if like is None else _into(path, like, tree)


def _into(path: Path, like: Any, tree: Any) -> Any:
    """The leaves of `tree` in the containers of `like`, matched by path."""
    from jaxcompress.rules import flatten

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


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The strings that `save` was given as `metadata`."""
    with _opened(Path(path)) as file:
        return {k: v for k, v in (file.metadata() or {}).items() if k != _KEY}
