"""Co-teaching: two networks that choose for each other what to learn from noisy labels."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcompress.distillation.arguments import share
from jaxcompress.errors import CompressError


def small_losses(
    losses: jax.Array, keep: float | jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    """Which examples have the smallest losses, a share of all.

    The schedule of the paper, `R(t) = 1 - min(t / T_k tau, tau)`, is
    `optax.linear_schedule(1.0, 1.0 - tau, T_k)`.

    Args:
      losses: of the examples of a batch, of any shape. No gradient passes.
      keep: the share to choose, from 0 to 1; may be traced. `round(keep * count)` are chosen.
      where: which examples count, broadcastable to the losses; None: all.

    Returns:
      bool, of the losses' shape. Of equal ones the first are chosen; NaN counts as the largest.

    Raises:
      CompressError: for a share that is no number from 0 to 1.

    References:
      Han et al., *Co-teaching: Robust Training of Deep Neural Networks with Extremely Noisy
      Labels*, 2018.

    Examples:
      >>> import jax.numpy as jnp
      >>> small_losses(jnp.array([3.0, 1.0, 2.0, 4.0]), 0.5).tolist()
      [False, True, True, False]
    """
    keep = share("keep", keep)
    losses = jax.lax.stop_gradient(losses)
    counts = True if where is None else where
    counts = jnp.broadcast_to(jnp.asarray(counts, bool), losses.shape)
    # By the last key first: what counts, and then by its loss.
    order = jnp.lexsort((losses.reshape(-1), ~counts.reshape(-1)))
    rank = jnp.zeros(losses.size, jnp.int32).at[order].set(jnp.arange(losses.size))
    return (rank.reshape(losses.shape) < jnp.round(keep * jnp.sum(counts))) & counts


def co_teaching(
    first: jax.Array,
    second: jax.Array,
    keep: float | jax.Array,
    *,
    where: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Which examples each of two networks learns from: those that are easy for the other one.

    A network would believe its own mistakes; the other one makes others. Each then minimizes
    `jnp.mean(losses, where=mask)` of its own losses.

    Args:
      first: losses of the first network, one value per example.
      second: losses of the second, of the same examples.
      keep: the share to choose, from 0 to 1; may be traced. See `small_losses`.
      where: which examples count; None: all.

    Returns:
      The mask for the first network and that for the second, bool.

    Raises:
      CompressError: for shapes that differ, or a share that is no number from 0 to 1.

    References:
      Han et al., *Co-teaching: Robust Training of Deep Neural Networks with Extremely Noisy
      Labels*, 2018.

    Examples:
      >>> import jax.numpy as jnp
      >>> masks = co_teaching(jnp.array([1.0, 2.0]), jnp.array([4.0, 3.0]), 0.5)
      >>> [mask.tolist() for mask in masks]
      [[False, True], [True, False]]
    """
    if first.shape != second.shape:
        raise CompressError(
            f"losses {first.shape} and {second.shape} differ in shape; both are of one batch"
        )
    return small_losses(second, keep, where=where), small_losses(first, keep, where=where)
