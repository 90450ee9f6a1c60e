"""A tree of parameters as a table of its leaves by path, to change a few of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.arrays.base import is_compressed
from jaxcompress.errors import RuleError, SpecError
from jaxcompress.rules import KernelAxes, default_axes, flatten

Axes = Mapping[str, KernelAxes]


class Leaves:
    """The leaves of a tree by path; `tree` puts them together again.

    Args:
      tree: any pytree of arrays and leaves.
      axes: the axes of kernels by path, else those of Flax's names.
    """

    def __init__(self, tree: Any, axes: Axes | None = None) -> None:
        leaves, self._structure = flatten(tree)
        self._leaves = dict(leaves)
        self._axes = axes or {}

    def __contains__(self, path: str) -> bool:
        return path in self._leaves

    def __setitem__(self, path: str, leaf: Any) -> None:
        self._leaves[path] = leaf

    def any(self, path: str) -> Any:
        """A leaf, compressed or not."""
        if path not in self._leaves:
            raise RuleError(f"{path!r} is no leaf of the tree: {', '.join(self._leaves)}")
        return self._leaves[path]

    def dense(self, path: str) -> jax.Array:
        """A leaf that must be dense."""
        leaf = self.any(path)
        if is_compressed(leaf):
            raise SpecError(f"{path}: is compressed already; change the tree before that")
        return jnp.asarray(leaf)

    def axes(self, path: str) -> KernelAxes:
        """The inputs and outputs of a kernel."""
        return self._axes.get(path, default_axes(path, self.any(path).ndim))

    def tree(self) -> Any:
        """The tree of the present leaves."""
        return jax.tree.unflatten(self._structure, list(self._leaves.values()))


def multiplied(x: jax.Array, factor: jax.Array) -> jax.Array:
    """`x * factor` in float32 at least, rounded once to the dtype of x."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return (x.astype(wide) * factor.astype(wide)).astype(x.dtype)


def divided(x: jax.Array, factor: jax.Array) -> jax.Array:
    """`x / factor` in float32 at least, rounded once to the dtype of x."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return (x.astype(wide) / factor.astype(wide)).astype(x.dtype)
