"""A scheme: all that settles how weights become codes and scales, and codes become values again.

The one lowering that stored, fake-quantized and solved weights share.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.arrays import affine, ranges
from jaxcompress.arrays.base import materialize
from jaxcompress.arrays.formats import Format, code_format
from jaxcompress.arrays.quantized import QuantizedArray
from jaxcompress.arrays.repeated import RepeatedArray


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How weights are quantized; hashable.

    Attributes:
      format: of the codes, see `jaxcompress.Quantize` for this and all others.
      axes: the axes over which a scale is shared, negative; the last is the one with groups.
      group_size: weights that share a scale along it; two numbers: also along the last other axis.
      symmetric: whether zero is the middle of the range.
      scale_dtype: of scales.
      convention: how the symmetric scale follows from the range.
      estimator: how the range follows from the weights.
      scale_format: of scales that are quantized themselves, or None.
      scale_group_size: scales that share one scale of theirs, or None: all of a weight.
    """

    format: str
    axes: tuple[int, ...]
    group_size: int | tuple[int, int] | None = None
    symmetric: bool = True
    scale_dtype: Any = "bfloat16"
    convention: str = "absmax"
    estimator: str | None = None
    scale_format: str | None = None
    scale_group_size: int | None = None

    @property
    def code(self) -> Format:
        """The format."""
        return code_format(self.format)

    @property
    def narrow(self) -> bool:
        """Whether the least integer code is left out."""
        return self.symmetric and self.convention == "absmax"

    @property
    def group(self) -> int | None:
        """Weights that share a scale along the last of the axes."""
        return self.group_size[0] if isinstance(self.group_size, tuple) else self.group_size

    @property
    def block(self) -> tuple[int, int] | None:
        """Another axis along which neighbours share scales, and how many do."""
        if not isinstance(self.group_size, tuple):
            return None
        return max(a for a in range(-len(self.axes) - 1, 0) if a not in self.axes), (
            self.group_size[1]
        )

    def scales(self, w: jax.Array) -> tuple[Any, jax.Array | None]:
        """The scale and zero point of weights: arrays, or leaves for blocks and quantized scales.

        Args:
          w: weights; float32, bfloat16 or float16.
        """
        affine.check(self.format, self.axes, w.ndim, self.symmetric, self.convention)
        lo, hi = ranges.estimate(w, self)
        return self.of_range(lo, hi, w)

    def of_range(self, lo: jax.Array, hi: jax.Array, w: jax.Array) -> tuple[Any, Any]:
        """The scale and zero point of ranges that hold zero, one for each scale, of weights."""
        empty = (lo == 0) & (hi == 0)

        def store(scale: jax.Array, limit: Any) -> Any:
            if self.scale_format is None:
                return affine.stored(scale, self.scale_dtype, limit)
            return self._quantized_scale(jnp.where(empty, 0.0, scale))

        scale, zero = affine.params_of_range(
            lo,
            hi,
            self.format,
            w.dtype,
            symmetric=self.symmetric,
            convention=self.convention,
            store=store,
        )
        if self.block is None:
            return scale, zero
        axis, times = self.block
        wide = lambda x: None if x is None else RepeatedArray(x, axis, times, w.shape[axis])
        return wide(scale), wide(zero)

    def codes(
        self, w: jax.Array, scale: Any, zero_point: Any, noise: jax.Array | None = None
    ) -> jax.Array:
        """The codes of weights, see `affine.quantize`."""
        return affine.quantize(
            w,
            materialize(scale),
            materialize(zero_point),
            self.format,
            axes=self.axes,
            group_size=self.group,
            narrow=self.narrow,
            noise=noise,
        )

    def values(self, codes: jax.Array, scale: Any, zero_point: Any, dtype: Any) -> jax.Array:
        """The values of codes, see `affine.dequantize`."""
        return affine.dequantize(
            codes,
            materialize(scale),
            materialize(zero_point),
            axes=self.axes,
            group_size=self.group,
            dtype=dtype,
            format=self.format,
        )

    def in_range(self, w: jax.Array, scale: Any, zero_point: Any) -> jax.Array:
        """Where no weight is clipped, see `affine.in_range`."""
        return affine.in_range(
            w,
            materialize(scale),
            materialize(zero_point),
            self.format,
            axes=self.axes,
            group_size=self.group,
            narrow=self.narrow,
        )

    def pack(self, codes: jax.Array, scale: Any, zero_point: Any, dtype: Any) -> QuantizedArray:
        """The stored form of codes."""
        return QuantizedArray.from_codes(
            codes, scale, zero_point, self.format, self.axes[-1], self.group, dtype
        )

    def quantize(self, w: jax.Array, noise: jax.Array | None = None) -> QuantizedArray:
        """The stored form of weights."""
        scale, zero = self.scales(w)
        return self.pack(self.codes(w, scale, zero, noise), scale, zero, w.dtype)

    def _quantized_scale(self, scale: jax.Array) -> QuantizedArray:
        """Scales as codes of their own; none of them zero, for that would lose their weights."""
        fmt, axis = code_format(str(self.scale_format)), self.axes[-1]
        group, axes = self.scale_group_size, [axis]
        if group is None:  # all from the first of the axes on
            axes = [*(a for a in range(min(self.axes), 0) if a != axis), axis]
        lo, hi = affine.least_and_greatest(scale, axes, group)
        # The range begins at zero, which then is code zero of unsigned integers.
        outer, _ = affine.params_of_range(
            lo,
            hi,
            fmt,
            jnp.float32,
            symmetric=fmt.signed,
            convention="absmax",
            store=lambda s, limit: affine.stored(s, jnp.float32, limit),
        )
        codes = affine.quantize(scale, outer, None, fmt, axes=axes, group_size=group)
        codes = jnp.maximum(codes, 1)
        return QuantizedArray.from_codes(codes, outer, None, fmt.name, axis, group, jnp.float32)
