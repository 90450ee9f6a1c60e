"""Hashed weights: a table of few values, read at places that a hash tells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress import compat
from jaxcompress.arrays.base import (
    CompressedArray,
    cast,
    is_compressed,
    materialize,
    register_array,
    register_rule,
)
from jaxcompress.arrays.rows import plain_rows
from jaxcompress.errors import SpecError


def murmur3(key: jax.Array, seed: int = 0) -> jax.Array:
    """MurmurHash3 (x86, 32 bits) of keys of four bytes.

    Additions, products and shifts modulo 2**32, so the same on every platform; for one seed it is
    a bijection.

    Args:
      key: uint32, any shape.
      seed: from 0 to 2**32 - 1.

    Returns:
      uint32 in the shape of `key`.

    References:
      Appleby, *MurmurHash3*, 2011.

    Examples:
      >>> import jax.numpy as jnp
      >>> murmur3(jnp.array([0, 1], jnp.uint32)).tolist()
      [593689054, 4226891818]
    """
    u = jnp.uint32
    turned = lambda x, by: (x << u(by)) | (x >> u(32 - by))
    k = turned(key.astype(u) * u(0xCC9E2D51), 15) * u(0x1B873593)
    h = turned(u(seed) ^ k, 13) * u(5) + u(0xE6546B64)
    h = h ^ u(4)  # the length of a key
    h = (h ^ (h >> u(16))) * u(0x85EBCA6B)
    h = (h ^ (h >> u(13))) * u(0xC2B2AE35)
    return h ^ (h >> u(16))


def bucket_and_sign(index: jax.Array, buckets: int, seed: int) -> tuple[jax.Array, jax.Array]:
    """The bucket of each weight, int32, and its sign, float32, by its index.

    Of the 32 bits of the hash the first is the sign; the others, modulo the number of buckets, are
    the bucket. So both are independent, and two buckets differ in probability by 2**-31 at most.

    Examples:
      >>> import jax.numpy as jnp
      >>> bucket, sign = bucket_and_sign(jnp.arange(4, dtype=jnp.uint32), 3, 0)
      >>> bucket.tolist(), sign.tolist()
      ([1, 2, 2, 2], [1.0, -1.0, 1.0, 1.0])
    """
    h = murmur3(index, seed)
    bucket = (h & jnp.uint32(0x7FFFFFFF)) % jnp.uint32(max(1, buckets))
    return bucket.astype(jnp.int32), jnp.where(h >> jnp.uint32(31), -1.0, 1.0).astype(jnp.float32)


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """How far apart in row-major order neighbours along each axis lie.

    Examples:
      >>> row_major((2, 3, 4))
      (12, 4, 1)
    """
    return tuple(math.prod(shape[a + 1 :]) for a in range(len(shape)))


@register_array(
    "hashed",
    children=("values",),
    static=("weight_shape", "strides", "seed"),
    trainable=("values",),
    inner=("values",),
)
class HashedArray(CompressedArray):
    """`w[i] = xi(i) * values[h(i)]`: a hash of the index tells which value, and its sign.

    i is the index in row-major order, `h` and `xi` are `bucket_and_sign`. Neither is stored but for
    the seed, so that n weights take the K values alone. The values are trainable; the gradient of
    one is the signed sum over its weights, taken in float32 whatever their dtype.

    A contraction runs on the dense array in one deferred product, rows that are looked up are
    computed alone, and a transpose moves the strides. Each weight of a stack has values of its own
    and all share one hash. The leaf is its own storage form.

    Attributes:
      values: `[*batch, K]`, an array or a leaf.
      weight_shape: the shape of one weight, without the batch axes.
      strides: by how much the index grows along each of its axes.
      seed: of the hash, from 0 to 2**32 - 1.

    References:
      Chen, Wilson, Tyree, Weinberger and Chen, *Compressing Neural Networks with the Hashing
      Trick*, 2015.

    Examples:
      >>> import jax.numpy as jnp
      >>> leaf = HashedArray.of(jnp.array([1.0, 2.0, 3.0]), (2, 2))
      >>> leaf, leaf.materialize().tolist()
      (HashedArray(float32[2, 2], hashed 3), [[2.0, -3.0], [3.0, 3.0]])
    """

    values: Any
    weight_shape: tuple[int, ...]
    strides: tuple[int, ...]
    seed: int

    @classmethod
    def of(cls, values: Any, weight_shape: Sequence[int], *, seed: int = 0) -> HashedArray:
        """The leaf of a table of values, for weights of a shape.

        Raises:
          SpecError: for a table without values, a seed that is none, or weights that 32 bits do not
            number.
        """
        shape = tuple(int(n) for n in weight_shape)
        if values.ndim < 1 or (values.shape[-1] == 0 and math.prod(shape)):
            raise SpecError(
                f"values of shape {tuple(values.shape)}: write [*batch, K], K at least 1"
            )
        if not 0 <= seed < 2**32:
            raise SpecError(f"seed={seed}: write a whole number from 0 to 2**32 - 1")
        if math.prod(shape) > 2**32:
            raise SpecError(f"a weight of shape {shape} has more places than 32 bits; split it")
        return cls(values, shape, row_major(shape), int(seed))

    @property
    def batch_ndim(self) -> int:
        return self.values.ndim - 1

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.values.shape[:-1], *self.weight_shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.values.dtype)

    @property
    def buckets(self) -> int:
        """The number of values K of one weight."""
        return int(self.values.shape[-1])

    def indices(self) -> jax.Array:
        """The index that is hashed for each place of one weight, uint32."""
        index = jnp.zeros(self.weight_shape, jnp.uint32)
        for axis, stride in enumerate(self.strides):
            step = lax.broadcasted_iota(jnp.uint32, self.weight_shape, axis)
            index = index + step * jnp.uint32(stride % 2**32)
        return index

    def at(self, index: jax.Array) -> jax.Array:
        """The weights of some indices, `[*batch, *index.shape]`."""
        bucket, sign = bucket_and_sign(index, self.buckets, self.seed)
        values = materialize(self.values)
        wide = values
        if values.dtype.itemsize < 4:
            # The same values; the transpose of the look-up then sums in float32.
            wide = values.astype(np.float32)
        look_up = compat.look_up
        for _ in range(self.batch_ndim):
            look_up = jax.vmap(look_up, (0, None))
        return (look_up(wide, bucket) * sign.astype(wide.dtype)).astype(values.dtype)

    def materialize(self, key: jax.Array | None = None) -> jax.Array:
        if not self.size:
            return jnp.zeros(self.shape, self.dtype)
        return self.at(self.indices())

    def astype(self, dtype: Any) -> CompressedArray | None:
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        return self.replace(values=cast(self.values, dtype))  # a sign commutes with rounding

    def describe(self) -> str:
        inner = f" of {self.values.describe()}" if is_compressed(self.values) else ""
        return f"hashed {self.buckets}{inner}"


@register_rule(HashedArray, "transpose")
def _transpose(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    leaf, order = operands[i], params["permutation"]
    batch = leaf.batch_ndim
    if tuple(order[:batch]) != tuple(range(batch)):
        return NotImplemented
    moved = [a - batch for a in order[batch:]]
    return leaf.replace(
        weight_shape=tuple(leaf.weight_shape[a] for a in moved),
        strides=tuple(leaf.strides[a] for a in moved),
    )


@register_rule(HashedArray, "reshape")
def _reshape(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    """Axes that lie in row-major order may be merged and split; those of the batch stay."""
    leaf, shape = operands[i], tuple(params["new_sizes"])
    batch = leaf.batch_ndim
    fits = (
        params.get("dimensions") is None
        and leaf.strides == row_major(leaf.weight_shape)
        and leaf.size
        and shape[:batch] == leaf.shape[:batch]
        and math.prod(shape[batch:]) == math.prod(leaf.weight_shape)
    )
    if not fits:
        return NotImplemented
    return leaf.replace(weight_shape=shape[batch:], strides=row_major(shape[batch:]))


@register_rule(HashedArray, "gather")
def _gather(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    """Rows of a table: only their own places are hashed."""
    leaf = operands[0]
    rows = plain_rows(leaf, operands, params) if i == 0 else None
    if rows is None:
        return NotImplemented
    place = leaf.replace(weight_shape=leaf.weight_shape[1:], strides=leaf.strides[1:]).indices()
    start = rows.number.astype(jnp.uint32) * jnp.uint32(leaf.strides[0])
    return rows.filled(leaf.at(start.reshape(*start.shape, *(1,) * place.ndim) + place))
