"""Activation boundaries: which neurons are active, before how much."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcompress.distillation.arguments import mean_of, positive
from jaxcompress.distillation.maps import matched


def activation_boundaries(
    student: jax.Array,
    teacher: jax.Array,
    *,
    margin: float | jax.Array = 1.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """How far the student's neurons are from being on where the teacher's are, by a margin.

    `mean max(m - s, 0)**2` where `t > 0`, and `max(m + s, 0)**2` elsewhere: a squared hinge on the
    signs of what goes into a rectifier. The paper sums where this averages.

    Args:
      student: features before their rectifier, `[batch, ..., channels]`, after a `regressor` where
        the student has other channels.
      teacher: the teacher's before theirs, of the same shape. No gradient passes to them.
      margin: m, positive; may be traced.
      where: which positions count, broadcastable to `[batch, ...]`; None: all.

    Returns:
      One float32 value per example, `[batch]`. It is zero for equal features only if none is within
      the margin.

    Raises:
      CompressError: for shapes that differ, a mask that does not fit, or a margin that is no
        positive number.

    References:
      Heo et al., *Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden
      Neurons*, 2019.

    Examples:
      >>> import jax.numpy as jnp
      >>> activation_boundaries(jnp.array([[2.0, 2.0]]), jnp.array([[0.1, -0.1]])).tolist()
      [4.5]
    """
    margin = positive("margin", margin, 1.0)
    student, teacher, where = matched(student, teacher, where)
    short = jax.nn.relu(margin - jnp.where(teacher > 0, student, -student))
    return mean_of(jnp.square(short), 1, where)
