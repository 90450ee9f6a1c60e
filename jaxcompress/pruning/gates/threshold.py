"""Soft thresholds that are trained: STR."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import register_array
from jaxcompress.pruning.checks import check_inside
from jaxcompress.pruning.gates.base import GateArray, gate_shape, lay_gates, logit
from jaxcompress.pruning.patterns import Pattern
from jaxcompress.specs import LeafContext, Plan, Spec, register_spec


@register_array(
    "soft_threshold",
    children=("weight", "scores"),
    static=("unit", "float_dtype"),
    trainable=("weight", "scores"),
)
class SoftThresholdArray(GateArray):
    """A weight that is moved towards zero by a trained threshold, `sign(w) max(|w| - t, 0)`.

    `t = sigmoid(s)`, one per group. The gradient is the exact one: `dw = dv [|w| > t]` and
    `ds = -t (1 - t) sum dv sign(w) [|w| > t]`.

    Attributes:
      weight: the dense weight.
      scores: s, float32.
      unit: the size of a group of weights with one threshold.
      float_dtype: the dtype of the dense array.

    References:
      Kusupati et al., *Soft Threshold Weight Reparameterization for Learnable Sparsity*, 2020.

    Examples:
      >>> import jax.numpy as jnp
      >>> SoftThreshold(0.25)(jnp.array([1.0, -0.5, 0.125])).materialize().tolist()
      [0.75, -0.25, 0.0]
    """

    weight: Any
    scores: Any
    unit: tuple[int, ...]
    float_dtype: np.dtype

    def thresholds(self) -> jax.Array:
        """t, one per group."""
        return jax.nn.sigmoid(self.scores)

    def value(self) -> jax.Array:
        w = self.weight.astype(self.compute_dtype)
        return jnp.sign(w) * jax.nn.relu(jnp.abs(w) - self.spread(self.thresholds()))

    def keep(self) -> jax.Array:
        """Which weights are above their threshold."""
        w = jnp.abs(self.weight.astype(self.compute_dtype))
        return w > self.spread(self.thresholds())

    def mask(self) -> jax.Array:
        return self.keep()  # thresholds are shared by groups, and weights go one by one


@register_spec("soft_threshold")
@dataclasses.dataclass(frozen=True, repr=False)
class SoftThreshold(Spec):
    """STR: each layer learns its own threshold, and so its share of the sparsity.

    What makes thresholds grow is weight decay, on weights and scores alike: `optax.adamw`, or
    `optax.add_decayed_weights` before SGD. There is no penalty of its own. `finalize` stores the
    values of the forward pass, bit for bit.

    Args:
      threshold: at the beginning, `sigmoid(s)`; the weights move by it when the leaf is made.
      group: which weights share a threshold: `layer`, or a pattern such as `filter`.

    Raises:
      SpecError: for a threshold outside of 0 to 1, or a group that does not fit the leaf.

    References:
      Kusupati et al., *Soft Threshold Weight Reparameterization for Learnable Sparsity*, 2020.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.pruning import gates
      >>> params = {"kernel": jnp.array([[1.0, 0.1], [0.05, -0.1]])}
      >>> params = jc.compress(params, {"kernel": gates.SoftThreshold(0.25)})
      >>> jc.pruning.sparsity_report(jc.finalize(params)).kept
      1
    """

    threshold: float = 1e-3
    _: dataclasses.KW_ONLY
    group: str = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_inside("threshold", self.threshold, 1e-3)

    def plan(self, leaf: Any, context: LeafContext) -> Plan:
        """Lays the groups on the leaf."""
        return _Plan(self, lay_gates(self.group, leaf, context))


@dataclasses.dataclass(frozen=True)
class _Plan(Plan):
    spec: SoftThreshold
    pattern: Pattern

    def apply(self, leaf: jax.Array, key: jax.Array | None) -> SoftThresholdArray:
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        return SoftThresholdArray(
            leaf,
            jnp.full(gate_shape(self.pattern, leaf.shape), logit(self.spec.threshold), dtype),
            unit=self.pattern.unit,
            float_dtype=np.dtype(leaf.dtype),
        )
