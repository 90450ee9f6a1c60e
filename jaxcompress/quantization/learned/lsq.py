"""Learned step sizes: LSQ, and LSQ+ with a learned offset."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays import affine
from jaxcompress.arrays.base import register_array
from jaxcompress.numerics import divide
from jaxcompress.quantization.learned.base import LearnedArray
from jaxcompress.quantization.learned.spec import Layout, LearnedSpec, check_integer_format
from jaxcompress.quantization.learned.straight import scaled_gradient
from jaxcompress.quantization.learned.sums import exact_mean
from jaxcompress.specs import register_spec


class _Step(LearnedArray):
    """A grid whose step `scale` is trained, with what LSQ and LSQ+ share."""

    scale: Any
    format: Any

    @property
    def bounds(self) -> tuple[int, int]:
        """The least and the greatest code."""
        fmt = affine.int_format(self.format)
        return fmt.qmin, fmt.qmax

    def step(self) -> jax.Array:
        """The scale that is stored."""
        low, high = self.bounds
        return self.storable(self.scale, max(high, -low, high - low))

    def codes(self, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
        """The codes of the present weight."""
        return affine.quantize(
            self.weight, scale, zero, self.format, axes=self.axes, group_size=self.group_size
        )

    def factor(self) -> Any:
        """What gradients of the scale are multiplied by, `1 / sqrt(n qmax)`."""
        return 1 / np.sqrt(np.maximum(1, self.count()) * self.bounds[1])

    def regions(self, scale: jax.Array, zero: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`w / s`, its code without the zero point, and whether it is inside of the range."""
        v = divide(self.wide(), self.spread(scale))
        shift = jnp.zeros(()) if zero is None else self.spread(zero)
        low, high = self.bounds
        inside = (low < v + shift) & (v + shift < high)
        return v, jnp.clip(jnp.round(v), low - shift, high - shift), inside


@register_array(
    "lsq",
    children=("weight", "scale"),
    static=("axes", "group_size", "format", "scale_dtype", "float_dtype"),
    trainable=("weight", "scale"),
)
class LSQArray(_Step):
    """A weight on a grid of which the step is trained, `w_hat = s clip(round(w / s), qmin, qmax)`.

    Attributes:
      weight: the dense weight.
      scale: s, float32, with the axes of a stored scale.
      axes: the axes over which a scale is shared.
      group_size: values per group, or None.
      format: `int2` .. `int8`.
      scale_dtype: the dtype that s is rounded to where it is used.
      float_dtype: the dtype of the dense array.

    References:
      Esser et al., *Learned Step Size Quantization*, 2020.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> leaf = LSQ("int4")(jnp.array([[1.3], [-7.0]])).replace(scale=jnp.ones((1, 1)))
      >>> leaf.materialize().tolist()
      [[1.0], [-7.0]]
    """

    weight: Any
    scale: Any
    axes: tuple[int, ...]
    group_size: int | None
    format: str
    scale_dtype: np.dtype
    float_dtype: np.dtype

    def grid(self) -> Any:
        scale = self.step()
        return self.coded(self.codes(scale, None), scale, self.format)

    def proxy(self) -> jax.Array:
        v, code, inside = jax.lax.stop_gradient(self.regions(self.step(), None))
        slope = jnp.where(inside, code - v, code)
        scale = self.spread(scaled_gradient(self.scale, self.factor()))
        return jnp.where(inside, self.wide(), 0.0) + scale * slope

    def describe(self) -> str:
        return f"lsq {self.format}{'' if self.group_size is None else f'/{self.group_size}'}"


@register_spec("lsq")
@dataclasses.dataclass(frozen=True, repr=False)
class LSQ(LearnedSpec):
    """LSQ: the step of the grid is trained with the weights.

    Forward `w_hat = s clip(round(v), qmin, qmax)`, `v = w / s`. Backward, with `dw_hat` the
    gradient of the loss: `dw = dw_hat` where `qmin < v < qmax`, else 0, and
    `ds = g sum dw_hat (round(v) - v)` over what is inside, `dw_hat qmin` or `dw_hat qmax` outside,
    with `g = 1 / sqrt(n qmax)` for n weights of one scale. At first `s = 2 mean|w| / sqrt(qmax)`.

    `compress` puts it in, any optimizer trains weights and scales, `finalize` gives a
    `QuantizedArray` with the same values, bit for bit. s is rounded to `scale_dtype` where it is
    used; one that falls below the least normal number of that dtype counts as that number, and its
    gradient still passes.

    Args:
      format: `int2` .. `int8`, all codes in use.
      granularity: `channel`: a scale for each output, or `tensor`: one for all.
      group_size: weights that share a scale along the last input axis; the last group may be
        shorter. None: as `granularity` says.
      scale_dtype: the dtype in which scales are stored.

    Raises:
      SpecError: for an unknown format, granularity or dtype, or a group size below 1.

    References:
      Esser et al., *Learned Step Size Quantization*, 2020.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> params = {"kernel": jnp.array([[1.0], [-0.25], [0.5]])}
      >>> params = jc.compress(params, {"kernel": LSQ("int2")})
      >>> loss = jc.compressed(lambda params: jnp.sum(params["kernel"] ** 2))
      >>> jax.grad(loss)(params)["kernel"].scale.shape
      (1, 1)
      >>> jc.finalize(params)
      {'kernel': QuantizedArray(float32[3, 1], int2)}
    """

    format: str
    _: dataclasses.KW_ONLY
    granularity: str = "channel"
    group_size: int | None = None
    scale_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer_format(self.format)

    def make(self, weight: jax.Array, layout: Layout, key: jax.Array | None) -> LSQArray:
        mean = exact_mean(jnp.abs(weight), layout.axes, layout.group_size)
        scale = 2 * mean / np.sqrt(affine.int_format(self.format).qmax)
        scale = jnp.where(scale == 0, 1.0, scale)
        return LSQArray(weight, scale, format=self.format, **layout.fields())


@register_array(
    "lsq_plus",
    children=("weight", "scale", "offset"),
    static=("axes", "group_size", "format", "scale_dtype", "float_dtype"),
    trainable=("weight", "scale", "offset"),
)
class LSQPlusArray(_Step):
    """A weight on a grid whose step and offset are trained, with zero on it.

    Attributes:
      weight: the dense weight.
      scale: s, float32, with the axes of a stored scale.
      offset: beta, float32, of the same shape; `-beta / s`, rounded, is the code of zero.
      axes: the axes over which a scale is shared.
      group_size: values per group, or None.
      format: `int2` .. `int8`, `uint2` .. `uint8`.
      scale_dtype: the dtype that s is rounded to where it is used.
      float_dtype: the dtype of the dense array.

    References:
      Bhalgat et al., *LSQ+: Improving Low-bit Quantization through Learnable Offsets and Better
      Initialization*, 2020.

    Examples:
      >>> import jax.numpy as jnp
      >>> LSQPlus("uint2")(jnp.array([[2.0], [-1.0]])).materialize().tolist()
      [[2.0], [-1.0]]
    """

    weight: Any
    scale: Any
    offset: Any
    axes: tuple[int, ...]
    group_size: int | None
    format: str
    scale_dtype: np.dtype
    float_dtype: np.dtype

    def zero_point(self, scale: jax.Array) -> jax.Array:
        """The code of zero."""
        low, high = self.bounds
        zero = jnp.round(divide(-self.offset, scale.astype(jnp.float32)))
        return jnp.clip(zero, low, high).astype(affine.int_format(self.format).dtype)

    def grid(self) -> Any:
        scale = self.step()
        zero = self.zero_point(scale)
        return self.coded(self.codes(scale, zero), scale, self.format, zero)

    def proxy(self) -> jax.Array:
        step = self.step()
        zero = self.zero_point(step)
        v, code, inside = jax.lax.stop_gradient(self.regions(step, zero))
        bound = jax.lax.stop_gradient(code + self.spread(zero))
        scale = self.spread(scaled_gradient(self.scale, self.factor()))
        offset = self.spread(scaled_gradient(self.offset, self.factor()))
        clipped = offset + scale * bound
        return jnp.where(inside, self.wide() + scale * (code - v), clipped)

    def describe(self) -> str:
        return f"lsq+ {self.format}{'' if self.group_size is None else f'/{self.group_size}'}"


@register_spec("lsq_plus")
@dataclasses.dataclass(frozen=True, repr=False)
class LSQPlus(LSQ):
    """LSQ+: step and offset of the grid are trained with the weights.

    The published grid, `s clip(round((w - beta) / s), qmin, qmax) + beta`, need not have a zero.
    Here beta is rounded to it: `z = clip(round(-beta / s), qmin, qmax)` and
    `w_hat = s (clip(round(w / s) + z, qmin, qmax) - z)`, so that a pruned weight stays zero and z
    is stored as a code. Gradients are the published ones, with `v = w / s + z`: inside,
    `qmin < v < qmax`, `dw = dw_hat`, `ds = g dw_hat (round(v) - v)`, `dbeta = 0`; outside `dw = 0`,
    `ds = g dw_hat qmin` or `g dw_hat qmax`, `dbeta = g dw_hat`; sums over what shares a scale,
    `g = 1 / sqrt(n qmax)`. At first s and beta are those of the range of the weights.

    Args:
      format: `int2` .. `int8` or `uint2` .. `uint8`.
      granularity: `channel`: a scale for each output, or `tensor`: one for all.
      group_size: weights that share a scale, as in `LSQ`.
      scale_dtype: the dtype in which scales are stored.

    Raises:
      SpecError: as `LSQ`.

    References:
      Bhalgat et al., *LSQ+: Improving Low-bit Quantization through Learnable Offsets and Better
      Initialization*, 2020.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> params = {"kernel": jnp.array([[1.0], [-0.25], [0.5]])}
      >>> jc.finalize(jc.compress(params, {"kernel": LSQPlus("uint4")}))
      {'kernel': QuantizedArray(float32[3, 1], uint4 affine)}
    """

    def __post_init__(self) -> None:
        LearnedSpec.__post_init__(self)
        check_integer_format(self.format, signed=False)

    def make(self, weight: jax.Array, layout: Layout, key: jax.Array | None) -> Any:
        axes: Any = layout.axes
        scale, zero = affine.affine_params(
            weight, self.format, axes=axes, group_size=layout.group_size, symmetric=False,
            scale_dtype=jnp.float32,
        )  # fmt: skip
        assert zero is not None
        offset = -zero.astype(jnp.float32) * scale
        return LSQPlusArray(weight, scale, offset, format=self.format, **layout.fields())
