"""Scores of the weights alone, one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.gradients.weights import Weights, float32, per_weight, placed_like, whole
from jaxcompress.pruning import allocation
from jaxcompress.rules import KernelAxes


def magnitude(params: Any) -> Any:
    """`|w|`.

    Args:
      params: a tree of dense arrays.

    Returns:
      A score of each weight in the structure of `params`, float32, None for leaves that are not
      floating.

    Raises:
      SpecError: for a compressed leaf.

    References:
      Hagiwara, *A Simple and Effective Method for Removal of Hidden Units and Weights*, 1994.

    Examples:
      >>> import jax.numpy as jnp
      >>> magnitude({"w": jnp.array([1.0, -2.0]), "step": 3})
      {'step': None, 'w': Array([1., 2.], dtype=float32)}
    """
    weights = Weights.of(params)
    return weights.scores([jnp.abs(float32(x)) for x in weights.values])


def random(params: Any, key: jax.Array) -> Any:
    """Uniform from 0 to 1: what every other score has to beat.

    Args:
      params: a tree of dense arrays.
      key: a random key; each leaf draws from its own.

    Returns:
      As `magnitude`.

    Raises:
      SpecError: for a compressed leaf.

    References:
      Liu et al., *The Unreasonable Effectiveness of Random Pruning*, 2022.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> random({"w": jnp.ones((2, 3))}, jax.random.key(0))["w"].shape
      (2, 3)
    """
    weights = Weights.of(params)
    keys = [jax.random.fold_in(key, i) for i in range(len(weights.values))]
    return weights.scores([jax.random.uniform(k, x.shape) for k, x in zip(keys, weights.values)])


def lamp(params: Any, *, axes: Mapping[str, KernelAxes] | None = None) -> Any:
    """`w_u**2 / sum_{v: |w_v| >= |w_u|} w_v**2`: magnitudes that compare between weights.

    For one threshold over all leaves: `make_masks(lamp(params), s, rules, scope="global")`. The
    largest weight of each leaf has 1, so that no leaf goes as a whole. The sum runs from the
    largest down, over positive terms only, so that each score is right to some float32 roundings.

    Args:
      params: a tree of dense arrays.
      axes: the input and output axes of leaves by path; the leading axes in neither are a stack,
        each weight of which is ranked for itself.

    Returns:
      As `magnitude`.

    Raises:
      SpecError: for a compressed leaf.

    References:
      Lee et al., *Layer-Adaptive Sparsity for the Magnitude-Based Pruning*, 2021.

    Examples:
      >>> import jax.numpy as jnp
      >>> scores = lamp({"w": jnp.array([1.0, -2.0, 3.0])})
      >>> tuple(round(float(x), 4) for x in scores["w"])
      (0.0714, 0.3077, 1.0)
    """
    weights = Weights.of(params)
    return weights.scores(
        [
            placed_like(x, per_weight(allocation.lamp, at.batch_ndim(x.ndim))(whole(float32(x))))
            for x, at in zip(weights.values, weights.axes(axes))
        ]
    )
