"""Quantized arrays: packed codes and scales."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import numpy as np

from jaxcompress.arrays import affine
from jaxcompress.arrays.base import (
    CompressedArray,
    materialize,
    narrows,
    register_array,
)
from jaxcompress.arrays.formats import code_format
from jaxcompress.arrays.grid import GridArray
from jaxcompress.arrays.packed import PackedArray, block_for
from jaxcompress.arrays.repeated import RepeatedArray


@register_array(
    "quantized",
    children=("codes", "scale", "zero_point"),
    static=("axis", "group_size", "format", "float_dtype"),
)
class QuantizedArray(GridArray):
    """`w = scale * (codes - zero_point)`, computed in float32 and rounded once to the dtype.

    Codes that are no integers stand for the values of their format, `w = scale * value(code)`.
    Codes lie where the weights lie, packed along `axis` when they have fewer than 8 bits. The
    scale has the weights' number of axes: size one along the axes that share a scale, and one
    entry per group of `group_size` along `axis`; the last group may be shorter.

    Attributes:
      codes: an int8 or uint8 array, or a `PackedArray`.
      scale: floating, broadcastable to the codes after groups are repeated; or a leaf, where scales
        are quantized themselves or shared by blocks (`RepeatedArray`).
      zero_point: integer codes of the value zero in the shape of `scale`, or None.
      axis: the packed and grouped axis, negative.
      group_size: values per group, or None when the axis shares one scale.
      format: of the codes, see `jaxcompress.Quantize`.
      float_dtype: the dtype of the dense array.

    References:
      Jacob et al., *Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference*, 2018.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> w = jc.QuantizedArray.quantize(jnp.array([[-7.0, 3.4], [1.4, 7.0]]), "int4")
      >>> w, w.nbytes
      (QuantizedArray(float32[2, 2], int4), 6)
      >>> w.materialize().tolist()
      [[-7.0, 3.0], [1.0, 7.0]]
    """

    codes: Any
    scale: Any
    zero_point: Any
    axis: int
    group_size: int | None
    format: str
    float_dtype: np.dtype

    grids: ClassVar[tuple[str, ...]] = ("codes", "scale", "zero_point")

    @classmethod
    def quantize(
        cls,
        w: jax.Array,
        format: str,
        *,
        axes: tuple[int, ...] = (-2,),
        group_size: int | None = None,
        symmetric: bool = True,
        scale_dtype: Any = "bfloat16",
        convention: str = "absmax",
    ) -> QuantizedArray:
        """Rounds an array to the nearest codes; see `jaxcompress.Quantize` for the arguments.

        `jaxcompress.arrays.scheme.Scheme` knows ways that are not simple.
        """
        length = w.shape[axes[-1]]
        group_size = None if group_size is None else max(1, min(group_size, length))
        where: Any = {"axes": axes, "group_size": group_size}
        scale, zero_point = affine.affine_params(
            w,
            format,
            symmetric=symmetric,
            scale_dtype=scale_dtype,
            convention=convention,
            **where,
        )
        narrow = symmetric and convention == "absmax"
        codes = affine.quantize(w, scale, zero_point, format, narrow=narrow, **where)
        return cls.from_codes(codes, scale, zero_point, format, axes[-1], group_size, w.dtype)

    @classmethod
    def from_codes(
        cls,
        codes: jax.Array,
        scale: Any,
        zero_point: Any,
        format: str,
        axis: int,
        group_size: int | None,
        dtype: Any,
    ) -> QuantizedArray:
        """Packs codes that were found elsewhere."""
        fmt = code_format(format)
        packed: Any = codes
        packed_zero: Any = zero_point
        if fmt.bits < 8:
            signed = fmt.dtype == np.int8
            block = block_for(codes.shape[axis], fmt.bits, axis, group_size)
            packed = PackedArray.pack(codes, fmt.bits, axis=axis, signed=signed, block=block)
            if zero_point is not None:
                packed_zero = _packed_like(zero_point, fmt.bits, axis, signed)
        return cls(packed, scale, packed_zero, axis, group_size, format, np.dtype(dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.float_dtype

    @property
    def bits(self) -> int:
        """Bits per code."""
        return code_format(self.format).bits

    def materialize(self, key: jax.Array | None = None) -> jax.Array:
        return affine.dequantize(
            materialize(self.codes),
            materialize(self.scale),
            materialize(self.zero_point),
            axes=self.axis,
            group_size=self.group_size,
            dtype=self.float_dtype,
            format=self.format,
        )

    def astype(self, dtype: Any) -> CompressedArray | None:
        return self.replace(float_dtype=np.dtype(dtype)) if narrows(self.dtype, dtype) else None

    def describe(self) -> str:
        group = "" if self.group_size is None else f"/{self.group_size}"
        return f"{self.format}{group}{'' if self.zero_point is None else ' affine'}"


def _packed_like(zero_point: Any, bits: int, axis: int, signed: bool) -> Any:
    """Zero points packed like codes, those of blocks before they are repeated."""
    if isinstance(zero_point, RepeatedArray):
        return zero_point.replace(values=_packed_like(zero_point.values, bits, axis, signed))
    return PackedArray.pack(zero_point, bits, axis=axis, signed=signed)
