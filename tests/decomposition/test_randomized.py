"""Leading singular directions against numpy's SVD in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.decomposition.randomized import randomized_svd, svd
from jaxcompress.decomposition.svd import truncated_svd
from jaxcompress.errors import SpecError

EPS = np.finfo(np.float32).eps
N = 560  # enough for a filtered subspace at rank 40, and for `truncated_svd` to use it
SPECTRA = {
    "flat": lambda k: np.ones(k),
    "uniform": lambda k: np.linspace(1, 0, k),
    "root": lambda k: np.arange(1, k + 1) ** -0.5,
    "inverse": lambda k: 1.0 / np.arange(1, k + 1),
    "exponential": lambda k: np.exp(-np.arange(k) / 10.0),
    "planted": lambda k: (np.arange(k) < 30) * 1.0,
}
solve = jax.jit(lambda w: svd(w, 40))


def matrix(m, n, singular, seed=0):
    rng = np.random.default_rng(seed)
    k = min(m, n)
    u = np.linalg.qr(rng.normal(size=(m, k)))[0]
    v = np.linalg.qr(rng.normal(size=(n, k)))[0]
    return ((u * singular) @ v.T).astype(np.float32)


def excess(w, product, rank):
    """The error over the least one, relative to it, and what rounding may add to it."""
    w = np.asarray(w, np.float64)
    s = np.linalg.svd(w, compute_uv=False)
    best = np.sqrt(np.sum(s[rank:] ** 2))
    error = np.linalg.norm(w - np.asarray(product, np.float64))
    return error - best * (1 + 1e-5) - 8 * EPS * np.linalg.norm(w)


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.thin(6)
def test_error_is_within_1e_5_of_the_least(kind):
    w = matrix(N, N, SPECTRA[kind](N))
    u, s, vt = (np.asarray(x, np.float64) for x in solve(jnp.asarray(w)))
    assert excess(w, (u * s) @ vt, 40) <= 0
    np.testing.assert_allclose(u.T @ u, np.eye(40), atol=40 * EPS)
    np.testing.assert_allclose(vt @ vt.T, np.eye(40), atol=40 * EPS)
    assert np.all(np.diff(s) <= 0)
    exact = np.linalg.svd(w.astype(np.float64), compute_uv=False)[:40]
    # A subspace with an error of 1e-5 in all may be off by more in the last single value.
    np.testing.assert_allclose(s, exact, atol=2e-3 * exact[-1] + 20 * EPS * exact[0])


@pytest.mark.parametrize(("m", "n", "rank"), [(30, 20, 20), (20, 30, 7), (1, 5, 1), (9, 1, 1)])
@pytest.mark.thin(4)
def test_small_matrices_and_full_rank(m, n, rank):
    w = matrix(m, n, np.linspace(2, 1, min(m, n)))
    u, s, vt = svd(jnp.asarray(w), rank)
    assert (u.shape, s.shape, vt.shape) == ((m, rank), (rank,), (rank, n))
    assert excess(w, (u * s) @ vt, rank) <= 8 * EPS * np.linalg.norm(w)


def test_truncated_svd_of_a_large_matrix():
    for kind in ("uniform", "inverse"):
        w = matrix(600, N, SPECTRA[kind](N))
        left, right = truncated_svd(jnp.asarray(w), 40)
        product = np.asarray(left, np.float64) @ np.asarray(right, np.float64)
        assert excess(w, product, 40) <= 0


@pytest.mark.parametrize("power", [0, 2])
def test_randomized_error_is_within_its_expectation(power):
    w = matrix(60, 50, np.arange(1, 51) ** -1.0)
    least = np.sum(np.arange(11, 51) ** -2.0)
    squares = []
    for seed in range(8):
        left, right = randomized_svd(
            jnp.asarray(w), 10, oversample=8, power=power, key=jax.random.key(seed)
        )
        squares.append(np.sum((w - np.asarray(left @ right)) ** 2))
    # Halko et al., theorem 10.5, for the projection on all 18 columns, cut to 10 after it:
    # the cut adds at most the least error once more (theorem 9.3 in squares).
    assert np.mean(squares) <= least * (1 + 10 / 7 + 1)
    assert np.min(squares) >= least * (1 - 1e-4)
    if power:
        # (s_19 / s_10)**(2 power) times the excess without power is 8% of it.
        assert np.mean(squares) <= least * 1.02


def test_factors_are_balanced():
    w = matrix(40, 30, np.linspace(3, 1, 30))
    left, right = (np.asarray(x, np.float64) for x in randomized_svd(jnp.asarray(w), 6))
    np.testing.assert_allclose(left.T @ left, right @ right.T, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_zeros_scales_and_half_precision(scale):
    w = matrix(20, 15, SPECTRA["planted"](15)) * np.float32(scale)
    u, s, vt = (np.asarray(x, np.float64) for x in svd(jnp.asarray(w), 15))
    np.testing.assert_allclose((u * (s / scale)) @ vt, w / np.float32(scale), atol=1e-5)
    for out in (*svd(jnp.zeros((6, 4)), 2), *randomized_svd(jnp.zeros((6, 4)), 2)):
        assert bool(jnp.all(jnp.isfinite(out)))
    half = jnp.asarray(w / np.float32(scale), jnp.bfloat16)
    assert svd(half, 2)[0].dtype == randomized_svd(half, 2)[1].dtype == jnp.bfloat16


def test_bad_input_is_refused():
    for call in (
        lambda: svd(jnp.ones((3, 4)), 4),
        lambda: svd(jnp.ones((2, 3, 4)), 1),
        lambda: randomized_svd(jnp.ones((3, 4)), 0),
        lambda: randomized_svd(jnp.ones((3, 4), int), 1),
    ):
        with pytest.raises(SpecError, match=r"write|cast"):
            call()
