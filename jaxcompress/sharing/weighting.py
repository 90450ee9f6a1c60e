"""Specs that may weigh errors: by the inputs that were observed, or by importances given."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.arrays.base import is_compressed
from jaxcompress.errors import SpecError
from jaxcompress.layerwise.folding import folding
from jaxcompress.rules import default_axes
from jaxcompress.specs import (
    LeafContext,
    Plan,
    Spec,
    on_all_devices,
    on_auto_axes,
    placed_like,
)


class WeighedPlan(Plan):
    """A plan that also takes weights, or a metric."""

    def apply(self, leaf: jax.Array, key: jax.Array | None) -> Any:
        """The leaf where all weights count alike."""
        return self.solve(leaf, key, None, None)

    def solve(self, leaf: jax.Array, key: Any, weights: Any, metric: Any) -> Any:
        """The leaf; weights in its shape, or a metric, or neither."""
        raise NotImplementedError


class WeighedSpec(Spec):
    """A spec with a `weighting`: None, or the name of a statistic of `observe`.

    `fit` takes importances from elsewhere.
    """

    weighting: str | None

    def __call__(self, leaf: Any, context: LeafContext | None = None) -> Any:
        """Compresses one array, by the statistics of the context if there is a weighting."""
        if context is None:
            context = LeafContext("leaf", default_axes("leaf", leaf.ndim))
        if self.weighting is None:
            return super().__call__(leaf, context)
        if is_compressed(leaf):
            raise SpecError(f"{context.path}: {self!r} weighs dense weights; put it first")
        plan = self.plan(leaf, context)
        return self._solved(leaf, context, plan, *self.measured(leaf, context, plan))

    def measured(self, leaf: Any, context: LeafContext, plan: Any) -> tuple[Any, Any]:
        """The weights and the metric that the statistics give."""
        return second_moments(leaf, context, type(self).__name__), None

    def fit(self, leaf: Any, weights: Any, context: LeafContext | None = None) -> Any:
        """Compresses one array with an importance for each weight.

        Args:
          leaf: a dense array.
          weights: not negative, in its shape or one that broadcasts to it: such as the Fisher
            information, or how often the rows of a table are looked up.
          context: path, axes and key; by Flax's conventions unless given.

        Returns:
          The compressed leaf.

        Raises:
          SpecError: for weights that do not fit, are negative or not finite, or all zero.
        """
        if context is None:
            context = LeafContext("leaf", default_axes("leaf", leaf.ndim))
        if is_compressed(leaf):
            raise SpecError(f"{context.path}: a {type(leaf).__name__}; weigh the dense weights")
        check_weights(weights, leaf, context.path)
        weights = jnp.broadcast_to(jnp.asarray(weights, jnp.float32), leaf.shape)
        return self._solved(leaf, context, self.plan(leaf, context), weights, None)

    def _solved(self, leaf: Any, context: LeafContext, plan: Any, weights: Any, metric: Any) -> Any:
        leaf, mesh = on_auto_axes(leaf)
        weights = None if weights is None else on_all_devices(weights, leaf)
        metric = None if metric is None else on_all_devices(metric, leaf)
        return placed_like(_solve(plan, leaf, context.key, weights, metric), leaf, mesh)


@functools.partial(jax.jit, static_argnums=0)
def _solve(plan: WeighedPlan, leaf: Any, key: Any, weights: Any, metric: Any) -> Any:
    return plan.solve(leaf, key, weights, metric)


def check_weights(weights: Any, leaf: Any, path: str) -> None:
    """Refuses importances that do not fit a leaf.

    Raises:
      SpecError: says what is wrong.
    """
    shape, full = tuple(jnp.shape(weights)), tuple(leaf.shape)
    fits = len(shape) <= len(full) and all(a in (1, b) for a, b in zip(shape[::-1], full[::-1]))
    if not fits:
        raise SpecError(f"{path}: weights {shape} do not broadcast to {full}; write one a weight")
    if isinstance(weights, jax.core.Tracer):
        return
    values = jnp.asarray(weights)
    sound = jnp.all(jnp.isfinite(values) & (values >= 0)) & jnp.any(values > 0)
    if values.size and not bool(sound):
        raise SpecError(
            f"{path}: weights must be finite, none negative and some positive; squared gradients "
            "are, or second moments"
        )


def second_moments(leaf: Any, context: LeafContext, name: str) -> jax.Array:
    """The second moment of the input that each weight meets, in the shape of the leaf.

    Raises:
      SpecError: when it was not observed, or for another leaf.
    """
    stats, path = context.stats, context.path
    found = None if stats is None else stats.second_moment
    if found is None:
        raise SpecError(
            f"{path}: {name}(weighting='second_moment') needs the second moments of the inputs on "
            f"axes {tuple(context.axes.input)}: write compress(..., stats=jc.observe(fn, params, "
            "batches, ('second_moment',)))"
        )
    how = folding(leaf, context.axes)
    rows, columns = math.prod(how.inputs), math.prod(how.outputs)
    if tuple(found.shape) != (*how.batch, rows):
        raise SpecError(
            f"{path}: second moments {tuple(found.shape)} are not those of {(*how.batch, rows)} "
            "inputs; a grouped convolution is compressed without weighting"
        )
    spread = jnp.broadcast_to(jnp.asarray(found)[..., None], (*how.batch, rows, columns))
    return how.unfold(spread)
