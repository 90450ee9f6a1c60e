"""An array as an entropy-coded stream, and back.

An array is first turned into bytes that an order-0 model fits:

- `planes`: one stream for each byte of an item, the exponent's bytes apart from the mantissa's. The
  bits of a float are rotated by one, which brings its sign to the end and its exponent into one
  byte;
- `fields`: packed codes whose bit count does not divide 8, one code to a symbol;
- `columns`: the bits of a mask in columns, where n of m lie together;
- `densities`: the bits of a mask by the density of their row and column (`masks.py`).

A mask given by gaps is coded as its gaps or as the mask they make, whichever is shorter.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np

from jaxcompress.arrays.bits import packed_length, period
from jaxcompress.arrays.layout import Fields, Layout, Mask
from jaxcompress.checkpoint.entropy import Bytes, decode_bytes, encode_bytes
from jaxcompress.checkpoint.masks import (
    can_encode,
    decode_mask,
    encode_mask,
    gaps_to_mask,
    mask_to_gaps,
)
from jaxcompress.errors import FileError


def encode_array(array: np.ndarray, layout: Layout | None) -> tuple[dict[str, Any], bytes] | None:
    """The shortest stream of an array and what it is; None where the array itself is as short."""
    found = [({"as": "planes"}, _encode_planes(array))]
    fields = _gap_fields(layout) if isinstance(layout, Mask) and layout.bits else layout
    if isinstance(fields, Fields) and 8 % fields.bits:
        coded = encode_bytes(unpack_fields(array, fields))
        found.append(({"as": "fields", **fields._asdict()}, coded))
    if isinstance(layout, Mask) and array.size:
        bits = _mask_bits(array, layout)
        if bits is not None:
            columns = np.packbits(bits.T.reshape(-1), bitorder="little")
            found.append(({"as": "columns", **layout._asdict()}, encode_bytes(columns)))
            if can_encode(*bits.shape):
                found.append(({"as": "densities", **layout._asdict()}, encode_mask(bits)))
    best = min(found, key=lambda pair: len(pair[1]))
    return best if len(best[1]) < array.nbytes else None


def _gap_fields(layout: Mask) -> Fields:
    return Fields(layout.bits, -1, layout.entries, period(layout.bits)[0])


def decode_array(
    how: dict[str, Any], data: bytes | memoryview, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """Undoes `encode_array`.

    Raises:
      FileError: when `data` is no such stream of an array of this shape and dtype.
    """
    match how:
        case {"as": "planes"}:
            return _decode_planes(data, shape, dtype)
        case {"as": "fields", "bits": int() as bits, "axis": int() as axis, "length": int() as n,
              "block": int() as block}:  # fmt: skip
            layout = Fields(bits, axis, n, block)
            sizes = _field_shape(layout, shape)
            return pack_fields(decode_bytes(data, math.prod(sizes)), layout, shape)
        case {"as": "columns" | "densities" as order, "width": int() as width, "size": int() as n,
              "bits": int() as bits, "entries": int() as entries}:  # fmt: skip
            return _decode_mask(order, data, shape, Mask(width, n, bits, entries))
    raise FileError(f"a stream is coded in an unknown way {how}")


def _encode_planes(array: np.ndarray) -> bytes:
    width = array.dtype.itemsize
    if width == 1:
        return encode_bytes(array.reshape(-1).view(np.uint8))
    items = np.ascontiguousarray(array).reshape(-1)
    planes = _rotated(items, 1).view(np.uint8).reshape(-1, width)
    coded = [encode_bytes(planes[:, i]) for i in range(width)]
    return b"".join([struct.pack("<I", len(c)) + c for c in coded])


def _decode_planes(data: bytes | memoryview, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    n, width = math.prod(shape), dtype.itemsize
    if width == 1:
        return decode_bytes(data, n).view(dtype).reshape(shape)
    reader = Bytes(data)
    parts = [decode_bytes(reader.take(reader.number()), n) for _ in range(width)]
    reader.finish()
    planes = np.stack(parts, axis=1)
    return _rotated(planes.reshape(-1).view(dtype), -1).reshape(shape)


def _is_float(dtype: np.dtype) -> bool:
    return dtype.itemsize in (2, 4, 8) and (dtype.kind == "f" or dtype.name == "bfloat16")


def _rotated(items: np.ndarray, by: int) -> np.ndarray:
    """The bits of floats, one place to the left or to the right; other items as they are."""
    if not _is_float(items.dtype):
        return items
    bits = items.view(f"u{items.dtype.itemsize}")
    left, right = (1, 8 * bits.itemsize - 1)[::by]
    return ((bits << bits.dtype.type(left)) | (bits >> bits.dtype.type(right))).view(items.dtype)


def _field_shape(layout: Fields, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the codes, padded to whole periods, of packed bytes of a shape."""
    bits, axis, length, block = layout
    p, q = period(bits)
    if not -len(shape) <= axis < 0 or length < 0 or block <= 0 or block % p:
        raise FileError(f"a coded stream is damaged: {layout} does not fit shape {shape}")
    if shape[axis] != packed_length(length, bits):
        raise FileError(f"a coded stream is damaged: {layout} does not fit shape {shape}")
    sizes = list(shape)
    sizes[axis] = sizes[axis] // q * p
    return tuple(sizes)


def _runs(n: int, size: int) -> list[tuple[int, int, int]]:
    """Runs of equal blocks along an axis, as (start, stop, block): the last block may be less."""
    whole = n // size * size
    runs = [(0, whole, size), (whole, n, n - whole)]
    return [run for run in runs if run[0] < run[1]]


def unpack_fields(words: np.ndarray, layout: Fields) -> np.ndarray:
    """The codes in packed bytes, padding included, packed axis first: a uint8 vector."""
    bits, axis, _, block = layout
    p, q = period(bits)
    size = block // p * q
    rows = np.moveaxis(words, axis, 0)
    out = [np.zeros(0, np.uint8)]
    for start, stop, one in _runs(rows.shape[0], size):
        part = rows[start:stop].reshape((stop - start) // one, q, one // q, *rows.shape[1:])
        wide = np.zeros((part.shape[0], 1, *part.shape[2:]), np.uint64)
        for r in range(q):
            wide[:, 0] |= part[:, r].astype(np.uint64) << np.uint64(8 * r)
        shifts = (np.arange(p, dtype=np.uint64) * bits).reshape(1, p, *[1] * (wide.ndim - 2))
        out.append(((wide >> shifts) & np.uint64(2**bits - 1)).astype(np.uint8).reshape(-1))
    return np.concatenate(out)


def pack_fields(codes: np.ndarray, layout: Fields, shape: tuple[int, ...]) -> np.ndarray:
    """Undoes `unpack_fields`: the packed bytes, of `shape`."""
    bits, axis, _, block = layout
    p, q = period(bits)
    size = block // p * q
    rest = list(shape)
    n = rest.pop(axis)
    out, place = np.empty((n, *rest), np.uint8), 0
    for start, stop, one in _runs(n, size):
        count = (stop - start) // q * p * math.prod(rest)
        part = codes[place : place + count].astype(np.uint64)
        place += count
        part = part.reshape((stop - start) // one, p, one // q, *rest)
        shifts = (np.arange(p, dtype=np.uint64) * bits).reshape(1, p, *[1] * (part.ndim - 2))
        wide = np.bitwise_or.reduce(part << shifts, axis=1, keepdims=True)
        at = (np.arange(q, dtype=np.uint64) * 8).reshape(1, q, *[1] * (part.ndim - 2))
        out[start:stop] = (wide >> at).astype(np.uint8).reshape(stop - start, *rest)
    return np.moveaxis(out, 0, axis)


def _mask_bits(words: np.ndarray, layout: Mask) -> np.ndarray | None:
    """The mask as `[rows, width]` bits; None for bytes that it would not give back.

    Such are gaps that could be fewer, and padding that is not zero.
    """
    width, size, bits, entries = layout
    rows = words.reshape(-1, words.shape[-1])
    codes = _unpack_rows(rows, max(bits, 1), entries if bits else size)
    if not np.array_equal(_pack_rows(codes, max(bits, 1), words.shape[-1]), rows):
        return None
    if not bits:
        return codes.reshape(-1, width)
    mask = gaps_to_mask(codes, bits, size)
    if mask is None or not np.array_equal(mask_to_gaps(mask, bits, entries), codes):  # type: ignore[arg-type]
        return None
    return mask.reshape(-1, width)


def _unpack_rows(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Codes in plain little-endian bit streams, one a row."""
    single = np.unpackbits(words, axis=-1, count=count * bits, bitorder="little")
    if bits == 1:
        return single
    return np.packbits(single.reshape(len(words), count, bits), axis=-1, bitorder="little")[..., 0]


def _pack_rows(codes: np.ndarray, bits: int, nbytes: int) -> np.ndarray:
    """Undoes `_unpack_rows`: rows of `nbytes` bytes, which end in zeros."""
    single = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    packed = np.packbits(single.reshape(len(codes), -1), axis=-1, bitorder="little")
    return np.pad(packed, [(0, 0), (0, nbytes - packed.shape[-1])])


def _decode_mask(
    order: str, data: bytes | memoryview, shape: tuple[int, ...], layout: Mask
) -> np.ndarray:
    width, size, bits, entries = layout
    stored = packed_length(*((entries, bits) if bits else (size, 1)))
    if width <= 0 or size < 0 or size % width or entries < 0 or shape[-1:] != (stored,):
        raise FileError(f"a coded mask is damaged: {layout} does not fit shape {shape}")
    rows = math.prod(shape[:-1]) * (size // width)
    if order == "densities":
        mask = decode_mask(data, rows, width)
    else:
        packed = decode_bytes(data, -(-rows * width // 8))
        mask = np.unpackbits(packed, count=rows * width, bitorder="little")
        mask = mask.reshape(width, rows).T
    codes = mask.reshape(-1, size)
    if bits:
        gaps = mask_to_gaps(codes, bits, entries)
        if gaps is None:
            raise FileError(f"a coded mask is damaged: its gaps do not fit {entries} entries")
        codes = gaps
    return _pack_rows(codes, max(bits, 1), stored).reshape(shape)
