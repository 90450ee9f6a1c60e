"""Differentiable soft quantization."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays import affine
from jaxcompress.arrays.base import register_array
from jaxcompress.errors import SpecError
from jaxcompress.numerics import divide
from jaxcompress.quantization.learned.base import LearnedArray
from jaxcompress.quantization.learned.spec import Layout, LearnedSpec, check_bits
from jaxcompress.quantization.learned.straight import straight_through
from jaxcompress.specs import is_number, register_spec

_LEAST, _MOST = 1e-3, 0.5  # of alpha: beyond, a segment is a step, or bends the other way


@register_array(
    "dsq",
    children=("weight", "lower", "upper", "alpha"),
    static=("axes", "group_size", "bits", "scale_dtype", "float_dtype"),
    trainable=("weight", "lower", "upper", "alpha"),
)
class DSQArray(LearnedArray):
    """A weight on a grid between two trained bounds, whose gradient is that of tanh segments.

    Attributes:
      weight: the dense weight.
      lower: l, float32, with the axes of a stored scale.
      upper: u.
      alpha: how far a segment is from a step, kept within 0.001 to 0.5 where it is used.
      axes: the axes over which bounds are shared.
      group_size: None.
      bits: bits of a code.
      scale_dtype: the dtype that the step is rounded to.
      float_dtype: the dtype of the dense array.

    References:
      Gong et al., *Differentiable Soft Quantization: Bridging Full-Precision and Low-Bit Neural
      Networks*, 2019.

    Examples:
      >>> import jax.numpy as jnp
      >>> DSQ(2)(jnp.array([2.0, -1.0, 0.4])).materialize().tolist()
      [2.0, -1.0, 0.0]
    """

    weight: Any
    lower: Any
    upper: Any
    alpha: Any
    axes: tuple[int, ...]
    group_size: None
    bits: int
    scale_dtype: np.dtype
    float_dtype: np.dtype

    @property
    def levels(self) -> int:
        """How many steps there are."""
        return 2**self.bits - 1

    def step(self) -> tuple[jax.Array, jax.Array]:
        """The scale and zero point that are stored."""
        scale = self.storable(divide(self.upper - self.lower, self.levels), self.levels)
        zero = jnp.round(divide(-self.lower, scale.astype(jnp.float32)))
        return scale, jnp.clip(zero, 0, self.levels).astype(jnp.uint8)

    def grid(self) -> Any:
        scale, zero = self.step()
        name = f"uint{self.bits}"
        codes = affine.quantize(self.weight, scale, zero, name, axes=self.axes)
        return self.coded(codes, scale, name, zero)

    def proxy(self) -> jax.Array:
        scale, zero = jax.lax.stop_gradient(self.step())
        stored, first = scale.astype(jnp.float32), -zero.astype(jnp.float32) * scale
        # The stored grid, with the gradient of the bounds.
        low = straight_through(first, self.lower)
        high = straight_through(first + self.levels * stored, self.upper)
        step = straight_through(stored, (self.upper - self.lower) / self.levels)
        alpha = straight_through(jnp.clip(self.alpha, _LEAST, _MOST), self.alpha)
        low, high, step, alpha = (self.spread(x) for x in (low, high, step, alpha))
        w, fixed = self.wide(), jax.lax.stop_gradient
        part = jnp.clip(jnp.floor(fixed((w - low) / step)), 0, self.levels - 1)
        middle = low + (part + 0.5) * step
        slope = jnp.log(2 / alpha - 1) / step
        bend = jnp.tanh(slope * (w - middle)) / (1 - alpha)
        soft = low + step * (part + (bend + 1) / 2)
        return jnp.where(w < low, low, jnp.where(w > high, high, soft))

    def describe(self) -> str:
        return f"dsq {self.bits} bits"


@register_spec("dsq")
@dataclasses.dataclass(frozen=True, repr=False)
class DSQ(LearnedSpec):
    """DSQ: the gradient of the rounding is that of tanh segments, which may become steps.

    With `D = (u - l) / (2**bits - 1)` and `m_i = l + (i + 1/2) D` the middle of interval i, the
    soft function is `Q(w) = l + D (i + (phi(w) + 1) / 2)`,
    `phi(w) = tanh(k (w - m_i)) / (1 - alpha)`, `k = log(2 / alpha - 1) / D`, and l below l, u above
    u. Forward is the nearest level, `phi` replaced by its sign; backward is the derivative of Q
    with respect to w, l, u and alpha, all of them trained, i held fixed.

    l is moved to a whole number of steps below zero, `z = round(-l / D)`, so that zero is a level
    and a pruned weight stays zero; D is rounded to `scale_dtype`. Both count as if they were not
    rounded in the gradient. At first l and u are the range of the weights.

    Args:
      bits: bits of a code, 2 to 8.
      alpha: at first, above 0 and at most 0.5; small ones are close to steps.
      granularity: `tensor`: one range for all, as published, or `channel`: one for each output.
      scale_dtype: the dtype of the stored step.

    Raises:
      SpecError: for other bits or alpha, or an unknown granularity or dtype.

    References:
      Gong et al., *Differentiable Soft Quantization: Bridging Full-Precision and Low-Bit Neural
      Networks*, 2019.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> jc.finalize(jc.compress({"w": jnp.eye(4)}, {"w": DSQ(3)}))
      {'w': QuantizedArray(float32[4, 4], uint3 affine)}
    """

    bits: int = 4
    _: dataclasses.KW_ONLY
    alpha: float = 0.2
    granularity: str = "tensor"
    scale_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.bits)
        if not is_number(self.alpha, _LEAST, _MOST):
            raise SpecError(f"alpha={self.alpha!r}: write a number from {_LEAST} to {_MOST}")

    def make(self, weight: jax.Array, layout: Layout, key: jax.Array | None) -> DSQArray:
        w = weight.astype(jnp.float32)
        lower = jnp.min(w, layout.axes, keepdims=True, initial=0.0)
        upper = jnp.max(w, layout.axes, keepdims=True, initial=0.0)
        upper = jnp.where(upper == lower, lower + 1.0, upper)
        alpha = layout.scales(weight.shape, self.alpha)
        return DSQArray(weight, lower, upper, alpha, bits=self.bits, **layout.fields())
