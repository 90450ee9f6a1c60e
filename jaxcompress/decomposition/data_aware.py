"""`ActivationSVD`, `ASVD`, `FisherSVD`: low-rank kernels in the metric of what was observed."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from jaxcompress.arrays.base import is_compressed
from jaxcompress.arrays.low_rank import LowRankArray
from jaxcompress.decomposition.ranks import check_possible, check_saving, energy_rank
from jaxcompress.decomposition.spec import check_choice, check_readable
from jaxcompress.decomposition.weighted import factors, magnitudes, weighted_spectrum
from jaxcompress.errors import SpecError
from jaxcompress.gradients.batches import mean_over_batches
from jaxcompress.gradients.curvature import squared_gradients
from jaxcompress.gradients.weights import Weights
from jaxcompress.input_stats import InputStats
from jaxcompress.layerwise.folding import Folding, folding
from jaxcompress.layerwise.hessian import check_damping
from jaxcompress.layerwise.leaf import SolverSpec, on_matrices
from jaxcompress.rules import KernelAxes, default_axes, match
from jaxcompress.specs import LeafContext, is_number, register_spec


@dataclasses.dataclass(frozen=True, repr=False)
class DataAwareSpec(SolverSpec):
    """What the specs of this file share: a rank or an energy, in a metric that `metric` gives."""

    looked_up: ClassVar[str] = "the best is plain SVD; write LowRank instead"

    rank: int | None = None
    _: dataclasses.KW_ONLY
    energy: float | None = None
    damping: float = 1e-5
    allow_larger: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(type(self).__name__, self.rank, self.energy, self.allow_larger)
        check_damping(self.damping)

    def metric(self, context: LeafContext) -> Any:
        """`[..., K, K]`, or `[..., K]` of a diagonal one."""
        return context.stats.gram  # type: ignore[union-attr]

    def folded(self, leaf: Any, context: LeafContext) -> tuple[Folding, bool]:
        """The leaf's matrices, and whether its inputs come before its outputs.

        Raises:
          SpecError: for what is no matrix, or has no statistics that fit.
        """
        if leaf.ndim < 2 or not context.axes.output:
            raise SpecError(
                f"{context.path}: shape {tuple(leaf.shape)} is no matrix and has no low rank; let "
                "the rule match kernels only, such as '**/kernel'"
            )
        how = self._folding(leaf, context)
        if how.groups > 1:
            raise SpecError(
                f"{context.path}: the groups of a grouped convolution are matrices of their own, "
                f"which two factors cannot be for all; put {context.path!r}: None before the rule"
            )
        middle = len(how.batch)
        first = how.order[middle : middle + len(how.inputs)]
        last = how.order[middle + len(how.inputs) :]
        if max(first) < min(last) or max(last) < min(first):
            return how, max(first) < min(last)
        raise SpecError(
            f"{context.path}: input axes {context.axes.input} and output axes "
            f"{context.axes.output} of shape {tuple(leaf.shape)} do not form a matrix"
        )

    def __call__(self, leaf: Any, context: LeafContext | None = None) -> Any:
        """Compresses one array by the statistics of the context."""
        if context is None:
            context = LeafContext("leaf", default_axes("leaf", leaf.ndim))
        if is_compressed(leaf):
            raise SpecError(f"{context.path}: {self!r} needs the dense weight; put it first")
        how, inputs_first = self.folded(leaf, context)
        self._check_rank(leaf, how, context)

        def solve(w: jax.Array, metric: jax.Array) -> LowRankArray:
            rank = self.rank
            if rank is None:
                rank = energy_rank(_spectrum(w, metric), self.energy or 1.0)
            return _leaf(w, metric, self.damping, rank, how, inputs_first)

        return on_matrices(solve, how, leaf, self.metric(context), context.path)

    def _check_rank(self, leaf: Any, how: Folding, context: LeafContext) -> None:
        rows, columns = math.prod(how.inputs), math.prod(how.outputs)
        if self.rank is None:
            check_readable(leaf, context.path, type(self).__name__)
            return
        check_possible(self.rank, rows, columns, context.path)
        if not self.allow_larger:
            check_saving(self.rank, rows, columns, context.path)


_spectrum = jax.jit(weighted_spectrum)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _leaf(
    w: jax.Array, metric: jax.Array, damping: Any, rank: int, how: Folding, inputs_first: bool
) -> LowRankArray:
    left, right = factors(w, metric, rank, damping)
    left = left.reshape(*how.batch, *how.inputs, rank)
    right = right.reshape(*how.batch, rank, *how.outputs)
    if inputs_first:
        return LowRankArray.of(left, right, left_ndim=len(how.inputs), right_ndim=len(how.outputs))
    at = len(how.batch)
    first, second = jax.numpy.moveaxis(right, at, -1), jax.numpy.moveaxis(left, -1, at)
    return LowRankArray.of(first, second, left_ndim=len(how.outputs), right_ndim=len(how.inputs))


@register_spec("activation_svd")
@dataclasses.dataclass(frozen=True, repr=False)
class ActivationSVD(DataAwareSpec):
    """The two factors that change a layer's outputs least on what was observed.

    The solver is `jaxcompress.decomposition.weighted.activation_svd`, on the Gram matrix of the
    inputs that `observe` saw meet the leaf. The outcome is the `LowRankArray` that `LowRank`
    stores; each weight of a stack has its own metric and factors, of one rank.

    Args:
      rank: the rank r, from 1 to `min(in, out)`.
      energy: in place of a rank, the share of the squared outputs to keep, in (0, 1].
      damping: the share of the mean diagonal that is added to the Gram matrix.
      allow_larger: whether the factors of a given rank may take as much as the dense kernel or
        more.

    Raises:
      SpecError: unless exactly one of `rank` and `energy` is given and possible for the leaf; for
        grouped convolutions, and without statistics that fit.

    References:
      Chen, Yu, Dhillon and Hsieh, *DRONE: Data-aware Low-rank Compression for Large NLP Models*,
      2021; Wang, Zheng, Wan and Zhang, *SVD-LLM: Truncation-aware Singular Value Decomposition for
      Large Language Model Compression*, 2024.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.decomposition.data_aware import ActivationSVD
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}
      >>> batches = [jax.random.normal(jax.random.key(1), (64, 16))]
      >>> stats = jc.observe(fn, params, batches, ("gram",))
      >>> jc.compress(params, {"kernel": ActivationSVD(3)}, stats=stats)
      {'kernel': LowRankArray(float32[16, 8], rank 3)}
    """


@register_spec("asvd")
@dataclasses.dataclass(frozen=True, repr=False)
class ASVD(DataAwareSpec):
    """Low rank of a kernel whose inputs are scaled by their mean magnitude.

    The solver is `jaxcompress.decomposition.weighted.asvd`. It needs no Gram matrix:
    `observe(..., ("abs_mean",))` is enough. Where there is one, `ActivationSVD` is exact.

    Args:
      rank: as in `ActivationSVD`, like all but the last.
      energy: the share of the squares to keep, in the scaled metric.
      damping: the share of the mean that is added to the metric.
      allow_larger: see there.
      alpha: how much the magnitudes count: inputs are scaled by `abs_mean**alpha`.

    Raises:
      SpecError: as `ActivationSVD`.

    References:
      Yuan, Shang, Song, Wu, Yan and Sun, *ASVD: Activation-aware Singular Value Decomposition for
      Compressing Large Language Models*, 2023.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.decomposition.data_aware import ASVD
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> stats = jc.observe(fn, params, [jnp.ones((4, 16))], ("abs_mean",))
      >>> jc.compress(params, {"kernel": ASVD(1)}, stats=stats)
      {'kernel': LowRankArray(float32[16, 8], rank 1)}
    """

    _: dataclasses.KW_ONLY
    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.alpha, 0):
            raise SpecError(f"alpha={self.alpha!r}: write a power of at least 0, such as 0.5")

    def metric(self, context: LeafContext) -> Any:
        """Powers of the mean magnitudes."""
        return magnitudes(context.stats.abs_mean, self.alpha)  # type: ignore[union-attr]

    def _folding(self, leaf: Any, context: LeafContext) -> Folding:
        return _of_inputs(leaf, context, "abs_mean", "ASVD", "jc.observe(..., ('abs_mean',))")


@register_spec("fisher_svd")
@dataclasses.dataclass(frozen=True, repr=False)
class FisherSVD(DataAwareSpec):
    """Low rank of a kernel whose inputs count by how much the loss depends on their weights.

    The solver is `jaxcompress.decomposition.weighted.fisher_svd`, on what `fisher_stats` found.

    Args:
      rank: as in `ActivationSVD`, like all others.
      energy: the share of the squares to keep, in the metric of the Fisher.
      damping: the share of the mean that is added to the metric.
      allow_larger: see there.

    Raises:
      SpecError: as `ActivationSVD`.

    References:
      Hsu, Hua, Chang, Lou, Shen and Jin, *Language Model Compression with Weighted Low-Rank
      Factorization*, 2022.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.decomposition.data_aware import FisherSVD, fisher_stats
      >>> loss_fn = lambda params, x: jnp.mean(jnp.tanh(x @ params["kernel"]) ** 2)
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}
      >>> batches = [jax.random.normal(jax.random.key(1), (64, 16))]
      >>> stats = fisher_stats(loss_fn, params, batches)
      >>> jc.compress(params, {"kernel": FisherSVD(3)}, stats=stats)
      {'kernel': LowRankArray(float32[16, 8], rank 3)}
    """

    def metric(self, context: LeafContext) -> Any:
        """The Fisher's diagonal, summed over the outputs."""
        return context.stats.fisher  # type: ignore[union-attr]

    def _folding(self, leaf: Any, context: LeafContext) -> Folding:
        return _of_inputs(leaf, context, "fisher", "FisherSVD", "fisher_stats(loss_fn, ...)")


def _of_inputs(leaf: Any, context: LeafContext, name: str, spec: str, source: str) -> Folding:
    """The folding of a leaf that a statistic `[..., K]` of its inputs fits."""
    found = None if context.stats is None else getattr(context.stats, name)
    if found is None:
        raise SpecError(
            f"{context.path}: {spec} needs {name} of the inputs on axes "
            f"{tuple(context.axes.input)}: write compress(..., stats={source})"
        )
    how = folding(leaf, context.axes)
    shape, wanted = tuple(np.shape(found)), (*how.batch, math.prod(how.inputs))
    if shape == wanted:
        return how
    if len(shape) == len(wanted) + 1 and shape[-1] == wanted[-1]:
        return how._replace(groups=shape[-2])
    raise SpecError(
        f"{context.path}: {name} has shape {shape}, and a leaf {tuple(leaf.shape)} with inputs "
        f"{tuple(context.axes.input)} needs {wanted}: write compress(..., stats={source}) with "
        "these very params"
    )


def fisher_stats(
    loss_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    leaves: str | Sequence[str] | None = None,
    axes: Mapping[str, KernelAxes] | None = None,
) -> dict[str, dict[tuple[int, ...], InputStats]]:
    """The Fisher's diagonal of the weights of each input, summed over the outputs.

    What `observe` is for inputs, for `FisherSVD`: `f_i = sum_j mean_n (dL_n / dw_ij)**2`, the mean
    over examples n.

    Args:
      loss_fn: `loss_fn(params, *batch)` for batches that are tuples, `loss_fn(params, batch)` for
        others, one number; it is given batches of one example.
      params: a tree of dense arrays.
      batches: any iterable; each array has the examples along its first axis. Each counts the
        same: let them be equally large.
      leaves: globs of the leaves; None: all floating leaves of two axes and more.
      axes: the input and output axes of leaves by path; Flax's conventions for all others.

    Returns:
      `{path: {axes: InputStats}}` for `compress(..., stats=)`, with `fisher` float32 `[..., K]`.

    Raises:
      SpecError: for a compressed leaf, no batches, a loss that is no scalar, or gradients that are
        not finite.
      RuleError: for a glob that matches nothing, and axes that do not fit.

    References:
      Hsu, Hua, Chang, Lou, Shen and Jin, *Language Model Compression with Weighted Low-Rank
      Factorization*, 2022.

    Examples:
      >>> import jax.numpy as jnp
      >>> loss_fn = lambda params, x: jnp.sum(x @ params["w"])
      >>> found = fisher_stats(loss_fn, {"w": jnp.ones((2, 3))}, [jnp.array([[1.0, 2.0]])])
      >>> found["w"][(-2,)].fisher.tolist()
      [3.0, 12.0]
    """
    weights = Weights.of(params)
    chosen = set(weights.paths)
    if leaves is not None:
        rules = dict.fromkeys([leaves] if isinstance(leaves, str) else leaves, True)
        hits = match(rules, weights.paths)
        chosen = {path for path, hit in zip(weights.paths, hits) if hit is not None}
    batches = list(batches)
    means = mean_over_batches(squared_gradients, loss_fn, weights, batches)
    out = {}
    for path, x, where in zip(weights.paths, means, weights.axes(axes)):
        if path in chosen and where.output:
            rows = folding(x, where).fold(x).sum(axis=-1)
            count = np.asarray(len(batches), np.int64)
            out[path] = {tuple(where.input): InputStats(count, fisher=rows)}
    return out
