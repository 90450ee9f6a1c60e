"""Decoupled distillation: the class of the label and all others apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcompress.distillation.arguments import (
    check_labels,
    counted,
    log_p,
    log_sum,
    pair,
    positive,
)
from jaxcompress.distillation.divergences import kl_of_logs


def dkd(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array,
    *,
    alpha: float | jax.Array = 1.0,
    beta: float | jax.Array = 8.0,
    temperature: float | jax.Array = 4.0,
    axis: int = -1,
    where: jax.Array | None = None,
) -> jax.Array:
    """Decoupled distillation, `T**2 (alpha TCKD + beta NCKD)`.

    With `p = softmax(teacher / T)`, `q = softmax(student / T)` and y the label, TCKD is the
    divergence of `(q_y, 1 - q_y)` from `(p_y, 1 - p_y)`, and NCKD that of `q` from `p` among the
    other classes, each renormalized to sum to 1. `soft_targets` is the same with `alpha=1` and
    `beta=1 - p_y`, which takes from the others just where the teacher is sure. If the teacher's
    logits of all other classes are minus infinity, it says nothing about them and NCKD is 0.

    Args:
      student: logits, `[..., classes]`.
      teacher: logits of the same shape. No gradient passes to them.
      labels: integers, `[...]`.
      alpha: the factor of TCKD, one number or one per example.
      beta: the factor of NCKD, one number or one per example; the authors take 1 to 10, the larger
        the surer the teacher is.
      temperature: T, positive; may be traced.
      axis: the axis of the classes.
      where: which classes count, broadcastable to the logits; None: all.

    Returns:
      One float32 value per example, `[...]`.

    Raises:
      CompressError: for shapes that differ, labels that are no integers of the shape of the
        examples, or a temperature that is no positive number.

    References:
      Zhao, Cui, Song, Qiu and Liang, *Decoupled Knowledge Distillation*, 2022.

    Examples:
      >>> import jax.numpy as jnp
      >>> student, teacher = jnp.array([2.0, 1.0, 0.0]), jnp.array([5.0, 1.0, 0.0])
      >>> float(dkd(student, teacher, jnp.array(0), alpha=0.0))  # they agree on the others
      0.0
    """
    student, teacher = pair(student, teacher, "logits")
    check_labels(labels, student, axis)
    where = counted(where, student.shape, "logits")
    temperature = positive("temperature", temperature, 2.0)
    target = jax.nn.one_hot(labels, student.shape[axis], axis=axis, dtype=bool)
    others = ~target if where is None else ~target & where

    def two(x: jax.Array) -> jax.Array:
        """The logarithms of the label's probability and that of the others, `[2, ...]`."""
        x = log_p(x, temperature, axis, where)
        return jnp.stack([log_sum(x, axis, target), log_sum(x, axis, others)])

    said = jnp.max(teacher, axis=axis, keepdims=True, where=others, initial=-jnp.inf) > -jnp.inf
    p, q = (log_p(x, temperature, axis, others & said) for x in (teacher, student))
    label = kl_of_logs(two(teacher), two(student), 0)
    return temperature**2 * (alpha * label + beta * kl_of_logs(p, q, axis))
