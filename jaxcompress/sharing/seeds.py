"""k-means++: starting centroids that are far from each other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

# A draw looks at all values that are left, k times: of more than these, at some.
SAMPLE = 2**16


def plus_plus(x: jax.Array, weights: jax.Array, k: int, key: jax.Array) -> jax.Array:
    """Draws k of the vectors, each with probability proportional to `h_i min_j |x_i - c_j|**2`.

    The first is drawn in proportion to h. Where all distances are zero the last vector with a
    weight is drawn again.

    Args:
      x: float32 `[n, d]`, n at least 1.
      weights: h, float32 `[n]`, not negative.
      k: how many; static.
      key: a random key.

    Returns:
      float32 `[k, d]`, in the order in which they were drawn.

    References:
      Arthur and Vassilvitskii, *k-means++: The Advantages of Careful Seeding*, 2007.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> x = jnp.array([[0.0], [0.0], [0.0], [9.0]])
      >>> sorted(plus_plus(x, jnp.ones(4), 2, jax.random.key(0)).ravel().tolist())
      [0.0, 9.0]
    """

    def draw(priority: jax.Array, uniform: jax.Array) -> jax.Array:
        below = jnp.cumsum(priority)
        # side="right" passes over what has no priority; rounding may reach the end.
        at = jnp.searchsorted(below, uniform * below[-1], side="right")
        return x[jnp.minimum(at, jnp.searchsorted(below, below[-1], side="left"))]

    def step(distance: jax.Array, uniform: jax.Array) -> tuple[jax.Array, jax.Array]:
        chosen = draw(weights * distance, uniform)
        away = jnp.sum(jnp.square(x - chosen), axis=1)
        return jnp.minimum(distance, away), chosen

    uniforms = jax.random.uniform(key, (k,))
    first = draw(weights, uniforms[0])
    distance = jnp.sum(jnp.square(x - first), axis=1)
    _, others = lax.scan(step, distance, uniforms[1:])
    return jnp.concatenate([first[None], others])
