"""Sparse variational dropout: each weight a Gaussian whose dropout rate is learned."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import register_array
from jaxcompress.pruning.checks import check_number
from jaxcompress.pruning.gates.gaussian import GaussianArray
from jaxcompress.specs import LeafContext, Plan, Spec, register_spec

# The fit of the divergence from the log-uniform prior, from the paper.
K1, K2, K3 = 0.63576, 1.87320, 1.48695


@register_array(
    "variational_dropout",
    children=("weight", "log_sigma2", "noise"),
    static=("unit", "threshold", "float_dtype"),
    trainable=("weight", "log_sigma2"),
)
class VariationalDropoutArray(GaussianArray):
    """Weights `N(theta, sigma^2)`, their dropout rates `alpha = sigma^2 / theta^2`.

    Without noise, theta. See `GaussianArray` for how noise is drawn.

    Attributes:
      weight: theta.
      log_sigma2: the logarithm of the variance of each weight, float32.
      noise: None, or two words of a key.
      unit: ones; each weight has a rate of its own.
      threshold: weights with log alpha above this go.
      float_dtype: the dtype of the dense array.

    References:
      Molchanov, Ashukha and Vetrov, *Variational Dropout Sparsifies Deep Neural Networks*, 2017.

    Examples:
      >>> import jax.numpy as jnp
      >>> leaf = VariationalDropout()(jnp.array([1.0, 0.001]))
      >>> tuple(round(float(x), 2) for x in leaf.log_alpha())
      (-10.0, 3.82)
      >>> leaf.pruned().tolist()
      [1.0, 0.0]
    """

    weight: Any
    log_sigma2: Any
    noise: Any
    unit: tuple[int, ...]
    threshold: float
    float_dtype: np.dtype

    def log_alpha(self) -> jax.Array:
        """The logarithm of the dropout rates, `log sigma^2 - log theta^2`."""
        theta = self.weight.astype(self.compute_dtype)
        # At 0 the rate is large rather than infinite.
        return self.log_sigma2 - jnp.log(theta**2 + 1e-12)

    def moments(self) -> tuple[jax.Array, jax.Array]:
        return self.weight.astype(self.compute_dtype), jnp.exp(self.log_sigma2)

    def keep(self) -> jax.Array:
        return self.log_alpha() <= self.threshold

    def penalty(self) -> jax.Array:
        """The divergence from the log-uniform prior, summed, in the paper's approximation.

        `k1 - k1 sigmoid(k2 + k3 log alpha) + log(1 + 1 / alpha) / 2`, which goes to 0 as alpha
        grows.
        """
        at = self.log_alpha()
        return jnp.sum(K1 * jax.nn.sigmoid(-K2 - K3 * at) + 0.5 * jax.nn.softplus(-at))


@register_spec("variational_dropout")
@dataclasses.dataclass(frozen=True, repr=False)
class VariationalDropout(Spec):
    """Learns a dropout rate for each weight, and drops those of a high one for good.

    `sample` gives the leaf the noise of a training step, drawn per example where the leaf meets a
    product or a convolution (local reparametrization); `gate_penalty` is the divergence from
    the prior, to be divided by the number of training examples beside a mean loss, and at best
    scaled up from 0 over the first epochs. `finalize` stores theta without the weights of
    `log alpha > threshold`.

    Args:
      log_sigma2: the logarithm of the variances at the beginning.
      threshold: of the logarithm of the dropout rate; 3 is a rate of 0.95 of binary dropout.

    Raises:
      SpecError: for numbers that are not finite.

    References:
      Molchanov, Ashukha and Vetrov, *Variational Dropout Sparsifies Deep Neural Networks*, 2017.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.pruning import gates
      >>> params = {"kernel": jnp.ones((4, 2))}
      >>> params = jc.compress(params, {"kernel": gates.VariationalDropout(-3.0)})
      >>> apply = jc.compressed(lambda params, x: x @ params["kernel"])
      >>> y = apply(gates.sample(params, jax.random.key(0)), jnp.ones((1000, 4)))
      >>> bool(abs(y.var() - 4 * jnp.exp(-3.0)) < 0.03), bool(abs(y.mean() - 4) < 0.1)
      (True, True)
    """

    log_sigma2: float = -10.0
    _: dataclasses.KW_ONLY
    threshold: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("log_sigma2", self.log_sigma2, -10.0)
        check_number("threshold", self.threshold, 3.0)

    def plan(self, leaf: Any, context: LeafContext) -> Plan:
        """Knows the axes of one weight."""
        return _Plan(self, context.axes.batch_ndim(leaf.ndim))


@dataclasses.dataclass(frozen=True)
class _Plan(Plan):
    spec: VariationalDropout
    batch_ndim: int

    def apply(self, leaf: jax.Array, key: jax.Array | None) -> VariationalDropoutArray:
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        return VariationalDropoutArray(
            leaf,
            jnp.full(leaf.shape, self.spec.log_sigma2, dtype),
            None,
            unit=(1,) * (leaf.ndim - self.batch_ndim),
            threshold=float(self.spec.threshold),
            float_dtype=np.dtype(leaf.dtype),
        )
