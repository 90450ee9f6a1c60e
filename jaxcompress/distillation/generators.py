"""Compression of conditional generators."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxcompress.distillation.adversarial import generator_loss
from jaxcompress.distillation.arguments import mean_of, pair
from jaxcompress.errors import CompressError


def generator_distillation(
    student: jax.Array,
    target: jax.Array,
    judged: jax.Array,
    *,
    features: Sequence[tuple[jax.Array, jax.Array]] = (),
    reconstruction: float | jax.Array = 100.0,
    matching: float | jax.Array = 1.0,
    adversarial: float | jax.Array = 1.0,
    kind: str = "hinge",
) -> jax.Array:
    """What a small generator learns from a large one.

    `a L_gan + r mean|x - target| + m sum_l mean (f_l - t_l)**2`. The target is the true image
    where inputs and outputs come in pairs, and else the teacher's image. The discriminator goes on
    from the teacher's, trained with `discriminator_loss`.

    Args:
      student: images of the student, `[batch, ...]`.
      target: images of the same shape. No gradient passes to them.
      judged: what the discriminator says of the student's images, `[batch, ...]`.
      features: of each layer that is matched the student's, mapped to the teacher's channels by a
        learned layer, and the teacher's, `[batch, ..., channels]`.
      reconstruction: r.
      matching: m.
      adversarial: a.
      kind: of the adversarial loss, see `generator_loss`.

    Returns:
      One float32 value per example, `[batch]`.

    Raises:
      CompressError: for shapes that differ, or another kind.

    References:
      Li et al., *GAN Compression: Efficient Architectures for Interactive Conditional GANs*, 2020.

    Examples:
      >>> import jax.numpy as jnp
      >>> images, judged = jnp.ones((1, 4, 4, 3)), jnp.array([2.0])
      >>> generator_distillation(images, images - 0.5, judged, reconstruction=10.0).tolist()
      [3.0]
    """
    student, target = pair(student, target, "images")
    batch = student.shape[:1]
    if judged.shape[:1] != batch:
        raise CompressError(f"judgements {judged.shape} of images {student.shape}")
    d = student - target
    # The sign of 0 is 0, where the slope of jnp.abs there is 1.
    loss = reconstruction * mean_of(d * jax.lax.stop_gradient(jnp.sign(d)), 1)
    for own, teachers in features:
        own, teachers = pair(own, teachers, "features")
        if own.shape[:1] != batch:
            raise CompressError(f"features {own.shape} of images {student.shape}")
        loss += matching * mean_of((own - teachers) ** 2, 1)
    return loss + adversarial * generator_loss(judged, kind=kind)
