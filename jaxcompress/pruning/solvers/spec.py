"""`SparseGPT`: the solver of that name on the leaves of a tree."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax

from jaxcompress.errors import SpecError
from jaxcompress.layerwise.folding import Folding
from jaxcompress.layerwise.leaf import SolverSpec, quantized_leaf, sparse_leaf
from jaxcompress.pruning.patterns import parse_pattern
from jaxcompress.pruning.select import kept_count
from jaxcompress.pruning.solvers.sparsegpt import Options, check_options, solve
from jaxcompress.quantization.spec import Quantize, check_quantize
from jaxcompress.specs import LeafContext, register_spec

# The fields that are those of a `Quantize`.
_SHARED = ("group_size", "symmetric", "scale_dtype", "convention", "estimator")


@register_spec("sparsegpt")
@dataclasses.dataclass(frozen=True, repr=False)
class SparseGPT(SolverSpec):
    """Prunes in one shot, and lets the weights that stay make up for those that go.

    The solver is `jaxcompress.pruning.solvers.sparsegpt`, on the Gram matrix of the inputs that
    `observe` saw meet the leaf. Exactly `round(n * (1 - sparsity))` of n weights stay, so many of
    each weight of a stack, or n of each m along the last input axis.

    The outcome is a `SparseArray`; or with `quantize` a `QuantizedArray` whose codes are zero (the
    zero point) where a weight was removed. There what stays has been rounded to codes while others
    could still make up for it. The codes are stored in full: kept values alone would lose the
    columns and groups that share scales. Entropy coding (`save(..., coded=True)`) takes out what
    the zeros take.

    Args:
      sparsity: the share of weights to remove, from 0 to 1.
      pattern: None for any place, or `"n:m"` with `n/m = 1 - sparsity`.
      block_size: inputs among which weights are compared, see the solver.
      damping: the share of the mean diagonal that is added to the Gram matrix.
      quantize: the format of what stays, such as `"int4"`, or a `Quantize`; None: not quantized.
      group_size: of the quantization, like all that follow, see `Quantize`.
      symmetric: whether zero is the middle of the range.
      scale_dtype: the dtype of scales.
      convention: how the symmetric scale follows from the range.
      estimator: how the range follows from the weights.

    Raises:
      SpecError: for values that cannot be; when it is called without statistics that fit.

    References:
      Frantar and Alistarh, *SparseGPT: Massive Language Models Can Be Accurately Pruned in
      One-Shot*, 2023.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.pruning.solvers import SparseGPT
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}
      >>> batches = [jax.random.normal(jax.random.key(1), (64, 16))]
      >>> stats = jc.observe(fn, params, batches, ("gram",))
      >>> jc.compress(params, {"kernel": SparseGPT(0.75)}, stats=stats)
      {'kernel': SparseArray(float32[16, 8], 75% sparse bitmask)}
      >>> jc.compress(params, {"kernel": SparseGPT(0.5, quantize="int4")}, stats=stats)
      {'kernel': QuantizedArray(float32[16, 8], int4)}
    """

    looked_up: ClassVar[str] = "nothing can make up for it; write Prune instead"

    sparsity: float
    _: dataclasses.KW_ONLY
    pattern: str | None = None
    block_size: int = 128
    damping: float = 0.01
    quantize: str | Quantize | None = None
    group_size: int | None = None
    symmetric: bool = True
    scale_dtype: str = "bfloat16"
    convention: str = "absmax"
    estimator: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity is None:
            raise SpecError("sparsity=None: write the share to remove, from 0 to 1, such as 0.5")
        check_options(self.sparsity, self.pattern, self.block_size, self.damping)
        if isinstance(self.quantize, Quantize):
            # As plain fields, for a recipe holds no spec within a spec.
            check_quantize(self.quantize, "SparseGPT")
            for name in (*_SHARED, "format"):
                field = "quantize" if name == "format" else name
                object.__setattr__(self, field, getattr(self.quantize, name))
        self.options()

    def options(self) -> Options:
        """What the solver is asked for."""
        quantize = None
        if self.quantize is not None:
            shared = {name: getattr(self, name) for name in _SHARED}
            quantize = Quantize(self.quantize, **shared)  # type: ignore[arg-type]
        return Options(self.sparsity, self.pattern, self.block_size, self.damping, quantize)

    def solved(self, w: jax.Array, gram: jax.Array, how: Folding, context: LeafContext) -> Any:
        """The leaf of what stays."""
        options = self.options()
        found = solve(w, gram, options, how.inputs[-1], how.groups)
        if found.codes is None:
            return sparse_leaf(found.weight, found.mask, how, _kept(options, how))
        return quantized_leaf(found, how, options.quantize)


def _kept(options: Options, how: Folding) -> int:
    """How many values stay in one weight of a stack."""
    rows, columns = math.prod(how.inputs), math.prod(how.outputs)
    if options.pattern is None:
        return kept_count(rows * columns, options.sparsity or 0.0)
    n, m = parse_pattern(options.pattern)
    full, rest = divmod(how.inputs[-1], m)
    return rows // how.inputs[-1] * columns * (full * n + min(n, rest))
