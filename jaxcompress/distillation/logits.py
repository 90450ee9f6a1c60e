"""Distillation losses on logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from jaxcompress.distillation.arguments import (
    check_labels,
    counted,
    mean_of,
    pair,
    positive,
    share,
)
from jaxcompress.distillation.divergences import forward_kl


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
    temperature = positive("temperature", temperature, 2.0)
    divergence = forward_kl(student, teacher, temperature=temperature, axis=axis, where=where)
    return temperature**2 * divergence


def logit_regression(
    student: jax.Array,
    teacher: jax.Array,
    *,
    centered: bool = False,
    axis: int = -1,
    where: jax.Array | None = None,
) -> jax.Array:
    """The mean squared difference of the logits, `mean_c (s_c - t_c)**2`.

    With `centered` each model's mean over the classes is taken from its logits first, as a constant
    added to all of them changes no prediction; half of that is the limit of `soft_targets` as its
    temperature grows.

    Args:
      student: logits, `[..., classes]`.
      teacher: logits of the same shape, finite where they count. No gradient passes to them.
      centered: whether constants are left out of the comparison.
      axis: the axis of the classes.
      where: which classes count, broadcastable to the logits; None: all.

    Returns:
      One float32 value per example, `[...]`.

    Raises:
      CompressError: for shapes that differ, or a scalar.

    References:
      Ba and Caruana, *Do Deep Nets Really Need to be Deep?*, 2014.

    Examples:
      >>> import jax.numpy as jnp
      >>> student, teacher = jnp.array([[3.0, 1.0]]), jnp.array([[2.0, 0.0]])
      >>> float(logit_regression(student, teacher)[0])
      1.0
      >>> float(logit_regression(student, teacher, centered=True)[0])
      0.0
    """
    student, teacher = pair(student, teacher, "logits")
    where = counted(where, student.shape, "logits")
    batch_ndim = student.ndim - 1
    gap = jnp.moveaxis(student - teacher, axis, -1)
    if where is not None:
        where = jnp.moveaxis(where, axis, -1)
        # Taken out before the square, so that infinities that do not count reach no gradient.
        gap = jnp.where(where, gap, 0.0)
    if centered:
        gap -= mean_of(gap, batch_ndim, where)[..., None]
    return mean_of(jnp.square(gap), batch_ndim, where)


def distillation_loss(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array,
    *,
    alpha: float | jax.Array,
    temperature: float | jax.Array,
    axis: int = -1,
    where: jax.Array | None = None,
) -> jax.Array:
    """Soft targets and hard labels, `alpha T**2 KL(p, q) + (1 - alpha) CE(labels, student)`.

    The first term is `soft_targets`; the cross entropy is taken at temperature 1.

    Args:
      student: logits, `[..., classes]`.
      teacher: logits of the same shape. No gradient passes to them.
      labels: integers, `[...]`.
      alpha: the weight of the teacher, from 0 to 1; may be traced, so that it can follow a
        schedule.
      temperature: T, positive; may be traced.
      axis: the axis of the classes.
      where: which classes count, broadcastable to the logits; None: all.

    Returns:
      One float32 value per example, `[...]`.

    Raises:
      CompressError: for shapes that differ, labels that are no integers of the shape of the
        examples, a weight outside of 0 to 1, or a temperature that is no positive number.

    References:
      Hinton, Vinyals and Dean, *Distilling the Knowledge in a Neural Network*, 2015.

    Examples:
      >>> import jax.numpy as jnp
      >>> teacher = jnp.array([[2.0, 0.0, -2.0]])
      >>> loss = distillation_loss(teacher, teacher, jnp.array([0]), alpha=0.9, temperature=4.0)
      >>> round(float(loss[0]), 4)  # a tenth of the cross entropy
      0.0143
    """
    alpha = share("alpha", alpha)
    soft = soft_targets(student, teacher, temperature=temperature, axis=axis, where=where)
    check_labels(labels, student, axis)
    where = counted(where, student.shape, "logits")
    hard = optax.softmax_cross_entropy_with_integer_labels(
        student.astype(jnp.float32), labels, axis=axis, where=where
    )
    # Without a weight a label that is impossible for the student does not count: not 0 times inf.
    return alpha * soft + (1 - alpha) * jnp.where(alpha < 1, hard, 0.0)
