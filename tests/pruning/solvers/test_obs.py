"""Optimal Brain Surgeon against exact least squares on every subset, in float64."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress import SpecError
from jaxcompress.pruning.solvers import layerwise_obs, obs, reconstruct

EPS = float(np.finfo(np.float32).eps)
SHAPE = (5, 3)
seeds = st.integers(0, 2**32 - 1)


def problem(seed, shape=SHAPE, samples=40):
    """Weights and the Gram matrix of correlated inputs, float32 values in float64."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, shape[0])) + rng.normal(size=(samples, 1))
    w = rng.normal(size=shape).astype(np.float32).astype(np.float64)
    return w, (x.T @ x).astype(np.float32).astype(np.float64)


def fitted(w, gram, kept):
    """The least-squares weights of one column where only `kept` may differ from zero."""
    kept = list(kept)
    out = np.zeros_like(w)
    if kept:
        out[kept] = np.linalg.solve(gram[np.ix_(kept, kept)], (gram @ w)[kept])
    return out


def loss(w, new, gram):
    return float(np.trace((w - new).T @ gram @ (w - new)))


def tolerance(w, gram):
    """Of weights: a Cholesky solve in float32 is off by K eps cond; of that a few."""
    return 4 * len(gram) * EPS * np.linalg.cond(gram) * np.abs(w).max()


def greedy(w, gram, kept):
    """The mask when in each step that weight goes without which the exact fit is best."""
    mask = np.ones(w.shape, bool)
    fits = w.copy()
    each = np.zeros(w.shape[1])
    while mask.sum() > kept:
        trials = {}
        for q, n in zip(*np.nonzero(mask)):
            rest = [i for i in np.flatnonzero(mask[:, n]) if i != q]
            d = w[:, n] - fitted(w[:, n], gram, rest)
            trials[q, n] = d @ gram @ d - each[n]
        q, n = min(trials, key=trials.get)
        mask[q, n] = False
        fits[:, n] = fitted(w[:, n], gram, np.flatnonzero(mask[:, n]))
        each[n] += trials[q, n]
    return mask, fits


@settings(max_examples=25)
@given(seeds)
def test_one_step_is_the_best_of_all(seed):
    w, gram = problem(seed)
    # All masks without one weight, the column refitted exactly.
    best = min(
        loss(w[:, [n]], fitted(w[:, n], gram, np.delete(np.arange(5), q))[:, None], gram)
        for q in range(5)
        for n in range(3)
    )
    for solve in (obs, layerwise_obs):
        found = solve(jnp.asarray(w, jnp.float32), jnp.asarray(gram, jnp.float32), 14, damping=0)
        # The error is quadratic in that of the weights; to first order it is that of float32 sums.
        assert float(found.error) == pytest.approx(best, rel=1e-3, abs=1e-5 * np.trace(gram) / 5)
        assert int(found.mask.sum()) == 14


@settings(max_examples=15)
@given(seeds, st.integers(0, 15))
def test_obs_is_greedy_over_exact_fits(seed, kept):
    w, gram = problem(seed)
    found = obs(jnp.asarray(w, jnp.float32), jnp.asarray(gram, jnp.float32), kept, damping=0)
    mask, fits = greedy(w, gram, kept)
    got = np.asarray(found.weight, np.float64)
    if (np.asarray(found.mask) == mask).all():
        np.testing.assert_allclose(got, fits, atol=tolerance(w, gram))
    else:  # two that are equally good but for rounding
        assert loss(w, got, gram) == pytest.approx(loss(w, fits, gram), rel=1e-3)
    assert float(found.error) == pytest.approx(loss(w, got, gram), rel=1e-4, abs=1e-4)
    assert int(found.mask.sum()) == kept
    assert not np.any(got[~np.asarray(found.mask)])


@settings(max_examples=8)
@given(seeds, st.integers(1, 14))
def test_no_subset_beats_its_reconstruction_and_no_solver_beats_the_best_subset(seed, kept):
    w, gram = problem(seed)
    w32, gram32 = jnp.asarray(w, jnp.float32), jnp.asarray(gram, jnp.float32)
    # For each column the best of all subsets of each size; then the best sizes of three columns.
    best = [{} for _ in range(3)]
    for n, size in itertools.product(range(3), range(6)):
        for subset in itertools.combinations(range(5), size):
            d = w[:, n] - fitted(w[:, n], gram, subset)
            best[n][size] = min(best[n].get(size, (np.inf, ())), (d @ gram @ d, subset))
    sizes = [s for s in itertools.product(range(6), repeat=3) if sum(s) == kept]
    sizes = min(sizes, key=lambda s: sum(best[n][size][0] for n, size in enumerate(s)))
    mask = np.stack([np.isin(np.arange(5), best[n][size][1]) for n, size in enumerate(sizes)], 1)
    least = sum(best[n][size][0] for n, size in enumerate(sizes))
    exact = reconstruct(w32, gram32, jnp.asarray(mask), damping=0)
    for n, size in enumerate(sizes):
        want = fitted(w[:, n], gram, best[n][size][1])
        np.testing.assert_allclose(exact.weight[:, n], want, atol=tolerance(w, gram))
    slack = 1e-5 * loss(w, 0 * w, gram)
    for solve in (obs, layerwise_obs):
        assert float(solve(w32, gram32, kept, damping=0).error) >= least - slack


def test_reconstruct_leaves_no_gradient_on_what_stays():
    w, gram = problem(7)
    mask = np.random.default_rng(0).random(SHAPE) < 0.6
    found = reconstruct(
        jnp.asarray(w, jnp.float32), jnp.asarray(gram, jnp.float32), jnp.asarray(mask), damping=0
    )
    new = np.asarray(found.weight, np.float64)
    gradient = gram @ (new - w)
    # Off by the rounding of the products that make it.
    bound = 4 * 5 * EPS * np.abs(gram).max() * np.abs(w).max() * 5
    assert np.abs(gradient[mask]).max() < bound < np.abs(gradient[~mask]).min()
    assert not new[~mask].any()
    assert float(found.error) == pytest.approx(loss(w, new, gram), rel=1e-4)
    all_of_it = reconstruct(
        jnp.asarray(w, jnp.float32), jnp.asarray(gram, jnp.float32), jnp.ones(SHAPE, bool)
    )
    np.testing.assert_array_equal(all_of_it.weight, w.astype(np.float32))


def test_layerwise_ranks_by_one_inverse_and_fits_exactly():
    w, gram = problem(3)
    found = layerwise_obs(jnp.asarray(w, jnp.float32), jnp.asarray(gram, jnp.float32), 8, damping=0)
    scores = w**2 / (2 * np.diag(np.linalg.inv(gram))[:, None])
    mask = scores >= np.sort(scores.ravel())[-8]
    np.testing.assert_array_equal(found.mask, mask)
    fits = np.stack([fitted(w[:, n], gram, np.flatnonzero(mask[:, n])) for n in range(3)], 1)
    np.testing.assert_allclose(found.weight, fits, atol=tolerance(w, gram))
    # The paper's own formula for what is left after one column's losses.
    gone = np.flatnonzero(~mask[:, 0])
    inverse = np.linalg.inv(gram)
    step = inverse[:, gone] @ np.linalg.solve(inverse[np.ix_(gone, gone)], w[gone, 0])
    np.testing.assert_allclose(found.weight[:, 0], w[:, 0] - step, atol=tolerance(w, gram))


@pytest.mark.parametrize("solve", [obs, layerwise_obs])
def test_of_equals_the_lowest_index_stays(solve):
    found = solve(jnp.ones(SHAPE), jnp.eye(5), 7, damping=0)
    assert found.mask.reshape(-1).tolist() == [True] * 7 + [False] * 8
    assert found.weight.reshape(-1).tolist() == [1.0] * 7 + [0.0] * 8


HOSTILE = {
    "rank one": (1.0, np.ones((5, 5))),
    "nothing was seen": (1.0, np.zeros((5, 5))),
    "huge": (1e30, 1e30 * np.eye(5)),
    "tiny": (1e-30, 1e-30 * np.eye(5)),
    "dead input": (1.0, np.diag([1.0, 0, 2, 3, 4])),
}


@pytest.mark.parametrize(
    "solve",
    [
        layerwise_obs,
        pytest.param(obs, marks=pytest.mark.slow),
        pytest.param(reconstruct, marks=pytest.mark.slow),
    ],
)
def test_nothing_makes_a_nan(solve):
    """In one stack, so that what is hard for one harms no other."""
    w, _ = problem(1)
    ws = jnp.asarray(np.stack([scale * w for scale, _ in HOSTILE.values()]), jnp.float32)
    grams = jnp.asarray(np.stack([gram for _, gram in HOSTILE.values()]), jnp.float32)
    what = jnp.abs(ws) > jnp.median(jnp.abs(ws)) if solve is reconstruct else 6
    found = solve(ws, grams, what, damping=0)
    assert bool(jnp.isfinite(found.weight).all())
    assert not bool(jnp.isnan(found.error).any())
    assert found.damping.shape == found.error.shape == (5,)
    raised = dict(zip(HOSTILE, (found.damping > 0).tolist()))
    assert raised == dict.fromkeys(HOSTILE, False) | {"rank one": True}
    dead = found.weight[list(HOSTILE).index("dead input"), 1]
    assert not bool(jnp.any(dead))


def test_small_shapes_and_other_dtypes():
    one = obs(jnp.ones((1, 1), jnp.bfloat16), jnp.ones((1, 1)), 1)
    assert one.weight.dtype == jnp.bfloat16
    assert float(one.weight[0, 0]) == 1
    empty = obs(jnp.ones((0, 3)), jnp.ones((0, 0)), 0)
    assert empty.weight.shape == (0, 3)
    assert float(empty.error) == 0


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: obs(jnp.ones((4, 3)), jnp.eye(3), 1), r"\(4, 3\).*\(3, 3\) do not fit"),
        (lambda: obs(jnp.ones((4, 3)), jnp.eye(4), 13), "kept=13: write how many of the 12"),
        (lambda: layerwise_obs(jnp.ones((4, 3)), jnp.eye(4), 1, damping=-1), "damping=-1"),
        (lambda: reconstruct(jnp.ones((4, 3)), jnp.eye(4), jnp.ones(3)), "write a mask of shape"),
    ],
)
def test_what_is_refused(call, text):
    with pytest.raises(SpecError, match=text):
        call()
