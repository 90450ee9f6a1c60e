"""How the inputs of a layer lie among whole blocks, and how a count is divided among those."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Frame(NamedTuple):
    """K inputs among blocks of whole groups.

    A group, of an `n:m` pattern or of scales, lies within a run: the last axis of those that make
    up the inputs, such as the channels at one place of a convolution's kernel. Runs are padded to
    whole groups, and all inputs to whole blocks, by inputs that are always zero.

    Attributes:
      place: the place of each input among the padded ones, int `[K]`.
      real: which of the padded inputs are real, bool `[blocks * block]`.
      block: inputs in a block.
    """

    place: np.ndarray
    real: np.ndarray
    block: int

    def padded(self, x: jax.Array) -> jax.Array:
        """Rows `[K, ...]` at their places, zeros between."""
        out = jnp.zeros((len(self.real), *x.shape[1:]), x.dtype)
        return out.at[self.place].set(x, unique_indices=True, indices_are_sorted=True)

    def firsts(self, group: int | None, run: int) -> np.ndarray:
        """The places of the first input of each group of scales; of none, that of the first."""
        return (
            self.place[:1]
            if group is None
            else self.place[np.arange(len(self.place)) % run % group == 0]
        )


def frame(inputs: int, run: int, block_size: int, groups: tuple[int, ...]) -> Frame:
    """The frame of some inputs, in runs of `run`, for groups of these sizes.

    Examples:
      >>> frame(6, 3, 4, (2,)).place.tolist()
      [0, 1, 2, 4, 5, 6]
    """
    whole = math.lcm(*groups)
    padded_run = -(-run // whole) * whole
    at = np.arange(inputs)
    place = at // run * padded_run + at % run
    size = inputs // run * padded_run
    block = min(-(-block_size // whole) * whole, size)
    real = np.zeros(-(-size // block) * block, bool)
    real[place] = True
    return Frame(place, real, block)


def shares(total: int, sizes: np.ndarray) -> np.ndarray:
    """Divides a total among parts in proportion to their sizes: whole numbers, the sum exact.

    Examples:
      >>> shares(5, np.array([2, 2, 2])).tolist()
      [1, 2, 2]
    """
    every = max(1, int(np.sum(sizes)))
    ends = [total * int(n) // every for n in np.cumsum(sizes)]
    return np.diff(ends, prepend=0)
