"""Leaves whose children lie on the axes of the dense array: what moves through a transpose.

`PackedArray`, `QuantizedArray` and `CodebookArray` hold one value (or some bits) for each dense
value, in its place. So a transpose, a slice, a new axis of size one or a gather of rows applies to
the children directly, as long as it leaves the packed axis whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import lax

from jaxcompress.arrays.base import CompressedArray, materialize, register_rule


class GridArray(CompressedArray):
    """A leaf whose `grids` have the dense array's axes.

    Along each axis a grid is whole, or has size one (a shared scale), or is packed or grouped:
    `axis` (negative) is the one axis that must not be cut.
    """

    grids: ClassVar[tuple[str, ...]] = ()
    axis: int

    @property
    def _whole_axis(self) -> int:
        return self.axis + self.ndim

    @property
    def batch_ndim(self) -> int:
        """Leading axes, before the packed one, along which every grid is whole."""
        shape, n = self.shape, self._whole_axis
        for name in self.grids:
            child = getattr(self, name)
            if child is not None:
                n = min(n, next((i for i in range(n) if child.shape[i] != shape[i]), n))
            if isinstance(child, GridArray):
                n = min(n, child.batch_ndim)
        return n

    def on_grids(self, fn: Callable[[Any], Any], axis: int | None = None) -> Any:
        """The same leaf with `fn` applied to each grid, and perhaps the packed axis elsewhere."""
        changes: dict[str, Any] = {}
        for name in self.grids:
            child = getattr(self, name)
            if child is not None:
                changes[name] = fn(child)
        return self.replace(**changes, **({} if axis is None else {"axis": axis}))

    def transposed(self, permutation: Sequence[int]) -> Any:
        """The leaf with its axes permuted."""
        permutation = tuple(permutation)

        def one(child: Any) -> Any:
            if isinstance(child, GridArray):
                return child.transposed(permutation)
            return lax.transpose(child, permutation)

        return self.on_grids(one, permutation.index(self._whole_axis) - self.ndim)

    def reindexed(self, sources: Sequence[int | None]) -> Any:
        """The leaf with axes of size one dropped or added; `sources[i]` is new axis i's old one."""
        sources = tuple(sources)

        def one(child: Any) -> Any:
            if isinstance(child, GridArray):
                return child.reindexed(sources)
            return child.reshape(tuple(1 if s is None else child.shape[s] for s in sources))

        return self.on_grids(one, sources.index(self._whole_axis) - len(sources))

    def sliced(self, cut: Callable[[Any, tuple[bool, ...]], Any]) -> Any:
        """The leaf with `cut(grid, whole_axes)` applied to each array among its grids.

        `whole_axes[i]` says whether the grid has the full length of axis i; where it does not
        (a scale shared along the axis), there is nothing to cut.
        """
        shape = self.shape

        def one(child: Any) -> Any:
            if isinstance(child, GridArray):
                return child.sliced(cut)
            return cut(child, tuple(child.shape[i] == n and n != 1 for i, n in enumerate(shape)))

        return self.on_grids(one)

    def cuts(self, axes: Sequence[int]) -> bool:
        """Whether the leaf can be cut along all of `axes`."""
        children = (getattr(self, name) for name in self.grids)
        inner = all(child.cuts(axes) for child in children if isinstance(child, GridArray))
        return self._whole_axis not in axes and inner


class TableArray(GridArray):
    """A grid of indices into tables, one or more for each weight of a stack.

    The leading axes choose the table, and rows of indices must stay together with it.
    """

    def cuts(self, axes: Any) -> bool:
        return super().cuts(axes) and all(a >= self.batch_ndim for a in axes)

    def transposed(self, permutation: Any) -> Any:
        batch = self.batch_ndim
        if tuple(permutation[:batch]) != tuple(range(batch)):
            return NotImplemented
        return super().transposed(permutation)

    def reindexed(self, sources: Any) -> Any:
        return NotImplemented if self.batch_ndim else super().reindexed(sources)


@register_rule(GridArray, "transpose")
def _transpose(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    return operands[i].transposed(params["permutation"])


def _unit_sources(leaf: GridArray, shape: Sequence[int]) -> tuple[int | None, ...] | None:
    """How `shape` comes from the leaf's by dropping and adding axes of size one, or None."""
    sources: list[int | None] = []
    old = [i for i, n in enumerate(leaf.shape) if n != 1 or i == leaf.axis + leaf.ndim]
    keep = list(old)
    for n in shape:
        if keep and n == leaf.shape[keep[0]]:
            sources.append(keep.pop(0))
        elif n == 1:
            sources.append(None)
        else:
            return None
    return None if keep else tuple(sources)


@register_rule(GridArray, "reshape")
def _reshape(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    leaf = operands[i]
    if params.get("dimensions") is not None:
        return NotImplemented
    sources = _unit_sources(leaf, params["new_sizes"])
    return NotImplemented if sources is None else leaf.reindexed(sources)


@register_rule(GridArray, "squeeze")
def _squeeze(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    leaf = operands[i]
    if not leaf.cuts(params["dimensions"]):
        return NotImplemented
    return leaf.reindexed([a for a in range(leaf.ndim) if a not in params["dimensions"]])


@register_rule(GridArray, "broadcast_in_dim")
def _broadcast_in_dim(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    leaf, shape = operands[i], params["shape"]
    where = {new: old for old, new in enumerate(params["broadcast_dimensions"])}
    for new, n in enumerate(shape):
        if n != (leaf.shape[where[new]] if new in where else 1):
            return NotImplemented  # a real broadcast: the values are no longer stored once
    return leaf.reindexed([where.get(new) for new in range(len(shape))])


@register_rule(GridArray, "slice")
def _slice(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    leaf = operands[i]
    start, limit = params["start_indices"], params["limit_indices"]
    strides = params["strides"] or (1,) * leaf.ndim
    cut_axes = [
        a for a, n in enumerate(leaf.shape) if (start[a], limit[a], strides[a]) != (0, n, 1)
    ]
    if not leaf.cuts(cut_axes):
        return NotImplemented

    def cut(grid: Any, whole: tuple[bool, ...]) -> Any:
        cutting = [a in cut_axes and whole[a] for a in range(leaf.ndim)]
        return lax.slice(
            grid,
            [start[a] if c else 0 for a, c in enumerate(cutting)],
            [limit[a] if c else grid.shape[a] for a, c in enumerate(cutting)],
            [strides[a] if c else 1 for a, c in enumerate(cutting)],
        )

    return _checked(leaf.sliced(cut), [-(-(b - a) // s) for a, b, s in zip(start, limit, strides)])


@register_rule(GridArray, "dynamic_slice")
def _dynamic_slice(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    leaf, starts, sizes = operands[0], operands[1:], params["slice_sizes"]
    if i != 0:
        return NotImplemented
    cut_axes = [a for a, n in enumerate(leaf.shape) if sizes[a] != n]
    if not leaf.cuts(cut_axes):
        return NotImplemented

    def cut(grid: Any, whole: tuple[bool, ...]) -> Any:
        cutting = [a in cut_axes and whole[a] for a in range(leaf.ndim)]
        return lax.dynamic_slice(
            grid,
            [s if c else jnp.zeros_like(s) for s, c in zip(starts, cutting)],
            [sizes[a] if c else grid.shape[a] for a, c in enumerate(cutting)],
        )

    return _checked(leaf.sliced(cut), sizes)


def _checked(leaf: GridArray, shape: Sequence[int]) -> Any:
    """The leaf, if it has the expected shape; an axis all of whose grids are shared has not."""
    return leaf if leaf.shape == tuple(shape) else NotImplemented


@register_rule(GridArray, "gather")
def _gather(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    """Whole rows of a table: the children's rows are gathered, and only those materialized."""
    leaf, numbers, sizes = operands[0], params["dimension_numbers"], params["slice_sizes"]
    if i != 0 or numbers.operand_batching_dims:
        return NotImplemented
    indexed = numbers.start_index_map
    if tuple(numbers.collapsed_slice_dims) != tuple(indexed) or not leaf.cuts(indexed):
        return NotImplemented
    if any(sizes[a] != n for a, n in enumerate(leaf.shape) if a not in indexed):
        return NotImplemented
    mode = lax.GatherScatterMode.from_any(params["mode"])
    fills = mode == lax.GatherScatterMode.FILL_OR_DROP
    inner = dict(params, mode=lax.GatherScatterMode.CLIP if fills else mode)

    def cut(grid: Any, whole: tuple[bool, ...]) -> Any:
        starts = operands[1]
        for column, a in enumerate(indexed):
            if not whole[a]:  # shared along the indexed axis: every row is row zero
                starts = starts.at[..., column].set(0)
        slices = tuple(1 if a in indexed else n for a, n in enumerate(grid.shape))
        rows = lax.gather_p.bind(grid, starts, **dict(inner, slice_sizes=slices, fill_value=None))
        # The children keep the table's axes, so put back the ones that the gather collapsed.
        batch = operands[1].ndim - 1
        rows = jnp.moveaxis(rows, numbers.offset_dims, range(batch, rows.ndim))
        return jnp.expand_dims(rows, tuple(batch + a for a in indexed))

    rows = materialize(leaf.sliced(cut))
    batch = operands[1].ndim - 1
    rows = jnp.squeeze(rows, tuple(batch + a for a in indexed))
    rows = jnp.moveaxis(rows, range(batch, rows.ndim), numbers.offset_dims)
    if fills:  # an index out of bounds reads the fill value, as it does from the dense table
        outside = lax.gather_p.bind(
            jnp.zeros(leaf.shape, bool), operands[1], **dict(params, fill_value=True)
        )
        fill = params["fill_value"]
        rows = jnp.where(outside, jnp.nan if fill is None else fill, rows).astype(leaf.dtype)
    return rows
