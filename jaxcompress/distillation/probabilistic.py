"""Probabilistic knowledge transfer: each example's neighbours as a distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcompress.distillation.geometry import unit
from jaxcompress.distillation.maps import examples
from jaxcompress.distillation.similarity import gram

# The least kernel, so that examples that are opposite to the student alone cost a finite sum.
_LEAST = 1e-7


def pkt(student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """The divergence of the student's probabilities of neighbours from the teacher's.

    `sum_j p_ij log(p_ij / q_ij)` for example i, over the others j, where p is the teacher's and q
    the student's `k_ij / sum_j k_ij` with the kernel `k_ij = (cos(x_i, x_j) + 1) / 2`, at least
    1e-7. The sum over the examples is the paper's loss.

    Args:
      student: features, `[batch, ...]`. What is padded inside an example should be zero.
      teacher: features, `[batch, ...]`; the other axes may be others. No gradient passes to them.
      where: `[batch]`, which examples count; None: all. The others are no one's neighbours, and
        their own values are zero.

    Returns:
      One float32 value per example, `[batch]`; zero for one that is alone. A vector of zeros counts
      as orthogonal to all.

    Raises:
      CompressError: for batches that differ, or a mask of another shape.

    References:
      Passalis and Tefas, *Learning Deep Representations with Probabilistic Knowledge Transfer*,
      2018.

    Examples:
      >>> import jax.numpy as jnp
      >>> teacher = jnp.array([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
      >>> loss = pkt(jnp.ones((3, 4)), teacher)
      >>> [round(float(v), 3) for v in loss]  # log 2 for the first two
      [0.693, 0.693, 0.0]
    """
    student, teacher, where = examples(student, teacher, where)
    others = where & where[:, None] & ~jnp.eye(where.size, dtype=bool)
    log_q, log_p = (_log_neighbours(x, others) for x in (student, teacher))
    # p (e**d - 1 - d) with d = log q - log p sums to the divergence, and no term is negative.
    d = log_q - log_p
    terms = jnp.exp(log_p) * (jnp.expm1(d) - d)
    return jnp.sum(jnp.where(others, terms, 0.0), axis=-1)


def _log_neighbours(x: jax.Array, others: jax.Array) -> jax.Array:
    kernel = jnp.maximum(0.5 * (gram(unit(x)) + 1), _LEAST)
    total = jnp.sum(jnp.where(others, kernel, 0.0), axis=-1, keepdims=True)
    return jnp.log(kernel) - jnp.log(jnp.where(total > 0, total, 1.0))
