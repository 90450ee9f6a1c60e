"""A moment in eight bits: how it is cut into blocks, and how it is rounded."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import CompressedArray
from jaxcompress.arrays.dynamic import DynamicArray, block_shares
from jaxcompress.arrays.quantized import QuantizedArray
from jaxcompress.errors import SpecError
from jaxcompress.numerics import stochastic_round
from jaxcompress.specs import is_count

FORMATS = ("dynamic8", "int8")


class Blockwise(NamedTuple):
    """Eight bits to a value and a float32 scale to a block.

    Attributes:
      format: `dynamic8` or `int8`.
      block_size: values that share a scale.
    """

    format: str
    block_size: int

    def check(self) -> None:
        """Refuses what cannot be.

        Raises:
          SpecError: for another format, or no block.
        """
        if self.format not in FORMATS:
            raise SpecError(f"format={self.format!r}: write one of {', '.join(FORMATS)}")
        if not is_count(self.block_size, 1):
            raise SpecError(f"block_size={self.block_size!r}: write a whole number from 1 on")

    def encode(self, x: jax.Array, signed: bool, key: jax.Array | None) -> CompressedArray:
        """The leaf of an array; with a key it is rounded at random, the mean being x.

        Without signs, what is positive is never rounded to zero: an update divides by its root.
        """
        axis = block_axis(x.shape, self.block_size)
        size = min(self.block_size, x.shape[axis])
        if self.format == "dynamic8":
            return DynamicArray.quantize(x, axis=axis, group_size=size, signed=signed, key=key)
        wide = x.astype(jnp.float32)
        wide = wide if signed else jnp.maximum(wide, 0)
        largest, share = block_shares(wide, axis, size)
        levels = 127 if signed else 255
        codes = round_with(share * levels, key)
        if not signed:
            codes = jnp.where(wide > 0, jnp.maximum(codes, 1), codes)
        dtype, name = (jnp.int8, "int8") if signed else (jnp.uint8, "uint8")
        return QuantizedArray.from_codes(
            codes.astype(dtype), largest / levels, None, name, axis, size, np.dtype(x.dtype)
        )


def block_axis(shape: tuple[int, ...], block_size: int) -> int:
    """The axis that is cut into blocks: the last that holds a whole one, else the longest.

    Examples:
      >>> block_axis((3, 3, 512, 512), 256), block_axis((1000, 10), 256), block_axis((64, 32), 256)
      (-1, -2, -2)
    """
    long = [a for a in range(-len(shape), 0) if shape[a] >= block_size]
    return long[-1] if long else max(range(-len(shape), 0), key=lambda a: shape[a])


def round_with(x: jax.Array, key: jax.Array | None) -> jax.Array:
    """Up or down at random, such that the mean is x; without a key to nearest."""
    return jnp.round(x) if key is None else stochastic_round(x, jax.random.uniform(key, x.shape))


def takes(shape: tuple[int, ...], block_size: int) -> int:
    """Bytes that a moment of this shape takes: a code for each value, 4 for each block.

    Examples:
      >>> takes((1000, 512), 256)
      520000
    """
    if 0 in shape:
        return 0
    axis = block_axis(shape, block_size)
    blocks = -(-shape[axis] // block_size) * math.prod(shape) // shape[axis]
    return math.prod(shape) + 4 * blocks


def is_floating(x: Any) -> bool:
    """Whether x is a floating array."""
    return hasattr(x, "dtype") and bool(jnp.issubdtype(x.dtype, jnp.floating))
