"""Deep mutual learning: students that teach one another."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxcompress.distillation.arguments import stacked
from jaxcompress.distillation.logits import soft_targets


def mutual_learning(
    students: jax.Array | Sequence[jax.Array],
    *,
    temperature: float | jax.Array = 1.0,
    axis: int = -1,
    where: jax.Array | None = None,
) -> jax.Array:
    """The mean divergence of each student from all the others.

    `1 / (K - 1) sum_{l != k} T**2 KL(p_l || p_k)` for student k, beside the cross-entropy of each.
    The others count as fixed, so that one gradient of the sum over students gives each its own.

    Args:
      students: logits of K students, `[K, ..., classes]` or a list of `[..., classes]`, K from 2.
      temperature: T, positive; 1 in the paper.
      axis: the axis of the classes of one student.
      where: which classes count, broadcastable to the logits of one student; None: all.

    Returns:
      float32, one value per student and example, `[K, ...]`.

    Raises:
      CompressError: for fewer than two students, shapes that differ, or a temperature that is no
        positive number.

    References:
      Zhang et al., *Deep Mutual Learning*, 2018.

    Examples:
      >>> import jax.numpy as jnp
      >>> students = jnp.array([[[2.0, 0.0]], [[0.0, 2.0]], [[0.0, 2.0]]])
      >>> [round(float(loss), 3) for loss in mutual_learning(students)[:, 0]]
      [1.523, 0.762, 0.762]
    """
    logits = stacked(students, "students", 2)

    def divergence(student: jax.Array, teacher: jax.Array) -> jax.Array:
        return soft_targets(student, teacher, temperature=temperature, axis=axis, where=where)

    of_one = jax.vmap(divergence, (None, 0))
    pairs = jax.vmap(of_one, (0, None))(logits, logits)
    # A student costs itself nothing, exactly.
    return jnp.sum(pairs, axis=1) / (len(logits) - 1)
