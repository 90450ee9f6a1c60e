"""`quantize_gradient`: the gradient that flows back through a value, of few bits."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.errors import SpecError
from jaxcompress.specs import is_count


def quantize_gradient(x: jax.Array, key: jax.Array, bits: int) -> jax.Array:
    """The same value, whose gradient is rounded at random to `2**bits` levels on the way back.

        dx = 2 m (round(n (d / (2 m) + 1/2) + u) / n - 1/2),   n = 2**bits - 1

    with d the gradient that arrives, m the largest `|d|` of its example (over all axes but the
    first) and u uniform in [-1/2, 1/2), clipped to the n + 1 levels. So the mean of dx is d.

    Args:
      x: a floating array, the first axis that of examples; one without axes is an example.
      key: a random key; give another one at each step and place.
      bits: 1 to 16.

    Returns:
      `x`.

    Raises:
      SpecError: for other bits.

    References:
      Zhou et al., *DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low
      Bitwidth Gradients*, 2016.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> fn = lambda x: x * jnp.array([3.0, -3.0])
      >>> loss = lambda x: jnp.sum(fn(quantize_gradient(x, jax.random.key(0), 1)))
      >>> jax.grad(loss)(jnp.ones((1, 2))).tolist()
      [[3.0, -3.0]]
    """
    if not is_count(bits, 1, 16):
        raise SpecError(f"bits={bits!r}: write a whole number from 1 to 16")
    return _quantized(int(bits), x, key)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _quantized(bits: int, x: jax.Array, key: jax.Array) -> jax.Array:
    return x


def _forward(bits: int, x: jax.Array, key: jax.Array) -> Any:
    return x, key


def _backward(bits: int, key: jax.Array, d: jax.Array) -> Any:
    wide = d.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=tuple(range(1, d.ndim)), keepdims=True, initial=0.0)
    levels = 2**bits - 1
    u = jax.random.uniform(key, d.shape, jnp.float32, -0.5, 0.5)
    share = wide / jnp.where(largest == 0, 1.0, 2 * largest)
    code = jnp.clip(jnp.round(levels * (share + 0.5) + u), 0, levels)
    # Halves of the levels are divided first, so that the outermost are exactly +-largest.
    out = largest * ((2 * code - levels) / levels)
    return out.astype(d.dtype), None


_quantized.defvjp(_forward, _backward)
