"""Losses of discriminators and generators, from what a discriminator says of real and fake."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxcompress.distillation.arguments import mean_of
from jaxcompress.errors import CompressError

_Judge = Callable[[jax.Array], jax.Array]

# Of each kind: the loss of the discriminator on real and on fake, and that of the generator.
_KINDS: dict[str, tuple[_Judge, _Judge, _Judge]] = {
    "logistic": (lambda r: jax.nn.softplus(-r), jax.nn.softplus, lambda f: jax.nn.softplus(-f)),
    "hinge": (lambda r: jax.nn.relu(1 - r), lambda f: jax.nn.relu(1 + f), lambda f: -f),
    "least_squares": (
        lambda r: (r - 1) ** 2 / 2,
        lambda f: f**2 / 2,
        lambda f: (f - 1) ** 2 / 2,
    ),
    "wasserstein": (lambda r: -r, lambda f: f, lambda f: -f),
}


def _of(kind: str) -> tuple[_Judge, _Judge, _Judge]:
    if kind not in _KINDS:
        raise CompressError(f"kind={kind!r}: write one of {', '.join(_KINDS)}")
    return _KINDS[kind]


def _each(judge: _Judge, judged: jax.Array) -> jax.Array:
    """The mean over the patches of each example."""
    if judged.ndim == 0:
        raise CompressError("judgements are scalars; give some for each example, [batch, ...]")
    return mean_of(judge(judged.astype(jnp.float32)), 1)


def discriminator_loss(real: jax.Array, fake: jax.Array, *, kind: str = "hinge") -> jax.Array:
    """What makes a discriminator tell real from fake.

    | kind | of real r | of fake f |
    |---|---|---|
    | logistic | `-log s(r)` | `-log(1 - s(f))` |
    | hinge | `max(0, 1 - r)` | `max(0, 1 + f)` |
    | least_squares | `(r - 1)**2 / 2` | `f**2 / 2` |
    | wasserstein | `-r` | `f` |

    Args:
      real: what the discriminator says of real examples, before any sigmoid s: `[batch, ...]`, one
        or more for each example.
      fake: of as many made ones.
      kind: a row of the table.

    Returns:
      One float32 value per pair of examples, the mean over its patches, `[batch]`.

    Raises:
      CompressError: for shapes that differ, scalars, or another kind.

    References:
      Goodfellow et al., *Generative Adversarial Nets*, 2014; Mao et al., *Least Squares Generative
      Adversarial Networks*, 2017; Arjovsky, Chintala and Bottou, *Wasserstein GAN*, 2017; Lim and
      Ye, *Geometric GAN*, 2017 (hinge).

    Examples:
      >>> import jax.numpy as jnp
      >>> discriminator_loss(jnp.array([0.5]), jnp.array([-2.0])).tolist()
      [0.5]
    """
    if real.shape != fake.shape:
        raise CompressError(
            f"judgements of real {real.shape} and of fake {fake.shape}; give as many"
        )
    of_real, of_fake, _ = _of(kind)
    return _each(of_real, real) + _each(of_fake, fake)


def generator_loss(fake: jax.Array, *, kind: str = "hinge") -> jax.Array:
    """What makes a generator pass for real: the other side of `discriminator_loss`.

    `-log s(f)` (the form that does not saturate), `-f`, `(f - 1)**2 / 2` and `-f`, by kind.

    Args:
      fake: what the discriminator says of made examples, before any sigmoid, `[batch, ...]`.
      kind: logistic, hinge, least_squares or wasserstein.

    Returns:
      One float32 value per example, the mean over its patches, `[batch]`.

    Raises:
      CompressError: for scalars, or another kind.

    References:
      As `discriminator_loss`.

    Examples:
      >>> import jax.numpy as jnp
      >>> generator_loss(jnp.array([[0.5, 1.5]])).tolist()
      [-1.0]
    """
    return _each(_of(kind)[2], fake)
