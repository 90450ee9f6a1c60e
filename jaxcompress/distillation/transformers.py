"""Losses between the hidden states and attentions of transformers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcompress.distillation.arguments import mean_of, pair
from jaxcompress.distillation.relations_qkv import scores_and_pairs
from jaxcompress.errors import CompressError


def patient(student: jax.Array, teacher: jax.Array, *, token: int = 0) -> jax.Array:
    """Patient distillation: the distance of normalized hidden states of one token.

    `|h / |h| - g / |g||^2` for the states h of the student and g of the teacher at `[CLS]`, the
    first token; between 0 and 4. Summed over layers by `over_layers`, with the maps of PKD-Skip or
    PKD-Last.

    Args:
      student: hidden states of one layer, `[batch, length, width]`.
      teacher: of the same shape. No gradient passes to it.
      token: which position is compared.

    Returns:
      `[batch]`, float32. A state of zeros counts as it is, without a gradient.

    Raises:
      CompressError: for shapes that do not fit, or a token that is not there.

    References:
      Sun et al., *Patient Knowledge Distillation for BERT Model Compression*, 2019.

    Examples:
      >>> import jax.numpy as jnp
      >>> h = jnp.array([[[3.0, 4.0], [9.0, 9.0]]])
      >>> patient(h, 4 * h).tolist(), patient(h, -h).tolist()
      ([0.0], [4.0])
    """
    student, teacher = pair(student, teacher, "hidden states")
    if student.ndim != 3 or not -student.shape[1] <= token < student.shape[1]:
        raise CompressError(
            f"hidden states {student.shape} have no token {token}; write [batch, length, width]"
        )
    unit = lambda x: _unit(x[:, token])
    return jnp.sum(jnp.square(unit(student) - unit(teacher)), axis=-1)


def _unit(x: jax.Array) -> jax.Array:
    """`x / |x|`; zeros stay, and have a gradient of zero."""
    # By the largest first, so that squares neither overflow nor vanish.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0))
    some = largest > 0
    x = jnp.where(some, x, 1.0) / jnp.where(some, largest, 1.0)
    return jnp.where(some, x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True)), 0.0)


def projection_init(
    key: jax.Array, student_width: int, teacher_width: int, dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """A projection from the student's width to the teacher's, for `hidden_states` to learn with.

    Args:
      key: a random key.
      student_width: the width of the student's hidden states.
      teacher_width: that of the teacher's.
      dtype: of the projection.

    Returns:
      `[student_width, teacher_width]`, with orthonormal columns or rows: so a state keeps its size
      where the teacher is wider. For equal widths, it is the identity.

    References:
      Jiao et al., *TinyBERT: Distilling BERT for Natural Language Understanding*, 2020 (one matrix
      for all layers).

    Examples:
      >>> import jax
      >>> projection_init(jax.random.key(0), 312, 768).shape
      (312, 768)
    """
    if student_width == teacher_width:
        return jnp.eye(student_width, dtype=dtype)
    make = jax.nn.initializers.orthogonal()
    return make(key, (student_width, teacher_width), jnp.float32).astype(dtype)


def hidden_states(
    student: jax.Array,
    teacher: jax.Array,
    *,
    projection: jax.Array | None = None,
    where: jax.Array | None = None,
) -> jax.Array:
    """The mean squared difference of hidden states, after a learned projection of the student's.

    `mean((h W - g)**2)` over real tokens and features. TinyBERT has it for each layer, and for the
    embeddings, with projections that train along with the student; MobileBERT's transfer of feature
    maps is the same without a projection.

    Args:
      student: `[batch, length, width]`.
      teacher: `[batch, length, teacher's width]`. No gradient passes to it.
      projection: W, `[width, teacher's width]`, see `projection_init`; None: widths are equal.
      where: `[batch, length]`, which tokens are real; None: all.

    Returns:
      `[batch]`, float32; zero for an example without a real token.

    Raises:
      CompressError: for shapes that do not fit.

    References:
      Jiao et al., *TinyBERT: Distilling BERT for Natural Language Understanding*, 2020; Sun et al.,
      *MobileBERT: a Compact Task-Agnostic BERT for Resource-Limited Devices*, 2020.

    Examples:
      >>> import jax.numpy as jnp
      >>> student, teacher = jnp.ones((1, 3, 2)), jnp.ones((1, 3, 4))
      >>> hidden_states(student, teacher, projection=jnp.ones((2, 4))).tolist()
      [1.0]
    """
    if where is not None:
        if any(x.ndim != 3 or x.shape[:2] != where.shape for x in (student, teacher)):
            raise CompressError(
                f"where {where.shape} is not the [batch, length] of hidden states {student.shape} "
                f"and {teacher.shape}"
            )
        where = where.astype(bool)[..., None]
        # Padding may hold anything, and an infinity would reach the gradient of the projection.
        student, teacher = jnp.where(where, student, 0), jnp.where(where, teacher, 0)
    if projection is not None:
        if projection.ndim != 2 or student.shape[-1:] != projection.shape[:1]:
            raise CompressError(
                f"a projection {projection.shape} does not fit hidden states {student.shape}; "
                "write projection_init(key, student_width, teacher_width)"
            )
        student = jnp.matmul(
            student.astype(jnp.float32),
            projection.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
    elif student.shape[:-1] == teacher.shape[:-1] and student.shape != teacher.shape:
        raise CompressError(
            f"hidden states {student.shape} of the student and {teacher.shape} of the teacher "
            "differ in width; write projection=projection_init(key, student_width, teacher_width)"
        )
    student, teacher = pair(student, teacher, "hidden states")
    if student.ndim != 3:
        raise CompressError(f"hidden states {student.shape}: write [batch, length, width]")
    return mean_of(jnp.square(student - teacher), 1, where)


def attention_mse(
    student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    """The mean squared difference of attention before its softmax.

    `1/h sum_i mean((A_i - B_i)**2)` over the pairs of queries and keys of h heads, as in TinyBERT,
    which found scores to be better followed than probabilities.

    Args:
      student: scores, `[batch, heads, queries, keys]`, as from `attention_scores`.
      teacher: of the same shape. No gradient passes to it.
      where: `[batch, length]`, which tokens are real, or pairs broadcastable to the scores; None:
        all. Scores that were masked (minus infinity) must not count.

    Returns:
      `[batch]`, float32; zero where nothing counts.

    Raises:
      CompressError: for shapes that do not fit.

    References:
      Jiao et al., *TinyBERT: Distilling BERT for Natural Language Understanding*, 2020.

    Examples:
      >>> import jax.numpy as jnp
      >>> attention_mse(jnp.zeros((1, 2, 3, 3)), jnp.full((1, 2, 3, 3), 2.0)).tolist()
      [4.0]
    """
    student, teacher, pairs = scores_and_pairs(student, teacher, where)
    return mean_of(jnp.square(student - teacher), 1, pairs)
