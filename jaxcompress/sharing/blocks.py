"""Matrices as blocks of inputs, and the codebooks of these."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress.numerics import rounded
from jaxcompress.sharing.vectors import kmeans


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the K inputs of matrices `[K, N]` are cut, in runs, and what is fitted to the blocks.

    Attributes:
      d: values in a block; the last one of a run may be short.
      books: codebooks for each stage.
      k: vectors in a codebook.
      stages: vectors that are added.
      sweeps: how often all stages are improved.
      init: of k-means.
      iterations: of k-means.
      dtype: of the codebooks.
    """

    d: int
    books: int
    k: int
    stages: int
    sweeps: int
    init: str
    iterations: int
    dtype: np.dtype

    def cut(self, w: jax.Array, run: int, fill: float = 0.0) -> jax.Array:
        """The blocks by codebook and part, float32 `[m, p, N, d]`."""
        count = -(-run // self.d)
        x = w.astype(jnp.float32).reshape(-1, run, w.shape[-1])
        x = jnp.pad(x, ((0, 0), (0, count * self.d - run), (0, 0)), constant_values=fill)
        x = x.reshape(x.shape[0], self.books, count // self.books, self.d, w.shape[-1])
        x = jnp.moveaxis(x, (1, 4), (0, 3))
        return x.reshape(self.books, -1, w.shape[-1], self.d)

    def metrics(self, gram: jax.Array, run: int, damping: float) -> jax.Array:
        """The diagonal blocks of Gram matrices `[..., K, K]`: `[..., m, p, d, d]`, damped."""
        lead, count = gram.shape[:-2], -(-run // self.d)
        runs = gram.shape[-1] // run
        gram = gram.astype(jnp.float32).reshape(*lead, runs, run, runs, run)
        gram = jnp.moveaxis(jnp.diagonal(gram, axis1=-4, axis2=-2), -1, -3)
        short = count * self.d - run
        wide = [(0, 0)] * len(lead) + [(0, 0), (0, short), (0, short)]
        gram = jnp.pad(gram, wide).reshape(*lead, runs, count, self.d, count, self.d)
        gram = jnp.moveaxis(jnp.diagonal(gram, axis1=-4, axis2=-2), -1, -3)
        mean = jnp.trace(gram, axis1=-2, axis2=-1).mean(axis=(-2, -1)) / self.d
        mean = jnp.where(mean > 0, mean, 1.0)[..., None, None, None, None]
        gram = gram / mean + damping * jnp.eye(self.d)
        gram = gram.reshape(*lead, runs, self.books, count // self.books, self.d, self.d)
        gram = jnp.moveaxis(gram, -4, -5)
        return gram.reshape(*lead, self.books, -1, self.d, self.d)

    def fit(
        self,
        w: jax.Array,
        run: int,
        key: jax.Array,
        weights: jax.Array | None,
        metric: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Indices `[runs * s * g, N]` and codebooks `[s, m, k, d]` of one matrix."""
        x = self.cut(w, run)
        h = None if weights is None else self.cut(weights, run)
        if h is None and run % self.d and metric is None:  # what was added counts nothing
            h = self.cut(jnp.ones_like(w), run)
        found = lax.map(
            lambda xs: self._codebook(*xs), (x, h, metric, jax.random.split(key, self.books))
        )
        indices, books = found  # [m, s, p, N], [m, s, k, d]
        count, columns = -(-run // self.d), w.shape[-1]
        runs = w.shape[0] // run
        indices = indices.reshape(
            self.books, self.stages, runs, count // self.books, columns
        ).transpose(2, 1, 0, 3, 4)
        return indices.reshape(-1, columns), jnp.moveaxis(books, 1, 0)

    def _codebook(
        self, x: jax.Array, h: jax.Array | None, metric: jax.Array | None, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Indices `[s, p, N]` and vectors `[s, k, d]` of vectors `[p, N, d]`."""
        keys = jax.random.split(key, self.stages)
        indices: list[jax.Array] = []
        books: list[jax.Array] = []
        for s in range(self.stages):
            at, book = self._stage(_rest(x, indices, books), h, metric, self.init, keys[s])
            indices.append(at)
            books.append(book)
        for _ in range(self.sweeps if self.stages > 1 else 0):
            for s in range(self.stages):
                others = [i for i in range(self.stages) if i != s]
                rest = _rest(x, [indices[i] for i in others], [books[i] for i in others])
                indices[s], books[s] = self._stage(rest, h, metric, books[s], keys[s])
        return jnp.stack(indices), rounded(jnp.stack(books), self.dtype)

    def _stage(
        self, x: jax.Array, h: jax.Array | None, metric: jax.Array | None, init: object,
        key: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        turns = self.iterations if isinstance(init, str) else min(self.iterations, 3)
        fit = lambda init, turns: kmeans(
            x, self.k, weights=h, metric=metric, init=init, iterations=turns, key=key
        )
        book = rounded(fit(init, turns).centroids, self.dtype).astype(jnp.float32)
        # Indices are those of the vectors as they are stored.
        return fit(book, 0).indices, book


def _rest(x: jax.Array, indices: list[jax.Array], books: list[jax.Array]) -> jax.Array:
    """What a sum of vectors leaves."""
    for at, book in zip(indices, books):
        x = x - book[at]
    return x
