"""The floating arrays of a tree, taken out of it and put back: what every score is of."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import compat
from jaxcompress.arrays.base import is_compressed
from jaxcompress.errors import SpecError
from jaxcompress.lazy import LazyArray
from jaxcompress.rules import KernelAxes, check_axes, default_axes, flatten


@functools.partial(
    compat.register_node,
    data=("values", "others"),
    static=("paths", "chosen", "structure"),
)
@dataclasses.dataclass(frozen=True)
class Weights:
    """A tree as its floating arrays and the rest; a pytree, so that it passes through `jit`.

    Attributes:
      values: the floating arrays.
      others: all other leaves.
      paths: of the floating arrays.
      chosen: of each leaf, whether it is floating.
      structure: of the tree.
    """

    values: list[Any]
    others: list[Any]
    paths: tuple[str, ...]
    chosen: tuple[bool, ...]
    structure: Any

    @classmethod
    def of(cls, params: Any) -> Weights:
        """Takes a tree apart.

        Raises:
          SpecError: for a compressed or a lazy leaf.
        """
        leaves, structure = flatten(params)
        for path, leaf in leaves:
            if is_compressed(leaf) or isinstance(leaf, LazyArray):
                raise SpecError(
                    f"{path}: a {type(leaf).__name__} has no dense weights to score; write "
                    "jc.decompress(params)"
                )
        chosen = tuple(
            hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
            for _, leaf in leaves
        )
        values = [jnp.asarray(leaf) for (_, leaf), c in zip(leaves, chosen) if c]
        others = [leaf for (_, leaf), c in zip(leaves, chosen) if not c]
        paths = tuple(path for (path, _), c in zip(leaves, chosen) if c)
        return cls(values, others, paths, chosen, structure)

    def params(self, values: Sequence[Any]) -> Any:
        """The tree with other values for its floating arrays."""
        mine, rest = iter(values), iter(self.others)
        leaves = [next(mine) if c else next(rest) for c in self.chosen]
        return jax.tree.unflatten(self.structure, leaves)

    def scores(self, values: Sequence[Any]) -> Any:
        """The tree of scores: None where there is no floating array."""
        mine = iter(values)
        return jax.tree.unflatten(self.structure, [next(mine) if c else None for c in self.chosen])

    def axes(self, given: Mapping[str, KernelAxes] | None) -> list[KernelAxes]:
        """The axes of each array: those given, else by Flax's conventions.

        Raises:
          RuleError: for axes of no leaf, or that do not fit it.
        """
        given = given or {}
        check_axes(given, list(zip(self.paths, self.values)))
        return [given.get(p, default_axes(p, x.ndim)) for p, x in zip(self.paths, self.values)]

    def check_paths(self, paths: Sequence[str], what: str) -> None:
        """Refuses paths that name no floating array.

        Raises:
          SpecError: naming the path.
        """
        for path in paths:
            if path not in self.paths:
                raise SpecError(
                    f"{what} {path!r} names no floating leaf; the paths are such as "
                    f"{', '.join(map(repr, self.paths[:3]))}"
                )


def float32(x: jax.Array) -> jax.Array:
    """`x` in the precision in which scores are computed."""
    return x.astype(jnp.float32)


def whole(x: jax.Array) -> jax.Array:
    """`x` on each device as a whole, where a mesh with Explicit axes spreads it.

    A sort, a running sum and a loop over an axis have no type there on an axis that is spread.
    """
    if not compat.is_explicit(x):
        return x
    return jax.sharding.reshard(x, jax.NamedSharding(jax.typeof(x).sharding.mesh, jax.P()))


def placed_like(like: jax.Array, x: jax.Array) -> jax.Array:
    """`x` placed as an array of its shape is, where a mesh with Explicit axes spreads that."""
    place = jax.typeof(like).sharding
    return jax.sharding.reshard(x, place) if compat.is_explicit(like) else x


def per_weight(fn: Callable[[jax.Array], jax.Array], batch_ndim: int) -> Callable[..., jax.Array]:
    """`fn` of one weight, for a stack of them."""
    for _ in range(batch_ndim):
        fn = jax.vmap(fn)
    return fn
