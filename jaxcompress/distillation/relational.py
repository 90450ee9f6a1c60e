"""Relational distillation: distances and angles between the examples of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcompress.distillation.arguments import positive
from jaxcompress.distillation.geometry import bounded, unit
from jaxcompress.distillation.maps import examples
from jaxcompress.distillation.similarity import gram

# Examples that are set against all others at once.
_CHUNK = 16


def rkd_distance(
    student: jax.Array,
    teacher: jax.Array,
    *,
    delta: float | jax.Array = 1.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """The Huber loss of the distances between examples, each over the mean distance.

    `mean_j huber(|s_i - s_j| / mu_s - |t_i - t_j| / mu_t)` for example i, over the others j, where
    mu is the mean over all pairs. The mean over the examples is the mean over all pairs in order:
    the paper's sum, over `b (b - 1)`. Scales, rotations and shifts of the features change nothing.

    Args:
      student: features, `[batch, ...]`; the time grows with their number times the square of the
        batch, so pool large maps first.
      teacher: features, `[batch, ...]`; the other axes may be others. No gradient passes to them.
      delta: where the Huber loss turns from squared to linear, positive; may be traced.
      where: `[batch]`, which examples count; None: all. The others are no one's neighbours, and
        their own values are zero.

    Returns:
      One float32 value per example, `[batch]`; zero for one that is alone. The distance of equal
      examples is zero and has no gradient.

    Raises:
      CompressError: for batches that differ, a mask of another shape, or a delta that is no
        positive number.

    References:
      Park et al., *Relational Knowledge Distillation*, 2019.

    Examples:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[0.0, 0.0], [3.0, 4.0], [0.0, 4.0]])
      >>> rkd_distance(2 * x[:, ::-1] + 1, x).tolist()
      [0.0, 0.0, 0.0]
    """
    delta = positive("delta", delta, 1.0)
    student, teacher, where = examples(student, teacher, where)
    others = where & where[:, None] & ~jnp.eye(where.size, dtype=bool)
    ours, theirs = (_relative_distances(x, others) for x in (student, teacher))
    terms = optax.losses.huber_loss(ours, theirs, delta=delta)
    total = jnp.sum(jnp.where(others, terms, 0.0), axis=-1)
    return total / jnp.maximum(jnp.sum(others, axis=-1), 1)


def rkd_angle(
    student: jax.Array,
    teacher: jax.Array,
    *,
    delta: float | jax.Array = 1.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """The Huber loss of the cosines of the angles that any three examples make.

    `mean_ik huber(cos_s(i, j, k) - cos_t(i, j, k))` for example j, in which the angle is, over all
    i and k that are different from it and from each other, where
    `cos(i, j, k) = <u_ij, u_kj>` and `u_ij = (x_i - x_j) / |x_i - x_j|`. The mean over the examples
    is the paper's sum over triples, over `b (b - 1) (b - 2)`. Scales, rotations and shifts of the
    features change nothing.

    Args:
      student: features, `[batch, ...]`; the time grows with their number times the cube of the
        batch, so pool large maps first.
      teacher: features, `[batch, ...]`; the other axes may be others. No gradient passes to them.
      delta: where the Huber loss turns from squared to linear, positive; may be traced.
      where: `[batch]`, which examples count; None: all. The others are in no triple, and their own
        values are zero.

    Returns:
      One float32 value per example, `[batch]`; zero in batches of fewer than three. Equal examples
      make right angles with all others and have no gradient.

    Raises:
      CompressError: for batches that differ, a mask of another shape, or a delta that is no
        positive number.

    References:
      Park et al., *Relational Knowledge Distillation*, 2019.

    Examples:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[0.0, 0.0], [3.0, 4.0], [0.0, 4.0]])
      >>> rkd_angle(2 * x[:, ::-1] + 1, x).round(6).tolist()
      [0.0, 0.0, 0.0]
    """
    delta = positive("delta", delta, 1.0)
    student, teacher, where = examples(student, teacher, where)
    student, teacher = bounded(student), bounded(teacher)
    apart = ~jnp.eye(where.size, dtype=bool)

    def at(vertex: tuple[jax.Array, ...]) -> jax.Array:
        one_student, one_teacher, ends = vertex
        ours, theirs = _cosines(student - one_student), _cosines(teacher - one_teacher)
        terms = optax.losses.huber_loss(ours, theirs, delta=delta)
        counts = ends & ends[:, None] & apart
        return jnp.sum(jnp.where(counts, terms, 0.0)) / jnp.maximum(jnp.sum(counts), 1)

    return _each(at, (student, teacher, where & where[:, None] & apart))


def _relative_distances(x: jax.Array, others: jax.Array) -> jax.Array:
    """The distances of all pairs over their mean, zero where that is."""
    x = bounded(x)

    def row(one: jax.Array) -> jax.Array:
        squares = jnp.sum(jnp.square(x - one), axis=-1)
        some = squares > 0
        return jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1.0)), 0.0)

    distances = _each(row, x)
    total = jnp.sum(jnp.where(others, distances, 0.0))
    mean = total / jnp.maximum(jnp.sum(others), 1)
    return distances / jnp.where(mean > 0, mean, 1.0)


def _cosines(sides: jax.Array) -> jax.Array:
    """The cosines of the angles between the sides that lead from one example to all."""
    return gram(unit(sides))


def _each(row: Callable[[Any], jax.Array], xs: Any) -> jax.Array:
    """A function of each example, a few at a time; the backward pass computes them again.

    So no array has all pairs of examples and their features, or all triples.
    """
    batch = jax.tree.leaves(xs)[0].shape[0]
    return jax.lax.map(jax.checkpoint(row), xs, batch_size=min(_CHUNK, batch) or None)
