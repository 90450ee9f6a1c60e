"""Correlations of predictions, within an example and within a class."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcompress.distillation.arguments import counted, log_p, mean_of, pair, positive


def dist(
    student: jax.Array,
    teacher: jax.Array,
    *,
    beta: float | jax.Array = 1.0,
    gamma: float | jax.Array = 1.0,
    temperature: float | jax.Array = 1.0,
    axis: int = -1,
    where: jax.Array | None = None,
) -> jax.Array:
    """DIST: correlation of predictions, in the place of their equality.

    `beta (1 - r(q_i, p_i)) + gamma mean_c (1 - r(q_:c, p_:c))` for the example i, where r is
    Pearson's correlation, `p = softmax(teacher / T)` and `q = softmax(student / T)`. The first term
    runs over the classes of the example, the second over the whole batch for each class: it is the
    same for all examples, so that the mean of the values is the published loss. All axes but that
    of the classes are the batch. Where a vector is constant, its correlation is taken as 0, without
    a gradient.

    Args:
      student: logits, `[..., classes]`.
      teacher: logits of the same shape. No gradient passes to them.
      beta: the factor of the relation within an example.
      gamma: the factor of the relation within a class.
      temperature: T, positive; may be traced. The authors take 1 on ImageNet, and 4 on CIFAR with
        a factor `T**2`, which is left to the caller.
      axis: the axis of the classes.
      where: what counts, broadcastable to the logits: `[classes]`, or `[..., 1]` for examples such
        as padding, whose value is then 0. None: all.

    Returns:
      One float32 value per example, `[...]`.

    Raises:
      CompressError: for shapes that differ, a scalar, or a temperature that is no positive number.

    References:
      Huang, You, Wang, Qian and Xu, *Knowledge Distillation from A Stronger Teacher*, 2022.

    Examples:
      >>> import jax.numpy as jnp
      >>> teacher = jnp.array([[3.0, 0.0, 1.0], [0.0, 2.0, 1.0]])
      >>> bool(jnp.all(dist(teacher, teacher) < 1e-6))
      True
    """
    student, teacher = pair(student, teacher, "logits")
    temperature = positive("temperature", temperature, 2.0)
    where = counted(where, student.shape, "logits")
    counts = jnp.ones(student.shape, bool) if where is None else where
    q, p = (jnp.exp(log_p(x, temperature, axis, counts)) for x in (student, teacher))
    last = lambda x: jnp.moveaxis(x, axis, -1)
    q, p, counts = last(q), last(p), last(counts)
    inter = _distance(q, p, counts)
    batch, classes = q.shape[:-1], q.shape[-1]
    q, p, counts = (x.reshape(-1, classes).T for x in (q, p, counts))
    within = mean_of(_distance(q, p, counts), 0, jnp.any(counts, axis=-1))
    within = jnp.where(jnp.any(counts, axis=0).reshape(batch), within, 0.0)
    return beta * inter + gamma * within


def _distance(x: jax.Array, y: jax.Array, counts: jax.Array) -> jax.Array:
    """`1 - r` along the last axis; 0 where nothing counts."""
    r = jnp.sum(_unit(x, counts) * _unit(y, counts), axis=-1)
    return jnp.where(jnp.any(counts, axis=-1), 1 - r, 0.0)


def _unit(x: jax.Array, counts: jax.Array) -> jax.Array:
    """Centred and of norm 1 along the last axis; 0 where constant."""
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True, where=counts, initial=0)
    center = lambda x: jnp.where(counts, x - mean_of(x, x.ndim - 1, counts)[..., None], 0.0)
    # Twice, as the first mean is rounded; what is left of a constant is far below a unit in the
    # last place, while any two values that differ are at least one apart.
    x = center(center(x))
    spread = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0))
    varies = spread > jax.lax.stop_gradient(largest) * 2**-26
    # Scaled before it is squared, so that small probabilities do not vanish.
    x = jnp.where(varies, x, 0.0) / jnp.where(varies, spread, 1.0)
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.where(varies, squares, 1.0))
