"""A weight in a rotated basis of its inputs, with the rotation applied to the inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.arrays import hadamard
from jaxcompress.arrays.base import (
    conv_general_dilated,
    dot_general,
    gather_rows,
    materialize,
    register_array,
    register_rule,
)
from jaxcompress.arrays.deferred import deferred_primitive
from jaxcompress.arrays.scaled import floating
from jaxcompress.arrays.wrapped import Sources, WrappedArray, at_features, at_operand
from jaxcompress.errors import SpecError


@register_array(
    "rotated",
    children=("weight", "signs"),
    static=("axis",),
    trainable=("weight",),
    inner=("weight",),
)
class RotatedArray(WrappedArray):
    """`w = R weight` along one input axis, with `R = diag(signs) H`, orthogonal.

    H is the block Hadamard matrix of the axis (see `jaxcompress.arrays.hadamard.factors`): of a
    length `2**k`, or `2**k` times 12, 20, 24, ... it is one block that mixes all inputs; of other
    lengths there are several blocks of the largest power of two that divides it. An outlier of x is
    spread over its block, so that `x R` is easier to quantize.

    A contraction over the axis runs as `(x R) @ weight`, by the rule of the weight, and so does a
    convolution whose input features are rotated. That is the one lowering of such a contraction,
    of trained and of stored weights alike; it agrees with `x @ materialize()` to rounding, with an
    error of `eps log2(n)` relative to the norms of x and w. Anything else sees the dense values.

    Attributes:
      weight: `R' w`: an array or a leaf.
      signs: +1 and -1, int8, with as many axes as the weight, of size one but for the rotated axis
        and leading axes of a stack.
      axis: the rotated axis, negative.

    References:
      Ashkboos et al., *QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs*, 2024.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.arrays.rotated import RotatedArray
      >>> w = jnp.zeros((64, 8)).at[0].set(8.0)
      >>> leaf = RotatedArray.rotate(w, axis=-2)
      >>> float(jnp.max(leaf.weight)), bool(jnp.array_equal(leaf.materialize(), w))
      (1.0, True)
    """

    weight: Any
    signs: Any
    axis: int

    factors: ClassVar[tuple[str, ...]] = ("signs",)

    @classmethod
    def rotate(
        cls, w: jax.Array, *, axis: int = -2, signs: Any = None, key: jax.Array | None = None
    ) -> RotatedArray:
        """The leaf that stands for `w`: rotates a dense array.

        Args:
          w: a floating array.
          axis: the input axis to rotate.
          signs: +1 and -1, one for each place of the axis, or an array that broadcasts to `w` as
            the attribute says; None: all +1, or drawn by the key.
          key: draws the signs, other ones for each weight of a stack in front of the axis; None
            for none.

        Raises:
          SpecError: for an axis that `w` has not, or signs that do not fit it.
        """
        if not -w.ndim <= axis < w.ndim:
            raise SpecError(f"axis={axis} is not among the {w.ndim} axes of shape {w.shape}")
        axis = axis if axis < 0 else axis - w.ndim
        shape = tuple(n if a == w.ndim + axis else 1 for a, n in enumerate(w.shape))
        if signs is None and key is not None:
            signs = jax.random.rademacher(key, shape, jnp.int8)
        signs = jnp.ones(shape, jnp.int8) if signs is None else jnp.asarray(signs, jnp.int8)
        if signs.ndim == 1:
            signs = signs.reshape(shape) if signs.size == w.shape[axis] else signs
        fits = signs.ndim == w.ndim and signs.shape[axis] == w.shape[axis]
        if not fits or any(n not in (1, m) for n, m in zip(signs.shape, w.shape)):
            raise SpecError(
                f"signs of shape {signs.shape} do not fit axis {axis} of shape {w.shape}: write "
                f"{w.shape[axis]} of them"
            )
        wide = jnp.promote_types(w.dtype, jnp.float32)
        turned = hadamard.transform(w.astype(wide) * signs, axis=axis).astype(w.dtype)
        return cls(turned, signs, axis)

    def materialize(self, key: jax.Array | None = None) -> jax.Array:
        weight = materialize(self.weight)
        wide = jnp.promote_types(weight.dtype, jnp.float32)
        # H weight is the product of the rows of weight with H'.
        dense = hadamard.transform(weight.astype(wide), axis=self.axis, transposed=True)
        return (dense * self.signs.astype(wide)).astype(weight.dtype)

    @property
    def batch_ndim(self) -> int:
        return max(0, min(super().batch_ndim, self.ndim + self.axis))

    def cuts(self, axes: Sequence[int]) -> bool:
        return self.axis + self.ndim not in axes

    def moved(self, weight: Any, fn: Callable[[Any], Any], sources: Sources | None) -> Any:
        if sources is None or self.axis + self.ndim not in sources:
            return NotImplemented
        axis = list(sources).index(self.axis + self.ndim) - len(sources)
        return super().moved(weight, fn, sources).replace(axis=axis)

    def describe(self) -> str:
        return f"rotated{self.of_weight()}"


def _turned(x: jax.Array, signs: jax.Array, axis: int) -> jax.Array:
    """`x R` along one axis, rounded once to the dtype of x."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return hadamard.transform(x.astype(wide) * signs.astype(wide), axis=axis).astype(x.dtype)


@register_rule(RotatedArray, "dot_general")
def _dot_general(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    leaf = operands[i]
    contract, _ = params["dimension_numbers"]
    axis = leaf.axis + leaf.ndim
    signs = at_operand(leaf.signs, i, operands, params) if axis in contract[i] else None
    if signs is None:
        return deferred_primitive(lax.dot_general_p, i, leaf, operands, params)
    there = contract[1 - i][tuple(contract[i]).index(axis)]
    x = _turned(floating(operands[1 - i], leaf.dtype), signs, there)
    lhs, rhs = (leaf.weight, x) if i == 0 else (x, leaf.weight)
    return dot_general(lhs, rhs, params)


@register_rule(RotatedArray, "conv_general_dilated")
def _conv(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    leaf, numbers = operands[i], params["dimension_numbers"]
    whole = i == 1 and params["feature_group_count"] == 1
    rotated = whole and numbers.rhs_spec[1] == leaf.axis + leaf.ndim
    signs = at_features(leaf.signs, i, operands, params) if rotated else None
    if signs is None:
        return deferred_primitive(lax.conv_general_dilated_p, i, leaf, operands, params)
    x = _turned(operands[0], signs, numbers.lhs_spec[1])
    return conv_general_dilated(x, leaf.weight, params)


@register_rule(RotatedArray, "gather")
def _gather(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    """Rows of a table with rotated features: only those rows are expanded and turned back."""
    leaf, numbers = operands[0], params["dimension_numbers"]
    indexed, axis = numbers.start_index_map, leaf.axis + leaf.ndim
    plain = (
        i == 0
        and leaf.ndim == 2
        and tuple(numbers.collapsed_slice_dims) == tuple(indexed) == (1 - axis,)
        and leaf.signs.shape[1 - axis] == 1
        and params["slice_sizes"][axis] == leaf.shape[axis]
        and params["fill_value"] is None
        and not numbers.operand_batching_dims
    )
    if not plain:
        return NotImplemented
    rows = gather_rows(leaf.weight, operands[1:], params)
    (feature,) = numbers.offset_dims
    rows = jnp.moveaxis(rows, feature, -1)
    out = RotatedArray(rows, leaf.signs.reshape((1,) * (rows.ndim - 1) + (-1,)), -1).materialize()
    return jnp.moveaxis(out, -1, feature)
