"""KDGAN: a classifier, a teacher and a discriminator of labels."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcompress.distillation.arguments import log_p, positive, share
from jaxcompress.distillation.logits import soft_targets
from jaxcompress.errors import CompressError


def gumbel_softmax(
    key: jax.Array,
    logits: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    hard: bool = False,
) -> jax.Array:
    """A class drawn from `softmax(logits)`, relaxed so that it has a gradient.

    `softmax((logits + g) / T)` with Gumbel noise g; its largest entry is at a class with exactly
    the probability of that class, at any T.

    Args:
      key: a random key.
      logits: `[..., classes]`.
      temperature: T, positive; near one-hot as it goes to 0.
      hard: one-hot, with the gradient of the relaxed sample.

    Returns:
      float32, of the logits' shape; adds up to 1 over classes.

    Raises:
      CompressError: for scalars, or a temperature that is no positive number.

    References:
      Jang, Gu and Poole, *Categorical Reparameterization with Gumbel-Softmax*, 2017; Maddison, Mnih
      and Teh, *The Concrete Distribution*, 2017.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> gumbel_softmax(jax.random.key(0), jnp.array([0.0, 50.0]), hard=True).tolist()
      [0.0, 1.0]
    """
    if logits.ndim == 0:
        raise CompressError("logits need an axis of classes; these are scalars")
    temperature = positive("temperature", temperature, 1.0)
    noise = jax.random.gumbel(key, logits.shape)
    soft = jnp.exp(log_p(logits.astype(jnp.float32) + noise, temperature))
    if not hard:
        return soft
    one_hot = jax.nn.one_hot(jnp.argmax(soft, axis=-1), logits.shape[-1])
    # Their difference has no gradient, and the sum is the one-hot up to rounding: so not a sum.
    return _straight_through(one_hot, soft)


@jax.custom_jvp
def _straight_through(value: jax.Array, soft: jax.Array) -> jax.Array:
    return value


@_straight_through.defjvp
def _straight_through_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return primals[0], tangents[1]


def kdgan_discriminator(
    real: jax.Array,
    classifier: jax.Array,
    teacher: jax.Array,
    *,
    alpha: float | jax.Array = 0.5,
) -> jax.Array:
    """What makes the discriminator tell true labels from those of the classifier and the teacher.

    `-log D(y) - alpha log(1 - D(y_c)) - (1 - alpha) log(1 - D(y_t))`, D the sigmoid of a judgement.

    Args:
      real: what the discriminator says of examples with their true labels, before the sigmoid,
        `[batch]`.
      classifier: of the same examples with labels of the classifier, drawn by `gumbel_softmax`.
      teacher: with labels of the teacher.
      alpha: the share of the classifier among what is made, from 0 to 1.

    Returns:
      One float32 value per example, `[batch]`.

    Raises:
      CompressError: for shapes that differ, or a share outside of 0 to 1.

    References:
      Wang et al., *KDGAN: Knowledge Distillation with Generative Adversarial Networks*, 2018.

    Examples:
      >>> import jax.numpy as jnp
      >>> unsure = jnp.zeros(1)
      >>> float(kdgan_discriminator(unsure, unsure, unsure)[0] / jnp.log(2.0))
      2.0
    """
    if not real.shape == classifier.shape == teacher.shape:
        raise CompressError(
            f"judgements of true labels {real.shape}, of the classifier's {classifier.shape} and "
            f"of the teacher's {teacher.shape} differ in shape"
        )
    alpha = share("alpha", alpha)
    real, classifier, teacher = (x.astype(jnp.float32) for x in (real, classifier, teacher))
    made = alpha * jax.nn.softplus(classifier) + (1 - alpha) * jax.nn.softplus(teacher)
    return jax.nn.softplus(-real) + made


def kdgan_generator(
    judged: jax.Array,
    own: jax.Array,
    other: jax.Array,
    *,
    alpha: float | jax.Array = 0.5,
    weight: float | jax.Array = 1.0,
    temperature: float | jax.Array = 1.0,
) -> jax.Array:
    """What makes classifier and teacher pass for true labels, and learn from each other.

    `alpha log(1 - D(y)) + weight T**2 KL(other || own)`. The teacher has one minus the alpha of the
    classifier, a weight of its own, and the roles of the logits exchanged. Take the gradient in the
    params of the one that learns, not in the discriminator's.

    Args:
      judged: what the discriminator says of own labels drawn by `gumbel_softmax`, before the
        sigmoid, `[batch]`.
      own: logits of the one that learns, `[batch, classes]`.
      other: logits of the other one. No gradient passes to them.
      alpha: the share of this one among what is made, from 0 to 1.
      weight: of the distillation.
      temperature: T of the distillation, positive.

    Returns:
      One float32 value per example, `[batch]`. The first term is at most 0.

    Raises:
      CompressError: for shapes that do not fit, or numbers out of range.

    References:
      Wang et al., *KDGAN: Knowledge Distillation with Generative Adversarial Networks*, 2018.

    Examples:
      >>> import jax.numpy as jnp
      >>> logits = jnp.ones((1, 3))
      >>> float(kdgan_generator(jnp.zeros(1), logits, logits)[0] / jnp.log(2.0))
      -0.5
    """
    if judged.shape != own.shape[:-1]:
        raise CompressError(f"judgements {judged.shape} of logits {own.shape}; give one for each")
    alpha = share("alpha", alpha)
    fooled = -alpha * jax.nn.softplus(judged.astype(jnp.float32))
    return fooled + weight * soft_targets(own, other, temperature=temperature)
