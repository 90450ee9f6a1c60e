"""Grids on [-1, 1] that nothing has to be learned for: DoReFa and WRPN."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import register_array
from jaxcompress.arrays.codebook import CodebookArray
from jaxcompress.numerics import divide
from jaxcompress.quantization.learned.base import LearnedArray
from jaxcompress.quantization.learned.spec import Layout, LearnedSpec, check_bits
from jaxcompress.specs import register_spec


@register_array(
    "dorefa",
    children=("weight",),
    static=("axes", "group_size", "bits", "scale_dtype", "float_dtype"),
    trainable=("weight",),
)
class DoReFaArray(LearnedArray):
    """`2 round(n t) / n - 1` with `t = tanh(w) / (2 max|tanh(w)|) + 1/2` and `n = 2**bits - 1`.

    Attributes:
      weight: the dense weight.
      axes: all axes of one weight.
      group_size: None.
      bits: bits of a code.
      scale_dtype: of no use.
      float_dtype: the dtype of the dense array.

    References:
      Zhou et al., *DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low
      Bitwidth Gradients*, 2016.

    Examples:
      >>> import jax.numpy as jnp
      >>> DoReFa(2)(jnp.array([3.0, 0.1, -0.1, -9.0])).materialize().tolist()
      [1.0, 0.3333333432674408, -0.3333333432674408, -1.0]
    """

    weight: Any
    axes: tuple[int, ...]
    group_size: None
    bits: int
    scale_dtype: np.dtype
    float_dtype: np.dtype

    def grid(self) -> Any:
        levels = 2**self.bits - 1
        # A division at the end, as nothing of it can be fused into what follows.
        t = divide(self.squashed(), 2.0) + 0.5
        codes = jnp.round(t * levels).astype(jnp.uint8)
        table = (2 * np.arange(levels + 1) - levels).astype(np.float32) / np.float32(levels)
        table = jnp.asarray(table).astype(self.float_dtype)
        table = jnp.broadcast_to(table, (*self.shape[: self.batch_ndim], levels + 1))
        return CodebookArray(codes, table, self.axes[-1])

    def squashed(self) -> jax.Array:
        """`tanh(w)` over its largest magnitude."""
        t = jnp.tanh(self.wide())
        most = jnp.max(jnp.abs(t), self.axes, keepdims=True, initial=0.0)
        return t / jnp.where(t == 0, 1.0, most)

    def proxy(self) -> jax.Array:
        return self.squashed()

    def describe(self) -> str:
        return f"dorefa {self.bits} bits"


@register_spec("dorefa")
@dataclasses.dataclass(frozen=True, repr=False)
class DoReFa(LearnedSpec):
    """DoReFa weights: squashed by a tanh to [-1, 1], and there rounded to `2**bits` levels.

    `w_hat = 2 round(n t) / n - 1`, `t = tanh(w) / (2 max|tanh(w)|) + 1/2`, `n = 2**bits - 1`, with
    the maximum over one weight of the stack. The gradient passes the rounding as if it were not
    there: `dw = dw_hat d(2t)/dw`, that of the maximum included.

    The levels are odd multiples of `1 / n`: zero is none of them, so this is not for pruned
    weights. They are stored as a codebook. The weight's own scale is lost, so a normalization
    should follow. For one bit, take `XNOR(granularity="tensor")`.

    Args:
      bits: bits of a code, 2 to 8.

    Raises:
      SpecError: for other bits.

    References:
      Zhou et al., *DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low
      Bitwidth Gradients*, 2016.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> jc.finalize(jc.compress({"w": jnp.eye(4)}, {"w": DoReFa(3)}))
      {'w': CodebookArray(float32[4, 4], codebook 8)}
    """

    bits: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.bits)

    def make(self, weight: jax.Array, layout: Layout, key: jax.Array | None) -> DoReFaArray:
        return DoReFaArray(weight, bits=self.bits, **layout.fields())


@register_array(
    "wrpn",
    children=("weight",),
    static=("axes", "group_size", "bits", "scale_dtype", "float_dtype"),
    trainable=("weight",),
)
class WRPNArray(LearnedArray):
    """`round(m clip(w, -1, 1)) / m` with `m = 2**(bits-1) - 1`.

    Attributes:
      weight: the dense weight.
      axes: all axes of one weight.
      group_size: None.
      bits: bits of a code.
      scale_dtype: the dtype of the stored `1 / m`.
      float_dtype: the dtype of the dense array.

    References:
      Mishra et al., *WRPN: Wide Reduced-Precision Networks*, 2018.

    Examples:
      >>> import jax.numpy as jnp
      >>> WRPN(2)(jnp.array([1.4, 0.6, -0.2])).materialize().tolist()
      [1.0, 1.0, 0.0]
    """

    weight: Any
    axes: tuple[int, ...]
    group_size: None
    bits: int
    scale_dtype: np.dtype
    float_dtype: np.dtype

    def grid(self) -> Any:
        most = 2 ** (self.bits - 1) - 1
        scale = Layout(self.axes, None, self.scale_dtype, self.float_dtype).scales(
            self.shape, 1 / most
        )
        codes = jnp.round(jnp.clip(self.wide(), -1, 1) * most).astype(jnp.int8)
        return self.coded(codes, scale.astype(self.scale_dtype), f"int{self.bits}")

    def proxy(self) -> jax.Array:
        w = self.wide()
        return jnp.where(jnp.abs(w) <= 1, w, 0.0)

    def describe(self) -> str:
        return f"wrpn {self.bits} bits"


@register_spec("wrpn")
@dataclasses.dataclass(frozen=True, repr=False)
class WRPN(LearnedSpec):
    """WRPN weights: clipped to [-1, 1], and there rounded to `2**bits - 1` levels with zero.

    `w_hat = round(m clip(w, -1, 1)) / m`, `m = 2**(bits-1) - 1`; `dw = dw_hat` where `|w| <= 1`,
    else 0. The method makes up for few bits by wider layers, which is the model's affair.

    Args:
      bits: bits of a code, 2 to 8.

    Raises:
      SpecError: for other bits.

    References:
      Mishra et al., *WRPN: Wide Reduced-Precision Networks*, 2018.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> jc.finalize(jc.compress({"w": jnp.eye(4)}, {"w": WRPN(3)}))
      {'w': QuantizedArray(float32[4, 4], int3)}
    """

    bits: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.bits)

    def make(self, weight: jax.Array, layout: Layout, key: jax.Array | None) -> WRPNArray:
        return WRPNArray(weight, bits=self.bits, **layout.fields())
