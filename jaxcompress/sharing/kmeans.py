"""k-means of scalars: one sort, then iterations that cost next to nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.errors import SpecError
from jaxcompress.numerics import unit_scale
from jaxcompress.sharing.seeds import SAMPLE, plus_plus
from jaxcompress.specs import is_count

INITS = ("linear", "density", "random", "k-means++")
# Values per block of the prefix sums. Within a block a float32 sum is off by at most
# log2(BLOCK) eps times the sum of |w|; over blocks the sums are compensated.
_BLOCK = 64

Runs = Callable[[jax.Array], jax.Array]


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
    weights: jax.Array | None = None,
    init: str | Any = "linear",
    zero: bool = False,
    iterations: int = 50,
    key: jax.Array | None = None,
) -> jax.Array:
    """The k centroids that Lloyd's iteration finds for a set of scalars.

    Alternates `a_i = argmin_j |w_i - c_j|` and `c_j = sum_(a_i = j) h_i w_i / sum_(a_i = j) h_i`,
    which never raises `sum_i h_i (w_i - c[a_i])**2`, until no centroid moves. The values are sorted
    once; a cluster is then a run of them, whose ends are found by binary search and whose sum is a
    difference of prefix sums: compensated (two floats) over blocks of 64 values, so that a cluster
    of one outlier among millions loses nothing, and taken value by value within the block that
    a run ends in. Beside the sorted copy of its inputs it needs next to no memory.

    A cluster that is empty moves into another: between the centroid and the farthest value of the
    one where weight times squared distance is largest. Since it held nothing, no error rises.

    Args:
      values: any shape and float dtype; computed in float32.
      k: the number of centroids; static.
      weights: the importance h of each value, in the shape of `values` and not negative, such as
        the Fisher information of a weight; None: all one.
      init: `linear`: evenly from the least to the greatest value; `density`: at the quantiles
        `(j + 1/2) / k`; `random`: k values drawn without replacement while there are enough;
        `k-means++`: each drawn with probability proportional to the weighted squared distance to
        those before (of more than 65,536 values so many, evenly spaced in order);
        or an array of k starting centroids.
      zero: keep one centroid at exactly 0, so that zeros stay zeros; static.
      iterations: at most so many; static.
      key: a random key, for `random` and `k-means++`.

    Returns:
      float32 `[k]`, ascending. For no values at all, zeros.

    Raises:
      SpecError: for an unknown init, one that draws without a key, or weights of another shape.

    References:
      Lloyd, *Least squares quantization in PCM*, 1982; Arthur and Vassilvitskii, *k-means++: The
      Advantages of Careful Seeding*, 2007; Han, Mao and Dally, *Deep Compression*, 2016 (the first
      three inits); Choi, El-Khamy and Lee, *Towards the Limit of Network Quantization*, 2017
      (weights).

    Examples:
      >>> import jax.numpy as jnp
      >>> kmeans_1d(jnp.array([0.0, 1.0, 10.0, 12.0]), 2).tolist()
      [0.5, 11.0]
      >>> kmeans_1d(jnp.array([0.0, 1.0, 10.0, 12.0]), 2, weights=jnp.array([1, 3, 1, 1])).tolist()
      [0.75, 11.0]
    """
    values = jnp.asarray(values)
    weights = None if weights is None else jnp.asarray(weights)
    _check(values, k, init, weights, key)
    if values.size == 0:
        return jnp.zeros(k, jnp.float32)
    given = None if isinstance(init, str) else jnp.asarray(init, jnp.float32)
    how = init if isinstance(init, str) else ""
    return _fitted(values, weights, given, key, k, how, bool(zero), int(iterations))


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7))  # a loop is not traced anew by each call
def _fitted(
    values: jax.Array, weights: Any, given: Any, key: Any, k: int, how: str, zero: bool, turns: int
) -> jax.Array:
    # A sum of the largest floats overflows; all steps commute with a power of two.
    scale, inverse = unit_scale(jnp.max(jnp.abs(values)))
    ordered, mass = _ordered(values.astype(jnp.float32) * inverse, weights)
    if given is None:
        start = _start(ordered, mass, k, how, key)
    else:
        start = jnp.sort(given * inverse)
    if zero:
        start = jnp.sort(_pinned(start, start))
    step = _step(ordered, mass, zero)

    def unfinished(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return (state[0] < turns) & state[2]

    _, centroids, _ = lax.while_loop(unfinished, step, (jnp.int32(0), start, jnp.bool_(True)))
    return centroids * scale


def _check(values: jax.Array, k: int, init: Any, weights: Any, key: Any) -> None:
    if not is_count(k, 1):
        raise SpecError(f"k={k!r}: write a whole number of at least 1")
    if not isinstance(init, str) and jnp.shape(init) != (k,):
        raise SpecError(f"centroids {jnp.shape(init)} to start from: write {(k,)}")
    if isinstance(init, str) and init not in INITS:
        raise SpecError(f"init={init!r}: write {', '.join(INITS)} or an array of centroids")
    if isinstance(init, str) and init in ("random", "k-means++") and key is None:
        raise SpecError(f"init={init!r} draws the centroids: pass key=jax.random.key(0)")
    if weights is not None and weights.shape != values.shape:
        raise SpecError(
            f"weights of shape {weights.shape} for values of shape {values.shape}: write one each"
        )


def _ordered(values: jax.Array, weights: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """The values in ascending order, and their weights, brought near 1."""
    bits = _turned(lax.bitcast_convert_type(values.reshape(-1), jnp.int32))
    mass = None
    if weights is None:
        bits = lax.sort(bits, is_stable=False)
    else:
        mass = weights.reshape(-1).astype(jnp.float32)
        mass = mass * unit_scale(jnp.max(mass))[1]
        bits, mass = lax.sort((bits, mass), num_keys=1, is_stable=False)
    return lax.bitcast_convert_type(_turned(bits), jnp.float32), mass


def _turned(bits: jax.Array) -> jax.Array:
    """The bits of floats as integers in the same order, and back.

    XLA:CPU sorts integers five times as fast, for its order of floats has to place NaN.
    """
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _step(ordered: jax.Array, mass: jax.Array | None, zero: bool) -> Any:
    """One of Lloyd's iterations."""
    n = ordered.size
    sums = _sums_of_runs(ordered if mass is None else (ordered, mass))
    masses = None if mass is None else _sums_of_runs(mass)

    def step(state: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        count, centroids, _ = state
        # side="right": a value on a boundary belongs to the lower cluster, as in `assign`.
        ends = jnp.searchsorted(ordered, boundaries(centroids), side="right")
        ends = jnp.concatenate([jnp.zeros(1, ends.dtype), ends, jnp.full(1, n, ends.dtype)])
        sizes = jnp.diff(ends).astype(jnp.float32)
        held = sizes if masses is None else jnp.where(sizes > 0, masses(ends), 0.0)
        full = held > 0
        # Rounding must not carry a mean out of its own cluster, or order would be lost.
        least = ordered[jnp.minimum(ends[:-1], n - 1)]
        greatest = ordered[jnp.maximum(ends[1:] - 1, 0)]
        mean = jnp.clip(sums(ends) / jnp.where(full, held, 1.0), least, greatest)
        moved = jnp.where(full, mean, centroids)
        if zero:
            moved = _pinned(moved, centroids)
        moved = _repaired(moved, held, least, greatest, zero)
        return count + 1, moved, jnp.any(moved != centroids)

    return step


def _pinned(moved: jax.Array, before: jax.Array) -> jax.Array:
    """With 0 in the place of the centroid that was at 0, or nearest to it."""
    return moved.at[jnp.argmin(jnp.abs(before))].set(0.0)


def _repaired(
    moved: jax.Array, held: jax.Array, least: jax.Array, greatest: jax.Array, zero: bool
) -> jax.Array:
    """With each empty cluster moved into one of large error, in ascending order."""
    far = jnp.where(greatest - moved >= moved - least, greatest, least)
    worth = jnp.where(held > 0, held * jnp.square(far - moved), 0.0)
    empty = held <= 0
    if zero:
        empty = empty & (moved != 0)
    donor = jnp.argsort(-worth)[jnp.maximum(jnp.cumsum(empty) - 1, 0)]
    there = moved[donor] / 2 + far[donor] / 2
    return jnp.sort(jnp.where(empty & (worth[donor] > 0), there, moved))


def _start(
    ordered: jax.Array, mass: jax.Array | None, k: int, init: str, key: jax.Array | None
) -> jax.Array:
    n = ordered.size
    if init == "linear":
        # Not jnp.linspace, which weighs both ends and so need not ascend when they are close.
        steps = jnp.arange(k, dtype=jnp.float32) / max(1, k - 1)
        return jnp.minimum(ordered[0] + (ordered[-1] - ordered[0]) * steps, ordered[-1])
    if init == "density":
        where = jnp.floor((jnp.arange(k) + 0.5) / k * n).astype(jnp.int32)
        return ordered[jnp.minimum(where, n - 1)]
    assert key is not None
    if init == "random":
        return jnp.sort(jax.random.choice(key, ordered, (k,), replace=k > n))
    # Both ends are among them. A stride, for products of positions may exceed 32 bits.
    few = min(n, SAMPLE)
    where = jnp.round(jnp.arange(few) * ((n - 1) / max(1, few - 1))).astype(jnp.int32)
    some = jnp.ones(few) if mass is None else mass[where]
    return jnp.sort(plus_plus(ordered[where][:, None], some, k, key)[:, 0])


def _sums_of_runs(terms: Any) -> Runs:
    """A function from the ends of runs `[k + 1]` to the sums of the runs `[k]`.

    The terms are an array, or two whose products are summed; neither copied nor padded. The sum
    before a position is that of whole blocks, as two floats, and of what comes before it within
    its own.
    """
    arrays = terms if isinstance(terms, tuple) else (terms,)
    n = arrays[0].size

    def product(parts: Any) -> jax.Array:
        return parts[0] if len(parts) == 1 else parts[0] * parts[1]

    whole = n // _BLOCK
    totals = _summed(product([x[: whole * _BLOCK] for x in arrays]).reshape(whole, _BLOCK))

    def add(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> Any:
        # Knuth's two-sum: the low part is what the high one lost to rounding.
        total = a[0] + b[0]
        part = total - a[0]
        lost = (a[0] - (total - part)) + (b[0] - part)
        return total, lost + (a[1] + b[1])

    high, low = lax.associative_scan(add, (totals, jnp.zeros_like(totals)))
    high, low = (jnp.pad(x, (1, 0)) for x in (high, low))

    def sums(ends: jax.Array) -> jax.Array:
        block = ends // _BLOCK
        near = block[:, None] * _BLOCK + jnp.arange(_BLOCK, dtype=ends.dtype)
        values = product([x[jnp.minimum(near, n - 1)] for x in arrays])
        inside = _summed(jnp.where(near < ends[:, None], values, 0.0))
        # Differences of like parts: the large ones cancel exactly or nearly so.
        return jnp.diff(high[block]) + (jnp.diff(low[block]) + jnp.diff(inside))

    return sums


def _summed(x: jax.Array) -> jax.Array:
    """The sums of the last axis, 64 values, in an order that no compiler changes."""
    for _ in range(2):  # eight at a time: little lies in between, and little is compiled
        x = x.reshape(*x.shape[:-1], 8, x.shape[-1] // 8)
        parts = [x[..., i, :] for i in range(8)]
        while len(parts) > 1:
            parts = [a + b for a, b in zip(parts[::2], parts[1::2])]
        x = parts[0]
    return x[..., 0]
