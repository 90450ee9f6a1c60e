"""A weight with one factor for each of its inputs, which is applied to the inputs."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.arrays.base import (
    conv_general_dilated,
    dot_general,
    gather_rows,
    materialize,
    register_array,
    register_rule,
)
from jaxcompress.arrays.deferred import deferred_primitive
from jaxcompress.arrays.wrapped import WrappedArray, at_features, at_operand
from jaxcompress.errors import SpecError


@register_array(
    "scaled", children=("weight", "scale"), trainable=("weight",), inner=("weight",)
)  # fmt: skip
class ScaledArray(WrappedArray):
    """`w = scale * weight`, with a scale for each input.

    A contraction over the scaled inputs runs as `(x * scale) @ weight`, by the rule of the weight,
    and so does a convolution with a scale for each input feature: integer codes stay integers.
    That is the one lowering of such a contraction, of trained and of stored weights alike. It
    agrees with `x @ materialize()` to rounding: either `x * scale` or `scale * weight` is rounded
    to its dtype, so that terms differ by `3 eps / 2` relative at most. Anything else, look-ups
    included, sees the dense values: the float32 product, rounded once.

    Attributes:
      weight: the weight, `[..., K, N]` for instance: an array or a leaf.
      scale: floating, with as many axes as the weight; each is of full length, as the inputs are,
        or of size one.

    References:
      Xiao et al., *SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
      Language Models*, 2023; Lin et al., *AWQ: Activation-aware Weight Quantization for On-Device
      LLM Compression and Acceleration*, 2024.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.arrays.scaled import ScaledArray
      >>> w = jnp.array([[1.0, -2.0], [4.0, 8.0]])
      >>> leaf = ScaledArray.of(jc.Quantize("int8")(w * jnp.array([[4.0], [1.0]])), [[0.25], [1.0]])
      >>> leaf
      ScaledArray(float32[2, 2], scaled int8)
      >>> y = jc.compressed(lambda w, x: x @ w)(leaf, jnp.array([[1.0, 0.5]]))
      >>> [round(float(value), 1) for value in y[0]]
      [3.0, 2.0]
    """

    weight: Any
    scale: Any

    factors: ClassVar[tuple[str, ...]] = ("scale",)

    @classmethod
    def of(cls, weight: Any, scale: Any) -> ScaledArray:
        """The leaf of a weight and a scale; checks that the scale broadcasts to the weight."""
        scale = jnp.asarray(scale)
        fits = scale.ndim == weight.ndim and all(
            n in (1, m) for n, m in zip(scale.shape, weight.shape)
        )
        if not fits:
            raise SpecError(
                f"a scale of shape {scale.shape} does not fit a weight of shape "
                f"{tuple(weight.shape)}: write one with as many axes, each as long or of size 1"
            )
        if not jnp.issubdtype(scale.dtype, jnp.floating):
            raise SpecError(f"a scale is floating, not {scale.dtype}: write float32 values")
        return cls(weight, scale)

    def materialize(self, key: jax.Array | None = None) -> jax.Array:
        return multiplied(materialize(self.weight), self.scale)

    def describe(self) -> str:
        return f"scaled{self.of_weight()}"


def multiplied(x: jax.Array, factor: jax.Array) -> jax.Array:
    """`x * factor` in float32 at least, rounded once to the dtype of x."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return (x.astype(wide) * factor.astype(wide)).astype(x.dtype)


def floating(x: jax.Array, dtype: Any) -> jax.Array:
    """`x`, or where it holds integers or booleans, in the weight's dtype."""
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(dtype)


@register_rule(ScaledArray, "dot_general")
def _dot_general(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    leaf = operands[i]
    factor = at_operand(leaf.scale, i, operands, params)
    if factor is None:
        return deferred_primitive(lax.dot_general_p, i, leaf, operands, params)
    x = multiplied(floating(operands[1 - i], leaf.dtype), factor)
    lhs, rhs = (leaf.weight, x) if i == 0 else (x, leaf.weight)
    return dot_general(lhs, rhs, params)


@register_rule(ScaledArray, "conv_general_dilated")
def _conv(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    leaf = operands[i]
    factor = at_features(leaf.scale, i, operands, params)
    if factor is None:
        return deferred_primitive(lax.conv_general_dilated_p, i, leaf, operands, params)
    return conv_general_dilated(multiplied(operands[0], factor), leaf.weight, params)


@register_rule(ScaledArray, "gather")
def _gather(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    """Rows of a table whose scale is that of its features: only those rows are expanded."""
    leaf, numbers = operands[0], params["dimension_numbers"]
    indexed = numbers.start_index_map
    plain = (
        i == 0
        and not numbers.operand_batching_dims
        and tuple(numbers.collapsed_slice_dims) == tuple(indexed)
        and all(leaf.scale.shape[a] == 1 for a in indexed)
        and all(params["slice_sizes"][a] == n for a, n in enumerate(leaf.shape) if a not in indexed)
        and params["fill_value"] is None
    )
    if not plain:
        return NotImplemented
    rows = gather_rows(leaf.weight, operands[1:], params)
    shape = [1] * rows.ndim
    for axis, n in zip(numbers.offset_dims, (leaf.scale.squeeze(indexed)).shape):
        shape[axis] = n
    return multiplied(rows, leaf.scale.reshape(shape))
