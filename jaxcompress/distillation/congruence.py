"""Correlation congruence: a kernel of all pairs of examples."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcompress.distillation.arguments import positive
from jaxcompress.distillation.geometry import unit
from jaxcompress.distillation.maps import examples
from jaxcompress.distillation.similarity import gram
from jaxcompress.errors import CompressError


def correlation_congruence(
    student: jax.Array,
    teacher: jax.Array,
    *,
    gamma: float | jax.Array = 0.4,
    order: int | None = 2,
    where: jax.Array | None = None,
) -> jax.Array:
    """The squared difference of a Gaussian kernel of the examples of a batch.

    `sum_j (c_ij^s - c_ij^t)**2 / b` for example i, where `c_ij = exp(-gamma |x_i - x_j|**2)` of
    features over their lengths, so that it is `exp(-2 gamma) exp(2 gamma x_i . x_j)`; the second
    exponential is cut off after a power of its Taylor series, as the paper does. The mean over the
    examples is the paper's loss, `|C_s - C_t|_F**2 / b**2`.

    Args:
      student: features, `[batch, ...]`. What is padded inside an example should be zero.
      teacher: features, `[batch, ...]`; the other axes may be others. No gradient passes to them.
      gamma: how fast the kernel falls, positive; may be traced.
      order: the last power of the series, at least 1; None: the kernel itself.
      where: `[batch]`, which examples count; None: all. The others' values are zero.

    Returns:
      One float32 value per example, `[batch]`. A vector of zeros counts as orthogonal to all.

    Raises:
      CompressError: for batches that differ, a mask of another shape, a gamma that is no positive
        number, or an order below 1.

    References:
      Peng et al., *Correlation Congruence for Knowledge Distillation*, 2019.

    Examples:
      >>> import jax.numpy as jnp
      >>> x = jnp.eye(2)
      >>> loss = correlation_congruence(jnp.ones((2, 3)), x, gamma=0.5, order=None)
      >>> [round(float(v), 4) for v in loss]  # (1 - exp(-1))**2 / 2
      [0.1998, 0.1998]
    """
    gamma = positive("gamma", gamma, 0.4)
    if order is not None and order < 1:
        raise CompressError(f"order={order}: write 1 or more, or None for the kernel itself")
    student, teacher, where = examples(student, teacher, where)
    ours, theirs = (_kernel(gram(unit(x)), gamma, order) for x in (student, teacher))
    gaps = jnp.where(where, jnp.square(ours - theirs), 0.0)
    return jnp.where(where, jnp.sum(gaps, axis=-1), 0.0) / jnp.maximum(jnp.sum(where), 1)


def _kernel(cosines: jax.Array, gamma: jax.Array, order: int | None) -> jax.Array:
    if order is None:
        return jnp.exp(2 * gamma * (cosines - 1))
    # Horner's scheme: 1 + y/1 (1 + y/2 (1 + ...)).
    series = jnp.ones_like(cosines)
    for power in range(order, 0, -1):
        series = 1 + 2 * gamma * cosines / power * series
    return jnp.exp(-2 * gamma) * series
