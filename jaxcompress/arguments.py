"""The arrays among the arguments of a function, and what is static."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxcompress import compat


def is_array(x: Any) -> bool:
    """Whether this is an array, or says what one is like."""
    return compat.is_traceable(x) or isinstance(x, jax.ShapeDtypeStruct)


def apart(
    tree: Any,
    traced: Callable[[Any], bool] = is_array,
    is_leaf: Callable[[Any], bool] | None = None,
) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The leaves of a tree that are traced, and what makes the tree again with others instead."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_leaf)
    there = [traced(x) for x in leaves]

    def full(arrays: Sequence[Any]) -> Any:
        it = iter(arrays)
        return jax.tree.unflatten(structure, [next(it) if t else x for t, x in zip(there, leaves)])

    return [x for t, x in zip(there, leaves) if t], full


def split_batch(batch: Any) -> tuple[list[Any], Any]:
    """The arrays of the arguments that a batch is, and what is static, with a hash."""
    leaves, tree = jax.tree.flatten(batch if isinstance(batch, tuple) else (batch,))
    traced = [compat.is_traceable(x) for x in leaves]
    arrays = [x for x, t in zip(leaves, traced) if t]
    return arrays, (tree, tuple(None if t else (x,) for x, t in zip(leaves, traced)))


def join_batch(arrays: list[Any], static: Any) -> tuple[Any, ...]:
    """The arguments again."""
    tree, fixed = static
    it = iter(arrays)
    return jax.tree.unflatten(tree, [next(it) if x is None else x[0] for x in fixed])
