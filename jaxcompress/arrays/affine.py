"""Integer quantization on plain arrays: `w ~ (code - zero_point) * scale`.

Pure functions. A scale has as many axes as its weight; a reduced axis has length 1 and a grouped
axis has one entry a group. Everything is computed in float32 whatever the weight's dtype.

The scale is rounded to its storage dtype before the codes are computed, so the codes are the
nearest ones for what is stored. Zero is always exact: every range includes it, and a zero point is
an integer.

Sources: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference" (2018); Nagel et al., "A White Paper on Neural Network
Quantization" (2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import materialize
from jaxcompress.arrays.formats import Format, IntFormat, code_format, int_format, round_codes
from jaxcompress.errors import SpecError
from jaxcompress.numerics import divide, exponent_of, power_of_two, rounded

CONVENTIONS = ("absmax", "full", "no_clip", "power_of_two")

__all__ = [
    "CONVENTIONS",
    "IntFormat",
    "affine_params",
    "dequantize",
    "in_range",
    "int_format",
    "quantize",
    "spread",
]


def affine_params(
    w: jax.Array,
    format: str | Format,
    *,
    axes: int | Sequence[int],
    group_size: int | None = None,
    symmetric: bool = True,
    scale_dtype: Any = jnp.bfloat16,
    convention: str = "absmax",
) -> tuple[jax.Array, jax.Array | None]:
    """The scale and zero point of each channel or group.

    For formats other than integers `s = a / extent`, or `power_of_two`; for fixed-point numbers
    `s = 2**-fraction`. For integers, with `a = max|w|`, `lo = min(w, 0)`, `hi = max(w, 0)` over
    what shares a scale, and b bits:

    - symmetric `absmax`: `s = a / (2**(b-1) - 1)`, codes within `+-(2**(b-1) - 1)`;
    - symmetric `full`: `s = a / ((2**b - 1) / 2)`, all codes (compressed-tensors, torchao);
    - symmetric `no_clip`: `s = max(-lo / 2**(b-1), hi / (2**(b-1) - 1))`, all codes, no clipping;
    - symmetric `power_of_two`: `s = 2**(floor(log2 a) - e)` with e of the format's largest value
      `2**e` or more but less than twice that (Microscaling Formats), all codes;
    - affine: `s = (hi - lo) / (2**b - 1)`, `z = round(clip(qmin - lo / s, qmin, qmax))`.

    Args:
      w: the weight; float32, bfloat16 or float16 of any shape.
      format: such as `"int4"`.
      axes: the reduced (input) axes, negative.
      group_size: None for one scale over all of `axes`; else groups of that many values along
        `axes[-1]`, while the other `axes` keep their own scales. The last group may be shorter,
        and a size beyond the axis means one group.
      symmetric: whether codes are centred on zero, without a zero point.
      scale_dtype: what the scale is rounded to. It is kept within the normal numbers of that
        dtype: a scale of zero or infinity would turn weights into NaN, and subnormal numbers
        read as zero on hardware that flushes them. Nor may the greatest code times it exceed
        what the dtype of `w` holds.
      convention: of the symmetric scale, see above; ignored when affine.

    Returns:
      `(scale, zero_point)`: in `scale_dtype`, and None or codes (int8 or uint8). The scale of a
      group of zeros is 1.

    Raises:
      SpecError: for an unknown format or convention, a symmetric unsigned format, or bad axes.

    Examples:
      >>> import jax.numpy as jnp
      >>> scale, _ = affine_params(jnp.array([[7.0], [-3.5]]), "int4", axes=-2)
      >>> float(scale[0, 0])
      1.0
    """
    axes = check(format, axes, w.ndim, symmetric, convention)
    lo, hi = least_and_greatest(w, axes, group_size)
    return params_of_range(
        lo,
        hi,
        format,
        w.dtype,
        symmetric=symmetric,
        convention=convention,
        store=lambda scale, limit: stored(scale, scale_dtype, limit),
    )


def check(
    format: str | Format, axes: int | Sequence[int], ndim: int, symmetric: bool, convention: str
) -> tuple[int, ...]:
    """Refuses what does not go together; the axes as a tuple."""
    fmt = code_format(format)
    if convention not in CONVENTIONS:
        raise SpecError(f"unknown convention {convention!r}: write one of {CONVENTIONS}")
    if symmetric and not fmt.signed:
        raise SpecError(f"{fmt} cannot be symmetric: write int{fmt.bits} or symmetric=False")
    if symmetric and isinstance(fmt, IntFormat) and fmt.qmax == 0:
        raise SpecError(f"{fmt} has no positive code: write binary, or symmetric=False")
    if not symmetric and not (isinstance(fmt, IntFormat) and fmt.fraction is None):
        raise SpecError(f"{fmt} has no zero points: write symmetric=True")
    return _axes(axes, ndim)


def params_of_range(
    lo: jax.Array,
    hi: jax.Array,
    format: str | Format,
    dtype: Any,
    *,
    symmetric: bool,
    convention: str,
    store: Callable[[jax.Array, Any], jax.Array],
) -> tuple[Any, jax.Array | None]:
    """`affine_params` of ranges `lo <= 0 <= hi`, float32, of weights of a dtype.

    Args:
      lo: the least value of what shares a scale.
      hi: the greatest.
      format: such as `"int4"`.
      dtype: of the weights.
      symmetric: as in `affine_params`.
      convention: as in `affine_params`.
      store: what makes of scales, float32, and their upper limits the scales that are stored.
    """
    fmt = code_format(format)
    levels = 2**fmt.bits - 1
    largest = float(jnp.finfo(dtype).max)
    if isinstance(fmt, IntFormat) and fmt.fraction is not None:
        return store(jnp.full(lo.shape, 2.0**-fmt.fraction, jnp.float32), math.inf), None
    if not symmetric:
        assert isinstance(fmt, IntFormat)
        # Halved, for the difference of the largest floats is none; the bits are the same.
        wanted = 2 * divide(hi / 2 - lo / 2, levels)
        scale = materialize(store(wanted, None))
        zero = fmt.qmin - divide(lo, scale.astype(jnp.float32))
        zero = jnp.round(jnp.clip(zero, fmt.qmin, fmt.qmax))
        limit = largest / jnp.maximum(fmt.qmax - zero, zero - fmt.qmin)
        return store(wanted, limit), zero.astype(fmt.dtype)
    top = fmt.qmax if isinstance(fmt, IntFormat) else fmt.extent
    if convention == "power_of_two":
        # The largest value falls into the highest binade of the format, and may be clipped there.
        highest = math.floor(math.log2(top))
        scale = power_of_two(exponent_of(jnp.maximum(-lo, hi))) * 2.0**-highest
    elif convention == "no_clip" and isinstance(fmt, IntFormat):
        scale = jnp.maximum(divide(-lo, -fmt.qmin), divide(hi, fmt.qmax))
    elif convention == "full" and isinstance(fmt, IntFormat):
        scale = divide(jnp.maximum(-lo, hi), levels / 2)
    else:
        scale = divide(jnp.maximum(-lo, hi), top)
    codes = top if convention == "absmax" else fmt.extent
    return store(scale, largest / codes), None


def quantize(
    w: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    format: str | Format,
    *,
    axes: int | Sequence[int],
    group_size: int | None = None,
    narrow: bool = False,
    noise: jax.Array | None = None,
) -> jax.Array:
    """The codes `clip(round(w / scale) + zero_point, qmin, qmax)`, halves rounded to even.

    Args:
      w: the weight.
      scale: of `affine_params`, or any of that shape.
      zero_point: of `affine_params`, or None.
      format: such as `"int4"`.
      axes: as in `affine_params`; only `axes[-1]` matters, and only with groups.
      group_size: as in `affine_params`.
      narrow: whether `qmin` is left out, so that codes are within `+-qmax`, as `absmax` has them.
      noise: None, or uniform numbers in [0, 1) in the shape of `w`, for stochastic rounding:
        `floor(w / scale + noise)`, whose mean is `w / scale`.

    Returns:
      The codes, int8 or uint8, in the shape of `w`.

    Examples:
      >>> import jax.numpy as jnp
      >>> w = jnp.array([[7.0], [-3.4]])
      >>> quantize(w, jnp.ones((1, 1)), None, "int4", axes=-2).tolist()
      [[7], [-3]]
    """
    fmt, wide = code_format(format), lambda x: spread(_once(x), w.shape, axes, group_size)
    x = divide(w.astype(jnp.float32), wide(_safe(scale)))
    if not isinstance(fmt, IntFormat):
        return fmt.encode(x, noise)
    lo, hi = fmt.qmin + _narrow(fmt, narrow), fmt.qmax
    if zero_point is None:
        return round_codes(jnp.clip(x, lo, hi), noise).astype(fmt.dtype)
    zero = wide(zero_point)  # the bounds are integers: clipping before rounding is the same
    codes = round_codes(jnp.clip(x, lo - zero, hi - zero), noise) + round_codes(zero)
    return codes.astype(fmt.dtype)


def in_range(
    w: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    format: str | Format,
    *,
    axes: int | Sequence[int],
    group_size: int | None = None,
    narrow: bool = False,
) -> jax.Array:
    """Where the nearest code is one of the format's, so that `quantize` clips nothing.

    A scale of fewer bits may have been rounded down, which moves the outermost codes outwards; so
    much is granted besides the half step of rounding.

    Args:
      w: the weight; see `quantize` for the others.
      scale: the scale.
      zero_point: the zero point, or None.
      format: such as `"int4"`.
      axes: as in `quantize`.
      group_size: as in `quantize`.
      narrow: as in `quantize`.

    Examples:
      >>> import jax.numpy as jnp
      >>> in_range(jnp.array([7.4, 7.6]), jnp.ones(1), None, "int4", axes=-1).tolist()
      [True, False]
    """
    fmt, wide = code_format(format), lambda x: spread(_once(x), w.shape, axes, group_size)
    x, eps = divide(w.astype(jnp.float32), wide(_safe(scale))), float(jnp.finfo(scale.dtype).eps)
    if not isinstance(fmt, IntFormat):
        values = fmt.values()
        half = (values[-1] - values[-2]) / 2  # as far as the outermost code is the nearest
        return jnp.abs(x) <= fmt.extent * (1 + eps / 2) + half
    margin = 0.5 + (fmt.qmax - fmt.qmin) * eps / 2
    lo, hi = fmt.qmin + _narrow(fmt, narrow) - margin, fmt.qmax + margin
    if zero_point is not None:
        x = x + wide(zero_point)
    return (x >= lo) & (x <= hi)


def dequantize(
    codes: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    *,
    axes: int | Sequence[int] = -1,
    group_size: int | None = None,
    dtype: Any = jnp.float32,
    format: str | Format | None = None,
) -> jax.Array:
    """The values `(codes - zero_point) * scale`, in float32 and then cast to `dtype`.

    This is the one lowering: whatever must agree with a stored weight bit for bit calls it.

    Args:
      codes: of `quantize`, any dtype (floating codes of a fake quantization included).
      scale: of `affine_params`.
      zero_point: of `affine_params`, or None.
      axes: as in `quantize`.
      group_size: as in `quantize`.
      dtype: of the result.
      format: of the codes; None: they are integers.

    Returns:
      An array in the shape of `codes`.

    Examples:
      >>> import jax.numpy as jnp
      >>> dequantize(jnp.array([3, -1]), jnp.array([0.5])).tolist()
      [1.5, -0.5]
    """
    x = codes.astype(jnp.float32) if format is None else code_format(format).decode(codes)
    if zero_point is not None:
        x = x - spread(zero_point.astype(jnp.float32), codes.shape, axes, group_size)
    return (x * spread(scale.astype(jnp.float32), codes.shape, axes, group_size)).astype(dtype)


def _axes(axes: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    if not axes or any(not -ndim <= a < 0 for a in axes) or len(set(axes)) < len(axes):
        raise SpecError(f"axes must be distinct and in [-{ndim}, 0), not {axes}")
    return axes


def _group(group_size: int, n: int) -> int:
    if group_size <= 0:
        raise SpecError(f"a group has at least 1 value, not {group_size}")
    return max(1, min(group_size, n))


def least_and_greatest(
    w: jax.Array, axes: Sequence[int], group_size: int | None
) -> tuple[jax.Array, jax.Array]:
    """The least and the greatest of zero and the values that share a scale, float32."""
    return _range(w, axes) if group_size is None else _group_range(w, axes[-1], group_size)


def _range(w: jax.Array, axes: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """The least and the greatest of zero and the values along `axes`, in float32."""
    lo = hi = w
    for axis in sorted(a + w.ndim for a in axes):
        while lo.shape[axis] != 1:
            lo, hi = _fold(lo, hi, axis)
    lo, hi = lo.astype(jnp.float32), hi.astype(jnp.float32)
    return jnp.minimum(lo, 0), jnp.maximum(hi, 0)


def _group_range(w: jax.Array, axis: int, group_size: int) -> tuple[jax.Array, jax.Array]:
    """`_range` of each group along one axis; the last group may be shorter."""
    n, i = w.shape[axis], w.ndim + axis
    g = _group(group_size, n)
    whole = n // g * g
    parts = []
    for start, stop, size in ((0, whole, g), *([(whole, n, n - whole)] if whole < n else [])):
        part = jax.lax.slice_in_dim(w, start, stop, axis=i)
        split = (*w.shape[:i], (stop - start) // size, size, *w.shape[i + 1 :])
        lo, hi = _range(part.reshape(split), (axis,))
        parts.append((lo.squeeze(i + 1), hi.squeeze(i + 1)))
    lo, hi = (x[0] if len(x) == 1 else jnp.concatenate(x, axis=i) for x in zip(*parts))
    return lo, hi


def _fold(lo: jax.Array, hi: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Shortens one axis by a factor of 8 to 32, keeping minima and maxima.

    One joint reduction reads the weight once for both, and short steps are vector code on XLA:CPU
    whichever axis it is. There, a plain `max` over a leading axis or a reshaped weight took up to
    20 times as long, and a joint reduction over a whole long axis 30 times.
    """
    n = lo.shape[axis]
    steps = 1 if n <= 32 else next((n // k for k in range(32, 7, -1) if n % k == 0), 0)
    if not steps:
        cut = n - n % 16
        take = lambda x, start, stop: jax.lax.slice_in_dim(x, start, stop, axis=axis)
        parts = [
            _fold(take(lo, start, stop), take(hi, start, stop), axis)
            for start, stop in ((0, cut), (cut, n))
        ]
        low, high = (jnp.concatenate(x, axis) for x in zip(*parts))
        return low, high
    shape = (*lo.shape[:axis], steps, n // steps, *lo.shape[axis + 1 :])
    zero = np.zeros((), lo.dtype)
    both = lambda a, b: (jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1]))
    low, high = jax.lax.reduce(
        (lo.reshape(shape), hi.reshape(shape)), (zero, zero), both, (axis + 1,)
    )
    return low, high


def _narrow(fmt: IntFormat, narrow: bool) -> bool:
    return narrow and not fmt.narrowed and fmt.bits > 1


def _safe(scale: jax.Array) -> jax.Array:
    """A scale to divide by: codes under a scale of zero are of no matter, if they are no NaN."""
    return jnp.where(scale == 0, jnp.ones_like(scale), scale)


def _once(x: jax.Array) -> jax.Array:
    """`x` in float32, in a form that XLA computes once and not again for each weight.

    XLA:CPU repeats cheap operations inside the loop over the weights, here the clipping and
    rounding that made the scale. It never repeats a division, and dividing by 1 changes nothing.
    """
    x = x.astype(jnp.float32)
    return x / jnp.where(jnp.isnan(x), 2.0, 1.0)


def stored(scale: jax.Array, dtype: Any, limit: jax.Array | float | None = None) -> jax.Array:
    """The scale in its storage dtype, such that the greatest code times it is still finite.

    `limit` is the largest value of the weight's dtype over the greatest code. It is lowered by one
    unit in the last place, so that rounding to nearest cannot step over it.
    """
    info = jnp.finfo(dtype)  # 0 and infinity would make NaN, and subnormals are often read as 0
    most: Any = float(info.max)
    if limit is not None:
        most = jnp.minimum(most, limit * (1 - min(0.5, float(info.eps))))
    least = max(float(info.smallest_normal), 2.0**-126)
    kept = rounded(jnp.clip(scale, least, most), dtype)
    return jnp.where(scale == 0, jnp.ones_like(kept), kept)


def spread(
    x: jax.Array, shape: Sequence[int], axes: int | Sequence[int], group_size: int | None
) -> jax.Array:
    """`x` with one entry a group repeated along the grouped axis, ready to broadcast."""
    if group_size is None:
        return x
    axis = _axes(axes, len(shape))[-1]
    n = shape[axis]
    g = _group(group_size, n)
    i = x.ndim + axis
    wide = jnp.broadcast_to(
        jnp.expand_dims(x, i + 1), (*x.shape[: i + 1], g, *x.shape[i + 1 :])
    ).reshape(*x.shape[:i], x.shape[i] * g, *x.shape[i + 1 :])
    return jax.lax.slice_in_dim(wide, 0, n, axis=i)
