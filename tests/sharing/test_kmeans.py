"""k-means of scalars against scikit-learn, float64 and brute force."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress.errors import SpecError
from jaxcompress.sharing.kmeans import assign, kmeans_1d


def lloyd(values, centroids, iterations):
    """The same iteration in float64, with a whole table of distances."""
    values, centroids = values.astype(np.float64).ravel(), np.sort(centroids.astype(np.float64))
    for _ in range(iterations):
        nearest = np.argmin(np.abs(values[:, None] - centroids), axis=1)
        for j in range(len(centroids)):
            if np.any(nearest == j):
                centroids[j] = values[nearest == j].mean()
    return centroids


def inertia(values, centroids):
    values, centroids = np.float64(values).ravel(), np.float64(centroids)
    return np.min((values[:, None] - centroids) ** 2, axis=1).sum()


def draw(kind, n=20_000):
    rng = np.random.default_rng(1)
    samples = {
        "normal": rng.normal(size=n),
        "uniform": rng.uniform(-3, 5, n),
        "duplicates": rng.integers(-50, 50, n) / 8,
        "outliers": np.concatenate([rng.normal(size=n - 2) / 100, [1000.0, -1500.0]]),
        "offset": 100 + rng.normal(size=n),
    }
    return samples[kind].astype(np.float32)


KINDS = ["normal", "uniform", "duplicates", "outliers", "offset"]


@pytest.mark.thin(4)
@pytest.mark.parametrize("kind", KINDS)
def test_one_iteration_is_exact_to_float32(kind):
    values = draw(kind)
    start = np.unique(np.quantile(values, (np.arange(16) + 0.5) / 16).astype(np.float32))
    ours = kmeans_1d(values, len(start), init=start, iterations=1)
    # A mean is off by the sums inside two blocks of 64 values, 2 * 64 eps of the block's greatest
    # value over the cluster's size, and by its own rounding. Every cluster of the start holds a
    # value; the blocks at a cluster's ends may hold the outlier.
    sizes = np.bincount(np.asarray(assign(values, jnp.asarray(start))).ravel())
    bound = 128 * 6e-8 * np.abs(values).max() / sizes + 2.4e-7 * np.abs(lloyd(values, start, 1))
    assert np.all(np.abs(np.asarray(ours) - lloyd(values, start, 1)) <= bound)


@pytest.mark.parametrize("kind", ["normal", "uniform", "offset"])
def test_inertia_equals_that_of_scikit_learn_from_the_same_start(kind):
    cluster = pytest.importorskip("sklearn.cluster")
    values = draw(kind)
    start = np.quantile(values, (np.arange(32) + 0.5) / 32).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says when it has not converged, as is meant here
        peer = cluster.KMeans(
            32, init=start[:, None], n_init=1, max_iter=40, tol=0, algorithm="lloyd"
        ).fit(values[:, None])
    ours = kmeans_1d(values, 32, init=start, iterations=40)
    theirs = np.sort(peer.cluster_centers_[:, 0])
    # Both follow the same path, but a value within float32 rounding of a boundary may fall to
    # either side at any of 40 steps: a few of 20,000 values, each a cluster's width.
    assert inertia(values, ours) == pytest.approx(inertia(values, theirs), rel=1e-3)
    np.testing.assert_allclose(ours, theirs, atol=0.02 * np.ptp(values) / 32)


def test_a_lone_outlier_loses_nothing_among_a_million_values():
    values = np.random.default_rng(0).normal(size=1_000_000).astype(np.float32)
    values[12345] = 3e6
    centroids = kmeans_1d(values, 4, init=np.float32([-1, 0, 1, 1e6]), iterations=30)
    # The outlier's own block is ended by it; the sum before it is subtracted exactly.
    assert float(centroids[-1]) == 3e6
    np.testing.assert_allclose(np.asarray(centroids[:-1]).mean(), 0, atol=0.05)


@pytest.mark.parametrize("init", ["linear", "density", "random"])
def test_inertia_never_rises(init):
    values = draw("normal", 5000)
    key = jax.random.key(3)
    centroids = kmeans_1d(values, 12, init=init, iterations=0, key=key)
    step = jax.jit(lambda start: kmeans_1d(values, 12, init=start, iterations=1))
    errors = [inertia(values, centroids)]
    for _ in range(11):
        centroids = step(centroids)
        errors.append(inertia(values, centroids))
    assert np.all(np.diff(errors) <= 1e-5 * errors[0])
    assert errors[-1] < errors[0]


def test_linear_start_spans_the_values_and_density_halves_them():
    values = np.float32([0, 1, 2, 3, 10])
    np.testing.assert_array_equal(kmeans_1d(values, 3, iterations=0), [0, 5, 10])
    np.testing.assert_array_equal(kmeans_1d(values, 1, init="density", iterations=0), [2])


finite = st.floats(-1e3, 1e3, width=32)


@settings(max_examples=60, derandomize=True)
@given(st.sampled_from([1, 2, 7, 40]).flatmap(lambda n: st.lists(finite, min_size=n, max_size=n)),
       st.sampled_from([1, 5, 16]))  # fmt: skip
def test_codes_are_nearest_and_centroids_ordered(values, k):
    values = np.float32(values)
    centroids = np.asarray(kmeans_1d(values, k))
    assert np.all(np.isfinite(centroids))
    assert np.all(np.diff(centroids) >= 0)
    assert centroids.min() >= values.min() - 1e-4 * np.abs(values).max()
    codes = np.asarray(assign(values, jnp.asarray(centroids)))
    chosen = np.abs(np.float64(values) - centroids[codes])
    best = np.min(np.abs(np.float64(values)[:, None] - centroids), axis=1)
    # A midpoint rounded to float32 may favour the other side by its rounding.
    np.testing.assert_allclose(chosen, best, atol=4 * 6e-8 * max(1e-30, np.abs(values).max()))


def test_ties_go_to_the_lower_centroid_in_both_halves():
    values = np.float32([0, 1, 2])
    assert assign(values, jnp.float32([0, 2])).tolist() == [0, 0, 1]
    np.testing.assert_array_equal(
        kmeans_1d(values, 2, init=np.float32([0, 2]), iterations=1), [0.5, 2]
    )


@pytest.mark.parametrize("values", [np.zeros(0), np.zeros(5), np.ones(1), np.arange(3.0)])
def test_more_centroids_than_values(values):
    values = values.astype(np.float32)
    centroids = kmeans_1d(values, 8)
    assert np.all(np.isfinite(centroids))
    if values.size:
        assert inertia(values, centroids) < 1e-9 or values.size == 3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_floats_are_computed_in_float32(dtype):
    values = jnp.asarray(draw("normal", 4000)).astype(dtype)
    ours = kmeans_1d(values, 8)
    np.testing.assert_array_equal(ours, kmeans_1d(values.astype(jnp.float32), 8))
    assert ours.dtype == jnp.float32


def test_vmap_over_layers_is_the_loop():
    layers = jnp.asarray(draw("normal", 3000)).reshape(3, 10, 100)
    together = jax.jit(jax.vmap(lambda w: kmeans_1d(w, 16)))(layers)
    for layer, ours in zip(layers, together):
        np.testing.assert_array_equal(jax.jit(lambda w: kmeans_1d(w, 16))(layer), ours)


def test_more_than_256_centroids_take_two_bytes():
    assert assign(jnp.ones(3), jnp.arange(300.0)).dtype == jnp.uint16


def test_bad_input():
    with pytest.raises(SpecError, match="linear, density, random"):
        kmeans_1d(jnp.ones(3), 2, init="middle")
    with pytest.raises(SpecError, match="pass key="):
        kmeans_1d(jnp.ones(3), 2, init="random")
