"""`PACT`, `LSQInput`, `DoReFaInput`: specs of input ranges that are trained, or of [0, 1]."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import CompressedArray
from jaxcompress.arrays.learned_input import LearnedInputArray, UnitInputArray
from jaxcompress.errors import SpecError
from jaxcompress.quantization.activations.spec import InputSpec, integer_format
from jaxcompress.specs import LeafContext, register_spec


@register_spec("pact")
@dataclasses.dataclass(frozen=True, repr=False)
class PACT(InputSpec):
    """Inputs clipped to [0, alpha] and rounded to unsigned codes, with alpha trained.

    For inputs that are never negative, as after a ReLU. The paper adds an L2 penalty on alpha; here
    that is the weight decay of the optimizer. See `LearnedInputArray` for the gradients.

    Args:
      format: `uint2` .. `uint8`.
      alpha: the clipping level at first.

    Raises:
      SpecError: for another format, or an alpha that is not positive.

    References:
      Choi et al., *PACT: Parameterized Clipping Activation for Quantized Neural Networks*, 2018.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> leaf = jc.chain(jc.FakeQuantize("int8"), PACT("uint4"))(jnp.ones((8, 4)))
      >>> leaf, leaf.finalize()
      (LearnedInputArray(float32[8, 4], fake int8, input pact uint4), \
QuantizedInputArray(float32[8, 4], int8, input uint4 static))
    """

    format: str = "uint8"
    _: dataclasses.KW_ONLY
    alpha: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _unsigned(self.format, "PACT")
        if not 0 < self.alpha < math.inf:
            raise SpecError(f"alpha={self.alpha!r}: write a positive number")

    def around(self, weight: Any, context: LeafContext) -> CompressedArray:
        return LearnedInputArray(weight, _bound(weight, self.alpha, context), self.format, "pact")


@register_spec("lsq_input")
@dataclasses.dataclass(frozen=True, repr=False)
class LSQInput(InputSpec):
    """Inputs on a grid whose step is trained; see `LearnedInputArray` for the gradients.

    At first `s = 2 mean|x| / sqrt(qmax)`, with the `abs_mean` of `observe`; without statistics it
    is `step`.

    Args:
      format: `int2` .. `int8` or, for inputs that are never negative, `uint2` .. `uint8`.
      step: s at first, where there are no statistics; None asks for statistics.

    Raises:
      SpecError: for an unknown format, a step that is not positive, or no statistics and no step.

    References:
      Esser et al., *Learned Step Size Quantization*, 2020.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> LSQInput("int4", step=0.5)(jnp.ones((8, 4))).bound.tolist()
      [[0.5]]
    """

    format: str = "int8"
    _: dataclasses.KW_ONLY
    step: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        integer_format(self.format)
        if self.step is not None and not 0 < self.step < math.inf:
            raise SpecError(f"step={self.step!r}: write a positive number")

    def around(self, weight: Any, context: LeafContext) -> CompressedArray:
        step: Any = self.step
        if context.stats is not None and context.stats.abs_mean is not None:
            mean = np.mean(np.asarray(context.stats.abs_mean, np.float64), axis=-1)
            step = 2 * mean / np.sqrt(integer_format(self.format).qmax)
        if step is None:
            raise SpecError(
                f"{context.path}: give compress(..., stats=observe(fn, params, batches, "
                "('abs_mean',))), or LSQInput(step=...)"
            )
        return LearnedInputArray(weight, _bound(weight, step, context), self.format, "lsq")


@register_spec("dorefa_input")
@dataclasses.dataclass(frozen=True, repr=False)
class DoReFaInput(InputSpec):
    """Inputs clipped to [0, 1] and rounded to `2**k` levels; see `UnitInputArray`.

    Args:
      format: `uint2` .. `uint8`.

    Raises:
      SpecError: for another format.

    References:
      Zhou et al., *DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low
      Bitwidth Gradients*, 2016.

    Examples:
      >>> import jax.numpy as jnp
      >>> DoReFaInput("uint4")(jnp.ones((8, 4)))
      UnitInputArray(float32[8, 4], dense, input in [0, 1] uint4)
    """

    format: str = "uint8"

    def __post_init__(self) -> None:
        super().__post_init__()
        _unsigned(self.format, "DoReFaInput")

    def around(self, weight: Any, context: LeafContext) -> CompressedArray:
        return UnitInputArray(weight, self.format)


def _unsigned(format: Any, name: str) -> None:
    if integer_format(format).signed:
        raise SpecError(f"{name}({format!r}): its codes are unsigned; write 'u{format}'")


def _bound(weight: Any, value: Any, context: LeafContext) -> jax.Array:
    """A trained bound, with one entry for each weight of a stack."""
    lead = weight.shape[: context.axes.batch_ndim(weight.ndim)]
    value = np.asarray(value, np.float32)
    if value.shape not in ((), lead):
        value = np.mean(value)  # of the groups of a convolution
    shape = (*lead, *(1,) * (weight.ndim - len(lead)))
    full = np.broadcast_to(value.reshape((*value.shape, *(1,) * (len(shape) - value.ndim))), shape)
    return jnp.asarray(full)
