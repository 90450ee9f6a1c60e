"""Features `[batch, ..., channels]` of student and teacher, checked and masked."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxcompress.distillation.arguments import fixed, pair
from jaxcompress.errors import CompressError


def positions(where: jax.Array | None, features: jax.Array) -> jax.Array | None:
    """Which positions of features count, `[batch, ..., 1]`; None where all do.

    Raises:
      CompressError: for a mask that does not fit the features without their channels.
    """
    if where is None:
        return None
    shape = features.shape[:-1]
    try:
        return jnp.broadcast_to(where, shape).astype(bool)[..., None]
    except ValueError:
        raise CompressError(
            f"where has the shape {jnp.shape(where)}, and the features' positions are {shape}: "
            "write one value for each position, without an axis of channels"
        ) from None


def masked(features: jax.Array, where: jax.Array | None) -> jax.Array:
    """The features with zeros where nothing counts, so that no infinity reaches a gradient."""
    return features if where is None else jnp.where(where, features, 0.0)


def matched(
    student: jax.Array, teacher: jax.Array, where: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Features of one shape in float32, and which positions count.

    Raises:
      CompressError: for shapes that differ, features of one axis, or a mask that does not fit.
    """
    if student.shape != teacher.shape:
        raise CompressError(
            f"student features {student.shape} and teacher features {teacher.shape} differ in "
            "shape: `resize` brings positions, and a `regressor` channels, to the teacher's"
        )
    _check_axes(student, "student", 2)
    student, teacher = pair(student, teacher, "features")
    where = positions(where, student)
    return masked(student, where), masked(teacher, where), where


def same_positions(
    student: jax.Array, teacher: jax.Array, where: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """As `matched`, with channels that may differ in number, and positions that there must be.

    Raises:
      CompressError: for other shapes, no positions, or a mask that does not fit.
    """
    if student.shape[:-1] != teacher.shape[:-1]:
        raise CompressError(
            f"student features {student.shape} and teacher features {teacher.shape} differ in "
            "more than the channels: `resize` brings positions to the teacher's"
        )
    _check_axes(student, "student", 3)
    where = positions(where, student)
    return masked(student.astype(jnp.float32), where), masked(fixed(teacher), where), where


def examples(
    student: jax.Array, teacher: jax.Array, where: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The features of each example as one vector, and which examples count.

    Args:
      student: `[batch, ...]`.
      teacher: `[batch, ...]`; the other axes may be others.
      where: `[batch]`; None: all.

    Returns:
      Student and teacher, `[batch, features]` in float32, zero for examples that do not count, and
      the mask `[batch]`.

    Raises:
      CompressError: for batches that differ, scalars, or a mask of another shape.
    """
    if not student.ndim or not teacher.ndim or student.shape[0] != teacher.shape[0]:
        raise CompressError(
            f"student features {student.shape} and teacher features {teacher.shape} need the same "
            "batch as their first axis"
        )
    batch = student.shape[0]
    if where is None:
        where = jnp.ones(batch, bool)
    if jnp.shape(where) != (batch,):
        raise CompressError(
            f"where has the shape {jnp.shape(where)}, and the batch is {batch}: write one value "
            "for each example"
        )
    where = jnp.asarray(where).astype(bool)
    ours, theirs = flat(student.astype(jnp.float32)), flat(fixed(teacher))
    return masked(ours, where[:, None]), masked(theirs, where[:, None]), where


def flat(x: jax.Array) -> jax.Array:
    """One vector for each example, of an empty batch too."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def _check_axes(features: jax.Array, whose: str, least: int) -> None:
    if features.ndim < least:
        form = "[batch, ..., channels]" if least == 2 else "[batch, positions..., channels]"
        raise CompressError(f"{whose} features have the shape {features.shape}; write {form}")
