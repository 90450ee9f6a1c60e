"""Gradients of shared values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_centroids_gradient_counts_all_weights_that_share_it(dtype):
    w = jax.random.normal(jax.random.key(0), (256, 250)).astype(dtype)
    leaf = jc.Codebook(2)(w)
    counts = np.bincount(np.asarray(leaf.indices.materialize()).ravel(), minlength=4)
    trainable, rest = jc.partition({"w": leaf})

    def total(t):
        run = jc.compressed(lambda p: p["w"].astype(jnp.float32).sum())
        return run(jc.combine(t, rest))

    grad = jax.grad(total)(trainable)["w"].centroids
    assert grad.dtype == dtype
    # Counted in float32 and rounded once; a bfloat16 sum of ones would stop at 256.
    np.testing.assert_allclose(
        grad.astype(jnp.float32), counts, rtol=float(jnp.finfo(dtype).eps) / 2
    )
