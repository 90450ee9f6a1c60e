"""A frozen weight and a small trained change beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress import compat
from jaxcompress.arrays.base import (
    CompressedArray,
    cast,
    conv_general_dilated,
    dot_general,
    gather_rows,
    is_compressed,
    materialize,
    register_array,
    register_rule,
    try_rules,
)
from jaxcompress.errors import SpecError
from jaxcompress.numerics import rounded


@register_array(
    "adapted",
    children=("base", "delta"),
    static=("scale",),
    trainable=("delta",),
    inner=("base",),
)
class AdaptedArray(CompressedArray):
    """`w = base + scale * delta`, where only `delta` is trained; with a low-rank one, LoRA.

    A contraction runs as two, `x @ base` and `x @ delta`, each by the rule of its own leaf. They
    are added in float32, with the scale, and rounded once. So the codes of the base stay codes,
    and a low-rank delta costs two thin products, forward and backward: no gradient is as large as
    the weight. A delta of zeros leaves the values as they were, exactly. Rows that are looked up
    are added after the look-up.

    `y` agrees with `x @ materialize()` to rounding: there the weight is summed first, here the
    outputs are.

    `finalize` keeps a base that is a leaf and the change beside it, since codes would have to be
    rounded again: the same products, and the same outputs bit for bit. A dense base takes the
    change in (`materialize`), which is rounded once to its dtype and costs one product from then
    on; outputs then differ by the rounding above. `jaxcompress.decomposition.merge_gaps` says by
    how much.

    Attributes:
      base: a leaf or a dense array, which no optimizer sees.
      delta: a leaf of the same shape, such as a `LowRankArray`, or an array. It may be of a wider
        dtype, so that small updates are not lost; it is used in the dtype of the base.
      scale: a number.

    References:
      Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, 2022; Dettmers et al.,
      *QLoRA: Efficient Finetuning of Quantized LLMs*, 2023.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.arrays.adapted import AdaptedArray
      >>> low = jc.LowRankArray.of(jnp.ones((2, 1)), jnp.array([[1.0, 0.0]]))
      >>> leaf = AdaptedArray.of(jc.Quantize("int4")(7 * jnp.eye(2)), low, scale=0.5)
      >>> leaf, leaf.materialize().tolist()
      (AdaptedArray(float32[2, 2], int4 + rank 1), [[7.5, 0.0], [0.5, 7.0]])
    """

    base: Any
    delta: Any
    scale: float

    grids: ClassVar[tuple[str, ...]] = ("base",)

    @classmethod
    def of(cls, base: Any, delta: Any, *, scale: float = 1.0) -> AdaptedArray:
        """The leaf of a weight and its change; checks that they fit.

        Raises:
          SpecError: for shapes that differ, what is not floating, or a scale that is not finite.
        """
        if tuple(base.shape) != tuple(delta.shape):
            raise SpecError(
                f"a change of shape {tuple(delta.shape)} does not fit a weight of shape "
                f"{tuple(base.shape)}: write one of the same"
            )
        for name, x in (("weight", base), ("change", delta)):
            if not jnp.issubdtype(x.dtype, jnp.floating):
                raise SpecError(f"a {name} of dtype {x.dtype}: write a floating one")
        if not math.isfinite(scale):
            raise SpecError(f"scale={scale!r}: write a finite number")
        return cls(base, delta, float(scale))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.base.dtype)

    @property
    def batch_ndim(self) -> int:
        both = (self.base, self.delta)
        return min(x.batch_ndim if is_compressed(x) else x.ndim for x in both)

    def narrow(self) -> Any:
        """The change in the dtype in which it is used."""
        return cast(self.delta, self.dtype)

    def materialize(self, key: jax.Array | None = None) -> jax.Array:
        delta = materialize(cast(self.narrow(), jnp.float32))
        return _added(materialize(self.base), delta, self.scale)

    def astype(self, dtype: Any) -> CompressedArray | None:
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        return self.replace(base=cast(self.base, dtype))

    def finalize(self) -> CompressedArray | jax.Array:
        if not is_compressed(self.base):
            return self.materialize()
        delta = self.delta.finalize() if is_compressed(self.delta) else self.delta
        return AdaptedArray(self.base.finalize(), cast(delta, self.dtype), self.scale)

    def describe(self) -> str:
        names = (
            x.describe() if is_compressed(x) else np.dtype(x.dtype).name
            for x in (self.base, self.delta)
        )
        return " + ".join(names)


def _added(base: jax.Array, delta: jax.Array, scale: float) -> jax.Array:
    """`base + scale * delta` in float32 at least, rounded once to the dtype of the first."""
    wide = jnp.promote_types(base.dtype, jnp.float32)
    change = delta.astype(wide) if scale == 1 else scale * delta.astype(wide)
    return rounded(base.astype(wide) + change, base.dtype)


Product = Callable[[Any, Any, dict[str, Any]], jax.Array]


def _products(run: Product, i: int, operands: Sequence[Any], params: dict[str, Any]) -> jax.Array:
    """A contraction with the base, and one with the change."""
    leaf, x = operands[i], operands[1 - i]

    def with_input(w: Any) -> jax.Array:
        return run(w, x, params) if i == 0 else run(x, w, params)

    return _added(with_input(leaf.base), with_input(leaf.narrow()), leaf.scale)


@register_rule(AdaptedArray, "dot_general")
def _dot_general(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    return _products(dot_general, i, operands, params)


@register_rule(AdaptedArray, "conv_general_dilated")
def _conv(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    return _products(conv_general_dilated, i, operands, params)


@register_rule(AdaptedArray, "gather")
def _gather(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    if i != 0 or params["fill_value"] is not None:
        return NotImplemented
    leaf = operands[0]
    rows = gather_rows(leaf.base, operands[1:], params)
    return _added(rows, gather_rows(leaf.narrow(), operands[1:], params), leaf.scale)


def _moved(primitive: compat.Primitive) -> None:
    """A rule that moves both, where the change can be moved as it is."""

    def rule(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
        if i != 0:
            return NotImplemented
        leaf, others = operands[0], operands[1:]
        delta = _run(primitive, leaf.delta, others, params)
        if delta is NotImplemented:
            return NotImplemented
        base = _run(primitive, leaf.base, others, params)
        if base is NotImplemented:
            base = primitive.bind(materialize(leaf.base), *others, **params)
        return AdaptedArray(base, delta, leaf.scale)

    register_rule(AdaptedArray, primitive.name)(rule)


def _run(primitive: compat.Primitive, x: Any, others: Sequence[Any], params: dict[str, Any]) -> Any:
    if is_compressed(x):
        return try_rules(primitive.name, (x, *others), params)
    return primitive.bind(x, *others, **params)


for _primitive in (
    lax.transpose_p,
    lax.reshape_p,
    lax.squeeze_p,
    lax.broadcast_in_dim_p,
    lax.slice_p,
    lax.dynamic_slice_p,
):
    _moved(_primitive)
