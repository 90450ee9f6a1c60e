"""`QuantizeInput`: a spec that goes around a weight."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays import affine
from jaxcompress.arrays.base import CompressedArray, is_compressed
from jaxcompress.arrays.quantized_input import InputArray, QuantizedInputArray, inside_of
from jaxcompress.arrays.scaled import ScaledArray
from jaxcompress.errors import SpecError
from jaxcompress.input_stats import InputStats
from jaxcompress.quantization.activations.ranges import entropy_range, mse_range, percentile_range
from jaxcompress.rules import default_axes
from jaxcompress.specs import LeafContext, Plan, Spec, on_all_devices, register_spec

ESTIMATORS = ("max", "percentile", "mse", "entropy")


class InputSpec(Spec):
    """A spec that goes around a weight, compressed or not, and inside what scales its inputs."""

    format: str

    def around(self, weight: Any, context: LeafContext) -> CompressedArray:
        """The leaf of one weight."""
        raise NotImplementedError

    def plan(self, leaf: jax.Array, context: LeafContext) -> Plan:
        """The leaf around no weight yet."""
        shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        return _AroundPlan(self, dataclasses.replace(context, key=None), shape)

    def _placed(self, weight: Any, context: LeafContext) -> CompressedArray:
        """The leaf, with what is new on each device that the weight lies on."""
        out = self.around(weight, context)
        old = jax.tree.leaves(weight)
        small = {n: on_all_devices(x, old[0]) for n, x in vars(out).items() if _is_new(x, weight)}
        return out.replace(**small)

    def __call__(self, leaf: Any, context: LeafContext | None = None) -> Any:
        """Puts an array or a leaf into a leaf that rounds its input."""
        if context is None:
            context = LeafContext("leaf", default_axes("leaf", leaf.ndim))
        if isinstance(leaf, InputArray):
            raise SpecError(
                f"{context.path}: the inputs of {leaf!r} are rounded already; write one of the two"
            )
        if inside_of(leaf):
            inner = dataclasses.replace(context, stats=_inner_stats(leaf, context.stats))
            return leaf.replace(weight=self(leaf.weight, inner))
        if leaf.ndim < 2:
            raise SpecError(
                f"{context.path}: shape {tuple(leaf.shape)} has no contracted inputs to round; "
                "leave it out of the rules"
            )
        return self._placed(leaf if is_compressed(leaf) else jnp.asarray(leaf), context)


def _is_new(x: Any, weight: Any) -> bool:
    return isinstance(x, jax.Array) and x is not weight


@dataclasses.dataclass(frozen=True, eq=False)
class _AroundPlan(Plan):
    spec: InputSpec
    context: LeafContext
    shape: jax.ShapeDtypeStruct

    def apply(self, leaf: jax.Array, key: jax.Array | None) -> CompressedArray:
        return self.spec.around(leaf, self.context)


def _inner_stats(leaf: Any, stats: InputStats | None) -> InputStats | None:
    """Statistics of what reaches the weight inside: known for largest values that are scaled."""
    if stats is None or not isinstance(leaf, ScaledArray):
        return None
    lead = np.shape(stats.count)
    scale = np.asarray(leaf.scale, np.float32)
    known = (stats.abs_max, stats.minimum, stats.maximum)
    sizes = {np.shape(x) for x in known if x is not None}
    if sizes != {(*lead, scale.size // max(1, math.prod(lead)))}:
        return None
    low, high = (None if x is None else np.asarray(x) * scale.reshape(x.shape) for x in known[1:])
    largest = None
    if known[0] is not None:
        largest = np.asarray(known[0]) * np.abs(scale).reshape(known[0].shape)
    return InputStats(stats.count, abs_max=largest, minimum=low, maximum=high)


@register_spec("quantize_input")
@dataclasses.dataclass(frozen=True, repr=False)
class QuantizeInput(InputSpec):
    """Rounds what a weight meets to integers, at run time: the A8 of W8A8.

    It goes around the weight, after whatever made that small:
    `chain(Quantize("int8"), QuantizeInput("int8"))`, or on its own on a tree that is compressed
    already, or, without a change of the tree, `compressed(fn, activations=rules)`. Int8 codes of
    a weight with one symmetric scale for each output then meet int8 codes, summed in int32; see
    `QuantizedInputArray` for the formulas, also of the gradient.

    Args:
      format: `int2` .. `int8` or `uint2` .. `uint8`.
      per: `token`: a scale for each place of the axes that are not contracted, in a convolution for
        each example; `tensor`: one for all.
      range: `dynamic`: that of each input, when it comes; `static`: that of the inputs seen by
        `observe`, given as `compress(..., stats=)`, one for all tokens.
      symmetric: whether zero is the middle of the range; False adds a zero point.
      estimator: of a static range: `max` (`abs_max`; without symmetry `minimum` and `maximum`),
        or from a `histogram`, symmetric only: `percentile`, `mse`, `entropy`.
      percentile: for that estimator.

    Raises:
      SpecError: for an unknown format, granularity, range or estimator, a static range per token,
        statistics that are missing or not finite, or a leaf without inputs.

    References:
      Jacob et al., *Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference*, 2018; Yao et al., *ZeroQuant: Efficient and Affordable
      Post-Training Quantization for Large-Scale Transformers*, 2022.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> params = {"kernel": jnp.eye(4)}
      >>> small = jc.compress(
      ...     params, {"kernel": jc.chain(jc.Quantize("int8"), QuantizeInput("int8"))})
      >>> small
      {'kernel': QuantizedInputArray(float32[4, 4], int8, input int8 per token)}
      >>> run = lambda params, x: x @ params["kernel"]
      >>> x = jnp.array([[12.7, 0.04, 0.06, 1.0]])
      >>> [round(float(y), 2) for y in jc.compressed(run)(small, x)[0]]
      [12.7, 0.0, 0.1, 1.0]
      >>> jc.compressed(run, activations={"kernel": QuantizeInput("int8")})(params, x)[0, 1]
      Array(0., dtype=float32)
    """

    format: str = "int8"
    _: dataclasses.KW_ONLY
    per: str = "token"
    range: str = "dynamic"
    symmetric: bool = True
    estimator: str = "max"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        super().__post_init__()
        signed = integer_format(self.format).signed
        if self.per not in ("token", "tensor"):
            raise SpecError(f"per={self.per!r}: write 'token' or 'tensor'")
        if self.range not in ("dynamic", "static"):
            raise SpecError(f"range={self.range!r}: write 'dynamic' or 'static'")
        if self.estimator not in ESTIMATORS:
            raise SpecError(f"estimator={self.estimator!r}: write one of {', '.join(ESTIMATORS)}")
        if self.symmetric and not signed:
            raise SpecError(
                f"QuantizeInput({self.format!r}) has no negative codes: write symmetric=False, "
                f"or {self.format[1:]!r}"
            )
        if self.range == "static" and self.per == "token":
            raise SpecError("a static range is one for all tokens: write per='tensor'")
        if self.estimator != "max" and not (self.range == "static" and self.symmetric):
            raise SpecError(
                f"estimator={self.estimator!r} is of static symmetric ranges: write "
                "range='static', or estimator='max'"
            )

    def around(self, weight: Any, context: LeafContext) -> CompressedArray:
        scale = zero = None
        if self.range == "static":
            scale, zero = self._static(weight, context)
        return QuantizedInputArray(weight, scale, zero, self.format, self.per, self.symmetric)

    def _static(self, weight: Any, context: LeafContext) -> tuple[jax.Array, jax.Array | None]:
        low, high = self._range(context)
        lead = weight.shape[: context.axes.batch_ndim(weight.ndim)]
        if low.shape != lead:  # the groups of a convolution share a scale
            low, high = np.min(low, keepdims=False), np.max(high, keepdims=False)
            lead = ()
        shape = (*lead, *(1,) * (weight.ndim - len(lead)))
        # The range as a weight of two values, so that its scale is the one of `Quantize`.
        ends = jnp.asarray(np.stack([low, high], -1), jnp.float32)
        scale, zero = affine.affine_params(
            ends, self.format, axes=-1, symmetric=self.symmetric, scale_dtype=jnp.float32
        )
        return scale.reshape(shape), None if zero is None else zero.reshape(shape)

    def _range(self, context: LeafContext) -> tuple[np.ndarray, np.ndarray]:
        """The least and the greatest input, one of each for each weight of a stack."""
        if self.estimator != "max":
            counts = self._stat(context, "histogram")
            estimate = {
                "percentile": lambda: percentile_range(counts, self.percentile),
                "mse": lambda: mse_range(counts, self.format),
                "entropy": lambda: entropy_range(counts, self.format),
            }
            high = estimate[self.estimator]()
            low = -high
        elif self.symmetric:
            high = np.max(np.asarray(self._stat(context, "abs_max")), axis=-1)
            low = -high
        else:
            low = np.min(np.asarray(self._stat(context, "minimum")), axis=-1)
            high = np.max(np.asarray(self._stat(context, "maximum")), axis=-1)
        if not (np.all(np.isfinite(low)) and np.all(np.isfinite(high))):
            raise SpecError(
                f"{context.path}: the range of its inputs is not finite; mend the statistics"
            )
        return low, high

    def _stat(self, context: LeafContext, name: str) -> Any:
        found = None if context.stats is None else getattr(context.stats, name)
        if found is None:
            raise SpecError(
                f"{context.path}: a static range needs the {name!r} of its inputs: give "
                f"compress(..., stats=observe(fn, params, batches, ({name!r},))), or write "
                "range='dynamic'"
            )
        return found


def integer_format(format: Any) -> affine.IntFormat:
    """The format of a name, which must be one of integers."""
    if not isinstance(format, str) or not format.lstrip("u").startswith("int"):
        raise SpecError(f"format={format!r}: write int2 to int8 or uint2 to uint8")
    return affine.int_format(format)
