"""Weights that round their inputs to a range that is trained, or fixed to [0, 1]."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays import affine
from jaxcompress.arrays.base import register_array
from jaxcompress.arrays.quantized_input import Contraction, Grid, InputArray, QuantizedInputArray
from jaxcompress.numerics import divide

_LEAST = float(np.finfo(np.float32).smallest_normal)


def _stored(leaf: Any, scale: jax.Array) -> QuantizedInputArray:
    return QuantizedInputArray(leaf.stored(), scale, None, leaf.format, "tensor", False)


@register_array(
    "learned_input",
    children=("weight", "bound"),
    static=("format", "method"),
    trainable=("weight", "bound"),
    inner=("weight",),
)
class LearnedInputArray(InputArray):
    """A weight that rounds its input with a trained range: PACT or LSQ.

    PACT, unsigned: `x_hat = s round(clip(x, 0, alpha) / s)` with `s = alpha / qmax`. Backward,
    `dx = dx_hat` where `0 <= x < alpha`, else 0, and `dalpha = sum dx_hat` where `x >= alpha`.

    LSQ: `x_hat = s clip(round(v), qmin, qmax)` with `v = x / s`. Backward, `dx = dx_hat` where
    `qmin < v < qmax`, else 0, and `ds = g sum dx_hat (round(v) - v)` over what is inside,
    `dx_hat qmin` or `dx_hat qmax` outside, with `g = 1 / sqrt(n qmax)` for n inputs of a token, or
    in a convolution of an example.

    `finalize` gives a `QuantizedInputArray` with the stored scale: the same results, bit for bit.

    Attributes:
      weight: the weight: an array or a leaf.
      bound: alpha or s, float32, with the weight's number of axes, of size one but for leading axes
        of a stack. One that falls below the least normal number counts as that.
      format: the integer format.
      method: `pact` or `lsq`.

    References:
      Choi et al., *PACT: Parameterized Clipping Activation for Quantized Neural Networks*, 2018;
      Esser et al., *Learned Step Size Quantization*, 2020.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> leaf = LearnedInputArray(jnp.ones((2, 1)), jnp.full((1, 1), 3.0), "uint2", "pact")
      >>> run = jc.compressed(lambda w, x: (x @ w)[0, 0])
      >>> float(run(leaf, jnp.array([[1.2, 5.0]])))
      4.0
      >>> jax.grad(run)(leaf, jnp.array([[1.2, 5.0]])).bound.tolist()
      [[1.0]]
    """

    weight: Any
    bound: Any
    format: str
    method: str

    factors: ClassVar[tuple[str, ...]] = ("bound",)

    def scale(self) -> jax.Array:
        """The scale that is stored."""
        bound = self.bound.astype(jnp.float32)
        qmax = affine.int_format(self.format).qmax
        return jnp.maximum(divide(bound, qmax) if self.method == "pact" else bound, _LEAST)

    def grid(self, x: jax.Array, contraction: Contraction) -> Grid | None:
        laid = contraction.on_input(self.scale(), x)
        if laid is None:
            return None
        qmax = affine.int_format(self.format).qmax
        factor = 1.0 if self.method == "pact" else 1 / np.sqrt(contraction.features(x) * qmax)
        return Grid(laid, None, self.format, False, self.method, float(factor))

    def finalize(self) -> QuantizedInputArray:
        return _stored(self, self.scale())

    def describe(self) -> str:
        return f"{self.of_weight().strip() or 'dense'}, input {self.method} {self.format}"


@register_array(
    "unit_input", children=("weight",), static=("format",), trainable=("weight",), inner=("weight",)
)
class UnitInputArray(InputArray):
    """A weight that rounds its input within [0, 1], as DoReFa does.

    `x_hat = round(qmax clip(x, 0, 1)) / qmax`, and `dx = dx_hat` where `0 <= x < 1`, else 0.
    `finalize` gives a `QuantizedInputArray` with the scale `1 / qmax`.

    Attributes:
      weight: the weight: an array or a leaf.
      format: `uint2` .. `uint8`.

    References:
      Zhou et al., *DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low
      Bitwidth Gradients*, 2016.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> leaf = UnitInputArray(jnp.ones((1, 1)), "uint2")
      >>> x = jnp.array([[-1.0], [0.6], [9.0]])
      >>> [round(float(y), 3) for y in jc.compressed(lambda w, x: x @ w)(leaf, x)[:, 0]]
      [0.0, 0.667, 1.0]
    """

    weight: Any
    format: str

    def scale(self) -> jax.Array:
        """The scale that is stored."""
        return jnp.full((1,) * self.ndim, 1 / affine.int_format(self.format).qmax, jnp.float32)

    def grid(self, x: jax.Array, contraction: Contraction) -> Grid | None:
        scale = self.scale().reshape((1,) * x.ndim)
        return Grid(scale, None, self.format, False, "pact", 0.0)

    def finalize(self) -> QuantizedInputArray:
        # Whole along the leading axes of a stack, so that a scan can slice it.
        lead = self.shape[: self.weight_batch_ndim()]
        scale = jnp.broadcast_to(self.scale(), (*lead, *(1,) * (self.ndim - len(lead))))
        return _stored(self, scale)

    def weight_batch_ndim(self) -> int:
        """How many leading axes are those of a stack."""
        return max(0, min(self.batch_ndim, self.ndim - 2))

    def describe(self) -> str:
        return f"{self.of_weight().strip() or 'dense'}, input in [0, 1] {self.format}"
