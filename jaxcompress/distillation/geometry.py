"""Lengths and directions of vectors, safe at zero and at the ends of the range of float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcompress.numerics import unit_scale

# What is smaller counts as zero: the gradient of a direction is one over the length.
_TINY = 2.0**-100


def product(subscripts: str, *operands: jax.Array) -> jax.Array:
    """`einsum` without the rounding of operands that accelerators do by default."""
    return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)


def bounded(x: jax.Array, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """`x` by a constant power of two, the largest along the axes then between 1 and 2.

    For what does not change with the scale of x: so that squares neither overflow nor vanish.

    Examples:
      >>> import jax.numpy as jnp
      >>> bounded(jnp.array([3.0, -6.0])).tolist()
      [0.75, -1.5]
    """
    return x * _scales(x, axis)[1]


def _scales(x: jax.Array, axis: int | tuple[int, ...] | None) -> tuple[jax.Array, jax.Array]:
    largest = jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axis=axis, keepdims=True, initial=_TINY)
    return unit_scale(largest)


def unit(x: jax.Array) -> jax.Array:
    """The vectors of the last axis over their lengths; a zero vector stays, with no gradient.

    Examples:
      >>> import jax.numpy as jnp
      >>> [round(float(v), 3) for v in unit(jnp.array([3e30, 4e30]))]
      [0.6, 0.8]
      >>> unit(jnp.zeros(2)).tolist()
      [0.0, 0.0]
    """
    x = bounded(x, -1)
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    some = squares >= 1  # the square of the largest, unless all are tiny
    return jnp.where(some, x, 0.0) / jnp.sqrt(jnp.where(some, squares, 1.0))


def length(x: jax.Array, p: float = 2.0) -> jax.Array:
    """The p-norm along the last axis, whose gradient at zero is zero.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> float(length(jnp.array([3.0, 4.0])))
      5.0
      >>> float(jax.grad(length)(jnp.zeros(2))[0])
      0.0
    """
    scale, inverse = _scales(x, -1)
    total = jnp.sum(power(x * inverse, p), axis=-1)
    some = total > 0
    root = jnp.where(some, total, 1.0) ** (1 / p) if p != 2 else jnp.sqrt(jnp.where(some, total, 1))
    return jnp.where(some, root, 0.0) * scale[..., 0]


def power(x: jax.Array, p: float) -> jax.Array:
    """`|x|**p` for `p >= 1`, whose gradient at zero is zero."""
    if p == 2:
        return jnp.square(x)
    size = x * jax.lax.stop_gradient(jnp.sign(x))
    if p == 1:
        return size
    some = size > 0
    return jnp.where(some, jnp.where(some, size, 1.0) ** p, 0.0)
