"""`Quantize`: round to the nearest code; `FakeQuantize`: train with what that gives."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays import affine
from jaxcompress.arrays.fake_quantized import FakeQuantizedArray
from jaxcompress.arrays.formats import IntFormat, MiniFloat, code_format
from jaxcompress.arrays.quantized import QuantizedArray
from jaxcompress.arrays.ranges import check_estimator
from jaxcompress.arrays.scheme import Scheme
from jaxcompress.errors import SpecError
from jaxcompress.specs import LeafContext, Plan, Spec, is_count, is_floating_dtype, register_spec

Q = TypeVar("Q", bound="Quantize")

_MX = {"group_size": 32, "scale_dtype": "float8_e8m0fnu", "convention": "power_of_two"}

# Formats that settle more than the codes.
PRESETS: dict[str, dict[str, Any]] = {
    "mxfp8_e4m3": {"format": "fp8_e4m3", **_MX},
    "mxfp8_e5m2": {"format": "fp8_e5m2", **_MX},
    "mxfp6_e2m3": {"format": "fp6_e2m3", **_MX},
    "mxfp6_e3m2": {"format": "fp6_e3m2", **_MX},
    "mxfp4": {"format": "fp4_e2m1", **_MX},
    "mxint8": {"format": "int8", **_MX},
    "nvfp4": {"format": "fp4_e2m1", "group_size": 16, "scale_format": "fp8_e4m3"},
}


@register_spec("quantize")
@dataclasses.dataclass(frozen=True, repr=False)
class Quantize(Spec):
    """Codes of few bits and scales: any format, granularity, range and rounding.

    Symmetric integers: `w ~ s q` with `s = max|w| / (2**(b-1) - 1)`. Affine ones: `w ~ s (q - z)`
    with `s = (max - min) / (2**b - 1)` over a range that includes zero, and an integer z, so that
    zero is exact. All other formats: `w ~ s v(q)` with the values v of the format and
    `s = max|w| / max(v)`. The scale is rounded to `scale_dtype` before the codes are computed, so
    that they are the nearest for what is stored. A bfloat16 scale moves the grid by at most 2**-9
    relative, so that even code 127 moves by less than half a step.

    Args:
      format: stored with exactly as many bits as it has:

        - `int1` .. `int8`, `uint1` .. `uint8`; `ternary` (2 bits); `binary` (1 bit, no zero);
        - `fixed8.5` and the like: integers of 8 bits with the scale `2**-5` for all weights;
        - `pow2_2` .. `pow2_8`: zero and powers of two;
        - `fp8_e4m3`, `fp8_e5m2`, `fp6_e2m3`, `fp6_e3m2`, `fp4_e2m1`, `nf4`;
        - `mxfp8_e4m3`, `mxfp8_e5m2`, `mxfp6_e2m3`, `mxfp6_e3m2`, `mxfp4`, `mxint8`: groups of 32
          with scales that are powers of two, in 8 bits;
        - `nvfp4`: `fp4_e2m1` in groups of 16, with scales in `fp8_e4m3`.
      group_size: weights that share a scale along the last input axis; the last group may be
        shorter. None: one scale per output channel. Two numbers, such as `(32, 32)`: blocks, that
        many inputs by that many outputs.
      axis: the input axes over which a scale is shared, one or several; None: the leaf's own
        (see `kernel_axes`), all axes of a vector.
      symmetric: whether zero is the middle of the range; False stores zero points.
      scale_dtype: the dtype in which scales are stored.
      convention: how the symmetric scale follows from the range, where libraries differ: `absmax`
        as above, `full` with `s = max|w| / ((2**b - 1) / 2)`, `no_clip` with
        `s = max(-min / 2**(b-1), max / (2**(b-1) - 1))`, or `power_of_two`, with which the largest
        magnitude falls into the highest binade of the format.
      estimator: how the range follows from the weights: `min_max`; `percentile:99.9` (or another
        number), the range of that share of the weights; `mse`, the share of the full range with
        the least squared error; `aciq`, from the mean magnitude and the variance. None: `min_max`,
        and for `binary` and `ternary` `mse`, which is exact for them.
      rounding: `nearest`, half to even, or `stochastic`: up or down at random, such that the mean
        is the weight; it needs a key, `compress(..., key=key)`.
      scale_format: a format in which the scales themselves are stored, such as `uint8` or
        `fp8_e4m3`, under float32 scales of their own; None: in `scale_dtype`.
      scale_group_size: scales along the input axis that share one of their own; None: all from the
        first input axis on, which is all of a kernel, and one row of a table whose inputs are last.

    Raises:
      SpecError: for an unknown format, axis, convention, estimator or rounding, for what does not
        go together, or a group size below 1.

    References:
      Jacob et al., *Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference*, 2018; Dettmers et al., *QLoRA: Efficient Finetuning of
      Quantized LLMs*, 2023 (nf4, quantized scales); Open Compute Project, *OCP Microscaling
      Formats (MX) Specification*, 2023; Banner et al., *Post Training 4-bit Quantization of
      Convolutional Networks for Rapid Deployment*, 2019 (ACIQ).

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> leaf = jc.Quantize("int4", group_size=32)(jnp.ones((128, 16)))
      >>> leaf, leaf.nbytes
      (QuantizedArray(float32[128, 16], int4/32), 1152)
      >>> jc.Quantize("mxfp4")(jnp.ones((128, 16))).nbytes
      1088
    """

    format: str
    _: dataclasses.KW_ONLY
    group_size: int | tuple[int, int] | None = None
    axis: int | tuple[int, ...] | None = None
    symmetric: bool = True
    scale_dtype: str = "bfloat16"
    convention: str = "absmax"
    estimator: str | None = None
    rounding: str = "nearest"
    scale_format: str | None = None
    scale_group_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.format, str):
            raise SpecError(f"format={self.format!r}: write a name such as 'int8'")
        for name, value in PRESETS.get(self.format, {}).items():
            object.__setattr__(self, name, value)
        if isinstance(self.group_size, list):
            object.__setattr__(self, "group_size", tuple(self.group_size))
        self._check()

    def _check(self) -> None:
        fmt = code_format(self.format)
        sizes = self.group_size if isinstance(self.group_size, tuple) else (self.group_size,)
        single = len(sizes) == 1
        if len(sizes) not in (1, 2) or not all(
            is_count(n, 1) or (n is None and single) for n in sizes
        ):
            raise SpecError(
                f"group_size={self.group_size}: write a whole number of at least 1, or two of them"
            )
        if not is_floating_dtype(self.scale_dtype):
            raise SpecError(
                f"scale_dtype={self.scale_dtype!r}: write a floating dtype such as 'bfloat16'"
            )
        if self.scale_dtype.startswith("float8") and self.scale_dtype != "float8_e8m0fnu":
            raise SpecError(
                f"scale_dtype={self.scale_dtype!r} needs scales of its own: write "
                "scale_format='fp8_e4m3'"
            )
        if self.convention not in affine.CONVENTIONS:
            raise SpecError(
                f"convention={self.convention!r}: write one of {', '.join(affine.CONVENTIONS)}"
            )
        if self.symmetric and not fmt.signed:
            raise SpecError(
                f"Quantize({self.format!r}) has no negative codes: write symmetric=False, "
                f"or {self.format[1:]!r}"
            )
        affine.check(fmt, -1, 1, self.symmetric, self.convention)
        check_estimator(self.estimator)
        if self.rounding not in ("nearest", "stochastic"):
            raise SpecError(f"rounding={self.rounding!r}: write 'nearest' or 'stochastic'")
        self._check_scales()

    def _check_scales(self) -> None:
        if self.scale_group_size is not None and not is_count(self.scale_group_size, 1):
            raise SpecError(
                f"scale_group_size={self.scale_group_size}: write a whole number of at least 1"
            )
        if self.scale_format is None:
            if self.scale_group_size is not None:
                raise SpecError("scale_group_size needs a scale_format, such as 'uint8'")
            return
        fmt = code_format(self.scale_format)
        if fmt.bits < 4 or not isinstance(fmt, (IntFormat, MiniFloat)):
            raise SpecError(
                f"scale_format={self.scale_format!r}: write one that holds magnitudes, such as "
                "'uint8' or 'fp8_e4m3'"
            )

    def plan(self, leaf: jax.Array, context: LeafContext) -> Plan:
        """Settles the axes and clamps the group size to their length."""
        if self.rounding == "stochastic" and context.key is None:
            raise SpecError(
                f"{context.path}: stochastic rounding needs a key: write compress(..., "
                "key=jax.random.key(0))"
            )
        return _QuantizePlan(self.settled(leaf, context))

    def noise(self, leaf: jax.Array, key: jax.Array | None) -> jax.Array | None:
        """Uniform numbers in the shape of the leaf for stochastic rounding, else None."""
        if self.rounding != "stochastic":
            return None
        assert key is not None
        return jax.random.uniform(key, leaf.shape)

    def settled(self: Q, leaf: jax.Array, context: LeafContext) -> Q:
        """The same spec with the axes of one leaf, and groups no longer than they are."""
        axes = resolve_axes(self.axis, leaf, context)
        group = self.group_size
        if isinstance(group, tuple):
            if leaf.ndim == len(axes):
                raise SpecError(
                    f"{context.path}: shape {leaf.shape} has no axis of outputs for blocks of "
                    f"{group}: write group_size={group[0]}"
                )
            return dataclasses.replace(self, axis=axes, group_size=group)
        if group is not None:
            group = max(1, min(group, leaf.shape[axes[-1]]))
        return dataclasses.replace(self, axis=axes, group_size=group)

    @property
    def scheme(self) -> Scheme:
        """How weights of the spec's axes become codes, once `settled`."""
        if not isinstance(self.axis, tuple):
            raise SpecError(f"{self!r} has no axes yet: settle it on a leaf, or write axis=(-2,)")
        settings: dict[str, Any] = {
            f.name: getattr(self, f.name, None) for f in dataclasses.fields(Scheme)
        }
        settings |= {"axes": self.axis, "scale_dtype": np.dtype(jnp.dtype(self.scale_dtype))}
        return Scheme(**settings)


@register_spec("fake_quantize")
@dataclasses.dataclass(frozen=True, repr=False)
class FakeQuantize(Quantize):
    """Training with the values that `Quantize` will store: a trainable leaf, rounded where used.

    `w_hat = s (clip(round(w / s) + z, qmin, qmax) - z)` forward, the identity backward
    (straight-through), 0 where w was clipped. Put it in with `compress`, run it under `compressed`,
    train it with any optimizer; `finalize` then gives the `QuantizedArray` of the same format, with
    the same logits, bit for bit.

    Args:
      format: as in `Quantize`, like all that follow but `range`.
      group_size: weights that share a scale.
      axis: the input axes over which a scale is shared.
      symmetric: whether zero is the middle of the range.
      scale_dtype: the dtype of scales.
      convention: how the symmetric scale follows from the range.
      estimator: how the range follows from the weights.
      rounding: `nearest`.
      scale_format: of scales that are quantized themselves.
      scale_group_size: scales that share one of their own.
      range: `dynamic`: scales are those of the present weight at every step. `static`: those of the
        weight that is compressed, for good; what leaves their range is clipped and has no
        gradient.

    Raises:
      SpecError: as `Quantize`, and for another range.

    References:
      Jacob et al., *Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference*, 2018; Krishnamoorthi, *Quantizing Deep Convolutional
      Networks for Efficient Inference*, 2018.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> params = {"kernel": jnp.array([[7.0], [3.4]])}
      >>> params = jc.compress(params, {"kernel": jc.FakeQuantize("int4")})
      >>> loss = jc.compressed(lambda params: jnp.sum(params["kernel"] ** 2))
      >>> jax.grad(loss)(params)["kernel"].weight.tolist()
      [[14.0], [6.0]]
      >>> jc.finalize(params)
      {'kernel': QuantizedArray(float32[2, 1], int4)}
    """

    _: dataclasses.KW_ONLY
    range: str = "dynamic"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounding != "nearest":
            raise SpecError("FakeQuantize rounds to nearest: write rounding='nearest'")
        if self.range not in ("dynamic", "static"):
            raise SpecError(f"range={self.range!r}: write 'dynamic' or 'static'")

    def plan(self, leaf: jax.Array, context: LeafContext) -> Plan:
        """Settles the axes and clamps the group size to their length."""
        return _FakeQuantizePlan(self.settled(leaf, context))


@dataclasses.dataclass(frozen=True)
class _FakeQuantizePlan(Plan):
    spec: FakeQuantize

    def apply(self, leaf: jax.Array, key: jax.Array | None) -> FakeQuantizedArray:
        spec = self.spec
        out = FakeQuantizedArray.of(leaf, spec.scheme)
        if spec.range == "dynamic":
            return out
        scale, zero_point = out.params()
        return out.replace(scale=scale, zero_point=zero_point)


@dataclasses.dataclass(frozen=True)
class _QuantizePlan(Plan):
    spec: Quantize

    def apply(self, leaf: jax.Array, key: jax.Array | None) -> QuantizedArray:
        return self.spec.scheme.quantize(leaf, self.spec.noise(leaf, key))


def resolve_axes(
    axis: int | tuple[int, ...] | None, leaf: Any, context: LeafContext
) -> tuple[int, ...]:
    """The chosen axes as sorted negative numbers; the leaf's input axes where none is chosen."""
    if leaf.ndim == 0:
        raise SpecError(f"{context.path}: a scalar has no axis to quantize along; leave it dense")
    if axis is None:
        return tuple(sorted(context.axes.input))
    axes = axis if isinstance(axis, (tuple, list)) else (axis,)
    if not axes or any(not is_count(a, -leaf.ndim, leaf.ndim - 1) for a in axes):
        raise SpecError(
            f"{context.path}: axis={axis} is not among the {leaf.ndim} axes of shape {leaf.shape}"
        )
    return tuple(sorted({int(a) if a < 0 else int(a) - leaf.ndim for a in axes}))


def check_quantize(quantize: Any, name: str) -> None:
    """Refuses what is no quantization along the inputs.

    Raises:
      SpecError: says what to write.
    """
    if quantize is None:
        return
    if type(quantize) is not Quantize:
        raise SpecError(f"{name}: quantize={quantize!r}: write such as jc.Quantize('int4')")
    if quantize.axis is not None:
        raise SpecError(
            f"{name}: quantize={quantize!r}: the solver shares scales along the inputs; leave out "
            "axis"
        )
    if isinstance(quantize.group_size, tuple):
        raise SpecError(
            f"{name}: quantize={quantize!r}: the solver shares scales along the inputs; write "
            f"group_size={quantize.group_size[0]}"
        )
    if quantize.rounding != "nearest" or quantize.scale_format is not None:
        raise SpecError(
            f"{name}: quantize={quantize!r}: the solver rounds by itself and stores scales as they "
            "are; leave out rounding and scale_format"
        )
