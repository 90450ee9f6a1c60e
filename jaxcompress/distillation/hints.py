"""Hints: the student's features as the teacher's."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcompress.distillation.arguments import mean_of
from jaxcompress.distillation.maps import matched


def hint(student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """Half the squared difference of features, averaged over positions and channels.

    `mean |s - t|**2 / 2`. The paper sums where this averages: multiply by the number of values.

    Args:
      student: features, `[batch, ..., channels]`, after a `regressor` where the student has other
        channels, and `resize` where it has other positions.
      teacher: features of the same shape. No gradient passes to them.
      where: which positions count, broadcastable to `[batch, ...]`; None: all.

    Returns:
      One float32 value per example, `[batch]`.

    Raises:
      CompressError: for shapes that differ, or a mask that does not fit.

    References:
      Romero et al., *FitNets: Hints for Thin Deep Nets*, 2015.

    Examples:
      >>> import jax.numpy as jnp
      >>> hint(jnp.zeros((1, 4, 2)), 2 * jnp.ones((1, 4, 2))).tolist()
      [2.0]
    """
    student, teacher, where = matched(student, teacher, where)
    return mean_of(0.5 * jnp.square(student - teacher), 1, where)
