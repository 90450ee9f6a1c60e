"""Attention transfer: where in its input a network's activations, or gradients, are large."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxcompress.distillation.arguments import fixed
from jaxcompress.distillation.geometry import bounded, length, power, unit
from jaxcompress.distillation.maps import flat, same_positions
from jaxcompress.errors import CompressError


def attention_transfer(
    student: jax.Array,
    teacher: jax.Array,
    *,
    p: float = 2.0,
    squared: bool = False,
    where: jax.Array | None = None,
) -> jax.Array:
    """The distance of the maps that tell where activations are large.

    `| q_s / |q_s| - q_t / |q_t| |_2` with `q = sum_c |a_c|**p` at each position. No regressor is
    needed, for channels are summed up. The paper multiplies it by `beta / 2` and sums over layers.

    Args:
      student: features, `[batch, positions..., channels]`.
      teacher: features at the same positions, of any number of channels. No gradient passes to
        them.
      p: the power, a number from 1 to 64; a larger one looks at the largest activations alone.
      squared: take the square of the distance, as is common in code. It is smooth where maps are
        equal, and twice one minus their cosine.
      where: which positions count, broadcastable to `[batch, positions...]`; None: all.

    Returns:
      One float32 value per example, `[batch]`. A map of zeros has no direction and stays zero.

    Raises:
      CompressError: for positions that differ or that there are none, a mask that does not fit, or
        another power.

    References:
      Zagoruyko and Komodakis, *Paying More Attention to Attention: Improving the Performance of
      Convolutional Neural Networks via Attention Transfer*, 2017.

    Examples:
      >>> import jax.numpy as jnp
      >>> left, right = jnp.eye(2).reshape(2, 1, 2, 1)
      >>> attention_transfer(left, right, squared=True).tolist()
      [2.0]
      >>> attention_transfer(3 * left, left).tolist()
      [0.0]
    """
    if not 1 <= p <= 64:
        raise CompressError(f"p={p}: write a power from 1 to 64, such as 2")
    student, teacher, _ = same_positions(student, teacher, where)
    gap = _map(student, p) - _map(teacher, p)
    return jnp.sum(jnp.square(gap), axis=-1) if squared else length(gap)


def _map(x: jax.Array, p: float) -> jax.Array:
    """`[batch, positions]`, of length 1."""
    size = power(bounded(x, tuple(range(1, x.ndim))), p)
    return unit(flat(jnp.sum(size, axis=-1)))


def gradient_transfer(
    student_loss: Callable[[jax.Array], jax.Array],
    teacher_loss: Callable[[jax.Array], jax.Array],
    student: jax.Array,
    teacher: jax.Array | None = None,
    *,
    squared: bool = False,
) -> jax.Array:
    """The distance of the gradients that two losses have with respect to what goes in.

    `| dL_s/dx - dL_t/dx |_2`, of each example: the student is to be as sensitive to its input as
    the teacher. The paper multiplies it by `beta / 2`. Differentiating it with respect to params
    that `student_loss` closes over is a second derivative, which networks of rectifiers have too.

    Args:
      student_loss: from x to losses, one per example or their sum; examples must not meet in it, as
        they do in batch norm that is training.
      teacher_loss: the teacher's. No gradient passes to it.
      student: x, `[batch, ...]`: inputs, or features from which the losses go on.
      teacher: the teacher's features, of the same shape; None: the same x.
      squared: take the square of the distance.

    Returns:
      One float32 value per example, `[batch]`.

    Raises:
      CompressError: for shapes that differ, or scalars.

    References:
      Zagoruyko and Komodakis, *Paying More Attention to Attention: Improving the Performance of
      Convolutional Neural Networks via Attention Transfer*, 2017.

    Examples:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0, 2.0]])
      >>> gradient_transfer(lambda x: 3 * x[:, 0], lambda x: 4 * x[:, 1], x).tolist()
      [5.0]
    """
    teacher = student if teacher is None else teacher
    if student.shape != teacher.shape or not student.ndim:
        raise CompressError(
            f"student inputs {student.shape} and teacher inputs {teacher.shape} need the same "
            "shape, `[batch, ...]`"
        )
    slopes = [
        jax.grad(lambda x, loss=loss: jnp.sum(loss(x)))(x)
        for loss, x in ((student_loss, student), (teacher_loss, teacher))
    ]
    gap = flat(slopes[0].astype(jnp.float32) - fixed(slopes[1]))
    return jnp.sum(jnp.square(gap), axis=-1) if squared else length(gap)
