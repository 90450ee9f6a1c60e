"""Incremental quantization: weights are fixed at powers of two, a part at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import register_array
from jaxcompress.numerics import divide, unit_scale
from jaxcompress.quantization.learned.incremental import IncrementalArray
from jaxcompress.quantization.learned.spec import Layout, LearnedSpec, check_bits
from jaxcompress.specs import register_spec


@register_array(
    "inq",
    children=("weight", "mask", "codes", "scale"),
    static=("axes", "group_size", "bits", "scale_dtype", "float_dtype"),
    trainable=("weight",),
)
class INQArray(IncrementalArray):
    """A weight of which a part is fixed at powers of two, and the rest is trained.

    A fixed weight is what its code says, whatever an optimizer does to `weight` in its place, and
    has no gradient.

    Attributes:
      weight: the dense weight.
      mask: which weights are fixed, booleans.
      codes: the codes of the fixed ones.
      scale: the largest magnitude, a power of two.
      axes: all axes of one weight.
      group_size: None.
      bits: bits of a code.
      scale_dtype: the dtype of the scale.
      float_dtype: the dtype of the dense array.

    References:
      Zhou et al., *Incremental Network Quantization: Towards Lossless CNNs with Low-Precision
      Weights*, 2017.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxcompress.quantization import quantize_more
      >>> leaf = INQ(3)(jnp.array([1.1, -0.6, 0.3, 0.01]))
      >>> quantize_more(leaf, 0.5).materialize().tolist()
      [1.0, -0.5, 0.30000001192092896, 0.009999999776482582]
    """

    weight: Any
    mask: Any
    codes: Any
    scale: Any
    axes: tuple[int, ...]
    group_size: None
    bits: int
    scale_dtype: np.dtype
    float_dtype: np.dtype

    @property
    def code_format(self) -> str:
        return f"pow2_{self.bits}"

    def describe(self) -> str:
        return f"inq {self.bits} bits"


@register_spec("inq")
@dataclasses.dataclass(frozen=True, repr=False)
class INQ(LearnedSpec):
    """INQ: weights are fixed at powers of two, the largest first, while the others are trained.

    At first no weight is fixed. `quantize_more(params, share)` fixes the largest ones, and training
    in between lets the others make up for it; shares of 0.5, 0.75, 0.875 and 1 are published. The
    values are 0 and `+-2**(e-i)` with `e = floor(log2(4 max|w| / 3))` and i from 0 to
    `2**(bits-1) - 2`; the nearest is taken. (With 5 bits the paper has i up to 7, of the 14 that 5
    bits can hold.) The largest magnitude is settled when the leaf is made.

    `finalize` fixes all that is left. A pruned weight stays zero.

    Args:
      bits: bits of a code, 2 to 8.

    Raises:
      SpecError: for other bits.

    References:
      Zhou et al., *Incremental Network Quantization: Towards Lossless CNNs with Low-Precision
      Weights*, 2017.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.quantization import quantize_more
      >>> params = jc.compress({"w": jnp.eye(4)}, {"w": INQ(5)})
      >>> for share in (0.5, 0.75, 0.875, 1.0):
      ...     params = quantize_more(params, share)  # and train for a while
      >>> jc.finalize(params)
      {'w': QuantizedArray(float32[4, 4], pow2_5)}
    """

    bits: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.bits)

    def make(self, weight: jax.Array, layout: Layout, key: jax.Array | None) -> INQArray:
        scale = top_power(weight, layout.axes)
        mask = jnp.zeros(weight.shape, bool)
        codes = jnp.zeros(weight.shape, jnp.uint8)
        return INQArray(weight, mask, codes, scale, bits=self.bits, **layout.fields())


def top_power(weight: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """`2**floor(log2(4 max|w| / 3))` over what shares a scale, float32; 1 for zeros alone.

    Examples:
      >>> float(top_power(jnp.array([1.49, -0.2]), (-1,))[0])
      1.0
    """
    most = jnp.max(jnp.abs(weight.astype(jnp.float32)), axes, keepdims=True, initial=0.0)
    most = jnp.minimum(most, float(jnp.finfo(jnp.float32).max) / 4)
    scale, _ = unit_scale(divide(4 * most, 3.0))
    held = 2.0 ** (int(jnp.finfo(weight.dtype).maxexp) - 1)  # the dtype's largest power of two
    return jnp.where(most == 0, 1.0, jnp.minimum(scale, held))
