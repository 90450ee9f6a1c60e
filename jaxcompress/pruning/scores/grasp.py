"""Scores by the flow of the gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax

from jaxcompress.errors import SpecError
from jaxcompress.gradients.batches import (
    gradient,
    hashable,
    mean_over_batches,
    replayed,
)
from jaxcompress.gradients.weights import Weights, float32


def grasp(
    loss_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    temperature: float | None = None,
) -> Any:
    """`w (H g)`: half the fall, to first order, of the squared gradient norm when w goes.

    g and H are the gradient and the Hessian of the mean loss. Removing w changes `|g|**2` by `-2 w
    (H g)`, so what goes first are the weights whose removal raises the flow of the gradient most.
    The paper's score is `-w (H g)`, whose largest are removed by its authors' program; here the
    least important has the lowest score, as everywhere, so the sign is turned.

    Args:
      loss_fn: as `snip`. With a temperature it is called with it as a keyword, `loss_fn(params,
        *batch, temperature=T)`, and divides its logits by it.
      params: a tree of dense arrays, before training.
      batches: as `snip`; gone through twice, so an iterator is held in memory.
      temperature: the authors take 200, so that the softmax of an untrained net is no matter.

    Returns:
      As `snip`, with a sign.

    Raises:
      SpecError: for a temperature that is not positive, and as `snip`.

    References:
      Wang, Zhang and Grosse, *Picking Winning Tickets Before Training by Preserving Gradient Flow*,
      2020.

    Examples:
      >>> import jax.numpy as jnp
      >>> loss_fn = lambda params, a: jnp.sum(a * params["w"] ** 2) / 2
      >>> grasp(loss_fn, {"w": jnp.array([1.0, -2.0])}, [jnp.array([3.0, 1.0])])["w"].tolist()
      [9.0, 4.0]
    """
    loss_fn = hashable(loss_fn)
    if temperature is not None:
        if not temperature > 0:
            raise SpecError(f"temperature={temperature!r}: write a positive number, such as 200.0")
        loss_fn = _At(loss_fn, float(temperature))
    weights, batches = Weights.of(params), replayed(batches)
    means = mean_over_batches(gradient, loss_fn, weights, batches)
    flow = mean_over_batches(_hessian_times, loss_fn, weights, batches, means)
    return weights.scores([float32(w) * x for w, x in zip(weights.values, flow)])


@dataclasses.dataclass(frozen=True)
class _At:
    """A loss at a temperature; equal ones are equal, so that no call compiles it again."""

    loss_fn: Callable[..., Any]
    temperature: float

    def __call__(self, *args: Any) -> Any:
        return self.loss_fn(*args, temperature=self.temperature)


def _hessian_times(
    loss: Callable[..., jax.Array], weights: Weights, args: tuple[Any, ...], extra: Any
) -> list[jax.Array]:
    values = weights.values
    along = [v.astype(x.dtype) for v, x in zip(extra[0], values)]
    grad = lambda values: jax.grad(loss)(values, *args)
    return [float32(x) for x in jax.jvp(grad, (values,), (along,))[1]]
