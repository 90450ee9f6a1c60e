"""Factor transfer: the student translates its features to a short form of the teacher's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxcompress.distillation.arguments import fixed, mean_of
from jaxcompress.distillation.geometry import length, unit
from jaxcompress.distillation.maps import flat, matched
from jaxcompress.distillation.regressors import Params, regressor, regressor_init
from jaxcompress.errors import CompressError

Layers = list[Params]
Kernel = int | Sequence[int]


def _layers(key: jax.Array, channels: Sequence[int], kernel: Kernel) -> Layers:
    keys = jax.random.split(key, len(channels) - 1)
    params = [regressor_init(k, a, b, kernel) for k, a, b in zip(keys, channels, channels[1:])]
    # The rectifier behind each layer lets through about half of the variance.
    return [{**p, "kernel": p["kernel"] * math.sqrt(2)} for p in params]


def _rectified(params: Layers, x: jax.Array) -> jax.Array:
    for layer in params:
        x = jax.nn.leaky_relu(regressor(layer, x), 0.1)
    return x


def paraphraser_init(
    key: jax.Array, channels: int, factor_channels: int, kernel: Kernel = 3
) -> dict[str, Layers]:
    """The weights of a paraphraser: three layers to a factor, and three back.

    Args:
      key: a random key.
      channels: channels of the teacher's features.
      factor_channels: channels of the factor; half of the teacher's is a common choice.
      kernel: as in `regressor_init`; a number above 1 is for images.

    Returns:
      `encoder` and `decoder`, lists of three layers each.

    Raises:
      CompressError: for sizes that are not positive.

    References:
      Kim, Park and Kwak, *Paraphrasing Complex Network: Network Compression via Factor Transfer*,
      2018.

    Examples:
      >>> import jax
      >>> params = paraphraser_init(jax.random.key(0), 4, 4, kernel=1)
      >>> [layer["kernel"].shape for layer in params["encoder"]]
      [(4, 4), (4, 4), (4, 4)]
    """
    there, back = jax.random.split(key)
    sizes = (channels, channels, factor_channels, factor_channels)
    return {"encoder": _layers(there, sizes, kernel), "decoder": _layers(back, sizes[::-1], kernel)}


def paraphrase(params: dict[str, Layers], teacher: jax.Array) -> jax.Array:
    """The factor of the teacher's features, at the same positions.

    Three linear layers, each followed by a leaky rectifier of slope 0.1; without batch norm, whose
    statistics would be one more state.

    Args:
      params: from `paraphraser_init`.
      teacher: features, `[batch, ..., channels]`.

    Returns:
      `[batch, ..., factor_channels]`.

    Raises:
      CompressError: for features that do not fit the weights.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> params = paraphraser_init(jax.random.key(0), 4, 4, kernel=1)
      >>> paraphrase(params, jnp.ones((2, 5, 4))).shape
      (2, 5, 4)
    """
    return _rectified(params["encoder"], teacher)


def paraphraser_loss(
    params: dict[str, Layers], teacher: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    """How far a paraphraser is from giving the teacher's features back.

    `mean (x - decoder(encoder(x)))**2`, over positions and channels. A paraphraser is trained with
    it before the student is. The last layer of the decoder has no rectifier.

    Args:
      params: from `paraphraser_init`; what is trained.
      teacher: features, `[batch, ..., channels]`. No gradient passes to them.
      where: which positions count, broadcastable to `[batch, ...]`; None: all.

    Returns:
      One float32 value per example, `[batch]`.

    Raises:
      CompressError: for features that do not fit the weights, or a mask that does not fit.

    References:
      Kim, Park and Kwak, *Paraphrasing Complex Network: Network Compression via Factor Transfer*,
      2018.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> params = paraphraser_init(jax.random.key(0), 4, 4, kernel=1)
      >>> paraphraser_loss(params, jnp.zeros((2, 4))).tolist()
      [0.0, 0.0]
    """
    *layers, last = params["decoder"]
    back = regressor(last, _rectified(layers, paraphrase(params, fixed(teacher))))
    back, teacher, where = matched(back, teacher, where)
    return mean_of(jnp.square(back - teacher), 1, where)


def translator_init(
    key: jax.Array, student_channels: int, factor_channels: int, kernel: Kernel = 3
) -> Layers:
    """The weights of a translator: three layers from the student's features to a factor.

    Args:
      key: a random key.
      student_channels: channels of the student's features.
      factor_channels: channels of the teacher's factor.
      kernel: as in `regressor_init`; a number above 1 is for images.

    Returns:
      A list of three layers.

    Raises:
      CompressError: for sizes that are not positive.

    Examples:
      >>> import jax
      >>> params = translator_init(jax.random.key(0), 4, 4, kernel=1)
      >>> [layer["kernel"].shape for layer in params]
      [(4, 4), (4, 4), (4, 4)]
    """
    sizes = (student_channels, student_channels, factor_channels, factor_channels)
    return _layers(key, sizes, kernel)


def translate(params: Layers, student: jax.Array) -> jax.Array:
    """The student's features as a factor, to be trained with the student.

    Args:
      params: from `translator_init`.
      student: features, `[batch, ..., student_channels]`.

    Returns:
      `[batch, ..., factor_channels]`.

    Raises:
      CompressError: for features that do not fit the weights.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> params = translator_init(jax.random.key(0), 4, 4, kernel=1)
      >>> translate(params, jnp.ones((2, 5, 4))).shape
      (2, 5, 4)
    """
    return _rectified(params, student)


def factor_transfer(
    student: jax.Array,
    teacher: jax.Array,
    *,
    p: float = 1.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """The distance of the directions of two factors.

    `| f_s / |f_s|_2 - f_t / |f_t|_2 |_p`, where a factor is one vector of all its positions and
    channels.

    Args:
      student: a factor, `[batch, ..., channels]`, from `translate`.
      teacher: the teacher's, of the same shape, from `paraphrase`. No gradient passes to it.
      p: which norm, a number from 1 to 64.
      where: which positions count, broadcastable to `[batch, ...]`; None: all.

    Returns:
      One float32 value per example, `[batch]`. A factor of zeros stays zero.

    Raises:
      CompressError: for shapes that differ, a mask that does not fit, or another norm.

    References:
      Kim, Park and Kwak, *Paraphrasing Complex Network: Network Compression via Factor Transfer*,
      2018.

    Examples:
      >>> import jax.numpy as jnp
      >>> factor_transfer(jnp.array([[0.0, 5.0]]), jnp.array([[3.0, 0.0]])).tolist()
      [2.0]
    """
    if not 1 <= p <= 64:
        raise CompressError(f"p={p}: write a norm from 1 to 64, such as 1")
    student, teacher, _ = matched(student, teacher, where)
    ours, theirs = (unit(flat(x)) for x in (student, teacher))
    return length(ours - theirs, p)
