"""A leaf as matrices `[..., K, N]`, inputs before outputs, and back."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.rules import KernelAxes


class Folding(NamedTuple):
    """How a leaf becomes matrices: `[*batch, K, N]`, or `[*batch, groups, K, N / groups]`.

    Examples:
      >>> import jax.numpy as jnp
      >>> how = folding(jnp.zeros((3, 3, 16, 32)), KernelAxes((-4, -3, -2), (-1,)))
      >>> how.fold(jnp.zeros((3, 3, 16, 32))).shape
      (144, 32)

    Attributes:
      order: the leaf's axes: batch, inputs, outputs, each in their order.
      batch: the shape of the stack.
      inputs: the shape of the inputs; K is its product.
      outputs: the shape of the outputs; N is its product.
      groups: of a grouped convolution, whose outputs are theirs one group after the other.
    """

    order: tuple[int, ...]
    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    groups: int = 1

    def fold(self, leaf: jax.Array) -> jax.Array:
        """The matrices of a leaf."""
        rows, columns = math.prod(self.inputs), math.prod(self.outputs)
        x = jnp.transpose(leaf, self.order)
        if self.groups == 1:
            return x.reshape(*self.batch, rows, columns)
        x = x.reshape(*self.batch, rows, self.groups, columns // self.groups)
        return jnp.moveaxis(x, -2, -3)

    def unfold(self, x: jax.Array, inputs: tuple[int, ...] | None = None) -> jax.Array:
        """The leaf of matrices; `inputs` where they have other rows, such as those of scales."""
        if self.groups > 1:
            x = jnp.moveaxis(x, -3, -2)
        x = x.reshape(*self.batch, *(self.inputs if inputs is None else inputs), *self.outputs)
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return jnp.transpose(x, back)


def folding(leaf: Any, axes: KernelAxes, groups: int = 1) -> Folding:
    """The folding of a leaf with these axes."""
    batch = axes.batch_ndim(leaf.ndim)
    inputs, outputs = (sorted(a + leaf.ndim for a in side) for side in axes)
    shape = lambda places: tuple(leaf.shape[a] for a in places)
    order = (*range(batch), *inputs, *outputs)
    return Folding(order, shape(range(batch)), shape(inputs), shape(outputs), groups)
