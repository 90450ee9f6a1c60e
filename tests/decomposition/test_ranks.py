"""Ranks by variational Bayes against the free energy that they minimize, and on planted ranks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress import SpecError
from jaxcompress.decomposition.ranks import saving_rank, threshold, vbmf, vbmf_ranks


def planted(seed, m, n, rank, noise):
    rng = np.random.default_rng(seed)
    signal = rng.normal(size=(m, rank)) @ rng.normal(size=(rank, n))
    return signal + noise * rng.normal(size=(m, n))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("m", "n", "rank", "noise"),
    [(40, 60, 5, 0.3), (60, 40, 0, 1.0), (30, 300, 10, 0.5), (80, 80, 12, 1.0), (64, 48, 1, 1e-3)],
)
@pytest.mark.thin(8)
def test_a_planted_rank_is_found_and_so_is_the_noise(seed, m, n, rank, noise):
    w = planted(seed, m, n, rank, noise)
    found = vbmf(w)
    assert found.rank == rank
    # The variance of a mean of squares is 2 / (number of values); the noise in the planted
    # directions is in part taken for signal: r (m + n) of m n values at the most.
    slack = 5 * (2 / (m * n)) ** 0.5 + rank * (m + n) / (m * n)
    assert abs(found.noise / noise**2 - 1) < slack
    values = np.linalg.svd(w, compute_uv=False)
    assert np.all(found.values < values[:rank])  # shrunk
    known = vbmf(values, (m, n), noise=noise**2)
    assert known.rank == rank
    again = vbmf(values, (m, n))
    np.testing.assert_allclose(again.values, found.values, rtol=1e-6)


def part_of_free_energy(z, g, small, large, variance):
    """Of one component: twice the VB free energy, at the best prior variances.

    With posteriors N(a, sa I) of a column of A `[M]` and N(b, sb I) of B `[L]`:
    `M log(ca / sa) + L log(cb / sb) + (-2 a b g + (a^2 + M sa) (b^2 + L sb)) / variance`, where
    `ca = a^2 / M + sa` and `cb = b^2 / L + sb` are the best prior variances. The scale between A
    and B is free, so that `sa = 1`.
    """
    a, b, sb = z[0], z[1], np.exp(z[2])
    first, second = a**2 + large, b**2 + small * sb
    return (
        large * np.log(first / large)
        + small * np.log(second / (small * sb))
        + (-2 * a * b * g + first * second) / variance
    )


def least_part(g, small, large, variance):
    """Brute force over the posterior of one component; 0 is that of a component that is off."""
    starts = [
        (np.sqrt(g * s), np.sqrt(g / s), np.log(variance / (g * s + large) + 1e-9))
        for s in (1.0, 100.0)
    ]
    args = (g, small, large, variance)
    found = [scipy.optimize.minimize(part_of_free_energy, z, args, tol=1e-12) for z in starts]
    best = min(found, key=lambda x: x.fun)
    return (best.fun, best.x[0] * best.x[1]) if best.fun < 0 else (0.0, 0.0)


def test_it_is_the_least_free_energy_of_the_model_found_by_brute_force():
    small, large = 6, 9
    w = planted(4, small, large, 2, 0.4)
    values = np.linalg.svd(w, compute_uv=False)

    def free_energy(log):
        variance = np.exp(log)
        parts = sum(least_part(g, small, large, variance)[0] for g in values)
        return small * large * log + np.sum(values**2) / variance + parts

    found = vbmf(w)
    at = np.log(found.noise)
    grid = np.linspace(np.log(0.01), np.log(np.mean(w**2) * 1.5), 9)
    near = (at - 0.03, at - 0.01, at + 0.01, at + 0.03)
    # Some 54 / 2 * 0.01**2 / 2 above the least at the nearest, far above what the optimizer leaves.
    assert free_energy(at) + 1e-4 < min(free_energy(log) for log in (*grid, *near))
    parts = [least_part(g, small, large, found.noise) for g in values]
    assert sum(energy < 0 for energy, _ in parts) == found.rank == 2
    np.testing.assert_allclose([b for _, b in parts[:2]], found.values, rtol=1e-4)


@settings(max_examples=30, derandomize=True)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_transposes_and_scales_change_nothing_but_the_scale(m, n, seed, scale):
    w = planted(seed, m, n, min(2, m, n), 0.5)
    one, other, large = vbmf(w), vbmf(w.T), vbmf(w * scale)
    assert one.rank == other.rank == large.rank <= min(m, n)
    np.testing.assert_allclose(large.noise, one.noise * scale**2, rtol=1e-5)
    np.testing.assert_allclose(large.values, one.values * scale, rtol=1e-5)


def test_thresholds_are_the_published_ones():
    # tau is 2.5129 sqrt(alpha) to a few percent (Nakajima et al., 2013).
    for alpha in (1.0, 0.5, 0.1):
        tau, edge = threshold(alpha)
        assert abs(tau / (2.5129 * alpha**0.5) - 1) < 0.05
        assert abs(edge - (1 + tau) * (1 + alpha / tau)) < 1e-12
    assert abs(threshold(1.0)[0] - 2.5129) < 1e-4


def test_two_ranks_of_a_convolution():
    rng = np.random.default_rng(5)
    core = rng.normal(size=(3, 3, 4, 6))
    kernel = np.einsum("hwrs,ir,os->hwio", core, rng.normal(size=(24, 4)), rng.normal(size=(32, 6)))
    noisy = kernel + 0.3 * rng.normal(size=kernel.shape)
    assert vbmf_ranks(noisy) == (4, 6)
    assert vbmf_ranks(np.moveaxis(noisy, -1, 0), (-1, 0)) == (4, 6)
    assert vbmf_ranks(rng.normal(size=(3, 3, 8, 8))) == (1, 1)


def test_low_rank_by_variational_bayes():
    w = jnp.asarray(planted(6, 48, 40, 5, 0.3), jnp.float32)
    assert jc.LowRank("vbmf")(w).rank == 5
    stack = jnp.stack([w, jnp.asarray(planted(7, 48, 40, 7, 0.3), jnp.float32)])
    assert jc.LowRank("vbmf")(stack).rank == 7
    assert jc.LowRank("vbmf")(jax.random.normal(jax.random.key(0), (30, 20))).rank == 1
    assert jc.LowRank("vbmf")(w.astype(jnp.bfloat16)).rank == 5
    recipe = jc.Recipe.from_yaml("rules: [{match: '**', low_rank: vbmf}]")
    assert recipe.rules[0].spec == jc.LowRank("vbmf")


@given(st.integers(1, 200), st.integers(1, 200))
def test_the_largest_rank_that_saves(m, n):
    rank = saving_rank(m, n)
    assert rank * (m + n) < m * n or rank == 0
    assert (rank + 1) * (m + n) >= m * n


def test_a_rank_that_saves_nothing_is_refused():
    w = jax.random.normal(jax.random.key(0), (24, 10))
    assert jc.nbytes(jc.LowRank(7)(w)) < jc.nbytes(w)
    for rank in (8, 10):
        with pytest.raises(SpecError, match=r"write a rank of at most 7.*None.*allow_larger"):
            jc.LowRank(rank)(w)
        assert jc.LowRank(rank, allow_larger=True)(w).rank == rank
    with pytest.raises(SpecError, match="no rank saves anything"):
        jc.LowRank(1)(jnp.ones((2, 2)))
    # By energy the rank is what it takes, larger or not.
    assert jc.LowRank(energy=1.0)(w).rank == 10


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: vbmf(np.ones(4)), "no matrix"),
        (lambda: vbmf(np.ones((0, 3))), "no matrix"),
        (lambda: vbmf(np.ones(4), (4, 5, 6)[:2]) and vbmf(np.ones(3), (4, 5)), "all 4 of them"),
        (lambda: vbmf(np.arange(4.0), (4, 5)), "descending"),
        (lambda: vbmf(np.ones((3, 3)), noise=0.0), "noise=0.0"),
        (lambda: vbmf(np.full((3, 3), np.nan)), "NaN"),
        (lambda: vbmf_ranks(np.ones(3)), "at least two axes"),
        (lambda: jc.LowRank("vbmf", energy=0.5), "one of rank and energy"),
        (lambda: jc.LowRank("bayes"), "rank='bayes'"),
        (lambda: jc.LowRank(2, allow_larger=1), "allow_larger=1"),
        (lambda: jax.jit(jc.LowRank("vbmf"))(jnp.ones((8, 8))), "jit hides"),
    ],
)
def test_what_cannot_be_says_what_to_write(make, text):
    with pytest.raises(SpecError, match=text):
        make()
