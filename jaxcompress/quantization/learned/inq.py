"""Incremental quantization: weights are fixed at powers of two, a part at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays import affine
from jaxcompress.arrays.base import CompressedArray, is_compressed, register_array
from jaxcompress.errors import CompressError
from jaxcompress.numerics import divide, unit_scale
from jaxcompress.pruning.select import top_mask
from jaxcompress.quantization.learned.base import LearnedArray
from jaxcompress.quantization.learned.spec import Layout, LearnedSpec, check_bits
from jaxcompress.quantization.learned.straight import straight_through
from jaxcompress.specs import is_number, register_spec


@register_array(
    "inq",
    children=("weight", "mask", "codes", "scale"),
    static=("axes", "group_size", "bits", "scale_dtype", "float_dtype"),
    trainable=("weight",),
)
class INQArray(LearnedArray):
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

    def grid(self) -> Any:
        """All weights as powers of two: the fixed ones as they are, the others as they would be."""
        name = f"pow2_{self.bits}"
        codes = affine.quantize(self.weight, self.scale, None, name, axes=self.axes)
        return self.coded(jnp.where(self.mask, self.codes, codes), self.scale, name)

    def proxy(self) -> jax.Array:
        return jnp.where(self.mask, 0.0, self.wide())

    def materialize(self, key: jax.Array | None = None) -> jax.Array:
        fixed = jax.tree.map(jax.lax.stop_gradient, self)
        free = fixed.weight.astype(self.float_dtype)
        hard = jnp.where(self.mask, fixed.grid().materialize(), free)
        return straight_through(hard, self.proxy().astype(self.float_dtype))

    def more(self, share: Any) -> INQArray:
        """The leaf with that share of its weights fixed."""
        batch = self.batch_ndim
        size = self.size // max(1, int(np.prod(self.shape[:batch], dtype=np.int64)))
        count = jnp.round(jnp.asarray(share, jnp.float32) * size).astype(jnp.uint32)
        choose = lambda scores: top_mask(scores, count)
        for _ in range(batch):
            choose = jax.vmap(choose)
        mask = choose(jnp.where(self.mask, jnp.inf, jnp.abs(self.wide()))) | self.mask
        grid = self.grid()
        weight = jnp.where(mask, grid.materialize().astype(self.weight.dtype), self.weight)
        return self.replace(weight=weight, mask=mask, codes=grid.codes)

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
        w = weight.astype(jnp.float32)
        most = jnp.max(jnp.abs(w), layout.axes, keepdims=True, initial=0.0)
        most = jnp.minimum(most, float(jnp.finfo(jnp.float32).max) / 4)
        scale, _ = unit_scale(divide(4 * most, 3.0))
        held = 2.0 ** (int(jnp.finfo(weight.dtype).maxexp) - 1)  # the dtype's largest power of two
        scale = jnp.where(most == 0, 1.0, jnp.minimum(scale, held))
        mask = jnp.zeros(weight.shape, bool)
        codes = jnp.zeros(weight.shape, jnp.uint8)
        return INQArray(weight, mask, codes, scale, bits=self.bits, **layout.fields())


def quantize_more(tree: Any, share: float | jax.Array) -> Any:
    """Fixes weights of `INQ` leaves, the largest first, until a share of each leaf is fixed.

    Pure and jittable. What is fixed stays fixed; a share below that of the last call does nothing.

    Args:
      tree: any tree, with `INQ` leaves.
      share: from 0 to 1; the number is `round(share n)` for each weight of a stack.

    Returns:
      The same tree with more weights fixed.

    Raises:
      CompressError: for another share, or when there is no such leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> quantize_more(INQ()(jnp.array([1.0, 3.0])), 0.5).mask.tolist()
      [False, True]
    """
    if not isinstance(share, jax.Array) and not is_number(share, 0, 1):
        raise CompressError(f"share={share!r}: write a number from 0 to 1")
    found = False

    def fix(leaf: Any) -> Any:
        nonlocal found
        if isinstance(leaf, INQArray):
            found = True
            return leaf.more(share)
        if not isinstance(leaf, CompressedArray):
            return leaf
        inner = {name: getattr(leaf, name) for name in leaf.children}
        return leaf.replace(**{name: fix(child) for name, child in inner.items()})

    out = jax.tree.map(fix, tree, is_leaf=is_compressed)
    if not found:
        raise CompressError("no leaf is quantized by and by; put in INQ() with compress")
    return out
