"""Product quantization: small indices into tables of short vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import compat
from jaxcompress.arrays.base import (
    CompressedArray,
    is_compressed,
    materialize,
    narrows,
    register_array,
)
from jaxcompress.arrays.grid import TableArray
from jaxcompress.arrays.packed import PackedArray, block_for
from jaxcompress.errors import SpecError
from jaxcompress.numerics import rounded


@register_array(
    "product_codebook",
    children=("indices", "codebooks"),
    static=("axis", "length", "float_dtype"),
    trainable=("codebooks",),
    inner=("codebooks",),
)
class ProductArray(TableArray):
    """`w[b d : (b + 1) d] = sum_s codebooks[s, c(b), indices[s, b]]` along one axis.

    The axis is cut into g blocks of d values, and each block is one of k shared vectors, or the sum
    of s of them, added in float32 in the order of the stages and rounded once. Of m codebooks,
    m a divisor of g, each serves g / m consecutive blocks: m = 1 is one for all, m = g one for
    each place along the axis. A last block that is cut short by the axis is padded.

    Stacked weights have codebooks of their own: the leading axes of `codebooks`. They are
    trainable; the gradient of a vector is the sum over the blocks that share it, taken in float32.
    A contraction runs on the dense array, in a deferred call; of a table of rows only those that
    are looked up are decoded, as long as the blocks lie along the rows.

    Attributes:
      indices: unsigned integers on the axes of the dense array, `s g` of them along `axis`, those
        of one stage after those of another; a `PackedArray` below 8 bits.
      codebooks: the vectors, `[..., s, m, k, d]`.
      axis: the axis that is cut into blocks, negative.
      length: the number of weights along it.
      float_dtype: the dtype of the dense array.

    References:
      Jegou, Douze and Schmid, *Product Quantization for Nearest Neighbor Search*, 2011; Chen, Guan
      and Wang, *Approximate Nearest Neighbor Search by Residual Vector Quantization*, 2010.

    Examples:
      >>> import jax.numpy as jnp
      >>> codebooks = jnp.array([[1.0, 2.0], [3.0, 4.0]])[None, None]
      >>> ProductArray.of(jnp.array([[1, 0], [0, 0]]), codebooks, axis=-1).materialize().tolist()
      [[3.0, 4.0, 1.0, 2.0], [1.0, 2.0, 1.0, 2.0]]
    """

    indices: Any
    codebooks: Any
    axis: int
    length: int
    float_dtype: np.dtype

    grids: ClassVar[tuple[str, ...]] = ("indices",)
    # A spec that follows in a chain shares its scales along the k vectors of a codebook.
    inner_inputs: ClassVar[Mapping[str, tuple[int, ...]]] = {"codebooks": (-2,)}

    @classmethod
    def of(
        cls, indices: Any, codebooks: Any, *, axis: int = -1, length: int | None = None,
        dtype: Any = None,
    ) -> ProductArray:  # fmt: skip
        """The leaf of indices that are not packed yet; checks that all fits.

        Args:
          indices: integers below k, `s g` along `axis`.
          codebooks: `[..., s, m, k, d]`.
          axis: the axis that is cut into blocks.
          length: the weights along it; `g d` unless given.
          dtype: of the dense array; that of the codebooks unless given.

        Raises:
          SpecError: for shapes that do not fit.
        """
        axis = axis if axis < 0 else axis - indices.ndim
        stages, books, k, d = codebooks.shape[-4:]
        blocks, rest = divmod(indices.shape[axis], stages)
        length = blocks * d if length is None else length
        lead = codebooks.shape[:-4]
        if (
            rest
            or blocks % books
            or -(-length // d) != blocks
            or indices.shape[: len(lead)] != lead
        ):
            raise SpecError(
                f"indices {tuple(indices.shape)} and codebooks {tuple(codebooks.shape)} do not fit "
                f"{length} weights along axis {axis}: write codebooks [..., s, m, k, d] and s g "
                "indices along the axis, g = ceil(length / d) a multiple of m"
            )
        bits = max(1, (k - 1).bit_length())
        packed: Any = indices.astype(jnp.uint8 if bits <= 8 else jnp.uint16)
        if bits < 8:
            block = block_for(indices.shape[axis], bits, axis, None)
            packed = PackedArray.pack(packed, bits, axis=axis, block=block)
        dtype = codebooks.dtype if dtype is None else dtype
        return cls(packed, codebooks, axis, length, np.dtype(dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.indices.shape)
        shape[self.axis] = self.length
        return tuple(shape)

    @property
    def dtype(self) -> np.dtype:
        return self.float_dtype

    @property
    def batch_ndim(self) -> int:
        return len(self.codebooks.shape) - 4

    @property
    def stages(self) -> int:
        """How many vectors are added for each block."""
        return self.codebooks.shape[-4]

    @property
    def block(self) -> int:
        """The number d of values in a block."""
        return self.codebooks.shape[-1]

    def materialize(self, key: jax.Array | None = None) -> jax.Array:
        decode = lambda indices, books: decoded(indices, books, self.axis, self.length)
        for _ in range(self.batch_ndim):
            decode = jax.vmap(decode)
        wide = materialize(self.codebooks).astype(jnp.float32)
        return rounded(decode(materialize(self.indices), wide), self.float_dtype)

    def astype(self, dtype: Any) -> CompressedArray | None:
        return self.replace(float_dtype=np.dtype(dtype)) if narrows(self.dtype, dtype) else None

    def describe(self) -> str:
        books, k, d = self.codebooks.shape[-3:]
        many = (f"{self.stages} stages of " if self.stages > 1 else "") + (
            f"{books} x " if books > 1 else ""
        )
        inner = f" of {self.codebooks.describe()}" if is_compressed(self.codebooks) else ""
        return f"product {many}{k} x {d}{inner}"


def decoded(indices: jax.Array, books: jax.Array, axis: int, length: int) -> jax.Array:
    """The float32 weights of indices and codebooks `[s, m, k, d]`, without leading axes."""
    stages, m, k, d = books.shape
    indices = jnp.moveaxis(indices, axis, -1).astype(jnp.int32)
    lead, blocks = indices.shape[:-1], indices.shape[-1] // stages
    # In 64 bits on the host: blocks times codebooks may be more than 2**31.
    first = (np.arange(blocks, dtype=np.int64) * m // max(1, blocks) * k).astype(np.int32)
    table = books.reshape(stages * m * k, d)
    out = jnp.zeros((), jnp.float32)
    for s in range(stages):  # one after the other: a sum in an order that no compiler changes
        at = indices[..., s * blocks : (s + 1) * blocks] + (first + s * m * k)
        out = compat.look_up(table, at) if s == 0 else out + compat.look_up(table, at)
    flat = out.reshape(*lead, blocks * d)[..., :length]
    return jnp.moveaxis(flat, -1, axis)


def blocks_of(w: jax.Array, axis: int, d: int) -> jax.Array:
    """The blocks of d values along an axis, zeros at the end: float32 `[g, r, d]`.

    Examples:
      >>> import jax.numpy as jnp
      >>> blocks_of(jnp.array([[1, 2, 3]]), -1, 2).tolist()
      [[[1.0, 2.0]], [[3.0, 0.0]]]
    """
    n = w.shape[axis]
    rows = jnp.moveaxis(w.astype(jnp.float32), axis, -1)
    rows = rows.reshape(math.prod(rows.shape[:-1]), n)
    blocks = jnp.pad(rows, ((0, 0), (0, -n % d))).reshape(rows.shape[0], -(-n // d), d)
    return jnp.moveaxis(blocks, 1, 0)


def indices_of(blocks: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """Indices `[s, g, r]` of blocks on the axes of an array of some shape, as a leaf has them."""
    rest = [n for i, n in enumerate(shape) if i != axis + len(shape)]
    flat = blocks.reshape(-1, blocks.shape[-1]).T
    return jnp.moveaxis(flat.reshape(*rest, flat.shape[-1]), -1, axis)


def nearest(x: jax.Array, book: jax.Array, counts: jax.Array | None = None) -> jax.Array:
    """Which vector of a codebook `[k, d]` is nearest to each of `[n, d]`, a tie to the first.

    `counts`, `[n, d]`, weighs the values; 0 for what only fills a block up.

    One vector of the codebook after the other, so that no table of distances exists.

    Examples:
      >>> import jax.numpy as jnp
      >>> nearest(jnp.array([[0.0], [3.0]]), jnp.array([[1.0], [2.0]])).tolist()
      [0, 1]
    """
    columns = x.T
    weights = None if counts is None else counts.T

    def step(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        score = jnp.zeros(columns.shape[1:], jnp.float32)
        for j in range(book.shape[1]):
            part = jnp.square(columns[j] - book[i, j])
            score = score + (part if weights is None else weights[j] * part)
        return jnp.minimum(best[0], score), jnp.where(score < best[0], i, best[1])

    start = jnp.full(x.shape[0], jnp.inf), jnp.zeros(x.shape[0], jnp.int32)
    return jax.lax.fori_loop(0, book.shape[0], step, start)[1]
