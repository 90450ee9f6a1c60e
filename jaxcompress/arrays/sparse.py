"""Sparse arrays: the kept values and where they lie."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import (
    CompressedArray,
    cast,
    is_compressed,
    materialize,
    register_array,
)
from jaxcompress.arrays.bits import period
from jaxcompress.arrays.layout import Layout, Mask
from jaxcompress.arrays.packed import PackedArray
from jaxcompress.errors import SpecError


@register_array(
    "sparse",
    children=("values", "index"),
    static=("weight_shape", "layout"),
    trainable=("values",),
    inner=("values",),
)
class SparseArray(CompressedArray):
    """The nonzero values of a weight in row-major order, and a bit mask or gaps that place them.

    Layout `bitmask`: `index` holds one bit per weight, so n/8 bytes. Layout `gaps`: `index` holds,
    for each kept value, the number of zeros before it since the last one, in a few bits; the
    largest code `e` is an escape that skips e zeros and holds no value. `from_mask` picks
    the smaller of the two. Each weight of a stack keeps the same number of values.

    Attributes:
      values: `[*batch, kept]`, an array or a leaf.
      index: a `PackedArray`, `[*batch, n]` bits or `[*batch, entries]` gaps.
      weight_shape: the shape of one weight, without the batch axes.
      layout: `bitmask` or `gaps`.

    References:
      Han, Mao and Dally, *Deep Compression*, 2016 (relative indices with escapes).

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> w = jnp.array([[0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, -1.0]])
      >>> leaf = jc.SparseArray.from_mask(w, w != 0)
      >>> leaf, leaf.kept, bool((leaf.materialize() == w).all())
      (SparseArray(float32[2, 4], 75% sparse bitmask), 2, True)
    """

    values: Any
    index: Any
    weight_shape: tuple[int, ...]
    layout: str

    @classmethod
    def from_mask(cls, w: Any, mask: Any, *, batch_ndim: int = 0) -> SparseArray:
        """Stores `w` where `mask` is true, in the smaller layout; concrete arrays only.

        Raises:
          SpecError: when the weights of a stack keep different numbers of values.
        """
        kept = np.unique(np.asarray(jnp.sum(mask, axis=tuple(range(batch_ndim, w.ndim)))))
        if len(kept) > 1:
            raise SpecError(
                f"the weights of a stack keep {kept.tolist()} values; they must keep equally many"
            )
        count = int(kept[0]) if len(kept) else 0
        return encode(w, mask, count, best_layout(mask, count, batch_ndim), batch_ndim)

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
    def kept(self) -> int:
        """The number of values kept in one weight."""
        return self.values.shape[-1]

    @property
    def sparsity(self) -> float:
        """The share of values that are zero."""
        n = math.prod(self.weight_shape)
        return 1 - self.kept / n if n else 0.0

    def materialize(self, key: jax.Array | None = None) -> jax.Array:
        place = _from_bitmask if self.layout == "bitmask" else _from_gaps
        size = math.prod(self.weight_shape)
        escape = 2**self.index.bits - 1

        def one(values: jax.Array, index: jax.Array) -> jax.Array:
            return place(values, index, size, escape).reshape(self.weight_shape)

        for _ in range(self.batch_ndim):
            one = jax.vmap(one)
        return one(materialize(self.values), materialize(self.index))

    def mask(self) -> jax.Array:
        """Where the kept values lie, as booleans in the shape of the dense array."""
        ones = self.replace(values=jnp.ones(self.values.shape, jnp.uint8))
        return ones.materialize().astype(bool)

    def astype(self, dtype: Any) -> CompressedArray | None:
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        return self.replace(values=cast(self.values, dtype))

    def layouts(self) -> dict[str, Layout]:
        index = self.index
        size = math.prod(self.weight_shape)
        width = self.weight_shape[-1] if self.weight_shape else 1
        plain = isinstance(index, PackedArray) and (index.axis, index.block) == (
            -1,
            period(index.bits)[0],
        )
        if not plain or not size:
            return {}
        gaps = (index.bits, index.length) if self.layout == "gaps" else (0, 0)
        return {"index": Mask(width, size, *gaps)}

    def describe(self) -> str:
        inner = f" of {self.values.describe()}" if is_compressed(self.values) else ""
        return f"{100 * self.sparsity:.3g}% sparse {self.layout}{inner}"


def _from_bitmask(values: jax.Array, mask: jax.Array, size: int, escape: int) -> jax.Array:
    if not values.size:
        return jnp.zeros(size, values.dtype)
    rank = jnp.cumsum(mask.astype(jnp.int32)) - 1
    spread = values.at[rank].get(mode="clip")
    return jnp.where(mask.astype(bool), spread, jnp.zeros((), values.dtype))


def _from_gaps(values: jax.Array, gaps: jax.Array, size: int, escape: int) -> jax.Array:
    out = jnp.zeros(size, values.dtype)
    if not values.size:
        return out
    holds = gaps != escape
    steps = gaps.astype(jnp.int32) + holds.astype(jnp.int32)
    position = jnp.cumsum(steps) - 1
    rank = jnp.cumsum(holds.astype(jnp.int32)) - 1
    spread = values.at[rank].get(mode="clip")
    # Entries that hold no value are sent out of bounds, where a scatter drops them.
    where = jnp.where(holds, position, size)
    return out.at[where].set(spread, mode="drop")


def _gaps(mask: jax.Array, kept: int) -> jax.Array:
    """The number of zeros before each kept value since the last one."""
    (where,) = jnp.nonzero(mask.reshape(-1), size=kept, fill_value=0)
    return jnp.diff(where, prepend=-1) - 1


def _entries(mask: jax.Array, kept: int) -> jax.Array:
    """Entries needed with gaps of 2 to 8 bits, `[7]`: a value each, plus the escapes."""
    gaps = _gaps(mask, kept)
    return jnp.stack([kept + jnp.sum(gaps // (2**bits - 1)) for bits in range(2, 9)])


def best_layout(mask: jax.Array, kept: int, batch_ndim: int) -> tuple[str, int, int]:
    """The smallest layout of a concrete mask: its name, bits per entry and number of entries."""
    size = math.prod(mask.shape[batch_ndim:])
    best = (size, "bitmask", 1, size)
    if size >= 2**31:
        raise SpecError(f"a weight of {size} values is too large for 32-bit positions; split it")
    if kept and math.prod(mask.shape):
        count = jax.jit(jax.vmap(_entries, (0, None)), static_argnums=1)
        entries = np.asarray(count(mask.reshape(-1, size), kept)).max(axis=0)
        # A few spare entries let leaves of one shape share a compiled encoder.
        entries = -(-entries // 64) * 64
        best = min(
            best,
            *((int(n) * bits, "gaps", bits, int(n)) for bits, n in zip(range(2, 9), entries)),
        )
    return best[1:]


def encode(
    w: jax.Array, mask: jax.Array, kept: int, layout: tuple[str, int, int], batch_ndim: int
) -> SparseArray:
    """Stores `w` at the `kept` true places of `mask`; jittable, everything but arrays static."""
    name, bits, entries = layout
    weight_shape = tuple(w.shape[batch_ndim:])
    size = math.prod(weight_shape)

    def one(w: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        w, mask = w.reshape(-1), mask.reshape(-1)
        (where,) = jnp.nonzero(mask, size=kept, fill_value=0)
        if name == "bitmask":
            return w[where], mask.astype(jnp.uint8)
        escape = 2**bits - 1
        gaps = _gaps(mask, kept)
        last = jnp.cumsum(gaps // escape + 1) - 1
        # Everything that is not a value is an escape, the spare entries at the end as well.
        codes = jnp.full(entries, escape, jnp.uint8)
        return w[where], codes.at[last].set((gaps % escape).astype(jnp.uint8), mode="drop")

    for _ in range(batch_ndim):
        one = jax.vmap(one)
    if not size or not math.prod(w.shape):
        batch = w.shape[:batch_ndim]
        values = jnp.zeros((*batch, kept), w.dtype)
        index = jnp.zeros((*batch, entries), jnp.uint8)
    else:
        values, index = one(w, mask)
    return SparseArray(values, PackedArray.pack(index, bits), weight_shape, name)
