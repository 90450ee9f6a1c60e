"""What the specs of trained quantized weights have in common."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays import affine
from jaxcompress.errors import SpecError
from jaxcompress.specs import LeafContext, Plan, Spec, is_count, is_floating_dtype


@dataclasses.dataclass(frozen=True)
class Layout:
    """What all trained quantized leaves are told of their weight.

    Attributes:
      axes: the axes over which a scale is shared.
      group_size: values per group along the last of them, or None.
      scale_dtype: the dtype of stored scales.
      float_dtype: the dtype of the weight.
    """

    axes: tuple[int, ...]
    group_size: int | None
    scale_dtype: np.dtype
    float_dtype: np.dtype

    def fields(self) -> dict[str, Any]:
        """As keyword arguments of a leaf."""
        return dataclasses.asdict(self)

    def scales(self, shape: tuple[int, ...], value: float) -> jax.Array:
        """One float32 value for each scale of a weight of that shape; without groups."""
        kept = [1 if i - len(shape) in self.axes else n for i, n in enumerate(shape)]
        return jnp.full(kept, value, jnp.float32)


@dataclasses.dataclass(frozen=True, repr=False)
class LearnedSpec(Spec):
    """A trained quantized leaf; a subclass defines `make`.

    Fields `granularity`, `group_size` and `scale_dtype` of a subclass are checked and laid out
    here; without them there is one scale for each weight of a stack, in float32.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        granularity, group, dtype = self._layout()
        if granularity not in ("channel", "tensor"):
            raise SpecError(f"granularity={granularity!r}: write 'channel' or 'tensor'")
        if not is_floating_dtype(dtype):
            raise SpecError(f"scale_dtype={dtype!r}: write a floating dtype such as 'bfloat16'")
        if group is not None and not is_count(group, 1):
            raise SpecError(f"group_size={group}: write a whole number of at least 1")
        if group is not None and granularity != "channel":
            raise SpecError(f"group_size={group} cuts channels: write granularity='channel'")

    def _layout(self) -> tuple[Any, Any, Any]:
        defaults = {"granularity": "tensor", "group_size": None, "scale_dtype": "float32"}
        return tuple(getattr(self, name, value) for name, value in defaults.items())  # type: ignore

    def plan(self, leaf: Any, context: LeafContext) -> Plan:
        """Settles the axes and clamps the group size to their length."""
        if leaf.ndim == 0:
            raise SpecError(f"{context.path}: a scalar has no axis to quantize; leave it dense")
        granularity, group, dtype = self._layout()
        axes = tuple(sorted(context.axes.input))
        if granularity == "tensor":
            axes = (*sorted(context.axes.output), *axes)  # packed along an input axis
        if group is not None:
            group = max(1, min(group, leaf.shape[axes[-1]]))
        layout = Layout(axes, group, np.dtype(jnp.dtype(dtype)), np.dtype(leaf.dtype))
        return _LearnedPlan(self, layout)

    def make(self, weight: jax.Array, layout: Layout, key: jax.Array | None) -> Any:
        """The leaf; pure and jittable."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class _LearnedPlan(Plan):
    spec: LearnedSpec
    layout: Layout

    def apply(self, leaf: jax.Array, key: jax.Array | None) -> Any:
        return self.spec.make(leaf, self.layout, key)


def check_integer_format(format: Any, signed: bool = True) -> None:
    """Refuses what is no integer format, or has no negative codes where those are needed."""
    if not isinstance(format, str):
        raise SpecError(f"format={format!r}: write a name such as 'int4'")
    fmt = affine.int_format(format)
    if signed and not fmt.signed:
        raise SpecError(f"format={format!r} has no negative codes: write {format[1:]!r}")


def check_bits(bits: Any, least: int = 2) -> None:
    """Refuses what is no number of bits of a code."""
    if not is_count(bits, least, 8):
        raise SpecError(f"bits={bits!r}: write a whole number from {least} to 8")
