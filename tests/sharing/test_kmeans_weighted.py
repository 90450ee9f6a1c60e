"""Weights, k-means++, a zero that stays and empty clusters of k-means of scalars."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress.arrays.codebook import ZeroCodebookArray
from jaxcompress.errors import SpecError
from jaxcompress.sharing.kmeans import assign, kmeans_1d


def error(values, centroids, h=1.0):
    values, centroids = np.float64(values).ravel(), np.float64(centroids)
    return float(np.sum(h * np.min((values[:, None] - centroids) ** 2, axis=1)))


def test_weighted_inertia_equals_that_of_scikit_learn():
    cluster = pytest.importorskip("sklearn.cluster")
    rng = np.random.default_rng(0)
    values = rng.normal(size=4000).astype(np.float32)
    h = rng.exponential(size=4000).astype(np.float32)
    start = np.quantile(values, (np.arange(16) + 0.5) / 16).astype(np.float32)
    peer = cluster.KMeans(16, init=start[:, None], n_init=1, max_iter=300, tol=0, algorithm="lloyd")
    peer.fit(values[:, None], sample_weight=h)
    ours = kmeans_1d(values, 16, weights=jnp.asarray(h), init=start, iterations=300)
    theirs = np.sort(peer.cluster_centers_[:, 0])
    # Both have converged; a value within rounding of a boundary may fall to either side.
    assert error(values, ours, h) == pytest.approx(error(values, theirs, h), rel=1e-3)
    np.testing.assert_allclose(ours, theirs, atol=0.01)


def test_a_weight_of_two_is_the_value_twice_and_of_zero_none():
    values = np.random.default_rng(1).normal(size=300).astype(np.float32)
    h = np.arange(300) % 3
    start = np.float32([-1, 0, 1])
    weighted = kmeans_1d(values, 3, weights=jnp.asarray(h, jnp.float32), init=start)
    # Sums of 300 terms in other orders: 300 eps at worst.
    np.testing.assert_allclose(weighted, kmeans_1d(np.repeat(values, h), 3, init=start), atol=4e-5)


def test_an_empty_cluster_moves_and_no_error_rises():
    values = np.random.default_rng(2).normal(size=3000).astype(np.float32)
    far = np.float32([-1, 0, 1, 100, 200, 300, 400, 500])
    centroids, errors = jnp.asarray(far), []
    step = jax.jit(lambda start: kmeans_1d(values, 8, init=start, iterations=1))
    for _ in range(12):
        errors.append(error(values, centroids))
        centroids = step(centroids)
    assert np.all(np.diff(errors) <= 1e-5 * errors[0])
    codes = np.asarray(assign(values, kmeans_1d(values, 8, init=far)))
    assert len(np.unique(codes)) == 8
    # Clusters without repair would be three for ever.
    assert errors[-1] < 0.5 * error(values, kmeans_1d(values, 3, init=far[:3]))


@settings(max_examples=30, derandomize=True)
@given(st.lists(st.floats(-100, 100, width=32), min_size=7, max_size=7), st.integers(0, 2**16))
def test_zero_stays_zero_and_codes_are_ordered(values, seed):
    values = jnp.asarray(values, jnp.float32)
    centroids = np.asarray(_with_zero(values, jax.random.key(seed)))
    assert np.sum(centroids == 0) >= 1
    assert np.all(np.diff(centroids) >= 0)


_with_zero = jax.jit(
    lambda v, key: kmeans_1d(v, 4, init="k-means++", zero=True, key=key, iterations=8)
)


def test_starts_of_k_means_plus_plus_are_apart():
    # Ten far clusters: k-means++ misses one with probability below 10 * 10 * 1e-6 (its spread over
    # the squared distance), plain draws all of them with probability 10! / 10**10.
    values = np.repeat(np.arange(10) * 1000.0, 50) + np.random.default_rng(3).uniform(size=500)
    start = kmeans_1d(
        values.astype(np.float32), 10, init="k-means++", iterations=0, key=jax.random.key(0)
    )
    np.testing.assert_array_equal(np.floor(np.asarray(start) / 1000), np.arange(10))


def test_a_pruned_zero_stays_zero_through_training():
    w = jax.random.normal(jax.random.key(0), (24, 10))
    w = jnp.where(jnp.abs(w) < 0.7, 0, w)
    leaf = jc.Codebook(3, zero=True)(w)
    assert isinstance(leaf, ZeroCodebookArray)
    assert leaf.centroids.shape == (7,)
    assert np.all(np.asarray(leaf.materialize())[np.asarray(w) == 0] == 0)
    trainable, rest = jc.partition({"w": leaf})
    loss = lambda t: jc.compressed(lambda p: jnp.sum((p["w"] - 1) ** 2))(jc.combine(t, rest))
    stepped = jax.tree.map(lambda x, g: x - 0.01 * g, trainable, jax.grad(loss)(trainable))
    after = np.asarray(jc.combine(stepped, rest)["w"].materialize())
    assert np.all(after[np.asarray(w) == 0] == 0)
    assert not np.array_equal(after, leaf.materialize())


def test_zero_goes_to_a_file_and_back(tmp_path):
    leaf = jc.Codebook(2, zero=True)(jax.random.normal(jax.random.key(1), (3, 8, 6)))
    jc.save(tmp_path / "x.safetensors", {"w": leaf})
    again = jc.load(tmp_path / "x.safetensors")["w"]
    np.testing.assert_array_equal(again.materialize(), leaf.materialize())
    assert type(again) is ZeroCodebookArray


def test_second_moments_weigh_the_inputs():
    x = jax.random.normal(jax.random.key(0), (200, 16)) * jnp.where(jnp.arange(16) < 2, 10.0, 0.1)
    params = {"kernel": jax.random.normal(jax.random.key(1), (16, 40))}
    fn = lambda p, x: x @ p["kernel"]
    stats = jc.observe(fn, params, [x], ("second_moment",))
    weighed = jc.compress(params, {"*": jc.Codebook(2, weighting="second_moment")}, stats=stats)
    plain = jc.compress(params, {"*": jc.Codebook(2)})
    loss = lambda p: float(jnp.sum((fn(jc.decompress(p), x) - fn(params, x)) ** 2))
    assert loss(weighed) < loss(plain)
    h = jnp.mean(x**2, axis=0)[:, None]
    by_hand = jc.Codebook(2).fit(params["kernel"], h)
    np.testing.assert_allclose(
        by_hand.materialize(), weighed["kernel"].materialize(), atol=1e-5
    )  # the mean is taken in another order


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kmeans_1d(jnp.ones(3), 2, init="k-means++"), "pass key="),
        (lambda: kmeans_1d(jnp.ones(3), 2, weights=jnp.ones(4)), "write one each"),
        (lambda: jc.Codebook(2, zero=1), "zero=1"),
        (lambda: jc.Codebook(2, weighting="fisher"), "second_moment"),
        (lambda: jc.Codebook(2, weighting="second_moment")(jnp.ones((2, 2))), "jc.observe"),
        (lambda: jc.Codebook(2).fit(jnp.ones((2, 2)), -jnp.ones((2, 2))), "none negative"),
        (lambda: jc.Codebook(2).fit(jnp.ones((2, 2)), jnp.ones((3, 2))), "broadcast"),
        (lambda: jc.Codebook(2, init="k-means++")(jnp.ones((2, 2))), "needs a key"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(SpecError, match=message):
        make()
