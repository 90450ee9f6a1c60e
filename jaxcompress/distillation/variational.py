"""Variational information distillation: the teacher's features given the student's."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxcompress.distillation.arguments import mean_of, positive
from jaxcompress.distillation.maps import matched
from jaxcompress.errors import CompressError

Params = dict[str, jax.Array]


def vid_init(channels: int, *, variance: float = 5.0) -> Params:
    """The variances of `vid`, one per channel, in the form that is trained.

    Args:
      channels: channels of the teacher's features.
      variance: where all start.

    Returns:
      `raw_variance`, `[channels]` in float32, whose softplus is the variance.

    Raises:
      CompressError: for a variance that is not positive, or no channels.

    Examples:
      >>> import jax
      >>> params = vid_init(3, variance=2.0)
      >>> jax.nn.softplus(params["raw_variance"]).round(4).tolist()
      [2.0, 2.0, 2.0]
    """
    positive("variance", variance, 5.0)
    if channels < 1:
        raise CompressError(f"channels={channels}: write a positive number")
    # The inverse of softplus, in a form that does not overflow.
    raw = variance + math.log(-math.expm1(-variance))
    return {"raw_variance": jnp.full(channels, raw, jnp.float32)}


def vid(
    params: Params,
    student: jax.Array,
    teacher: jax.Array,
    *,
    epsilon: float = 1e-5,
    where: jax.Array | None = None,
) -> jax.Array:
    """How unlikely the teacher's features are, given the student's.

    `mean (log v_c + (t - s)**2 / v_c) / 2`, the negative logarithm of a normal density without its
    constant, with the mean s and the variance `v_c = softplus(raw_c) + epsilon` of each channel,
    trained with the student. Channels that the student cannot tell get a large variance and count
    less. The value may be negative. The paper sums where this averages.

    Args:
      params: from `vid_init`.
      student: the mean, `[batch, ..., channels]`, from a `regressor` of the student's features.
      teacher: features of the same shape. No gradient passes to them.
      epsilon: the least variance.
      where: which positions count, broadcastable to `[batch, ...]`; None: all.

    Returns:
      One float32 value per example, `[batch]`.

    Raises:
      CompressError: for shapes that differ, a mask that does not fit, other channels than those of
        the variances, or an epsilon that is not positive.

    References:
      Ahn et al., *Variational Information Distillation for Knowledge Transfer*, 2019.

    Examples:
      >>> import jax.numpy as jnp
      >>> x = jnp.zeros((1, 4, 3))
      >>> vid(vid_init(3, variance=1.0), x, x + 2.0).round(3).tolist()
      [2.0]
    """
    student, teacher, where = matched(student, teacher, where)
    raw = params["raw_variance"].astype(jnp.float32)
    if raw.shape != student.shape[-1:]:
        raise CompressError(
            f"{raw.shape} variances for features {student.shape}: write "
            f"vid_init({student.shape[-1]})"
        )
    variance = jax.nn.softplus(raw) + positive("epsilon", epsilon, 1e-5)
    terms = jnp.log(variance) + jnp.square(teacher - student) / variance
    return mean_of(0.5 * terms, 1, where)
