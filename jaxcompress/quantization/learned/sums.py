"""Sums and means over what shares a scale, the same bits however a program is compiled.

A scale such as `mean|w|` is computed in every forward pass and once more when the leaf is
finalized. The order of a floating sum depends on the compiler and on how a weight lies on its
devices, and another last bit of a scale is another weight. So values are summed as integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.errors import CompressError
from jaxcompress.numerics import divide, in_groups, unit_scale
from jaxcompress.quantization.learned.straight import straight_through

# Bits of a value below the leading bit of the largest of its sum: two more than float32 has.
_FRACTION = 26


def exact_sum(x: jax.Array, axes: Sequence[int], group_size: int | None = None) -> jax.Array:
    """The sum of float32 values, each taken to 2**-26 of the largest one's power of two.

    The gradient is that of the plain sum.

    Args:
      x: floats of any shape.
      axes: the axes that are summed over, negative; with groups only the last of them.
      group_size: as in `affine_params`; the last group may be shorter.

    Returns:
      float32 in the shape of a scale: one along summed axes, one entry a group.

    Raises:
      CompressError: for a sum of 2**30 values or more.

    Examples:
      >>> import jax.numpy as jnp
      >>> exact_sum(jnp.array([1.0, 2.0, 4.0, 8.0, 16.0]), (-1,), 2).tolist()
      [3.0, 12.0, 16.0]
    """
    x, axes = _grouped(x.astype(jnp.float32), axes, group_size)
    total = straight_through(
        _integer_sum(jax.lax.stop_gradient(x), axes), jnp.sum(x, axes, keepdims=True)
    )
    return total if group_size is None else jnp.squeeze(total, axes[0])


def _integer_sum(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    n = math.prod(x.shape[a] for a in axes)
    if n >= 2**30:
        raise CompressError(f"{n} weights share a scale, which is too many; use group_size")
    unit, inverse = unit_scale(jnp.max(jnp.abs(x), axes, keepdims=True, initial=0))
    whole = jnp.round(x * inverse * 2.0**_FRACTION).astype(jnp.int32)  # below 2**29
    rest, width = jnp.abs(whole), 30 - max(0, n - 1).bit_length()  # n words: below 2**30
    total: Any = jnp.zeros((), jnp.float32)
    for shift in range(0, _FRACTION + 3, width):
        word = (rest >> shift) & (2**width - 1)
        part = jnp.sum(jnp.where(whole < 0, -word, word), axes, dtype=jnp.int32, keepdims=True)
        total = total + part.astype(jnp.float32) * 2.0 ** (shift - _FRACTION)
    return total * unit


def exact_mean(x: jax.Array, axes: Sequence[int], group_size: int | None = None) -> jax.Array:
    """`exact_sum` over the number of values.

    Examples:
      >>> import jax.numpy as jnp
      >>> exact_mean(jnp.array([[1.0, 2.0, 4.0]]), (-1,)).tolist()
      [[2.3333332538604736]]
    """
    return divide(exact_sum(x, axes, group_size), jnp.asarray(shared_by(x.shape, axes, group_size)))


def shared_by(shape: Sequence[int], axes: Sequence[int], group_size: int | None) -> np.ndarray:
    """How many weights share a scale, an array that broadcasts with the scales.

    Examples:
      >>> shared_by((5,), (-1,), 2).tolist()
      [2.0, 2.0, 1.0]
    """
    if group_size is None:
        return np.asarray(max(1, math.prod(shape[a] for a in axes)), np.float32)
    n = shape[axes[-1]]
    counts = np.diff([*range(0, n, group_size), n]).astype(np.float32)
    return counts.reshape((-1,) + (1,) * (-axes[-1] - 1))


def _grouped(
    x: jax.Array, axes: Sequence[int], group_size: int | None
) -> tuple[jax.Array, tuple[int, ...]]:
    """The array with zeros up to whole groups and an axis within each, and the axes to sum over."""
    if group_size is None:
        return x, tuple(axes)
    return in_groups(x, axes[-1], group_size), (axes[-1],)
