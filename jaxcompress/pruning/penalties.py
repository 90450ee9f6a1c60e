"""Penalties that make weights, or groups of weights, small.

A penalty is a loss term, and most have a proximal operator too: `proximal` applies it after each
update of an optimizer, which is what makes zeros exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress.errors import RuleError, SpecError
from jaxcompress.numerics import unit_scale
from jaxcompress.pruning.checks import check_positive, check_share, check_strength
from jaxcompress.pruning.patterns import Pattern
from jaxcompress.pruning.sites import Site, find_sites
from jaxcompress.rules import KernelAxes

Rules = Mapping[str, str | None]


@dataclasses.dataclass(frozen=True)
class Penalty:
    """A sum over the leaves that rules name; call it on params for the loss term.

    A subclass defines `value` of one leaf, and `prox` where there is one. It is differentiable,
    with the subgradient 0 at a weight or a group of zeros.

    Attributes:
      rules: `{glob: pattern or None}` as in `sparsify`; the units of a pattern are the groups, as
        `vector` (all outputs of an input), `channel`, `filter`, `block:RxC`, `head` and `layer`.
      axes: the input and output axes of leaves by path, from `kernel_axes`, or None.
    """

    rules: Rules
    axes: Mapping[str, KernelAxes] | None

    def __call__(self, params: Any) -> jax.Array:
        """The penalty of a tree of params, a scalar."""
        flat = jax.tree.leaves(params)
        values = [self.value(site, wide(flat[site.place])) for site in self.sites(params)]
        return sum(values, jnp.zeros(()))

    def sites(self, params: Any) -> list[Site]:
        """The leaves that the rules name, without those that hold no weights."""
        found = find_sites(params, self.rules, self.axes or {})
        for site in found:
            if site.pattern.m:
                raise RuleError(
                    f"{site.path!r}: an {site.pattern.kind} pattern has no groups to penalize; "
                    "write 'unstructured', 'vector', 'channel', 'filter' or 'block:RxC'"
                )
        return [site for site in found if 0 not in site.shape]

    def value(self, site: Site, w: jax.Array) -> jax.Array:
        """The penalty of one leaf, float32."""
        raise NotImplementedError

    def prox(self, site: Site, w: jax.Array, rate: jax.Array) -> jax.Array:
        """`argmin_x |x - w|^2 / 2 + rate * value(x)`."""
        raise SpecError(
            f"{type(self).__name__} has no proximal step; add it to the loss: "
            "loss + penalty(params)"
        )


def wide(x: jax.Array) -> jax.Array:
    """`x` in float32, or in float64 if it is."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def magnitude(w: jax.Array) -> jax.Array:
    """`|w|`, whose gradient at 0 is 0, where that of `jnp.abs` is 1."""
    return w * lax.stop_gradient(jnp.sign(w))


def unit_sizes(pattern: Pattern, shape: tuple[int, ...]) -> np.ndarray:
    """How many weights each unit of a pattern has: the boxes at an end may be smaller."""
    sizes = np.ones((), np.int64)
    for n, box, units in zip(shape, pattern.unit, pattern.units(shape)):
        along = np.minimum(box, n - box * np.arange(units))
        sizes = sizes[..., None] * along
    return sizes


def group_norms(site: Site, w: jax.Array) -> jax.Array:
    """The Euclidean norm of each group, `[*batch, *units]`, its gradient 0 for a group of zeros."""
    if site.pattern.single:
        return magnitude(w)
    # Scaled by a power of two, so that squares neither overflow nor vanish.
    largest = lax.stop_gradient(jnp.max(jnp.abs(w), initial=0)).astype(jnp.float32)
    scale, inverse = unit_scale(largest)
    mean = site.pattern.pooled((w * inverse.astype(w.dtype)) ** 2, signed=True)
    squares = mean.astype(w.dtype) * unit_sizes(site.pattern, site.weight_shape).astype(w.dtype)
    some = squares > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1)), 0) * scale.astype(w.dtype)


def scaled_groups(site: Site, w: jax.Array, norms: jax.Array, to: jax.Array) -> jax.Array:
    """The weights with each group brought from its norm to another, exactly 0 where that is."""
    factor = jnp.where(to > 0, to / jnp.where(norms > 0, norms, 1), 0)
    factor = site.pattern.spread(factor, site.weight_shape)
    return jnp.where(factor > 0, w * factor, jnp.zeros((), w.dtype))


@dataclasses.dataclass(frozen=True)
class _GroupLasso(Penalty):
    """`l1 |w|_1 + l2 sum_g sqrt(n_g) |w_g|_2`; both lassos and their mixture."""

    l1: float
    l2: float
    size_weights: bool

    def _thresholds(self, site: Site) -> Any:
        sizes = unit_sizes(site.pattern, site.weight_shape)
        return self.l2 * (np.sqrt(sizes) if self.size_weights else np.ones(sizes.shape))

    def value(self, site: Site, w: jax.Array) -> jax.Array:
        total = jnp.zeros((), w.dtype)
        if self.l1:
            total += self.l1 * jnp.sum(magnitude(w))
        if self.l2:
            total += jnp.sum(group_norms(site, w) * self._thresholds(site).astype(w.dtype))
        return total

    def prox(self, site: Site, w: jax.Array, rate: jax.Array) -> jax.Array:
        # The prox of the sum is the one after the other, for these two (Simon et al., 2013).
        if self.l1:
            w = jnp.sign(w) * jnp.maximum(jnp.abs(w) - rate * self.l1, 0)
        if self.l2:
            norms = group_norms(site, w)
            less = rate * self._thresholds(site).astype(w.dtype)
            w = scaled_groups(site, w, norms, jnp.maximum(norms - less, 0))
        return w


def l1(strength: float, rules: Rules, *, axes: Mapping[str, KernelAxes] | None = None) -> Penalty:
    """The lasso, `strength * sum |w|`; its prox is the soft threshold.

    `prox(w) = sign(w) max(|w| - t, 0)` with `t = rate * strength`.

    Args:
      strength: the factor of the sum, at least 0.
      rules: `{glob: pattern or None}`; the pattern says nothing here, write `unstructured`.
      axes: the input and output axes of leaves by path, from `kernel_axes`.

    Raises:
      SpecError: for a strength that is negative or not finite.
      RuleError: when it is called, for a rule that matches nothing or no floating array.

    References:
      Tibshirani, *Regression Shrinkage and Selection via the Lasso*, 1996.

    Examples:
      >>> import jax.numpy as jnp
      >>> penalty = l1(0.5, {"kernel": "unstructured"})
      >>> float(penalty({"kernel": jnp.array([1.0, -3.0])}))
      2.0
    """
    return _GroupLasso(dict(rules), axes, check_strength("strength", strength), 0.0, False)


def group_lasso(
    strength: float,
    rules: Rules,
    *,
    size_weights: bool = False,
    axes: Mapping[str, KernelAxes] | None = None,
) -> Penalty:
    """The group lasso, `strength * sum_g |w_g|_2`, by which whole groups become zero.

    `prox(w)_g = w_g max(1 - t / |w_g|, 0)` with `t = rate * strength`.

    Args:
      strength: the factor of the sum, at least 0.
      rules: `{glob: pattern or None}`; the units of a pattern are the groups.
      size_weights: multiply the norm of a group of n weights by `sqrt(n)`.
      axes: the input and output axes of leaves by path, from `kernel_axes`.

    Raises:
      SpecError: for a strength that is negative or not finite.
      RuleError: when it is called, for a rule that matches nothing, or an `n:m` pattern.

    References:
      Yuan and Lin, *Model Selection and Estimation in Regression with Grouped Variables*, 2006; Wen
      et al., *Learning Structured Sparsity in Deep Neural Networks*, 2016.

    Examples:
      >>> import jax.numpy as jnp
      >>> penalty = group_lasso(1.0, {"kernel": "vector"})
      >>> float(penalty({"kernel": jnp.array([[3.0, 4.0], [0.0, 0.0]])}))
      5.0
    """
    return _GroupLasso(
        dict(rules), axes, 0.0, check_strength("strength", strength), bool(size_weights)
    )


def sparse_group_lasso(
    strength: float,
    rules: Rules,
    *,
    mix: float = 0.5,
    size_weights: bool = True,
    axes: Mapping[str, KernelAxes] | None = None,
) -> Penalty:
    """The sparse group lasso: groups become zero, and weights in those that stay.

    `strength * (mix * sum |w| + (1 - mix) * sum_g sqrt(n_g) |w_g|_2)`; its prox is the soft
    threshold and then the shrinkage of groups.

    Args:
      strength: the factor of all, at least 0.
      rules: `{glob: pattern or None}`; the units of a pattern are the groups.
      mix: 1 is the lasso, 0 the group lasso.
      size_weights: the factor `sqrt(n_g)`; False: 1.
      axes: the input and output axes of leaves by path, from `kernel_axes`.

    Raises:
      SpecError: for a strength that is negative, or a mix outside of 0 to 1.
      RuleError: when it is called, for a rule that matches nothing, or an `n:m` pattern.

    References:
      Simon et al., *A Sparse-Group Lasso*, 2013.

    Examples:
      >>> import jax.numpy as jnp
      >>> penalty = sparse_group_lasso(1.0, {"kernel": "vector"}, mix=0.5, size_weights=False)
      >>> float(penalty({"kernel": jnp.array([[3.0, 4.0], [0.0, 0.0]])}))
      6.0
    """
    mix = check_share("mix", mix, "the share of the lasso")
    both = check_strength("strength", strength)
    return _GroupLasso(dict(rules), axes, both * mix, both * (1 - mix), bool(size_weights))


@dataclasses.dataclass(frozen=True)
class _Elimination(Penalty):
    strength: float
    scale: float

    def value(self, site: Site, w: jax.Array) -> jax.Array:
        r = jnp.abs(w) / self.scale
        # `r^2 / (1 + r^2)`, of the inverse where r is large, so that no square overflows.
        large = r > 1
        safe = jnp.where(large, 1 / jnp.where(large, r, 1), r)
        share = safe**2 / (1 + safe**2)
        return self.strength * jnp.sum(jnp.where(large, 1 - share, share))


def weight_elimination(
    strength: float,
    rules: Rules,
    *,
    scale: float = 1.0,
    axes: Mapping[str, KernelAxes] | None = None,
) -> Penalty:
    """Weight elimination, `strength * sum (w/w0)^2 / (1 + (w/w0)^2)`: a soft count of weights.

    Weights well below w0 decay; those well above it count 1 each and are left alone. It is not
    convex and has no proximal step here: add it to the loss.

    Args:
      strength: the factor of the sum, at least 0.
      rules: `{glob: pattern or None}`; the pattern says nothing here, write `unstructured`.
      scale: w0, above 0.
      axes: the input and output axes of leaves by path, from `kernel_axes`.

    Raises:
      SpecError: for a negative strength, or a scale that is not above 0.
      RuleError: when it is called, for a rule that matches nothing or no floating array.

    References:
      Weigend, Rumelhart and Huberman, *Generalization by Weight-Elimination with Application to
      Forecasting*, 1991.

    Examples:
      >>> import jax.numpy as jnp
      >>> penalty = weight_elimination(1.0, {"kernel": "unstructured"}, scale=2.0)
      >>> float(penalty({"kernel": jnp.array([2.0, 0.0])}))
      0.5
    """
    scale = check_positive("scale", scale, 1.0)
    return _Elimination(dict(rules), axes, check_strength("strength", strength), scale)
