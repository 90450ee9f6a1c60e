"""Soft weight-sharing: densities against scipy and scikit-learn, and what becomes of weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress.errors import RuleError, SpecError
from jaxcompress.sharing.mixture import (
    Mixture,
    gamma_penalty,
    init_mixture,
    log_likelihood,
    merge,
    symmetric_kl,
)
from jaxcompress.sharing.soft import share_by_mixture, sharing_gap, soft_sharing

RNG = np.random.default_rng(0)
MIXTURE = Mixture(
    jnp.float32([0.3, -0.5, 1.0]),
    jnp.float32([-0.4, 0.2, 0.7]),
    jnp.float32(np.log([0.05, 0.1, 0.2, 0.03])),
    0.8,
)
WEIGHTS = {"a": jnp.float32(RNG.normal(size=(30, 20)) / 3), "b": jnp.float32(RNG.normal(size=7))}
total = jax.jit(log_likelihood)


def in_float64(mixture, w):
    stats = pytest.importorskip("scipy.stats")
    shares = np.float64(mixture.shares())
    means, scales = np.float64(mixture.all_means()), np.exp(np.float64(mixture.log_scales))
    return np.log(np.sum(shares * stats.norm.pdf(np.float64(w)[..., None], means, scales), axis=-1))


def test_the_likelihood_is_that_of_scipy_and_scikit_learn():
    flat = np.concatenate([np.ravel(x) for x in WEIGHTS.values()])
    exact = in_float64(MIXTURE, flat)
    ours = float(total(MIXTURE, WEIGHTS))
    # 607 terms of float32, each off by some eps of its parts, which are below 1,000 here.
    assert ours == pytest.approx(exact.sum(), rel=1e-5)
    sklearn = pytest.importorskip("sklearn.mixture")
    peer = sklearn.GaussianMixture(4, covariance_type="spherical")
    peer.weights_, peer.means_ = (
        np.float64(MIXTURE.shares()),
        np.float64(MIXTURE.all_means())[:, None],
    )
    peer.precisions_cholesky_ = np.exp(-np.float64(MIXTURE.log_scales))
    peer.covariances_ = peer.precisions_cholesky_**-2
    assert ours / flat.size == pytest.approx(peer.score(flat[:, None]), rel=1e-5)
    theirs = peer.predict(flat[:, None])
    np.testing.assert_array_equal(MIXTURE.assign(jnp.float32(flat)), theirs)


def test_gradients_are_those_of_finite_differences():
    grads = jax.grad(lambda both: log_likelihood(*both))((MIXTURE, WEIGHTS))
    step = 1e-5
    flat = lambda m: [np.float64(x) for x in (m.logits, m.means, m.log_scales)]
    everything = np.concatenate([np.ravel(x) for x in WEIGHTS.values()]).astype(np.float64)

    def value(parts, w=everything):
        logits, means, logs = parts
        shares = np.append(0.8, 0.2 * np.exp(logits) / np.exp(logits).sum())
        z = (w[:, None] - np.append(0, means)) / np.exp(logs)
        return np.log(
            np.sum(shares * np.exp(-(z**2) / 2 - logs) / np.sqrt(2 * np.pi), axis=1)
        ).sum()

    for part, found in enumerate((grads[0].logits, grads[0].means, grads[0].log_scales)):
        for i in range(found.size):
            up, down = flat(MIXTURE), flat(MIXTURE)
            up[part][i] += step
            down[part][i] -= step
            slope = (value(up) - value(down)) / (2 * step)
            # Central differences in float64 are off by step^2; ours are sums of 600 in float32.
            assert float(found[i]) == pytest.approx(slope, rel=2e-4, abs=2e-3)
    for i in (0, 3):
        w = np.array([WEIGHTS["b"][i]], np.float64)
        slope = (value(flat(MIXTURE), w + step) - value(flat(MIXTURE), w - step)) / (2 * step)
        assert float(grads[1]["b"][i]) == pytest.approx(slope, rel=1e-4, abs=1e-4)


def test_far_and_narrow_weights_stay_finite():
    narrow = Mixture(jnp.zeros(2), jnp.float32([-1, 1]), jnp.full(3, -30.0), 0.999)
    for w in ([1e30, -3e38, 0.0], [1e-30, 5.0, -1.0]):
        value, grads = jax.value_and_grad(lambda both: log_likelihood(*both))(
            (narrow, jnp.float32(w))
        )
        assert np.isfinite(value)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(grads))
    half = {"w": WEIGHTS["a"].astype(jnp.bfloat16)}
    wide = {"w": half["w"].astype(jnp.float32)}
    assert float(total(MIXTURE, half)) == float(total(MIXTURE, wide))
    assert float(total(MIXTURE, {"w": jnp.zeros((0, 3))})) == 0


def test_blocks_change_nothing():
    w = jnp.float32(RNG.normal(size=70_001))  # three blocks, the last one short
    exact = in_float64(MIXTURE, w).sum()
    assert float(total(MIXTURE, w)) == pytest.approx(exact, rel=1e-5)
    assert MIXTURE.assign(w).shape == w.shape


def test_the_hyperprior_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    precisions = np.exp(-2 * np.float64(MIXTURE.log_scales))
    ours = gamma_penalty(MIXTURE, zero=(5e3, 2.0), others=(250.0, 0.1))
    exact = -stats.gamma.logpdf(precisions[:1], 5e3, scale=1 / 2.0).sum()
    exact -= stats.gamma.logpdf(precisions[1:], 250.0, scale=10.0).sum()
    # lgamma(5,000) and the other terms, some 40,000, cancel to a few thousand in float32.
    assert float(ours) == pytest.approx(exact, rel=1e-4)
    slope = jax.grad(lambda m: gamma_penalty(m, others=(11.0, 2.0)))(
        Mixture(jnp.zeros(1), jnp.zeros(1), jnp.full(2, -0.5 * np.log(5.0)), 0.5)
    )
    # The mode is at (alpha - 1) / beta = 5.
    np.testing.assert_allclose(slope.log_scales, 0, atol=1e-4)


def test_the_divergence_is_its_integral():
    x = np.linspace(-3, 3, 200_001)
    stats = pytest.importorskip("scipy.stats")
    scales = np.exp(np.float64(MIXTURE.log_scales))
    logs = [stats.norm.logpdf(x, m, s) for m, s in zip(np.float64(MIXTURE.all_means()), scales)]
    found = symmetric_kl(MIXTURE)
    for i in range(4):
        for j in range(4):
            integral = np.trapezoid((np.exp(logs[i]) - np.exp(logs[j])) * (logs[i] - logs[j]), x)
            assert found[i, j] == pytest.approx(integral, rel=1e-6, abs=1e-9)


means = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=6)


@settings(max_examples=40, derandomize=True)
@given(means, st.sampled_from([0.0, 0.1, 1.0, 1e9]))
def test_merging_keeps_mass_and_moments_and_ends_apart(means, threshold):
    k = len(means)
    mixture = Mixture(jnp.linspace(-1, 1, k), jnp.float32(means), jnp.linspace(-2, -1, k + 1), 0.9)
    merged = merge(mixture, threshold)
    shares, centers = np.float64(merged.shares()), np.float64(merged.all_means())
    assert shares.sum() == pytest.approx(1, abs=1e-5)
    assert centers[0] == 0
    apart = symmetric_kl(merged)
    # The parameters were rounded to float32 after the comparison.
    assert np.all(apart[np.triu_indices(len(centers), 1)] > threshold * (1 - 1e-3))
    if merged.pi_zero == pytest.approx(0.9):  # nothing moved to zero, so the mean stays
        before = np.float64(mixture.shares()) @ np.float64(mixture.all_means())
        assert shares @ centers == pytest.approx(before, abs=1e-5)
    second = lambda m: float(m.shares() @ (m.all_means() ** 2 + jnp.exp(2 * m.log_scales)))
    assert second(merged) == pytest.approx(second(mixture), rel=1e-3)


def test_weights_become_means_zeros_exact_and_the_gap_is_told():
    sharp = Mixture(jnp.zeros(2), jnp.float32([-0.5, 0.5]), jnp.log(jnp.full(3, 0.05)), 0.95)
    rng = np.random.default_rng(1)
    which = rng.choice([0, 1, 2], p=[0.94, 0.03, 0.03], size=(64, 48))
    w = np.float32(np.array([0, -0.5, 0.5])[which] + 0.02 * rng.normal(size=which.shape))
    params = {"a": {"kernel": jnp.asarray(w), "bias": jnp.ones(48)}}
    small = share_by_mixture(params, sharp)
    np.testing.assert_array_equal(small["a"]["kernel"], np.float32([0, -0.5, 0.5])[which])
    assert isinstance(small["a"]["kernel"], jc.SparseArray)
    # 1 bit for the place of each and one for each that is left, two centroids; or the gaps.
    assert small["a"]["kernel"].nbytes < 64 * 48 / 8 + 2 * 4 + (which != 0).sum() / 8 + 1
    gap = sharing_gap(params, small)["a/kernel"]
    apart = np.float64(w) - np.float32([0, -0.5, 0.5])[which]
    assert gap["max"] == pytest.approx(np.abs(apart).max())
    assert gap["rms"] == pytest.approx(np.sqrt((apart**2).mean()))


def test_few_zeros_are_centroids():
    values = jnp.array([0, -0.5, 0.25, 0.5])
    sharp = Mixture(jnp.zeros(3), values[1:], jnp.log(jnp.full(4, 0.05)), 0.1)
    w = values[np.arange(256).reshape(16, 16) % 4].astype(jnp.bfloat16)
    leaf = share_by_mixture({"w": w + 0.01}, sharp, ["w"])["w"]
    assert (leaf.describe(), leaf.dtype, leaf.nbytes) == ("codebook 4", jnp.bfloat16, 64 + 8)
    np.testing.assert_array_equal(leaf.materialize(), w)


@pytest.mark.slow
def test_training_with_the_prior_shares_weights():
    # A linear model whose weights are three values; data alone leave them 0.05 or so apart.
    rng = np.random.default_rng(2)
    true = np.float32(rng.choice([-0.6, 0.0, 0.6], size=(24, 4), p=[0.2, 0.6, 0.2]))
    x = jnp.float32(rng.normal(size=(200, 24)))
    y = x @ true + 0.3 * jnp.float32(rng.normal(size=(200, 4)))
    start = jnp.linalg.lstsq(x, y)[0]
    mixture = init_mixture(start, 8, pi_zero=0.6)
    optimizer = optax.adam(1e-2)

    def loss(both):
        prior = soft_sharing(
            both[0], {"kernel": both[1]}, ["kernel"], others=(10.0, 0.02), zero=(10.0, 0.02)
        )
        return jnp.sum((x @ both[1] - y) ** 2) / (2 * 0.3**2) + prior

    def step(carry, _):
        both, state = carry
        updates, state = optimizer.update(jax.grad(loss)(both), state)
        return (optax.apply_updates(both, updates), state), None

    both = (mixture, start)
    (both, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, length=500))(
        (both, optimizer.init(both))
    )
    merged = merge(both[0], 2.0)
    shared = share_by_mixture({"kernel": both[1]}, merged, ["kernel"])["kernel"].materialize()
    assert len(np.unique(shared)) == 3
    np.testing.assert_array_equal(np.sign(shared), np.sign(true))
    assert jnp.linalg.norm(shared - true) < jnp.linalg.norm(start - true) / 2


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: init_mixture({"w": jnp.ones(3)}, 0), SpecError, "at least 1"),
        (lambda: init_mixture({"w": jnp.ones(3)}, pi_zero=1.0), SpecError, "between 0 and 1"),
        (lambda: init_mixture({"w": jnp.ones((0, 2))}), SpecError, "there are none"),
        (lambda: merge(MIXTURE, -1), SpecError, "at least 0"),
        (lambda: gamma_penalty(MIXTURE, zero=(0, 1)), SpecError, "both positive"),
        (lambda: soft_sharing(MIXTURE, {"w": jnp.ones(3)}), RuleError, "matches no leaf"),
        (
            lambda: soft_sharing(MIXTURE, {"w": jnp.arange(3)}, ["w"]),
            SpecError,
            "no dense floating",
        ),
        (lambda: sharing_gap({"a": 1.0}, {"b": 1.0}), SpecError, "differ at"),
    ],
)
def test_bad_mixtures_are_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()
