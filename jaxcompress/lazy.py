"""An array that is still in its file."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class LazyArray:
    """Stands for an array or a compressed leaf in a file, and reads it when asked.

    `shape` and `dtype` are known from the file's header. `load()` reads this one leaf; numpy and
    jax functions that take array-likes read it by themselves. `compress` takes trees of these
    and holds one at a time.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: np.dtype, nbytes: int, read: Callable[[], Any]
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.nbytes = nbytes
        self._read = read

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    def load(self) -> Any:
        """Reads the leaf: a `jax.Array` or a `CompressedArray`."""
        return self._read()

    def __jax_array__(self) -> jax.Array:
        loaded = self.load()
        return jnp.asarray(loaded.materialize() if hasattr(loaded, "materialize") else loaded)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        loaded = self.load()
        dense = loaded.materialize() if hasattr(loaded, "materialize") else loaded
        return np.asarray(dense, dtype=dtype)

    def __repr__(self) -> str:
        return f"LazyArray({np.dtype(self.dtype).name}{list(self.shape)})"
