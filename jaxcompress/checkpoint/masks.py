"""Bit masks in context: how likely a bit is follows from how full its row and its column are.

Magnitude pruning does not remove weights evenly: some inputs and some outputs keep many, others
few. So each row and each column gets a class by its density, the sum of the two is the class of a
bit, and the bits of one class are coded with the class's own frequency, eight at a time.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

from jaxcompress.checkpoint.entropy import (
    CHUNK,
    Bytes,
    Coded,
    Decoder,
    Model,
    categorical,
    encode_bytes,
    encode_words,
)
from jaxcompress.errors import FileError

_CLASSES = 16  # of rows, and of columns


def can_encode(rows: int, width: int) -> bool:
    """Whether a mask has rows and columns enough for their classes to be worth their place."""
    return rows >= 8 and 8 <= width <= CHUNK


def encode_mask(bits: np.ndarray) -> bytes:
    """A `[rows, width]` mask of zeros and ones."""
    rows, width = bits.shape
    row_class, column_class = (_classes(bits, axis) for axis in (1, 0))
    ones = np.zeros(2 * _CLASSES, np.int64)
    total = np.zeros(2 * _CLASSES, np.int64)
    for start, stop in _chunks(rows, width):
        kinds = _kinds(row_class[start:stop], column_class)
        total += np.bincount(kinds, minlength=2 * _CLASSES)
        ones += np.bincount(kinds[bits[start:stop].reshape(-1) > 0], minlength=2 * _CLASSES)
    shares = np.clip(np.rint(65536 * ones / np.maximum(total, 1)), 1, 65535).astype("<u2")
    side = [encode_bytes(row_class), encode_bytes(column_class)]
    out = [struct.pack("<II", *map(len, side)), *side, shares.tobytes()]
    models = [_byte_model(int(share)) for share in shares]
    for start, stop in _chunks(rows, width):
        kinds = _kinds(row_class[start:stop], column_class)
        sorted_bits = bits[start:stop].reshape(-1)[np.argsort(kinds, kind="stable")]
        parts, place = [], 0
        for kind, n in enumerate(np.bincount(kinds, minlength=2 * _CLASSES)):
            if n:
                packed = np.packbits(sorted_bits[place : place + n], bitorder="little")
                parts.append(Coded(packed, models[kind]))
                place += n
        out.append(encode_words(parts))
    return b"".join(out)


def decode_mask(data: bytes | memoryview, rows: int, width: int) -> np.ndarray:
    """Undoes `encode_mask`.

    Raises:
      FileError: when `data` is no coding of such a mask.
    """
    reader = Bytes(data)
    lengths = reader.number(), reader.number()
    if not can_encode(rows, width):
        raise FileError(f"a mask of {rows} rows of {width} is not coded by density")
    if len(data) < 4 * -(-rows // (CHUNK // width)):
        raise FileError(f"a coded mask is too short to hold {rows} rows of {width}")
    row_class, column_class = (
        _side(reader.take(n), count) for n, count in zip(lengths, (rows, width))
    )
    shares = np.frombuffer(reader.take(4 * _CLASSES), "<u2")
    models = [_byte_model(int(share)) for share in shares]
    out = np.empty((rows, width), np.uint8)
    for start, stop in _chunks(rows, width):
        kinds = _kinds(row_class[start:stop], column_class)
        coder, place = Decoder(reader.words()), 0
        sorted_bits = np.empty(kinds.size, np.uint8)
        for kind, n in enumerate(np.bincount(kinds, minlength=2 * _CLASSES)):
            if n:
                packed = coder.decode(models[kind], -(-int(n) // 8)).astype(np.uint8)
                bits = np.unpackbits(packed, count=n, bitorder="little")
                sorted_bits[place : place + n] = bits
                place += n
        coder.finish()
        flat = np.empty(kinds.size, np.uint8)
        flat[np.argsort(kinds, kind="stable")] = sorted_bits
        out[start:stop] = flat.reshape(stop - start, width)
    reader.finish()
    return out


def _side(data: memoryview, n: int) -> np.ndarray:
    reader = Bytes(data)
    out = reader.symbols(n)
    reader.finish()
    if out.size and out.max() >= _CLASSES:
        raise FileError("a coded mask is damaged: a row or column has no such class")
    return out


def _classes(bits: np.ndarray, axis: int) -> np.ndarray:
    """Half a unit of log-odds to a class, the middle one for the density of the whole."""
    n = bits.shape[axis]
    whole = min(max(float(bits.mean()), 0.5 / bits.size), 1 - 0.5 / bits.size)
    share = (bits.sum(axis=axis, dtype=np.int64) + whole) / (n + 1)
    odds = np.log(share / (1 - share)) - np.log(whole / (1 - whole))
    return np.clip(np.rint(2 * odds) + _CLASSES // 2, 0, _CLASSES - 1).astype(np.uint8)


def _kinds(row_class: np.ndarray, column_class: np.ndarray) -> np.ndarray:
    return (row_class[:, None] + column_class[None, :]).reshape(-1)


def _chunks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    step = CHUNK // width
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def _byte_model(share: int) -> Model:
    """Eight independent bits, each one with probability `share / 65536`."""
    weights = np.ones(1)
    for _ in range(8):  # one rounding after the other, the same on every machine
        weights = np.concatenate([weights * (65536 - share), weights * share]) / 65536
    return categorical(weights)


def gaps_to_mask(codes: np.ndarray, bits: int, size: int) -> np.ndarray | None:
    """The masks `[n, size]` that gaps `[n, entries]` make; None where they run out of them."""
    holds = codes != 2**bits - 1
    where = np.cumsum(codes.astype(np.int64) + holds, axis=-1) - 1
    row, column = np.nonzero(holds)
    where = where[row, column]
    if where.size and where.max() >= size:
        return None
    mask = np.zeros((len(codes), size), np.uint8)
    mask[row, where] = 1
    return mask


def mask_to_gaps(mask: np.ndarray, bits: int, entries: int) -> np.ndarray | None:
    """The gaps `[n, entries]` between the ones of masks `[n, size]`; None where they do not fit.

    A gap beyond the largest code is written with escapes, and so are entries to spare.
    """
    escape = 2**bits - 1
    row, column = np.nonzero(mask)
    before = np.where(np.diff(row, prepend=-1) > 0, -1, np.roll(column, 1))
    gaps = column - before - 1
    taken = np.cumsum(gaps // escape + 1)
    first = np.searchsorted(row, np.arange(len(mask)))  # of each row, among the ones of all
    taken -= np.concatenate([[0], taken])[first][row]
    if taken.size and taken.max() > entries:
        return None
    codes = np.full((len(mask), entries), escape, np.uint8)
    codes[row, taken - 1] = gaps % escape
    return codes
