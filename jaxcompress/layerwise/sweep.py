"""The pass over the rows of a layer, block by block, in loops that are compiled once for any K."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.layerwise.rounding import Rounding, Scales


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is done with each row.

    Attributes:
      block: rows in a block; a multiple of `span` and of the rows that share scales.
      rounding: how rows are stored.
      span: rows among which weights are chosen at once.
      choose: which weights of a span stay, from their scores `[span, N]` (-1 where a row is not
        real) and the count of the block; hashable. None: all do.
    """

    block: int
    rounding: Rounding
    span: int = 1
    choose: Callable[[jax.Array, jax.Array], jax.Array] | None = None


def sweep(
    x: jax.Array, factor: jax.Array, real: jax.Array, counts: jax.Array, how: Sweep
) -> tuple[jax.Array, jax.Array, Any, Scales]:
    """Prunes and rounds the rows of `[K, N]` in turn, later rows making up for each.

    Args:
      x: float32 `[K, N]`, whole blocks.
      factor: upper triangular U of `U' U = H^-1`, `[K, K]`.
      real: which rows are real, bool `[K]`; no other is counted.
      counts: how many weights of each block stay, int32, for `how.choose`.
      how: what is done.

    Returns:
      The values as they are stored, float32, their mask, their codes or None, and the scales of
      each row.
    """
    size, scales = how.block, how.rounding.scales(x)
    empty = _Rows.like(x, how.rounding, scales)

    def block(b: Any, state: Any) -> Any:
        x, done = state
        start = b * size
        rows = lax.dynamic_slice_in_dim(factor, start, size)
        inner = lax.dynamic_slice_in_dim(rows, start, size, axis=1)
        taken = lax.dynamic_slice_in_dim(x, start, size)
        exists = lax.dynamic_slice_in_dim(real, start, size)
        errors, found = _sweep_block(taken, inner, exists, counts[b], scales, how)
        # All blocks behind at once; the factor is zero before this block.
        behind = jnp.where(jnp.arange(x.shape[0]) >= start + size, rows, 0.0)
        x = x - jnp.matmul(behind.T, errors, precision=lax.Precision.HIGHEST)
        put = lambda all, some: lax.dynamic_update_slice_in_dim(all, some, start, axis=0)
        return x, jax.tree.map(put, done, found)

    _, done = lax.fori_loop(0, x.shape[0] // size, block, (x, empty))
    return done.values, done.mask, done.codes, done.scales


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Rows:
    """Rows that are done.

    Attributes:
      values: as they are stored, float32 `[rows, N]`.
      mask: which of them stay.
      codes: integer codes, or None.
      scales: those of each row.
    """

    values: jax.Array
    mask: jax.Array
    codes: Any
    scales: Scales

    @classmethod
    def like(cls, x: jax.Array, rounding: Rounding, scales: Scales) -> _Rows:
        codes = jax.eval_shape(lambda x: rounding.store(x[0], x[0] > 0, rounding.scales(x))[1], x)
        wide = lambda y: jnp.zeros(x.shape, y.dtype)
        return cls(
            jnp.zeros_like(x),
            jnp.zeros(x.shape, bool),
            jax.tree.map(wide, codes),
            jax.tree.map(wide, scales),
        )


def _sweep_block(
    x: jax.Array, factor: jax.Array, real: jax.Array, count: jax.Array, scales: Scales, how: Sweep
) -> tuple[jax.Array, _Rows]:
    """One block: `(w_c - q_c) / U_cc` of each row, and what was made of it."""
    pivots, span = jnp.diagonal(factor), how.span
    index = jnp.arange(how.block)

    def choose(x: jax.Array, start: Any) -> jax.Array:
        """Which weights of the next rows stay, by |w_c| / U_cc; what is not real the last."""
        if how.choose is None:
            return jnp.ones((span, x.shape[1]), bool)
        rows, pivot, exists = (lax.dynamic_slice_in_dim(y, start, span) for y in (x, pivots, real))
        scores = jnp.where(exists[:, None], jnp.abs(rows) / pivot[:, None], -1.0)
        return how.choose(scores, count)

    def group_scales(x: jax.Array, i: Any, before: Scales) -> Scales:
        group = how.rounding.group
        if group is None:
            return before
        new = lambda: how.rounding.scales(lax.dynamic_slice_in_dim(x, i, group))
        return lax.cond(i % group == 0, new, lambda: before)

    def some(s: Any, state: Any) -> Any:
        start = s * span
        keep = choose(state[0], start)

        def row(r: Any, state: Any) -> Any:
            x, errors, done, scales = state
            i = start + r
            scales = group_scales(x, i, scales)
            old = lax.dynamic_index_in_dim(x, i, keepdims=False)
            kept = lax.dynamic_index_in_dim(keep, r, keepdims=False)
            new, codes = how.rounding.store(old, kept, scales)
            error = (old - new) / pivots[i]
            later = lax.dynamic_index_in_dim(factor, i, keepdims=False)
            x = x - jnp.where(index > i, later, 0.0)[:, None] * error
            found = _Rows(new, kept, codes, jax.tree.map(lambda y: y[0], scales))
            put = lambda all, one: lax.dynamic_update_index_in_dim(all, one, i, axis=0)
            return x, put(errors, error), jax.tree.map(put, done, found), scales

        return lax.fori_loop(0, span, row, state)

    state = (x, jnp.zeros_like(x), _Rows.like(x, how.rounding, scales), scales)
    _, errors, done, _ = lax.fori_loop(0, how.block // span, some, state)
    return errors, done
