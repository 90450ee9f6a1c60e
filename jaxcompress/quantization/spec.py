"""`Quantize`: round to the nearest code; `FakeQuantize`: train with what that gives."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays import affine
from jaxcompress.arrays.fake_quantized import FakeQuantizedArray
from jaxcompress.arrays.quantized import QuantizedArray
from jaxcompress.errors import SpecError
from jaxcompress.specs import LeafContext, Plan, Spec, is_count, register_spec

Q = TypeVar("Q", bound="Quantize")


@register_spec("quantize")
@dataclasses.dataclass(frozen=True, repr=False)
class Quantize(Spec):
    """Affine quantization, rounded to nearest, half to even.

    Symmetric: `w ~ s q` with `s = max|w| / (2**(b-1) - 1)`. Affine: `w ~ s (q - z)` with
    `s = (max - min) / (2**b - 1)` over a range that includes zero, and an integer z, so that zero
    is exact. The scale is rounded to `scale_dtype` before the codes are computed. A bfloat16 scale
    moves the grid by at most 2**-9 relative, so that even code 127 moves by less than half a step.

    Args:
      format: `int2` .. `int8` or `uint2` .. `uint8`; stored with exactly that many bits.
      group_size: weights that share a scale along the last input axis; the last group may be
        shorter. None: one scale per output channel.
      axis: the input axes over which a scale is shared, one or several; None: the leaf's own
        (see `kernel_axes`), all axes of a vector.
      symmetric: whether zero is the middle of the range; False stores zero points.
      scale_dtype: the dtype in which scales are stored.
      convention: how the symmetric scale follows from the range, where libraries differ: `absmax`
        as above, `full` with `s = max|w| / ((2**b - 1) / 2)`, or `no_clip` with
        `s = max(-min / 2**(b-1), max / (2**(b-1) - 1))`.

    Raises:
      SpecError: for an unknown format, axis or convention, or a group size below 1.

    References:
      Jacob et al., *Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference*, 2018.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> leaf = jc.Quantize("int4", group_size=32)(jnp.ones((128, 16)))
      >>> leaf, leaf.nbytes
      (QuantizedArray(float32[128, 16], int4/32), 1152)
    """

    format: str
    _: dataclasses.KW_ONLY
    group_size: int | None = None
    axis: int | tuple[int, ...] | None = None
    symmetric: bool = True
    scale_dtype: str = "bfloat16"
    convention: str = "absmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.format, str):
            raise SpecError(f"format={self.format!r}: write a name such as 'int8'")
        fmt = affine.int_format(self.format)
        if self.group_size is not None and not is_count(self.group_size, 1):
            raise SpecError(f"group_size={self.group_size}: write a whole number of at least 1")
        if not _is_floating(self.scale_dtype):
            raise SpecError(
                f"scale_dtype={self.scale_dtype!r}: write a floating dtype such as 'bfloat16'"
            )
        if self.convention not in affine.CONVENTIONS:
            raise SpecError(
                f"convention={self.convention!r}: write one of {', '.join(affine.CONVENTIONS)}"
            )
        if self.symmetric and not fmt.signed:
            raise SpecError(
                f"Quantize({self.format!r}) has no negative codes: write symmetric=False, "
                f"or {self.format[1:]!r}"
            )

    def plan(self, leaf: jax.Array, context: LeafContext) -> Plan:
        """Settles the axes and clamps the group size to their length."""
        return _QuantizePlan(self.settled(leaf, context))

    def settled(self: Q, leaf: jax.Array, context: LeafContext) -> Q:
        """The same spec with the axes of one leaf, and groups no longer than they are."""
        axes = resolve_axes(self.axis, leaf, context)
        group = self.group_size
        if group is not None:
            group = max(1, min(group, leaf.shape[axes[-1]]))
        return dataclasses.replace(self, axis=axes, group_size=group)


@register_spec("fake_quantize")
@dataclasses.dataclass(frozen=True, repr=False)
class FakeQuantize(Quantize):
    """Training with the values that `Quantize` will store: a trainable leaf, rounded where used.

    `w_hat = s (clip(round(w / s) + z, qmin, qmax) - z)` forward, the identity backward
    (straight-through), 0 where w was clipped. Put it in with `compress`, run it under `compressed`,
    train it with any optimizer; `finalize` then gives the `QuantizedArray` of the same format, with
    the same logits, bit for bit.

    Args:
      format: as in `Quantize`, like all that follow but `range`.
      group_size: weights that share a scale.
      axis: the input axes over which a scale is shared.
      symmetric: whether zero is the middle of the range.
      scale_dtype: the dtype of scales.
      convention: how the symmetric scale follows from the range.
      range: `dynamic`: scales are those of the present weight at every step. `static`: those of the
        weight that is compressed, for good; what leaves their range is clipped and has no
        gradient.

    Raises:
      SpecError: as `Quantize`, and for another range.

    References:
      Jacob et al., *Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference*, 2018; Krishnamoorthi, *Quantizing Deep Convolutional
      Networks for Efficient Inference*, 2018.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> params = {"kernel": jnp.array([[7.0], [3.4]])}
      >>> params = jc.compress(params, {"kernel": jc.FakeQuantize("int4")})
      >>> loss = jc.compressed(lambda params: jnp.sum(params["kernel"] ** 2))
      >>> jax.grad(loss)(params)["kernel"].weight.tolist()
      [[14.0], [6.0]]
      >>> jc.finalize(params)
      {'kernel': QuantizedArray(float32[2, 1], int4)}
    """

    _: dataclasses.KW_ONLY
    range: str = "dynamic"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.range not in ("dynamic", "static"):
            raise SpecError(f"range={self.range!r}: write 'dynamic' or 'static'")

    def plan(self, leaf: jax.Array, context: LeafContext) -> Plan:
        """Settles the axes and clamps the group size to their length."""
        return _FakeQuantizePlan(self.settled(leaf, context))


@dataclasses.dataclass(frozen=True)
class _FakeQuantizePlan(Plan):
    spec: FakeQuantize

    def apply(self, leaf: jax.Array, key: jax.Array | None) -> FakeQuantizedArray:
        spec = self.spec
        out = FakeQuantizedArray(
            leaf,
            None,
            None,
            axes=tuple(spec.axis),  # type: ignore[arg-type]
            group_size=spec.group_size,
            format=spec.format,
            symmetric=spec.symmetric,
            scale_dtype=np.dtype(jnp.dtype(spec.scale_dtype)),
            convention=spec.convention,
            float_dtype=np.dtype(leaf.dtype),
        )
        if spec.range == "dynamic":
            return out
        scale, zero_point = out.params()
        return out.replace(scale=scale, zero_point=zero_point)


def _is_floating(dtype: Any) -> bool:
    try:
        return bool(jnp.issubdtype(jnp.dtype(dtype), jnp.floating))
    except TypeError:
        return False


@dataclasses.dataclass(frozen=True)
class _QuantizePlan(Plan):
    spec: Quantize

    def apply(self, leaf: jax.Array, key: jax.Array | None) -> QuantizedArray:
        spec = self.spec
        axes: Any = spec.axis
        return QuantizedArray.quantize(
            leaf,
            spec.format,
            axes=axes,
            group_size=spec.group_size,
            symmetric=spec.symmetric,
            scale_dtype=np.dtype(jnp.dtype(spec.scale_dtype)),
            convention=spec.convention,
        )


def resolve_axes(
    axis: int | tuple[int, ...] | None, leaf: Any, context: LeafContext
) -> tuple[int, ...]:
    """The chosen axes as sorted negative numbers; the leaf's input axes where none is chosen."""
    if leaf.ndim == 0:
        raise SpecError(f"{context.path}: a scalar has no axis to quantize along; leave it dense")
    if axis is None:
        return tuple(sorted(context.axes.input))
    axes = axis if isinstance(axis, (tuple, list)) else (axis,)
    if not axes or any(not is_count(a, -leaf.ndim, leaf.ndim - 1) for a in axes):
        raise SpecError(
            f"{context.path}: axis={axis} is not among the {leaf.ndim} axes of shape {leaf.shape}"
        )
    return tuple(sorted({int(a) if a < 0 else int(a) - leaf.ndim for a in axes}))
