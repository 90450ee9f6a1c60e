"""Norms of the inputs that meet a weight, laid on its axes."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxcompress.errors import SpecError
from jaxcompress.input_stats import InputStats


def input_norms(
    path: str, shape: tuple[int, ...], contracted: tuple[int, ...], seen: InputStats
) -> jax.Array:
    """The norm of each input over all that was seen, to be multiplied with a weight.

    Args:
      path: of the weight, for messages.
      shape: its shape.
      contracted: the axes on which it meets the inputs, negative.
      seen: their `second_moment` or `gram`.

    Returns:
      float32 that broadcasts to the shape.

    Raises:
      SpecError: where the statistics do not fit, or hold neither.
    """
    ndim = len(shape)
    norms = jnp.sqrt(_sums_of_squares(path, seen, _inputs(shape, contracted)))
    stack, lead = ndim - _trailing(contracted, ndim), norms.ndim - 1
    sizes = [shape[a] if a - ndim in contracted else 1 for a in range(ndim)]
    if tuple(norms.shape[:-1]) == tuple(shape[:lead]) and lead <= stack:
        return norms.reshape(*shape[:lead], *sizes[lead:])
    groups = norms.shape[-2]
    if shape[-1] % groups or -1 in contracted:
        raise SpecError(
            f"{path}: {groups} groups of inputs do not fit shape {shape}; score it else"
        )
    # Of a grouped convolution: consecutive outputs belong to one group.
    each = jnp.moveaxis(norms, -2, -1)
    each = jnp.repeat(each, shape[-1] // groups, axis=-1)
    return each.reshape(*norms.shape[:-2], *sizes[lead - 1 : -1], shape[-1])


def _trailing(contracted: tuple[int, ...], ndim: int) -> int:
    return max((-a for a in contracted), default=ndim)


def _inputs(shape: tuple[int, ...], contracted: tuple[int, ...]) -> int:
    return math.prod(shape[a] for a in contracted)


def _sums_of_squares(path: str, seen: InputStats, inputs: int) -> jax.Array:
    if seen.second_moment is not None:
        count = jnp.asarray(seen.count[..., None], jnp.float32)
        sums = seen.second_moment * count
    elif seen.gram is not None:
        # Of a look-up it is given as its diagonal, which has no axis for another input.
        square = seen.gram.ndim == seen.count.ndim + 2
        sums = jnp.diagonal(seen.gram, axis1=-2, axis2=-1) if square else seen.gram
    else:
        raise SpecError(
            f"{path}: norms of inputs need their second_moment or gram: write "
            "jc.observe(fn, params, batches, ('second_moment',))"
        )
    if sums.shape[-1] != inputs:
        raise SpecError(
            f"{path}: the statistics are of {sums.shape[-1]} inputs and the weight has {inputs}; "
            "observe the function on these very params"
        )
    return sums
