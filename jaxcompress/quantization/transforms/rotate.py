"""`Rotate`: a weight in a basis of its inputs in which outliers are spread out."""

from __future__ import annotations

import dataclasses

import jax

from jaxcompress.arrays.rotated import RotatedArray
from jaxcompress.errors import SpecError
from jaxcompress.specs import LeafContext, Plan, Spec, register_spec


@register_spec("rotate")
@dataclasses.dataclass(frozen=True, repr=False)
class Rotate(Spec):
    """A Hadamard rotation of the inputs, undone in the weight: `x w = (x R) (R' w)`.

    The function is unchanged up to rounding; the inputs and the weights that come out have fewer
    outliers, so that what follows in a chain loses less:
    `chain(Rotate(), Quantize("int4"), QuantizeInput("int4"))`. The transform of x runs at run time,
    in `n log2(n)` additions a token; see `RotatedArray` for lengths that are no power of two.

    Args:
      signs: whether the inputs get random signs first, by the key of `compress(..., key=)`;
        without a key, or with False, they get none.

    Raises:
      SpecError: for a leaf without inputs.

    References:
      Ashkboos et al., *QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs*, 2024; Chee et al.,
      *QuIP: 2-Bit Quantization of Large Language Models With Guarantees*, 2023.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> w = jnp.zeros((64, 8)).at[3].set(64.0)
      >>> leaf = jc.chain(Rotate(), jc.Quantize("int4"))(w)
      >>> leaf, round(float(jnp.max(jnp.abs(leaf.weight.materialize()))))
      (RotatedArray(float32[64, 8], rotated int4), 8)
    """

    signs: bool = True

    def plan(self, leaf: jax.Array, context: LeafContext) -> Plan:
        """Settles the axis: the last one of the inputs."""
        if leaf.ndim < 2:
            raise SpecError(f"{context.path}: shape {leaf.shape} has no inputs to rotate")
        return _RotatePlan(self.signs, max(context.axes.input))


@dataclasses.dataclass(frozen=True)
class _RotatePlan(Plan):
    signs: bool
    axis: int

    def apply(self, leaf: jax.Array, key: jax.Array | None) -> RotatedArray:
        return RotatedArray.rotate(leaf, axis=self.axis, key=key if self.signs else None)
