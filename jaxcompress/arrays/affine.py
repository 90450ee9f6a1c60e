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

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.errors import SpecError
from jaxcompress.numerics import divide, rounded

CONVENTIONS = ("absmax", "full", "no_clip")


class IntFormat(NamedTuple):
    """An integer format of `bits` bits.

    Examples:
      >>> IntFormat(4, True).qmin, IntFormat(4, True).qmax, str(IntFormat(8, False))
      (-8, 7, 'uint8')
    """

    bits: int
    signed: bool

    @property
    def qmin(self) -> int:
        """The least code."""
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """The greatest code."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    @property
    def dtype(self) -> np.dtype:
        """The dtype that holds unpacked codes: int8 or uint8."""
        return np.dtype(np.int8 if self.signed else np.uint8)

    def __str__(self) -> str:
        return f"{'' if self.signed else 'u'}int{self.bits}"


def int_format(name: str | IntFormat) -> IntFormat:
    """The format of a name: `int2` to `int8`, `uint2` to `uint8`.

    Raises:
      SpecError: for any other name.

    Examples:
      >>> int_format("int4")
      IntFormat(bits=4, signed=True)
    """
    if isinstance(name, IntFormat):
        return name
    match = re.fullmatch(r"(u?)int([2-8])", name)
    if match is None:
        raise SpecError(f"unknown format {name!r}: write int2 to int8 or uint2 to uint8")
    return IntFormat(int(match[2]), not match[1])


def affine_params(
    w: jax.Array,
    format: str | IntFormat,
    *,
    axes: int | Sequence[int],
    group_size: int | None = None,
    symmetric: bool = True,
    scale_dtype: Any = jnp.bfloat16,
    convention: str = "absmax",
) -> tuple[jax.Array, jax.Array | None]:
    """The scale and zero point of each channel or group.

    With `a = max|w|`, `lo = min(w, 0)`, `hi = max(w, 0)` over what shares a scale, and b bits:

    - symmetric `absmax`: `s = a / (2**(b-1) - 1)`, codes within `+-(2**(b-1) - 1)`;
    - symmetric `full`: `s = a / ((2**b - 1) / 2)`, all codes (compressed-tensors, torchao);
    - symmetric `no_clip`: `s = max(-lo / 2**(b-1), hi / (2**(b-1) - 1))`, all codes, no clipping;
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
    fmt = int_format(format)
    if convention not in CONVENTIONS:
        raise SpecError(f"unknown convention {convention!r}: write one of {CONVENTIONS}")
    if symmetric and not fmt.signed:
        raise SpecError(f"{fmt} cannot be symmetric: write int{fmt.bits} or symmetric=False")
    axes = _axes(axes, w.ndim)
    lo, hi = _range(w, axes) if group_size is None else _group_range(w, axes[-1], group_size)
    levels = 2**fmt.bits - 1
    largest = float(jnp.finfo(w.dtype).max)
    if not symmetric:
        # Halved, for the difference of the largest floats is none; the bits are the same.
        wanted = 2 * divide(hi / 2 - lo / 2, levels)
        scale = _store(wanted, scale_dtype)
        zero = fmt.qmin - divide(lo, scale.astype(jnp.float32))
        zero = jnp.round(jnp.clip(zero, fmt.qmin, fmt.qmax))
        limit = largest / jnp.maximum(fmt.qmax - zero, zero - fmt.qmin)
        return _store(wanted, scale_dtype, limit), zero.astype(fmt.dtype)
    if convention == "no_clip":
        scale = jnp.maximum(divide(-lo, -fmt.qmin), divide(hi, fmt.qmax))
    else:
        scale = divide(jnp.maximum(-lo, hi), levels / 2 if convention == "full" else fmt.qmax)
    codes = fmt.qmax if convention == "absmax" else -fmt.qmin
    return _store(scale, scale_dtype, largest / codes), None


def quantize(
    w: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    format: str | IntFormat,
    *,
    axes: int | Sequence[int],
    group_size: int | None = None,
    narrow: bool = False,
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

    Returns:
      The codes, int8 or uint8, in the shape of `w`.

    Examples:
      >>> import jax.numpy as jnp
      >>> w = jnp.array([[7.0], [-3.4]])
      >>> quantize(w, jnp.ones((1, 1)), None, "int4", axes=-2).tolist()
      [[7], [-3]]
    """
    fmt, spread = int_format(format), lambda x: _spread(_once(x), w.shape, axes, group_size)
    x, lo, hi = divide(w.astype(jnp.float32), spread(scale)), fmt.qmin + narrow, fmt.qmax
    if zero_point is None:
        return _round(jnp.clip(x, lo, hi)).astype(fmt.dtype)
    zero = spread(zero_point)  # the bounds are integers: clipping before rounding is the same
    return (_round(jnp.clip(x, lo - zero, hi - zero)) + _round(zero)).astype(fmt.dtype)


def in_range(
    w: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    format: str | IntFormat,
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
    fmt, spread = int_format(format), lambda x: _spread(_once(x), w.shape, axes, group_size)
    x = divide(w.astype(jnp.float32), spread(scale))
    margin = 0.5 + (fmt.qmax - fmt.qmin) * float(jnp.finfo(scale.dtype).eps) / 2
    lo, hi = fmt.qmin + narrow - margin, fmt.qmax + margin
    if zero_point is not None:
        x = x + spread(zero_point)
    return (x >= lo) & (x <= hi)


def dequantize(
    codes: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    *,
    axes: int | Sequence[int] = -1,
    group_size: int | None = None,
    dtype: Any = jnp.float32,
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

    Returns:
      An array in the shape of `codes`.

    Examples:
      >>> import jax.numpy as jnp
      >>> dequantize(jnp.array([3, -1]), jnp.array([0.5])).tolist()
      [1.5, -0.5]
    """
    x = codes.astype(jnp.float32)
    if zero_point is not None:
        x = x - _spread(zero_point.astype(jnp.float32), codes.shape, axes, group_size)
    return (x * _spread(scale.astype(jnp.float32), codes.shape, axes, group_size)).astype(dtype)


def _axes(axes: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    if not axes or any(not -ndim <= a < 0 for a in axes) or len(set(axes)) < len(axes):
        raise SpecError(f"axes must be distinct and in [-{ndim}, 0), not {axes}")
    return axes


def _group(group_size: int, n: int) -> int:
    if group_size <= 0:
        raise SpecError(f"a group has at least 1 value, not {group_size}")
    return max(1, min(group_size, n))


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


def _round(x: jax.Array) -> jax.Array:
    """`round(x)` modulo 256 as int32, halves to even, for `|x| < 2**22`.

    At `1.5 * 2**23` float32 holds just the integers, so that the addition rounds, and the low bits
    of the sum are those of the integer. XLA's own conversion to an integer checks for NaN and
    range, which took a quarter of the loop's time.
    """
    return jax.lax.bitcast_convert_type(x + jnp.float32(1.5 * 2**23), jnp.int32)


def _once(x: jax.Array) -> jax.Array:
    """`x` in float32, in a form that XLA computes once and not again for each weight.

    XLA:CPU repeats cheap operations inside the loop over the weights, here the clipping and
    rounding that made the scale. It never repeats a division, and dividing by 1 changes nothing.
    """
    x = x.astype(jnp.float32)
    return x / jnp.where(jnp.isnan(x), 2.0, 1.0)


def _store(scale: jax.Array, dtype: Any, limit: jax.Array | float | None = None) -> jax.Array:
    """The scale in its storage dtype, such that the greatest code times it is still finite.

    `limit` is the largest value of the weight's dtype over the greatest code. It is lowered by one
    unit in the last place, so that rounding to nearest cannot step over it.
    """
    info = jnp.finfo(dtype)  # 0 and infinity would make NaN, and subnormals are often read as 0
    most: Any = float(info.max)
    if limit is not None:
        most = jnp.minimum(most, limit * (1 - float(info.eps)))
    kept = rounded(jnp.clip(scale, float(info.smallest_normal), most), dtype)
    return jnp.where(scale == 0, jnp.ones_like(kept), kept)


def _spread(
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
