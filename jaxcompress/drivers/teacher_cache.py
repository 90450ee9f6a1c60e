"""What a teacher says of a dataset, computed once and kept in a folder."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import compat
from jaxcompress.checkpoint.file import load, map_arrays, read_metadata, save
from jaxcompress.drivers.rounds_folder import fingerprint
from jaxcompress.errors import FileError, SpecError
from jaxcompress.progress import progress_bar
from jaxcompress.rules import path_str

_SETTINGS, _NUMBER = "settings", "shard"
_STRUCTURE = "structure.safetensors"
_OPEN = 128  # files that are mapped at a time: systems give a process some hundreds


def cache_teacher(
    fn: Callable[[Any, Any], Any],
    params: Any,
    inputs: Any,
    folder: str | os.PathLike[str],
    *,
    examples: int | None = None,
    data: str | None = None,
    name: str = "",
    batch_size: int = 256,
    shard_size: int = 4096,
    dtype: jax.typing.DTypeLike | None = None,
    progress: bool = False,
) -> TeacherCache:
    """Runs a teacher over a dataset and keeps what it returns, an entry for each example.

    Outputs go to files of `shard_size` examples, each of which is there as a whole or not at all:
    a run that was killed goes on at the first that is missing, and a finished one reads nothing but
    the headers. The folder remembers checksums of the params, of the inputs and of the program, so
    that the outputs of another teacher, or of other data, are refused.

    Args:
      fn: `fn(params, batch)` returns a pytree of arrays `[batch, ...]`: logits, hidden states, or
        something smaller, such as the largest logits, or codes from
        `jc.Quantize("int8", axis=-1)(logits)`. It is jitted, so it may be a `tap`. It is run
        on batches of one size, the last one filled up with its last example.
      params: the teacher's, dense or compressed.
      inputs: a pytree of arrays `[examples, ...]`, which may be memory-mapped; or a function of
        an integer array of indices that returns their batch.
      folder: where the outputs are; made if there is none.
      examples: how many there are, for inputs by a function.
      data: what stands for the inputs in place of their checksum; required for a function.
      name: what else tells these outputs from others, in words.
      batch_size: examples in one run of `fn`.
      shard_size: examples in one file.
      dtype: of floating outputs, such as `"bfloat16"`; None: as they are.
      progress: show a progress bar on standard error.

    Returns:
      The outputs, to be indexed.

    Raises:
      FileError: for a folder with outputs of another teacher, dataset or sizes. Another version of
        jax may trace a teacher to another program; what is finished, `TeacherCache` opens anyhow.
      SpecError: for no examples, outputs that are not one for each example, two of one path, random
        keys, or sizes below 1.

    References:
      Hinton, Vinyals and Dean, *Distilling the Knowledge in a Neural Network*, 2015 (targets that
      are computed once).

    Examples:
      >>> import tempfile, numpy as np
      >>> x = np.arange(12.0, dtype=np.float32).reshape(6, 2)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     outputs = cache_teacher(lambda w, x: x @ w, np.ones((2, 1)), x, folder)
      ...     outputs[np.array([5, 0])].tolist()
      [[21.0], [1.0]]
    """
    if batch_size < 1 or shard_size < 1:
        raise SpecError(f"batch_size={batch_size}, shard_size={shard_size}: write 1 or more")
    batch_size, shard_size = int(batch_size), int(shard_size)  # numpy's are no JSON
    take, count, mark = _dataset(inputs, examples, data)
    run = jax.jit(lambda params, batch: _cast(fn(params, batch), dtype))
    first = take(np.zeros(min(batch_size, count), np.int64))
    program, shapes = jax.make_jaxpr(run, return_shape=True)(params, first)
    arrays = _named(shapes)
    for path, x in arrays.items():
        if not x.shape or x.shape[0] != min(batch_size, count):
            raise SpecError(
                f"the teacher's {path or 'output'} is {x.dtype}{list(x.shape)} for a batch of "
                f"{min(batch_size, count)}; return one entry for each example, along the first axis"
            )
    settings = {
        "teacher": fingerprint([params, compat.constants(program)]), "name": name, "data": mark,
        "examples": count, "shard_size": shard_size, "batch_size": batch_size,
        "outputs": {path: [str(x.dtype), *x.shape[1:]] for path, x in arrays.items()},
        "program": _told_apart(program),
    }  # fmt: skip
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    for file in sorted(place.glob("*.safetensors")):
        _check(file, settings)
    if not (place / _STRUCTURE).exists():
        one = jax.tree.map(lambda x: np.zeros((1, *x.shape[1:]), x.dtype), shapes)
        save(place / _STRUCTURE, one, _metadata(settings, -1))
    shards = range(-(-count // shard_size))
    with progress_bar(progress, "running the teacher", len(shards)) as advance:
        for k in shards:
            file = _shard(place, k)
            if not file.exists():
                indices = np.arange(k * shard_size, min((k + 1) * shard_size, count))
                kept = _outputs(run, params, take, indices, min(batch_size, count))
                save(file, kept, _metadata(settings, k))
            advance(file.name)
    return TeacherCache(place, like=shapes)


class TeacherCache:
    """The outputs of a teacher in a folder, an entry for each example; nothing is held in memory.

    `cache[indices]` gives the outputs of these examples, as `cache_teacher` was given them: a
    pytree of numpy arrays `[len(indices), ...]`. Files are mapped into memory, and checked when
    they are first looked at.

    Args:
      folder: where `cache_teacher` wrote.
      like: a pytree of the structure of the outputs, for containers that files do not know (named
        tuples, dataclasses); None: dicts, lists, tuples and compressed leaves come back as they
        were, others as dicts.

    Raises:
      FileNotFoundError: when the folder holds no outputs.
      FileError: when files are missing, damaged, or not of one run.

    Examples:
      >>> import tempfile, numpy as np
      >>> x = np.arange(8.0, dtype=np.float32)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = cache_teacher(lambda w, x: {"double": w * x}, 2.0, x, folder, shard_size=3)
      ...     again = TeacherCache(folder)
      ...     len(again), again[np.array([7, 1])]["double"].tolist()
      (8, [14.0, 2.0])
    """

    def __init__(self, folder: str | os.PathLike[str], *, like: Any = None) -> None:
        self.folder = Path(folder)
        first = self.folder / _STRUCTURE
        self._settings = _settings(first)
        self._examples = self._settings["examples"]
        self._size = self._settings["shard_size"]
        tree = load(first) if like is None else like
        self._structure = jax.tree.structure(tree)
        self._names = list(_named(tree))
        if set(self._names) != set(self._settings["outputs"]):
            raise FileError(
                f"{folder} holds {list(self._settings['outputs'])}, and `like` has {self._names}"
            )
        self._maps: dict[int, dict[str, np.ndarray]] = {}  # the one looked at last is the last
        self._checked: set[int] = set()
        for k in range(-(-self._examples // self._size)):
            path = _shard(self.folder, k)
            if not path.exists():
                raise FileError(f"{path} is missing; run cache_teacher again, which goes on there")
            _check(path, self._settings)

    def __len__(self) -> int:
        return self._examples

    def __getitem__(self, indices: Any) -> Any:
        """The outputs of some examples: an integer array, a list or a slice."""
        if isinstance(indices, slice):
            indices = np.arange(self._examples)[indices]
        indices = np.asarray(indices)
        if indices.ndim != 1 or (indices.size and not np.issubdtype(indices.dtype, np.integer)):
            raise SpecError(
                f"indices are {indices.dtype}{list(indices.shape)}: write one axis of integers"
            )
        wrong = (indices < -self._examples) | (indices >= self._examples)
        if wrong.any():
            raise IndexError(f"index {indices[wrong][0]} of {self._examples} examples")
        indices = indices.astype(np.int64) % self._examples
        out = {}
        for name in self._names:
            dtype, *shape = self._settings["outputs"][name]
            out[name] = np.empty((len(indices), *shape), jnp.dtype(dtype))
        for k in np.unique(indices // self._size):
            here, found = indices // self._size == k, self._map(int(k))
            for name, rows in out.items():
                rows[here] = found[name][indices[here] % self._size]
        return jax.tree.unflatten(self._structure, list(out.values()))

    def _map(self, k: int) -> dict[str, np.ndarray]:
        found = self._maps.pop(k, None)
        if found is None:
            path = _shard(self.folder, k)
            found = map_arrays(path, check=k not in self._checked)
            rows = min(self._size, self._examples - k * self._size)
            for name, (dtype, *shape) in self._settings["outputs"].items():
                x = found.get(name)
                if x is None or x.shape != (rows, *shape) or x.dtype != jnp.dtype(dtype):
                    raise FileError(f"{path}: {name!r} is not {rows} examples of {dtype}{shape}")
            self._checked.add(k)
        self._maps[k] = found
        for oldest in list(self._maps)[:-_OPEN]:
            self._maps.pop(oldest, None)
        return found


def _dataset(
    inputs: Any, examples: int | None, data: str | None
) -> tuple[Callable[[np.ndarray], Any], int, str]:
    """A function of indices, the number of examples, and what tells them from others."""
    if callable(inputs):
        if examples is None or data is None:
            raise SpecError("inputs are a function: write examples=, how many, and data=, a name")
        take, count = inputs, int(examples)
    else:
        leaves, tree = jax.tree.flatten(inputs)
        counts = {np.shape(x)[0] if np.ndim(x) else None for x in leaves}
        if len(counts) != 1 or None in counts:
            raise SpecError(
                f"inputs are of {sorted(map(str, counts))} examples; write arrays [examples, ...] "
                "of one number"
            )
        count = int(np.shape(leaves[0])[0])
        if examples is not None and examples != count:
            raise SpecError(f"examples={examples}, and the inputs have {count}")
        take = lambda indices: jax.tree.unflatten(tree, [x[indices] for x in leaves])
    if count < 1:
        raise SpecError("the dataset has no examples")
    return take, count, data if data is not None else fingerprint(inputs)


def _told_apart(program: Any) -> str:
    """A checksum of what a jaxpr says, but for where its functions are in memory."""
    text = re.sub(r"0x[0-9a-f]+", "", str(program))
    return f"{zlib.crc32(text.encode()):08x}"


def _cast(outputs: Any, dtype: Any) -> Any:
    if dtype is None:
        return outputs
    floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: x.astype(dtype) if floating(x) else x, outputs)


def _named(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by path, those within compressed leaves as well."""
    named: dict[str, Any] = {}
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = path_str(path) or "output"
        if name in named:
            raise SpecError(f"two outputs of the teacher are called {name!r}: rename one")
        dtype = getattr(x, "dtype", None)  # of `like`, a leaf may be anything
        if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
            raise SpecError(f"the output {name!r} is a random key: return its jax.random.key_data")
        named[name] = x
    return named


def _outputs(
    run: Any, params: Any, take: Any, indices: np.ndarray, size: int
) -> dict[str, np.ndarray]:
    """The outputs of one shard, by name; a batch runs while the one before it is fetched."""
    pieces: list[Any] = []
    for start in range(0, len(indices), size):
        some = indices[start : start + size]
        full = np.concatenate([some, np.full(size - len(some), some[-1])])
        out = run(params, take(full))
        if pieces:
            pieces[-1] = jax.tree.map(np.asarray, pieces[-1])
        pieces.append({name: x[: len(some)] for name, x in _named(out).items()})
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _shard(folder: Path, k: int) -> Path:
    return folder / f"shard-{k:06d}.safetensors"


def _metadata(settings: dict[str, Any], number: int) -> dict[str, str]:
    return {_SETTINGS: json.dumps(settings), _NUMBER: str(number)}


def _settings(path: Path) -> dict[str, Any]:
    """What a file says of the run that wrote it."""
    text = read_metadata(path).get(_SETTINGS)
    if text is None:
        raise FileError(f"{path} is not of a teacher's outputs; write another folder")
    return json.loads(text)


def _check(path: Path, settings: dict[str, Any]) -> None:
    there = _settings(path)
    words = {
        "teacher": "another teacher",
        "data": "other inputs",
        "program": "another function of the same params",
    }
    for key, here in settings.items():
        if there.get(key) != here:
            what = words.get(key, f"{key}={there.get(key)!r}, not {here!r}")
            raise FileError(
                f"{path} is of {what}; write another folder, or delete this one to begin anew"
            )
    number = read_metadata(path).get(_NUMBER, "")
    if path.name not in (f"shard-{number:0>6}.safetensors", _STRUCTURE if number == "-1" else ""):
        raise FileError(f"{path} holds shard {number}; give it back its name")
