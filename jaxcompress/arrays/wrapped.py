"""Leaves around another leaf of the same shape that act on what the weight meets.

`ScaledArray`, `RotatedArray` and `QuantizedInputArray` hold a weight, dense or a leaf itself, and
small factors beside it. A transpose, a slice or a new axis goes to the weight by its own rule; what
has none is done dense inside, so that the leaf around it stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress.arrays.base import (
    CompressedArray,
    cast,
    is_compressed,
    materialize,
    narrows,
    register_rule,
    try_rules,
)

Sources = Sequence[int | None]


class WrappedArray(CompressedArray):
    """A leaf whose child `weight` has its shape, with `factors` that broadcast to it.

    A factor has the weight's number of axes, each of full length or of size one.
    """

    factors: ClassVar[tuple[str, ...]] = ()
    # Children on the axes of the dense array: a later spec of a chain is told the leaf's own axes.
    grids: ClassVar[tuple[str, ...]] = ("weight",)

    weight: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.weight.dtype)

    @property
    def batch_ndim(self) -> int:
        shape = self.shape
        n = self.weight.batch_ndim if is_compressed(self.weight) else len(shape)
        for factor in self.each_factor():
            n = min(n, next((i for i in range(n) if factor.shape[i] != shape[i]), n))
        return n

    def each_factor(self) -> list[jax.Array]:
        """The factors that there are."""
        found = (getattr(self, name) for name in self.factors)
        return [factor for factor in found if factor is not None]

    def cuts(self, axes: Sequence[int]) -> bool:
        """Whether the leaf can be cut along all of `axes`."""
        return True

    def moved(self, weight: Any, fn: Callable[[Any], Any], sources: Sources | None) -> Any:
        """The leaf of another weight, with `fn` applied to each factor.

        `sources[i]` is the old axis of new axis i; None where axes were merged or split.
        """
        factors = {name: getattr(self, name) for name in self.factors}
        return self.replace(
            weight=weight, **{n: fn(x) for n, x in factors.items() if x is not None}
        )

    def astype(self, dtype: Any) -> CompressedArray | None:
        return self.replace(weight=cast(self.weight, dtype)) if narrows(self.dtype, dtype) else None

    def of_weight(self) -> str:
        """The weight's form, for tables; empty where it is dense."""
        return f" {self.weight.describe()}" if is_compressed(self.weight) else ""


def _on_weight(
    primitive: Any, leaf: WrappedArray, others: Sequence[Any], params: dict[str, Any]
) -> Any:
    """A primitive on the weight inside, by its own rule or dense."""
    if is_compressed(leaf.weight):
        out = try_rules(primitive.name, (leaf.weight, *others), params)
        if out is not NotImplemented:
            return out
    return primitive.bind(materialize(leaf.weight), *others, **params)


@register_rule(WrappedArray, "transpose")
def _transpose(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    leaf, order = operands[i], params["permutation"]
    weight = _on_weight(lax.transpose_p, leaf, (), params)
    return leaf.moved(weight, lambda x: lax.transpose(x, order), order)


def _unit_sources(leaf: WrappedArray, shape: Sequence[int]) -> Sources | None:
    """How `shape` comes from the leaf's by dropping and adding axes of size one, or None."""
    old = [a for a, n in enumerate(leaf.shape) if n != 1]
    if [leaf.shape[a] for a in old] != [n for n in shape if n != 1]:
        return None
    kept = iter(old)
    return [None if n == 1 else next(kept) for n in shape]


def _reindexed(leaf: WrappedArray, weight: Any, sources: Sources) -> Any:
    def one(x: jax.Array) -> jax.Array:
        return x.reshape(tuple(1 if s is None else x.shape[s] for s in sources))

    return leaf.moved(weight, one, sources)


@register_rule(WrappedArray, "reshape")
def _reshape(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    leaf, shape = operands[i], params["new_sizes"]
    if params.get("dimensions") is not None:
        return NotImplemented
    sources = _unit_sources(leaf, shape)
    if sources is not None and 0 not in leaf.shape:
        return _reindexed(leaf, _on_weight(lax.reshape_p, leaf, (), params), sources)
    if not leaf.cuts(range(leaf.ndim)) or any(x.size != 1 for x in leaf.each_factor()):
        return NotImplemented
    weight = _on_weight(lax.reshape_p, leaf, (), params)
    return leaf.moved(weight, lambda x: x.reshape((1,) * len(shape)), None)


@register_rule(WrappedArray, "squeeze")
def _squeeze(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    leaf, gone = operands[i], params["dimensions"]
    if not leaf.cuts(gone):
        return NotImplemented
    weight = _on_weight(lax.squeeze_p, leaf, (), params)
    return _reindexed(leaf, weight, [a for a in range(leaf.ndim) if a not in gone])


@register_rule(WrappedArray, "broadcast_in_dim")
def _broadcast_in_dim(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    leaf, shape = operands[i], params["shape"]
    where = {new: old for old, new in enumerate(params["broadcast_dimensions"])}
    for new, n in enumerate(shape):
        if n != (leaf.shape[where[new]] if new in where else 1):
            return NotImplemented  # a real broadcast: the values are no longer stored once
    weight = _on_weight(lax.broadcast_in_dim_p, leaf, (), params)
    return _reindexed(leaf, weight, [where.get(new) for new in range(len(shape))])


@register_rule(WrappedArray, "slice")
def _slice(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    leaf = operands[i]
    start, limit = params["start_indices"], params["limit_indices"]
    strides = params["strides"] or (1,) * leaf.ndim
    whole = [(start[a], limit[a], strides[a]) == (0, n, 1) for a, n in enumerate(leaf.shape)]
    if not leaf.cuts([a for a, w in enumerate(whole) if not w]):
        return NotImplemented

    def cut(x: jax.Array) -> jax.Array:
        shared = [x.shape[a] == 1 for a in range(leaf.ndim)]
        return lax.slice(
            x,
            [0 if s else start[a] for a, s in enumerate(shared)],
            [min(limit[a] - start[a], 1) if s else limit[a] for a, s in enumerate(shared)],
            [1 if s else strides[a] for a, s in enumerate(shared)],
        )

    return leaf.moved(_on_weight(lax.slice_p, leaf, (), params), cut, range(leaf.ndim))


@register_rule(WrappedArray, "dynamic_slice")
def _dynamic_slice(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    leaf, starts, sizes = operands[0], operands[1:], params["slice_sizes"]
    if i != 0 or not leaf.cuts([a for a, n in enumerate(leaf.shape) if sizes[a] != n]):
        return NotImplemented

    def cut(x: jax.Array) -> jax.Array:
        shared = [x.shape[a] == 1 for a in range(leaf.ndim)]
        return lax.dynamic_slice(
            x,
            [jnp.zeros_like(n) if s else n for n, s in zip(starts, shared)],
            [min(n, 1) if s else n for n, s in zip(sizes, shared)],
        )

    return leaf.moved(_on_weight(lax.dynamic_slice_p, leaf, starts, params), cut, range(leaf.ndim))


def at_operand(
    factor: jax.Array, i: int, operands: Sequence[Any], params: dict[str, Any]
) -> jax.Array | None:
    """A factor of the leaf, laid along the axes of the other operand of a `dot_general`.

    None where it varies along an axis that the other operand does not share.
    """
    contract, batch = params["dimension_numbers"]
    x = operands[1 - i]
    mine = dict(zip((*contract[i], *batch[i]), (*contract[1 - i], *batch[1 - i])))
    if any(n != 1 and a not in mine for a, n in enumerate(factor.shape)):
        return None
    pairs = sorted((there, a) for a, there in mine.items())
    order = [a for _, a in pairs]
    moved = lax.transpose(factor, [*order, *(a for a in range(factor.ndim) if a not in mine)])
    shape = [1] * x.ndim
    for there, a in pairs:
        shape[there] = factor.shape[a]
    return moved.reshape(shape)


def at_features(
    factor: jax.Array, i: int, operands: Sequence[Any], params: dict[str, Any]
) -> jax.Array | None:
    """A factor of a kernel, laid along the features of a convolution's input.

    None where it varies along anything but the kernel's input features.
    """
    numbers, x = params["dimension_numbers"], operands[0]
    axis = numbers.rhs_spec[1]
    others = any(n != 1 for a, n in enumerate(factor.shape) if a != axis)
    if i != 1 or others or params["batch_group_count"] != 1:
        return None
    groups = 1 if factor.size == 1 else params["feature_group_count"]
    shape = [1] * x.ndim
    shape[numbers.lhs_spec[1]] = factor.size * groups
    return jnp.tile(factor.reshape(-1), groups).reshape(shape)
