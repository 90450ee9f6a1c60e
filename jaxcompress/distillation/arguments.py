"""What losses ask of their arguments, and in which precision they compute."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.errors import CompressError


def pair(student: jax.Array, teacher: jax.Array, what: str) -> tuple[jax.Array, jax.Array]:
    """Both in float32, of one shape, and the teacher's without a gradient.

    Args:
      student: what the student gives, `what` in words ("logits", "features").
      teacher: the teacher's, of the same shape.
      what: their name, for the message.

    Raises:
      CompressError: for shapes that differ, or scalars.
    """
    if student.shape != teacher.shape:
        raise CompressError(
            f"student {what} {student.shape} and teacher {what} {teacher.shape} differ in shape"
        )
    if student.ndim == 0:
        raise CompressError(f"{what} need an axis of their own; these are scalars")
    return student.astype(jnp.float32), fixed(teacher)


def fixed(teacher: jax.Array) -> jax.Array:
    """What a teacher gives, in float32 and without a gradient."""
    return jax.lax.stop_gradient(teacher).astype(jnp.float32)


def stacked(arrays: jax.Array | Sequence[jax.Array], whose: str, least: int = 1) -> jax.Array:
    """What several models give, along a leading axis, in float32.

    Args:
      arrays: stacked already, or one for each model, all of one shape.
      whose: `students` or `teachers`, for the message.
      least: how many there must be.

    Raises:
      CompressError: for shapes that differ, too few, or scalars.
    """
    if hasattr(arrays, "shape"):
        count, each = (arrays.shape[:1] or (0,))[0], arrays.shape[1:]
        shapes = [each] * count
    else:
        shapes = [jnp.shape(x) for x in arrays]
    if len(shapes) < least or len(set(shapes)) != 1:
        raise CompressError(
            f"{whose} of shapes {shapes}: give {least} or more of one shape, stacked or in a list"
        )
    if not shapes[0]:
        raise CompressError(f"{whose} need an axis of their own; these are scalars")
    whole = arrays if hasattr(arrays, "shape") else jnp.stack(list(arrays))
    return jnp.asarray(whole, jnp.float32)


def positive(name: str, value: float | jax.Array, example: float) -> jax.Array:
    """One positive number in float32; a traced one is taken as it is.

    Raises:
      CompressError: for an array of several, or a number that is not positive and finite.
    """
    if np.ndim(value):
        raise CompressError(f"{name} has the shape {np.shape(value)}: write one number")
    if not isinstance(value, jax.core.Tracer) and not 0 < float(value) < np.inf:
        raise CompressError(f"{name}={value}: write a positive number, such as {example}")
    return jnp.asarray(value, jnp.float32)


def share(name: str, value: float | jax.Array, *, ends: bool = True) -> jax.Array:
    """One number from 0 to 1 in float32, with or without the ends; a traced one as it is.

    Raises:
      CompressError: for an array of several, or a number outside.
    """
    if np.ndim(value):
        raise CompressError(f"{name} has the shape {np.shape(value)}: write one number")
    if not isinstance(value, jax.core.Tracer):
        inside = 0 <= float(value) <= 1 if ends else 0 < float(value) < 1
        if not inside:
            raise CompressError(
                f"{name}={value}: write a number from 0 to 1"
                + ("" if ends else ", without 0 and 1 themselves")
            )
    return jnp.asarray(value, jnp.float32)


def counted(where: jax.Array | None, shape: tuple[int, ...], what: str) -> jax.Array | None:
    """Which values count, in booleans of the shape; None where all do.

    Args:
      where: booleans or numbers, broadcastable to the shape.
      shape: of the values.
      what: their name, for the message.

    Raises:
      CompressError: for a mask that does not fit.
    """
    if where is None:
        return None
    try:
        return jnp.broadcast_to(where, shape).astype(bool)
    except ValueError:
        raise CompressError(
            f"where has the shape {jnp.shape(where)}, and the {what} are {shape}: write a mask "
            "that broadcasts to them"
        ) from None


def check_labels(labels: jax.Array, logits: jax.Array, axis: int) -> None:
    """Raises a CompressError unless there is one integer label for each example of the logits."""
    expected = list(logits.shape)
    del expected[axis]
    if labels.shape != tuple(expected) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise CompressError(
            f"labels are {labels.dtype} of the shape {labels.shape}; for logits {logits.shape} "
            f"write integers of the shape {tuple(expected)}"
        )


def log_p(
    logits: jax.Array, temperature: jax.Array, axis: int = -1, where: jax.Array | None = None
) -> jax.Array:
    """The logarithm of `softmax(logits / temperature)`, minus infinity where no class counts."""
    scaled = logits.astype(jnp.float32) / temperature
    where = counted(where, logits.shape, "logits")
    return jax.nn.log_softmax(scaled, axis=axis, where=where)


def log_sum(
    x: jax.Array, axis: int, where: jax.Array | None = None, keepdims: bool = False
) -> jax.Array:
    """`log sum exp x` of what counts; minus infinity, without a gradient, where nothing does."""
    x = x if where is None else jnp.where(where, x, -jnp.inf)
    none = jnp.max(x, axis=axis, keepdims=True, initial=-jnp.inf) == -jnp.inf
    total = jax.nn.logsumexp(jnp.where(none, 0.0, x), axis=axis, keepdims=True)
    total = jnp.where(none, -jnp.inf, total)
    return total if keepdims else jnp.squeeze(total, axis)


def mean_of(values: jax.Array, batch_ndim: int, where: jax.Array | None = None) -> jax.Array:
    """The mean over all but the leading `batch_ndim` axes, of what counts.

    Args:
      values: `[batch..., ...]`.
      batch_ndim: leading axes that stay.
      where: broadcastable to the values; None: all count. An example of which nothing counts, or
        that has nothing, gives zero.
    """
    axes = tuple(range(batch_ndim, values.ndim))
    if where is None:
        # Nothing to average gives zero too.
        return jnp.mean(values, axis=axes) if values.size else jnp.sum(values, axis=axes)
    where = jnp.broadcast_to(where, values.shape).astype(bool)
    count = jnp.sum(where, axis=axes)
    # What does not count is taken out before the sum, so that its infinities reach no gradient.
    total = jnp.sum(jnp.where(where, values, 0.0), axis=axes)
    return total / jnp.maximum(count, 1)
