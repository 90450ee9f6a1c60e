"""k-means of weights to 256 shared values, against scikit-learn from the same start.

python benchmarks/kmeans.py [--quick]
"""

from __future__ import annotations

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from common import Row, interleaved, row, show
from sklearn.cluster import KMeans

from jaxcompress.sharing.kmeans import assign, kmeans_1d

ITERATIONS = 50


def inertia(values: np.ndarray, centroids: np.ndarray) -> float:
    """The squared distance to the nearest centroid, summed in float64."""
    centroids = np.sort(centroids.astype(np.float64))
    nearest = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, values)
    return float(np.sum((values - centroids[nearest]) ** 2))


def run(quick: bool = False) -> list[Row]:
    """The rows."""
    n, k = (400_000 if quick else 4_000_000), 256
    values = np.random.default_rng(0).normal(size=n).astype(np.float32)
    # Quantiles: a linear start leaves clusters empty, and scikit-learn moves those elsewhere.
    start = np.quantile(values, (np.arange(k) + 0.5) / k).astype(np.float32)
    device = jnp.asarray(values)
    ours = jax.jit(lambda v: kmeans_1d(v, k, init=start, iterations=ITERATIONS))
    centroids = np.asarray(ours(device))  # compiles
    times = interleaved({"ours": lambda: ours(device)}, rounds=5, warmup=0)
    peer = KMeans(k, init=start[:, None], n_init=1, max_iter=ITERATIONS, tol=0, algorithm="lloyd")
    began = time.perf_counter()
    peer.fit(values[:, None])
    theirs = time.perf_counter() - began
    again = interleaved({"ours": lambda: ours(device)}, rounds=5, warmup=0)
    seconds = max(times["ours"], again["ours"])  # before and after the peer: the slower counts
    coded = jax.jit(assign)
    coding = interleaved({"ours": lambda: coded(device, centroids)}, rounds=7)
    what = f"k-means, {n / 1e6:g} million to {k}, {ITERATIONS} iterations"
    mine, other = inertia(values, centroids), inertia(values, peer.cluster_centers_[:, 0])
    rows = [
        row(what, seconds, "scikit-learn, same start", theirs, at_least=10),
        row(f"{what}: inertia", mine, "scikit-learn", other, at_most=1 + 1e-5, unit=""),
        row("codes of the same weights", coding["ours"], "one whole k-means", seconds),
    ]
    return rows


def main() -> None:
    show("k-means", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
