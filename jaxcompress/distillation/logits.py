"""Distillation losses on logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcompress.distillation.arguments import log_p, pair, positive


def soft_targets(
    student: jax.Array,
    teacher: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    axis: int = -1,
    where: jax.Array | None = None,
) -> jax.Array:
    """The divergence of the student's softened predictions from the teacher's.

    `T**2 sum_c p_c (log p_c - log q_c)`, where `p = softmax(teacher / T)` and
    `q = softmax(student / T)`. The factor `T**2` keeps gradients of the size of those of the hard
    labels whatever T is: as T grows, the loss becomes half the squared difference of the centred
    logits, over the number of classes. Computed in float32 and in log space, so a teacher that is
    certain of a class (logits of minus infinity for others included) gives a finite loss.

    Args:
      student: logits, `[..., classes]`.
      teacher: logits of the same shape. No gradient passes to them.
      temperature: T, positive; may be traced.
      axis: the axis of the classes.
      where: which classes count, broadcastable to the logits; None: all.

    Returns:
      One float32 value per example, `[...]`; averaging is left to the caller.

    Raises:
      CompressError: for shapes that differ, a scalar, or a temperature that is no positive number.

    References:
      Hinton, Vinyals and Dean, *Distilling the Knowledge in a Neural Network*, 2015.

    Examples:
      >>> import jax.numpy as jnp
      >>> teacher = jnp.array([[2.0, 0.0, -2.0]])
      >>> float(soft_targets(teacher, teacher, temperature=4.0)[0])
      0.0
      >>> bool(soft_targets(jnp.zeros((1, 3)), teacher, temperature=4.0)[0] > 1.0)
      True
    """
    student, teacher = pair(student, teacher, "logits")
    temperature = positive("temperature", temperature, 2.0)
    log_teacher, log_student = (log_p(x, temperature, axis, where) for x in (teacher, student))
    p = jnp.exp(log_teacher)
    # p (e**d - 1 - d) with d = log q - log p sums to the divergence, for both p and q sum to 1; no
    # term is negative, so that none cancels another. Where p is 0, the limit is q.
    certain = p == 0 if where is None else (p == 0) | ~jnp.broadcast_to(where, p.shape)
    d = jnp.where(certain, 0.0, log_student) - jnp.where(certain, 0.0, log_teacher)
    terms = jnp.where(certain, jnp.exp(log_student), p * (jnp.expm1(d) - d))
    return temperature**2 * jnp.sum(terms, axis=axis, where=where)
