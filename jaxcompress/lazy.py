"""An array that is still in its file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Ahead:
    """Loads lazy leaves, each while the caller still works on the one before it.

    Args:
      leaves: each once, in the order in which they will be asked for.
    """

    def __init__(self, leaves: Sequence[LazyArray]) -> None:
        self._leaves = leaves
        self._index = {id(leaf): i for i, leaf in enumerate(leaves)}
        self._coming: dict[int, Future[Any]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1)

    def load(self, leaf: LazyArray) -> Any:
        """The loaded leaf; the next one is begun."""
        i = self._index.get(id(leaf))
        if i is None:
            return leaf.load()
        loaded = self._start(i).result()
        del self._coming[i]
        if i + 1 < len(self._leaves):
            self._start(i + 1)
        return loaded

    def _start(self, i: int) -> Future[Any]:
        if i not in self._coming:
            self._coming[i] = self._thread.submit(self._leaves[i].load)
        return self._coming[i]

    def close(self) -> None:
        """Waits for what was begun, and drops it."""
        self._thread.shutdown(wait=True, cancel_futures=True)


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
