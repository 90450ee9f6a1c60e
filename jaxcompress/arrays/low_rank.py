"""Low-rank arrays: two thin factors in place of one matrix."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxcompress.arrays.base import (
    CompressedArray,
    cast,
    conv_general_dilated,
    dot_general,
    fit_sharding,
    gather_rows,
    is_compressed,
    materialize,
    register_array,
    register_rule,
    try_rules,
)
from jaxcompress.errors import SpecError


@register_array(
    "low_rank",
    children=("left", "right"),
    static=("left_ndim", "right_ndim"),
    trainable=("left", "right"),
    inner=("left", "right"),
)
class LowRankArray(CompressedArray):
    """`W = left @ right`: the last axis of `left` and the first of `right` are the rank.

    `left` is `[*batch, *first, r]` and `right` is `[*batch, r, *last]`; the dense array is
    `[*batch, *first, *last]`. A contraction over axes of `first` runs as two thin ones, and so
    does one over axes of `last`, and a convolution whose output features are `last` runs as one
    with r features and a 1x1 after it.

    Attributes:
      left: the factor with the first axes; an array or a leaf.
      right: the factor with the last axes; an array or a leaf.
      left_ndim: the number of `first` axes.
      right_ndim: the number of `last` axes.

    References:
      Denton et al., *Exploiting Linear Structure Within Convolutional Networks*, 2014.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> leaf = jc.LowRankArray.of(jnp.ones((4, 2)), jnp.ones((2, 3)))
      >>> leaf.shape, leaf.rank, float(leaf.materialize()[0, 0])
      ((4, 3), 2, 2.0)
    """

    left: Any
    right: Any
    left_ndim: int
    right_ndim: int

    @classmethod
    def of(cls, left: Any, right: Any, *, left_ndim: int = 1, right_ndim: int = 1) -> LowRankArray:
        """The leaf of two factors; checks that their ranks agree."""
        batch = left.ndim - left_ndim - 1
        agree = (
            batch >= 0
            and right.ndim == batch + 1 + right_ndim
            and left.shape[-1] == right.shape[batch]
            and left.shape[:batch] == right.shape[:batch]
        )
        if not agree:
            raise SpecError(
                f"factors {left.shape} and {right.shape} do not meet in one rank: write left as "
                "[*batch, *first, r] and right as [*batch, r, *last]"
            )
        return cls(left, right, left_ndim, right_ndim)

    @property
    def batch_ndim(self) -> int:
        return self.left.ndim - 1 - self.left_ndim

    @property
    def rank(self) -> int:
        """The inner dimension r."""
        return self.left.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.left.shape[:-1], *self.right.shape[self.batch_ndim + 1 :])

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.left.dtype)

    def materialize(self, key: jax.Array | None = None) -> jax.Array:
        batch = tuple(range(self.batch_ndim))
        numbers = (((self.left.ndim - 1,), (self.batch_ndim,)), (batch, batch))
        return lax.dot_general(
            materialize(self.left),
            materialize(self.right),
            numbers,
            precision=lax.Precision.HIGHEST,
        )

    def astype(self, dtype: Any) -> CompressedArray | None:
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        return self.replace(left=cast(self.left, dtype), right=cast(self.right, dtype))

    def shardings(self, sharding: NamedSharding) -> Any:
        spec = (*sharding.spec, *([None] * (self.ndim - len(sharding.spec))))
        batch, first = self.batch_ndim, self.batch_ndim + self.left_ndim

        def place(child: Any, *axes: Any) -> Any:
            split = NamedSharding(sharding.mesh, PartitionSpec(*axes))
            if is_compressed(child):
                return child.shardings(split)
            return fit_sharding(split, child.shape, child.shape)

        return self.replace(
            left=place(self.left, *spec[:first], None),
            right=place(self.right, *spec[:batch], None, *spec[first:]),
        )

    def describe(self) -> str:
        kinds = {c.describe() for c in (self.left, self.right) if is_compressed(c)}
        return f"rank {self.rank}" + (f" of {' and '.join(sorted(kinds))}" if kinds else "")


def _numbers(contract: tuple, batch: tuple) -> dict[str, Any]:
    return {"dimension_numbers": (contract, batch)}


@register_rule(LowRankArray, "dot_general")
def _dot_general(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    """Two thin contractions, when all contracted axes belong to one factor."""
    leaf, x = operands[i], operands[1 - i]
    contract, batch = params["dimension_numbers"]
    leaf_contract, x_contract = tuple(contract[i]), tuple(contract[1 - i])
    leaf_batch, x_batch = tuple(batch[i]), tuple(batch[1 - i])
    b, first = leaf.batch_ndim, leaf.batch_ndim + leaf.left_ndim
    if sorted(leaf_batch) != list(range(b)) or not leaf_contract:
        return NotImplemented
    on_left = all(a < first for a in leaf_contract)
    on_right = all(a >= first for a in leaf_contract)
    if not (on_left or on_right) or params.get("out_sharding") is not None:
        return NotImplemented

    near, far = (leaf.left, leaf.right) if on_left else (leaf.right, leaf.left)
    # In `right` the rank comes before the last axes, so those keep their place in the dense array
    # less the first axes, plus one.
    shift = 0 if on_left else 1 - leaf.left_ndim
    near_contract = tuple(a + shift for a in leaf_contract)
    t = dot_general(
        x,
        near,
        dict(params, **_numbers((x_contract, near_contract), (x_batch, leaf_batch))),
    )
    # t is [batch, free axes of x, free axes of `near`], the rank last for left, first for right.
    x_free = x.ndim - len(x_contract) - b
    rank_axis = t.ndim - 1 if on_left else b + x_free
    far_rank = b if on_left else far.ndim - 1
    # As wide as the operands are together: x may be integers, or narrower than the factors.
    wide = jnp.promote_types(x.dtype, leaf.dtype)
    out = dot_general(
        t if t.dtype == wide else t.astype(wide),
        far,
        dict(params, **_numbers(((rank_axis,), (far_rank,)), (tuple(range(b)), leaf_batch))),
    )
    # out is [batch, x free, near free, far free]; the dense result has the first axes before the
    # last ones, and the leaf's axes before those of x where the leaf is the left operand.
    near_free = leaf.ndim - b - len(leaf_contract) - (far.ndim - b - 1)
    if on_right:
        out = jnp.moveaxis(
            out,
            range(b + x_free, b + x_free + near_free),
            range(out.ndim - near_free, out.ndim),
        )
    if i == 0:
        out = jnp.moveaxis(out, range(b, b + x_free), range(out.ndim - x_free, out.ndim))
    return out


@register_rule(LowRankArray, "conv_general_dilated")
def _conv(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    """A convolution with r output features, then a pointwise one."""
    leaf, x = operands[i], operands[0]
    numbers = params["dimension_numbers"]
    fits = (
        i == 1
        and leaf.batch_ndim == 0
        and leaf.right_ndim == 1
        and numbers.rhs_spec[0] == leaf.ndim - 1
        and params["feature_group_count"] == 1
        and params["batch_group_count"] == 1
    )
    if not fits:
        return NotImplemented
    t = conv_general_dilated(x, leaf.left, params)
    feature = numbers.out_spec[1]
    out = dot_general(
        cast(t, x.dtype),
        leaf.right,
        {
            **_numbers(((feature,), (0,)), ((), ())),
            "out_sharding": None,
            "precision": params["precision"],
            "preferred_element_type": params["preferred_element_type"],
        },
    )
    return jnp.moveaxis(out, -1, feature)


@register_rule(LowRankArray, "transpose")
def _transpose(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    """Kept where batch axes stay in front and the two groups stay whole, perhaps swapped."""
    leaf, permutation = operands[i], params["permutation"]
    b, n = leaf.batch_ndim, leaf.ndim
    first = b + leaf.left_ndim
    if sorted(permutation[:b]) != list(range(b)):
        return NotImplemented
    head = tuple(permutation[:b])
    as_is = all(b <= p < first for p in permutation[b:first])
    swapped = all(p >= first for p in permutation[b : b + leaf.right_ndim])
    if as_is:
        left = _permuted(leaf.left, (*head, *permutation[b:first], first))
        right = _permuted(
            leaf.right, (*head, b, *(p - leaf.left_ndim + 1 for p in permutation[first:]))
        )
        return LowRankArray(left, right, leaf.left_ndim, leaf.right_ndim)
    if swapped:
        middle = b + leaf.right_ndim
        left = _permuted(
            leaf.right, (*head, *(p - leaf.left_ndim + 1 for p in permutation[b:middle]), b)
        )
        right = _permuted(leaf.left, (*head, first, *permutation[middle:n]))
        return LowRankArray(left, right, leaf.right_ndim, leaf.left_ndim)
    return NotImplemented


def _permuted(x: Any, permutation: tuple[int, ...]) -> Any:
    """A transpose of an array or of a leaf that can take it."""
    if is_compressed(x):
        out = try_rules("transpose", (x,), {"permutation": permutation})
        if out is not NotImplemented:
            return out
    return lax.transpose(materialize(x), permutation)


@register_rule(LowRankArray, "gather")
def _gather(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    """Rows of a table: rows of the left factor, then the right one."""
    leaf, numbers, sizes = operands[0], params["dimension_numbers"], params["slice_sizes"]
    batch = operands[1].ndim - 1
    plain = (
        i == 0
        and leaf.batch_ndim == 0
        and leaf.left_ndim == 1
        and not numbers.operand_batching_dims
        and tuple(numbers.start_index_map) == tuple(numbers.collapsed_slice_dims) == (0,)
        and tuple(sizes[1:]) == leaf.shape[1:]
        and tuple(numbers.offset_dims) == tuple(range(batch, batch + leaf.ndim - 1))
        and params["fill_value"] is None
    )
    if not plain:
        return NotImplemented
    inner = dict(
        params,
        slice_sizes=(1, leaf.rank),
        dimension_numbers=lax.GatherDimensionNumbers((batch,), (0,), (0,)),
    )
    rows = gather_rows(leaf.left, operands[1:], inner)
    return dot_general(
        rows,
        leaf.right,
        {
            **_numbers(((batch,), (0,)), ((), ())),
            "out_sharding": None,
            "precision": None,
            "preferred_element_type": leaf.dtype,
        },
    )
