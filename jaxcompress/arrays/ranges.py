"""How the range of weights that share a scale follows from them: all of it, or less.

What is cut off is clipped; what stays is resolved more finely.

Sources: Banner et al., "Post Training 4-bit Quantization of Convolutional Networks for Rapid
Deployment" (2019), for ACIQ; Li, Zhang and Liu, "Ternary Weight Networks" (2016).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays import affine
from jaxcompress.arrays.formats import IntFormat
from jaxcompress.errors import SpecError
from jaxcompress.numerics import in_groups

NAMES = "min_max, percentile:99.9 (or another number), mse, aciq"

# The shares of the full range that are tried.
_SHARES = 100


def check_estimator(name: str | None) -> None:
    """Refuses what is no estimator.

    Raises:
      SpecError: says what to write.
    """
    if name in (None, "min_max", "mse", "aciq"):
        return
    match = re.fullmatch(r"percentile:(\d+(?:\.\d+)?)", name) if isinstance(name, str) else None
    if match is None or not 0 < float(match[1]) <= 100:
        raise SpecError(f"estimator={name!r}: write one of {NAMES}")


def estimate(w: jax.Array, scheme: Any) -> tuple[jax.Array, jax.Array]:
    """The range of each group of weights: `lo <= 0 <= hi`, float32.

    - `min_max`: from the least to the greatest weight;
    - `percentile:p`: so that p percent of the magnitudes are within; of affine codes the quantiles
      `(100 - p) / 2` and `100 - (100 - p) / 2` percent;
    - `mse`: the share of the full range, of 100 that are tried, of least squared error; of binary
      and ternary codes the very best scale;
    - `aciq`: `alpha = c b` of Laplace's distribution with b the mean magnitude, or `c sigma` of the
      normal one, whichever has less squared error, with the c that is best for the number of codes.

    Args:
      w: the weights.
      scheme: a `Scheme`; its `estimator` None is `mse` for binary and ternary codes and `min_max`
        for all others.
    """
    name = scheme.estimator
    if name is None:
        name = "mse" if scheme.code.name in ("binary", "ternary") else "min_max"
    check_estimator(name)
    lo, hi = full_range(w, scheme)
    if name == "min_max" or (isinstance(scheme.code, IntFormat) and scheme.code.fraction):
        return lo, hi
    if name == "mse" and scheme.code.name in ("binary", "ternary"):
        alpha = _best_alpha(w, scheme)
        return -alpha, alpha
    if name.startswith("percentile:"):
        return _percentile(w, scheme, float(name.partition(":")[2]))
    if name == "aciq":
        return _best_of(w, scheme, lambda i: _aciq(w, scheme, lo, hi, i), 2)
    return _best_of(w, scheme, lambda i: _shrunk(lo, hi, i), _SHARES)


def full_range(w: jax.Array, scheme: Any) -> tuple[jax.Array, jax.Array]:
    """The least and the greatest of zero and the weights of each group."""
    lo, hi = affine.least_and_greatest(w, scheme.axes, scheme.group)
    if scheme.block is not None:
        lo = _windows(lo, scheme.block, jnp.min)
        hi = _windows(hi, scheme.block, jnp.max)
    return lo, hi


def group_sums(x: jax.Array, scheme: Any) -> jax.Array:
    """The sum of what shares a scale, in the shape of the scales."""
    if scheme.group is None:
        x = jnp.sum(x, axis=scheme.axes, keepdims=True)
    else:  # the other axes keep scales of their own
        x = _windows(x, (scheme.axes[-1], scheme.group), jnp.sum)
    return x if scheme.block is None else _windows(x, scheme.block, jnp.sum)


def _windows(x: jax.Array, where: tuple[int, int], reduce: Callable[..., jax.Array]) -> jax.Array:
    """A reduction, for which zero is neutral, over so many neighbours along an axis."""
    axis, size = where
    return reduce(in_groups(x, axis, size), axis=x.ndim + axis + 1)


def _rows(x: jax.Array, scheme: Any, pad: float) -> jax.Array:
    """Weights with what shares a scale along the last axis, and the axes of the scales before."""
    sizes: dict[int, int | None] = dict.fromkeys(scheme.axes)
    if scheme.group is not None:  # the other axes keep scales of their own
        sizes = {scheme.axes[-1]: scheme.group}
    if scheme.block is not None:
        sizes[scheme.block[0]] = scheme.block[1]
    kept: list[int] = []
    parts: list[int] = []
    for axis in range(-x.ndim, 0):
        at = len(kept) + len(parts)
        kept.append(at)
        if axis in sizes:
            x = in_groups(x, axis, sizes[axis], pad)  # the axes behind keep their numbers
            parts.append(at + 1)
    shape = (*(x.shape[a] for a in kept), math.prod(x.shape[a] for a in parts))
    return jnp.transpose(x, (*kept, *parts)).reshape(shape)


def _best_of(
    w: jax.Array, scheme: Any, candidate: Callable[[Any], tuple[jax.Array, jax.Array]], n: int
) -> tuple[jax.Array, jax.Array]:
    """Of n ranges the one of least squared error, in each group; the first of equal ones."""

    def error(lo: jax.Array, hi: jax.Array) -> jax.Array:
        scale, zero = scheme.of_range(lo, hi, w)
        values = scheme.values(scheme.codes(w, scale, zero), scale, zero, jnp.float32)
        change = w.astype(jnp.float32) - values
        return group_sums(change * change, scheme)

    def step(i: Any, best: Any) -> Any:
        lo, hi = candidate(i)
        found = error(lo, hi)
        less = found < best[0]
        return tuple(jnp.where(less, a, b) for a, b in zip((found, lo, hi), best))

    lo, hi = candidate(0)
    _, lo, hi = jax.lax.fori_loop(1, n, step, (error(lo, hi), lo, hi))
    return lo, hi


def _shrunk(lo: jax.Array, hi: jax.Array, i: Any) -> tuple[jax.Array, jax.Array]:
    share = 1 - jnp.asarray(i, jnp.float32) / _SHARES
    return lo * share, hi * share


def _best_alpha(w: jax.Array, scheme: Any) -> jax.Array:
    """The a of least `sum (w - a q)**2` with q of -1, 1 and perhaps 0.

    Binary: the mean magnitude. Ternary: where the k largest are kept, their mean magnitude, which
    leaves `sum w**2 - (sum of the k)**2 / k`; k is the best of all.
    """
    size = jnp.abs(w.astype(jnp.float32))
    total, count = group_sums(size, scheme), group_sums(jnp.ones(w.shape, jnp.float32), scheme)
    if scheme.code.name == "binary":
        return total / count
    rows = jnp.sort(_rows(size, scheme, 0.0), axis=-1, descending=True)
    sums, kept = jnp.cumsum(rows, axis=-1), jnp.arange(1, rows.shape[-1] + 1, dtype=jnp.float32)
    best = jnp.argmax(sums * sums / kept, axis=-1, keepdims=True)
    return (jnp.take_along_axis(sums, best, axis=-1) / (best + 1))[..., 0].reshape(total.shape)


def _percentile(w: jax.Array, scheme: Any, p: float) -> tuple[jax.Array, jax.Array]:
    """Quantiles of magnitudes, or of both ends, interpolated between neighbours."""
    x, shape = w.astype(jnp.float32), full_range(w, scheme)[0].shape
    count = group_sums(jnp.ones(w.shape, jnp.float32), scheme)

    def quantile(x: jax.Array, share: float) -> jax.Array:
        rows = jnp.sort(_rows(x, scheme, jnp.inf), axis=-1)  # what is not there comes last
        at = share * (count.reshape(rows.shape[:-1]) - 1)
        low = jnp.floor(at).astype(jnp.int32)
        take = lambda i: jnp.take_along_axis(rows, i[..., None], axis=-1)[..., 0]
        below, above = take(low), take(jnp.ceil(at).astype(jnp.int32))
        value = jnp.where(count.reshape(at.shape) > 0, below + (at - low) * (above - below), 0.0)
        return value.reshape(shape)

    if scheme.symmetric:
        top = quantile(jnp.abs(x), p / 100)
        return -top, top
    tail = (1 - p / 100) / 2
    return jnp.minimum(quantile(x, tail), 0.0), jnp.maximum(quantile(x, 1 - tail), 0.0)


def _aciq(
    w: jax.Array, scheme: Any, lo: jax.Array, hi: jax.Array, i: Any
) -> tuple[jax.Array, jax.Array]:
    """The range for Laplace's distribution (0) or the normal one (1), within the full one."""
    x = w.astype(jnp.float32)
    count = group_sums(jnp.ones(w.shape, jnp.float32), scheme)
    laplace = group_sums(jnp.abs(x), scheme) / count
    normal = jnp.sqrt(group_sums(x * x, scheme) / count)
    levels = len(scheme.code.values())
    alpha = jnp.where(i == 0, laplace_clip(levels) * laplace, normal_clip(levels) * normal)
    return jnp.maximum(lo, -alpha), jnp.minimum(hi, alpha)


@functools.lru_cache
def laplace_clip(levels: int) -> float:
    """The `alpha / b` of least expected squared error for Laplace's distribution.

    `2 b**2 exp(-alpha / b) + alpha**2 / (3 n**2)` for n levels: the x of `x exp(x) = 3 n**2`.

    Examples:
      >>> round(laplace_clip(4), 2), round(laplace_clip(16), 2)
      (2.83, 5.03)
    """
    return _root(lambda x: math.log(x) + x - math.log(3 * levels**2))


@functools.lru_cache
def normal_clip(levels: int) -> float:
    """The `alpha / sigma` of least expected squared error for the normal distribution.

    Where the derivative of `(a**2 + s**2) erfc(a / (s sqrt(2))) - sqrt(2 / pi) a s exp(-a**2 /
    (2 s**2)) + a**2 / (3 n**2)` is zero.

    Examples:
      >>> round(normal_clip(4), 2), round(normal_clip(16), 2)
      (1.71, 2.56)
    """

    def slope(a: float) -> float:
        tail = 2 * a * math.erfc(a / math.sqrt(2))
        peak = 2 * math.sqrt(2 / math.pi) * math.exp(-a * a / 2)
        return tail - peak + 2 * a / (3 * levels**2)

    return _root(slope)


def _root(rising: Callable[[float], float]) -> float:
    low, high = 1e-6, 20.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return float(np.float32(low))
