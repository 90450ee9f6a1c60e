"""k-means of weights to 256 shared values, against scikit-learn from the same start.

python benchmarks/kmeans.py [--quick]
"""

from __future__ import annotations

import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from common import Row, interleaved, row, show
from sklearn.cluster import KMeans

from jaxcompress.sharing.kmeans import assign, kmeans_1d
from jaxcompress.sharing.vectors import kmeans

ITERATIONS = 50


def inertia(values: np.ndarray, centroids: np.ndarray) -> float:
    """The squared distance to the nearest centroid, summed in float64."""
    centroids = np.sort(centroids.astype(np.float64))
    nearest = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, values)
    return float(np.sum((values - centroids[nearest]) ** 2))


def lloyd(values: np.ndarray, centroids: np.ndarray, iterations: int) -> np.ndarray:
    """The same iterations in float64, by the sums of runs of the sorted values."""
    ordered = np.sort(values).astype(np.float64)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    centroids = centroids.astype(np.float64)
    for _ in range(iterations):
        cuts = np.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2)
        runs = np.concatenate([[0], cuts, [len(ordered)]])
        counts = np.diff(runs)
        centroids = np.where(counts, np.diff(sums[runs]) / np.maximum(counts, 1), centroids)
    return centroids


def run(quick: bool = False) -> list[Row]:
    """The rows."""
    n, k = (400_000 if quick else 10_000_000), 256
    values = np.random.default_rng(0).normal(size=n).astype(np.float32)
    # Quantiles: a linear start leaves clusters empty, and scikit-learn moves those elsewhere.
    start = np.quantile(values, (np.arange(k) + 0.5) / k).astype(np.float32)
    device = jnp.asarray(values)
    ours = jax.jit(lambda v: kmeans_1d(v, k, init=start, iterations=ITERATIONS))
    took = ours.lower(device).compile().memory_analysis()
    memory = took.temp_size_in_bytes + took.output_size_in_bytes
    centroids = np.asarray(ours(device))  # compiles
    times = interleaved({"ours": lambda: ours(device)}, rounds=5, warmup=0)
    peer = KMeans(k, init=start[:, None], n_init=1, max_iter=ITERATIONS, tol=0, algorithm="lloyd")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says when it has not converged, as is meant here
        began = time.perf_counter()
        peer.fit(values[:, None])
        theirs = time.perf_counter() - began
    again = interleaved({"ours": lambda: ours(device)}, rounds=5, warmup=0)
    seconds = max(times["ours"], again["ours"])  # before and after the peer: the slower counts
    coded = jax.jit(assign)
    coding = interleaved({"ours": lambda: coded(device, centroids)}, rounds=7)
    what = f"k-means, {n / 1e6:g} million to {k}, {ITERATIONS} iterations"
    mine, other = inertia(values, centroids), inertia(values, peer.cluster_centers_[:, 0])
    exact = inertia(values, lloyd(values, start, ITERATIONS))
    rows = [
        row(what, seconds, "scikit-learn, same start", theirs, at_least=10),
        row(f"{what}: inertia", mine, "in float64", exact, at_most=1 + 1e-5, unit=""),
        # Each iteration still changes it by 0.7%, and scikit-learn's are in float32 as well.
        row(f"{what}: inertia", mine, "scikit-learn", other, at_most=1 + 1e-4, unit=""),
        row(f"{what}: memory", memory / 1e6, "input", values.nbytes / 1e6, at_most=4, unit="MB"),
        row("codes of the same weights", coding["ours"], "one whole k-means", seconds),
    ]
    return rows + of_vectors(quick)


def of_vectors(quick: bool) -> list[Row]:
    """The rows of vectors of four values."""
    n, k, d, turns = (50_000 if quick else 500_000), 256, 4, 10
    x = np.random.default_rng(1).normal(size=(n, d)).astype(np.float32)
    ours = jax.jit(lambda x: kmeans(x, k, init=x[:k], iterations=turns))
    found = ours(x)
    times = interleaved({"ours": lambda: ours(x)}, rounds=3, warmup=0)
    peer = KMeans(k, init=x[:k], n_init=1, max_iter=turns, tol=0, algorithm="lloyd")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        began = time.perf_counter()
        peer.fit(x)
        theirs = time.perf_counter() - began
    what = f"k-means, {n / 1e6:g} million vectors of {d} to {k}, {turns} iterations"
    mine = float(found.inertia)
    return [
        row(what, times["ours"], "scikit-learn, same start", theirs),
        row(f"{what}: inertia", mine, "scikit-learn", peer.inertia_, at_most=1 + 1e-4, unit=""),
    ]


def main() -> None:
    show("k-means", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
