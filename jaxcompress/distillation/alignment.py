"""Centred kernel alignment between features of a student and a teacher."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcompress.distillation.geometry import bounded, unit
from jaxcompress.distillation.maps import examples
from jaxcompress.distillation.similarity import gram


def cka(student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """One minus the linear centred kernel alignment, as the rows of a matrix.

    `b sum_j (k_ij^s / |K_s|_F - k_ij^t / |K_t|_F)**2 / 2` for example i, where K is the Gram matrix
    of features from which their mean over the batch is taken. The mean over the examples is
    `1 - CKA = 1 - <K_s, K_t> / (|K_s| |K_t|)`: zero if the features are equal up to scale and
    rotation, at most 1. In batches that are small beside the number of features, CKA is biased
    towards 1.

    Args:
      student: features, `[batch, ...]`. What is padded inside an example should be zero.
      teacher: features, `[batch, ...]`; the other axes may be others. No gradient passes to them.
      where: `[batch]`, which examples count; None: all. The others' values are zero.

    Returns:
      One float32 value per example, `[batch]`.

    Raises:
      CompressError: for batches that differ, or a mask of another shape.

    References:
      Kornblith et al., *Similarity of Neural Network Representations Revisited*, 2019.

    Examples:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [3.0, 3.0]])
      >>> bool(cka(2 * x[:, ::-1] + 5, x).mean() < 1e-12)
      True
    """
    student, teacher, where = examples(student, teacher, where)
    count = jnp.maximum(jnp.sum(where), 1)
    ours, theirs = (_centred_gram(x, where, count) for x in (student, teacher))
    return 0.5 * count * jnp.sum(jnp.square(ours - theirs), axis=-1)


def _centred_gram(x: jax.Array, where: jax.Array, count: jax.Array) -> jax.Array:
    # Set off from one of them first, so that equal examples have a mean of exactly zero.
    one = x[jnp.argmax(where)] if where.size else 0.0
    x = bounded(jnp.where(where[:, None], x - one, 0.0))
    x = jnp.where(where[:, None], x - jnp.sum(x, axis=0) / count, 0.0)
    k = gram(bounded(x))
    return unit(k.reshape(-1)).reshape(k.shape)
