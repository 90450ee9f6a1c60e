"""Teachers that are noisy, and one that is made of labels alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcompress.distillation.arguments import fixed, share
from jaxcompress.errors import CompressError


def noisy_logits(
    key: jax.Array,
    logits: jax.Array,
    *,
    sigma: float | jax.Array,
    chosen: float | jax.Array = 0.5,
) -> jax.Array:
    """A teacher's logits with noise, `(1 + xi) z` with `xi ~ N(0, sigma**2)` for some examples.

    The noise is drawn for each logit. With another key in each step, the student sees a teacher
    that varies, which regularizes it as several teachers would.

    Args:
      key: a random key.
      logits: of the teacher, `[..., classes]`. No gradient passes to them; those that are not
        finite stay as they are.
      sigma: the standard deviation of the noise, at least 0; may be traced.
      chosen: the probability with which an example is perturbed, from 0 to 1; may be traced.

    Returns:
      Logits of the same shape in float32, for the losses on logits.

    Raises:
      CompressError: for scalars, a negative sigma, or a probability outside of 0 to 1.

    References:
      Sau and Balasubramanian, *Deep Model Compression: Distilling Knowledge from Noisy Teachers*,
      2016.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> logits = jnp.array([[2.0, 0.0, -2.0]])
      >>> noisy_logits(jax.random.key(0), logits, sigma=0.0).tolist()
      [[2.0, 0.0, -2.0]]
    """
    if logits.ndim == 0:
        raise CompressError("logits need an axis of their own; these are scalars")
    if not isinstance(sigma, jax.core.Tracer) and not 0 <= float(sigma) < float("inf"):
        raise CompressError(f"sigma={sigma}: write a number that is not negative, such as 0.3")
    normal_key, choice_key = jax.random.split(key)
    logits = fixed(logits)
    noise = sigma * jax.random.normal(normal_key, logits.shape)
    some = jax.random.bernoulli(choice_key, share("chosen", chosen), (*logits.shape[:-1], 1))
    return jnp.where(some & jnp.isfinite(logits), logits * (1 + noise), logits)


def virtual_teacher(labels: jax.Array, classes: int, *, correct: float | jax.Array) -> jax.Array:
    """Logits of a teacher made of labels: `log correct` for the label, the rest shared alike.

    At temperature 1, `soft_targets` of it is label smoothing by `(1 - correct) K / (K - 1)` of K
    classes, less a constant; at a temperature, it is distillation without a teacher.

    Args:
      labels: integers, `[...]`.
      classes: how many, at least 2.
      correct: the probability of the label, from 0 to 1; may be traced. At 1 the other logits are
        minus infinity.

    Returns:
      Logits `[..., classes]` in float32: the logarithms of the probabilities.

    Raises:
      CompressError: for labels that are no integers, less than 2 classes, or a probability outside
        of 0 to 1.

    References:
      Yuan, Tay, Li, Wang and Feng, *Revisiting Knowledge Distillation via Label Smoothing
      Regularization*, 2020 (Tf-KD); Szegedy et al., *Rethinking the Inception Architecture for
      Computer Vision*, 2016 (label smoothing).

    Examples:
      >>> import jax.numpy as jnp
      >>> jnp.exp(virtual_teacher(jnp.array([1]), 3, correct=0.5)).tolist()
      [[0.25, 0.5, 0.25]]
    """
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise CompressError(f"labels are {labels.dtype}: write integers")
    if classes < 2:
        raise CompressError(f"classes={classes}: write 2 or more")
    correct = share("correct", correct)
    label = jax.nn.one_hot(labels, classes, dtype=bool)
    return jnp.where(label, jnp.log(correct), jnp.log1p(-correct) - jnp.log(classes - 1.0))
