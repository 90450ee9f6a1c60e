"""Dense weights as other tools read them: safetensors, npz, Flax msgpack."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import materialize
from jaxcompress.checkpoint.container import DTYPES, Entry, bytes_of, replacing, write_container
from jaxcompress.compress import decompress
from jaxcompress.errors import FileError
from jaxcompress.lazy import LazyArray
from jaxcompress.rules import flatten

_CODES = {name: code for code, name in DTYPES.items()}
FORMATS = (".safetensors", ".npz", ".msgpack")


def export(path: Path, tree: Any, separator: str = ".", dtype: Any = None) -> None:
    """Writes a tree, every leaf dense, by the suffix of the path; one leaf at a time is expanded.

    Args:
      path: the file, written beside and renamed.
      tree: leaves may be compressed or lazy.
      separator: joins the keys to names, but in msgpack, which keeps dicts.
      dtype: for floating leaves; None keeps theirs.

    Raises:
      FileError: for another suffix, or a leaf that the format cannot hold.
    """
    if path.suffix not in FORMATS:
        raise FileError(f"{path}: write a name that ends in {', '.join(FORMATS)}")
    if path.suffix == ".msgpack":
        _write_msgpack(path, tree, dtype)
        return
    leaves = _named(tree, separator)
    (_write_safetensors if path.suffix == ".safetensors" else _write_npz)(path, leaves, dtype)


def _named(tree: Any, separator: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, leaf in flatten(tree)[0]:
        name = name.replace("/", separator) or "array"
        if name in out:
            raise FileError(
                f"two leaves would be named {name!r}; write a .msgpack, which has dicts"
            )
        if isinstance(leaf, str):
            raise FileError(f"{name!r} is a text, not an array; write a .msgpack to keep it")
        out[name] = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return out


def _target(leaf: Any, dtype: Any) -> np.dtype:
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return np.dtype(jnp.dtype(dtype) if dtype is not None and floating else leaf.dtype)


def _dense(leaf: Any, dtype: Any) -> np.ndarray:
    loaded = leaf.load() if isinstance(leaf, LazyArray) else leaf
    target = _target(leaf, dtype)
    host = np.asarray(materialize(loaded)).astype(target, copy=False)
    little = host.astype(target.newbyteorder("<"), copy=False)
    return np.ascontiguousarray(little).reshape(host.shape)


def _write_safetensors(path: Path, leaves: dict[str, Any], dtype: Any) -> None:
    def entry(name: str, leaf: Any) -> Entry:
        target = _target(leaf, dtype)
        code = _CODES.get(target.name)
        if code is None:
            raise FileError(f"{name!r} has dtype {target}, which safetensors does not hold")

        raw = lambda: _dense(leaf, dtype).reshape(-1).view(np.uint8).data
        nbytes = math.prod(leaf.shape) * target.itemsize
        return Entry(name, code, tuple(leaf.shape), nbytes, bytes_of(raw))

    write_container(path, [entry(*item) for item in leaves.items()], lambda _: {}, checked=False)


def _write_npz(path: Path, leaves: dict[str, Any], dtype: Any) -> None:
    for name, leaf in leaves.items():
        if _target(leaf, dtype).kind not in "biufc":
            raise FileError(f"{name!r} is {leaf.dtype}, which npz does not keep; write a .msgpack")
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, leaf in leaves.items():
            # The date of the archive's format, so that equal trees give equal bytes.
            info = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            with archive.open(info, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, _dense(leaf, dtype), allow_pickle=False)


def _write_msgpack(path: Path, tree: Any, dtype: Any) -> None:
    from flax import serialization

    dense = jax.tree.map(lambda x: _dense(x, dtype) if hasattr(x, "dtype") else x, decompress(tree))
    with replacing(path) as file:
        file.write(serialization.msgpack_serialize(serialization.to_state_dict(dense)))
