"""`SpQR`: the weights that a few bits would spoil are kept beside the codes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxcompress.arrays.summed import SumArray
from jaxcompress.layerwise.folding import Folding
from jaxcompress.layerwise.hessian import Solution, check_finite, check_shapes
from jaxcompress.layerwise.leaf import quantized_leaf, sparse_leaf
from jaxcompress.quantization.solvers.gptq import Options, check_format, solve
from jaxcompress.quantization.solvers.spec import GPTQ, codes_alone
from jaxcompress.quantization.spec import Quantize
from jaxcompress.specs import LeafContext, register_spec


def spqr(
    w: jax.Array,
    gram: jax.Array,
    quantize: Quantize,
    *,
    outliers: float = 0.01,
    act_order: bool = False,
    block_size: int = 128,
    damping: float = 0.01,
    tries: int = 0,
) -> Solution:
    """`gptq`, but for the weights that codes would cost most, which are kept as they are.

    With H the damped Gram matrix and q the nearest codes, it helps to keep a weight by
    `(w_c - q_c)**2 / [H^-1]_cc`; the largest of a group by the sum of these over the group, less
    what it is when the range of the group does without that weight. The `round(outliers K N)`
    weights that help most are kept, and ranges are those of the weights that are left. An outlier
    makes up for the rounding of earlier weights like any other, and is stored, rounded to the dtype
    of the weights, as it is when its turn comes.

    Args:
      w: `[..., K, N]`; see `gptq`, like all that follow but `outliers`.
      gram: `[..., K, K]`.
      quantize: the format.
      outliers: the share of weights that are kept.
      act_order: whether rows are taken by decreasing diagonal.
      block_size: inputs in a block.
      damping: the share of the mean diagonal that is added.
      tries: how many narrower ranges are tried.

    Returns:
      As `gptq`; `mask` says which weights were kept. Their codes are those of zero.

    Raises:
      SpecError: as `gptq`.

    References:
      Dettmers et al., *SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight
      Compression*, 2023.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> w = jnp.array([[1.0], [2.0], [7.0], [100.0]])
      >>> found = spqr(w, jnp.eye(4), jc.Quantize("int4"), outliers=0.25)
      >>> found.weight[:, 0].tolist(), found.codes[:, 0].tolist()
      ([1.0, 2.0, 7.0, 100.0], [1, 2, 7, 0])
    """
    check_shapes(w, gram, "spqr")
    check_format(quantize, "spqr")
    options = Options(quantize, act_order, block_size, damping, tries, outliers)
    check_finite(gram, "spqr")
    return solve(w, gram, options, w.shape[-2])


@register_spec("spqr")
@dataclasses.dataclass(frozen=True, repr=False)
class SpQR(GPTQ):
    """GPTQ with the weights that codes would cost most kept beside them.

    The solver is `jaxcompress.quantization.solvers.spqr`, on the Gram matrix of the inputs that
    `observe` saw meet the leaf. The outcome is a `SumArray` of a `QuantizedArray` and a
    `SparseArray`, which is zero where the other is not. An outlier takes the bits of its dtype and
    those that say where it is, some six to eight at one percent.

    Args:
      format: as in `Quantize`, like all that follow up to `scale_group_size`.
      group_size: weights that share a scale along the last input axis.
      axis: must be None: scales are shared along the inputs.
      symmetric: whether zero is the middle of the range.
      scale_dtype: the dtype of scales.
      convention: how the symmetric scale follows from the range.
      estimator: how the range follows from the weights.
      rounding: must be `nearest`.
      scale_format: must be None, like the next.
      scale_group_size: see `scale_format`.
      act_order: as in `GPTQ`, like the next three.
      tries: how many narrower ranges are tried for each group.
      block_size: inputs in a block.
      damping: the share of the mean diagonal that is added to the Gram matrix.
      outliers: the share of weights that are kept.

    Raises:
      SpecError: for values that cannot be; when it is called without statistics that fit.

    References:
      Dettmers et al., *SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight
      Compression*, 2023.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.quantization.solvers import SpQR
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}
      >>> batches = [jax.random.normal(jax.random.key(1), (64, 16))]
      >>> stats = jc.observe(fn, params, batches, ("gram",))
      >>> jc.compress(params, {"kernel": SpQR("int4", outliers=0.0625)}, stats=stats)
      {'kernel': SumArray(float32[16, 8], int4 + 93.8% sparse bitmask)}
    """

    _: dataclasses.KW_ONLY
    outliers: float = 0.01

    def options(self) -> Options:
        """What the solver is asked for."""
        return dataclasses.replace(super().options(), outliers=self.outliers)

    def solved(self, w: jax.Array, gram: jax.Array, how: Folding, context: LeafContext) -> Any:
        """The sum of the codes and of what is kept."""
        found = codes_alone(w, gram, self.options(), how.inputs[-1])
        codes = quantized_leaf(found, how, self.plain())
        if found.mask is None:  # none at all
            return codes
        kept = round(self.outliers * w.shape[-2] * w.shape[-1]) * how.groups
        return SumArray.of(codes, sparse_leaf(found.weight, found.mask, how, kept))
