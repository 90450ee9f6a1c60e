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
    exponent = jax.lax.bitcast_convert_type(largest.astype(jnp.float32), jnp.uint32) >> 23
    exponent = jnp.clip(exponent, 1, 253)

    def power(exponent: jax.Array) -> Any:
        return jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)

    return power(exponent), power(254 - exponent)


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
