"""`Prune`: remove the weights of least score, and store the rest."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.arrays.sparse import SparseArray, best_layout, encode
from jaxcompress.errors import SpecError, ValuesNeededError
from jaxcompress.pruning.patterns import parse_pattern
from jaxcompress.pruning.select import kept_count, n_of_m_mask, top_mask
from jaxcompress.specs import LeafContext, Plan, Spec, register_spec

SCORES = ("magnitude",)


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
      pattern: None for any place, or `"n:m"`: n of each m consecutive weights along the last
        input axis stay, where `n/m = 1 - sparsity`.
      score: `magnitude`, `|w|`.

    Raises:
      SpecError: for a sparsity outside of 0 to 1, an unknown score, or a pattern that says
        another sparsity; for None inside of jit, where zeros cannot be counted.

    References:
      Han et al., *Learning both Weights and Connections for Efficient Neural Networks*, 2015;
      Mishra et al., *Accelerating Sparse Deep Neural Networks*, 2021 (n:m).

    Example:
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
        if self.pattern is not None and self.sparsity is not None:
            n, m = parse_pattern(self.pattern)
            if not math.isclose(1 - n / m, self.sparsity, abs_tol=1e-6):
                raise SpecError(
                    f"pattern {self.pattern!r} removes {1 - n / m:g} of the weights, not "
                    f"{self.sparsity:g}: write Prune({1 - n / m:g}, pattern={self.pattern!r})"
                )

    def plan(self, leaf: Any, context: LeafContext) -> Plan:
        """Counts what stays and, for a concrete leaf, picks the smaller layout of the index."""
        if leaf.ndim == 0:
            raise SpecError(f"{context.path}: a scalar cannot be pruned; leave it dense")
        batch = context.axes.batch_ndim(leaf.ndim)
        axis = max(context.axes.input)
        if self.sparsity is None:
            kept = _nonzeros(leaf, batch, context)
        elif self.pattern is None:
            kept = kept_count(math.prod(leaf.shape[batch:]), self.sparsity)
        else:
            n, m = parse_pattern(self.pattern)
            full, rest = divmod(leaf.shape[axis], m)
            rows = math.prod(leaf.shape[batch:]) // max(1, leaf.shape[axis])
            kept = rows * (full * n + min(n, rest))
        size = math.prod(leaf.shape[batch:])
        layout = ("bitmask", 1, size)
        # A bit mask is smaller than gaps of 2 bits and up unless fewer than half the weights stay.
        if 2 * kept < size and self.pattern is None and not isinstance(leaf, jax.core.Tracer):
            layout = best_layout(_mask(self, leaf, kept, axis, batch), kept, batch)
        return _PrunePlan(self, kept, axis, batch, layout)


def _nonzeros(leaf: Any, batch_ndim: int, context: LeafContext) -> int:
    """The most nonzero values that one weight of a stack has."""
    if isinstance(leaf, jax.core.Tracer):
        raise ValuesNeededError(
            f"{context.path}: Prune() counts the zeros of a concrete array; call it outside of "
            "jit, or write a sparsity"
        )
    counts = jnp.sum(leaf != 0, axis=tuple(range(batch_ndim, leaf.ndim)), dtype=jnp.uint32)
    return int(jnp.max(counts, initial=0))


@functools.partial(jax.jit, static_argnums=(0, 2, 3, 4))
def _mask(spec: Prune, leaf: jax.Array, kept: int, axis: int, batch: int) -> jax.Array:
    scores = jnp.abs(leaf)
    if spec.pattern is not None:
        return n_of_m_mask(scores, *parse_pattern(spec.pattern), axis)
    select = functools.partial(top_mask, k=kept)
    for _ in range(batch):
        select = jax.vmap(select)
    return select(scores)


@dataclasses.dataclass(frozen=True)
class _PrunePlan(Plan):
    spec: Prune
    kept: int
    axis: int
    batch_ndim: int
    layout: tuple[str, int, int]

    def apply(self, leaf: jax.Array, key: jax.Array | None) -> SparseArray:
        mask = _mask(self.spec, leaf, self.kept, self.axis, self.batch_ndim)
        return encode(leaf, mask, self.kept, self.layout, self.batch_ndim)
