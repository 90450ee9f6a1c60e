"""Whole units of a weight, such as its filters: sums over each, in the shape of the weight."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.errors import RuleError, SpecError
from jaxcompress.gradients.weights import Weights, float32
from jaxcompress.pruning.patterns import is_n_of_m, lay
from jaxcompress.rules import KernelAxes, match

# The size of a unit along each of the last axes of a weight; None: weights count one by one.
Box = tuple[int, ...] | None


def boxes(
    weights: Weights,
    rules: Mapping[str, str | None] | None,
    axes: Mapping[str, KernelAxes] | None,
) -> tuple[Box, ...]:
    """The units of each array by rules such as `{"**/kernel": "filter"}`.

    Raises:
      RuleError: for a rule that matches nothing, or a pattern that does not fit its leaf.
    """
    where = weights.axes(axes)
    if rules is None:
        return (None,) * len(where)
    out: list[Box] = []
    for path, x, at, hit in zip(weights.paths, weights.values, where, match(rules, weights.paths)):
        if hit is None or hit[1] is None or hit[1] == "unstructured":
            out.append(None)
            continue
        if is_n_of_m(hit[1]):
            raise RuleError(f"rule {hit[0]!r}: {hit[1]!r} has no units; write such as 'filter'")
        try:
            out.append(lay(hit[1], x.shape[at.batch_ndim(x.ndim) :], at).unit)
        except SpecError as error:
            raise RuleError(f"rule {hit[0]!r}: {path!r}: {error}") from None
    return tuple(out)


@functools.partial(jax.jit, static_argnums=2)
def unit_changes(
    values: list[jax.Array], grads: list[jax.Array], boxes: tuple[Box, ...]
) -> list[jax.Array]:
    """`-sum w g` over the units of each array: the first-order change of the loss without them."""
    return [-unit_sums(float32(w) * g, b) for w, g, b in zip(values, grads, boxes)]


def unit_sums(x: jax.Array, box: Box) -> jax.Array:
    """At each weight the sum over its unit.

    Examples:
      >>> import jax.numpy as jnp
      >>> unit_sums(jnp.arange(6.0).reshape(2, 3), (2, 1)).tolist()
      [[3.0, 5.0, 7.0], [3.0, 5.0, 7.0]]
    """
    if box is None:
        return x
    shape = x.shape
    for axis, size in enumerate(box, x.ndim - len(box)):
        n = shape[axis]
        if size > 1 and n:
            pad: list[Any] = [(0, -n % size if a == axis else 0) for a in range(x.ndim)]
            parts = jnp.pad(x, pad).reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
            x = jnp.repeat(parts.sum(axis + 1), size, axis)
            x = jax.lax.slice_in_dim(x, 0, n, axis=axis)
    return x
