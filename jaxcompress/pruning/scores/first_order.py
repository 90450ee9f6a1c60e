"""Scores by the first-order change of the loss when a weight, or a unit, goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from jaxcompress.errors import SpecError
from jaxcompress.gradients.batches import gradient, mean_over_batches
from jaxcompress.gradients.weights import Weights
from jaxcompress.pruning.scores.curvature import Static, squared_unit_gradients
from jaxcompress.pruning.scores.units import boxes, unit_changes
from jaxcompress.rules import KernelAxes


def snip(loss_fn: Callable[..., Any], params: Any, batches: Iterable[Any]) -> Any:
    """`|g w|`, g the gradient of the mean loss: the sensitivity of the loss to a gate on w.

    Args:
      loss_fn: `loss_fn(params, *batch)` for batches that are tuples, `loss_fn(params, batch)` for
        others; the mean over the examples of a batch, one number.
      params: a tree of dense arrays, usually before training.
      batches: any iterable. Each counts the same: let them be equally large.

    Returns:
      A score of each weight in the structure of `params`, float32, None for leaves that are not
      floating.

    Raises:
      SpecError: for a compressed leaf, no batches, a loss that is no scalar, or gradients that are
        not finite.

    References:
      Lee, Ajanthan and Torr, *SNIP: Single-Shot Network Pruning Based on Connection Sensitivity*,
      2019.

    Examples:
      >>> import jax.numpy as jnp
      >>> loss_fn = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
      >>> snip(loss_fn, {"w": jnp.array([1.0, 2.0])}, [jnp.eye(2)])["w"].tolist()
      [1.0, 4.0]
    """
    return taylor(loss_fn, params, batches)


def taylor(
    loss_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    order: int = 1,
    units: Mapping[str, str | None] | None = None,
    axes: Mapping[str, KernelAxes] | None = None,
) -> Any:
    """`|dL|`, the change of the loss when a weight or a unit is removed, to first or second order.

    Order 1: `|sum w g|`, the sum over the weights of a unit and g the gradient of the mean loss.
    Order 2: `|-sum w g + F / 2|`, where `F` is the mean over examples of `(sum w g_n)**2`, a unit's
    part of the Fisher information, which stands for the Hessian.

    Args:
      loss_fn: as `snip`; for order 2 it is given batches of one example, and arguments without
        axes as they are.
      params: a tree of dense arrays.
      batches: as `snip`. For order 2, each array has the examples along its first axis.
      order: 1 or 2.
      units: `{glob: pattern}` such as `{"**/kernel": "filter"}`: what is removed together. None:
        weights one by one.
      axes: the input and output axes of leaves by path; Flax's conventions for all others.

    Returns:
      As `snip`; each weight of a unit has the score of the unit, as `make_masks` wants it.

    Raises:
      SpecError: for another order, and as `snip`.
      RuleError: for a rule of `units` that matches nothing or does not fit.

    References:
      Molchanov et al., *Pruning Convolutional Neural Networks for Resource Efficient Inference*,
      2016; Molchanov et al., *Importance Estimation for Neural Network Pruning*, 2019 (order 2).

    Examples:
      >>> import jax.numpy as jnp
      >>> loss_fn = lambda params, x: jnp.mean(x @ params["kernel"])
      >>> params = {"kernel": jnp.array([[1.0, 2.0], [-1.0, 2.0]])}
      >>> taylor(loss_fn, params, [jnp.ones((1, 2))], units={"kernel": "filter"})["kernel"].tolist()
      [[0.0, 2.0], [0.0, 2.0]]
    """
    if order not in (1, 2):
        raise SpecError(f"order={order!r}: write 1 or 2")
    weights = Weights.of(params)
    box = boxes(weights, units, axes)
    if order == 2:
        batches = list(batches)
    means = mean_over_batches(gradient, loss_fn, weights, batches)
    change = unit_changes(weights.values, means, box)
    if order == 2:
        squares = mean_over_batches(squared_unit_gradients, loss_fn, weights, batches, Static(box))
        change = [x + s / 2 for x, s in zip(change, squares)]
    return weights.scores([jnp.abs(x) for x in change])


def skeletonization(
    loss_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    units: Mapping[str, str | None],
    *,
    axes: Mapping[str, KernelAxes] | None = None,
) -> Any:
    """`-dL/da` at a gate `a = 1` on each unit: what the loss gains by the unit.

    With a gate on all weights of a unit, `-dL/da = -sum w g`. A unit of negative relevance harms:
    without it the loss is less. (The paper takes the linear error `sum |t - y|` as loss, since the
    gradients of a quadratic one vanish at the targets, and an average over training.)

    Args:
      loss_fn: as `snip`.
      params: a tree of dense arrays, trained.
      batches: as `snip`.
      units: `{glob: pattern}`: `filter` gates the outputs of a kernel, `channel` its inputs. Leaves
        without a unit are scored weight by weight.
      axes: the input and output axes of leaves by path; Flax's conventions for all others.

    Returns:
      As `taylor`, with a sign.

    Raises:
      SpecError: as `snip`.
      RuleError: for a rule that matches nothing or does not fit.

    References:
      Mozer and Smolensky, *Skeletonization: A Technique for Trimming the Fat from a Network via
      Relevance Assessment*, 1989.

    Examples:
      >>> import jax.numpy as jnp
      >>> loss_fn = lambda params, x: jnp.mean(jnp.sum(1 - x @ params["kernel"], axis=-1))
      >>> params = {"kernel": jnp.array([[3.0, -1.0]])}
      >>> skeletonization(loss_fn, params, [jnp.ones((1, 1))], {"kernel": "filter"})["kernel"]
      Array([[ 3., -1.]], dtype=float32)
    """
    weights = Weights.of(params)
    box = boxes(weights, units, axes)
    means = mean_over_batches(gradient, loss_fn, weights, batches)
    return weights.scores(unit_changes(weights.values, means, box))
