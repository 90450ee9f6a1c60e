"""`AWQ` on the leaves of a tree."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxcompress.arrays.scaled import ScaledArray
from jaxcompress.errors import SpecError
from jaxcompress.layerwise.folding import Folding
from jaxcompress.layerwise.leaf import quantized_leaf
from jaxcompress.quantization.solvers.awq import Search, of_gram, solve
from jaxcompress.quantization.solvers.spec import GPTQ
from jaxcompress.specs import LeafContext, register_spec


@register_spec("awq")
@dataclasses.dataclass(frozen=True, repr=False)
class AWQ(GPTQ):
    """Finer steps for inputs that matter, by a factor for each that the inputs are divided by.

    The factors come from `jaxcompress.quantization.solvers.awq`, on the Gram matrix of the inputs
    that `observe` saw meet the leaf, and on their mean magnitudes: those of `abs_mean` where it was
    observed, else the root mean square. The outcome is a `ScaledArray` around the `QuantizedArray`
    of the scaled weight. With `compensated` that is rounded by GPTQ, and not to nearest.

    Args:
      format: as in `Quantize`, like all that follow up to `scale_group_size`.
      group_size: weights that share a scale along the last input axis.
      axis: must be None: scales are shared along the inputs.
      symmetric: whether zero is the middle of the range.
      scale_dtype: the dtype of scales, and of the factors of the inputs.
      convention: how the symmetric scale follows from the range.
      estimator: how the range follows from the weights.
      rounding: must be `nearest`.
      scale_format: must be None, like the next.
      scale_group_size: see `scale_format`.
      steps: how many exponents are tried.
      tries: how many narrower ranges are tried for each group.
      compensated: whether later weights make up for the rounding of earlier ones.
      act_order: as in `GPTQ`, where `compensated`; like the last two.
      block_size: inputs in a block.
      damping: the share of the mean diagonal that is added to the Gram matrix.

    Raises:
      SpecError: for values that cannot be; when it is called without statistics that fit, or for a
        grouped convolution, whose groups would need factors of their own.

    References:
      Lin et al., *AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and
      Acceleration*, 2024.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.quantization.solvers import AWQ
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}
      >>> batches = [jax.random.normal(jax.random.key(1), (64, 16))]
      >>> stats = jc.observe(fn, params, batches, ("gram", "abs_mean"))
      >>> jc.compress(params, {"kernel": AWQ("int4", group_size=8)}, stats=stats)
      {'kernel': ScaledArray(float32[16, 8], scaled int4/8)}
    """

    _: dataclasses.KW_ONLY
    steps: int = 20
    compensated: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.search()

    def search(self) -> Search:
        """What the solver is asked for."""
        return Search(self.options(), self.steps, self.compensated)

    def solved(self, w: jax.Array, gram: jax.Array, how: Folding, context: LeafContext) -> Any:
        """The scaled leaf."""
        if how.groups > 1:
            raise SpecError(
                f"{context.path}: AWQ has one factor for each input, and the {how.groups} groups "
                "of this convolution would need their own; write GPTQ instead"
            )
        seen = None if context.stats is None else context.stats.abs_mean
        magnitude = of_gram(gram) if seen is None else seen
        found, inverse = solve(w, gram, magnitude, self.search(), how.inputs[-1])
        one_each = how._replace(outputs=(1,) * len(how.outputs))
        inner = quantized_leaf(found, how, self.plain())
        return ScaledArray(inner, one_each.unfold(inverse[..., None]))
