"""Quant-Noise: only some weights are rounded in each step of training."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import CompressedArray, register_array
from jaxcompress.arrays.noisy import NoisyArray
from jaxcompress.errors import SpecError
from jaxcompress.specs import LeafContext, Plan, Spec, is_count, is_number, register_spec


@register_array(
    "quant_noise",
    children=("quantized", "noise"),
    static=("rate", "block_size", "axis"),
    trainable=("quantized",),
)
class QuantNoiseArray(NoisyArray):
    """A trained quantized leaf of which only some weights are rounded.

    Attributes:
      quantized: a leaf with a dense `weight`, such as a `FakeQuantizedArray` or an `LSQArray`.
      noise: where the weights are rounded, booleans; None: everywhere.
      rate: the expected share that is rounded.
      block_size: weights along `axis` that are rounded together.
      axis: the axis of blocks, negative.

    References:
      Fan et al., *Training with Quantization Noise for Extreme Model Compression*, 2021.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> leaf = QuantNoise(jc.FakeQuantize("int4"))(jnp.array([7.0, 1.25, 1.25, 1.25]))
      >>> leaf.materialize().tolist(), leaf.drawn(jax.random.key(1)).materialize().tolist()
      ([7.0, 1.0, 1.0, 1.0], [7.0, 1.25, 1.0, 1.0])
    """

    quantized: Any
    noise: Any
    rate: float
    block_size: int
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.quantized.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.quantized.dtype)

    @property
    def batch_ndim(self) -> int:
        return self.quantized.batch_ndim

    def drawn(self, key: jax.Array) -> Any:
        """The leaf with a choice of weights to round."""
        shape = list(self.shape)
        n = shape[self.axis]
        shape[self.axis] = -(-n // self.block_size)
        noise = jnp.repeat(jax.random.bernoulli(key, self.rate, shape), self.block_size, self.axis)
        return self.replace(noise=jax.lax.slice_in_dim(noise, 0, n, axis=self.axis + self.ndim))

    def quiet(self) -> Any:
        """The leaf with all weights rounded."""
        return self.replace(noise=None)

    def materialize(self, key: jax.Array | None = None) -> jax.Array:
        leaf = self if key is None else self.drawn(key)
        rounded = leaf.quantized.materialize()
        if leaf.noise is None:
            return rounded
        return jnp.where(leaf.noise, rounded, leaf.quantized.weight.astype(rounded.dtype))

    def finalize(self) -> CompressedArray | jax.Array:
        return self.quantized.finalize()

    def astype(self, dtype: Any) -> CompressedArray | None:
        quantized = self.quantized.astype(dtype)
        return None if quantized is None else self.replace(quantized=quantized)

    def describe(self) -> str:
        return f"{100 * self.rate:g}% {self.quantized.describe()}"


@register_spec("quant_noise")
@dataclasses.dataclass(frozen=True, repr=False)
class QuantNoise(Spec):
    """Quant-Noise: in each step a random part of the weights is rounded, in the end all of them.

    A weight that is not rounded has its own gradient, not an estimate of one. Which are rounded is
    drawn by `sample(params, key)` before each step, as the noise of gates is; without, and when
    finalized, all are.

    Args:
      spec: how the weights are rounded: `FakeQuantize`, or any spec of this package that trains a
        dense weight.
      rate: the share that is rounded, above 0 and at most 1.
      block_size: weights along the last input axis that are rounded or not together.

    Raises:
      SpecError: for a spec that keeps no dense weight, a rate out of range or a block below 1.

    References:
      Fan et al., *Training with Quantization Noise for Extreme Model Compression*, 2021.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.pruning.gates import sample
      >>> spec = QuantNoise(jc.FakeQuantize("int2"), 0.5)
      >>> params = jc.compress({"w": jnp.linspace(0.0, 1.0, 5)}, {"w": spec})
      >>> drawn = sample(params, jax.random.key(0))
      >>> params["w"].materialize().tolist(), drawn["w"].materialize().tolist()
      ([0.0, 0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.5, 1.0, 1.0])
    """

    spec: Spec
    rate: float = 0.5
    _: dataclasses.KW_ONLY
    block_size: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.spec, Spec):
            raise SpecError(f"spec={self.spec!r}: write one such as FakeQuantize('int4')")
        if not is_number(self.rate, 0, 1) or self.rate == 0:
            raise SpecError(f"rate={self.rate!r}: write a share above 0 and at most 1, such as 0.5")
        if not is_count(self.block_size, 1):
            raise SpecError(f"block_size={self.block_size!r}: write a whole number of at least 1")

    def plan(self, leaf: Any, context: LeafContext) -> Plan:
        """Plans the rounding."""
        inner = self.spec.plan(leaf, context)
        made = jax.eval_shape(inner.apply, leaf, context.key)
        if "weight" not in getattr(made, "trainable", ()) or isinstance(made, NoisyArray):
            raise SpecError(
                f"{context.path}: {self.spec!r} trains no dense weight that could go without "
                "rounding; write one such as FakeQuantize('int4') or LSQ('int4')"
            )
        axis = max(context.axes.input)
        block = min(self.block_size, max(1, leaf.shape[axis]))
        return _NoisePlan(inner, float(self.rate), block, axis)


@dataclasses.dataclass(frozen=True)
class _NoisePlan(Plan):
    inner: Plan
    rate: float
    block_size: int
    axis: int

    def apply(self, leaf: jax.Array, key: jax.Array | None) -> QuantNoiseArray:
        quantized = self.inner.apply(leaf, key)
        return QuantNoiseArray(quantized, None, self.rate, self.block_size, self.axis)
