"""A weight whose rows are few different ones."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress import compat
from jaxcompress.arrays.base import (
    CompressedArray,
    cast,
    dot_general,
    is_compressed,
    materialize,
    register_array,
    register_rule,
)
from jaxcompress.arrays.deferred import deferred_primitive
from jaxcompress.arrays.rows import plain_rows
from jaxcompress.errors import SpecError


@register_array(
    "row_shared",
    children=("rows", "index"),
    static=("axis", "zero"),
    trainable=("rows",),
    inner=("rows",),
)
class RowSharedArray(CompressedArray):
    """`w[i] = rows[index[i]]` along one axis: k different rows (or slices) stand for m.

    With `zero`, index 0 is a row of exact zeros that is not stored and never trained, and index j
    is `rows[j - 1]`; so a row that was pruned stays zero.

    A contraction over that axis alone adds up the inputs that share a row first, and then is k/m of
    the product: `x @ w = segment_sum(x, index) @ rows`. The sums are taken in float32 and rounded
    to the dtype of the inputs, so the outcome agrees with that of the dense array to rounding, not
    bit for bit. Any other contraction runs dense, in one deferred product. Rows that are looked up
    are looked up twice.

    The rows are trainable; the gradient of one is the sum over the places that share it. The leaf
    is its own storage form.

    Attributes:
      rows: the weight's shape but for `axis`, which has k; an array or a leaf.
      index: unsigned or int32, `[*batch, m]`, the row of each place; a `PackedArray` in few bits.
      axis: the axis along which rows are shared, negative. Axes of a stack come before all others.
      zero: whether index 0 means zeros.

    References:
      Zhang, Wang, Figueiredo and Balzano, *Learning to Share: Simultaneous Parameter Tying and
      Sparsification in Deep Learning*, 2018.

    Examples:
      >>> import jax.numpy as jnp
      >>> leaf = RowSharedArray.of(jnp.array([[1.0, 2.0]]), jnp.array([1, 0, 1]), zero=True)
      >>> leaf, leaf.materialize().tolist()
      (RowSharedArray(float32[3, 2], 1 of 3 rows), [[1.0, 2.0], [0.0, 0.0], [1.0, 2.0]])
    """

    rows: Any
    index: Any
    axis: int
    zero: bool

    # A later spec of a chain is told the leaf's own axes.
    grids: ClassVar[tuple[str, ...]] = ("rows",)

    @classmethod
    def of(cls, rows: Any, index: Any, *, axis: int | None = None, zero: bool = False) -> Any:
        """The leaf of rows and the row of each place; the first axis after those of a stack.

        Raises:
          SpecError: for an index that does not fit the rows.
        """
        batch = index.ndim - 1
        axis = batch - rows.ndim if axis is None else axis
        fits = (
            batch >= 0
            and -rows.ndim <= axis < 0
            and rows.ndim + axis >= batch
            and tuple(rows.shape[:batch]) == tuple(index.shape[:batch])
            and jnp.issubdtype(index.dtype, jnp.integer)
        )
        if not fits:
            raise SpecError(
                f"rows {tuple(rows.shape)} and an index {index.dtype}{list(index.shape)} at axis "
                f"{axis} do not meet: write an integer index [*batch, m] and a negative axis"
            )
        return cls(rows, index, axis, bool(zero))

    @property
    def batch_ndim(self) -> int:
        return self.index.ndim - 1

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.rows.shape)
        shape[self.axis] = self.index.shape[-1]
        return tuple(shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.rows.dtype)

    @property
    def kinds(self) -> int:
        """The number of different rows that are stored, k."""
        return int(self.rows.shape[self.axis])

    def materialize(self, key: jax.Array | None = None) -> jax.Array:
        rows = materialize(self.rows)
        # The transpose of the look-up sums in float32.
        wide = rows.astype(np.float32) if rows.dtype.itemsize < 4 else rows
        axis = self.axis

        def one(rows: jax.Array, index: jax.Array) -> jax.Array:
            return jnp.moveaxis(_taken(jnp.moveaxis(rows, axis, 0), index, self.zero), 0, axis)

        for _ in range(self.batch_ndim):
            one = jax.vmap(one)
        return one(wide, materialize(self.index)).astype(rows.dtype)

    def astype(self, dtype: Any) -> CompressedArray | None:
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        return self.replace(rows=cast(self.rows, dtype))

    def describe(self) -> str:
        inner = f" of {self.rows.describe()}" if is_compressed(self.rows) else ""
        return f"{self.kinds} of {self.index.shape[-1]} rows{inner}"


def _taken(rows: jax.Array, index: jax.Array, zero: bool) -> jax.Array:
    """`rows[index]` along the first axis, or zeros for index 0."""
    index = index.astype(jnp.int32)
    if not rows.shape[0]:
        return jnp.zeros((*index.shape, *rows.shape[1:]), rows.dtype)
    if not zero:
        return compat.look_up(rows, index)
    kept = (index > 0).reshape(*index.shape, *(1,) * (rows.ndim - 1))
    found = compat.look_up(rows, jnp.maximum(index - 1, 0))
    return jnp.where(kept, found, jnp.zeros((), rows.dtype))


@register_rule(RowSharedArray, "dot_general")
def _dot_general(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    """Inputs that share a row are added first."""
    leaf, x = operands[i], operands[1 - i]
    contract, batch = params["dimension_numbers"]
    shared = leaf.ndim + leaf.axis
    thin = (
        tuple(contract[i]) == (shared,)
        and tuple(batch[i]) == tuple(range(leaf.batch_ndim))
        and 0 < leaf.kinds < leaf.index.shape[-1]
        # A sum of inputs may be more than float16 holds where the product is not.
        and jnp.issubdtype(x.dtype, jnp.floating)
        and x.dtype != jnp.float16
        and params.get("out_sharding") is None
    )
    if not thin:
        return deferred_primitive(lax.dot_general_p, i, leaf, operands, params)
    summed = _summed(x, leaf, contract[1 - i][0], tuple(batch[1 - i]))
    lhs, rhs = (leaf.rows, summed) if i == 0 else (summed, leaf.rows)
    return dot_general(lhs, rhs, params)


def _summed(x: jax.Array, leaf: RowSharedArray, axis: int, batch: tuple[int, ...]) -> jax.Array:
    """The sums of the inputs of each row, along the axis of the inputs."""
    count = leaf.kinds + leaf.zero
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def one(x: jax.Array, index: jax.Array) -> jax.Array:
        zeros = jnp.zeros((count, *x.shape[1:]), wide)
        out = zeros.at[index.astype(jnp.int32)].add(x.astype(wide), mode="promise_in_bounds")
        return out[leaf.zero :].astype(x.dtype)

    for _ in batch:
        one = jax.vmap(one)
    moved = jnp.moveaxis(x, (*batch, axis), range(len(batch) + 1))
    out = one(moved, materialize(leaf.index))
    return jnp.moveaxis(out, range(len(batch) + 1), (*batch, axis))


@register_rule(RowSharedArray, "transpose")
def _transpose(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    leaf, order = operands[i], tuple(params["permutation"])
    batch = leaf.batch_ndim
    if order[:batch] != tuple(range(batch)) or is_compressed(leaf.rows):
        return NotImplemented
    rows = lax.transpose(leaf.rows, order)
    return leaf.replace(rows=rows, axis=order.index(leaf.ndim + leaf.axis) - leaf.ndim)


@register_rule(RowSharedArray, "gather")
def _gather(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    """Rows of a table: the number of each, then the row itself."""
    leaf = operands[0]
    if i != 0 or leaf.axis != -leaf.ndim:
        return NotImplemented
    found = plain_rows(leaf, operands, params)
    if found is None:
        return NotImplemented
    index = compat.look_up(materialize(leaf.index), found.number)
    rows = materialize(leaf.rows)
    wide = rows.astype(np.float32) if rows.dtype.itemsize < 4 else rows
    return found.filled(_taken(wide, index, leaf.zero).astype(rows.dtype))
