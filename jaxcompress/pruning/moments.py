"""Moments of single weights, wherever an optimizer keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jaxcompress.optimizer_state import owner


class Memory(NamedTuple):
    """What an algorithm keeps in the state of `sparsify`.

    Attributes:
      own: its scores, momenta or signs, in the order of the pruned leaves.
      dense: the weights that the params are the masked image of, of an algorithm that keeps them.
    """

    own: Any
    dense: Any


class Owned(NamedTuple):
    """An optimizer's state in parts, and which of them belong to which leaf of the params.

    Attributes:
      flat: the parts.
      structure: of the state.
      numbers: of the parts of each leaf.
      starts: those parts as `init` makes them.
    """

    flat: list[Any]
    structure: Any
    numbers: list[list[int]]
    starts: list[list[jax.Array]]

    def moments(self) -> list[list[jax.Array]]:
        """The parts of each leaf."""
        return [[self.flat[j] for j in numbers] for numbers in self.numbers]

    def put(self, moments: Sequence[Sequence[jax.Array]]) -> Any:
        """The state with others in their place."""
        flat = list(self.flat)
        for numbers, parts in zip(self.numbers, moments):
            for j, x in zip(numbers, parts):
                flat[j] = x
        return jax.tree.unflatten(self.structure, flat)


def owned(state: Any, fresh: Any, params: Any, places: Sequence[int]) -> Owned:
    """What an optimizer holds of single weights, wherever it keeps it.

    A part of the state belongs to a leaf of the params if its path ends like that leaf's, as that
    of `mu` and `nu` does in any optax state, and if it has its shape; where several leaves would
    do, to that with the longest path. Factored moments, which are not of single weights, belong to
    none, and neither does what a nested `sparsify` remembers, which is not of the optimizer.

    Args:
      state: the state.
      fresh: `init(params)`.
      params: the params.
      places: which flat leaves of the params are asked for.
    """
    found = jax.tree_util.tree_flatten_with_path(params)[0]
    paths = [tuple(path) for path, _ in found]
    whole = lambda x: isinstance(x, Memory)
    parts, structure = jax.tree_util.tree_flatten_with_path(state, is_leaf=whole)
    new = {tuple(path): x for path, x in jax.tree_util.tree_flatten_with_path(fresh)[0]}
    numbers: dict[int | None, list[int]] = {place: [] for place in places}
    for j, (path, x) in enumerate(parts):
        place, start = owner(tuple(path), paths), new.get(tuple(path))
        if place in numbers and start is not None and not whole(x):
            assert place is not None
            if x.shape == found[place][1].shape == start.shape:
                numbers[place].append(j)
    starts = [[new[tuple(parts[j][0])] for j in numbers[place]] for place in places]
    flat = [x for _, x in parts]
    return Owned(flat, structure, [numbers[place] for place in places], starts)
