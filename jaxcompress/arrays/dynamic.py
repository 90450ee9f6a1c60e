"""Eight-bit codes of a dynamic map: many decades in each block, finest at its largest value."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import compat
from jaxcompress.arrays import affine
from jaxcompress.arrays.base import CompressedArray, materialize, narrows, register_array
from jaxcompress.arrays.grid import GridArray
from jaxcompress.numerics import in_groups


@functools.lru_cache
def dynamic_map(signed: bool = True) -> np.ndarray:
    """The 256 values of the dynamic map, in rising order, float32.

    Decade i of seven holds the middles of `2**i` (signed) or `2**(i+1)` equal parts of [0.1, 1],
    times `10**(i-6)`; signed, with both signs. Zero and one make up 256. So one byte spans seven
    decades, and is the finer the larger the value.

    Args:
      signed: whether for values of both signs.

    References:
      Dettmers, *8-Bit Approximations for Parallelism in Deep Learning*, 2016; Dettmers et al.,
      *8-bit Optimizers via Block-wise Quantization*, 2022.

    Examples:
      >>> table = dynamic_map()
      >>> len(table), float(table[0]), float(table[127]), float(table[255])
      (256, -0.992968738079071, 0.0, 1.0)
    """
    values = [0.0, 1.0]
    for i in range(7):
        parts = 2 ** (i + (not signed))
        middles = 0.1 + 0.9 * (np.arange(parts) + 0.5) / parts
        values += [*(middles * 10.0 ** (i - 6))]
        values += [*(-middles * 10.0 ** (i - 6))] if signed else []
    return np.sort(np.array(values)).astype(np.float32)


@register_array(
    "dynamic8",
    children=("codes", "scale"),
    static=("axis", "group_size", "signed", "float_dtype"),
)
class DynamicArray(GridArray):
    """`w = scale * map[code]`, with `dynamic_map` and one scale a block.

    Attributes:
      codes: uint8, in the shape of the weights.
      scale: float32, the largest magnitude of each block; one entry a block along `axis`.
      axis: the axis that is cut into blocks, negative.
      group_size: values to a block; the last one may be shorter.
      signed: which map.
      float_dtype: the dtype of the dense array.

    References:
      Dettmers et al., *8-bit Optimizers via Block-wise Quantization*, 2022.

    Examples:
      >>> import jax.numpy as jnp
      >>> w = jnp.array([1.0, 0.0, 0.034, -1e-5])
      >>> small = DynamicArray.quantize(w, axis=-1, group_size=4)
      >>> small, small.nbytes
      (DynamicArray(float32[4], dynamic8/4), 8)
      >>> [round(float(x), 7) for x in small.materialize()]
      [1.0, 0.0, 0.0339063, -7.7e-06]
    """

    codes: Any
    scale: Any
    axis: int
    group_size: int
    signed: bool
    float_dtype: np.dtype

    grids: ClassVar[tuple[str, ...]] = ("codes", "scale")

    @classmethod
    def quantize(
        cls,
        w: jax.Array,
        *,
        axis: int,
        group_size: int,
        signed: bool = True,
        key: jax.Array | None = None,
    ) -> DynamicArray:
        """The nearest codes, ties upwards; with a key one of both neighbours, the mean being w.

        Args:
          w: floating.
          axis: the axis to cut into blocks, negative.
          group_size: values to a block.
          signed: which map; without signs, what is negative becomes zero, and what is positive
            never does.
          key: a random key, or None.
        """
        x = w.astype(jnp.float32) if signed else jnp.maximum(w.astype(jnp.float32), 0)
        scale, share = block_shares(x, axis, group_size)
        codes = _nearest(share, signed) if key is None else _either(share, signed, key)
        if not signed:
            codes = jnp.where(x > 0, jnp.maximum(codes, 1), codes)
        return cls(codes.astype(jnp.uint8), scale, axis, group_size, signed, np.dtype(w.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.float_dtype

    def materialize(self, key: jax.Array | None = None) -> jax.Array:
        table = jnp.asarray(dynamic_map(self.signed))
        return affine.dequantize(
            compat.look_up(table, materialize(self.codes)),
            materialize(self.scale),
            axes=self.axis,
            group_size=self.group_size,
            dtype=self.float_dtype,
        )

    def astype(self, dtype: Any) -> CompressedArray | None:
        return self.replace(float_dtype=np.dtype(dtype)) if narrows(self.dtype, dtype) else None

    def describe(self) -> str:
        return f"{'' if self.signed else 'u'}dynamic8/{self.group_size}"


def block_shares(x: jax.Array, axis: int, size: int) -> tuple[jax.Array, jax.Array]:
    """The largest magnitude of each block along one axis, and each value's share of its own.

    The last block may be shorter. Shares of a block of zeros are zero.

    Examples:
      >>> import jax.numpy as jnp
      >>> [y.tolist() for y in block_shares(jnp.array([1.0, -4.0, 2.0]), -1, 2)]
      [[4.0, 2.0], [0.25, -1.0, 1.0]]
    """
    i, n = x.ndim + axis, x.shape[axis]
    blocks = in_groups(x, axis, size)
    largest = jnp.max(jnp.abs(blocks), axis=i + 1, keepdims=True)
    shares = blocks / jnp.where(largest == 0, 1, largest)
    wide = shares.reshape(*x.shape[:i], -1, *x.shape[i + 1 :])
    shares = jax.lax.slice_in_dim(wide, 0, n, axis=i)
    return jnp.squeeze(largest, i + 1), shares


def _nearest(share: jax.Array, signed: bool) -> jax.Array:
    """The number of the nearest value, ties upwards in magnitude, by arithmetic.

    A search in the table would look up eight values for each, which took most of a step.
    """
    table = dynamic_map(signed).astype(np.float64)
    values = table[127:] if signed else table  # zero and what is positive
    size, first = jnp.abs(share), 1
    number: Any = jnp.zeros_like(size)
    for i in range(7):
        parts = 2 ** (i + (not signed))
        low, per = 0.1 * 10.0 ** (i - 6), parts / (0.9 * 10.0 ** (i - 6))
        within = jnp.clip(jnp.floor((size - np.float32(low)) * np.float32(per)), 0, parts - 1)
        middle = np.float32((values[first - 1] + values[first]) / 2)
        number = jnp.where(size >= middle, first + within, number)
        first += parts
    middle = np.float32((values[first - 1] + values[first]) / 2)
    number = jnp.where(size >= middle, first, number).astype(jnp.int32)
    # There is no minus one: the nearest is the last value before it.
    return 127 + jnp.where(share < 0, -jnp.minimum(number, 127), number) if signed else number


def _either(share: jax.Array, signed: bool, key: jax.Array) -> jax.Array:
    """One of the numbers of both neighbours, such that the mean is the share."""
    table = jnp.asarray(dynamic_map(signed))
    near = _nearest(share, signed)
    low = jnp.clip(near - (compat.look_up(table, near) > share), 0, 254)
    below, above = compat.look_up(table, low), compat.look_up(table, low + 1)
    return low + (jax.random.uniform(key, share.shape) * (above - below) < share - below)
