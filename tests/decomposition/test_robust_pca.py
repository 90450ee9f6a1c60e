"""Robust PCA: recovery in the published regime, against plain numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import SpecError
from jaxcompress.decomposition.robust_pca import robust_pca

run = jax.jit(robust_pca)


def planted(seed, m, n, rank, share):
    """As in section 4.1 of Candes et al.: Gaussian factors of variance 1/n, signs of one."""
    rng = np.random.default_rng(seed)
    low = rng.normal(size=(m, rank)) @ rng.normal(size=(rank, n)) / np.sqrt(m * n)
    sparse = np.zeros(m * n)
    count = round(share * m * n)
    sparse[rng.choice(m * n, count, replace=False)] = rng.choice([-1.0, 1.0], count)
    return low, sparse.reshape(m, n)


def straightforward(w, iterations=60, growth=1.5):
    """The inexact ALM of Lin, Chen and Ma, algorithm 5."""
    lam, norm = 1 / np.sqrt(max(w.shape)), np.linalg.norm(w, 2)
    y, s, mu = w / max(norm, np.abs(w).max() / lam), np.zeros_like(w), 1.25 / norm
    for _ in range(iterations):
        u, values, v = np.linalg.svd(w - s + y / mu, full_matrices=False)
        low = (u * np.maximum(values - 1 / mu, 0)) @ v
        away = w - low + y / mu
        s = np.sign(away) * np.maximum(np.abs(away) - lam / mu, 0)
        y, mu = y + mu * (w - low - s), min(mu * growth, 1e7 * 1.25 / norm)
    return low, s


@pytest.mark.parametrize("share", [0.05, 0.1])
def test_both_parts_are_recovered(share):
    """The paper: rank 0.05 n, supports of 0.05 and 0.1 n**2, recovered exactly at n = 500."""
    low, sparse = planted(0, 60, 60, 3, share)
    found = run(jnp.asarray(low + sparse, jnp.float32))
    assert int(found.rank) == 3
    # It stops at 1e-6 |w|, and |w| is some ten times |low|.
    assert np.linalg.norm(found.low_rank - low) < 1e-4 * np.linalg.norm(low)
    assert np.array_equal(np.abs(found.sparse) > 1e-3, sparse != 0)
    np.testing.assert_allclose(found.sparse, sparse, atol=1e-4)
    assert float(found.residual) <= 1e-6
    want_low, want_sparse = straightforward(low + sparse)
    np.testing.assert_allclose(found.low_rank, want_low, atol=1e-4)
    np.testing.assert_allclose(found.sparse, want_sparse, atol=1e-4)


def test_what_is_no_sum_of_such_is_split_as_in_numpy():
    """Gaussian noise: nothing to recover, and both stop at the same optimum nearly."""
    w = np.random.default_rng(1).normal(size=(60, 60))
    found, want = run(jnp.asarray(w, jnp.float32)), straightforward(w)
    # The penalty grows each iteration, so that rounding in float32 is not forgotten again.
    assert np.linalg.norm(found.low_rank - want[0]) < 1e-3 * np.linalg.norm(want[0])
    objective = lambda low, sparse: np.linalg.norm(low, "nuc") + np.abs(sparse).sum() / np.sqrt(60)
    ours = objective(np.asarray(found.low_rank), np.asarray(found.sparse))
    np.testing.assert_allclose(ours, objective(*want), rtol=1e-4)


def test_a_stack_is_split_one_by_one_and_scales_do_not_matter():
    pairs = [planted(seed, 60, 60, 3, 0.05) for seed in (2, 3)]
    w = jnp.asarray(np.stack([a + b for a, b in pairs] + [np.zeros((60, 60))]), jnp.float32)
    found = run(w)
    assert found.rank.tolist() == [3, 3, 0]
    assert found.iterations[2] == 0
    for i, (low, _) in enumerate(pairs):
        np.testing.assert_allclose(found.low_rank[i], low, atol=1e-5)
    for factor in (2.0**-100, 2.0**100):  # powers of two: the very same bits but for the exponent
        scaled = run(w * factor)
        np.testing.assert_array_equal(scaled.sparse, found.sparse * factor)


def test_other_shapes_and_dtypes():
    wide = run(jnp.ones((3, 7), jnp.bfloat16))
    assert wide.low_rank.dtype == jnp.bfloat16
    assert (wide.low_rank.shape, int(wide.rank)) == ((3, 7), 1)
    np.testing.assert_allclose(wide.low_rank.astype(jnp.float32), 1.0, rtol=2**-7)
    empty = robust_pca(jnp.ones((2, 0, 3)))
    assert empty.low_rank.shape == (2, 0, 3)
    assert empty.rank.shape == (2,)


def test_settings_that_cannot_be():
    w = jnp.ones((3, 3))
    for wrong in ({"weight": 0}, {"growth": 1.0}, {"tolerance": 0.0}, {"max_iterations": 0}):
        with pytest.raises(SpecError, match=next(iter(wrong))):
            robust_pca(w, **wrong)
    with pytest.raises(SpecError, match="floating matrices"):
        robust_pca(jnp.ones(3))
