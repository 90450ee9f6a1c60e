"""Relational distillation: distances and angles between the examples of a batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from jaxcompress.distillation.arguments import positive
from jaxcompress.distillation.geometry import bounded, product
from jaxcompress.distillation.maps import examples

# Vertices whose angles are computed at once.
_CHUNK = 16
# Examples nearer than 2**-30 of the largest feature count as equal: slopes go with the inverse of
# their distance, and those of angles with its cube on the way.
_LEAST = 2.0**-60


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
    ours, theirs = (_relative_distances(x, where, others) for x in (student, teacher))
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
      student: features, `[batch, ...]`; the time grows with the cube of the batch, and with their
        number times its square, so pool large maps first.
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
    ours, theirs = (_squares(x, where) for x in (student, teacher))
    apart = ~jnp.eye(where.size, dtype=bool)

    def at(vertex: tuple[jax.Array, ...]) -> jax.Array:
        to_student, to_teacher, ends = vertex
        cosines = _cosines(to_student, ours), _cosines(to_teacher, theirs)
        terms = optax.losses.huber_loss(*cosines, delta=delta)
        counts = ends & ends[:, None] & apart
        return jnp.sum(jnp.where(counts, terms, 0.0)) / jnp.maximum(jnp.sum(counts), 1)

    # A few vertices at a time, which the backward pass computes again: no array has all triples.
    xs = (ours, theirs, where & where[:, None] & apart)
    return jax.lax.map(jax.checkpoint(at), xs, batch_size=min(_CHUNK, where.size) or None)


def _relative_distances(x: jax.Array, where: jax.Array, others: jax.Array) -> jax.Array:
    """The distances of all pairs over their mean, zero where that is."""
    squares = _squares(x, where)
    some = squares > 0
    distances = jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1.0)), 0.0)
    total = jnp.sum(jnp.where(others, distances, 0.0))
    mean = total / jnp.maximum(jnp.sum(others), 1)
    return distances / jnp.where(mean > 0, mean, 1.0)


def _cosines(to: jax.Array, squares: jax.Array) -> jax.Array:
    """The cosines of the angles at a vertex, by the law of cosines, `[batch, batch]`.

    From distances the error is that of their ratios, however far from zero the features are; and
    the time does not grow with their number.
    """
    some = to > 0
    inverse = jnp.where(some, jax.lax.rsqrt(jnp.where(some, to, 1.0)), 0.0)
    return 0.5 * (to + to[:, None] - squares) * inverse * inverse[:, None]


def _squares(x: jax.Array, where: jax.Array) -> jax.Array:
    """The squared distances of all pairs, of features whose largest is between 1 and 2."""
    x = bounded(x)
    mean = jnp.sum(x, axis=0) / jnp.maximum(jnp.sum(where), 1)
    squares = _square_distances(x - jax.lax.stop_gradient(mean))
    return jnp.where(squares > _LEAST, squares, 0.0)


@jax.custom_jvp
def _square_distances(x: jax.Array) -> jax.Array:
    """`|x_i - x_j|**2`, of the differences themselves: the Gram matrix would cancel."""
    return jnp.sum(jnp.square(x[:, None] - x), axis=-1)


@_square_distances.defjvp
def _square_distances_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    # The slope of |x_i - x_j|**2 is a product of matrices, forward and back, so that no array has
    # all pairs and their features.
    (x,), (dx,) = primals, tangents
    m = product("if,jf->ij", x, dx)
    own = jnp.diagonal(m)
    return _square_distances(x), 2 * (own + own[:, None] - m - m.T)
