"""Small numerical steps that several methods share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def unit_scale(largest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A power of two near a magnitude, and its inverse, both exact and normal float32.

    Values of at most `largest` times the inverse are of magnitude below 8, so that they can be
    squared and summed; multiplying back loses nothing. A division by the magnitude itself would
    not do: a compiler may multiply by its inverse, which is subnormal above `2**126` and then
    reads as zero.

    Args:
      largest: non-negative float32 of any shape. Zero, like all below `2**-126`, gives `2**-126`.

    Examples:
      >>> import jax.numpy as jnp
      >>> [float(x) for x in unit_scale(jnp.float32(5.0))]
      [4.0, 0.25]
    """
    exponent = jnp.clip(exponent_of(largest.astype(jnp.float32)), -126, 126)
    return power_of_two(exponent), power_of_two(-exponent)


def exponent_of(x: jax.Array) -> jax.Array:
    """`floor(log2(x))` of float32 that is not negative, exactly; -127 for zero and subnormal ones.

    Examples:
      >>> import jax.numpy as jnp
      >>> exponent_of(jnp.array([1.0, 7.9, 0.0])).tolist()
      [0, 2, -127]
    """
    return (jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) - 127


def power_of_two(exponent: jax.Array) -> jax.Array:
    """`2.0**exponent` in float32, exactly, for exponents from -126 to 127; zero for -127.

    Examples:
      >>> import jax.numpy as jnp
      >>> power_of_two(jnp.array([-1, 3])).tolist()
      [0.5, 8.0]
    """
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def in_groups(x: jax.Array, axis: int, size: int | None, fill: float = 0.0) -> jax.Array:
    """An axis as two, of groups and of what is in them; the last one filled up where it is short.

    Args:
      x: any array.
      axis: the axis, negative.
      size: values in a group, at most all; None: one group of all, even if there are none.
      fill: what is put where there is nothing.

    Examples:
      >>> import jax.numpy as jnp
      >>> in_groups(jnp.arange(1, 6), -1, 2).tolist()
      [[1, 2], [3, 4], [5, 0]]
    """
    n, i = x.shape[axis], x.ndim + axis
    groups, size = (1, max(1, n)) if size is None else (None, max(1, min(size, n)))
    groups = -(-n // size) if groups is None else groups
    widths = [(0, groups * size - n if a == i else 0) for a in range(x.ndim)]
    x = jnp.pad(x, widths, constant_values=fill)
    return x.reshape(*x.shape[:i], groups, size, *x.shape[i + 1 :])


def stochastic_round(x: jax.Array, noise: jax.Array) -> jax.Array:
    """`floor(x) + (u < x - floor(x))` with u uniform in [0, 1): the mean is x.

    Whole numbers stay as they are, and a mean is off by at most the 2**-23 that u resolves;
    `floor(x + u)` would round a sum such as `126 + 0.9999999` up.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> x = jnp.full(10_000, 2.25)
      >>> y = stochastic_round(x, jax.random.uniform(jax.random.key(0), x.shape))
      >>> sorted({float(v) for v in y}), abs(float(y.mean()) - 2.25) < 0.02
      ([2.0, 3.0], True)
    """
    low = jnp.floor(x)
    return low + (noise < x - low)


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """`x` in another floating dtype, rounded even where it is cast back at once.

    A compiler may drop a cast to bfloat16 and back (`xla_allow_excess_precision`). What is
    computed from the result would then belong to other values than those that are stored.

    Examples:
      >>> import jax.numpy as jnp
      >>> float(rounded(jnp.float32(1.001), jnp.bfloat16))
      1.0
    """
    info = jnp.finfo(dtype)
    if info.nmant < jnp.finfo(x.dtype).nmant:
        x = jax.lax.reduce_precision(x, info.nexp, info.nmant)
    return x.astype(dtype)


def divide(x: jax.Array, by: jax.Array | float) -> jax.Array:
    """`x / by`, exactly rounded, compiled or not.

    XLA turns a division by a constant or by a broadcast array into a product with the inverse,
    which is off by one unit in the last place in one case of twenty; a compiled program
    would then give other codes or counts than the same one run step by step. It leaves alone a
    divisor that depends on `x`.

    Examples:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> x = jnp.float32(3.0)
      >>> jax.jit(lambda x: divide(x, 10.0))(x) == np.float32(3.0) / np.float32(10.0)
      Array(True, dtype=bool)
    """
    return x / jnp.where(x == 0, 1.0, by).astype(x.dtype)
