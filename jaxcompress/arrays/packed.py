"""Integers of 1 to 8 bits, packed: the codes, indices and zero points of other leaves."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import register_array
from jaxcompress.arrays.bits import pack_bits, unpack_bits
from jaxcompress.arrays.grid import GridArray
from jaxcompress.arrays.layout import Fields, Layout


@register_array("packed", children=("words",), static=("bits", "axis", "length", "block", "signed"))
class PackedArray(GridArray):
    """Integers packed `bits` to a value along one axis, in bytes, on every backend.

    `words` is uint8 and has the shape of the array but for `axis`, where `length` values take
    `ceil(length / p) * q` bytes with `p = 8 / gcd(bits, 8)` and `q = bits / gcd(bits, 8)`: 3n/8
    bytes for n values of 3 bits. Within a block of `block` values, value `k * block/p + j` is the
    k-th field of the j-th word (see `jaxcompress.arrays.bits`); a block equal to p is a plain
    little-endian bit stream. Signed values are stored with `2**(bits-1)` added.

    Attributes:
      words: uint8, the packed bits.
      bits: bits per value, 1 to 8.
      axis: the packed axis, negative.
      length: the true number of values along it.
      block: the values interleaved together, a multiple of p.
      signed: whether values lie in `[-2**(bits-1), 2**(bits-1))`, else in `[0, 2**bits)`.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> packed = jc.PackedArray.pack(jnp.array([-4, 3, 0, 1, 2, -1, -2, -3]), 3, signed=True)
      >>> packed.nbytes, packed.materialize().tolist()
      (3, [-4, 3, 0, 1, 2, -1, -2, -3])
    """

    words: jax.Array
    bits: int
    axis: int
    length: int
    block: int
    signed: bool

    grids: ClassVar[tuple[str, ...]] = ("words",)

    @classmethod
    def pack(
        cls,
        values: Any,
        bits: int,
        *,
        axis: int = -1,
        signed: bool = False,
        block: int | None = None,
    ) -> PackedArray:
        """Packs an integer array; the values must fit in `bits` bits."""
        values = jnp.asarray(values)
        axis = axis if axis < 0 else axis - values.ndim
        period = 8 // int(np.gcd(bits, 8))
        block = period if block is None else block
        codes = values + 2 ** (bits - 1) if signed else values
        words = pack_bits(codes.astype(jnp.uint8), bits, axis=axis, block=block)
        return cls(words, bits, axis, values.shape[axis], block, signed)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.words.shape)
        shape[self.axis] = self.length
        return tuple(shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.int8 if self.signed else np.uint8)

    def materialize(self, key: jax.Array | None = None) -> jax.Array:
        codes = unpack_bits(self.words, self.bits, self.length, axis=self.axis, block=self.block)
        if not self.signed:
            return codes
        # In uint8 arithmetic the offset wraps around, and the bits are those of the int8 value.
        return jax.lax.bitcast_convert_type(codes - jnp.uint8(2 ** (self.bits - 1)), jnp.int8)

    def layouts(self) -> dict[str, Layout]:
        return {"words": Fields(self.bits, self.axis, self.length, self.block)}

    def describe(self) -> str:
        return f"{'int' if self.signed else 'uint'}{self.bits}"


def block_for(length: int, bits: int, axis: int, group_size: int | None) -> int:
    """The block in which values of an axis are interleaved.

    Rows of the last axis are cut into runs, so that unpacking works on contiguous values; on any
    other axis the values of a word already lie in different rows, and the plain stream is best.
    A block never crosses a group, so that a shard boundary between groups cuts no word.
    """
    period = 8 // int(np.gcd(bits, 8))
    if axis != -1 or length % period or not length:
        return period
    run = length if group_size is None else group_size
    if length % run or run % period:
        return period
    block = period
    while block < 128 and run % (2 * block) == 0:
        block *= 2
    return block
