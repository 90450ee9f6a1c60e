"""The flow of the solution procedure: how two layers of a network go together."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxcompress.distillation.arguments import fixed
from jaxcompress.distillation.geometry import product
from jaxcompress.distillation.maps import masked, positions
from jaxcompress.errors import CompressError

Pair = tuple[jax.Array, jax.Array]


def fsp_matrix(first: jax.Array, second: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """The products of the channels of two layers, averaged over positions.

    `g_ij = mean_p first_pi second_pj`.

    Args:
      first: features, `[batch, ..., channels]`.
      second: features at the same positions, of other channels; `resize` the larger of the two.
      where: which positions count, broadcastable to `[batch, ...]`; None: all.

    Returns:
      `[batch, first channels, second channels]` in float32.

    Raises:
      CompressError: for positions that differ, or a mask that does not fit.

    References:
      Yim et al., *A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and
      Transfer Learning*, 2017.

    Examples:
      >>> import jax.numpy as jnp
      >>> fsp_matrix(jnp.ones((1, 4, 2)), 3 * jnp.ones((1, 4, 1))).tolist()
      [[[3.0], [3.0]]]
    """
    if first.ndim < 2 or first.shape[:-1] != second.shape[:-1]:
        raise CompressError(
            f"the layers' features {first.shape} and {second.shape} need the same positions: "
            "`resize` the larger of the two"
        )
    where = positions(where, first)
    batch, at = first.shape[0], math.prod(first.shape[1:-1])
    first, second = (
        masked(x.astype(jnp.float32), where).reshape(batch, at, x.shape[-1])
        for x in (first, second)
    )
    count: int | jax.Array = max(at, 1)
    if where is not None:
        count = jnp.maximum(jnp.sum(where.reshape(batch, at, 1), axis=1, keepdims=True), 1)
    return product("bpi,bpj->bij", first, second) / count


def fsp(student: Pair, teacher: Pair, *, where: jax.Array | None = None) -> jax.Array:
    """The squared difference of the matrices by which two layers go together.

    `mean_ij (g_ij^s - g_ij^t)**2`, with g of `fsp_matrix`. The paper sums over i and j where this
    averages, and adds up several pairs of layers with weights.

    Args:
      student: features of two layers at the same positions, `[batch, ..., channels]` each.
      teacher: those of the teacher, with the channels of the student's; the positions may be
        others. No gradient passes to them.
      where: which positions count, broadcastable to `[batch, ...]` of all four; None: all.

    Returns:
      One float32 value per example, `[batch]`.

    Raises:
      CompressError: for channels that differ between student and teacher, positions that differ
        between layers, or a mask that does not fit.

    References:
      Yim et al., *A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and
      Transfer Learning*, 2017.

    Examples:
      >>> import jax.numpy as jnp
      >>> x = jnp.ones((1, 4, 4, 2))
      >>> fsp((x, x), (2 * x, x)).tolist()
      [1.0]
    """
    ours = fsp_matrix(*student, where=where)
    theirs = fixed(fsp_matrix(*teacher, where=where))
    if ours.shape != theirs.shape:
        raise CompressError(
            f"the student's layers make a matrix {ours.shape} and the teacher's {theirs.shape}: "
            "a `regressor` brings channels to the teacher's"
        )
    return jnp.mean(jnp.square(ours - theirs), axis=(1, 2))
