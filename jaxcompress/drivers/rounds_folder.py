"""The rounds of a run in a folder, one file each: what it takes to go on after a kill."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from jaxcompress.arrays.base import is_compressed
from jaxcompress.checkpoint.file import load, read_metadata, save
from jaxcompress.errors import FileError, SpecError
from jaxcompress.rules import flatten

_SETTINGS, _NUMBER = "settings", "round"


def fingerprint(tree: Any) -> str:
    """A checksum of the leaves of a tree, their paths, shapes and dtypes.

    Raises:
      SpecError: for a leaf that is no array, key, number or text.
    """
    crc = 0
    for path, leaf in _parts(tree):
        kind, x = _described(path, leaf)
        crc = zlib.crc32(f"{path!r} {kind}{x.shape}{x.dtype}".encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data, crc)
    return f"{crc:08x}"


def name_of(fn: Callable[..., Any]) -> str:
    """The module and the name of a function, by which two of them are told apart.

    Raises:
      SpecError: for a lambda, a partial, or what else has no name of its own.

    Examples:
      >>> name_of(fingerprint)
      'jaxcompress.drivers.rounds_folder.fingerprint'
    """
    name = getattr(fn, "__qualname__", None)
    if name is None or "<lambda>" in name.rpartition(".")[2]:
        raise SpecError(
            f"score={fn!r} has no name to keep in the folder, so that another could take its place "
            "when the run goes on; write it as a function, with def"
        )
    return f"{getattr(fn, '__module__', None)}.{name}"


class RoundsFolder:
    """Reads and writes rounds.

    A file is written beside its target and renamed (see `save`), so a round is there as a whole
    or not at all. Leaves are stored as a list: their places are those of the structure, which the
    caller has, so that any container will do.

    Args:
      folder: where they are.
      settings: what the run is, with which each file must agree; plain JSON values.
      params: the tree whose structure and places in memory rounds have when they are read.

    Raises:
      FileError: for a folder that holds rounds of other settings, or links.
    """

    def __init__(
        self, folder: str | os.PathLike[str], settings: Mapping[str, Any], params: Any
    ) -> None:
        self._folder = Path(folder)
        self._settings = json.loads(json.dumps(settings))
        self._structure: Any = jax.tree.structure(params, is_leaf=is_compressed)
        self._leaves = jax.tree.leaves(params, is_leaf=is_compressed)
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._files():
            self._check(path)

    def read(self, number: int) -> tuple[Any, Any, Any] | None:
        """The params, the masks and the early point of a round, or None when it is not there."""
        path = self._path(number)
        if not (path.exists() or path.is_symlink()):
            return None
        self._check(path)
        kept = load(path)
        early = kept["early"]
        masks = [optax.MaskedNode() if x is None else x for x in kept["masks"]]
        return (
            self._placed(kept["params"]),
            self._placed(masks),
            None if early is None else self._placed(early),
        )

    def write(self, number: int, params: Any, masks: Any, early: Any) -> None:
        """Keeps a round, and deletes those behind it, which did not come of it.

        So a run that goes through its rounds in order, and trains what `read` does not find, never
        reads a round behind one that it trained.
        """
        for path in self._files():
            if _number_of(path) > number:
                path.unlink()
        free = lambda x: x is None or isinstance(x, optax.MaskedNode)
        tree = {
            "params": _plain(params),
            "masks": [None if free(x) else x for x in self._structure.flatten_up_to(masks)],
            "early": None if early is None else _plain(early),
        }
        metadata = {_SETTINGS: json.dumps(self._settings), _NUMBER: str(number)}
        save(self._path(number), tree, metadata)

    def _path(self, number: int) -> Path:
        return self._folder / f"round-{number:02d}.safetensors"

    def _files(self) -> list[Path]:
        found = self._folder.glob("round-*.safetensors")
        return sorted(path for path in found if _number_of(path) >= 0)

    def _placed(self, leaves: list[Any]) -> Any:
        return jax.tree.unflatten(self._structure, list(map(_placed_as, leaves, self._leaves)))

    def _check(self, path: Path) -> None:
        if path.is_symlink():
            raise FileError(f"{path} is a link, and a round is a file of its own; delete the link")
        metadata = read_metadata(path)
        number = metadata.get(_NUMBER)
        if number is not None and number != str(_number_of(path)):
            raise FileError(f"{path} holds round {number}; give it back its name")
        text = metadata.get(_SETTINGS)
        there = {} if text is None or number is None else json.loads(text)
        for name, here in self._settings.items():
            if there.get(name) != here:
                what = (
                    "other params"
                    if name == "params"
                    else f"{name}={there.get(name)!r}, not {here!r}"
                )
                raise FileError(
                    f"{path} is of a run with {what}; write another folder, or delete this one to "
                    "begin anew"
                )


def _number_of(path: Path) -> int:
    """The number in the name of a round, -1 for the name of something else."""
    digits = path.stem.removeprefix("round-")
    return int(digits) if digits.isdecimal() and digits.isascii() else -1


def _parts(tree: Any) -> Iterator[tuple[str, Any]]:
    """The leaves with their paths, and of a compressed one the form and then the arrays."""
    for path, leaf in flatten(tree)[0]:
        if is_compressed(leaf):
            arrays, form = jax.tree.flatten(leaf)
            yield path, str(form)
            yield from ((f"{path}.{i}", x) for i, x in enumerate(arrays))
        else:
            yield path, leaf


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _described(path: str, leaf: Any) -> tuple[str, np.ndarray]:
    """What a leaf is and holds, as a text and a numpy array of bytes that can be viewed."""
    if _is_key(leaf):
        return str(leaf.dtype), np.asarray(jax.random.key_data(leaf))
    if isinstance(leaf, str):
        return "text", np.frombuffer(leaf.encode(), np.uint8)
    known = isinstance(leaf, (bool, int, float)) or hasattr(leaf, "dtype")
    if not known or np.asarray(leaf).dtype.hasobject:
        raise SpecError(
            f"{path}: a {type(leaf).__name__} cannot be kept in a folder; take it out of the params"
        )
    return "", np.asarray(leaf)


def _plain(tree: Any) -> list[Any]:
    """The leaves as a file takes them, compressed ones whole."""
    leaves = jax.tree.leaves(tree, is_leaf=is_compressed)
    return [jax.random.key_data(x) if _is_key(x) else x for x in leaves]


def _placed_as(x: Any, like: Any) -> Any:
    """What was read, a key where that was one, on the devices of the leaf that it stands for."""
    if is_compressed(x):
        tied = isinstance(like, jax.Array) and like.committed
        named = tied and isinstance(like.sharding, NamedSharding)
        return jax.device_put(x, x.shardings(like.sharding) if named else None) if tied else x
    if _is_key(like) and hasattr(x, "dtype"):
        x = jax.random.wrap_key_data(jnp.asarray(x), impl=jax.random.key_impl(like))
    if isinstance(like, jax.Array) and hasattr(x, "dtype"):
        x = jnp.asarray(x)
        # Only what the caller has tied to devices: other arrays go where they are needed.
        return jax.device_put(x, like.sharding) if like.committed else x
    return x
