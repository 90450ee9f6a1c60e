"""Bayesian compression with a group horseshoe prior."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import register_array
from jaxcompress.pruning.checks import check_number, check_positive
from jaxcompress.pruning.gates.base import gate_shape, lay_gates
from jaxcompress.pruning.gates.gaussian import GaussianArray
from jaxcompress.pruning.patterns import Pattern
from jaxcompress.specs import LeafContext, Plan, Spec, register_spec


@register_array(
    "horseshoe",
    children=("weight", "log_var", "local_mean", "local_log_var", "global_mean", "global_log_var",
              "noise"),
    static=("unit", "global_scale", "threshold", "float_dtype"),
    trainable=("weight", "log_var", "local_mean", "local_log_var", "global_mean",
               "global_log_var"),
)  # fmt: skip
class HorseshoeArray(GaussianArray):
    """Weights `w = s z_g v`, with half-Cauchy scales of the whole weight and of each group.

    Prior: `v ~ N(0, 1)`, `z_g ~ C+(0, 1)`, `s ~ C+(0, tau)`. A half-Cauchy is
    `sqrt(a b)` of a Gamma and an inverse Gamma variable: `a_g ~ G(1/2, 1)`, `b_g ~ IG(1/2, 1)`,
    `s_a ~ G(1/2, tau^2)` (shape and scale), `s_b ~ IG(1/2, 1)`. Posterior: all four log-normal,
    `log a_g ~ N(local_mean, exp(local_log_var))` and so on, and `v ~ N(weight, exp(log_var))`. So
    the scale `s z_g` is log-normal too. Without noise, the weights are their posterior mean.

    Attributes:
      weight: the mean of v.
      log_var: the logarithm of the variance of v, float32.
      local_mean: `[*groups, 2]`, the mean of `log a_g` and of `log b_g`.
      local_log_var: the logarithms of their variances.
      global_mean: `[*batch, 2]`, the mean of `log s_a` and of `log s_b`.
      global_log_var: the logarithms of their variances.
      noise: None, or two words of a key.
      unit: the size of a group of weights with one scale.
      global_scale: tau.
      threshold: groups whose scale has a log mode below minus this go.
      float_dtype: the dtype of the dense array.

    References:
      Louizos, Ullrich and Welling, *Bayesian Compression for Deep Learning*, 2017.

    Examples:
      >>> import jax.numpy as jnp
      >>> leaf = Horseshoe()(jnp.ones((3, 2)))
      >>> leaf.local_mean.shape, leaf.materialize().round(3).tolist()
      ((3, 1, 2), [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    """

    weight: Any
    log_var: Any
    local_mean: Any
    local_log_var: Any
    global_mean: Any
    global_log_var: Any
    noise: Any
    unit: tuple[int, ...]
    global_scale: float
    threshold: float
    float_dtype: np.dtype

    def _per_weight(self, x: jax.Array) -> jax.Array:
        """Something of each weight of a stack, so that it broadcasts with its groups."""
        return x.reshape(*x.shape, *(1,) * len(self.unit))

    def log_scale(self) -> tuple[jax.Array, jax.Array]:
        """Mean and variance of `log(s z_g)`, one of each group."""
        mean = jnp.sum(self.local_mean, axis=-1) / 2
        var = jnp.sum(jnp.exp(self.local_log_var), axis=-1) / 4
        whole = jnp.sum(self.global_mean, axis=-1) / 2
        whole_var = jnp.sum(jnp.exp(self.global_log_var), axis=-1) / 4
        return mean + self._per_weight(whole), var + self._per_weight(whole_var)

    def scale(self) -> jax.Array:
        """`s z_g`: its mean, or where there is noise a draw; s is one for all groups."""
        mean, var = self.log_scale()
        if self.noise is None:
            return jnp.exp(mean + var / 2)
        local = jnp.sum(jnp.exp(self.local_log_var), axis=-1) / 4
        whole = jnp.sum(jnp.exp(self.global_log_var), axis=-1) / 4
        noise = jnp.sqrt(local) * self.normal(1, local.shape[self.batch_ndim :])
        shared = self._per_weight(jnp.sqrt(whole) * self.normal(2, ()))
        return jnp.exp(mean + noise + shared)

    def moments(self) -> tuple[jax.Array, jax.Array]:
        scale = self.spread(self.scale())
        mean = self.weight.astype(self.compute_dtype) * scale
        return mean, jnp.exp(self.log_var) * scale**2

    def variance(self) -> jax.Array:
        """The posterior variance of each weight, scales included."""
        mean, var = self.log_scale()
        first, second = (self.spread(jnp.exp(k * mean + k * k * var / 2)) for k in (1, 2))
        v = self.weight.astype(self.compute_dtype)
        return second * (v**2 + jnp.exp(self.log_var)) - (first * v) ** 2

    def keep(self) -> jax.Array:
        """Groups whose scale has its mode, `exp(mean - var)`, at `exp(-threshold)` or above."""
        mean, var = self.log_scale()
        return mean - var >= -self.threshold

    def penalty(self) -> jax.Array:
        """The divergence of posterior and prior, exactly, summed over all variables."""
        v = self.weight.astype(self.compute_dtype)
        normal = jnp.sum(jnp.exp(self.log_var) + v**2 - 1 - self.log_var) / 2
        local, whole = self.local_mean, self.global_mean
        local_log, whole_log = self.local_log_var, self.global_log_var
        return (
            normal
            + jnp.sum(kl_gamma(local[..., 0], local_log[..., 0], 1.0))
            + jnp.sum(kl_inverse_gamma(local[..., 1], local_log[..., 1]))
            + jnp.sum(kl_gamma(whole[..., 0], whole_log[..., 0], self.global_scale**2))
            + jnp.sum(kl_inverse_gamma(whole[..., 1], whole_log[..., 1]))
        )


def kl_gamma(mean: jax.Array, log_var: jax.Array, scale: float) -> jax.Array:
    """`KL(LogNormal(mean, var) || Gamma(shape 1/2, scale))`.

    `log(scale) / 2 + exp(mean + var / 2) / scale - (mean + log var + 1 + log 2) / 2`.

    Examples:
      >>> import jax.numpy as jnp
      >>> round(float(kl_gamma(jnp.float32(0.0), jnp.float32(0.0), 1.0)), 4)
      0.8021
    """
    rest = (mean + log_var + 1 + math.log(2)) / 2
    return 0.5 * math.log(scale) + jnp.exp(mean + jnp.exp(log_var) / 2) / scale - rest


def kl_inverse_gamma(mean: jax.Array, log_var: jax.Array) -> jax.Array:
    """`KL(LogNormal(mean, var) || InverseGamma(shape 1/2, scale 1))`.

    `exp(var / 2 - mean) - (log var - mean + 1 + log 2) / 2`: that of 1/x from a Gamma.

    Examples:
      >>> import jax.numpy as jnp
      >>> round(float(kl_inverse_gamma(jnp.float32(0.0), jnp.float32(0.0))), 4)
      0.8021
    """
    return kl_gamma(-mean, log_var, 1.0)


@register_spec("horseshoe")
@dataclasses.dataclass(frozen=True, repr=False)
class Horseshoe(Spec):
    """Bayesian compression: whole groups get scales of their own, and those near 0 go.

    `sample` gives the leaf the noise of a training step: scales are drawn once, weights per example
    where the leaf meets a product (see `VariationalDropout`). `gate_penalty` is the
    divergence from the prior, to be divided by the number of training examples beside a mean loss.
    `finalize` stores the posterior mean of the groups that stay; `posterior_bits` says how many
    bits their noise allows for.

    The ratio of variance and squared mean of a log-normal scale does not depend on its size, so
    groups are chosen by their mode: they stay where `mean - var >= -threshold`, of the logarithm of
    the scale. At the beginning the mean scale is 1 and the weights are what they were.

    Args:
      group: which weights share a scale, a pattern as in `sparsify`: `channel`, what meets one
        input, or `filter`, what makes one output.
      global_scale: tau, of the prior of the whole weight's scale.
      log_var: the logarithm of the variances at the beginning.
      threshold: see above.

    Raises:
      SpecError: for a scale that is not above 0, numbers that are not finite, or a group that does
        not fit the leaf.

    References:
      Louizos, Ullrich and Welling, *Bayesian Compression for Deep Learning*, 2017.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.pruning import gates
      >>> params = jc.compress({"kernel": jnp.ones((4, 8))}, {"kernel": gates.Horseshoe()})
      >>> params["kernel"].penalty().shape, gates.posterior_bits(params)
      ((), {'kernel': 7})
    """

    group: str = "channel"
    _: dataclasses.KW_ONLY
    global_scale: float = 1e-2
    log_var: float = -9.0
    threshold: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("global_scale", self.global_scale, 1e-2)
        check_number("log_var", self.log_var, -9.0)
        check_number("threshold", self.threshold, 3.0)

    def plan(self, leaf: Any, context: LeafContext) -> Plan:
        """Lays the groups on the leaf."""
        return _Plan(self, lay_gates(self.group, leaf, context))


@dataclasses.dataclass(frozen=True)
class _Plan(Plan):
    spec: Horseshoe
    pattern: Pattern

    def apply(self, leaf: jax.Array, key: jax.Array | None) -> HorseshoeArray:
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        groups = (*gate_shape(self.pattern, leaf.shape), 2)
        whole = (*leaf.shape[: leaf.ndim - len(self.pattern.unit)], 2)
        # The mean of a scale, exp(mean + var / 2) of its logarithm, shall be 1: each of the
        # four variables has half its mean, and a quarter of its variance, in that logarithm.
        mean = -math.exp(self.spec.log_var) / 4
        return HorseshoeArray(
            leaf,
            jnp.full(leaf.shape, self.spec.log_var, dtype),
            jnp.full(groups, mean, dtype),
            jnp.full(groups, self.spec.log_var, dtype),
            jnp.full(whole, mean, dtype),
            jnp.full(whole, self.spec.log_var, dtype),
            None,
            unit=self.pattern.unit,
            global_scale=float(self.spec.global_scale),
            threshold=float(self.spec.threshold),
            float_dtype=np.dtype(leaf.dtype),
        )
