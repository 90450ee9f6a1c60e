"""Interim; the owner of this file replaces it."""
import jax, jax.numpy as jnp
def assign(values, centroids):
    c = centroids.astype(jnp.float32)
    return jnp.searchsorted((c[1:] + c[:-1]) / 2, values.astype(jnp.float32)).astype(jnp.uint8)
def kmeans_1d(values, k, *, init="linear", iterations=50, tol=0.0, key=None):
    v = values.reshape(-1).astype(jnp.float32)
    c = jnp.linspace(v.min(), v.max(), k)
    def step(_, c):
        a = assign(v, c)
        n = jax.ops.segment_sum(jnp.ones_like(v), a, k); s = jax.ops.segment_sum(v, a, k)
        return jnp.where(n > 0, s / jnp.maximum(n, 1), c)
    return jax.lax.fori_loop(0, iterations, step, c)
