"""Weights of -1, 0 and 1 times a scale: TWN, BitNet b1.58 and TTQ."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays import affine
from jaxcompress.arrays.base import register_array
from jaxcompress.arrays.codebook import CodebookArray
from jaxcompress.errors import SpecError
from jaxcompress.numerics import divide
from jaxcompress.quantization.learned.base import LearnedArray
from jaxcompress.quantization.learned.spec import Layout, LearnedSpec
from jaxcompress.quantization.learned.sums import exact_mean, exact_sum
from jaxcompress.specs import is_number, register_spec


@register_array(
    "ternary",
    children=("weight",),
    static=("axes", "group_size", "threshold", "scale_dtype", "float_dtype"),
    trainable=("weight",),
)
class TernaryArray(LearnedArray):
    """`w_hat = alpha t`, t of -1, 0 and 1; the gradient passes straight through, `dw = dw_hat`.

    Attributes:
      weight: the dense weight.
      axes: the axes over which a scale is shared.
      group_size: values per group, or None.
      threshold: `t = sign(w) [|w| > threshold mean|w|]`, alpha the mean of those `|w|`. None:
        `alpha = mean|w|` and `t = clip(round(w / alpha), -1, 1)`.
      scale_dtype: the dtype of alpha.
      float_dtype: the dtype of the dense array.

    References:
      Li, Zhang and Liu, *Ternary Weight Networks*, 2016; Ma et al., *The Era of 1-bit LLMs: All
      Large Language Models are in 1.58 Bits*, 2024.

    Examples:
      >>> import jax.numpy as jnp
      >>> TWN(0.5)(jnp.array([3.0, -1.0, 0.5])).materialize().tolist()
      [2.0, -2.0, 0.0]
    """

    weight: Any
    axes: tuple[int, ...]
    group_size: int | None
    threshold: float | None
    scale_dtype: np.dtype
    float_dtype: np.dtype

    def grid(self) -> Any:
        w = self.wide()
        mean = exact_mean(jnp.abs(w), self.axes, self.group_size)
        if self.threshold is None:
            scale = self.storable(mean, 1.0)
            codes = affine.quantize(
                w, scale, None, "ternary", axes=self.axes, group_size=self.group_size
            )
            return self.coded(codes, scale, "ternary")
        kept = jnp.abs(w) > self.spread(mean * self.threshold)
        total = exact_sum(jnp.where(kept, jnp.abs(w), 0.0), self.axes, self.group_size)
        count = exact_sum(kept.astype(jnp.float32), self.axes, self.group_size)
        scale = self.storable(divide(total, jnp.maximum(count, 1.0)), 1.0)
        codes = jnp.where(kept, jnp.sign(w), 0.0).astype(jnp.int8)
        return self.coded(codes, scale, "ternary")

    def proxy(self) -> jax.Array:
        return self.wide()

    def describe(self) -> str:
        group = "" if self.group_size is None else f"/{self.group_size}"
        return f"{'absmean' if self.threshold is None else 'fitted'} ternary{group}"


@register_spec("twn")
@dataclasses.dataclass(frozen=True, repr=False)
class TWN(LearnedSpec):
    """Ternary weights with the scale that fits best: TWN.

    `delta = threshold mean|w|`; `w_hat = alpha sign(w)` where `|w| > delta`, else 0;
    `alpha = mean|w|` over those beyond delta. `dw = dw_hat`. A pruned weight stays zero.

    Args:
      threshold: 0.7 is close to the best for weights of a normal or uniform distribution.
      granularity: `tensor`: one scale for all, as published, or `channel`: one for each output.
      group_size: weights that share a scale along the last input axis, or None.
      scale_dtype: the dtype of scales.

    Raises:
      SpecError: for a negative threshold, an unknown granularity or dtype, or a group size below 1.

    References:
      Li, Zhang and Liu, *Ternary Weight Networks*, 2016.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> jc.finalize(jc.compress({"w": jnp.eye(4)}, {"w": TWN()}))
      {'w': QuantizedArray(float32[4, 4], ternary)}
    """

    threshold: float = 0.7
    _: dataclasses.KW_ONLY
    granularity: str = "tensor"
    group_size: int | None = None
    scale_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.threshold, 0):
            raise SpecError(f"threshold={self.threshold!r}: write a number of at least 0, as 0.7")

    def make(self, weight: jax.Array, layout: Layout, key: jax.Array | None) -> TernaryArray:
        return TernaryArray(weight, threshold=float(self.threshold), **layout.fields())


@register_spec("bitnet")
@dataclasses.dataclass(frozen=True, repr=False)
class BitNet(LearnedSpec):
    """Ternary weights as of BitNet b1.58: rounded in units of their mean magnitude.

    `alpha = mean|w|`, `w_hat = alpha clip(round(w / alpha), -1, 1)`; `dw = dw_hat`. A pruned weight
    stays zero.

    Args:
      granularity: `tensor`: one scale for all, as published, or `channel`: one for each output.
      group_size: weights that share a scale along the last input axis, or None.
      scale_dtype: the dtype of scales.

    Raises:
      SpecError: for an unknown granularity or dtype, or a group size below 1.

    References:
      Ma et al., *The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits*, 2024.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> params = jc.compress({"w": jnp.array([3.0, -0.5, -2.5])}, {"w": BitNet()})
      >>> params["w"].materialize().tolist()
      [2.0, 0.0, -2.0]
    """

    _: dataclasses.KW_ONLY
    granularity: str = "tensor"
    group_size: int | None = None
    scale_dtype: str = "bfloat16"

    def make(self, weight: jax.Array, layout: Layout, key: jax.Array | None) -> TernaryArray:
        return TernaryArray(weight, threshold=None, **layout.fields())


@register_array(
    "ttq",
    children=("weight", "positive", "negative"),
    static=("axes", "group_size", "threshold", "scale_dtype", "float_dtype"),
    trainable=("weight", "positive", "negative"),
)
class TTQArray(LearnedArray):
    """Three values of which two are trained: `positive`, 0 and `-negative`.

    Attributes:
      weight: the dense weight.
      positive: the value of large weights, float32, one for each weight of a stack.
      negative: minus the value of large negative ones.
      axes: all axes of one weight.
      group_size: None.
      threshold: what is large, as a part of `max|w|`.
      scale_dtype: of no use: the values are stored in the weight's dtype.
      float_dtype: the dtype of the dense array.

    References:
      Zhu et al., *Trained Ternary Quantization*, 2017.

    Examples:
      >>> import jax.numpy as jnp
      >>> TTQ(0.25)(jnp.array([4.0, -2.0, 0.5])).materialize().tolist()
      [4.0, -2.0, 0.0]
    """

    weight: Any
    positive: Any
    negative: Any
    axes: tuple[int, ...]
    group_size: None
    threshold: float
    scale_dtype: np.dtype
    float_dtype: np.dtype

    def sides(self) -> tuple[jax.Array, jax.Array]:
        """Which weights are large, and which are large and negative."""
        w = self.wide()
        delta = self.threshold * jnp.max(jnp.abs(w), self.axes, keepdims=True, initial=0.0)
        return w > delta, w < -delta

    def grid(self) -> Any:
        above, below = self.sides()
        codes = jnp.where(above, 2, jnp.where(below, 0, 1)).astype(jnp.uint8)
        table = [-self.negative, jnp.zeros_like(self.positive), self.positive]
        batch = self.shape[: self.batch_ndim]
        values = jnp.stack([x.reshape(batch) for x in table], -1)
        return CodebookArray(codes, values.astype(self.float_dtype), self.axes[-1])

    def proxy(self) -> jax.Array:
        above, below = self.sides()
        w, positive, negative = self.wide(), self.positive, self.negative
        fixed = jax.lax.stop_gradient
        large = jnp.where(above, positive, -negative)
        through = w * jnp.where(above, fixed(positive), fixed(negative))
        return jnp.where(above | below, large + through, w)

    def describe(self) -> str:
        return "trained ternary"


@register_spec("ttq")
@dataclasses.dataclass(frozen=True, repr=False)
class TTQ(LearnedSpec):
    """TTQ: ternary weights of which the two magnitudes are trained.

    `delta = threshold max|w|`; `w_hat = p` where `w > delta`, `-n` where `w < -delta`, else 0. Then
    `dp = sum dw_hat` over the first, `dn = -sum dw_hat` over the second (the paper prints it
    without the sign), and `dw = p dw_hat`, `n dw_hat` and `dw_hat`. At first p and n are the means
    of the weights that they stand for. Stored as a codebook of three values. A pruned weight stays
    zero.

    Args:
      threshold: 0.05 as published; 0 is refused.

    Raises:
      SpecError: for a threshold that is not between 0 and 1.

    References:
      Zhu et al., *Trained Ternary Quantization*, 2017.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> jc.finalize(jc.compress({"w": jnp.eye(4)}, {"w": TTQ()}))
      {'w': CodebookArray(float32[4, 4], codebook 3)}
    """

    threshold: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.threshold, 0, 1) or self.threshold in (0, 1):
            raise SpecError(
                f"threshold={self.threshold!r}: write a number between 0 and 1, as 0.05"
            )

    def make(self, weight: jax.Array, layout: Layout, key: jax.Array | None) -> TTQArray:
        zero = jnp.zeros(())
        leaf = TTQArray(weight, zero, zero, threshold=float(self.threshold), **layout.fields())
        means = []
        for side in leaf.sides():
            total = exact_sum(jnp.where(side, jnp.abs(leaf.wide()), 0.0), layout.axes)
            count = exact_sum(side.astype(jnp.float32), layout.axes)
            means.append(divide(total, jnp.maximum(count, 1.0)))
        return leaf.replace(positive=means[0], negative=means[1])
