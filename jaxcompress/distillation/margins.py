"""Features before the rectifier, of which negative ones need not be met (overhaul)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.distillation.arguments import fixed, mean_of
from jaxcompress.distillation.maps import masked, matched, positions
from jaxcompress.errors import CompressError

# The continued fraction of the normal tail at `a >= 2` is exact to float32 from here on.
_TERMS = 40


def normal_margin(mean: jax.Array, scale: jax.Array) -> jax.Array:
    """The mean of what is negative of each channel, if it is normal as behind a batch norm.

    `m - s phi(m / s) / Phi(-m / s)`, where phi and Phi are the density and the distribution of a
    standard normal variable.

    Args:
      mean: m, `[channels]`: the bias of the batch norm.
      scale: s, `[channels]`: the scale of the batch norm; its sign says nothing.

    Returns:
      `[channels]`, float32, not positive. With a scale of zero it is the mean, or zero.

    Raises:
      CompressError: for shapes that differ.

    References:
      Heo et al., *A Comprehensive Overhaul of Feature Distillation*, 2019.

    Examples:
      >>> import jax.numpy as jnp
      >>> margin = normal_margin(jnp.array([0.0, -5.0, 10.0]), jnp.ones(3))
      >>> [round(float(m), 3) for m in margin]
      [-0.798, -5.0, -0.098]
    """
    if mean.shape != scale.shape:
        raise CompressError(f"the mean {mean.shape} and the scale {scale.shape} differ in shape")
    mean, scale = mean.astype(jnp.float32), jnp.abs(scale.astype(jnp.float32))
    some = scale > 0
    a = jnp.where(some, mean / jnp.where(some, scale, 1.0), 0.0)
    # With h = phi(a) / Phi(-a): for large a, h - a is small; h = a + 1/(a + 2/(a + 3/(a + ...))).
    large = jnp.maximum(a, 2.0)
    tail = large
    for k in range(_TERMS, 1, -1):
        tail = large + k / tail
    low = jnp.minimum(a, 2.0)
    log_density = -0.5 * jnp.square(low) - 0.5 * np.log(2 * np.pi)
    hazard = jnp.exp(log_density - jax.scipy.special.log_ndtr(-low))
    margin = scale * jnp.where(a > 2, -1 / tail, low - hazard)
    # Where nothing is positive; the ratio may have overflowed.
    margin = jnp.where(a < -10, mean, margin)
    return jnp.where(some, margin, jnp.minimum(mean, 0.0))


def measured_margin(features: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """The mean of what is negative of each channel of some features.

    Args:
      features: the teacher's before their rectifier, `[batch, ..., channels]`; a few thousand
        positions will do.
      where: which positions count, broadcastable to `[batch, ...]`; None: all.

    Returns:
      `[channels]`, float32; zero for a channel with nothing negative.

    Raises:
      CompressError: for features of one axis, or a mask that does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> measured_margin(jnp.array([[-1.0, 2.0], [-3.0, 1.0], [5.0, 0.0]])).tolist()
      [-2.0, 0.0]
    """
    if features.ndim < 2:
        raise CompressError(
            f"features have the shape {features.shape}; write [batch, ..., channels]"
        )
    where = positions(where, features)
    features = masked(features.astype(jnp.float32), where).reshape(-1, features.shape[-1])
    negative = features < 0
    count = jnp.maximum(jnp.sum(negative, axis=0), 1)
    return jnp.sum(jnp.where(negative, features, 0.0), axis=0) / count


def overhaul(
    student: jax.Array,
    teacher: jax.Array,
    margin: jax.Array,
    *,
    where: jax.Array | None = None,
) -> jax.Array:
    """The squared difference of features before their rectifier, where it matters.

    `mean d(max(t, m_c), s)` with `d(t, s) = 0` if `s <= t <= 0` and `(t - s)**2` elsewhere: where
    the teacher's neuron is off, the student's may be further below. The margin cuts off what of
    the teacher is lower than its channel usually is when it is off. The paper sums where this
    averages.

    Args:
      student: features before their rectifier, `[batch, ..., channels]`, after a `regressor`.
      teacher: the teacher's before theirs, of the same shape. No gradient passes to them.
      margin: m, `[channels]`, not positive: from `normal_margin` of a batch norm's bias and scale,
        or from `measured_margin`.
      where: which positions count, broadcastable to `[batch, ...]`; None: all.

    Returns:
      One float32 value per example, `[batch]`. For equal features it is zero: what the margin
      raises, the student is below.

    Raises:
      CompressError: for shapes that differ, a mask that does not fit, or a margin of another shape.

    References:
      Heo et al., *A Comprehensive Overhaul of Feature Distillation*, 2019.

    Examples:
      >>> import jax.numpy as jnp
      >>> student, teacher = jnp.array([[-9.0, 0.0, 1.0]]), jnp.array([[-2.0, -5.0, 1.0]])
      >>> overhaul(student, teacher, jnp.array([-1.0, -3.0, -1.0])).tolist()
      [3.0]
    """
    student, teacher, where = matched(student, teacher, where)
    if jnp.shape(margin) != student.shape[-1:]:
        raise CompressError(
            f"margin has the shape {jnp.shape(margin)}, and the features are {student.shape}: "
            "write one for each channel"
        )
    target = jnp.maximum(teacher, fixed(margin))
    off = (student <= target) & (target <= 0)
    return mean_of(jnp.where(off, 0.0, jnp.square(target - student)), 1, where)
