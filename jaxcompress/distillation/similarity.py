"""Which examples of a batch are alike, to the student as to the teacher."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcompress.distillation.geometry import bounded, product, unit
from jaxcompress.distillation.maps import examples


def similarity_preserving(
    student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    """The squared difference of the examples' similarities to each other.

    `sum_j (g_ij^s - g_ij^t)**2 / b` for example i, where `g_i` is row i of the Gram matrix of the
    flattened features of a batch of b, over its length. The mean over the examples is the paper's
    loss, `|G_s - G_t|_F**2 / b**2`. Neither loss nor gradient changes with the features' scale, and
    orthogonal maps of them change nothing.

    Args:
      student: features, `[batch, ...]`. What is padded inside an example should be zero.
      teacher: features, `[batch, ...]`; the other axes may be others. No gradient passes to them.
      where: `[batch]`, which examples count; None: all. The others are no one's neighbours, and
        their own values are zero.

    Returns:
      One float32 value per example, `[batch]`.

    Raises:
      CompressError: for batches that differ, or a mask of another shape.

    References:
      Tung and Mori, *Similarity-Preserving Knowledge Distillation*, 2019.

    Examples:
      >>> import jax.numpy as jnp
      >>> x = jnp.eye(2)
      >>> similarity_preserving(5 * x[:, ::-1], x).tolist()
      [0.0, 0.0]
      >>> [round(float(v), 3) for v in similarity_preserving(jnp.ones((2, 3)), x)]
      [0.293, 0.293]
    """
    student, teacher, where = examples(student, teacher, where)
    ours, theirs = (unit(gram(bounded(x))) for x in (student, teacher))
    return jnp.sum(jnp.square(ours - theirs), axis=-1) / jnp.maximum(jnp.sum(where), 1)


def gram(x: jax.Array) -> jax.Array:
    """The products of all rows with each other."""
    return product("if,jf->ij", x, x)
