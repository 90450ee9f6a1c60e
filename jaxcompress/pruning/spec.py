"""`Prune`: remove the weights of least score, and store the rest."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.arrays.base import is_compressed
from jaxcompress.arrays.sparse import SparseArray, best_layout, encode
from jaxcompress.errors import SpecError, ValuesNeededError
from jaxcompress.pruning.norms import input_norms
from jaxcompress.pruning.patterns import (
    Pattern,
    check_pattern,
    count,
    is_n_of_m,
    lay,
    parse_pattern,
)
from jaxcompress.pruning.select import kept_count, n_of_m_mask, top_mask
from jaxcompress.specs import (
    LeafContext,
    Plan,
    Spec,
    on_all_devices,
    on_auto_axes,
    placed_like,
    register_spec,
)

SCORES = ("magnitude", "wanda", "random")


@register_spec("prune")
@dataclasses.dataclass(frozen=True, repr=False)
class Prune(Spec):
    """Keeps the weights of largest score and stores them sparsely.

    Of n weights `round(n * (1 - sparsity))` stay, exactly, ties by the lowest index; in a stack,
    so many of each weight. The outcome is a `SparseArray` with a bit mask or gap-coded indices,
    whichever is smaller.

    Args:
      sparsity: the share of weights to remove, from 0 to 1. None: remove nothing but the zeros that
        are there, as `sparsify` leaves them; a weight of a stack that has more of them than
        another keeps some.
      pattern: None for any place; `"n:m"`: n of each m consecutive weights along the last
        input axis stay, where `n/m = 1 - sparsity`; or units that stay or go as a whole, of which
        the share counts: `block:RxC`, `vector`, `channel`, `filter`, `head`, `layer` (see
        `pruning.patterns`), by the mean score of their weights.
      score: `magnitude`, `|w|`; `wanda`, `|w| |x|` with the norm of the input that it meets,
        without a pattern compared within each output; or `random`. Wanda needs
        `compress(..., stats=...)`.

    Raises:
      SpecError: for a sparsity outside of 0 to 1, an unknown score, or a pattern that says
        another sparsity; for None inside of jit, where zeros cannot be counted.

    References:
      Han et al., *Learning both Weights and Connections for Efficient Neural Networks*, 2015;
      Mishra et al., *Accelerating Sparse Deep Neural Networks*, 2021 (n:m); Sun et al., *A Simple
      and Effective Pruning Approach for Large Language Models*, 2024 (Wanda).

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> w = jnp.arange(8.0).reshape(4, 2)
      >>> jc.Prune(0.5)(w).materialize().tolist()
      [[0.0, 0.0], [0.0, 0.0], [4.0, 5.0], [6.0, 7.0]]
      >>> jc.Prune(0.5, pattern="2:4")(w).materialize().tolist()
      [[0.0, 0.0], [0.0, 0.0], [4.0, 5.0], [6.0, 7.0]]
      >>> jc.Prune()(w.at[2:].set(0.0))
      SparseArray(float32[4, 2], 62.5% sparse bitmask)
    """

    sparsity: float | None = None
    _: dataclasses.KW_ONLY
    pattern: str | None = None
    score: str = "magnitude"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity is None:
            if self.pattern is not None:
                raise SpecError(
                    f"pattern {self.pattern!r} needs its sparsity: write Prune(0.5, "
                    "pattern='2:4'), or Prune() for the zeros that are there"
                )
        elif not isinstance(self.sparsity, numbers.Real) or not 0 <= self.sparsity <= 1:
            raise SpecError(
                f"sparsity={self.sparsity!r}: write the share to remove, from 0 to 1, such as 0.9"
            )
        if self.score not in SCORES:
            raise SpecError(f"score={self.score!r}: write one of {', '.join(SCORES)}")
        if self.pattern is not None:
            check_pattern(self.pattern)
        if self.pattern is not None and self.sparsity is not None and is_n_of_m(self.pattern):
            n, m = parse_pattern(self.pattern.partition("@")[0])
            if not math.isclose(1 - n / m, self.sparsity, abs_tol=1e-6):
                raise SpecError(
                    f"pattern {self.pattern!r} removes {1 - n / m:g} of the weights, not "
                    f"{self.sparsity:g}: write Prune({1 - n / m:g}, pattern={self.pattern!r})"
                )

    def __call__(self, leaf: Any, context: LeafContext | None = None) -> Any:
        """Prunes one array; with `wanda`, by the statistics in the context."""
        if self.score != "wanda" or is_compressed(leaf):
            return super().__call__(leaf, context)
        if context is None or context.stats is None:
            path = "leaf" if context is None else context.path
            raise SpecError(
                f"{path}: the score 'wanda' looks at the inputs: write compress(..., stats="
                "jc.observe(fn, params, batches, ('second_moment',))), and axes=jc.kernel_axes(...)"
                " where the leaf's axes are not by Flax's conventions"
            )
        inputs = tuple(context.axes.input)
        norms = input_norms(context.path, tuple(leaf.shape), inputs, context.stats)
        leaf, mesh = on_auto_axes(leaf)
        out = _apply_scored(self.plan(leaf, context), leaf, on_all_devices(norms, leaf))
        return placed_like(out, leaf, mesh)

    def plan(self, leaf: Any, context: LeafContext) -> Plan:
        """Counts what stays and, for a concrete leaf, picks the smaller layout of the index."""
        if leaf.ndim == 0:
            raise SpecError(f"{context.path}: a scalar cannot be pruned; leave it dense")
        if self.score == "random" and context.key is None:
            raise SpecError(
                f"{context.path}: the score 'random' draws: write compress(..., key=...)"
            )
        axes = context.axes
        batch = axes.batch_ndim(leaf.ndim)
        shape = tuple(leaf.shape[batch:])
        size = math.prod(shape)
        alone = self.pattern in (None, "unstructured")
        outputs = axes.output if self.score == "wanda" and alone else ()
        try:
            laid = lay(self.pattern or "unstructured", shape, axes)
        except SpecError as error:
            raise SpecError(f"{context.path}: {error}") from None
        if self.sparsity is None:
            kept, units = _nonzeros(leaf, batch, context), 0
        else:
            kept, units = _kept(laid, shape, outputs, self.sparsity)
        plan = _PrunePlan(self, kept, batch, laid, units, outputs, ("bitmask", 1, size))
        concrete = not isinstance(leaf, jax.core.Tracer)
        if not laid.single and concrete and self.score == "magnitude":
            mask = _mask(plan, jnp.abs(leaf))  # smaller boxes at the ends may be among those kept
            kept = int(jnp.max(jnp.sum(mask, axis=tuple(range(batch, leaf.ndim))), initial=0))
            plan = dataclasses.replace(plan, kept=kept)
        # A bit mask is smaller than gaps of 2 bits and up unless fewer than half the weights stay.
        searched = 2 * kept < size and not laid.m and self.score == "magnitude"
        if searched and concrete:
            mask = _filled(plan, _mask(plan, jnp.abs(leaf)))
            plan = dataclasses.replace(plan, layout=best_layout(mask, kept, batch))
        return plan


def _kept(
    laid: Pattern, shape: tuple[int, ...], outputs: tuple[int, ...], sparsity: float
) -> tuple[int, int]:
    """How many weights are stored of one weight of a stack, and how many units stay.

    With smaller boxes at the ends of axes, those stored are as many as may stay at most.
    """
    size = math.prod(shape)
    if laid.m:
        full, rest = divmod(shape[laid.axis], laid.m)
        rows = size // max(1, shape[laid.axis])
        return rows * (full * laid.n + min(laid.n, rest)), laid.n
    if outputs:
        columns = math.prod(shape[a] for a in outputs)
        each = kept_count(size // max(1, columns), sparsity)
        return columns * each, each
    units = kept_count(count(laid, shape), sparsity)
    return min(size, units * math.prod(laid.unit)), units


def _nonzeros(leaf: Any, batch_ndim: int, context: LeafContext) -> int:
    """The most nonzero values that one weight of a stack has."""
    if isinstance(leaf, jax.core.Tracer):
        raise ValuesNeededError(
            f"{context.path}: Prune() counts the zeros of a concrete array; call it outside of "
            "jit, or write a sparsity"
        )
    counts = jnp.sum(leaf != 0, axis=tuple(range(batch_ndim, leaf.ndim)), dtype=jnp.uint32)
    return int(jnp.max(counts, initial=0))


@functools.partial(jax.jit, static_argnums=0)
def _mask(plan: _PrunePlan, scores: jax.Array) -> jax.Array:
    """The mask of the weights that stay."""
    laid = plan.laid
    if plan.spec.sparsity is None or (laid.single and not laid.m and not plan.outputs):
        return plan.each(functools.partial(top_mask, k=plan.kept))(scores)
    if laid.m:
        return n_of_m_mask(scores, laid.n, laid.m, laid.axis)
    if plan.outputs:
        return plan.each(functools.partial(_by_output, plan.outputs, plan.units))(scores)
    shape = scores.shape[plan.batch_ndim :]
    units = plan.each(functools.partial(top_mask, k=plan.units))(laid.pooled(scores))
    return laid.spread(units, shape)


@functools.partial(jax.jit, static_argnums=0)
def _filled(plan: _PrunePlan, mask: jax.Array) -> jax.Array:
    """A mask with as many more places as smaller boxes at the ends left free."""
    return plan.each(functools.partial(top_mask, k=plan.kept))(mask.astype(jnp.float32))


def _by_output(outputs: tuple[int, ...], units: int, scores: jax.Array) -> jax.Array:
    """The largest of each output."""
    ends = tuple(range(-len(outputs), 0))
    moved = jnp.moveaxis(scores, outputs, ends)
    lead = moved.shape[: moved.ndim - len(outputs)]
    columns = moved.reshape(math.prod(lead), -1)
    mask = jax.vmap(functools.partial(top_mask, k=units), 1, 1)(columns)
    return jnp.moveaxis(mask.reshape(moved.shape), ends, outputs)


@functools.partial(jax.jit, static_argnums=0)
def _apply_scored(plan: _PrunePlan, leaf: jax.Array, norms: jax.Array) -> SparseArray:
    return plan.stored(leaf, jnp.abs(leaf.astype(jnp.float32)) * norms)


@dataclasses.dataclass(frozen=True)
class _PrunePlan(Plan):
    """`units` of each weight stay, or of each output where there are `outputs`."""

    spec: Prune
    kept: int
    batch_ndim: int
    laid: Pattern
    units: int
    outputs: tuple[int, ...]
    layout: tuple[str, int, int]

    def each(self, fn: Any) -> Any:
        """A function of one weight, for all of a stack."""
        for _ in range(self.batch_ndim):
            fn = jax.vmap(fn)
        return fn

    def stored(self, leaf: jax.Array, scores: jax.Array) -> SparseArray:
        """The leaf where the scores are largest."""
        mask = _mask(self, scores)
        if not self.laid.single:
            leaf, mask = jnp.where(mask, leaf, jnp.zeros_like(leaf)), _filled(self, mask)
        return encode(leaf, mask, self.kept, self.layout, self.batch_ndim)

    def apply(self, leaf: jax.Array, key: jax.Array | None) -> SparseArray:
        scores = jnp.abs(leaf)
        if self.spec.score == "random" and key is not None:
            scores = jax.random.uniform(key, leaf.shape)
        return self.stored(leaf, scores)
