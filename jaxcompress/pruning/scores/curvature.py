"""Scores by the curvature of the loss: Hessian diagonals and the Fisher information."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.errors import SpecError
from jaxcompress.gradients.batches import each_example, mean_over_batches
from jaxcompress.gradients.curvature import hessian_diagonal
from jaxcompress.gradients.weights import Weights, float32
from jaxcompress.pruning.scores.units import Box, boxes, unit_sums
from jaxcompress.rules import KernelAxes
from jaxcompress.specs import is_count


def obd(
    loss_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    curvature: str = "hutchinson",
    key: jax.Array | None = None,
    probes: int = 8,
) -> Any:
    """`h w**2 / 2`, h the Hessian's diagonal: at a minimum, what the loss rises by when w goes.

    `hutchinson`: `h` is the mean of `z * (H z)` over random signs z, drawn anew for each batch; H z
    costs one forward pass over the gradient. It is exact where the Hessian is diagonal; otherwise
    the variance of `h_k` is the sum of the squares of the row's other entries, `sum_{j != k}
    H_kj**2`, divided by the number of probes in all.

    `fisher`: `h` is the mean over examples of the squared gradients, which is never negative; it
    is the Hessian's expectation when the model is right and the loss a log-likelihood.

    Args:
      loss_fn: as `snip`; for `fisher` it is given batches of one example.
      params: a tree of dense arrays, trained: away from a minimum the gradient counts as well.
      batches: as `snip`.
      curvature: `hutchinson` or `fisher`.
      key: a random key, for `hutchinson`.
      probes: how many z for each batch.

    Returns:
      As `snip`; a negative score where the loss curves downwards.

    Raises:
      SpecError: for another curvature, `hutchinson` without a key, no probes, and as `snip`.

    References:
      LeCun, Denker and Solla, *Optimal Brain Damage*, 1990; Hutchinson, *A Stochastic Estimator of
      the Trace of the Influence Matrix for Laplacian Smoothing Splines*, 1990; Bekas, Kokiopoulou
      and Saad, *An Estimator for the Diagonal of a Matrix*, 2007.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> loss_fn = lambda params, a: jnp.sum(a * params["w"] ** 2)
      >>> params, a = {"w": jnp.array([1.0, 2.0])}, jnp.array([3.0, 1.0])
      >>> obd(loss_fn, params, [a], key=jax.random.key(0))["w"].tolist()
      [3.0, 4.0]
    """
    weights = Weights.of(params)
    if curvature == "fisher":
        box = Static((None,) * len(weights.values))
        halves = mean_over_batches(squared_unit_gradients, loss_fn, weights, batches, box)
        return weights.scores([x / 2 for x in halves])
    if curvature != "hutchinson":
        raise SpecError(f"curvature={curvature!r}: write 'hutchinson' or 'fisher'")
    if key is None:
        raise SpecError("curvature='hutchinson' draws probes: write key=jax.random.key(0)")
    if not is_count(probes, 1):
        raise SpecError(f"probes={probes!r}: write a whole number from 1 on")
    keys = jax.random.split(key, probes)
    diagonal = mean_over_batches(hessian_diagonal, loss_fn, weights, batches, keys)
    return weights.scores(
        [h * jnp.square(float32(w)) / 2 for h, w in zip(diagonal, weights.values)]
    )


def fisher(
    loss_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    units: Mapping[str, str | None] | None = None,
    cost: Mapping[str, float] | None = None,
    beta: float = 1.0,
    axes: Mapping[str, KernelAxes] | None = None,
) -> Any:
    """`1 / (2 N) sum_n (sum w g_n)**2 - beta cost`: the loss by removing, less what that saves.

    The inner sum is over the weights of a unit (of one weight where none is named) and g_n the
    gradient of the loss of example n, so that it is the gradient of a gate on the unit.

    Args:
      loss_fn: the loss of a batch, which here has one example; see `snip`. Arguments without axes
        are handed to it as they are.
      params: a tree of dense arrays, trained.
      batches: as `snip`, each array with the examples along its first axis; the gradients of all
        examples of a batch are in memory at once.
      units: `{glob: pattern}` such as `{"**/kernel": "filter"}`: what is removed together. None:
        weights one by one.
      cost: what removing one unit of a leaf saves, by path, such as its multiplications; 0 for
        leaves that are not named.
      beta: the price of cost in units of the loss.
      axes: the input and output axes of leaves by path; Flax's conventions for all others.

    Returns:
      As `taylor`.

    Raises:
      SpecError: for a cost of no leaf, arrays of several numbers of examples, and as `snip`.
      RuleError: for a rule of `units` that matches nothing or does not fit.

    References:
      Theis et al., *Faster Gaze Prediction with Dense Networks and Fisher Pruning*, 2018.

    Examples:
      >>> import jax.numpy as jnp
      >>> loss_fn = lambda params, x: jnp.mean(x @ params["kernel"])
      >>> params = {"kernel": jnp.array([[1.0], [2.0]])}
      >>> x = jnp.array([[1.0, 1.0], [3.0, 0.0]])
      >>> fisher(loss_fn, params, [x])["kernel"].tolist()
      [[2.5], [1.0]]
      >>> fisher(loss_fn, params, [x], units={"kernel": "filter"})["kernel"].tolist()
      [[4.5], [4.5]]
    """
    weights = Weights.of(params)
    weights.check_paths(list(cost or {}), "cost")
    box = Static(boxes(weights, units, axes))
    squares = mean_over_batches(squared_unit_gradients, loss_fn, weights, batches, box)
    saved = [beta * (cost or {}).get(path, 0.0) for path in weights.paths]
    return weights.scores([x / 2 - s for x, s in zip(squares, saved)])


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Static:
    """The units of all arrays, as a static part of what a step is given."""

    boxes: tuple[Box, ...]


def squared_unit_gradients(
    loss: Callable[..., jax.Array], weights: Weights, args: tuple[Any, ...], extra: Any
) -> list[jax.Array]:
    """The mean over examples of the square of `sum w g` over each unit."""
    found = each_example(loss, weights, args)
    out = []
    for w, g, box in zip(weights.values, found, extra[0].boxes):
        sums = jax.vmap(functools.partial(unit_sums, box=box))(float32(w) * g)
        out.append(jnp.mean(jnp.square(sums), axis=0))
    return out
