"""k-means of vectors against scikit-learn, float64 and brute force."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.errors import SpecError
from jaxcompress.sharing.vectors import kmeans


def peer(x, start, iterations, weights=None):
    cluster = pytest.importorskip("sklearn.cluster")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says when it has not converged, as is meant here
        return cluster.KMeans(
            len(start), init=start, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd"
        ).fit(x, sample_weight=weights)


def vectors(n, d, seed=0, offset=0.0):
    return (np.random.default_rng(seed).normal(size=(n, d)) + offset).astype(np.float32)


# 3,000 vectors are three blocks, the last one not full; 20 values are beyond plain arithmetic.
@pytest.mark.parametrize(("d", "offset"), [(2, 0.0), (3, 50.0), (20, 0.0)])
def test_equals_scikit_learn_from_the_same_start(d, offset):
    x = vectors(3000, d, offset=offset)
    found, theirs = kmeans(x, 12, init=x[:12], iterations=10), peer(x, x[:12], 10)
    # A vector within rounding of a boundary may fall to either side at any of ten steps.
    assert float(found.inertia) == pytest.approx(theirs.inertia_, rel=1e-4)
    away = np.float64(x) - np.float64(found.centroids)[found.indices]
    assert float(found.inertia) == pytest.approx(np.sum(away**2), rel=1e-5)


def test_well_separated_clusters_have_the_same_centroids():
    centers = np.float32([[0, 0], [9, 0], [0, 9], [9, 9]])
    x = (centers[np.arange(400) % 4] + vectors(400, 2)).astype(np.float32)
    found, theirs = kmeans(x, 4, init=x[:4]), peer(x, x[:4], 25)
    # Means of a hundred values below 12 in two orders: 100 eps * 12 at worst.
    np.testing.assert_allclose(found.centroids, theirs.cluster_centers_, atol=1.5e-4)
    np.testing.assert_array_equal(found.indices, theirs.labels_)


def test_weights_are_those_of_scikit_learn_and_of_coordinates():
    x = vectors(1500, 3)
    h = np.random.default_rng(1).exponential(size=1500).astype(np.float32)
    found, theirs = kmeans(x, 8, weights=h, init=x[:8], iterations=8), peer(x, x[:8], 8, h)
    assert float(found.inertia) == pytest.approx(theirs.inertia_, rel=1e-4)
    each = np.repeat(h[:, None], 3, axis=1)
    same = kmeans(x, 8, weights=each, init=x[:8], iterations=8)
    assert float(same.inertia) == pytest.approx(float(found.inertia), rel=1e-4)
    # A weight for each coordinate is plain k-means where coordinates are scaled alike everywhere.
    scale = np.float32([1, 2, 5])
    diagonal = kmeans(x, 8, weights=np.broadcast_to(scale**2, x.shape), init=x[:8], iterations=8)
    scaled = kmeans(x * scale, 8, init=x[:8] * scale, iterations=8)
    assert float(diagonal.inertia) == pytest.approx(float(scaled.inertia), rel=1e-4)


def test_a_metric_is_plain_k_means_of_transformed_vectors():
    x, root = vectors(600, 3), vectors(5, 3, seed=4)
    metric = root.T @ root + 0.1 * np.eye(3, dtype=np.float32)
    half = np.linalg.cholesky(np.float64(metric)).astype(np.float32)
    found = kmeans(x, 6, metric=metric, init=x[:6], iterations=6)
    turned = kmeans(x @ half, 6, init=x[:6] @ half, iterations=6)
    assert float(found.inertia) == pytest.approx(float(turned.inertia), rel=1e-3)
    np.testing.assert_array_equal(found.indices, turned.indices)


def test_parts_with_metrics_of_their_own_have_least_squares_centroids():
    x = vectors(40, 2).reshape(4, 10, 2)
    roots = np.random.default_rng(5).normal(size=(4, 3, 2))
    metric = np.einsum("pab,pac->pbc", roots, roots).astype(np.float32)
    found = kmeans(x, 3, metric=metric, init=x[0, :3], iterations=30)
    away = np.float64(x) - np.float64(found.centroids)[found.indices]
    total = np.einsum("pni,pij,pnj->", away, metric, away)
    assert float(found.inertia) == pytest.approx(total, rel=1e-4)
    for j in range(3):  # converged: each is the solution of its own least squares problem
        part, at = np.nonzero(np.asarray(found.indices) == j)
        matrix = metric[part].sum(axis=0, dtype=np.float64)
        right = np.einsum("nij,nj->i", metric[part], x[part, at])
        np.testing.assert_allclose(found.centroids[j], np.linalg.solve(matrix, right), atol=1e-3)
    every = np.float64(x)[:, :, None] - np.float64(found.centroids)
    scores = np.einsum("pnki,pij,pnkj->pnk", every, metric, every)
    np.testing.assert_array_equal(found.indices, np.argmin(scores, axis=-1))


def test_the_best_of_all_partitions_is_not_beaten_and_is_found():
    x = vectors(7, 2, seed=3)
    best = min(
        sum(((x[list(s)] - x[list(s)].mean(axis=0)) ** 2).sum() for s in (a, b) if s)
        for bits in itertools.product([0, 1], repeat=7)
        for a, b in [([i for i in range(7) if bits[i]], [i for i in range(7) if not bits[i]])]
    )
    run = jax.jit(lambda key: kmeans(x, 2, key=key).inertia)
    found = [float(run(jax.random.key(i))) for i in range(10)]
    assert min(found) == pytest.approx(best, rel=1e-5)
    assert min(found) >= best * (1 - 1e-5)


def test_an_empty_cluster_moves_and_no_error_rises():
    x = vectors(500, 2)
    start = np.concatenate([x[:2], 1e3 + x[2:8]])  # six that get nothing
    step = jax.jit(lambda start: kmeans(x, 8, init=start, iterations=1))
    centroids, errors = start, []
    for _ in range(8):
        errors.append(float(kmeans_error(x, centroids)))
        centroids = step(centroids).centroids
    assert np.all(np.diff(errors) <= 1e-5 * errors[0])
    found = kmeans(x, 8, init=start, iterations=25)
    assert len(np.unique(found.indices)) == 8
    # scikit-learn moves its empty clusters elsewhere: another, similar, local minimum.
    assert float(found.inertia) <= 1.2 * peer(x, start, 25).inertia_


def kmeans_error(x, centroids):
    return np.min(((x[:, None] - np.asarray(centroids)) ** 2).sum(axis=-1), axis=1).sum()


def test_more_centroids_than_vectors_and_none_at_all():
    x = vectors(3, 2)
    found = kmeans(x, 5, key=jax.random.key(0))
    assert float(found.inertia) < 1e-9
    assert np.all(np.isfinite(found.centroids))
    assert kmeans(jnp.zeros((0, 2)), 5, init=jnp.ones((5, 2))).indices.shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init": "linear"}, "k-means"),
        ({}, "pass key="),
        ({"init": jnp.ones((3, 2))}, "to start from"),
        ({"key": 0, "weights": jnp.ones(3)}, "one a vector"),
        ({"key": 0, "metric": jnp.ones(2)}, "a metric"),
        ({"key": 0, "metric": jnp.eye(2), "weights": jnp.ones(4)}, "write one of them"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(SpecError, match=message):
        kmeans(jnp.ones((4, 2)), 2, **arguments)
