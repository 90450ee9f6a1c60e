"""GrOWL: groups ordered by their norms, the larger ones penalized more."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress.pruning.checks import check_share, check_strength
from jaxcompress.pruning.penalties import Penalty, Rules, group_norms, scaled_groups
from jaxcompress.pruning.sites import Site
from jaxcompress.rules import KernelAxes


@dataclasses.dataclass(frozen=True)
class _Growl(Penalty):
    strength: float
    spread: float
    share: float

    def _weights(self, n: int) -> np.ndarray:
        ramp = round(self.share * n)
        return self.strength + self.spread * np.maximum(ramp - 1.0 - np.arange(n), 0)

    def value(self, site: Site, w: jax.Array) -> jax.Array:
        norms = _by_weight(site, group_norms(site, w))
        ordered = jnp.flip(jnp.sort(norms, axis=-1), axis=-1)
        return jnp.sum(ordered * self._weights(norms.shape[-1]).astype(w.dtype))

    def prox(self, site: Site, w: jax.Array, rate: jax.Array) -> jax.Array:
        norms = group_norms(site, w)
        flat = _by_weight(site, norms)
        less = rate * self._weights(flat.shape[-1]).astype(w.dtype)
        to = jax.vmap(owl_prox, (0, None))(flat.reshape(-1, flat.shape[-1]), less)
        return scaled_groups(site, w, norms, to.reshape(norms.shape))


def _by_weight(site: Site, norms: jax.Array) -> jax.Array:
    """The norms of the groups of each weight of a stack in a row."""
    return norms.reshape(*norms.shape[: site.batch_ndim], math.prod(site.unit_shape))


def growl(
    strength: float,
    rules: Rules,
    *,
    spread: float,
    share: float = 1.0,
    axes: Mapping[str, KernelAxes] | None = None,
) -> Penalty:
    """Group ordered weighted l1 (GrOWL): groups become zero, and correlated ones become alike.

    `sum_i v_i |w|_(i)` over the groups of one weight, their norms in falling order, with
    `v_i = strength + spread * max(p - i, 0)`, i from 1 and `p = round(share * groups)`. With
    `share=1` these are the weights of OSCAR; less makes only the larger ones fall. A spread of 0 is
    the group lasso. The prox sorts the norms, subtracts `rate * v`, makes what is left fall again
    (isotonic regression by pooling adjacent violators) and clips it at 0.

    Args:
      strength: the least weight, at least 0.
      rules: `{glob: pattern or None}`; the units are the groups; `vector` are rows.
      spread: how much the weight grows by from one group to the next larger one.
      share: the share of groups along which it grows.
      axes: the input and output axes of leaves by path, from `kernel_axes`.

    Raises:
      SpecError: for a negative strength or spread, or a share outside of 0 to 1.
      RuleError: when it is called, for a rule that matches nothing, or an `n:m` pattern.

    References:
      Bondell and Reich, *Simultaneous Regression Shrinkage, Variable Selection, and Supervised
      Clustering of Predictors with OSCAR*, 2008; Zhang et al., *Learning to Share: Simultaneous
      Parameter Tying and Sparsification in Deep Learning*, 2018.

    Examples:
      >>> import jax.numpy as jnp
      >>> penalty = growl(1.0, {"kernel": "vector"}, spread=0.5)
      >>> float(penalty({"kernel": jnp.array([[3.0, 4.0], [0.0, 2.0]])}))
      9.5
    """
    share = check_share("share", share, "the share of groups")
    spread = check_strength("spread", spread)
    return _Growl(dict(rules), axes, check_strength("strength", strength), spread, share)


def owl_prox(norms: jax.Array, weights: jax.Array) -> jax.Array:
    """The prox of the ordered weighted l1 norm of a non-negative vector.

    `argmin_{x >= 0} |x - norms|^2 / 2 + sum_i weights_i x_(i)`, exactly.

    Args:
      norms: `[n]`, at least 0.
      weights: `[n]`, falling.

    References:
      Zeng and Figueiredo, *The Ordered Weighted l1 Norm: Atomic Formulation, Projections, and
      Algorithms*, 2014.

    Examples:
      >>> import jax.numpy as jnp
      >>> owl_prox(jnp.array([1.0, 3.0, 2.75]), jnp.array([2.0, 1.0, 0.5])).tolist()
      [0.5, 1.375, 1.375]
    """
    order = jnp.argsort(norms, descending=True, stable=True)
    falling = jnp.maximum(_falling(norms[order] - weights), 0)
    return jnp.zeros_like(norms).at[order].set(falling)


def _falling(z: jax.Array) -> jax.Array:
    """The nearest falling sequence: a block of larger mean is pooled with the one before it.

    One loop over the values with the blocks as a stack, so memory is linear.
    """
    n = z.shape[0]
    if not n:
        return z

    def violated(blocks: Any) -> jax.Array:
        sums, counts, top = blocks
        under = jnp.maximum(top - 1, 0)
        return (top > 0) & (sums[under] * counts[top] < sums[top] * counts[under])

    def pool(blocks: Any) -> Any:
        sums, counts, top = blocks
        sums = sums.at[top - 1].add(sums[top]).at[top].set(0)
        counts = counts.at[top - 1].add(counts[top]).at[top].set(0)
        return sums, counts, top - 1

    def push(i: jax.Array, blocks: Any) -> Any:
        sums, counts, top = blocks
        blocks = sums.at[top + 1].set(z[i]), counts.at[top + 1].set(1), top + 1
        return lax.while_loop(violated, pool, blocks)

    start = (jnp.zeros_like(z), jnp.zeros_like(z), jnp.int32(-1))
    sums, counts, _ = lax.fori_loop(0, n, push, start)
    means = sums / jnp.maximum(counts, 1)
    ends = jnp.cumsum(counts.astype(jnp.int32))
    return means[jnp.searchsorted(ends, jnp.arange(n), side="right")]
