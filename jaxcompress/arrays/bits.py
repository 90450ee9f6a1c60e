"""Small integers packed densely into bytes, along any axis.

The layout, for codes of `bits` bits: `p = 8 / gcd(bits, 8)` codes fill exactly
`q = bits / gcd(bits, 8)` bytes. The packed axis is cut into blocks of `B` codes, `B` a multiple of
`p`; code `k*(B/p) + j` of a block (`0 <= k < p`, `0 <= j < B/p`) is the bits
`[bits*k, bits*k + bits)` of the little-endian `8*q`-bit word whose byte `r` lies at position
`r*(B/p) + j` of the block's `q*(B/p)` bytes. With `B = p` this is a plain little-endian bitstream;
with a larger `B` neighbouring codes lie in neighbouring bytes, and unpacking is `p` contiguous
shifts instead of an interleave. The axis is zero-padded to a multiple of `p`, and a last block that
is not full is a smaller block of the same form, so the packed length never depends on `B`.

Codes are unsigned; a signed code is stored with `2**(bits-1)` added.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.errors import SpecError


def period(bits: int) -> tuple[int, int]:
    """The smallest run of codes that ends on a byte: `(codes, bytes)`.

    Examples:
      >>> period(4), period(3), period(6)
      ((2, 1), (8, 3), (4, 3))
    """
    if not 1 <= bits <= 8:
        raise SpecError(f"codes have 1 to 8 bits, not {bits}")
    g = math.gcd(bits, 8)
    return 8 // g, bits // g


def packed_length(n: int, bits: int) -> int:
    """The number of bytes that `n` codes take along the packed axis.

    Examples:
      >>> packed_length(5, 4), packed_length(9, 3), packed_length(0, 7)
      (3, 6, 0)
    """
    p, q = period(bits)
    return -(-n // p) * q


def pack_bits(
    codes: jax.Array, bits: int, *, axis: int = -1, block: int | None = None
) -> jax.Array:
    """Packs unsigned codes densely along one axis.

    Args:
      codes: integers in `[0, 2**bits)`, of any shape and integer dtype.
      bits: the bits of a code, 1 to 8.
      axis: the axis to pack.
      block: the block length `B` of the layout, a multiple of `p`; None is `p`, a plain bitstream.

    Returns:
      A uint8 array with `packed_length(n, bits)` in place of the axis length `n`.

    Raises:
      SpecError: for an impossible bit count or block.

    Examples:
      >>> import jax.numpy as jnp
      >>> pack_bits(jnp.array([1, 2, 3]), 4).tolist()
      [33, 3]
    """
    axis = _negative(axis, codes.ndim)
    p, q = period(bits)
    codes = codes.astype(jnp.uint8)
    if bits == 8:
        return codes
    n = codes.shape[axis]
    pad = -n % p
    if pad:
        widths = [(0, 0)] * codes.ndim
        widths[axis] = (0, pad)
        codes = jnp.pad(codes, widths)
    return _by_blocks(codes, _pack, bits, axis, _check_block(block, p), p, q)


def unpack_bits(
    words: jax.Array, bits: int, length: int, *, axis: int = -1, block: int | None = None
) -> jax.Array:
    """Undoes `pack_bits`.

    Args:
      words: the packed bytes, uint8.
      bits: the bits of a code, 1 to 8.
      length: the number of codes along the axis.
      axis: the packed axis.
      block: the block length that the codes were packed with.

    Returns:
      The codes, uint8 in `[0, 2**bits)`, with `length` in place of the packed length.

    Raises:
      SpecError: for an impossible bit count or block, or a length that does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> unpack_bits(jnp.array([33, 3], jnp.uint8), 4, 3).tolist()
      [1, 2, 3]
    """
    axis = _negative(axis, words.ndim)
    p, q = period(bits)
    if words.shape[axis] != packed_length(length, bits):
        raise SpecError(
            f"{length} codes of {bits} bits take {packed_length(length, bits)} bytes, "
            f"not {words.shape[axis]}"
        )
    if bits == 8:
        return words
    codes = _by_blocks(words, _unpack, bits, axis, _check_block(block, p) // p * q, q, p)
    return jax.lax.slice_in_dim(codes, 0, length, axis=codes.ndim + axis)


def _negative(axis: int, ndim: int) -> int:
    if not -ndim <= axis < ndim:
        raise SpecError(f"axis {axis} is out of range for {ndim} axes")
    return axis if axis < 0 else axis - ndim


def _check_block(block: int | None, p: int) -> int:
    block = p if block is None else block
    if block <= 0 or block % p:
        raise SpecError(f"a block is a positive multiple of {p} codes, not {block}")
    return block


def _by_blocks(
    x: jax.Array,
    fn: Callable[[jax.Array, int, int], jax.Array],
    bits: int,
    axis: int,
    block: int,
    rows: int,
    out_rows: int,
) -> jax.Array:
    """Applies `fn` to whole blocks viewed as `[..., blocks, rows, block/rows, *rest]`."""
    n = x.shape[axis]
    axis = x.ndim + axis
    lead, rest = x.shape[:axis], x.shape[axis + 1 :]

    def run(part: jax.Array, size: int) -> jax.Array:
        count = part.shape[axis] // size
        part = part.reshape(*lead, count, rows, size // rows, *rest)
        out = fn(part, bits, axis + 1)
        return out.reshape(*lead, count * (size // rows) * out_rows, *rest)

    whole = n // block * block
    parts = []
    if whole or not n:
        parts.append(run(jax.lax.slice_in_dim(x, 0, whole, axis=axis), block))
    if whole < n:
        parts.append(run(jax.lax.slice_in_dim(x, whole, n, axis=axis), n - whole))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


def _pack(codes: jax.Array, bits: int, axis: int) -> jax.Array:
    """`[..., p, J, *rest]` codes to `[..., q, J, *rest]` bytes, `p` at `axis`."""
    p, q = period(bits)
    if bits in (5, 7):
        return _pack_long(codes, bits, axis)
    dtype = jnp.uint8 if q == 1 else jnp.uint32  # three bytes at most
    shifted = codes.astype(dtype) << _steps(codes.ndim, axis, p, bits, dtype)
    if axis == codes.ndim - 2:
        # The last axis was cut. As a reduction this stays out of the loop that computes the codes,
        # which would otherwise run over the cut axis, value by value.
        word = jax.lax.reduce(shifted, np.zeros((), dtype), jax.lax.bitwise_or, (axis,))
        word = jnp.expand_dims(word, axis)
    else:
        word = functools.reduce(jnp.bitwise_or, _split(shifted, axis))
    if q == 1:
        return word
    return (word >> _steps(codes.ndim, axis, q, 8, dtype)).astype(jnp.uint8)


def _pack_long(codes: jax.Array, bits: int, axis: int) -> jax.Array:
    """`_pack` where a word has more than 32 bits, byte by byte."""
    p, q = period(bits)
    parts = _split(codes, axis)
    out = []
    for r in range(q):
        shifts = {k: bits * k - 8 * r for k in range(p) if -bits < bits * k - 8 * r < 8}
        fields = [parts[k] << s if s >= 0 else parts[k] >> -s for k, s in shifts.items()]
        out.append(functools.reduce(jnp.bitwise_or, fields))
    return jnp.concatenate(out, axis)


def _unpack(words: jax.Array, bits: int, axis: int) -> jax.Array:
    """`[..., q, J, *rest]` bytes to `[..., p, J, *rest]` codes, `q` at `axis`.

    Without a concatenation: a shift of a broadcast word is fused with what follows, and turned
    into vector code.
    """
    p, q = period(bits)
    if q == 1:
        return (words >> _steps(words.ndim, axis, p, bits, jnp.uint8)) & np.uint8(2**bits - 1)
    wide = [x.astype(jnp.uint32) for x in _split(words, axis)]
    join = lambda parts: functools.reduce(
        jnp.bitwise_or, [x << np.uint32(8 * i) for i, x in enumerate(parts)]
    )
    position = _steps(words.ndim, axis, p, bits, jnp.uint32)
    if q <= 4:
        codes = join(wide) >> position
    else:  # the first four bytes hold the first codes, the last four the others
        low, high = join(wide[:4]) >> position, join(wide[-4:]) >> (position - 8 * (q - 4))
        codes = jnp.where(position + bits <= 32, low, high)
    return (codes & np.uint32(2**bits - 1)).astype(jnp.uint8)


def _steps(ndim: int, axis: int, n: int, step: int, dtype: Any) -> jax.Array:
    """`[0, step, 2*step, ...]`, `n` of them along `axis` of `ndim` axes."""
    shape = [1] * ndim
    shape[axis] = n
    return jax.lax.broadcasted_iota(dtype, shape, axis) * np.asarray(step, dtype)


def _split(x: jax.Array, axis: int) -> list[jax.Array]:
    return [jax.lax.slice_in_dim(x, i, i + 1, axis=axis) for i in range(x.shape[axis])]
