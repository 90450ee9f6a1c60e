"""k-means of scalars: one sort, then iterations that cost next to nothing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.errors import SpecError
from jaxcompress.numerics import unit_scale

# Values per block of the prefix sums. Within a block a float32 sum is off by at most
# BLOCK * eps * max|w| = 4e-6 max|w| there; over blocks the sums are compensated.
_BLOCK = 64


def boundaries(centroids: jax.Array) -> jax.Array:
    """The midpoints between sorted centroids, `[k - 1]`."""
    # Halved first: the sum of two large float16 centroids is no float16.
    return centroids[:-1] / 2 + centroids[1:] / 2


def assign(values: jax.Array, centroids: jax.Array) -> jax.Array:
    """The index of the nearest of the sorted centroids; a tie goes to the lower one.

    A binary search among the k - 1 midpoints, so never an n x k table.

    Args:
      values: any shape and float dtype.
      centroids: `[k]`, ascending, k at most 65,536.

    Returns:
      uint8 indices in the shape of `values`, or uint16 for more than 256 centroids.

    Examples:
      >>> import jax.numpy as jnp
      >>> assign(jnp.array([-1.0, 0.4, 0.5, 0.6]), jnp.array([0.0, 1.0])).tolist()
      [0, 0, 0, 1]
    """
    middles = boundaries(centroids.astype(jnp.float32))
    index = jnp.searchsorted(middles, values.astype(jnp.float32), method="scan_unrolled")
    return index.astype(jnp.uint8 if len(centroids) <= 256 else jnp.uint16)


def kmeans_1d(
    values: jax.Array,
    k: int,
    *,
    init: str | Any = "linear",
    iterations: int = 50,
    key: jax.Array | None = None,
) -> jax.Array:
    """The k centroids that Lloyd's iteration finds for a set of scalars.

    Alternates `a_i = argmin_j |w_i - c_j|` and `c_j = mean(w_i : a_i = j)`, which never raises
    `sum_i (w_i - c[a_i])**2`, until no centroid moves. The values are sorted once; a cluster is
    then a run of them, whose ends are found by binary search and whose sum is a difference of
    prefix sums. Those are float32 within blocks of 64 values and compensated (two floats)
    across them, so that a cluster of one outlier among millions loses nothing. An empty cluster
    keeps its centroid.

    Args:
      values: any shape and float dtype; computed in float32.
      k: the number of centroids; static.
      init: `linear`: evenly from the least to the greatest value; `density`: at the quantiles
        `(j + 1/2) / k`; `random`: k values drawn without replacement while there are enough;
        or an array of k starting centroids.
      iterations: at most so many; static.
      key: a random key, for `random`.

    Returns:
      float32 `[k]`, ascending. For no values at all, zeros.

    Raises:
      SpecError: for an unknown init, or `random` without a key.

    References:
      Lloyd, *Least squares quantization in PCM*, 1982; Han, Mao and Dally, *Deep Compression*,
      2016 (the three inits).

    Examples:
      >>> import jax.numpy as jnp
      >>> kmeans_1d(jnp.array([0.0, 1.0, 10.0, 12.0]), 2).tolist()
      [0.5, 11.0]
    """
    if isinstance(init, str) and init not in ("linear", "density", "random"):
        raise SpecError(f"init={init!r}: write linear, density, random or an array of centroids")
    if isinstance(init, str) and init == "random" and key is None:
        raise SpecError("init='random' draws the centroids: pass key=jax.random.key(0)")
    n = values.size
    if n == 0:
        return jnp.zeros(k, jnp.float32)
    ordered = jnp.sort(values.reshape(-1).astype(jnp.float32))
    # A sum of the largest floats overflows; all steps commute with a power of two.
    scale, inverse = unit_scale(jnp.maximum(-ordered[0], ordered[-1]))
    ordered = ordered * inverse
    if not isinstance(init, str):
        init = jnp.asarray(init, jnp.float32) * inverse
    start = _start(ordered, k, init, key)
    sum_below = _prefix_sums(ordered)

    def step(state: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        count, centroids, _ = state
        # side="right": a value on a boundary belongs to the lower cluster, as in `assign`.
        ends = jnp.searchsorted(ordered, boundaries(centroids), side="right")
        ends = jnp.concatenate([jnp.zeros(1, ends.dtype), ends, jnp.full(1, n, ends.dtype)])
        sizes = jnp.diff(ends)
        high, low, inside = sum_below(ends)
        # Differences of like parts: the large ones cancel exactly or nearly so.
        total = jnp.diff(high) + (jnp.diff(low) + jnp.diff(inside))
        moved = jnp.where(sizes > 0, total / jnp.maximum(sizes, 1), centroids)
        # Rounding must not carry a mean out of its own cluster, or order would be lost.
        least = ordered[jnp.minimum(ends[:-1], n - 1)]
        greatest = ordered[jnp.maximum(ends[1:] - 1, 0)]
        moved = jnp.where(sizes > 0, jnp.clip(moved, least, greatest), moved)
        return count + 1, moved, jnp.any(moved != centroids)

    def unfinished(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return (state[0] < iterations) & state[2]

    _, centroids, _ = lax.while_loop(unfinished, step, (jnp.int32(0), start, jnp.bool_(True)))
    return centroids * scale


def _start(ordered: jax.Array, k: int, init: str | Any, key: jax.Array | None) -> jax.Array:
    n = ordered.size
    if not isinstance(init, str):
        return jnp.sort(jnp.asarray(init, jnp.float32))
    if init == "linear":
        # Not jnp.linspace, which weighs both ends and so need not ascend when they are close.
        steps = jnp.arange(k, dtype=jnp.float32) / max(1, k - 1)
        return jnp.minimum(ordered[0] + (ordered[-1] - ordered[0]) * steps, ordered[-1])
    if init == "density":
        where = jnp.floor((jnp.arange(k) + 0.5) / k * n).astype(jnp.int32)
        return ordered[jnp.minimum(where, n - 1)]
    assert key is not None
    return jnp.sort(jax.random.choice(key, ordered, (k,), replace=k > n))


def _prefix_sums(ordered: jax.Array) -> Any:
    """A function from positions to the sum of all values before them, as three floats.

    The sum is `high + low` for the whole blocks before the position and `inside` for its own.
    """
    n = ordered.size
    blocks = jnp.pad(ordered, (0, -n % _BLOCK)).reshape(-1, _BLOCK)
    inside = jnp.pad(jnp.cumsum(blocks, axis=1)[:, :-1], ((0, 0), (1, 0)))
    totals = jnp.sum(blocks, axis=1)

    def add(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> Any:
        # Knuth's two-sum: the low part is what the high one lost to rounding.
        total = a[0] + b[0]
        part = total - a[0]
        lost = (a[0] - (total - part)) + (b[0] - part)
        return total, lost + (a[1] + b[1])

    high, low = lax.associative_scan(add, (totals, jnp.zeros_like(totals)))
    high, low = (jnp.pad(x, (1, 0)) for x in (high, low))
    # A position at the very end of the last block reads a block of its own, which is empty.
    inside = jnp.pad(inside, ((0, 1), (0, 0)))

    def sum_below(position: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        block = position // _BLOCK
        return high[block], low[block], inside[block, position % _BLOCK]

    return sum_below
