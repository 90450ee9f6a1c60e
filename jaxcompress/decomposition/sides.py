"""A kernel as a matrix of its inputs by its outputs, and factors back on the kernel's axes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from jaxcompress.arrays.low_rank import LowRankArray
from jaxcompress.errors import SpecError
from jaxcompress.specs import LeafContext


@dataclasses.dataclass(frozen=True)
class Sides:
    """Where the axes of a weight are cut in two.

    Attributes:
      shape: of the weight, `[*batch, *first, *last]`.
      batch: the number of axes of a stack.
      first: the number of axes on the left side.
      inputs_first: whether these are the inputs.
    """

    shape: tuple[int, ...]
    batch: int
    first: int
    inputs_first: bool

    @classmethod
    def of(cls, leaf: Any, context: LeafContext) -> Sides:
        """The sides of a leaf, by the axes in its context.

        Raises:
          SpecError: where inputs and outputs do not form a matrix.
        """
        shape = tuple(leaf.shape)
        if len(shape) < 2:
            raise SpecError(
                f"{context.path}: shape {shape} is no matrix and has no low rank; let the rule "
                "match kernels only, such as '**/kernel'"
            )
        inputs, outputs = context.axes
        for first, last in ((inputs, outputs), (outputs, inputs)):
            if first and last and max(first) < min(last):
                batch = context.axes.batch_ndim(len(shape))
                return cls(shape, batch, len(first), first is inputs)
        raise SpecError(
            f"{context.path}: input axes {inputs} and output axes {outputs} of shape {shape} do "
            "not form a matrix"
        )

    @property
    def middle(self) -> int:
        """Where the right side begins."""
        return self.batch + self.first

    @property
    def sizes(self) -> tuple[int, int]:
        """The sizes m and n of the matrix."""
        shape = self.shape
        return math.prod(shape[self.batch : self.middle]), math.prod(shape[self.middle :])

    def matrix(self, x: jax.Array) -> jax.Array:
        """`[*batch, m, n]`."""
        return x.reshape(*self.shape[: self.batch], *self.sizes)

    def factors(self, left: jax.Array, right: jax.Array) -> LowRankArray:
        """The leaf of factors `[*batch, m, r]` and `[*batch, r, n]`."""
        shape, middle, rank = self.shape, self.middle, left.shape[-1]
        return LowRankArray.of(
            left.reshape(*shape[:middle], rank),
            right.reshape(*shape[: self.batch], rank, *shape[middle:]),
            left_ndim=self.first,
            right_ndim=len(shape) - middle,
        )
