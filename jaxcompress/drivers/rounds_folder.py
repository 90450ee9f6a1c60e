"""The rounds of a run in a folder, one file each: what it takes to go on after a kill."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jaxcompress.checkpoint.file import load, read_metadata, save
from jaxcompress.errors import FileError

_KEY = "settings"


def fingerprint(tree: Any) -> str:
    """A checksum of the leaves of a tree, their shapes and dtypes."""
    crc = 0
    for leaf in jax.tree.leaves(tree):
        x = np.asarray(leaf)
        crc = zlib.crc32(f"{x.shape}{x.dtype}".encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data, crc)
    return f"{crc:08x}"


class RoundsFolder:
    """Reads and writes rounds.

    A file is written beside its target and renamed (see `save`), so a round is there as a whole
    or not at all. Leaves are stored as a list: their places are those of the structure, which the
    caller has, so that any container will do.

    Raises:
      FileError: for a folder that holds rounds of other settings.
    """

    def __init__(
        self, folder: str | os.PathLike[str], settings: Mapping[str, Any], structure: Any
    ) -> None:
        self._folder = Path(folder)
        self._settings = json.loads(json.dumps(settings))
        self._structure = structure
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self._folder.glob("round-*.safetensors")):
            self._check(path)

    def read(self, number: int) -> tuple[Any, Any, Any] | None:
        """The params, the masks and the early point of a round, or None when it is not there."""
        path = self._path(number)
        if not path.exists():
            return None
        kept = load(path)
        masks = [optax.MaskedNode() if x is None else x for x in kept["masks"]]
        early = kept["early"]
        return (
            jax.tree.unflatten(self._structure, kept["params"]),
            jax.tree.unflatten(self._structure, masks),
            None if early is None else jax.tree.unflatten(self._structure, early),
        )

    def write(self, number: int, params: Any, masks: Any, early: Any) -> None:
        """Keeps a round."""
        free = lambda x: x is None or isinstance(x, optax.MaskedNode)
        tree = {
            "params": jax.tree.leaves(params),
            "masks": [None if free(x) else x for x in self._structure.flatten_up_to(masks)],
            "early": None if early is None else jax.tree.leaves(early),
        }
        save(self._path(number), tree, {_KEY: json.dumps(self._settings)})

    def _path(self, number: int) -> Path:
        return self._folder / f"round-{number:02d}.safetensors"

    def _check(self, path: Path) -> None:
        text = read_metadata(path).get(_KEY)
        there = {} if text is None else json.loads(text)
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
