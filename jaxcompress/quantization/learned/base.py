"""What all trained quantized weights have in common: one grid, and one gradient through it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays import affine
from jaxcompress.arrays.base import CompressedArray, narrows
from jaxcompress.arrays.codebook import CodebookArray
from jaxcompress.arrays.packed import PackedArray, block_for
from jaxcompress.arrays.quantized import QuantizedArray
from jaxcompress.numerics import rounded
from jaxcompress.quantization.learned.straight import straight_through
from jaxcompress.quantization.learned.sums import shared_by


class LearnedArray(CompressedArray):
    """A dense weight that is rounded to a grid wherever it is used, and trained through it.

    A subclass registers its children, `weight` among them, and the static fields below, and defines

    - `grid`: the leaf that `finalize` stores, its codes not packed yet. The forward pass computes
      with its values, so they are those of the stored leaf, bit for bit.
    - `proxy`: any expression, in float32 and of the weight's shape, with the gradient that the
      method has. Its value is of no account.

    What `grid` computes from sums is taken from `exact_sum`, so that it does not depend on how a
    program is compiled.

    Attributes:
      weight: the dense weight.
      axes: the axes over which a scale is shared, negative; codes are packed along the last.
      group_size: values per group along `axes[-1]`, or None.
      scale_dtype: the dtype of stored scales.
      float_dtype: the dtype of the dense array.
    """

    weight: Any
    axes: Any
    group_size: Any
    scale_dtype: Any
    float_dtype: Any

    def grid(self) -> CompressedArray:
        """The storage leaf of the present weight, with codes that are not packed."""
        raise NotImplementedError

    def proxy(self) -> jax.Array:
        """An expression with the gradient of the method."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.float_dtype

    @property
    def batch_ndim(self) -> int:
        return max(0, self.weight.ndim + min(self.axes))

    def materialize(self, key: jax.Array | None = None) -> jax.Array:
        fixed = jax.tree.map(jax.lax.stop_gradient, self)
        return straight_through(fixed.grid().materialize(), self.proxy().astype(self.float_dtype))

    def finalize(self) -> CompressedArray | jax.Array:
        """The storage leaf, with packed codes."""
        return _finalized(self)

    def astype(self, dtype: Any) -> CompressedArray | None:
        return self.replace(float_dtype=np.dtype(dtype)) if narrows(self.dtype, dtype) else None

    def describe(self) -> str:
        group = "" if self.group_size is None else f"/{self.group_size}"
        return f"{self.form.replace('_', ' ')}{group}"

    # What grids and proxies are made of.

    def wide(self) -> jax.Array:
        """The weight in float32."""
        return self.weight.astype(jnp.float32)

    def spread(self, scale: jax.Array) -> jax.Array:
        """A scale as an array of the weight's shape, in float32; differentiable."""
        ones = jnp.ones(self.shape, jnp.float32)
        return affine.dequantize(ones, scale, axes=self.axes, group_size=self.group_size)

    def count(self) -> np.ndarray:
        """How many weights share a scale."""
        return shared_by(self.shape, self.axes, self.group_size)

    def storable(self, scale: jax.Array, extent: float) -> jax.Array:
        """A scale in its storage dtype: a normal number, `extent` times which the dtype holds."""
        info = jnp.finfo(self.scale_dtype)
        most = float(jnp.finfo(self.float_dtype).max) / extent * (1 - float(info.eps))
        low, high = float(info.smallest_normal), min(float(info.max), most)
        return rounded(jnp.clip(scale.astype(jnp.float32), low, high), self.scale_dtype)

    def coded(self, codes: jax.Array, scale: jax.Array, format: str, zero: Any = None) -> Any:
        """A `QuantizedArray` with codes that are not packed."""
        return QuantizedArray(
            codes, scale, zero, self.axes[-1], self.group_size, format, self.float_dtype
        )


@jax.jit
def _finalized(leaf: LearnedArray) -> Any:
    # Compiled like the forward pass, whose values these shall be.
    return packed(leaf.grid())


def packed(leaf: Any) -> Any:
    """A storage leaf with its codes packed."""
    if isinstance(leaf, QuantizedArray):
        return QuantizedArray.from_codes(
            leaf.codes, leaf.scale, leaf.zero_point, leaf.format, leaf.axis, leaf.group_size,
            leaf.float_dtype,
        )  # fmt: skip
    if isinstance(leaf, CodebookArray):
        bits = max(1, (leaf.centroids.shape[-1] - 1).bit_length())
        if bits == 8:
            return leaf
        block = block_for(leaf.shape[leaf.axis], bits, leaf.axis, None)
        indices = PackedArray.pack(leaf.indices, bits, axis=leaf.axis, block=block)
        return leaf.replace(indices=indices)
    return leaf
