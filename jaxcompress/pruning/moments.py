"""Moments of regrown weights: set back, wherever an optimizer keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.optimizer_state import owner


class Memory(NamedTuple):
    """What an algorithm keeps in the state of `sparsify`.

    Attributes:
      own: its scores, momenta or signs, in the order of the pruned leaves.
      dense: the weights that the params are the masked image of, of an algorithm that keeps them.
    """

    own: Any
    dense: Any


def set_back(
    state: Any, fresh: Any, params: Any, places: Sequence[int], regrown: Sequence[jax.Array]
) -> Any:
    """The state of an optimizer with what it holds of some weights as `init` would make it.

    A part of the state belongs to a leaf of the params if its path ends like that leaf's, as that
    of `mu` and `nu` does in any optax state, and if it has its shape; where several leaves would
    do, to that with the longest path. Factored moments, which are not of single weights, stay.

    What a nested `sparsify` remembers is not of the optimizer, and stays.

    Args:
      state: the state.
      fresh: `init(params)`.
      params: the params.
      places: which flat leaves of the params have regrown weights.
      regrown: where, in the shapes of those leaves.
    """
    paths = [tuple(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    by_place = dict(zip(places, regrown))
    whole = lambda x: isinstance(x, Memory)
    found, structure = jax.tree_util.tree_flatten_with_path(state, is_leaf=whole)
    new = {tuple(path): x for path, x in jax.tree_util.tree_flatten_with_path(fresh)[0]}
    out = []
    for path, x in found:
        place = owner(tuple(path), paths)
        where = None if place is None else by_place.get(place)
        start = new.get(tuple(path))
        if (
            where is not None
            and start is not None
            and not whole(x)
            and x.shape == where.shape == start.shape
        ):
            x = jnp.where(where, start, x)
        out.append(x)
    return jax.tree.unflatten(structure, out)
