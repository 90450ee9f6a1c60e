"""What the bytes of a child hold, where bytes alone do not show it: hints to an entropy coder."""

from __future__ import annotations

from typing import NamedTuple


class Fields(NamedTuple):
    """Codes of `bits` bits packed along an axis; see `jaxcompress.arrays.bits` for the rest."""

    bits: int
    axis: int
    length: int
    block: int


class Mask(NamedTuple):
    """The places of the kept ones of `size` weights, in rows of `width`.

    `bits` is 0 for a bit mask, one bit a weight along the last axis; else the places are given by
    `entries` gaps of so many bits, the largest an escape (see `SparseArray`).
    """

    width: int
    size: int
    bits: int = 0
    entries: int = 0


Layout = Fields | Mask
