"""Soft codebooks: against numpy, finite differences, scikit-learn, and what they store."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress.errors import SpecError
from jaxcompress.sharing.dkm import (
    DKM,
    SoftToHard,
    annealed,
    refresh,
    soft_entropy,
    soft_to_hard_gap,
)
from jaxcompress.sharing.soft_kmeans import attention, soft_histogram, soft_kmeans, soft_values

RNG = np.random.default_rng(0)


def by_numpy(w, c, tau, iterations):
    """Soft k-means in float64 with whole tables."""
    w, c = np.float64(w), np.float64(c)

    def table():
        d = -((w[:, None] - c) ** 2).sum(-1) / tau
        a = np.exp(d - d.max(axis=1, keepdims=True))
        return a / a.sum(axis=1, keepdims=True)

    for _ in range(iterations):
        a = table()
        c = (a.T @ w) / a.sum(axis=0)[:, None]
    return c, table() @ c, table().mean(axis=0)


@pytest.mark.parametrize("d", [1, 3])
def test_iterations_values_and_histogram_are_those_of_numpy(d, monkeypatch):
    blocks = sys.modules["jaxcompress.sharing.soft_kmeans"]  # the name is the function as well
    monkeypatch.setattr(blocks, "_BLOCK", 64)  # blocks, the last one short
    w, c = RNG.normal(size=(150, d)).astype(np.float32), RNG.normal(size=(5, d)).astype(np.float32)
    exact = by_numpy(w, c, 0.3, 4)
    ours = soft_kmeans(w, c, 0.3, 4)
    # Means of 150 float32 values, four times over.
    np.testing.assert_allclose(ours, exact[0], atol=2e-5)
    np.testing.assert_allclose(soft_values(w, ours, 0.3), exact[1], atol=2e-5)
    np.testing.assert_allclose(soft_histogram(w, ours, 0.3), exact[2], atol=1e-5)
    np.testing.assert_allclose(attention(w, c, 0.3).sum(axis=1), 1, atol=1e-6)


def test_gradients_go_through_all_iterations():
    w, c = RNG.normal(size=(20, 2)), RNG.normal(size=(3, 2))
    v = RNG.normal(size=(20, 2))
    fn = lambda w, c: jnp.sum(soft_values(w, soft_kmeans(w, c, 0.4, 3), 0.4) * v)
    dw, dc = jax.jit(jax.grad(fn, (0, 1)))(jnp.float32(w), jnp.float32(c))
    value = lambda w, c: np.sum(by_numpy(w, c, 0.4, 3)[1] * v)
    step = 1e-5
    for i, j in ((0, 0), (7, 1), (19, 0)):
        e = np.zeros_like(w)
        e[i, j] = step
        slope = (value(w + e, c) - value(w - e, c)) / (2 * step)
        assert float(dw[i, j]) == pytest.approx(slope, rel=1e-3, abs=1e-4)
    for i in range(3):
        e = np.zeros_like(c)
        e[i, 0] = step
        slope = (value(w, c + e) - value(w, c - e)) / (2 * step)
        assert float(dc[i, 0]) == pytest.approx(slope, rel=1e-3, abs=1e-4)


def test_a_cold_soft_k_means_is_that_of_scikit_learn():
    cluster = pytest.importorskip("sklearn.cluster")
    w = np.concatenate([RNG.normal(m, 0.1, size=(60, 2)) for m in (-2, 0, 3)]).astype(np.float32)
    start = np.float32([[-1.5, -1], [0.5, 0], [2, 2]])
    peer = cluster.KMeans(3, init=start, n_init=1, tol=0).fit(w)
    found = soft_kmeans(w, start, 1e-4, 5)
    np.testing.assert_allclose(found, peer.cluster_centers_, atol=1e-4)
    far = soft_kmeans(w, np.float32([[-2, -2], [0, 0], [1e6, 0]]), 1e-6, 2)
    np.testing.assert_array_equal(far[2], [1e6, 0])  # nothing belongs to it


def test_no_table_of_weights_and_centroids_is_kept():
    w, c = jnp.ones((1 << 16, 1)), jnp.linspace(0, 1, 64)[:, None]
    fn = lambda w: jnp.sum(soft_values(w, soft_kmeans(w, c, 0.1, 3), 0.1) ** 2)
    memory = jax.jit(jax.grad(fn)).lower(w).compile().memory_analysis()
    # One table is 16 MiB, and four are computed; a block has an eighth of it.
    assert memory.temp_size_in_bytes < 12 * 2**20


W = jnp.float32(RNG.normal(size=(24, 16)))


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [(DKM(3, hard=True, iterations=2), jnp.float32), (SoftToHard(3, hard=True), jnp.bfloat16)],
)
def test_hard_leaves_ship_what_they_train(spec, dtype):
    leaf = spec(W.astype(dtype))
    leaf = leaf.replace(weight=leaf.weight * 1.1)
    x = jnp.float32(RNG.normal(size=(5, 24))).astype(dtype)
    run = jax.jit(jc.compressed(lambda w, x: x @ w))
    stored = leaf.finalize()
    np.testing.assert_array_equal(run(leaf, x), run(stored, x))
    assert (stored.dtype, stored.describe()) == (dtype, "codebook 8")
    assert soft_to_hard_gap({"w": leaf})["w"]["max"] == 0
    loss = lambda leaf: jnp.sum(leaf.materialize().astype(jnp.float32) * jnp.arange(16.0))
    # The gradient is that of the soft values, by the same program.
    grad = jax.jit(jax.grad(loss))
    for a, b in zip(jax.tree.leaves(grad(leaf)), jax.tree.leaves(grad(leaf.replace(hard=False)))):
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-2, atol=1e-2)


def test_what_is_trained():
    for spec, names in (
        (DKM(2, iterations=1), ("weight",)),
        (SoftToHard(2), ("weight", "centroids")),
    ):
        leaf = spec(W)
        grads = jax.jit(jax.grad(lambda leaf: jnp.sum(jnp.sin(leaf.materialize()))))(leaf)
        for name in ("weight", "centroids"):
            moves = bool(jnp.any(getattr(grads, name) != 0))
            assert moves == (name in names) == (getattr(jc.trainable_mask(leaf), name))


def test_the_gap_closes_as_it_cools_without_a_retrace():
    leaf = SoftToHard(2, temperature=0.05)(W)
    value = jax.jit(lambda leaf: leaf.materialize())
    gaps = []
    for _ in range(6):
        gaps.append(soft_to_hard_gap({"w": leaf})["w"]["rms"])
        soft = value(leaf)
        leaf = annealed(leaf, 0.3)
    assert value._cache_size() == 1
    assert gaps[-1] < gaps[0] / 3
    assert soft.shape == W.shape


def test_soft_entropy_is_that_of_the_indices_when_cold():
    leaf = SoftToHard(3, temperature=1e-6)(jnp.stack([W, W**3]))
    exact = 0.0
    for one in np.asarray(leaf.finalize().indices.materialize()):
        shares = np.bincount(one.ravel(), minlength=8) / one.size
        exact -= one.size * np.sum(shares[shares > 0] * np.log2(shares[shares > 0]))
    # Weights within 1e-6 of the variance of a boundary are shared.
    assert float(soft_entropy({"a": leaf, "b": jnp.ones(3)})) == pytest.approx(exact, rel=1e-3)
    grads = jax.jit(jax.grad(soft_entropy))(annealed(leaf, 1e4))
    assert np.all(np.isfinite(grads.weight))
    assert np.any(np.asarray(grads.weight) != 0)


@pytest.mark.slow
def test_training_through_it_beats_rounding():
    # Inputs of six directions: errors of rounding can make up for each other.
    x = jnp.float32(RNG.normal(size=(64, 6)) @ RNG.normal(size=(6, 24)))
    y = x @ W
    loss = lambda leaf: jnp.mean((jc.compressed(lambda w: x @ w)(leaf) - y) ** 2)
    leaf = DKM(2, hard=True, temperature=0.05, iterations=2)(W)
    start = float(loss(leaf))
    trainable, rest = jc.partition(leaf)
    optimizer = optax.adam(1e-2)

    def step(carry, _):
        trainable, rest, state = carry
        grads = jax.grad(lambda t: loss(jc.combine(t, rest)))(trainable)
        updates, state = optimizer.update(grads, state)
        leaf = refresh(jc.combine(optax.apply_updates(trainable, updates), rest))
        return (*jc.partition(leaf), state), None

    run = jax.jit(lambda c: jax.lax.scan(step, c, None, length=150)[0])
    trainable, rest, _ = run((trainable, rest, optimizer.init(trainable)))
    stored = jc.combine(trainable, rest).finalize()
    assert stored.describe() == "codebook 4"
    assert float(loss(stored)) < 0.8 * start


def test_stacks_files_and_odd_weights(tmp_path):
    stack = jnp.stack([W, 3 * W])
    leaf = DKM(2)(stack)
    assert (leaf.centroids.shape, leaf.tau.shape, leaf.batch_ndim) == ((2, 4), (2,), 1)
    one = jax.tree.map(lambda x: x[1], leaf)
    # The same steps, on three times the weights: sums in another order.
    dense = leaf.materialize()
    # A small temperature enlarges rounding: eps w^2 / tau is some 1e-5 of a share.
    np.testing.assert_allclose(dense[1], one.materialize(), atol=3e-4)
    np.testing.assert_allclose(dense[1], 3 * dense[0], atol=3e-4)
    jc.save(tmp_path / "x", {"w": leaf, "s": leaf.finalize()})
    loaded = jc.load(tmp_path / "x")
    np.testing.assert_array_equal(loaded["w"].finalize(), loaded["s"])
    same = DKM(2)(jnp.full((3, 3), 0.5))
    np.testing.assert_allclose(same, 0.5, rtol=1e-6)
    assert np.all(np.isfinite(jax.grad(lambda x: x.materialize().sum())(same).weight))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: DKM(9), "from 1 to 8"),
        (lambda: DKM(2, temperature=0.0), "positive"),
        (lambda: DKM(2, iterations=-1), "at least 0"),
        (lambda: SoftToHard(2, hard=1), "True or False"),
        (lambda: SoftToHard(2)(jnp.ones(())), "scalar"),
    ],
)
def test_bad_soft_codebooks_are_refused(make, match):
    with pytest.raises(SpecError, match=match):
        make()
