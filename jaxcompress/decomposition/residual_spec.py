"""`LoftQ`, `LowRankPlusQuantized`, `LowRankPlusSparse`: a low-rank part beside a small one."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.arrays.adapted import AdaptedArray
from jaxcompress.arrays.base import CompressedArray, is_compressed, materialize
from jaxcompress.decomposition.ranks import check_possible
from jaxcompress.decomposition.residual import alternate
from jaxcompress.decomposition.sides import Sides
from jaxcompress.errors import SpecError
from jaxcompress.pruning.spec import Prune
from jaxcompress.quantization.spec import Quantize
from jaxcompress.rules import default_axes
from jaxcompress.specs import (
    LeafContext,
    Plan,
    Spec,
    is_count,
    on_auto_axes,
    placed_like,
    register_spec,
)


class LowRankPlus(Spec):
    """A low-rank part, and what another spec makes of the rest; subclasses say which."""

    rank: int
    iterations: int
    low_rank_first: bool = True

    def of_rest(self) -> Spec:
        """What compresses the rest."""
        raise NotImplementedError

    def trial(self, x: jax.Array, context: LeafContext) -> Any:
        """What that gives, in each iteration: the leaf, or its values."""
        return self.of_rest()(x, context)

    def _check(self) -> None:
        for name, value in (("rank", self.rank), ("iterations", self.iterations)):
            if not is_count(value, 1):
                raise SpecError(f"{name}={value!r}: write a whole number of at least 1")

    def plan(self, leaf: jax.Array, context: LeafContext) -> Plan:
        """Settles the sides of the factors."""
        sides = Sides.of(leaf, context)
        check_possible(self.rank, *sides.sizes, context.path)
        return _LowRankPlusPlan(self, context, sides)

    def __call__(self, leaf: Any, context: LeafContext | None = None) -> Any:
        """Splits one dense array, or the inner children of a leaf around it."""
        if context is None:
            context = LeafContext("leaf", default_axes("leaf", leaf.ndim))
        if is_compressed(leaf):
            return self._inner(leaf, context)
        leaf, mesh = on_auto_axes(jnp.asarray(leaf))
        out = self.plan(leaf, context).apply(leaf, context.key)
        return placed_like(out, leaf, mesh)


@dataclasses.dataclass(frozen=True, eq=False)
class _LowRankPlusPlan(Plan):
    spec: LowRankPlus
    context: LeafContext
    sides: Sides

    def apply(self, leaf: jax.Array, key: jax.Array | None) -> CompressedArray:
        spec, sides = self.spec, self.sides
        context = dataclasses.replace(self.context, key=key)
        parts = alternate(
            sides.matrix(leaf),
            spec.rank,
            lambda matrix: spec.trial(matrix.reshape(leaf.shape), context),
            iterations=spec.iterations,
            low_rank_first=spec.low_rank_first,
        )
        rest = parts.rest
        if not is_compressed(rest):
            rest = spec.of_rest()(rest, context)
        return AdaptedArray.of(rest, sides.factors(parts.left, parts.right))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pruned(spec: Spec, context: LeafContext, x: jax.Array) -> jax.Array:
    return materialize(spec(x, context))


def _codes(quantize: Any, group_size: Any, name: str) -> Spec:
    """A quantization by its format, or the spec that is given."""
    if isinstance(quantize, str):
        return Quantize(quantize, group_size=group_size)
    if not isinstance(quantize, Spec):
        raise SpecError(f"{name}: quantize={quantize!r}: write such as 'nf4' or jc.Quantize('nf4')")
    if group_size is not None:
        raise SpecError(f"{name}: write group_size within {quantize!r}")
    return quantize


class _PlusCodes(LowRankPlus):
    """Specs whose rest is quantized."""

    quantize: str | Spec
    group_size: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check()
        self.of_rest()

    def of_rest(self) -> Spec:
        return _codes(self.quantize, self.group_size, type(self).__name__)


@register_spec("low_rank_plus_quantized")
@dataclasses.dataclass(frozen=True, repr=False)
class LowRankPlusQuantized(_PlusCodes):
    """A low-rank part of high precision takes what is large; the rest is quantized: SVDQuant.

    `w ~ Q(w - L) + L'`, with L the truncated SVD of w and L' that of what the codes leave, which is
    never worse than L; see `jaxcompress.decomposition.residual.alternate`. SVDQuant smooths before:
    `chain(SmoothQuant(), LowRankPlusQuantized(32, Quantize("int4", group_size=64)))`.

    The leaf is an `AdaptedArray`: codes and factors meet the inputs in products of their own, and
    the factors may be trained. A `SumArray` would add up the dense weight at each call, `m n r`
    products whatever the batch, where the thin ones take `r (m + n)` for each example.
    The factors take `r (m + n)` values in the dtype of w.

    Args:
      rank: r, from 1 to `min(in, out)`.
      quantize: what the rest becomes: a format, or any spec, `GPTQ` with statistics of the inputs
        as well, or `chain(Quantize("int4"), QuantizeInput("int4"))`, which rounds the inputs of the
        codes and not those of the factors.
      group_size: with a format, weights that share a scale.
      iterations: how often both are found in turn; the best is taken.

    Raises:
      SpecError: for values that cannot be, or a leaf that is no matrix or too small for the rank.

    References:
      Li et al., *SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models*,
      2025.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.decomposition.residual_spec import LowRankPlusQuantized
      >>> LowRankPlusQuantized(2, jc.Quantize("int4", group_size=16))(jnp.ones((32, 16)))
      AdaptedArray(float32[32, 16], int4/16 + rank 2)
    """

    rank: int
    quantize: str | Spec = "int4"
    _: dataclasses.KW_ONLY
    group_size: int | None = None
    iterations: int = 1


@register_spec("loftq")
@dataclasses.dataclass(frozen=True, repr=False)
class LoftQ(_PlusCodes):
    """QLoRA whose adapter starts from what the codes lost, rather than from zero.

    `Q_t = Q(w - L_{t-1})` and `L_t = svd_r(w - Q_t)`, from L_0 = 0. The best of all iterations is
    taken, so that the error is never greater than that of the codes alone, with which `LoRA`
    starts, nor than with fewer iterations; see `jaxcompress.decomposition.residual.alternate`. The
    leaf is an `AdaptedArray` that trains its factors, `partition_adapters` as for `LoRA`.

    Args:
      rank: r, from 1 to `min(in, out)`.
      quantize: what the rest becomes: a format, or any spec.
      group_size: with a format, weights that share a scale.
      iterations: how often both are found in turn.

    Raises:
      SpecError: for values that cannot be, or a leaf that is no matrix or too small for the rank.

    References:
      Li et al., *LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models*, 2024.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.decomposition.residual_spec import LoftQ
      >>> LoftQ(2, "nf4", group_size=16)(jnp.ones((32, 16)))
      AdaptedArray(float32[32, 16], nf4/16 + rank 2)
    """

    rank: int
    quantize: str | Spec = "nf4"
    _: dataclasses.KW_ONLY
    group_size: int | None = None
    iterations: int = 5

    low_rank_first = False


@register_spec("low_rank_plus_sparse")
@dataclasses.dataclass(frozen=True, repr=False)
class LowRankPlusSparse(LowRankPlus):
    """A low-rank part, and the weights that it fits least: GoDec without its random projections.

    `S_t` keeps the weights of `w - L_{t-1}` of largest magnitude, `L_t = svd_r(w - S_t)`, from
    `L_0 = 0`: values so large that they would pass for a low-rank part are set aside first. Both
    steps are the best possible ones, so that no iteration is worse than the one before; with a
    pattern that need not be, since units are chosen by their mean magnitude.
    `jaxcompress.decomposition.robust_pca` finds rank and count by itself.

    The leaf is an `AdaptedArray` of a `SparseArray` and a `LowRankArray`, in products of their own.

    Args:
      rank: r, from 1 to `min(in, out)`.
      sparsity: the share of weights that the sparse part does not have, as in `Prune`.
      pattern: of the sparse part, as in `Prune`.
      iterations: how often both are found in turn.

    Raises:
      SpecError: for values that cannot be, or a leaf that is no matrix or too small for the rank.

    References:
      Zhou and Tao, *GoDec: Randomized Low-rank & Sparse Matrix Decomposition in Noisy Case*, 2011;
      Yu et al., *On Compressing Deep Models by Low Rank and Sparse Decomposition*, 2017.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.decomposition.residual_spec import LowRankPlusSparse
      >>> w = jnp.ones((16, 16)).at[2, 3].set(100.0)
      >>> leaf = LowRankPlusSparse(1, 255 / 256)(w)
      >>> leaf, bool(jnp.allclose(leaf.materialize(), w, rtol=1e-4))
      (AdaptedArray(float32[16, 16], 99.6% sparse gaps + rank 1), True)
    """

    rank: int
    sparsity: float = 0.9
    _: dataclasses.KW_ONLY
    pattern: str | None = None
    iterations: int = 20

    low_rank_first = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check()
        if self.sparsity is None:
            raise SpecError("sparsity=None: write the share to leave out, such as 0.9")
        self.of_rest()

    def of_rest(self) -> Spec:
        return Prune(self.sparsity, pattern=self.pattern)

    def trial(self, x: jax.Array, context: LeafContext) -> Any:
        """The values alone, since to choose the smallest index takes a compilation each time."""
        return _pruned(self.of_rest(), LeafContext(context.path, context.axes), x)
