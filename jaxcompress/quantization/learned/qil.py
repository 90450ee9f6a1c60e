"""Quantization intervals that are trained."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import register_array
from jaxcompress.quantization.learned.base import LearnedArray
from jaxcompress.quantization.learned.spec import Layout, LearnedSpec, check_bits
from jaxcompress.specs import register_spec


@register_array(
    "qil",
    children=("weight", "center", "distance", "gamma"),
    static=("axes", "group_size", "bits", "scale_dtype", "float_dtype"),
    trainable=("weight", "center", "distance", "gamma"),
)
class QILArray(LearnedArray):
    """A weight whose magnitudes between `c - d` and `c + d` are mapped to [0, 1] and rounded.

    Attributes:
      weight: the dense weight.
      center: c, float32, with the axes of a stored scale.
      distance: d.
      gamma: the exponent of the map.
      axes: the axes over which an interval is shared.
      group_size: None.
      bits: bits of a code.
      scale_dtype: the dtype of the stored `1 / m`.
      float_dtype: the dtype of the dense array.

    References:
      Jung et al., *Learning to Quantize Deep Networks by Optimizing Quantization Intervals with
      Task Loss*, 2019.

    Examples:
      >>> import jax.numpy as jnp
      >>> QIL(2)(jnp.array([4.0, -3.0, 0.4])).materialize().tolist()
      [1.0, -1.0, 0.0]
    """

    weight: Any
    center: Any
    distance: Any
    gamma: Any
    axes: tuple[int, ...]
    group_size: None
    bits: int
    scale_dtype: np.dtype
    float_dtype: np.dtype

    @property
    def most(self) -> int:
        """The greatest code."""
        return 2 ** (self.bits - 1) - 1

    def mapped(self) -> jax.Array:
        """The weight after the transformer, in [-1, 1]."""
        w = self.wide()
        c, d, gamma = (self.spread(x) for x in (self.center, self.distance, self.gamma))
        d = jnp.maximum(d, float(jnp.finfo(jnp.float32).smallest_normal))
        x = 0.5 * (jnp.abs(w) - c) / d + 0.5
        inside = (x > 0) & (x < 1)
        x = jnp.where(inside, jnp.where(inside, x, 0.5) ** gamma, jnp.where(x >= 1, 1.0, 0.0))
        return jnp.sign(w) * x

    def grid(self) -> Any:
        codes = jnp.round(self.mapped() * self.most).astype(jnp.int8)
        layout = Layout(self.axes, None, self.scale_dtype, self.float_dtype)
        scale = layout.scales(self.shape, 1 / self.most).astype(self.scale_dtype)
        return self.coded(codes, scale, f"int{self.bits}")

    def proxy(self) -> jax.Array:
        return self.mapped()

    def describe(self) -> str:
        return f"qil {self.bits} bits"


@register_spec("qil")
@dataclasses.dataclass(frozen=True, repr=False)
class QIL(LearnedSpec):
    """QIL: an interval of magnitudes is trained; below it weights are pruned, above it clipped.

    The transformer: `t = 0` where `|w| < c - d`, `sign(w)` where `|w| > c + d`, and between them
    `sign(w) (a |w| + b)**gamma` with `a = 1 / (2 d)`, `b = 1/2 - c / (2 d)`. Then
    `w_hat = round(m t) / m`, `m = 2**(bits-1) - 1`. The gradient is the exact one of t, straight
    through the rounding, with respect to w, c, d and gamma, all of them trained. A pruned weight
    stays zero.

    At first the interval is [0, max|w|], and gamma 1. The weight's own scale is lost, so a
    normalization should follow.

    Args:
      bits: bits of a code, 2 to 8.
      granularity: `tensor`: one interval for all, as published, or `channel`: one for each output.

    Raises:
      SpecError: for other bits, or an unknown granularity.

    References:
      Jung et al., *Learning to Quantize Deep Networks by Optimizing Quantization Intervals with
      Task Loss*, 2019.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> jc.finalize(jc.compress({"w": jnp.eye(4)}, {"w": QIL(3)}))
      {'w': QuantizedArray(float32[4, 4], int3)}
    """

    bits: int = 4
    _: dataclasses.KW_ONLY
    granularity: str = "tensor"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.bits)

    def make(self, weight: jax.Array, layout: Layout, key: jax.Array | None) -> QILArray:
        half = jnp.max(jnp.abs(weight.astype(jnp.float32)), layout.axes, keepdims=True) / 2
        half = jnp.where(half == 0, 0.5, half)
        gamma = jnp.ones_like(half)
        return QILArray(weight, half, half, gamma, bits=self.bits, **layout.fields())
