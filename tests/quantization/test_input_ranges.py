"""Ranges of inputs from their histograms, against search over all thresholds."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress.quantization.activations import entropy_range, mse_range, percentile_range
from jaxcompress.quantization.activations.ranges import clipping_error, divergence, even_bins

EDGES = jc.histogram_edges().astype(np.float64)


def histogram(x):
    """Counts of magnitudes; a value on an edge is in the bin above it."""
    bins = np.searchsorted(EDGES, np.abs(np.asarray(x, np.float64)), side="right") - 1
    return np.bincount(bins.ravel(), minlength=2048)


def samples(seed, heavy=4.0, n=4000):
    return np.random.default_rng(seed).standard_t(heavy, n).astype(np.float32)


def test_the_histogram_is_that_of_observe():
    x = samples(0)[:, None]
    stats = jc.observe(lambda p, x: x @ p["w"], {"w": jnp.ones((1, 1))}, [x], "histogram")
    assert np.array_equal(stats["w"][(-2,)].histogram, histogram(x))


@given(seed=st.integers(0, 99), percentile=st.sampled_from([1.0, 50.0, 99.0, 99.9, 100.0]))
@settings(max_examples=20)
def test_a_percentile_is_the_least_edge_with_so_many_below(seed, percentile):
    x = np.abs(samples(seed, n=500))
    found = float(percentile_range(histogram(x), percentile))
    enough = [e for e in EDGES[1:-8] if np.sum(x < e) >= len(x) * percentile / 100 - 1e-9]
    assert found == enough[0]


@given(
    low=st.floats(0, 4), width=st.floats(1e-3, 2), threshold=st.floats(0.1, 5),
    levels=st.sampled_from([1, 3, 7, 15]),
)  # fmt: skip
@settings(max_examples=30)
def test_the_error_within_a_bin_is_its_integral(low, width, threshold, levels):
    step = threshold / levels

    def squared(x):
        return (x - step * min(round(x / step), levels)) ** 2

    ties = [step * (k + 0.5) for k in range(levels)] + [threshold]
    points = sorted({low, low + width, *(t for t in ties if low < t < low + width)})
    whole = sum(scipy.integrate.quad(squared, a, b)[0] for a, b in itertools.pairwise(points))
    found = float(clipping_error(low, low + width, threshold, levels))
    np.testing.assert_allclose(found, whole / width, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("format", ["int2", "int4", "int8", "uint4"])
def test_the_least_squared_error_is_found(format):
    x = samples(3, heavy=30.0)
    qmax = 2 ** (int(format[-1]) - (not format.startswith("u"))) - 1

    def error(t):
        step = t / qmax
        return np.mean((np.abs(x) - step * np.minimum(np.round(np.abs(x) / step), qmax)) ** 2)

    found = float(mse_range(histogram(x), format))
    best = min(error(t) for t in np.linspace(0.02, 1, 2000) * np.abs(x).max())
    # The values themselves are not known, only their bins an eighth of an octave wide; with light
    # tails, so that no single value decides, the error is known to some per cent.
    assert error(found) <= 1.05 * best
    if format != "int8":
        assert error(found) < 0.9 * error(np.abs(x).max())


def slow_divergence(even, i, levels):
    """As Migacz describes it, one bin after the other."""
    p = [float(v) for v in even[:i]]
    p[-1] += float(sum(even[i:]))
    q = [0.0] * i
    for level in range(levels):
        start, stop = level * i // levels, (level + 1) * i // levels
        full = [k for k in range(start, stop) if p[k] > 0]
        for k in full:
            q[k] = sum(float(v) for v in even[start:stop]) / len(full)
    total_p, total_q = sum(p), max(sum(q), 1e-300)
    out = 0.0
    for a, b in zip(p, q):
        if a > 0:
            out += a / total_p * np.log((a / total_p) / ((1 - 1e-4) * b / total_q + 1e-4 / i))
    return out


@pytest.mark.parametrize("seed", [0, 1])
def test_the_divergence_is_that_of_the_paper_and_the_least_is_taken(seed):
    counts = histogram(samples(seed, n=3000))
    edges = np.where(np.isinf(EDGES), 3e38, EDGES)
    even, width = even_bins(counts, edges, 64)
    assert even.sum() == pytest.approx(counts.sum())
    each = {i: slow_divergence(even, i, 8) for i in range(8, 65)}
    for i, expected in each.items():
        assert divergence(even, i, 8) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    best = min(each, key=each.get)
    assert float(entropy_range(counts, "int4", bins=64)) == pytest.approx(best * width)


def test_the_squared_error_is_no_worse_than_that_of_torch():
    """torch's HistogramObserver searches for the range of the least error as well."""
    x = samples(5, heavy=30.0)
    observer = torch.ao.quantization.HistogramObserver(
        qscheme=torch.per_tensor_symmetric, dtype=torch.qint8
    )
    observer(torch.tensor(x))
    scale, _ = observer.calculate_qparams()

    def error(scale):
        return np.mean((x - scale * np.clip(np.round(x / scale), -128, 127)) ** 2)

    assert error(float(mse_range(histogram(x))) / 127) <= 1.05 * error(float(scale))


def test_stacks_and_zeros():
    counts = np.stack([histogram(samples(0)), histogram(np.zeros(5))])
    for found in (percentile_range(counts), mse_range(counts), entropy_range(counts)):
        assert found.shape == (2,)
        assert found[0] > 0
        assert found[1] == 0


def test_refusals():
    counts = histogram(samples(0))
    with pytest.raises(jc.SpecError, match="percentile=0"):
        percentile_range(counts, 0)
    with pytest.raises(jc.SpecError, match="2048"):
        mse_range(counts[:100])
    with pytest.raises(jc.SpecError, match="at least 128"):
        entropy_range(counts, bins=64)
