"""Dataset distillation: a few synthetic examples from which a network learns in a few steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.errors import CompressError
from jaxcompress.specs import is_count

Loss = Callable[[Any, Any], jax.Array]


def train_on_distilled(
    loss: Loss,
    params: Any,
    synthetic: Any,
    rates: jax.Array | float,
    *,
    epochs: int = 1,
    remat: bool = False,
) -> Any:
    """Gradient descent through the synthetic batches, one step on each.

    `params <- params - rate_k grad loss(params, batch_k)`.

    Args:
      loss: `loss(params, batch) -> number`.
      params: a tree of floating arrays, such as the trainable part of `jaxcompress.partition`.
      synthetic: a tree of arrays with a leading axis of steps, the batch of each step.
      rates: the size of each step: a number, `[steps]` or `[epochs, steps]`.
      epochs: how many times it goes through all batches.
      remat: compute the steps anew in the backward pass, which then keeps only the params of each.

    Returns:
      The params after the last step.

    Raises:
      CompressError: for batches with different numbers of steps, or rates of another shape.

    References:
      Wang et al., *Dataset Distillation*, 2018.

    Examples:
      >>> import jax.numpy as jnp
      >>> loss = lambda w, x: 0.5 * jnp.sum((w - x) ** 2)
      >>> float(train_on_distilled(loss, jnp.float32(0.0), jnp.array([4.0, 8.0]), 0.5))
      5.0
    """
    steps = {jnp.shape(x)[:1] for x in jax.tree.leaves(synthetic)}
    if len(steps) != 1 or () in steps:
        raise CompressError(
            f"synthetic batches of {sorted(steps)} steps; give each array one leading axis of steps"
        )
    if not is_count(epochs, 1):
        raise CompressError(f"epochs={epochs!r}: write a whole number from 1 on")
    shape = (epochs, *steps.pop())
    given = jnp.asarray(rates, jnp.float32)
    if given.shape not in ((), shape[1:], shape):
        raise CompressError(f"rates {given.shape}: write a number, {shape[1:]} or {shape}")

    def step(params: Any, now: tuple[Any, jax.Array]) -> tuple[Any, None]:
        batch, rate = now
        grads = jax.grad(loss)(params, batch)
        return jax.tree.map(lambda p, g: p - rate.astype(p.dtype) * g, params, grads), None

    body = jax.checkpoint(step) if remat else step
    through = lambda params, rates: jax.lax.scan(body, params, (synthetic, rates))
    return jax.lax.scan(through, params, jnp.broadcast_to(given, shape))[0]


def dataset_distillation(
    loss: Loss,
    params: Any,
    synthetic: Any,
    rates: jax.Array | float,
    real: Any,
    *,
    epochs: int = 1,
    remat: bool = False,
) -> jax.Array:
    """The loss on real data after training on the synthetic data alone.

    Its gradient in `synthetic` and `rates`, through the steps of the training, is what makes the
    synthetic data. For data that serve any initialization, average it over params that are drawn
    anew in each step (`jax.vmap`).

    Args:
      loss: `loss(params, batch) -> number`.
      params: where the training begins, floating arrays.
      synthetic: a tree of arrays with a leading axis of steps; what is not to be learned, such as
        integer labels, is no argument of the gradient: close over it.
      rates: the size of each step: a number, `[steps]` or `[epochs, steps]`.
      real: a batch of real data.
      epochs: how many times it goes through all batches.
      remat: see `train_on_distilled`.

    Returns:
      The loss, a scalar.

    Raises:
      CompressError: as `train_on_distilled`.

    References:
      Wang et al., *Dataset Distillation*, 2018.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> loss = lambda w, x: 0.5 * jnp.sum((w - x) ** 2)
      >>> meta = lambda x: dataset_distillation(loss, jnp.float32(0.0), x, 0.5, 3.0)
      >>> jax.grad(meta)(jnp.array([4.0, 8.0])).tolist()  # (5 - 3) dw/dx
      [0.5, 1.0]
    """
    trained = train_on_distilled(loss, params, synthetic, rates, epochs=epochs, remat=remat)
    return loss(trained, real)
