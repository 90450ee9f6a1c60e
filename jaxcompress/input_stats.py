"""Statistics of the inputs that meet a weight: what is summed, and how it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# A magnitude's bin is its exponent and the first three bits of its mantissa.
_BIN_SHIFT = 20
BINS = 2 ** (31 - _BIN_SHIFT)


class InputStats(NamedTuple):
    """What was seen of the inputs x of one contraction of one weight.

    K is the number of inputs of the contraction, in the order of the weight's contracted axes:
    `kh kw cin` for a convolution. Leading axes `[...]` are those of a stack of weights and, in a
    grouped convolution, of the groups. In a look-up the inputs are one-hot rows of length K, and
    `gram`, which is then diagonal, is its diagonal.

    Statistics that were not asked for are None.

    Attributes:
      count: how many inputs x there were, int64 `[...]`.
      gram: `sum x x'`, float32 `[..., K, K]`, or `[..., K]` of a look-up.
      second_moment: the mean of `x**2`, float32 `[..., K]`.
      abs_mean: the mean of `|x|`, float32 `[..., K]`.
      abs_max: the largest `|x|`, float32 `[..., K]`.
      histogram: how many values have a magnitude within each of the `histogram_edges`, int64
        `[..., 2048]`.
      minimum: the least x, or 0 if none is below, float32 `[..., K]`.
      maximum: the greatest x, or 0 if none is above, float32 `[..., K]`.
      mean: the mean of x, float32 `[..., K]`.
      fisher: no statistic of x, and not of `observe`: the diagonal of the Fisher information of the
        weights that an input meets, summed over them, float32 `[..., K]`.
    """

    count: Any
    gram: Any = None
    second_moment: Any = None
    abs_mean: Any = None
    abs_max: Any = None
    histogram: Any = None
    minimum: Any = None
    maximum: Any = None
    mean: Any = None
    fisher: Any = None


def histogram_edges() -> np.ndarray:
    """The 2049 edges of the bins of magnitudes: eight to an octave, `2**e (1 + i / 8)`.

    They span all of float32; the first bin holds zeros as well, the last 8 infinity and NaN.

    Examples:
      >>> edges = histogram_edges()
      >>> tuple(float(x) for x in edges[127 * 8 : 127 * 8 + 3])
      (1.0, 1.125, 1.25)
    """
    bits = np.arange(BINS + 1, dtype=np.uint64) << _BIN_SHIFT
    edges = np.minimum(bits, 2**31 - 1).astype(np.uint32).view(np.float32)
    return np.where(np.isnan(edges), np.float32(np.inf), edges)


def _gram(x: jax.Array) -> jax.Array:
    batch, rows = tuple(range(x.ndim - 2)), x.ndim - 2
    return lax.dot_general(
        x,
        x,
        (((rows,), (rows,)), (batch, batch)),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _histogram(x: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.uint32)
    bins = (bits >> _BIN_SHIFT).reshape(*x.shape[:-2], -1)
    count = lambda bins: jnp.zeros(BINS, jnp.int32).at[bins].add(1, mode="promise_in_bounds")
    for _ in x.shape[:-2]:
        count = jax.vmap(count)
    return count(bins)


def _sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=-2)


_OF_ROWS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "gram": _gram,
    "second_moment": lambda x: _sum(jnp.square(x.astype(jnp.float32))),
    "abs_mean": lambda x: _sum(jnp.abs(x.astype(jnp.float32))),
    "abs_max": lambda x: jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-2, initial=0.0),
    "histogram": _histogram,
    "minimum": lambda x: jnp.min(x.astype(jnp.float32), axis=-2, initial=0.0),
    "maximum": lambda x: jnp.max(x.astype(jnp.float32), axis=-2, initial=0.0),
    "mean": lambda x: _sum(x.astype(jnp.float32)),
}
# How statistics of two batches become those of both, where they are not summed.
_MERGED = {"abs_max": jnp.maximum, "maximum": jnp.maximum, "minimum": jnp.minimum}
NAMES = tuple(_OF_ROWS)


def of_rows(x: jax.Array, names: tuple[str, ...]) -> dict[str, jax.Array]:
    """Sums (or maxima, minima) over the inputs `[..., rows, K]`, and how many rows there are."""
    x = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
    count = jnp.full(x.shape[:-2], x.shape[-2], jnp.int32)
    return {"count": count, **{name: _OF_ROWS[name](x) for name in names}}


def of_look_ups(rows: jax.Array, size: int, names: tuple[str, ...]) -> dict[str, jax.Array]:
    """The same for one-hot inputs of length `size`, given by the places of their ones.

    A place out of bounds, negative ones included, is an input of zeros. The histogram leaves out
    the zeros, of which there may be too many for 32 bits; `finished` puts them in.
    """
    places = jnp.where(rows < 0, size, rows).reshape(-1)
    seen = jnp.zeros(size, jnp.float32).at[places].add(1, mode="drop")
    out = {"count": jnp.asarray(rows.size, jnp.int32)}
    for name in names:
        if name in ("abs_max", "maximum"):
            out[name] = jnp.minimum(seen, 1)
        elif name == "minimum":
            out[name] = jnp.zeros_like(seen)
        elif name == "histogram":
            ones = jnp.sum(places < size, dtype=jnp.int32)
            out[name] = jnp.zeros(BINS, jnp.int32).at[127 * 8].set(ones)
        else:
            out[name] = seen
    return out


def merge(a: dict[str, jax.Array], b: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The statistics of both."""
    return {n: _MERGED.get(n, jnp.add)(a[n], b[n]) for n in a}


def finished(sums: Mapping[str, Any], size: int) -> InputStats:
    """Means from sums over inputs of `size` values; counts are numpy's, in 64 bits."""
    fields = dict(sums)
    count = fields["count"]
    for name in ("second_moment", "abs_mean", "mean"):
        if name in fields:
            fields[name] = fields[name] / jnp.asarray(count[..., None], jnp.float32)
    if "histogram" in fields:
        histogram = fields["histogram"].copy()
        histogram[..., 0] += count * size - histogram.sum(axis=-1)
        fields["histogram"] = histogram
    return InputStats(**fields)


def all_finite(stats: InputStats) -> bool:
    """Whether no input was NaN or infinite, as far as the statistics show."""
    floats = (*stats[1:5], stats.minimum, stats.maximum, stats.mean)
    finite = all(bool(jnp.all(jnp.isfinite(x))) for x in floats if x is not None)
    return finite and not (stats.histogram is not None and np.any(stats.histogram[..., 255 * 8 :]))
