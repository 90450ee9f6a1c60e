"""The range of an input from its histogram: where to clip."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxcompress.arrays import affine
from jaxcompress.errors import SpecError
from jaxcompress.input_stats import histogram_edges

# How much of the merged distribution is even.
_EVEN = 1e-4


def percentile_range(counts: Any, percentile: float = 99.99) -> np.ndarray:
    """The least edge of a bin with so many percent of the magnitudes below it.

    Args:
      counts: of magnitudes in the bins of `histogram_edges`, `[..., 2048]`.
      percentile: above 0, at most 100. 100 gives the upper edge of the last bin in use.

    Returns:
      The thresholds, float64 `[...]`; 0 where all are zero.

    Raises:
      SpecError: for another percentile or counts of another length.

    References:
      McKinstry et al., *Discovering Low-Precision Networks Close to Full-Precision Networks for
      Efficient Embedded Inference*, 2019.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> x = jnp.arange(1.0, 101.0)[:, None]
      >>> run = lambda w, x: x @ w
      >>> stats = jc.observe(lambda p, x: x @ p["w"], {"w": jnp.ones((1, 1))}, [x], "histogram")
      >>> float(percentile_range(stats["w"][(-2,)].histogram, 90.0))
      96.0
    """
    if not 0 < percentile <= 100:
        raise SpecError(f"percentile={percentile!r}: write a number above 0 and at most 100")

    def one(counts: np.ndarray, edges: np.ndarray) -> float:
        seen = np.cumsum(counts)
        return edges[np.searchsorted(seen, seen[-1] * (percentile / 100)) + 1]

    return _each(one, counts)


def mse_range(counts: Any, format: str = "int8") -> np.ndarray:
    """The threshold of the least mean squared error of rounding and clipping.

    Within a bin values count as evenly spread, for which the error of rounding to the grid
    `s = t / qmax` and of clipping to t has a closed form. Edges of bins, and seven places between
    each two, are tried as t.

    Args:
      counts: of magnitudes in the bins of `histogram_edges`, `[..., 2048]`.
      format: `int2` .. `int8`, `uint2` .. `uint8`.

    Returns:
      The thresholds, float64 `[...]`; 0 where all are zero.

    Raises:
      SpecError: for an unknown format or counts of another length.

    References:
      Choukroun et al., *Low-bit Quantization of Neural Networks for Efficient Inference*, 2019.

    Examples:
      >>> import numpy as np
      >>> counts = np.zeros(2048, np.int64)
      >>> counts[127 * 8] = 10  # all within [1, 1.125)
      >>> 1 < float(mse_range(counts, "int2")) < 1.125
      True
    """
    qmax = affine.int_format(format).qmax

    def one(counts: np.ndarray, edges: np.ndarray) -> float:
        used = np.flatnonzero(counts)
        low, high, weight = edges[used], edges[used + 1], counts[used] / counts.sum()
        bins = np.arange(max(used[0] - 8, 0), used[-1] + 1)
        steps = np.linspace(0, 1, 8, endpoint=False)
        tries = (edges[bins, None] + steps * (edges[bins + 1] - edges[bins])[:, None]).ravel()
        tries = np.append(tries, edges[used[-1] + 1])
        tries = tries[tries > 0]
        errors = [float(np.sum(weight * clipping_error(low, high, t, qmax))) for t in tries]
        return float(tries[int(np.argmin(errors))])

    return _each(one, counts)


def clipping_error(low: Any, high: Any, threshold: float, levels: int) -> np.ndarray:
    """The mean of `(x - q(x))**2` over x evenly in [low, high], for q with steps up to a threshold.

    `q(x) = s min(round(x / s), levels)` with `s = threshold / levels`.

    Args:
      low: the lower ends, at least 0.
      high: the upper ends.
      threshold: the greatest value of q.
      levels: the number of steps to it.

    Returns:
      The errors, float64, in the shape of the ends.

    Examples:
      >>> round(float(clipping_error(0.0, 1.0, 1.0, 1)), 6)  # twice the integral of x**2 to 1/2
      0.083333
    """
    step = threshold / levels

    def integral(x: np.ndarray) -> np.ndarray:
        """Of the squared error from 0 to x."""
        inside = np.minimum(x, threshold) / step
        whole = np.round(inside)
        rounding = step**3 * (whole / 12 + (inside - whole) ** 3 / 3)
        return rounding + np.maximum(x - threshold, 0) ** 3 / 3

    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    return (integral(high) - integral(low)) / (high - low)


def entropy_range(counts: Any, format: str = "int8", bins: int = 2048) -> np.ndarray:
    """The threshold of the least Kullback-Leibler divergence, as TensorRT calibrates.

    The magnitudes are spread over even bins up to the largest. For each i from `qmax + 1` on, P
    is the first i bins with all that is above in the last one, and Q the first i bins without it,
    merged to `qmax + 1` levels and spread again over the bins of each level where P is not zero.
    The threshold is the upper edge of bin i with the least `sum P log(P / Q)`, both normalized and
    a share of `1e-4` of Q even, so that it is finite.

    Args:
      counts: of magnitudes in the bins of `histogram_edges`, `[..., 2048]`.
      format: `int2` .. `int8`, `uint2` .. `uint8`.
      bins: the number of even bins.

    Returns:
      The thresholds, float64 `[...]`; 0 where all are zero.

    Raises:
      SpecError: for an unknown format, counts of another length, or fewer bins than levels.

    References:
      Migacz, *8-bit Inference with TensorRT*, 2017.

    Examples:
      >>> import numpy as np
      >>> counts = np.zeros(2048, np.int64)
      >>> counts[126 * 8 : 127 * 8], counts[136 * 8] = 1000, 1  # in [0.5, 1), and one above 512
      >>> float(entropy_range(counts)) < 100
      True
    """
    levels = affine.int_format(format).qmax + 1
    if bins < levels:
        raise SpecError(f"bins={bins}: {format} needs at least {levels}")

    def one(counts: np.ndarray, edges: np.ndarray) -> float:
        even, width = even_bins(counts, edges, bins)
        ends = np.arange(levels, bins + 1)
        return float(width * ends[int(np.argmin([divergence(even, int(i), levels) for i in ends]))])

    return _each(one, counts)


def even_bins(counts: np.ndarray, edges: np.ndarray, bins: int) -> tuple[np.ndarray, float]:
    """Counts, evenly spread within their bins, over even bins up to the last in use; their width.

    What is in the first bin of all, which holds zeros, stays in the first one.
    """
    top = edges[np.flatnonzero(counts)[-1] + 1]
    ends = np.linspace(0, top, bins + 1)
    return np.diff(np.interp(ends, edges, np.concatenate([[0], np.cumsum(counts)]))), top / bins


def divergence(even: np.ndarray, i: int, levels: int) -> float:
    """The divergence of the first i bins merged to so many levels; see `entropy_range`."""
    part = even[:i]
    p = part.copy()
    p[-1] += even[i:].sum()
    starts, there = np.arange(levels) * i // levels, p > 0
    sums, kinds = np.add.reduceat(part, starts), np.add.reduceat(there.astype(np.int64), starts)
    level = np.repeat(np.arange(levels), np.diff(np.append(starts, i)))
    q = np.where(there, (sums / np.maximum(kinds, 1))[level], 0)
    p, q = p / p.sum(), q / max(q.sum(), np.finfo(np.float64).tiny)
    q = (1 - _EVEN) * q + _EVEN / i
    return float(np.sum(p[there] * np.log(p[there] / q[there])))


def _each(one: Callable[[np.ndarray, np.ndarray], float], counts: Any) -> np.ndarray:
    """`one(counts, edges)` of each histogram of a stack, with bounded edges; 0 for zeros alone."""
    counts, edges = np.asarray(counts, np.float64), histogram_edges().astype(np.float64)
    if counts.shape[-1:] != (len(edges) - 1,):
        raise SpecError(
            f"counts of shape {counts.shape}: give the histogram of an InputStats, "
            f"[..., {len(edges) - 1}]"
        )
    edges[np.isinf(edges)] = float(np.finfo(np.float32).max)
    flat = counts.reshape(-1, counts.shape[-1])
    out = [one(c, edges) if c[1:].any() else 0.0 for c in flat]
    return np.asarray(out, np.float64).reshape(counts.shape[:-1])


def moving_average(stats: Sequence[Mapping[str, Any]], decay: float = 0.9) -> dict[str, Any]:
    """Statistics of batches one after the other, as a moving average: `a <- decay a + (1-decay) b`.

    Args:
      stats: what `observe` gave for each batch, in their order, with the same statistics.
      decay: how much of the old average stays, from 0 up to 1.

    Returns:
      Statistics of the same structure. Counts and histograms are averaged too, and are no longer
      whole numbers.

    Raises:
      SpecError: for no statistics, or another decay.

    References:
      Jacob et al., *Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference*, 2018.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> run, params = lambda p, x: x @ p["w"], {"w": jnp.ones((1, 1))}
      >>> each = [jc.observe(run, params, [jnp.full((1, 1), x)], "abs_max") for x in (1.0, 3.0)]
      >>> moving_average(each, 0.5)["w"][(-2,)].abs_max.tolist()
      [2.0]
    """
    if not stats or not 0 <= decay < 1:
        raise SpecError(f"{len(stats)} statistics, decay={decay!r}: write decay from 0 up to 1")
    average = dict(stats[0])
    for one in stats[1:]:
        average = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, average, dict(one))
    return average
