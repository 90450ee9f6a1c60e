"""The pass over the rows of a layer, block by block, in loops that are compiled once for any K."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress import compat
from jaxcompress.layerwise.ranges import Scales
from jaxcompress.layerwise.rounding import Rounding


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

    @property
    def piece(self) -> int:
        """Rows of a block that are updated one by one, the rest of it in one product after them.

        So that the rows that are written again and again stay in the nearest cache.
        """
        group = self.rounding.group or 1

        def fits(n: int) -> bool:
            spans = n % self.span == 0 or self.span == self.block
            return self.block % n == 0 and spans and (n % group == 0 or group % n == 0)

        return next((n for n in (32, 16, 64) if n < self.block and fits(n)), self.block)


class Fixed(NamedTuple):
    """Scales that were settled before: `[groups, N]`, and the group of each row, int32 `[K]`."""

    scales: Scales
    group: jax.Array


def sweep(
    x: jax.Array,
    factor: jax.Array,
    real: jax.Array,
    counts: jax.Array,
    how: Sweep,
    fixed: Fixed | None = None,
    exact: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, Any, Scales]:
    """Prunes and rounds the rows of `[K, N]` in turn, later rows making up for each.

    A weight that is exactly zero stays so, and later rows make up for what it would have become.

    Args:
      x: float32 `[K, N]`, whole blocks.
      factor: upper triangular U of `U' U = H^-1`, `[K, K]`.
      real: which rows are real, bool `[K]`; no other is counted.
      counts: how many weights of each block stay, int32, for `how.choose`.
      how: what is done.
      fixed: scales to use; None: those of the rows of a group when the first of them is reached.
      exact: bool `[K, N]`, weights that are stored beside the codes, as they are when their turn
        comes; their codes are zero. None: none.

    Returns:
      The values as they are stored, float32, their mask, their codes or None, and the scales of
      each row.
    """
    size, tall = how.block, x.shape[0]
    coded = x if exact is None else jnp.where(exact, 0.0, x)
    first = _first_scales(coded, factor, how, fixed)
    empty, given = _Rows.like(x, how.rounding, first, fixed), x != 0

    def block(b: Any, state: Any) -> Any:
        x, done = state
        start = b * size
        part = _Part(x, factor, real, given, exact, counts[b], first, fixed).cut(start, size)
        errors, found = _sweep_block(part, how)
        rows = lax.dynamic_slice_in_dim(factor, start, size)
        # All blocks behind at once; the factor is zero before this block.
        behind = jnp.where(jnp.arange(tall) >= start + size, rows, 0.0)
        x = x - jnp.matmul(behind.T, errors, precision=lax.Precision.HIGHEST)
        put = lambda all, some: lax.dynamic_update_slice_in_dim(all, some, start, axis=0)
        return x, jax.tree.map(put, done, found)

    _, done = lax.fori_loop(0, tall // size, block, (x, empty))
    return done.values, done.mask, done.codes, done.scales


def _first_scales(x: jax.Array, factor: jax.Array, how: Sweep, fixed: Fixed | None) -> Scales:
    """Those of all rows, which hold where there are no groups; in the shape of those of a group."""
    if fixed is not None:
        return jax.tree.map(lambda y: y[:1], fixed.scales)
    if how.rounding.group is None:
        return how.rounding.scales(x, jnp.diagonal(factor))
    return dataclasses.replace(how.rounding, tries=0).scales(x[:1], jnp.ones(1))


class _Part(NamedTuple):
    """What a block is given: rows of each, its part of the factor, and the scales to begin with."""

    x: jax.Array
    factor: jax.Array
    real: jax.Array
    given: jax.Array
    exact: jax.Array | None
    wanted: jax.Array
    scales: Scales
    fixed: Fixed | None

    def cut(self, start: Any, size: int) -> _Part:
        """Some of the rows."""
        some = lambda y: lax.dynamic_slice_in_dim(y, start, size)
        fixed = self.fixed and self.fixed._replace(group=some(self.fixed.group))
        factor = lax.dynamic_slice(self.factor, (start, start), (size, size))
        exact = None if self.exact is None else some(self.exact)
        x, real, given = some(self.x), some(self.real), some(self.given)
        return _Part(x, factor, real, given, exact, self.wanted, self.scales, fixed)


@functools.partial(compat.register_node, data=("values", "mask", "codes", "scales"))
@dataclasses.dataclass
class _Rows:
    """Rows that are done.

    Attributes:
      values: as they are stored, float32 `[rows, N]`.
      mask: which of them stay.
      codes: integer codes, or None.
      scales: those of each row; None where they were settled before.
    """

    values: jax.Array
    mask: jax.Array
    codes: Any
    scales: Scales

    @classmethod
    def like(cls, x: jax.Array, rounding: Rounding, scales: Scales, fixed: Any) -> _Rows:
        codes = jax.eval_shape(lambda x, s: rounding.store(x[0], x[0] > 0, s)[1], x, scales)
        wide = lambda y: jnp.zeros(x.shape, y.dtype)
        return cls(
            jnp.zeros_like(x),
            jnp.zeros(x.shape, bool),
            jax.tree.map(wide, codes),
            Scales() if fixed is not None else jax.tree.map(wide, scales),
        )


def _sweep_block(part: _Part, how: Sweep) -> tuple[jax.Array, _Rows]:
    """One block: `(w_c - q_c) / U_cc` of each row, and what was made of it."""
    size, group = how.piece, how.rounding.group
    if size == how.block:
        errors, done, _ = _sweep_rows(part, how)
        return errors, done
    index, inner, given = jnp.arange(how.block), dataclasses.replace(how, block=size), part.given
    if how.choose is not None and how.span == how.block:
        given, inner = _chosen(part, how, 0), dataclasses.replace(inner, span=1, choose=None)
    tall = group is not None and group > size and part.fixed is None
    if tall:
        inner = dataclasses.replace(inner, rounding=dataclasses.replace(how.rounding, group=None))

    def piece(p: Any, state: Any) -> Any:
        x, errors, done, scales = state
        start = p * size
        now = part._replace(x=x, given=given, scales=scales)
        if tall:
            now = now._replace(scales=_scales_at(now, how, start, scales))
        found_errors, found, scales = _sweep_rows(now.cut(start, size), inner)
        rows = lax.dynamic_slice_in_dim(part.factor, start, size)
        behind = jnp.where(index >= start + size, rows, 0.0)
        x = x - jnp.matmul(behind.T, found_errors, precision=lax.Precision.HIGHEST)
        put = lambda all, some: lax.dynamic_update_slice_in_dim(all, some, start, axis=0)
        return x, put(errors, found_errors), jax.tree.map(put, done, found), scales

    empty = _Rows.like(part.x, how.rounding, part.scales, part.fixed)
    state = (part.x, jnp.zeros_like(part.x), empty, part.scales)
    _, errors, done, _ = lax.fori_loop(0, how.block // size, piece, state)
    return errors, done


def _chosen(part: _Part, how: Sweep, start: Any) -> jax.Array:
    """Which weights of the next rows stay, by |w_c| / U_cc; what is not real the last."""
    cut = lambda y: lax.dynamic_slice_in_dim(y, start, how.span)
    if how.choose is None:
        return cut(part.given)
    scores = jnp.abs(cut(part.x)) / cut(jnp.diagonal(part.factor))[:, None]
    return how.choose(jnp.where(cut(part.real)[:, None], scores, -1.0), part.wanted)


def _scales_at(part: _Part, how: Sweep, i: Any, before: Scales) -> Scales:
    """The scales of row i, new ones where a group begins."""
    group = how.rounding.group
    if part.fixed is not None:
        mine = part.fixed.group[i]
        return jax.tree.map(lambda y: lax.dynamic_slice_in_dim(y, mine, 1), part.fixed.scales)
    if group is None:
        return before
    cut = lambda y: lax.dynamic_slice_in_dim(y, i, group)
    rows = lambda x: cut(x) if part.exact is None else jnp.where(cut(part.exact), 0.0, cut(x))
    new = lambda: how.rounding.scales(rows(part.x), cut(jnp.diagonal(part.factor)))
    return lax.cond(i % group == 0, new, lambda: before)


def _sweep_rows(part: _Part, how: Sweep) -> tuple[jax.Array, _Rows, Scales]:
    """Some rows, each of which updates those that follow; and the scales of the last."""
    pivots, index = jnp.diagonal(part.factor), jnp.arange(how.block)
    row_of = lambda y, i: lax.dynamic_index_in_dim(y, i, keepdims=False)

    def some(s: Any, state: Any) -> Any:
        start = s * how.span
        keep = _chosen(part._replace(x=state[0]), how, start)

        def row(r: Any, state: Any) -> Any:
            x, errors, done, scales = state
            i = start + r
            scales = _scales_at(part._replace(x=x), how, i, scales)
            old, kept = row_of(x, i), row_of(keep, r)
            if part.exact is None:
                new, codes = how.rounding.store(old, kept, scales)
            else:
                apart = row_of(part.exact, i)
                new, codes = how.rounding.store(old, kept & ~apart, scales)
                new = jnp.where(apart, how.rounding.cast(old), new)
            error = (old - new) / pivots[i]
            x = x - jnp.where(index > i, row_of(part.factor, i), 0.0)[:, None] * error
            stored = Scales() if part.fixed is not None else jax.tree.map(lambda y: y[0], scales)
            put = lambda all, one: lax.dynamic_update_index_in_dim(all, one, i, axis=0)
            found = _Rows(new, kept, codes, stored)
            return x, put(errors, error), jax.tree.map(put, done, found), scales

        return lax.fori_loop(0, how.span, row, state)

    empty = _Rows.like(part.x, how.rounding, part.scales, part.fixed)
    state = (part.x, jnp.zeros_like(part.x), empty, part.scales)
    _, errors, done, scales = lax.fori_loop(0, how.block // how.span, some, state)
    return errors, done, scales
