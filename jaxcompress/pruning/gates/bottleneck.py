"""The variational information bottleneck: Gaussian gates on whole units."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import register_array
from jaxcompress.pruning.checks import check_number
from jaxcompress.pruning.gates.base import GateArray, gate_shape, lay_gates
from jaxcompress.pruning.patterns import Pattern
from jaxcompress.specs import LeafContext, Plan, Spec, register_spec


@register_array(
    "bottleneck",
    children=("weight", "mean", "log_var", "noise"),
    static=("unit", "threshold", "float_dtype"),
    trainable=("weight", "mean", "log_var"),
)
class BottleneckArray(GateArray):
    """A weight times Gaussian gates, `w z` with `z ~ N(mean, exp(log_var))`.

    Drawn, `z = mean + exp(log_var / 2) eps`; without noise, `z = mean`.

    Attributes:
      weight: the dense weight.
      mean: the mean of each gate, float32.
      log_var: the logarithm of its variance, float32.
      noise: eps in their shape, or None.
      unit: the size of a group of weights with one gate.
      threshold: gates with `log(mean^2 / var)` of less than this go.
      float_dtype: the dtype of the dense array.

    References:
      Dai et al., *Compressing Neural Networks using the Variational Information Bottleneck*, 2018.

    Examples:
      >>> import jax.numpy as jnp
      >>> leaf = InformationBottleneck()(jnp.ones((2, 3)))
      >>> leaf.mean.shape, leaf.keep().tolist()
      ((1, 3), [[True, True, True]])
    """

    weight: Any
    mean: Any
    log_var: Any
    noise: Any
    unit: tuple[int, ...]
    threshold: float
    float_dtype: np.dtype

    def value(self) -> jax.Array:
        z = self.mean
        if self.noise is not None:
            z = z + jnp.exp(0.5 * self.log_var) * self.noise
        return self.weight.astype(self.compute_dtype) * self.spread(z)

    def signal(self) -> jax.Array:
        """`mean^2 / var` of each gate, the signal that it passes to the noise that it adds."""
        return self.mean**2 * jnp.exp(-self.log_var)

    def keep(self) -> jax.Array:
        return self.signal() >= np.exp(self.threshold)

    def penalty(self) -> jax.Array:
        """`sum log(1 + mean^2 / var)` over the gates."""
        return jnp.sum(jnp.log1p(self.signal()))

    def draw(self, key: jax.Array) -> jax.Array:
        return jax.random.normal(key, self.mean.shape, self.mean.dtype)


@register_spec("information_bottleneck")
@dataclasses.dataclass(frozen=True, repr=False)
class InformationBottleneck(Spec):
    """VIBNet: gates that are priced by the information they pass, `log(1 + mean^2 / var)`.

    `sample` draws the gates of a training step, `gate_penalty` is their price, and `finalize`
    stores `mean w` without the groups whose gates are mostly noise.

    The gates of a layer's units lie on its own kernel with `filter`, before bias and
    nonlinearity, or, as in the paper, behind the nonlinearity, on the next kernel with `channel`.

    Args:
      group: which weights share a gate, a pattern as in `sparsify`.
      log_var: the logarithm of a gate's variance at the beginning; its mean is 1.
      threshold: groups with `log(mean^2 / var)` of less than this go.

    Raises:
      SpecError: for numbers that are not finite, or a group that does not fit the leaf.

    References:
      Dai et al., *Compressing Neural Networks using the Variational Information Bottleneck*, 2018.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.pruning import gates
      >>> params = {"kernel": jnp.ones((4, 8))}
      >>> params = jc.compress(params, {"kernel": gates.InformationBottleneck()})
      >>> round(float(gates.gate_penalty(params)), 3)
      72.001
    """

    group: str = "filter"
    _: dataclasses.KW_ONLY
    log_var: float = -9.0
    threshold: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("log_var", self.log_var, -9.0)
        check_number("threshold", self.threshold, 0.0)

    def plan(self, leaf: Any, context: LeafContext) -> Plan:
        """Lays the groups on the leaf."""
        return _Plan(self, lay_gates(self.group, leaf, context))


@dataclasses.dataclass(frozen=True)
class _Plan(Plan):
    spec: InformationBottleneck
    pattern: Pattern

    def apply(self, leaf: jax.Array, key: jax.Array | None) -> BottleneckArray:
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        shape = gate_shape(self.pattern, leaf.shape)
        return BottleneckArray(
            leaf,
            jnp.ones(shape, dtype),
            jnp.full(shape, self.spec.log_var, dtype),
            None,
            unit=self.pattern.unit,
            threshold=float(self.spec.threshold),
            float_dtype=np.dtype(leaf.dtype),
        )
