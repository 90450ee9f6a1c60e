"""Inputs made from a trained model: what makes images look natural, and the descent to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcompress.distillation.arguments import log_p, positive
from jaxcompress.distillation.divergences import kl_of_logs, mixture_of_logs
from jaxcompress.errors import CompressError
from jaxcompress.specs import is_count


def total_variation(images: jax.Array, *, power: int = 1) -> jax.Array:
    """How much neighbouring pixels differ.

    `sum |x_{i+1,j} - x_{i,j}|**p + |x_{i,j+1} - x_{i,j}|**p` over places and channels.

    Args:
      images: `[..., height, width, channels]`.
      power: p, 1 or 2.

    Returns:
      One float32 value per image, `[...]`. Where neighbours are equal, the gradient is 0.

    Raises:
      CompressError: for images without their three axes, or another power.

    References:
      Rudin, Osher and Fatemi, *Nonlinear Total Variation Based Noise Removal Algorithms*, 1992;
      Mahendran and Vedaldi, *Understanding Deep Image Representations by Inverting Them*, 2015.

    Examples:
      >>> import jax.numpy as jnp
      >>> total_variation(jnp.array([[[[0.0], [2.0]], [[0.0], [0.0]]]])).tolist()
      [4.0]
    """
    if images.ndim < 3:
        raise CompressError(f"images {images.shape}: write [..., height, width, channels]")
    if power not in (1, 2):
        raise CompressError(f"power={power!r}: write 1 or 2")
    x, total = images.astype(jnp.float32), jnp.zeros(())
    for axis in (-3, -2):
        d = jnp.diff(x, axis=axis)
        # The sign of 0 is 0, where the slope of jnp.abs there is 1.
        size = d * (d if power == 2 else jax.lax.stop_gradient(jnp.sign(d)))
        total += jnp.sum(size, axis=(-3, -2, -1))
    return total


def competition(
    student: jax.Array, teacher: jax.Array, *, temperature: float | jax.Array = 3.0
) -> jax.Array:
    """One minus the Jensen-Shannon divergence: small where student and teacher differ.

    `1 - (KL(p || m) + KL(q || m)) / 2` with `m = (p + q) / 2`, at temperature T, in nats, so from
    `1 - log 2` to 1. Beside the losses of an inversion it finds images that the student has not
    learned yet (adaptive DeepInversion).

    Args:
      student: logits, `[..., classes]`.
      teacher: logits of the same shape. The gradient passes to both, for both see the inputs.
      temperature: T, positive.

    Returns:
      One float32 value per example, `[...]`.

    Raises:
      CompressError: for shapes that differ, or a temperature that is no positive number.

    References:
      Yin et al., *Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion*, 2020.

    Examples:
      >>> import jax.numpy as jnp
      >>> logits = jnp.array([[1.0, 2.0]])
      >>> float(competition(logits, logits)[0])
      1.0
    """
    if student.shape != teacher.shape or student.ndim == 0:
        raise CompressError(f"student logits {student.shape} and teacher logits {teacher.shape}")
    temperature = positive("temperature", temperature, 3.0)
    p, q = (log_p(x, temperature) for x in (student, teacher))
    middle = mixture_of_logs(p, q, jnp.float32(0.5))
    return 1 - (kl_of_logs(p, middle, -1) + kl_of_logs(q, middle, -1)) / 2


def jitter(key: jax.Array, images: jax.Array, most: int, *, flip: bool = False) -> jax.Array:
    """Rolls a batch of images by a few pixels, and mirrors it half of the time.

    Inside the loss of an inversion: what only holds at one place of the image is no feature.

    Args:
      key: a random key.
      images: `[..., height, width, channels]`.
      most: pixels, in either direction of either axis.
      flip: whether to mirror.

    Raises:
      CompressError: for images without their three axes, or a `most` that is no whole number.

    References:
      As `competition`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> images = jnp.arange(9.0).reshape(1, 3, 3, 1)
      >>> float(jitter(jax.random.key(0), images, 1).sum())
      36.0
    """
    if images.ndim < 3 or not is_count(most, 0):
        raise CompressError(
            f"images {images.shape}, most={most!r}: write [..., height, width, channels] and a "
            "whole number of pixels"
        )
    places, mirror = jax.random.split(key)
    by = jax.random.randint(places, (2,), -most, most + 1)
    images = jnp.roll(images, by, (-3, -2))
    turned = jax.random.bernoulli(mirror) & flip
    return jnp.where(turned, jnp.flip(images, -2), images)


class InversionState(NamedTuple):
    """Where an inversion is.

    Attributes:
      inputs: as they are by now, float32.
      optimizer: the state of the optimizer.
    """

    inputs: jax.Array
    optimizer: Any


class Inversion(NamedTuple):
    """A pair of pure functions, as in optax.

    Attributes:
      init: `init(inputs) -> state`.
      step: `step(state, key) -> (state, loss)`, the loss before the step.
    """

    init: Callable[[jax.Array], InversionState]
    step: Callable[[InversionState, jax.Array], tuple[InversionState, jax.Array]]


class Inverted(NamedTuple):
    """What `invert` found.

    Attributes:
      inputs: in the end.
      losses: before each step, `[steps]`.
    """

    inputs: jax.Array
    losses: jax.Array


def inversion(
    loss: Callable[[jax.Array, jax.Array], jax.Array],
    optimizer: optax.GradientTransformation,
    *,
    low: float | jax.Array | None = None,
    high: float | jax.Array | None = None,
) -> Inversion:
    """The step of `invert`, for loops of one's own.

    On CPUs XLA takes gradients of convolutions several times slower inside a loop than outside:
    there jit the step and call it from Python.

    Args:
      loss: `loss(inputs, key) -> number`.
      optimizer: of the inputs.
      low: what inputs are held above, broadcastable to them; None: nothing.
      high: what inputs are held below.

    Returns:
      Two pure functions; the step raises a CompressError for a loss that is no scalar.

    References:
      As `invert`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> init, step = inversion(lambda x, key: jnp.sum(x**2), optax.sgd(0.25))
      >>> state, value = jax.jit(step)(init(jnp.array([4.0])), jax.random.key(0))
      >>> float(value), state.inputs.tolist()
      (16.0, [2.0])
    """

    def init(inputs: jax.Array) -> InversionState:
        inputs = jnp.clip(jnp.asarray(inputs, jnp.float32), low, high)
        return InversionState(inputs, optimizer.init(inputs))

    def step(state: InversionState, key: jax.Array) -> tuple[InversionState, jax.Array]:
        out: jax.ShapeDtypeStruct = jax.eval_shape(loss, state.inputs, key)
        if out.shape != ():
            raise CompressError(
                f"the loss has shape {out.shape}; return one number, such as its jnp.mean"
            )
        value, grad = jax.value_and_grad(loss)(state.inputs, key)
        updates, later = optimizer.update(grad, state.optimizer, state.inputs)
        inputs = optax.apply_updates(state.inputs, updates)
        return InversionState(jnp.clip(inputs, low, high), later), value

    return Inversion(init, step)


def invert(
    key: jax.Array,
    loss: Callable[[jax.Array, jax.Array], jax.Array],
    shape: tuple[int, ...],
    optimizer: optax.GradientTransformation,
    steps: int,
    *,
    start: jax.Array | None = None,
    low: float | jax.Array | None = None,
    high: float | jax.Array | None = None,
) -> Inverted:
    """Optimizes inputs from noise, by a scan over steps.

    DeepInversion is this with the loss `H(labels, logits) + a batch_norm_loss(...) + b
    total_variation(...) + c |x|**2`, and `competition` in its adaptive form. Wrapped in `jax.jit`
    as a function of the key it compiles once for many batches. See `inversion` for convolutions on
    CPUs.

    Args:
      key: for the start, and one of its own for each step.
      loss: `loss(inputs, key) -> number`, such as of jittered inputs.
      shape: of the inputs, the batch included.
      optimizer: of the inputs.
      steps: how many.
      start: inputs to begin with; None: standard normal noise.
      low: what inputs are held above after each step, broadcastable to them; None: nothing.
      high: what inputs are held below.

    Raises:
      CompressError: for a loss that is no scalar, a start of another shape, or steps that are no
        whole number.

    References:
      Yin et al., *Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion*, 2020.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> loss = lambda x, key: jnp.sum((x - 2.0) ** 2)
      >>> found = invert(jax.random.key(0), loss, (1, 3), optax.sgd(0.5), 3, high=1.5)
      >>> found.inputs.tolist(), found.losses.shape
      ([[1.5, 1.5, 1.5]], (3,))
    """
    if not is_count(steps, 0):
        raise CompressError(f"steps={steps!r}: write a whole number")
    begin, each = jax.random.split(key)
    x = jax.random.normal(begin, shape) if start is None else jnp.asarray(start, jnp.float32)
    if x.shape != tuple(shape):
        raise CompressError(f"a start {x.shape} for inputs of shape {tuple(shape)}")
    init, step = inversion(loss, optimizer, low=low, high=high)
    state, losses = jax.lax.scan(step, init(x), jax.random.split(each, steps))
    return Inverted(state.inputs, losses)
