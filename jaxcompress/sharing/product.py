"""`ProductQuantize` and `ResidualQuantize`: blocks of weights share a few vectors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.product import ProductArray
from jaxcompress.errors import SpecError
from jaxcompress.layerwise.folding import Folding, folding
from jaxcompress.rules import KernelAxes
from jaxcompress.sharing.blocks import Blocks
from jaxcompress.sharing.weighting import WeighedPlan, WeighedSpec
from jaxcompress.specs import (
    LeafContext,
    Plan,
    is_count,
    is_floating_dtype,
    is_number,
    register_spec,
)

WEIGHTINGS = (None, "second_moment", "gram")


@dataclasses.dataclass(frozen=True, repr=False)
class BlockSpec(WeighedSpec):
    """What the specs of blocks have in common; see `ProductQuantize`."""

    _: dataclasses.KW_ONLY
    block: int = 4
    bits: int = 8
    codebooks: int | None = 1
    axis: str = "input"
    weighting: str | None = None
    init: str = "k-means++"
    iterations: int = 25
    damping: float = 0.01
    codebook_dtype: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least, most in (("block", 1, math.inf), ("bits", 1, 8), ("iterations", 0, 1e9)):
            if not is_count(getattr(self, name), least, most):
                bound = f"from {least} to {most}" if most == 8 else f"of at least {least}"
                raise SpecError(f"{name}={getattr(self, name)!r}: write a whole number {bound}")
        if self.codebooks is not None and not is_count(self.codebooks, 1):
            raise SpecError(
                f"codebooks={self.codebooks!r}: write 1, a divisor of the number of blocks along "
                "the axis, or None for one for each"
            )
        if self.axis not in ("input", "output"):
            raise SpecError(f"axis={self.axis!r}: write 'input' or 'output'")
        if self.weighting not in WEIGHTINGS:
            raise SpecError(f"weighting={self.weighting!r}: write one of {WEIGHTINGS}")
        if self.weighting == "gram" and self.axis == "output":
            raise SpecError("weighting='gram' couples inputs: write axis='input'")
        if self.init not in ("k-means++", "random"):
            raise SpecError(f"init={self.init!r}: write k-means++ or random")
        if not is_number(self.damping, 0) or self.damping == 0:
            raise SpecError(f"damping={self.damping!r}: write a share above 0, such as 0.01")
        if self.codebook_dtype is not None and not is_floating_dtype(self.codebook_dtype):
            raise SpecError(f"codebook_dtype={self.codebook_dtype!r}: write one such as 'float16'")

    def plan(self, leaf: Any, context: LeafContext) -> Plan:
        """Settles the blocks and their codebooks.

        Raises:
          SpecError: for a leaf without such an axis, or codebooks that do not divide the blocks.
        """
        side = context.axes.input if self.axis == "input" else context.axes.output
        if leaf.ndim == 0 or not side:
            raise SpecError(f"{context.path}: there is no {self.axis} axis to cut into blocks")
        if not leaf.size:
            raise SpecError(f"{context.path}: shape {tuple(leaf.shape)} holds no values to share")
        other = context.axes.output if self.axis == "input" else context.axes.input
        how = folding(leaf, KernelAxes(tuple(side), tuple(other)))
        n = how.inputs[-1]
        d = max(1, min(self.block, n))
        count = -(-n // d)
        books = count if self.codebooks is None else self.codebooks
        if books > 1 and count % books:
            raise SpecError(
                f"{context.path}: {books} codebooks do not divide {count} blocks of {d} along an "
                f"axis of {n}; write a divisor, 1, or None for one for each"
            )
        dtype = np.dtype(leaf.dtype if self.codebook_dtype is None else self.codebook_dtype)
        blocks = Blocks(
            d, max(1, books), 2**self.bits, getattr(self, "stages", 1), getattr(self, "sweeps", 0),
            self.init, self.iterations, dtype,
        )  # fmt: skip
        return _BlockPlan(blocks, how, max(side))

    def measured(self, leaf: Any, context: LeafContext, plan: Any) -> tuple[Any, Any]:
        """The weights of second moments, or the metrics of blocks of the Gram matrix."""
        if self.weighting == "second_moment":
            return super().measured(leaf, context, plan)
        gram = None if context.stats is None else context.stats.gram
        how = plan.how
        rows = math.prod(how.inputs)
        if gram is None or tuple(gram.shape) != (*how.batch, rows, rows):
            found = "none" if gram is None else tuple(gram.shape)
            raise SpecError(
                f"{context.path}: {type(self).__name__}(weighting='gram') needs the Gram matrix "
                f"{(*how.batch, rows, rows)} of the inputs on axes {tuple(context.axes.input)} and "
                f"has {found}: write compress(..., stats=jc.observe(fn, params, batches, "
                "('gram',))); without one for a leaf that is only looked up or is grouped"
            )
        return None, plan.blocks.metrics(jnp.asarray(gram), how.inputs[-1], self.damping)


@register_spec("product_quantize")
@dataclasses.dataclass(frozen=True, repr=False)
class ProductQuantize(BlockSpec):
    """Product quantization: each block of d weights is replaced by one of `2**bits` vectors.

    The vectors are found by k-means. At `bits / block` bits a weight and a table beside, it takes
    less for the same error than rounding single weights, and goes below one bit. What
    is minimized, over the codebooks and the choice q, is

    - `sum |w - q(w)|**2`;
    - `sum h (w - q(w))**2` with `weighting="second_moment"`, h the mean square of the input
      that a weight meets; and with `fit(leaf, h)`, for an importance of any kind;
    - `sum_b (w - q(w))_b' G_b (w - q(w))_b` with `weighting="gram"`, G_b the block of the inputs'
      Gram matrix that belongs to b: the squared error of the outputs, but for what the
      errors of different blocks have in common. A share of the mean diagonal is added to G_b.

    Each weight of a stack has codebooks of its own.

    Args:
      block: d, weights in a block.
      bits: of an index, 1 to 8.
      codebooks: how many: 1 for all blocks; a divisor of the number of blocks along the axis,
        for as many equal runs of them; None: one for each place along the axis, which is worth its
        bytes for long tables. Each takes `2**bits * block` values.
      axis: `input` or `output`: blocks lie along the last of these axes. An embedding's features
        are its inputs.
      weighting: None, `second_moment` or `gram`, from `compress(..., stats=...)`.
      init: `k-means++` or `random`, drawn with the key of `compress`, else with key 0.
      iterations: of k-means, at most.
      damping: the share of the mean diagonal that is added to G_b.
      codebook_dtype: how vectors are stored; in the dtype of the weights unless given.

    Raises:
      SpecError: for what is out of range, codebooks that do not divide the blocks, and statistics
        that are missing.

    References:
      Jegou, Douze and Schmid, *Product Quantization for Nearest Neighbor Search*, 2011; Stock et
      al., *And the Bit Goes Down: Revisiting the Quantization of Neural Networks*, 2020.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> w = jax.random.normal(jax.random.key(0), (64, 32))
      >>> ProductQuantize(block=4, bits=6)(w)
      ProductArray(float32[64, 32], product 64 x 4)
    """


@register_spec("residual_quantize")
@dataclasses.dataclass(frozen=True, repr=False)
class ResidualQuantize(BlockSpec):
    """Residual quantization: each block is the sum of one vector from each of several codebooks.

    A first codebook is found as by `ProductQuantize`, the next for what is left, and so on; then
    each in turn is improved for what the others leave. So s stages of `2**bits` vectors tell
    `2**(s bits)` sums apart, which no single codebook could hold.

    Args:
      stages: how many vectors are added.
      sweeps: how often all are improved in turn.
      block: as in `ProductQuantize`, like all that follow.
      bits: of one index; a block takes `stages * bits`.
      codebooks: how many for each stage.
      axis: `input` or `output`.
      weighting: None, `second_moment` or `gram`.
      init: `k-means++` or `random`.
      iterations: of k-means, at most.
      damping: the share of the mean diagonal that is added to a Gram matrix.
      codebook_dtype: how vectors are stored.

    Raises:
      SpecError: as `ProductQuantize`.

    References:
      Chen, Guan and Wang, *Approximate Nearest Neighbor Search by Residual Vector Quantization*,
      2010; Babenko and Lempitsky, *Additive Quantization for Extreme Vector Compression*, 2014.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> w = jax.random.normal(jax.random.key(0), (64, 32))
      >>> ResidualQuantize(2, block=4, bits=4)(w)
      ProductArray(float32[64, 32], product 2 stages of 16 x 4)
    """

    stages: int = 2
    _: dataclasses.KW_ONLY
    sweeps: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_count(self.stages, 1):
            raise SpecError(f"stages={self.stages!r}: write a whole number of at least 1")
        if not is_count(self.sweeps, 0):
            raise SpecError(f"sweeps={self.sweeps!r}: write a whole number of at least 0")


@dataclasses.dataclass(frozen=True)
class _BlockPlan(WeighedPlan):
    blocks: Blocks
    how: Folding
    axis: int

    def solve(self, leaf: jax.Array, key: Any, weights: Any, metric: Any) -> ProductArray:
        how, blocks = self.how, self.blocks
        key = jax.random.key(0) if key is None else key
        lead = len(how.batch)
        w = how.fold(leaf)
        h = None if weights is None else how.fold(weights)
        one = lambda xs: blocks.fit(xs[0], how.inputs[-1], key, xs[1], xs[2])
        if lead:  # one after the other: what k-means does only where it must, it does then
            flat = lambda x: None if x is None else x.reshape(-1, *x.shape[lead:])
            found = jax.lax.map(one, (flat(w), flat(h), flat(metric)))
            found = jax.tree.map(lambda x: x.reshape(*how.batch, *x.shape[1:]), found)
        else:
            found = one((w, h, metric))
        indices, books = found
        runs = how.inputs[:-1]
        width = indices.shape[lead] // max(1, math.prod(runs))
        indices = how.unfold(indices, (*runs, width))
        n = leaf.shape[self.axis]
        return ProductArray.of(indices, books, axis=self.axis, length=n, dtype=leaf.dtype)
