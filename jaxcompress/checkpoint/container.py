"""The outside of a file: a safetensors header whose every byte is checked, and streams after it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import struct
import tempfile
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

from jaxcompress.errors import FileError

# Names of the dtypes in a safetensors header.
DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16",
    "U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
}  # fmt: skip
CODES = {name: code for code, name in DTYPES.items()}
# Read, but not written: readers that hold arrays in numpy refuse a file in which they occur.
DTYPES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}

CHECKSUM = "jaxcompress.checksum"
# The header's own checksum stands at one place, before anything that could be damaged.
_HEAD = b'{"__metadata__":{"jaxcompress.checksum":"'
_DIGITS = 8
_PIECE = 1 << 24
_MOST = 100_000_000  # the reference reader refuses longer headers


class Tensor(NamedTuple):
    """One entry of a header: `shape` of `code` from byte `start` to `stop` of the data."""

    code: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Container:
    """An opened file: what its header says, checked against its size.

    It stays open as long as anyone has it, so that a file that is replaced meanwhile is still read
    as it was.

    Attributes:
      path: the file.
      tensors: the entries of the header, by name, in the order of their bytes.
      metadata: the strings of the header.
      checked: whether the header has a checksum, which then was right.
    """

    def __init__(self, path: Path, file: io.FileIO, text: bytes) -> None:
        self.path = path
        head = parse_json(path, text)
        self.metadata: dict[str, str] = head.pop("__metadata__", None) or {}
        self.checked = text.startswith(_HEAD)
        self.tensors = _entries(path, head)
        self._start = 8 + len(text)
        self._file = file
        self._lock = threading.Lock()
        self._map: np.ndarray | None = None
        weakref.finalize(self, file.close)

    def read(self, name: str) -> np.ndarray:
        """The bytes of one tensor; no more of the file is read."""
        tensor = self.tensors[name]
        out, place = _aligned(tensor.stop - tensor.start), 0
        with self._lock:
            self._file.seek(self._start + tensor.start)
            while place < out.size:
                got = self._file.readinto(out[place:].data)
                if not got:
                    raise FileError(f"{self.path}: the file was cut while it was read")
                place += got
        return out

    def mapped(self, name: str) -> np.ndarray:
        """The bytes of one tensor where they are in the file; what is looked at is read."""
        tensor = self.tensors[name]
        if tensor.start == tensor.stop:  # nothing can be mapped
            return np.empty(0, np.uint8)
        with self._lock:
            if self._map is None:  # one for all, as each has a handle of its own, of which few are
                self._map = np.memmap(self._file, np.uint8, "r")
        return self._map[self._start + tensor.start : self._start + tensor.stop]


def _entries(path: Path, head: dict[str, Any]) -> dict[str, Tensor]:
    try:
        tensors = {
            name: Tensor(x["dtype"], tuple(x["shape"]), *x["data_offsets"])
            for name, x in head.items()
        }
    except (TypeError, KeyError) as error:  # beyond what the reference reader refuses
        raise FileError(f"{path}: the header is damaged: {error!r}") from error
    return dict(sorted(tensors.items(), key=lambda item: item[1][2:]))


def _aligned(size: int) -> np.ndarray:
    """Bytes that begin where jax takes them over without a copy."""
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size]


def open_container(path: Path) -> Container:
    """Opens any safetensors file.

    Raises:
      FileNotFoundError: when there is none.
      FileError: when it is truncated, damaged or something else.
    """
    if path.is_dir():
        raise FileError(f"{path} is a folder; name the file in it")
    file = io.FileIO(path)
    try:
        text = _header_bytes(path, file)
        # The reference reader's opinion of offsets, shapes and sizes; it reads no data here.
        with safetensors.safe_open(path, framework="numpy"):
            pass
        return Container(path, file, text)
    except (safetensors.SafetensorError, OSError) as error:
        file.close()
        raise FileError(f"{path}: not a whole safetensors file: {error}") from error
    except BaseException:
        file.close()
        raise


def _header_bytes(path: Path, file: io.FileIO) -> bytes:
    size = os.fstat(file.fileno()).st_size
    first = file.read(8)
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
    if length > size - 8:
        refuse_pickle(path, first)
        raise FileError(
            f"{path}: not a whole safetensors file: it has {size} bytes, and its first eight "
            f"promise a header of {length}"
        )
    text = file.read(length)
    if text.startswith(_HEAD):
        found = text[len(_HEAD) : len(_HEAD) + _DIGITS]
        if found != _crc(_blanked(text)):
            raise FileError(f"{path}: the header is damaged: its checksum does not match")
    return text


def refuse_pickle(path: Path, first: bytes) -> None:
    """Refuses what begins like a pickle or like the archive in which torch keeps one."""
    if first[:1] == b"\x80" and first[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        kind = "a pickle"
    elif first[:4] == b"PK\x03\x04":
        kind = "a zip archive, perhaps with a pickle in it"
    else:
        return
    raise FileError(
        f"{path}: {kind}, which could run code and is not opened; save the weights as safetensors"
    )


def _blanked(text: bytes) -> bytes:
    return _HEAD + b"0" * _DIGITS + text[len(_HEAD) + _DIGITS :]


def _crc(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)


def parse_json(path: Path, text: str | bytes) -> Any:
    """A JSON object, in which no key may come twice.

    Raises:
      FileError: when it is none.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise FileError(f"{path}: the key {twice!r} comes twice; which one counts?")
        return out

    try:
        found = json.loads(text, object_pairs_hook=unique)
    except FileError:
        raise
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: damaged, no JSON: {error}") from error
    if not isinstance(found, dict):
        raise FileError(f"{path}: damaged, a JSON object was expected")
    return found


def as_json(value: Any) -> str:
    """JSON in UTF-8, which readers of the format insist on: no half of a surrogate pair."""
    try:
        text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    except (ValueError, RecursionError) as error:
        raise FileError(f"a value cannot be written as JSON: {error}") from error
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 20) : error.end + 20]
        raise FileError(f"{near!r} is no valid text and cannot be saved: {error}") from error
    return text


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor to write; `write` puts its bytes into a file and returns their checksum."""

    name: str
    code: str
    shape: tuple[int, ...]
    nbytes: int
    write: Callable[[BinaryIO], int]


def bytes_of(make: Callable[[], memoryview]) -> Callable[[BinaryIO], int]:
    """An `Entry.write` of bytes that are made when their turn comes."""

    def write(file: BinaryIO) -> int:
        data = make()
        file.write(data)
        return zlib.crc32(data)

    return write


def write_container(
    path: Path,
    entries: Sequence[Entry],
    describe: Callable[[list[str]], Mapping[str, str]],
    *,
    checked: bool = True,
) -> None:
    """Writes beside the target, flushes to the disk, and renames.

    Written here because the library keeps metadata in a hash map, in another order each time, and
    wants all tensors in memory.

    Args:
      path: the file.
      entries: the tensors. Those of the widest dtype come first, so that every tensor lies at a
        multiple of its item size.
      describe: the metadata, from the checksums of the tensors in the order of the file; the
        length must not depend on them.
      checked: whether the header has a checksum of its own.
    """
    width = {code: jnp.dtype(name).itemsize for code, name in DTYPES.items()}
    entries = sorted(entries, key=lambda e: (-width[e.code], e.name))
    with replacing(path) as file:
        blank = ["0" * _DIGITS] * len(entries)
        file.write(_header(entries, describe(blank), checked))
        sums = [f"{entry.write(file):08x}" for entry in entries]
        file.seek(0)
        file.write(_header(entries, describe(sums), checked))


def _header(entries: Sequence[Entry], metadata: Mapping[str, str], checked: bool) -> bytes:
    """The head of the file, up to the first tensor."""
    start = {CHECKSUM: "0" * _DIGITS} if checked else {}
    head: dict[str, Any] = {"__metadata__": {**start, **metadata}}
    if not head["__metadata__"]:
        del head["__metadata__"]
    end = 0
    for entry in entries:
        begin, end = end, end + entry.nbytes
        shape = list(entry.shape)
        head[entry.name] = {"dtype": entry.code, "shape": shape, "data_offsets": [begin, end]}
    text = as_json(head).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MOST:
        raise FileError(
            f"the header would take {len(text)} bytes, and readers take {_MOST}: the names are too "
            "many or too long; write several files"
        )
    if checked:
        text = _HEAD + _crc(text) + text[len(_HEAD) + _DIGITS :]
    return struct.pack("<Q", len(text)) + text


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path` that takes its place once it is whole and on the disk.

    A link is followed: it is the file it leads to that is replaced.

    Raises:
      FileError: when there is something else than a file.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise FileError(f"{path} is there and no regular file; write another name")
    handle, name = tempfile.mkstemp(prefix=".jaxcompress-", suffix=".part", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_UMASK)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _umask() -> int:
    current = os.umask(0o077)
    os.umask(current)
    return current


_UMASK = _umask()  # it can only be read by setting it, so once, before there are threads


class Spool:
    """Bytes laid aside on the disk, beside the file that they will be part of."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None
        self._size = 0
        # Writing waits for the disk, and whoever makes the bytes need not.
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._written: list[Future[int]] = []

    def put(self, data: bytes | memoryview) -> Callable[[BinaryIO], int]:
        """Takes some bytes; what comes back is an `Entry.write`."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._path.parent, buffering=0)  # noqa: SIM115
        start, size, crc = self._size, len(data), zlib.crc32(data)
        self._size += size
        if self._written:
            self._written.pop().result()  # one at a time, so that bytes do not pile up
        self._written.append(self._thread.submit(self._write, data))

        def write(file: BinaryIO) -> int:
            while self._written:
                self._written.pop().result()
            _copy_range(self._file, start, file, size)
            return crc

        return write

    def _write(self, data: bytes | memoryview) -> int:
        view, place = memoryview(data), 0
        while place < len(view):
            place += self._file.write(view[place:])
        return place

    def close(self) -> None:
        """Gives the disk space back."""
        self._thread.shutdown(wait=True)
        if self._file is not None:
            self._file.close()


def _copy_range(source: Any, start: int, target: BinaryIO, size: int) -> None:
    """Copies bytes from file to file; inside of the kernel where the system can."""
    target.flush()
    stop = start + size
    if hasattr(os, "copy_file_range"):
        with contextlib.suppress(OSError):  # not on this file system
            while start < stop:
                copied = os.copy_file_range(
                    source.fileno(), target.fileno(), stop - start, start, target.tell()
                )
                if not copied:
                    break
                start += copied
                target.seek(copied, os.SEEK_CUR)
    source.seek(start)
    while start < stop:
        piece = source.read(min(stop - start, _PIECE))
        target.write(piece)
        start += len(piece)


def looks_like_safetensors(path: Path) -> bool:
    """Whether a file begins like one, whatever it is called."""
    with open(path, "rb") as file:
        first = file.read(9)
        size = os.fstat(file.fileno()).st_size
    return len(first) == 9 and struct.unpack("<Q", first[:8])[0] <= size - 8 and first[8:] == b"{"


def is_name(text: str) -> bool:
    """Whether a text is a plain file name, which cannot lead out of its folder."""
    return re.fullmatch(r"[^/\\\0]+", text) is not None and text not in (".", "..")
