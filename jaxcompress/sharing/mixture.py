"""A mixture of Gaussians over weights, one component of it pinned at zero."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import compat
from jaxcompress.arrays.base import is_compressed
from jaxcompress.errors import SpecError
from jaxcompress.specs import is_count, is_number

# Weights for which a table of densities, one for each component, exists at a time.
_BLOCK = 1 << 15
# A larger quotient squares to infinity, and its density is 0 in any case.
_FAR = 1e18


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Mixture:
    """`p(w) = pi_0 N(w; 0, s_0^2) + (1 - pi_0) sum_j softmax(logits)_j N(w; mu_j, s_j^2)`.

    A pytree, so that any optimizer trains it beside the weights; all float32. Component 0 is pinned
    at zero with a fixed share.

    Attributes:
      logits: `[J]`, of the shares of the free components.
      means: `[J]`, their means.
      log_scales: `[J + 1]`, logarithms of the standard deviations, that of component 0 first.
      pi_zero: the share of component 0, static.

    References:
      Nowlan and Hinton, *Simplifying Neural Networks by Soft Weight-Sharing*, 1992; Ullrich, Meeds
      and Welling, *Soft Weight-Sharing for Neural Network Compression*, 2017.

    Examples:
      >>> import jax.numpy as jnp
      >>> Mixture(jnp.zeros(1), jnp.ones(1), jnp.zeros(2), 0.5).shares().tolist()
      [0.5, 0.5]
    """

    logits: jax.Array
    means: jax.Array
    log_scales: jax.Array
    pi_zero: float

    def log_shares(self) -> jax.Array:
        """The logarithms of the shares, `[J + 1]`."""
        first = jnp.full(1, math.log(self.pi_zero), jnp.float32)
        return jnp.concatenate([first, jax.nn.log_softmax(self.logits) + math.log1p(-self.pi_zero)])

    def shares(self) -> jax.Array:
        """The shares of all components, `[J + 1]`."""
        return jnp.exp(self.log_shares())

    def all_means(self) -> jax.Array:
        """The means of all components, `[J + 1]`, the first 0."""
        return jnp.concatenate([jnp.zeros(1, jnp.float32), self.means])

    def log_joint(self, w: jax.Array) -> jax.Array:
        """`log(pi_j N(w; mu_j, s_j^2))`, with an axis of components at the end."""
        z = (w.astype(jnp.float32)[..., None] - self.all_means()) * jnp.exp(-self.log_scales)
        z = jnp.clip(z, -_FAR, _FAR)
        return self.log_shares() - self.log_scales - 0.5 * math.log(2 * math.pi) - 0.5 * z**2

    def assign(self, w: jax.Array) -> jax.Array:
        """The component of the largest responsibility for each weight, int32; 0 is zero.

        Examples:
          >>> import jax.numpy as jnp
          >>> means, scales = jnp.array([-1.0, 1.0]), jnp.log(jnp.full(3, 0.1))
          >>> mixture = Mixture(jnp.zeros(2), means, scales, 0.9)
          >>> mixture.assign(jnp.array([0.1, 0.9, -2.0])).tolist()
          [0, 2, 1]
        """
        blocks, n = _blocks(w)
        index = jax.lax.map(lambda x: jnp.argmax(self.log_joint(x), axis=-1), blocks)
        return index.reshape(-1)[:n].reshape(w.shape).astype(jnp.int32)

    def __repr__(self) -> str:
        return f"Mixture({np.shape(self.means)[0]} components and zero, pi_zero={self.pi_zero:.4g})"


compat.register_node(Mixture, ("logits", "means", "log_scales"), ("pi_zero",))


def init_mixture(
    weights: Any, components: int = 16, *, pi_zero: float = 0.99, scale: float | None = None
) -> Mixture:
    """A mixture to start from: means evenly over the range of pretrained weights, equal shares.

    Args:
      weights: any pytree of arrays.
      components: how many besides the one at zero, J; the published experiments have 16.
      pi_zero: the share of the component at zero, within (0, 1); published: from 0.9 to 0.999.
      scale: the standard deviation of all components; None: half the distance between two means, so
        that each has a significant mass in its region.

    Raises:
      SpecError: for values that cannot be, or no weights.

    References:
      Ullrich, Meeds and Welling, *Soft Weight-Sharing for Neural Network Compression*, 2017
      (section 4, initialization).

    Examples:
      >>> import jax.numpy as jnp
      >>> init_mixture({"w": jnp.linspace(-2.0, 2.0, 100)}, 5).means.tolist()
      [-2.0, -1.0, 0.0, 1.0, 2.0]
    """
    if not is_count(components, 1):
        raise SpecError(f"components={components!r}: write a whole number of at least 1")
    check_pi_zero(pi_zero)
    if scale is not None and not (is_number(scale, 0) and scale > 0):
        raise SpecError(f"scale={scale!r}: write a number above 0")
    found = [x for x in jax.tree.leaves(weights, is_leaf=is_compressed) if x.size]
    if any(is_compressed(x) or not jnp.issubdtype(x.dtype, jnp.floating) for x in found):
        raise SpecError("a mixture starts from dense floating weights; jc.decompress others first")
    if not found:
        raise SpecError("a mixture starts from weights, and there are none")
    low = jnp.min(jnp.stack([jnp.min(x).astype(jnp.float32) for x in found]))
    high = jnp.max(jnp.stack([jnp.max(x).astype(jnp.float32) for x in found]))
    steps = jnp.arange(components, dtype=jnp.float32) / max(1, components - 1)
    means = low + (high - low) * steps if components > 1 else (low + high)[None] / 2
    apart = (high - low) / (2 * max(1, components - 1))
    chosen = jnp.maximum(apart, 1e-6) if scale is None else jnp.float32(scale)
    log_scales = jnp.broadcast_to(jnp.log(chosen), (components + 1,))
    return Mixture(jnp.zeros(components), means, log_scales, float(pi_zero))


def check_pi_zero(pi_zero: float) -> None:
    """Refuses a share that is none."""
    if not is_number(pi_zero, 0, 1) or pi_zero in (0, 1):
        raise SpecError(f"pi_zero={pi_zero!r}: write a share between 0 and 1, such as 0.99")


def log_likelihood(mixture: Mixture, weights: Any) -> jax.Array:
    """`sum_i log p(w_i)` over all weights of a pytree, float32.

    In blocks, whose densities are computed once more for the gradient, so that no table of weights
    by components is ever kept.

    Examples:
      >>> import jax.numpy as jnp
      >>> mixture = Mixture(jnp.zeros(1), jnp.zeros(1), jnp.zeros(2), 0.5)  # a standard normal
      >>> round(float(log_likelihood(mixture, {"w": jnp.zeros(2)})), 4)
      -1.8379
    """

    @jax.checkpoint
    def block(mixture: Mixture, x: jax.Array, inside: jax.Array) -> jax.Array:
        logs = jax.nn.logsumexp(mixture.log_joint(x), axis=-1)
        return jnp.sum(jnp.where(inside, logs, 0))

    total = jnp.zeros((), jnp.float32)
    for w in jax.tree.leaves(weights):
        if not w.size:
            continue
        blocks, n = _blocks(w)
        inside = (jnp.arange(blocks.size) < n).reshape(blocks.shape)
        step = lambda carry, xs: (carry + block(mixture, *xs), None)
        total = jax.lax.scan(step, total, (blocks, inside))[0]
    return total


def _blocks(w: jax.Array) -> tuple[jax.Array, int]:
    """The weights in rows of equal length, filled up with zeros, and how many there are."""
    flat = w.reshape(-1)
    size = max(1, min(_BLOCK, flat.size))
    return jnp.pad(flat, (0, -flat.size % size)).reshape(-1, size), flat.size


def gamma_penalty(
    mixture: Mixture,
    *,
    zero: tuple[float, float] | None = None,
    others: tuple[float, float] | None = None,
) -> jax.Array:
    """`-sum_j log Gamma(1 / s_j^2; alpha, beta)`: keeps components from collapsing or spreading.

    The hyperprior on the precision `x = 1 / s^2` has the density
    `beta^alpha x^(alpha - 1) exp(-beta x) / Gamma(alpha)`: its mode is `(alpha - 1) / beta`, and a
    larger alpha makes it narrower.

    Args:
      mixture: whose precisions.
      zero: `(alpha, beta)` for the component at zero, or None.
      others: `(alpha, beta)` for all others, or None.

    Raises:
      SpecError: for an alpha or beta that is not positive.

    References:
      Ullrich, Meeds and Welling, *Soft Weight-Sharing for Neural Network Compression*, 2017
      (section 3.2, hyper-priors).

    Examples:
      >>> import jax.numpy as jnp
      >>> mixture = Mixture(jnp.zeros(1), jnp.zeros(1), jnp.zeros(2), 0.5)
      >>> float(gamma_penalty(mixture, others=(1.0, 1.0)))
      1.0
    """
    total = jnp.zeros((), jnp.float32)
    parts = ((zero, mixture.log_scales[:1]), (others, mixture.log_scales[1:]))
    for prior, log_scales in parts:
        if prior is None:
            continue
        alpha, beta = prior
        if not (is_number(alpha, 0) and is_number(beta, 0) and alpha and beta):
            raise SpecError(f"a Gamma prior of {prior!r}: write (alpha, beta), both positive")
        constant = math.lgamma(alpha) - alpha * math.log(beta)
        log_precision = -2 * log_scales
        each = beta * jnp.exp(log_precision) - (alpha - 1) * log_precision + constant
        total = total + jnp.sum(each)
    return total


def symmetric_kl(mixture: Mixture) -> np.ndarray:
    """`KL(p_i | p_j) + KL(p_j | p_i)` of all pairs of components, `[J + 1, J + 1]`, float64.

    `((s_i^2 + d^2) / s_j^2 + (s_j^2 + d^2) / s_i^2) / 2 - 1`, where d is the distance of the means.

    Examples:
      >>> import jax.numpy as jnp
      >>> symmetric_kl(Mixture(jnp.zeros(1), jnp.ones(1), jnp.zeros(2), 0.5)).tolist()
      [[0.0, 1.0], [1.0, 0.0]]
    """
    means, squares = _moments(mixture)
    return _symmetric_kl(means, squares)


def _moments(mixture: Mixture) -> tuple[np.ndarray, np.ndarray]:
    scales = np.exp(np.asarray(mixture.log_scales, np.float64))
    return np.asarray(mixture.all_means(), np.float64), scales**2


def _symmetric_kl(means: np.ndarray, squares: np.ndarray) -> np.ndarray:
    ratio = (squares[:, None] + (means[:, None] - means[None]) ** 2) / squares[None]
    return (ratio + ratio.T) / 2 - 1


def merge(mixture: Mixture, threshold: float) -> Mixture:
    """Merges components that are alike, the most alike pair first, until none are; on the host.

    Two become one of their joint share, mean and variance, so that both moments of the mixture
    stay (Ullrich et al. leave out the distance of the means, which is small for pairs that
    merge). What merges with the component at zero is added to its share, and zero stays its mean.

    Args:
      mixture: concrete.
      threshold: the largest symmetric Kullback-Leibler divergence of a pair that is merged.

    Raises:
      SpecError: for a threshold below 0, and a mixture that is not finite.

    References:
      Ullrich, Meeds and Welling, *Soft Weight-Sharing for Neural Network Compression*, 2017
      (section 3.3); Nowlan and Hinton, 1992.

    Examples:
      >>> import jax.numpy as jnp
      >>> means = jnp.array([0.5, 0.5, -0.5])
      >>> merge(Mixture(jnp.zeros(3), means, jnp.full(4, -2.0), 0.9), 0.1)
      Mixture(2 components and zero, pi_zero=0.9)
    """
    if not is_number(threshold, 0):
        raise SpecError(f"threshold={threshold!r}: write a number of at least 0")
    means, squares = _moments(mixture)
    shares = np.asarray(mixture.shares(), np.float64)
    if not all(np.all(np.isfinite(x)) for x in (means, squares, shares)):
        raise SpecError(f"{mixture!r} is not finite: train with a smaller rate, or begin anew")
    while len(means) > 1:
        apart = _symmetric_kl(means, squares)
        apart[np.tril_indices(len(means))] = np.inf
        i, j = np.unravel_index(np.argmin(apart), apart.shape)
        if not apart[i, j] <= threshold:
            break
        share = shares[i] + shares[j]
        a, b = (shares[i] / share, shares[j] / share) if share else (0.5, 0.5)
        mean = 0.0 if i == 0 else a * means[i] + b * means[j]
        second = a * (squares[i] + means[i] ** 2) + b * (squares[j] + means[j] ** 2)
        means[i], squares[i], shares[i] = mean, second - mean**2, share
        means, squares, shares = (np.delete(x, j) for x in (means, squares, shares))
    logs = np.log(np.maximum(shares[1:], 1e-38))
    return Mixture(
        jnp.asarray(logs, jnp.float32),
        jnp.asarray(means[1:], jnp.float32),
        jnp.asarray(np.log(squares) / 2, jnp.float32),
        float(min(shares[0], 1 - 1e-7)),
    )
