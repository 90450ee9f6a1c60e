"""A weight whose input is quantized where they meet, in integers where both are."""

from __future__ import annotations

import re
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.arrays import affine
from jaxcompress.arrays.base import (
    CompressedArray,
    gather_rows,
    is_compressed,
    materialize,
    register_array,
    register_rule,
)
from jaxcompress.arrays.contraction import Conv, Dot
from jaxcompress.arrays.deferred import deferred_primitive
from jaxcompress.arrays.quantized import QuantizedArray
from jaxcompress.arrays.scaled import floating
from jaxcompress.arrays.wrapped import WrappedArray
from jaxcompress.numerics import divide

Contraction = Dot | Conv


class Grid(NamedTuple):
    """How an input is rounded, and what the gradient sees of it.

    Attributes:
      scale: float32, broadcastable to the input.
      zero_point: codes of the value zero, or None for 0.
      format: the integer format.
      narrow: whether the least code is left out.
      slope: the gradient: `range` (straight through within the range), `pact` or `lsq`.
      factor: what gradients of the scale are multiplied by.
    """

    scale: jax.Array
    zero_point: jax.Array | None
    format: str
    narrow: bool
    slope: str = "range"
    factor: float = 1.0

    def codes(self, x: jax.Array) -> jax.Array:
        """The codes of an input, int8 or uint8."""
        return affine.quantize(
            x, self.scale, self.zero_point, self.format, axes=-1, narrow=self.narrow
        )

    def value(self, x: jax.Array) -> jax.Array:
        """The values of the codes, in the dtype of x."""
        codes = self.codes(x)
        return affine.dequantize(codes, self.scale, self.zero_point, dtype=x.dtype)

    def slopes(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Where the gradient passes to x, and what a unit of the scale counts for the value."""
        if self.slope == "range":
            passes = affine.in_range(
                x, self.scale, self.zero_point, self.format, axes=-1, narrow=self.narrow
            )
            return passes, None
        fmt = affine.int_format(self.format)
        v = divide(x.astype(jnp.float32), self.scale)
        if self.slope == "pact":
            return (v >= 0) & (v < fmt.qmax), jnp.where(v >= fmt.qmax, float(fmt.qmax), 0.0)
        inside = (v > fmt.qmin) & (v < fmt.qmax)
        return inside, jnp.where(inside, jnp.round(v) - v, jnp.clip(v, fmt.qmin, fmt.qmax))


def rounded_input(x: jax.Array, grid: Grid) -> jax.Array:
    """The values of an input's codes, with the straight-through gradient of its grid."""
    static = {n: getattr(grid, n) for n in ("format", "narrow", "slope", "factor")}

    def value(x: Any, scale: Any, zero_point: Any) -> jax.Array:
        return Grid(scale, zero_point, **static).value(x)

    rounded = jax.custom_jvp(value)

    @rounded.defjvp
    def straight_through(primals: Any, tangents: Any) -> Any:
        x, scale, zero_point = primals
        passes, of_scale = Grid(scale, zero_point, **static).slopes(x)
        through = jnp.where(passes, tangents[0], jnp.zeros((), x.dtype))
        if of_scale is not None:
            through = through + (of_scale * (grid.factor * tangents[1])).astype(x.dtype)
        return rounded(*primals), through

    return rounded(x, grid.scale, grid.zero_point)


class InputArray(WrappedArray):
    """A leaf that rounds the input of a contraction to the grid that `grid` gives."""

    format: str

    def grid(self, x: jax.Array, contraction: Contraction) -> Grid | None:
        """The grid of one input, or None where there is nothing to round."""
        raise NotImplementedError

    def materialize(self, key: jax.Array | None = None) -> jax.Array:
        return materialize(self.weight)

    def product(self, x: jax.Array, contraction: Contraction) -> jax.Array:
        """The contraction of the rounded input and the weight."""
        x = floating(x, self.dtype)
        if x.size == 0 or not contraction.reduced(x, "token"):
            return contraction.run(x, self.weight)

        def on_values(leaf: Any, x: jax.Array) -> jax.Array:
            grid = leaf.grid(x, contraction)
            x = x if grid is None else rounded_input(x, grid)
            return contraction.run(x, leaf.weight)

        def on_integers(leaf: Any, x: jax.Array) -> jax.Array:
            return _integer_product(x, leaf.grid(x, contraction), leaf.stored(), contraction)

        grid = jax.eval_shape(lambda x: (self.grid(x, contraction) or (None,))[0], x)
        if grid is None or not _is_integer(self.stored(), self.format, contraction, x):
            return on_values(self, x)
        product = jax.custom_jvp(on_integers)

        @product.defjvp
        def straight_through(primals: Any, tangents: Any) -> Any:
            return product(*primals), jax.jvp(on_values, primals, tangents)[1]

        return product(self, x)

    def stored(self) -> Any:
        """The weight as it is stored once it is trained."""
        return self.weight.finalize() if is_compressed(self.weight) else self.weight


def _is_integer(weight: Any, format: str, contraction: Contraction, x: jax.Array) -> bool:
    """Whether the product is one of int8 codes, and its sums fit into 32 bits."""
    if not isinstance(weight, QuantizedArray) or not re.fullmatch("int[2-8]", str(weight.format)):
        return False
    if weight.zero_point is not None or weight.group_size is not None:
        return False
    fmt = affine.int_format(format)
    largest = contraction.terms(x, weight) * (fmt.qmax - fmt.qmin) * 2 ** (weight.bits - 1)
    return largest < 2**31 and contraction.splits(weight.scale)


def _integer_product(
    x: jax.Array, grid: Grid, weight: QuantizedArray, contraction: Contraction
) -> jax.Array:
    """`s_x s_w sum (q_x - z_x) q_w`: the sum in int32, the scales in float32, then one rounding."""
    fmt = affine.int_format(grid.format)
    codes, zero = grid.codes(x), grid.zero_point
    shift = 128 if fmt.qmax > 127 else 0  # so that the codes of uint8 fit into int8
    signed = (codes.astype(jnp.int32) - shift).astype(jnp.int8)
    weights = materialize(weight.codes)
    total = contraction.integers(signed, weights)
    if zero is not None or shift:
        offset = (jnp.zeros((1,) * x.ndim) if zero is None else zero).astype(jnp.int32) - shift
        total = total - contraction.of_input(offset, weight.ndim) * contraction.sums(x, weights)
    # A scale that is a constant of the program would be multiplied in another order.
    of_x = lax.optimization_barrier(grid.scale.astype(jnp.float32))
    of_x = contraction.of_input(of_x, weight.ndim)
    of_w = contraction.of_weight(materialize(weight.scale).astype(jnp.float32), x.ndim)
    wanted = contraction.params["preferred_element_type"]
    dtype = jnp.promote_types(x.dtype, weight.dtype) if wanted is None else wanted
    return (total.astype(jnp.float32) * of_x * of_w).astype(dtype)


@register_array(
    "quantized_input",
    children=("weight", "scale", "zero_point"),
    static=("format", "per", "symmetric"),
    trainable=("weight",),
    inner=("weight",),
)
class QuantizedInputArray(InputArray):
    """A weight that rounds its input x to integers: `y = x_hat w`, `x_hat = s (q - z)`.

    `q = clip(round(x / s) + z, qmin, qmax)`, with s and z of x itself (dynamic) or stored (static).
    Where the weight is stored, or will be, in symmetric codes of integers with one scale for each
    output, `y = s_x s_w sum (q_x - z) q_w`: int8 codes meet int8 codes and are summed in int32,
    which is exact, then come two products in float32 and one rounding. Otherwise `x_hat`, rounded
    to the dtype of x, meets the weight by the weight's own rule. Which of them it is follows from
    the leaf alone and is the same for a trained weight and its finalized form, so they agree bit
    for bit.

    Backward, `dx` is that of the contraction, where x was in range (always, if dynamic), and 0
    elsewhere; `dw` is that of `x_hat`. Scales and zero points count as constants.

    Unlike other leaves it changes the function and not only the weight: `decompress` leaves the
    rounding of inputs out. Only a `dot_general` and the kernel of a convolution round; a look-up
    reads rows of the weight.

    Attributes:
      weight: the weight: an array or a leaf.
      scale: None, or the stored scale, float32, with the weight's number of axes, of size one but
        for leading axes of a stack.
      zero_point: None (zero is code 0), or stored codes in the shape of `scale`.
      format: `int2` .. `int8`, `uint2` .. `uint8`.
      per: `token`: a scale for each place of the axes that are not contracted, in a convolution for
        each example; `tensor`: one for all.
      symmetric: whether zero is the middle of the range, and the least code left out.

    References:
      Jacob et al., *Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference*, 2018; Dettmers et al., *LLM.int8(): 8-bit Matrix
      Multiplication for Transformers at Scale*, 2022.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> leaf = QuantizedInputArray(jnp.ones((3, 1)), None, None, "int8", "token", True)
      >>> x = jnp.array([[127.0, 0.4, 1.6], [1.27, 0.016, 0.0]])
      >>> [round(float(y), 3) for y in jc.compressed(lambda w, x: x @ w)(leaf, x)[:, 0]]
      [129.0, 1.29]
    """

    weight: Any
    scale: Any
    zero_point: Any
    format: str
    per: str
    symmetric: bool

    factors: ClassVar[tuple[str, ...]] = ("scale", "zero_point")

    def grid(self, x: jax.Array, contraction: Contraction) -> Grid | None:
        if self.scale is None:
            scale, zero = affine.affine_params(
                lax.stop_gradient(x),
                self.format,
                axes=contraction.reduced(x, self.per),
                symmetric=self.symmetric,
                scale_dtype=jnp.float32,
            )
            return Grid(scale, zero, self.format, self.symmetric)
        laid = contraction.on_input(lax.stop_gradient(self.scale), x)
        if laid is None:
            return None
        zero = self.zero_point
        zero = None if zero is None else contraction.on_input(zero, x)
        return Grid(laid, zero, self.format, self.symmetric)

    def describe(self) -> str:
        how = "static" if self.scale is not None else f"per {self.per}"
        shifted = not self.symmetric and (self.scale is None or self.zero_point is not None)
        kind = f"{self.format}{' affine' if shifted else ''}"
        return f"{self.of_weight().strip() or 'dense'}, input {kind} {how}"


@register_rule(InputArray, "dot_general")
def _dot_general(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    return operands[i].product(operands[1 - i], Dot(i, params))


@register_rule(InputArray, "conv_general_dilated")
def _conv(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    if i != 1:
        return deferred_primitive(lax.conv_general_dilated_p, i, operands[i], operands, params)
    return operands[1].product(operands[0], Conv(params))


@register_rule(InputArray, "gather")
def _gather(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    return gather_rows(operands[0].weight, operands[1:], params) if i == 0 else NotImplemented


def inside_of(leaf: Any) -> bool:
    """Whether an input is first scaled or rotated by this leaf, so that rounding comes inside."""
    return isinstance(leaf, WrappedArray) and not isinstance(leaf, InputArray)


def without_input(leaf: Any) -> CompressedArray | jax.Array:
    """The leaf without the rounding of its input."""
    if isinstance(leaf, InputArray):
        return without_input(leaf.weight)
    if isinstance(leaf, WrappedArray):
        return leaf.replace(weight=without_input(leaf.weight))
    return leaf
