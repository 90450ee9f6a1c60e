"""Attention and the relations of queries, keys and values, compared between transformers."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxcompress.distillation.arguments import fixed, mean_of, positive
from jaxcompress.distillation.logits import soft_targets
from jaxcompress.errors import CompressError

Projections = tuple[jax.Array, jax.Array, jax.Array]


def attention_scores(query: jax.Array, key: jax.Array, *, heads: int | None = None) -> jax.Array:
    """What attention puts into its softmax: `q k / sqrt(depth)`, in float32.

    So the scores of a model come from the outputs of its projections, which a `tap` gives.

    Args:
      query: `[batch, queries, heads, depth]`; with `heads`, `[batch, queries, width]` as well.
      key: `[batch, keys, heads, depth]`, or likewise.
      heads: split the features anew into so many heads, after joining those that there are.

    Returns:
      `[batch, heads, queries, keys]`.

    Raises:
      CompressError: for shapes that do not fit, or a width that so many heads do not divide.

    References:
      Vaswani et al., *Attention Is All You Need*, 2017.

    Examples:
      >>> import jax.numpy as jnp
      >>> attention_scores(jnp.ones((1, 2, 1, 4)), jnp.ones((1, 3, 1, 4)))[0, 0].tolist()
      [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]
      >>> attention_scores(jnp.ones((1, 2, 8)), jnp.ones((1, 2, 8)), heads=4).shape
      (1, 4, 2, 2)
    """
    query, key = _split(query, heads, "queries"), _split(key, heads, "keys")
    if query.shape[:1] + query.shape[2:] != key.shape[:1] + key.shape[2:]:
        raise CompressError(
            f"queries {query.shape} and keys {key.shape} differ in more than their length; both "
            "are [batch, length, heads, depth]"
        )
    # Scaled before the product, which then overflows no sooner than the scores do.
    query = query.astype(jnp.float32) / math.sqrt(max(query.shape[-1], 1))
    return jnp.einsum(
        "bqhd,bkhd->bhqk", query, key.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )


def _split(x: jax.Array, heads: int | None, what: str) -> jax.Array:
    if x.ndim not in ((3, 4) if heads else (4,)):
        raise CompressError(
            f"{what} have the shape {x.shape}; write [batch, length, heads, depth]"
            + (" or [batch, length, width]" if heads else ", or say how many heads")
        )
    if heads is None:
        return x
    width = math.prod(x.shape[2:])
    if heads < 1 or width % heads:
        raise CompressError(f"{what} of width {width} cannot be split into {heads} heads")
    return x.reshape(*x.shape[:2], heads, width // heads)


def attention_kl(
    student: jax.Array,
    teacher: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """The divergence of the student's attention from the teacher's, `KL(teacher | student)`.

    The mean over heads and queries of `sum_k a_k (log a_k - log b_k)`, where a and b are the
    softmax over keys of the teacher's and the student's scores; times `temperature**2`, as for
    soft targets. MobileBERT uses it at every layer, MiniLM at the last.

    Args:
      student: attention before its softmax, `[batch, heads, queries, keys]`. Logarithms of
        probabilities serve as well.
      teacher: of the same shape. No gradient passes to it.
      temperature: divides the scores.
      where: what counts: `[batch, length]`, real tokens and no padding, for queries and keys alike;
        or pairs, broadcastable to the scores (a causal mask). None: all. A query that may attend
        to nothing does not count.

    Returns:
      `[batch]`, float32; zero where nothing counts.

    Raises:
      CompressError: for shapes that do not fit.

    References:
      Sun et al., *MobileBERT: a Compact Task-Agnostic BERT for Resource-Limited Devices*, 2020;
      Wang et al., *MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of
      Pre-Trained Transformers*, 2020.

    Examples:
      >>> import jax.numpy as jnp
      >>> scores = jnp.array([[[[0.0, 1.0], [2.0, 0.0]]]])
      >>> attention_kl(scores, scores + 5.0).tolist()
      [0.0]
      >>> real = jnp.array([[True, False]])  # of one key, every attention is the same
      >>> attention_kl(scores, -scores, where=real).tolist()
      [0.0]
    """
    student, teacher, pairs = scores_and_pairs(student, teacher, where)
    temperature = positive("temperature", temperature, 2.0)
    if pairs is None:
        return mean_of(soft_targets(student, teacher, temperature=temperature), 1)
    some = jnp.any(pairs, axis=-1)
    # A row without a key is given all of them, and left out of the mean.
    keys = pairs | ~some[..., None]
    rows = soft_targets(student, teacher, temperature=temperature, where=keys)
    return mean_of(rows, 1, some)


def scores_and_pairs(
    student: jax.Array, teacher: jax.Array, where: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Scores in float32, zero where they do not count, and which pairs do."""
    if student.shape != teacher.shape or student.ndim != 4:
        hint = "; give both models equally many heads, or split them with `heads`"
        raise CompressError(
            f"student scores {student.shape} and teacher scores {teacher.shape} must be of one "
            f"shape, [batch, heads, queries, keys]{hint}"
        )
    student, teacher = student.astype(jnp.float32), fixed(teacher)
    if where is None:
        return student, teacher, None
    batch, _, queries, keys = student.shape
    where = jnp.asarray(where).astype(bool)
    if where.ndim == 2:
        if where.shape != (batch, queries) or queries != keys:
            raise CompressError(
                f"where {where.shape} is not the [batch, length] of scores {student.shape}; for "
                "others, write pairs [batch, 1, queries, keys]"
            )
        where = where[:, None, :, None] & where[:, None, None, :]
    try:
        pairs = jnp.broadcast_to(where, student.shape)
    except ValueError:
        raise CompressError(
            f"where {where.shape} does not broadcast to scores {student.shape}; write "
            "[batch, length] or [batch, 1, queries, keys]"
        ) from None
    return jnp.where(pairs, student, 0.0), jnp.where(pairs, teacher, 0.0), pairs


def relation_kl(
    student: jax.Array,
    teacher: jax.Array,
    *,
    heads: int | None = None,
    where: jax.Array | None = None,
) -> jax.Array:
    """The divergence of relations among the positions of one projection.

    A relation is `softmax(x x^T / sqrt(depth))` per head; the loss is the mean over heads and
    positions of `KL(teacher | student)`. Of values it is the value relation of MiniLM; of queries,
    keys and values, with `heads` relation heads made of all features, those of MiniLMv2.
    Widths may differ, so no projection has to be learned.

    Args:
      student: queries, keys or values, `[batch, length, heads, depth]`; with `heads`,
        `[batch, length, width]` as well.
      teacher: the teacher's, of the same batch and length. No gradient passes to it.
      heads: split both into so many heads; None: as they are, equally many.
      where: `[batch, length]`, which positions are real; None: all.

    Returns:
      `[batch]`, float32.

    Raises:
      CompressError: for shapes that do not fit.

    References:
      Wang et al., *MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of
      Pre-Trained Transformers*, 2020; Wang et al., *MiniLMv2: Multi-Head Self-Attention Relation
      Distillation for Compressing Pretrained Transformers*, 2021.

    Examples:
      >>> import jax
      >>> teacher = jax.random.normal(jax.random.key(0), (2, 5, 24))
      >>> student = jax.random.normal(jax.random.key(1), (2, 5, 4, 2))
      >>> relation_kl(student, teacher, heads=8).shape
      (2,)
    """
    student, teacher = _real(student, where), _real(jax.lax.stop_gradient(teacher), where)
    mine, theirs = (attention_scores(x, x, heads=heads) for x in (student, teacher))
    return attention_kl(mine, theirs, where=where)


def _real(x: jax.Array, where: jax.Array | None) -> jax.Array:
    """Zero at padding, whose infinities would reach the gradients of all it is multiplied with."""
    if where is None:
        return x
    if jnp.ndim(where) != 2 or where.shape != x.shape[:2]:
        raise CompressError(f"where {jnp.shape(where)} is not the [batch, length] of {x.shape}")
    return jnp.where(
        jnp.asarray(where).astype(bool).reshape(*x.shape[:2], *[1] * (x.ndim - 2)), x, 0
    )


def minilm(
    student: Projections,
    teacher: Projections,
    *,
    where: jax.Array | None = None,
) -> jax.Array:
    """MiniLM's loss on the last layer: attention, and the relation of values.

    `attention_kl` of the scores of queries and keys, plus `relation_kl` of the values.

    Args:
      student: `(query, key, value)`, each `[batch, length, heads, depth]`.
      teacher: the teacher's, with as many heads, of any depth. No gradient passes to it.
      where: `[batch, length]`, which positions are real; None: all.

    Returns:
      `[batch]`, float32.

    Raises:
      CompressError: for shapes that do not fit.

    References:
      Wang et al., *MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of
      Pre-Trained Transformers*, 2020.

    Examples:
      >>> import jax.numpy as jnp
      >>> qkv = tuple(jnp.ones((1, 3, 2, 4)) * n for n in (1, 2, 3))
      >>> minilm(qkv, qkv).tolist()
      [0.0]
    """
    _check_projections(student, teacher)
    mine, theirs = (
        attention_scores(_real(q, where), _real(k, where)) for q, k, _ in (student, teacher)
    )
    values = relation_kl(student[2], teacher[2], where=where)
    return attention_kl(mine, theirs, where=where) + values


def minilm_v2(
    student: Projections,
    teacher: Projections,
    *,
    heads: int,
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    where: jax.Array | None = None,
) -> jax.Array:
    """MiniLMv2's loss: the relations of queries, of keys and of values, in heads of their own.

    `sum_i weights_i relation_kl(x_i)` over queries, keys and values of one layer, whose heads are
    joined and split anew into `heads`: so student and teacher may have different numbers of them.

    Args:
      student: `(query, key, value)`, each `[batch, length, heads, depth]` or
        `[batch, length, width]`, of a width that `heads` divides.
      teacher: the teacher's, likewise, of any width that `heads` divides.
      heads: relation heads: more give finer relations (48 or 64 for BERT).
      weights: of the three relations.
      where: `[batch, length]`, which positions are real; None: all.

    Returns:
      `[batch]`, float32.

    Raises:
      CompressError: for shapes that do not fit.

    References:
      Wang et al., *MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing
      Pretrained Transformers*, 2021.

    Examples:
      >>> import jax.numpy as jnp
      >>> narrow = tuple(jnp.ones((1, 3, 8)) * n for n in (1, 2, 3))
      >>> wide = tuple(jnp.ones((1, 3, 2, 12)) * n for n in (1, 2, 3))
      >>> minilm_v2(narrow, wide, heads=4).tolist()
      [0.0]
    """
    _check_projections(student, teacher)
    if len(weights) != 3:
        raise CompressError(f"weights={weights!r}: write three, of queries, keys and values")
    losses = [relation_kl(s, t, heads=heads, where=where) for s, t in zip(student, teacher)]
    return sum((w * x for w, x in zip(weights, losses)), jnp.zeros(()))


def _check_projections(student: Projections, teacher: Projections) -> None:
    for who, found in (("student", student), ("teacher", teacher)):
        if not isinstance(found, (tuple, list)) or len(found) != 3:
            raise CompressError(f"{who}: write its (query, key, value), three arrays")
