"""Factors in blocks against those of LAPACK in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.layerwise.factor import cholesky, upper_inverse

EPS = float(np.finfo(np.float32).eps)


# One block, blocks of which one is not whole, and (slow) two halves.
@pytest.mark.parametrize("size", [1, 100, 300, pytest.param(1100, marks=pytest.mark.slow)])
def test_cholesky_and_inverse(size):
    x = np.random.default_rng(0).normal(size=(2 * size, size)) / np.sqrt(2 * size)
    matrix = (x.T @ x + 0.1 * np.eye(size)).astype(np.float32)
    exact = np.linalg.cholesky(matrix.astype(np.float64))
    root = jax.jit(cholesky)(jnp.asarray(matrix))
    cond = np.linalg.cond(matrix)
    # Backward stable: errors of the root are within K eps cond of its norm, and mostly far below.
    np.testing.assert_allclose(np.tril(root), exact, atol=np.sqrt(size) * EPS * cond)
    assert not np.triu(root, 1).any()
    inverse = upper_inverse(root.T)
    bound = np.sqrt(size) * EPS * cond * np.abs(np.linalg.inv(exact)).max()
    np.testing.assert_allclose(inverse, np.linalg.inv(exact.T), atol=bound)


@pytest.mark.parametrize("size", [50, 200])
def test_what_has_no_factor_is_nan(size):
    matrix = jnp.eye(size).at[size - 1, size - 1].set(-1.0)
    assert not bool(jnp.isfinite(jnp.diagonal(cholesky(matrix))).all())
