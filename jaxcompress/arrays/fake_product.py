"""A dense weight that is rounded to the vectors of codebooks wherever it is used."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import CompressedArray, narrows, register_array
from jaxcompress.arrays.product import ProductArray, blocks_of, decoded, indices_of, nearest
from jaxcompress.numerics import rounded


@register_array(
    "fake_product",
    children=("weight", "codebooks"),
    static=("axis", "float_dtype"),
    trainable=("weight",),
)
class FakeProductArray(CompressedArray):
    """A weight whose blocks are replaced by the nearest of shared vectors, and trained through it.

    The gradient of the dense weight is that of the rounded one, straight through. The vectors stay
    until `refresh_codebooks` fits them to the weight anew. The forward pass is that of the stored
    leaf, bit for bit; it looks for the nearest vectors each time, `2 n k` operations for n weights.
    Later stages round what those before leave.

    Attributes:
      weight: the dense weight.
      codebooks: the vectors, `[..., s, m, k, d]`, as in a `ProductArray`.
      axis: the axis that is cut into blocks, negative.
      float_dtype: the dtype of the dense array.

    References:
      Fan et al., *Training with Quantization Noise for Extreme Model Compression*, 2021.

    Examples:
      >>> import jax.numpy as jnp
      >>> books = jnp.array([[[[0.0, 0.0], [1.0, 2.0]]]])
      >>> w = jnp.array([[0.9, 1.5, 0.1, 0.3]])
      >>> leaf = FakeProductArray(w, books, -1, w.dtype)
      >>> leaf.materialize().tolist(), leaf.finalize()
      ([[1.0, 2.0, 0.0, 0.0]], ProductArray(float32[1, 4], product 2 x 2))
    """

    weight: Any
    codebooks: Any
    axis: int
    float_dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.float_dtype

    @property
    def batch_ndim(self) -> int:
        return len(self.codebooks.shape) - 4

    def indices(self) -> jax.Array:
        """Those of the stored leaf, not packed."""
        encode = lambda w, books: _encoded(w, books, self.axis)
        for _ in range(self.batch_ndim):
            encode = jax.vmap(encode)
        return encode(self.weight, self.codebooks)

    def materialize(self, key: jax.Array | None = None) -> jax.Array:
        fixed = jax.tree.map(jax.lax.stop_gradient, self)
        length = self.shape[self.axis]
        decode = lambda indices, books: decoded(indices, books, self.axis, length)
        for _ in range(self.batch_ndim):
            decode = jax.vmap(decode)
        wide = fixed.codebooks.astype(jnp.float32)
        values = rounded(decode(fixed.indices(), wide), self.float_dtype)
        return _straight(self.weight.astype(self.float_dtype), values)

    def finalize(self) -> CompressedArray | jax.Array:
        """The stored leaf."""
        return _finalized(self)

    def astype(self, dtype: Any) -> CompressedArray | None:
        return self.replace(float_dtype=np.dtype(dtype)) if narrows(self.dtype, dtype) else None

    def describe(self) -> str:
        books, k, d = self.codebooks.shape[-3:]
        return f"fake product {f'{books} x ' if books > 1 else ''}{k} x {d}"


def _encoded(w: jax.Array, books: jax.Array, axis: int) -> jax.Array:
    stages, m, _, d = books.shape
    rest = blocks_of(w, axis, d)
    count, rows = rest.shape[:2]
    rest = rest.reshape(m, -1, d)
    counts = None
    if w.shape[axis] % d:  # what fills the last block up has no say
        counts = blocks_of(jnp.ones_like(w), axis, d).reshape(rest.shape)
    found = []
    for s in range(stages):
        book = books[s].astype(jnp.float32)
        at = jax.vmap(nearest)(rest, book, counts)
        found.append(at.reshape(count, rows))
        rest = rest - jax.vmap(lambda table, i: table[i])(book, at)
    return indices_of(jnp.stack(found), w.shape, axis)


@jax.custom_jvp
def _straight(weight: jax.Array, values: jax.Array) -> jax.Array:
    return values


@_straight.defjvp
def _straight_jvp(primals: Any, tangents: Any) -> Any:
    return primals[1], tangents[0]


@jax.jit
def _finalized(leaf: FakeProductArray) -> ProductArray:
    # Compiled like the forward pass, whose indices these shall be.
    length, dtype = leaf.shape[leaf.axis], leaf.float_dtype
    return ProductArray.of(
        leaf.indices(), leaf.codebooks, axis=leaf.axis, length=length, dtype=dtype
    )
