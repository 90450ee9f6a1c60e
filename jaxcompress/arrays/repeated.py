"""Values that stand for several neighbours along one axis: the scales of two-dimensional blocks."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import is_compressed, materialize, register_array
from jaxcompress.arrays.grid import GridArray


@register_array("repeated", children=("values",), static=("axis", "times", "length"))
class RepeatedArray(GridArray):
    """Each value `times` times along one axis, as far as its length goes.

    Attributes:
      values: an array or a leaf with `ceil(length / times)` values along the axis.
      axis: the axis, negative.
      times: how many neighbours share a value.
      length: the length of the axis.

    Examples:
      >>> import jax.numpy as jnp
      >>> RepeatedArray(jnp.array([1.0, 2.0]), -1, 2, 3).materialize().tolist()
      [1.0, 1.0, 2.0]
    """

    values: Any
    axis: int
    times: int
    length: int

    grids: ClassVar[tuple[str, ...]] = ("values",)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.values.shape)
        shape[self.axis] = self.length
        return tuple(shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.values.dtype)

    def materialize(self, key: jax.Array | None = None) -> jax.Array:
        wide = jnp.repeat(materialize(self.values), self.times, axis=self.axis)
        return jax.lax.slice_in_dim(wide, 0, self.length, axis=self.axis + wide.ndim)

    def describe(self) -> str:
        inner = f" of {self.values.describe()}" if is_compressed(self.values) else ""
        return f"each {self.times} times{inner}"
