"""Loss-error-aware quantization: what rounding does to the loss is a part of the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import CompressedArray, is_compressed, register_array
from jaxcompress.arrays.formats import code_format
from jaxcompress.arrays.scheme import Scheme
from jaxcompress.errors import CompressError, SpecError
from jaxcompress.numerics import divide
from jaxcompress.quantization.learned.incremental import IncrementalArray
from jaxcompress.quantization.learned.inq import top_power
from jaxcompress.quantization.learned.spec import Layout, LearnedSpec
from jaxcompress.quantization.learned.sums import exact_mean
from jaxcompress.specs import is_number, register_spec


@register_array(
    "elq",
    children=("weight", "mask", "codes", "scale"),
    static=("axes", "group_size", "format", "harm", "scale_dtype", "float_dtype"),
    trainable=("weight",),
)
class ELQArray(IncrementalArray):
    """A weight of which a part is fixed, those first that are large and do the loss little harm.

    Attributes:
      weight: the dense weight.
      mask: which weights are fixed, booleans.
      codes: the codes of the fixed ones.
      scale: the scale, settled when the leaf is made.
      axes: the axes over which a scale is shared, negative.
      group_size: values per group along the last of them, or None.
      format: of the codes.
      harm: how much the loss counts beside the magnitude, see `ELQ`.
      scale_dtype: the dtype of the scale.
      float_dtype: the dtype of the dense array.

    References:
      Zhou et al., *Explicit Loss-Error-Aware Quantization for Low-Bit Deep Neural Networks*, 2018.

    Examples:
      >>> import jax.numpy as jnp
      >>> leaf = ELQ("ternary")(jnp.array([1.0, -1.0, 0.25, 0.0]))
      >>> leaf.more(0.5).mask.tolist()
      [True, True, False, False]
      >>> slope = jnp.array([0.0, 0.0, 0.0, 1.0])
      >>> leaf.replace(weight=jnp.array([0.5, -1.0, 0.5, 0.75])).more(0.5, slope).mask.tolist()
      [True, True, False, False]
    """

    weight: Any
    mask: Any
    codes: Any
    scale: Any
    axes: tuple[int, ...]
    group_size: int | None
    format: str
    harm: float
    scale_dtype: np.dtype
    float_dtype: np.dtype

    @property
    def code_format(self) -> str:
        return self.format

    def scores(self, gradient: jax.Array | None) -> jax.Array:
        size = jnp.abs(self.wide())
        if gradient is None or not self.harm:
            return size
        gap = self.grid().materialize().astype(jnp.float32) - self.wide()
        harm = jnp.where(self.mask, 0.0, jnp.abs(gradient.astype(jnp.float32) * gap))
        # The largest of a weight of the stack is 1, which float32 cannot overflow.
        own = tuple(range(-(self.weight.ndim - self.batch_ndim), 0))
        share = lambda x: divide(x, jnp.max(x, own, keepdims=True, initial=0.0))
        mean = lambda x: jnp.maximum(exact_mean(x, own), jnp.finfo(jnp.float32).tiny)
        size, harm = share(size), share(harm)
        return size / mean(size) - self.harm * harm / mean(harm)

    def describe(self) -> str:
        return f"elq {self.format}"


@register_spec("elq")
@dataclasses.dataclass(frozen=True, repr=False)
class ELQ(LearnedSpec):
    """ELQ: a part of the weights is fixed; what rounding does to the loss is trained away.

    Weights are fixed a part at a time, as by `INQ`, and trained in between with `perturbed_loss`:

        `L(w) + a1 |L(w_hat) - L(w)| + a2 sum (w - w_hat)**2`,

    w with the weights that are not fixed as they are, w_hat all on the grid. So the free weights
    move to where rounding them costs little.

    `quantize_more(params, share, grads)` fixes those of the largest score
    `|w| / mean|w| - harm h / mean h` with `h = |dL/dw (w_hat - w)|`, the change of the loss to
    first order when that weight alone is rounded. Both are to count; so far the method
    goes, and the sum is ours. Without gradients the magnitude alone counts.

    The grid: `ternary` and `binary` have the scale of least squared error; powers of two that of
    `INQ`. It is settled when the leaf is made. `finalize` fixes all that is left. A pruned weight
    stays zero, but in `binary`.

    Args:
      format: `ternary`, `binary`, or `pow2_2` .. `pow2_8`.
      granularity: `tensor`, a scale for all, as published, or `channel`: one for each output.
        Powers of two have one for all.
      harm: how much the loss counts beside the magnitude; at least 0.
      scale_dtype: the dtype of scales.

    Raises:
      SpecError: for another format, granularity, dtype or harm.

    References:
      Zhou et al., *Explicit Loss-Error-Aware Quantization for Low-Bit Deep Neural Networks*, 2018.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.quantization import quantize_more
      >>> loss = jc.compressed(lambda p: jnp.sum((p["w"] - 0.3) ** 2))
      >>> params = jc.compress({"w": jnp.eye(4)}, {"w": ELQ("ternary")})
      >>> trainable, rest = jc.partition(params)
      >>> total = lambda t: perturbed_loss(loss, jc.combine(t, rest))
      >>> grads = jax.grad(total)(trainable)  # and train for a while
      >>> params = quantize_more(params, 0.5, grads)
      >>> jc.finalize(params)
      {'w': QuantizedArray(float32[4, 4], ternary)}
    """

    format: str = "ternary"
    _: dataclasses.KW_ONLY
    granularity: str = "tensor"
    harm: float = 1.0
    scale_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        super().__post_init__()
        power = isinstance(self.format, str) and self.format.startswith("pow2_")
        if self.format not in ("ternary", "binary") and not power:
            raise SpecError(f"format={self.format!r}: write ternary, binary, or such as pow2_4")
        code_format(self.format)
        if power and self.granularity != "tensor":
            raise SpecError(f"{self.format} has one scale for all: write granularity='tensor'")
        if not is_number(self.harm, 0):
            raise SpecError(f"harm={self.harm!r}: write a number of at least 0")

    def make(self, weight: jax.Array, layout: Layout, key: jax.Array | None) -> ELQArray:
        if self.format.startswith("pow2_"):
            scale = top_power(weight, layout.axes).astype(layout.scale_dtype)
        else:
            scheme = Scheme(self.format, layout.axes, scale_dtype=layout.scale_dtype)
            scale, _ = scheme.scales(weight)
        mask = jnp.zeros(weight.shape, bool)
        codes = jnp.zeros(weight.shape, code_format(self.format).dtype)
        return ELQArray(
            weight, mask, codes, scale, format=self.format, harm=float(self.harm), **layout.fields()
        )


def perturbed_loss(
    loss: Callable[[Any], jax.Array], params: Any, perturbation: float = 1.0, error: float = 1e-4
) -> jax.Array:
    """The loss with what rounding the rest would do: `L(w) + a1 |L(w_hat) - L(w)| + a2 E`.

    `E = sum (w - w_hat)**2`. w_hat is on the grid, with the gradient straight through to w inside
    of the loss, and fixed in E. It takes two passes of the loss.

    Args:
      loss: of a tree like `params`, a scalar; a `compressed` function, for example.
      params: any tree, with `INQ` or `ELQ` leaves.
      perturbation: a1.
      error: a2.

    Returns:
      The sum, differentiable in `params`.

    Raises:
      CompressError: when there is no such leaf.

    References:
      Zhou et al., *Explicit Loss-Error-Aware Quantization for Low-Bit Deep Neural Networks*, 2018.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> params = ELQ("ternary", scale_dtype="float32")(jnp.array([1.0, -1.0, 0.25]))
      >>> loss = jc.compressed(lambda w: jnp.sum(w**2))
      >>> float(perturbed_loss(loss, params, 0.5, 1.0))  # 2.0625 + 0.5 * 0.0625 + 0.0625
      2.15625
    """
    gaps: list[jax.Array] = []

    def put(leaf: Any) -> Any:
        if isinstance(leaf, IncrementalArray):
            hat = leaf.on_grid()
            gap = leaf.proxy() - jax.lax.stop_gradient(jnp.where(leaf.mask, 0.0, hat))
            gaps.append(jnp.sum(gap.astype(jnp.float32) ** 2))
            return hat
        if not isinstance(leaf, CompressedArray):
            return leaf
        return leaf.replace(**{name: put(getattr(leaf, name)) for name in leaf.children})

    rounded = jax.tree.map(put, params, is_leaf=is_compressed)
    if not gaps:
        raise CompressError("no leaf is quantized by and by; put in ELQ() with compress")
    now = loss(params)
    return now + perturbation * jnp.abs(loss(rounded) - now) + error * sum(gaps)
