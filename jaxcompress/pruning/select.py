"""Exactly which weights stay: the k-th largest score without a sort.

A search on the bits of a float, which are ordered like its magnitude, counts at each step how many
scores reach a trial. So it needs nothing but sums: an array that lies over several devices is
never gathered, only its counts are added up. Ties go to the lowest index, by a second search.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress import compat
from jaxcompress.errors import CompressError
from jaxcompress.lowering import by_devices


def kept_count(size: int, sparsity: float) -> int:
    """How many of `size` values stay: `round(size * (1 - sparsity))`, halves to even.

    Examples:
      >>> kept_count(10, 0.9), kept_count(3, 0.5)
      (1, 2)
    """
    return round(size * (1 - sparsity))


def has_nan(scores: jax.Array) -> jax.Array:
    """Whether there is a NaN among the scores; free beside a search, which looks for the largest.

    Examples:
      >>> import jax.numpy as jnp
      >>> bool(has_nan(jnp.array([1.0, jnp.nan])))
      True
    """
    return jnp.isnan(_largest(scores)) if scores.size else jnp.asarray(False)


def order_bits(scores: jax.Array) -> jax.Array:
    """The magnitudes of floats as uint32 keys in the same order, NaN above infinity.

    Exact for all float dtypes up to 32 bits, subnormals included.
    """
    magnitude = jnp.abs(scores.astype(jnp.float32))
    return lax.bitcast_convert_type(magnitude, jnp.uint32)


def signed_order_bits(scores: jax.Array) -> jax.Array:
    """Floats as uint32 keys in the same order, the negative ones first, NaN above infinity."""
    bits = lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(2**31)
    bits = jnp.where(bits == sign, jnp.uint32(0), bits)  # minus zero is zero
    keys = jnp.where(bits >= sign, ~bits, bits | sign)
    return jnp.where(jnp.isnan(scores), jnp.uint32(2**32 - 2), keys)


def kth_largest(scores: jax.Array, k: int | jax.Array) -> jax.Array:
    """The k-th largest magnitude, exactly, without a sort.

    Args:
      scores: floats of any shape; magnitudes count, and NaN counts as larger than infinity.
      k: from 1 to `scores.size`; may be traced.

    Returns:
      A scalar float32.

    Examples:
      >>> import jax.numpy as jnp
      >>> float(kth_largest(jnp.array([1.0, -3.0, 2.0, 2.0]), 3))
      2.0
    """
    threshold, _ = _threshold([scores], jnp.asarray(k).astype(jnp.uint32), order_bits)
    keys = order_bits(scores)
    reached = jnp.min(jnp.where(keys >= threshold, keys, jnp.uint32(2**32 - 1)))
    return lax.bitcast_convert_type(reached, jnp.float32)


def top_mask(scores: jax.Array, k: int | jax.Array, signed: bool = False) -> jax.Array:
    """A mask of the k largest scores by magnitude, ties broken by the lowest index.

    Args:
      scores: floats of any shape; magnitudes count, and NaN counts as larger than infinity, so
        that a broken weight is never silently removed.
      k: how many to keep, `0 <= k <= scores.size`; may be traced.
      signed: rank by value rather than by magnitude.

    Returns:
      Booleans in the shape of `scores`, exactly k of them true.

    Examples:
      >>> import jax.numpy as jnp
      >>> top_mask(jnp.array([1.0, -3.0, 2.0, 2.0]), 2).tolist()
      [False, True, True, False]
    """
    return top_masks([scores], k, signed)[0]


def top_masks(
    scores: Sequence[jax.Array], k: int | jax.Array, signed: bool = False
) -> list[jax.Array]:
    """Masks of the k largest among all scores of several arrays, as if they were one.

    Ties are broken by the lowest index, counted through the arrays in their order.

    Args:
      scores: arrays of floats, fewer than 2**32 - 2 values together.
      k: how many to keep in total; may be traced.
      signed: rank by value rather than by magnitude.

    Returns:
      A mask for each array.

    Examples:
      >>> import jax.numpy as jnp
      >>> first, second = top_masks([jnp.array([1.0, 5.0]), jnp.array([-2.0, 5.0])], 2)
      >>> first.tolist(), second.tolist()
      ([False, True], [False, True])
    """
    offsets = [0]
    for x in scores:
        offsets.append(offsets[-1] + x.size)
    if offsets[-1] >= 2**32 - 2:
        raise CompressError(f"{offsets[-1]} values are too many to rank together; split the rules")
    total = offsets[-1]
    if not total:
        return [jnp.zeros(x.shape, bool) for x in scores]
    k = jnp.asarray(k).astype(jnp.uint32)
    order = signed_order_bits if signed else order_bits
    threshold, reached = _threshold(scores, k, order)

    def place(x: jax.Array, start: int, one: jax.Array | int = 1) -> jax.Array:
        """Where a score equals the threshold, its place counted from the end; elsewhere 0."""
        index = _index(x, start, jnp.asarray(one).astype(jnp.uint32))
        return jnp.where(order(x) == threshold, jnp.uint32(total) - index, jnp.uint32(0))

    def count(trial: jax.Array) -> jax.Array:
        return _reaching(trial, scores, lambda i, x, one: place(x, offsets[i], one))

    # More may reach the threshold than shall stay: then the last of those that equal it go.
    equal = count(jnp.uint32(1))
    ties = equal + k - reached
    last, _ = _search(count, ties, jnp.uint32(1), equal, jnp.uint32(total + 2))
    return [(order(x) > threshold) | (place(x, n) >= last) for x, n in zip(scores, offsets)]


def _threshold(
    scores: Sequence[jax.Array], k: jax.Array, order: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """A key that at least k scores reach, exactly k if there is such a one, and how many do."""

    def count(trial: jax.Array) -> jax.Array:
        return _reaching(trial, scores, lambda i, x, one: order(x))

    total = jnp.uint32(sum(x.size for x in scores))
    if order is not order_bits:
        return _search(count, k, jnp.uint32(0), total, jnp.uint32(2**32 - 1))
    largest = functools.reduce(jnp.maximum, [_largest(x) for x in scores if x.size])
    # A NaN may have any bits above infinity's.
    above = jnp.where(jnp.isnan(largest), jnp.uint32(2**31), order_bits(largest) + 1)
    return _search(count, k, jnp.uint32(0), total, above)


def _largest(x: jax.Array) -> jax.Array:
    """A bound of the magnitudes, without writing them to memory first: the largest, or more.

    Numbers that are subnormal may read as zero here, so the bound is at least a normal one.
    """
    largest = jnp.maximum(jnp.max(x), -jnp.min(x)).astype(jnp.float32)
    return jnp.maximum(largest, jnp.float32(jnp.finfo(x.dtype).smallest_normal))


def _reaching(
    trial: jax.Array,
    scores: Sequence[jax.Array],
    key: Callable[[int, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """How many of the keys of all scores reach a trial.

    `key(i, x, one)` makes the keys of `scores[i]`. All it is given, and the 1, are tied to the
    trial: else a compiler would compute the keys once, before the search, and keep them.
    """
    scores, trial, one = lax.optimization_barrier((list(scores), trial, jnp.uint32(1)))
    found = (_count(key(i, x, one) >= trial) for i, x in enumerate(scores))
    return functools.reduce(jnp.add, found)


def _count(mask: jax.Array) -> jax.Array:
    """How many are true, uint32."""
    return by_devices(_sum, _short_sums)(mask)


def _sum(mask: jax.Array) -> jax.Array:
    return jnp.sum(mask, dtype=jnp.uint32)


def _short_sums(mask: jax.Array) -> jax.Array:
    """The sum by way of sums that 16 bits hold.

    XLA:CPU writes the numbers that it sums to memory first, so they had better be short.
    Across devices it would add up vectors where a scalar will do.
    """
    flat, lanes = mask.reshape(-1), 2**12
    whole = flat.size - flat.size % lanes
    short = jnp.sum(flat[:whole].reshape(lanes, -1), axis=0, dtype=jnp.uint16)
    return _sum(short) + _sum(flat[whole:])


def _search(
    count: Callable[[jax.Array], jax.Array],
    k: jax.Array,
    low: jax.Array,
    reached: jax.Array,
    high: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The greatest trial between `low` and `high` that at least k keys reach.

    Ends as soon as a trial is reached by exactly k. Regula falsi (Illinois) on the count, which
    takes fewer passes than bisection where values are spread smoothly, with a bisection now and
    then, and at every second step once it has had its chance: ties make the count jump.

    Args:
      count: how many keys reach a trial.
      k: how many keys shall reach the trial.
      low: a trial that at least k reach.
      reached: how many reach it.
      high: a trial that fewer than k reach, or none; above `low`.

    Returns:
      The trial and how many keys reach it.
    """

    def more(state: Any) -> jax.Array:
        low, high, reached, *_ = state
        return (reached != k) & (high - low > 1)

    def step(state: Any) -> Any:
        low, high, reached, over, under, last_up, n = state
        width = high - low
        falsi = (width.astype(jnp.float32) * (over / (over + under))).astype(jnp.uint32)
        halve = (n % 6 == 5) | ((n > 14) & (n % 2 == 0))
        trial = low + jnp.where(halve, width // 2, jnp.clip(falsi, 1, width - 1))
        n_up = count(trial)
        up = n_up >= k
        # The end that stays twice in a row counts half, or it would stay for good.
        stays = jnp.where(up == last_up, 0.5, 1.0)
        over = jnp.where(up, (n_up - k).astype(jnp.float32), over * stays)
        under = jnp.where(up, under * stays, (k - n_up).astype(jnp.float32))
        return (
            jnp.where(up, trial, low),
            jnp.where(up, high, trial),
            jnp.where(up, n_up, reached),
            over,
            under,
            up,
            n + 1,
        )

    over, under = (reached - k).astype(jnp.float32), k.astype(jnp.float32)
    start = (low, high, reached, over, under, jnp.asarray(False), jnp.int32(0))
    low, _, reached, *_ = lax.while_loop(more, step, start)
    return low, reached


def _index(like: jax.Array, start: int, one: jax.Array) -> jax.Array:
    """The row-major index of each place; elementwise, so it lies on the devices as `like` does.

    `one` is 1, by which each step is multiplied, see `_reaching`.
    """
    index: Any = one * jnp.uint32(start)
    stride = 1
    for axis in range(like.ndim - 1, -1, -1):
        index = index + compat.iota_like(like, axis) * (one * jnp.uint32(stride))
        stride *= like.shape[axis]
    return index


def n_of_m_mask(
    scores: jax.Array, n: int | jax.Array, m: int, axis: int, signed: bool = False
) -> jax.Array:
    """Keeps the n largest of each m consecutive magnitudes along an axis, ties by lowest index.

    A last group of fewer than m keeps n of them, or all. n may be traced.

    References:
      Mishra et al., *Accelerating Sparse Deep Neural Networks*, 2021.

    Examples:
      >>> import jax.numpy as jnp
      >>> n_of_m_mask(jnp.array([1.0, 4.0, -3.0, 2.0, 5.0]), 2, 4, -1).tolist()
      [False, True, True, False, True]
    """
    length = scores.shape[axis]
    # Integer keys, because some backends compare subnormal floats as zeros.
    keys = order_bits(scores).astype(jnp.int32)
    if signed:  # uint32 keys in the order of int32, above the padding
        keys = lax.bitcast_convert_type(signed_order_bits(scores) ^ jnp.uint32(2**31), jnp.int32)
        keys = jnp.maximum(keys, -(2**31) + 1)
    moved = jnp.moveaxis(keys, axis, -1)
    padding = [(0, 0)] * (moved.ndim - 1) + [(0, -length % m)]
    groups = jnp.pad(moved, padding, constant_values=-(2**31))
    groups = groups.reshape(*groups.shape[:-1], groups.shape[-1] // m, m)
    rank = jnp.zeros(groups.shape, jnp.int32)
    place = jnp.arange(m)
    for j in range(m):  # m is small: each value's rank is how many beat it
        other = groups[..., j : j + 1]
        rank += ((other > groups) | ((other == groups) & (j < place))).astype(jnp.int32)
    mask = (rank < n).reshape(*moved.shape[:-1], -1)[..., :length]
    return jnp.moveaxis(mask, -1, axis)
