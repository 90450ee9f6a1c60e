"""Rows that are tied: clusters against scikit-learn and their definition, products against dense."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress.arrays.base import try_rules
from jaxcompress.arrays.row_shared import RowSharedArray
from jaxcompress.errors import SpecError
from jaxcompress.sharing.tied_rows import TieRows, cluster_rows, row_similarity, share_rows


def noisy_rows(kinds=5, m=40, n=12, noise=0.02, seed=0):
    """Rows near a few prototypes, every eighth of zeros; and the prototype of each."""
    rng = np.random.default_rng(seed)
    which = rng.integers(0, kinds, m)
    w = rng.normal(size=(kinds, n))[which] + noise * rng.normal(size=(m, n))
    w[::8], which[::8] = 0, -1
    return w.astype(np.float32), which


def as_partition(labels):
    return {frozenset(np.flatnonzero(labels == k)) for k in np.unique(labels)}


def test_clusters_are_those_that_were_planted_and_those_of_scikit_learn():
    w, which = noisy_rows()
    labels = cluster_rows(w, 0.8)
    assert as_partition(labels) == as_partition(which)
    cluster = pytest.importorskip("sklearn.cluster")
    kept = which >= 0
    peer = cluster.AgglomerativeClustering(
        None, metric="precomputed", linkage="complete", distance_threshold=0.2
    ).fit(np.maximum(1 - row_similarity(w[kept]), 0))
    assert as_partition(labels[kept]) == as_partition(peer.labels_)


def test_labels_of_affinity_propagation_do_as_well():
    cluster = pytest.importorskip("sklearn.cluster")
    w, which = noisy_rows()
    kept = which >= 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = cluster.AffinityPropagation(affinity="precomputed", random_state=0)
        found = found.fit(row_similarity(w[kept]))
    labels = np.full(len(w), -1)
    labels[kept] = found.labels_
    leaf = share_rows(jnp.asarray(w), labels)
    assert leaf.kinds == labels.max() + 1 < 20
    assert np.abs(np.asarray(leaf) - w).max() < 0.2


rows = st.lists(
    st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.9, 1.0, 2.0]), min_size=3, max_size=3),
    min_size=1,
    max_size=8,
)


@settings(max_examples=80, derandomize=True)
@given(rows, st.sampled_from([0.3, 0.8, 1.0]))
def test_any_two_rows_of_a_cluster_are_alike(w, least):
    w = np.float64(w)
    labels, alike = cluster_rows(w, least), row_similarity(w)
    np.testing.assert_array_equal(labels == -1, ~w.any(axis=1))
    same = (labels[:, None] == labels[None, :]) & (labels >= 0)[:, None]
    assert np.all(alike[same] >= least - 1e-8)
    equal = (w[:, None] == w[None, :]).all(-1)
    np.testing.assert_array_equal(labels[np.argmax(equal, axis=1)], labels)
    if least == 1:
        np.testing.assert_array_equal(same, equal & (labels >= 0)[:, None])
    used = labels[labels >= 0]
    assert list(dict.fromkeys(used)) == list(range(len(set(used))))


def test_means_are_the_nearest_rows():
    w, which = noisy_rows(noise=0.5)
    leaf = share_rows(jnp.asarray(w), which)
    best = np.zeros_like(w)
    for k in set(which) - {-1}:
        best[which == k] = w[which == k].astype(np.float64).mean(axis=0)
    # Sums of at most 40 float32 parts below 4.
    np.testing.assert_allclose(leaf, best, atol=40 * 6e-8 * 4)
    assert leaf.zero
    np.testing.assert_array_equal(np.asarray(leaf)[which == -1], 0)
    huge = share_rows(jnp.full((4, 2), 3e38), np.zeros(4, int))
    np.testing.assert_allclose(huge, 3e38, rtol=1e-6)


@pytest.mark.parametrize("zero", [False, True])
def test_products_run_on_the_few_rows(zero):
    rng = np.random.default_rng(0)
    rows = jnp.float32(rng.normal(size=(6, 24)))
    leaf = RowSharedArray.of(rows, jnp.uint8(rng.integers(0, 6 + zero, 64)), zero=zero)
    x = jnp.float32(rng.normal(size=(5, 3, 64)))
    # Each case with the leaf on the other side, and other axes.
    cases = (
        lambda w, x: x @ w,
        lambda w, x: jnp.einsum("io,abi->oab", w, x),
        lambda w, x: x @ w.T.T,
        lambda w, x: x[..., :24] @ w.T,  # the axis is an output here
    )
    for n, fn in enumerate(cases):
        ours, theirs = jc.compressed(fn)(leaf, x), fn(leaf.materialize(), x)
        # Sums of 64 products in another order.
        np.testing.assert_allclose(ours, theirs, atol=64 * 6e-8 * 16)
        if n % 2:
            continue
        loss = lambda w, fn=fn: jnp.sum(jnp.sin(jc.compressed(fn)(w, x)))
        ours = jax.grad(loss, allow_int=True)(leaf).rows
        exact = np.asarray(jax.grad(loss)(leaf.materialize()))
        index = np.asarray(leaf.index).astype(int) - zero
        summed = np.stack([exact[index == k].sum(axis=0) for k in range(6)])
        np.testing.assert_allclose(ours, summed, atol=2e-4)
    jaxpr = str(jax.make_jaxpr(lambda leaf, x: jc.compressed(cases[0])(leaf, x))(leaf, x))
    assert "f32[64,24]" not in jaxpr  # nowhere is the dense weight
    narrow = jc.compressed(cases[0])(leaf.astype(jnp.bfloat16), x.astype(jnp.bfloat16))
    # Sums of inputs and the result, each rounded to 8 bits.
    np.testing.assert_allclose(np.float32(narrow), x @ leaf.materialize(), atol=0.5, rtol=0.02)
    assert narrow.dtype == jnp.bfloat16


def test_rows_are_looked_up_and_zeros_never_move():
    w, which = noisy_rows()
    leaf = share_rows(jnp.asarray(w), which)
    ids = jnp.array([[0, 39], [17, 3]])
    ours = jax.jit(jc.compressed(lambda t, i: t[i]))(leaf, ids)
    np.testing.assert_array_equal(ours, np.asarray(leaf)[np.asarray(ids)])
    filled = jc.compressed(lambda t, i: t.at[i].get(mode="fill", fill_value=7.0))(leaf, ids + 39)
    np.testing.assert_array_equal(filled[0, 1], 7)
    np.testing.assert_array_equal(filled[0, 0], np.asarray(leaf)[39])
    moved = jax.tree.map(lambda x: x + 1 if x.dtype == jnp.float32 else x, leaf)
    np.testing.assert_array_equal(np.asarray(moved)[which == -1], 0)
    assert np.all(np.asarray(moved)[which >= 0] != np.asarray(leaf)[which >= 0])


def test_a_spec_ties_stacks_and_convolutions(tmp_path):
    each = [noisy_rows(kinds=k, seed=k)[0] for k in (3, 6)]
    leaf = TieRows(0.8)(jnp.stack(each))
    assert leaf.rows.shape == (2, 6, 12)
    _, scanned = jax.lax.scan(lambda c, x: (c, x.materialize()), 0, leaf)
    np.testing.assert_array_equal(scanned, leaf)
    y = jax.jit(jc.compressed(lambda w, x: jnp.einsum("lbi,lio->lbo", x, w)))(
        leaf, jnp.ones((2, 3, 40))
    )
    np.testing.assert_allclose(y[:, 0], np.asarray(leaf).sum(axis=1), rtol=1e-4, atol=1e-4)

    kernel = jnp.asarray(noisy_rows(n=18)[0]).reshape(40, 3, 3, 2).transpose(1, 2, 0, 3)
    conv = TieRows(0.8)(kernel)
    assert (conv.shape, conv.rows.shape, conv.axis) == ((3, 3, 40, 2), (3, 3, 5, 2), -2)
    np.testing.assert_allclose(conv, kernel, atol=0.15)
    turned = try_rules("transpose", (conv,), {"permutation": (2, 0, 1, 3)})
    np.testing.assert_array_equal(turned.materialize(), np.asarray(conv).transpose(2, 0, 1, 3))

    tree = {
        "conv": conv,
        "stack": leaf,
        "int8": jc.chain(TieRows(0.8), jc.Quantize("int8"))(each[0]),
    }
    jc.save(tmp_path / "x", tree)
    for name, loaded in jc.load(tmp_path / "x").items():
        np.testing.assert_array_equal(loaded, tree[name])
        assert loaded.nbytes == tree[name].nbytes
    # 5 rows of 18 floats, and 3 bits for each of 40 places.
    assert conv.nbytes == 5 * 18 * 4 + 40 * 3 // 8


def test_growl_makes_rows_alike_that_inputs_make_alike():
    # Twenty inputs of which each five are one signal and some noise, as in the paper's experiment.
    rng = np.random.default_rng(0)
    signals = rng.normal(size=(200, 4))
    x = np.repeat(signals, 5, axis=1) + 0.05 * rng.normal(size=(200, 20))
    true = np.repeat(rng.normal(size=(4, 3)) * [[3], [2], [0], [0]], 5, axis=0)
    x, y = jnp.float32(x), jnp.float32(x @ true + 0.1 * rng.normal(size=(200, 3)))
    penalty = jc.pruning.growl(0.2, {"kernel": "vector"}, spread=0.02)
    site = penalty.sites({"kernel": jnp.zeros((20, 3))})[0]

    @jax.jit
    def step(w, _):
        w = w - 0.05 * (x.T @ (x @ w - y)) / len(x)
        return penalty.prox(site, w, 0.05), None

    w, _ = jax.lax.scan(step, jnp.float32(rng.normal(size=(20, 3))), None, length=800)
    labels = cluster_rows(w, 0.9)
    assert list(labels) == [0] * 5 + [1] * 5 + [-1] * 10


def test_empty_and_lone_rows():
    assert cluster_rows(np.zeros((0, 3)), 0.5).shape == (0,)
    assert cluster_rows(np.ones((1, 3)), 0.5).tolist() == [0]
    leaf = share_rows(jnp.ones((3, 2)), [-1, -1, -1])
    np.testing.assert_array_equal(leaf, np.zeros((3, 2)))
    np.testing.assert_array_equal(jc.compressed(lambda w: jnp.ones((1, 3)) @ w)(leaf), [[0, 0]])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: TieRows(0.0), "above 0"),
        (lambda: TieRows(linkage="ward"), "complete"),
        (lambda: TieRows()(jnp.ones(3)), "no rows"),
        (lambda: TieRows()(jnp.ones((0, 4))), "no rows"),
        (lambda: cluster_rows(np.ones((2, 2)), 0.5, linkage="ward"), "complete"),
        (lambda: share_rows(jnp.ones((3, 2)), [0, 1]), "do not fit"),
        (lambda: share_rows(jnp.ones((3, 2)), [0, 1, -2]), "do not fit"),
        (lambda: RowSharedArray.of(jnp.ones((3, 2)), jnp.ones(4)), "do not meet"),
        (lambda: jax.jit(lambda w: TieRows()(w).materialize())(jnp.ones((3, 2))), "jit hides"),
    ],
)
def test_bad_rows_are_refused(make, match):
    with pytest.raises(SpecError, match=match):
        make()
