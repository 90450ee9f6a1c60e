"""Weight sharing: small indices into a table of shared values."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import compat
from jaxcompress.arrays.base import is_compressed, materialize, register_array
from jaxcompress.arrays.grid import TableArray


@register_array(
    "codebook",
    children=("indices", "centroids"),
    static=("axis",),
    trainable=("centroids",),
    inner=("centroids",),
)
class CodebookArray(TableArray):
    """`w = centroids[indices]`: every weight is one of k shared values.

    Stacked weights have a codebook each: the leading axes of `centroids` are those of `indices`.
    The centroids are trainable; their gradient is the sum over the weights that share them, taken
    in float32 whatever their dtype (256 ones are all that a bfloat16 sum can count).

    Attributes:
      indices: unsigned integers in the shape of the weights, a `PackedArray` below 8 bits.
      centroids: the table, `[..., k]`, in the dtype of the weights.
      axis: the axis along which the indices are packed, negative.

    References:
      Han, Mao and Dally, *Deep Compression*, 2016.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> indices = jc.PackedArray.pack(jnp.array([[0, 1, 1, 3]]), 2)
      >>> jc.CodebookArray(indices, jnp.array([-1.0, 0.0, 0.5, 2.0]), -1).materialize().tolist()
      [[-1.0, 0.0, 0.0, 2.0]]
    """

    indices: Any
    centroids: Any
    axis: int

    grids: ClassVar[tuple[str, ...]] = ("indices",)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.indices.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.centroids.dtype)

    @property
    def batch_ndim(self) -> int:
        return len(self.centroids.shape) - 1

    def materialize(self, key: jax.Array | None = None) -> jax.Array:
        centroids = self.table()
        wide = centroids
        if centroids.dtype.itemsize < 4:
            # The same values; the transpose of the look-up then sums in float32.
            wide = centroids.astype(np.float32)

        look_up = compat.look_up
        for _ in range(self.batch_ndim):
            look_up = jax.vmap(look_up)
        return look_up(wide, materialize(self.indices)).astype(centroids.dtype)

    def table(self) -> jax.Array:
        """The dense centroids that the indices are of."""
        return materialize(self.centroids)

    def describe(self) -> str:
        inner = f" of {self.centroids.describe()}" if is_compressed(self.centroids) else ""
        return f"codebook {self.centroids.shape[-1]}{inner}"


@register_array(
    "zero_codebook",
    children=("indices", "centroids"),
    static=("axis",),
    trainable=("centroids",),
    inner=("centroids",),
)
class ZeroCodebookArray(CodebookArray):
    """`w = (0, *centroids)[indices]`: index 0 is exactly zero, and stays so in training.

    Attributes:
      indices: unsigned integers in the shape of the weights, a `PackedArray` below 8 bits.
      centroids: all shared values but zero, `[..., k - 1]`, in the dtype of the weights.
      axis: the axis along which the indices are packed, negative.

    References:
      Han, Mao and Dally, *Deep Compression*, 2016.

    Examples:
      >>> import jax.numpy as jnp
      >>> ZeroCodebookArray(jnp.array([0, 2, 1]), jnp.array([-1.0, 2.0]), -1).materialize().tolist()
      [0.0, 2.0, -1.0]
    """

    indices: Any
    centroids: Any
    axis: int

    def table(self) -> jax.Array:
        """The dense centroids, 0 first."""
        others = materialize(self.centroids)
        return jnp.concatenate([jnp.zeros_like(others[..., :1]), others], axis=-1)

    def describe(self) -> str:
        inner = f" of {self.centroids.describe()}" if is_compressed(self.centroids) else ""
        return f"codebook {self.centroids.shape[-1] + 1} with zero{inner}"
