"""L0 regularization by hard concrete gates."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import register_array
from jaxcompress.errors import SpecError
from jaxcompress.pruning.checks import check_inside, check_number, check_positive
from jaxcompress.pruning.gates.base import GateArray, gate_shape, lay_gates, logit
from jaxcompress.pruning.patterns import Pattern
from jaxcompress.specs import LeafContext, Plan, Spec, register_spec


@register_array(
    "hard_concrete",
    children=("weight", "log_alpha", "noise"),
    static=("unit", "gamma", "zeta", "beta", "float_dtype"),
    trainable=("weight", "log_alpha"),
)
class HardConcreteArray(GateArray):
    """A weight times hard concrete gates, `w z`.

    Drawn, with u uniform: `s = sigmoid((log u - log(1 - u) + log_alpha) / beta)` and
    `z = clip(s (zeta - gamma) + gamma, 0, 1)`, which is exactly 0 with probability
    `sigmoid(beta log(-gamma / zeta) - log_alpha)` and exactly 1 with a like one. Without noise,
    `z = clip(sigmoid(log_alpha) (zeta - gamma) + gamma, 0, 1)`.

    Attributes:
      weight: the dense weight.
      log_alpha: the location of each gate, float32.
      noise: `log u - log(1 - u)` in its shape, or None.
      unit: the size of a group of weights with one gate.
      gamma: the lower end of the stretched gate, below 0.
      zeta: the upper end, above 1.
      beta: the temperature.
      float_dtype: the dtype of the dense array.

    References:
      Louizos, Welling and Kingma, *Learning Sparse Neural Networks through L0 Regularization*,
      2018.

    Examples:
      >>> import jax.numpy as jnp
      >>> leaf = L0HardConcrete(keep=0.5)(jnp.array([[2.0, 4.0]]))
      >>> leaf.materialize().tolist(), round(float(leaf.expected()), 3)
      ([[1.0, 2.0]], 1.664)
    """

    weight: Any
    log_alpha: Any
    noise: Any
    unit: tuple[int, ...]
    gamma: float
    zeta: float
    beta: float
    float_dtype: np.dtype

    def gates(self) -> jax.Array:
        """The gates z, drawn where there is noise."""
        at = self.log_alpha
        if self.noise is not None:
            at = (at + self.noise) / self.beta
        # The sum before the product: of `a * b + c` a compiler makes one rounding or two, and the
        # gates would be others than those of the same step uncompiled.
        span = self.zeta - self.gamma
        return jnp.clip((jax.nn.sigmoid(at) + self.gamma / span) * span, 0, 1)

    def value(self) -> jax.Array:
        return self.weight.astype(self.compute_dtype) * self.spread(self.gates())

    def keep(self) -> jax.Array:
        return self.quiet().gates() > 0  # type: ignore[attr-defined]

    def open(self) -> jax.Array:
        """The probability that each gate is not 0."""
        return jax.nn.sigmoid(self.log_alpha - self.beta * math.log(-self.gamma / self.zeta))

    def expected(self) -> jax.Array:
        return jnp.sum(self.open() * self.sizes())

    def penalty(self) -> jax.Array:
        """The expected L0 norm, `sum_g n_g sigmoid(log_alpha_g - beta log(-gamma / zeta))`."""
        return self.expected()

    def draw(self, key: jax.Array) -> jax.Array:
        return jax.random.logistic(key, self.log_alpha.shape, self.log_alpha.dtype)


@register_spec("l0")
@dataclasses.dataclass(frozen=True, repr=False)
class L0HardConcrete(Spec):
    """Gates whose expected number of open ones is differentiable, and priced by `gate_penalty`.

    Put in with `compress`; `sample` draws the gates of a training step, and `finalize` stores
    `w z` with the gates of the deterministic pass, of which those at 0 go. That is what the
    deterministic pass computes, so `finalize` changes nothing beyond it.

    Args:
      group: which weights share a gate: `unstructured`, each has its own; or a pattern as in
        `sparsify`, such as `channel` for the neurons that come in.
      keep: `sigmoid(log_alpha)` at the beginning. At the default the weights first become 0.98 of
        what they were.
      gamma: the lower end of the stretched gate, below 0.
      zeta: the upper end, above 1.
      beta: the temperature, above 0.

    Raises:
      SpecError: for numbers outside of these ranges, or a group that does not fit the leaf.

    References:
      Louizos, Welling and Kingma, *Learning Sparse Neural Networks through L0 Regularization*,
      2018.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.pruning import gates
      >>> params = {"kernel": jnp.ones((4, 2))}
      >>> params = jc.compress(params, {"kernel": gates.L0HardConcrete("channel")})
      >>> params["kernel"].log_alpha.shape, round(float(gates.gate_penalty(params)), 2)
      ((4, 1), 7.82)
    """

    group: str = "unstructured"
    _: dataclasses.KW_ONLY
    keep: float = 0.9
    gamma: float = -0.1
    zeta: float = 1.1
    beta: float = 2 / 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_inside("keep", self.keep, 0.9)
        check_number("gamma", self.gamma, -0.1)
        check_number("zeta", self.zeta, 1.1)
        check_positive("beta", self.beta, 2 / 3)
        if not self.gamma < 0 or not self.zeta > 1:
            raise SpecError(
                f"gamma={self.gamma!r}, zeta={self.zeta!r}: write ends below 0 and above 1, such "
                "as -0.1 and 1.1; else no gate is ever exactly 0"
            )

    def plan(self, leaf: Any, context: LeafContext) -> Plan:
        """Lays the groups on the leaf."""
        return _Plan(self, lay_gates(self.group, leaf, context))


@dataclasses.dataclass(frozen=True)
class _Plan(Plan):
    spec: L0HardConcrete
    pattern: Pattern

    def apply(self, leaf: jax.Array, key: jax.Array | None) -> HardConcreteArray:
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        return HardConcreteArray(
            leaf,
            jnp.full(gate_shape(self.pattern, leaf.shape), logit(self.spec.keep), dtype),
            None,
            unit=self.pattern.unit,
            gamma=float(self.spec.gamma),
            zeta=float(self.spec.zeta),
            beta=float(self.spec.beta),
            float_dtype=np.dtype(leaf.dtype),
        )
