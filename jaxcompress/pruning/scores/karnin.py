"""Scores by the way that a weight has gone in training."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcompress.errors import SpecError
from jaxcompress.gradients.weights import Weights, float32

_GATHERS = (
    "the optimizer gathers several steps into one update, which is not of the last gradient alone; "
    "write MultiSteps(track_karnin(tx), k), not track_karnin(MultiSteps(tx, k))"
)


class KarninState(NamedTuple):
    """The state of `track_karnin`.

    Attributes:
      inner: the state of the optimizer.
      start: the weights where training began.
      sums: `sum g dw` over the steps, float32.
    """

    inner: Any
    start: Any
    sums: Any


def track_karnin(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer and sums up `g dw` over the steps, for `karnin`.

    The updates are the optimizer's own. The state takes two arrays for each weight: its value
    at the start, and the sum in float32.

    Args:
      inner: any optimizer; `dw` is what it updates a weight by.

    Returns:
      The optimizer, whose `init` and `update` want the params.

    Raises:
      SpecError: around an optimizer that adds up gradients or updates over several steps, whose
        `dw` is not of the gradient that it meets: wrap the one inside, as in
        `optax.MultiSteps(track_karnin(tx), 2)`. At `init`, or at once for `optax.MultiSteps`.

    References:
      Karnin, *A Simple Procedure for Pruning Back-Propagation Trained Neural Networks*, 1990.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> tx, params = track_karnin(optax.sgd(0.5)), {"w": jnp.array([2.0, 3.0])}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.array([1.0, 2.0])}, state, params)
      >>> karnin(state, optax.apply_updates(params, updates))["w"].tolist()
      [-1.5, -4.0]
    """
    if isinstance(inner, optax.MultiSteps):
        raise SpecError(_GATHERS)
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> KarninState:
        sums = jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), jnp.float32), params)
        state = inner.init(params)
        gathers = lambda x: isinstance(x, (optax.MultiStepsState, optax.ApplyEvery))
        if any(map(gathers, jax.tree.leaves(state, is_leaf=gathers))):
            raise SpecError(_GATHERS)
        # A copy: the caller may donate its params to the first step.
        return KarninState(state, jax.tree.map(jnp.copy, params), sums)

    def update(grads: Any, state: KarninState, params: Any = None, **extra: Any) -> Any:
        updates, after = inner.update(grads, state.inner, params, **extra)
        sums = jax.tree.map(lambda s, g, u: s + float32(g) * float32(u), state.sums, grads, updates)
        return updates, KarninState(after, state.start, sums)

    return optax.GradientTransformationExtraArgs(init, update)


def karnin(state: Any, params: Any) -> Any:
    """`-sum g dw * w_f / (w_f - w_i)`: what the loss rises by when a weight goes, from its history.

    With w_i where training began and w_f where it ended, `-sum g dw` is by how much the loss fell
    on the way of this weight, which is scaled from that way to the one from zero. With plain
    gradient descent of rate eta it is the paper's `sum dw**2 w_f / (eta (w_f - w_i))`. A weight
    that came back to where it began has 0.

    Args:
      state: of `track_karnin`, or a larger state that holds one.
      params: the trained weights, dense.

    Returns:
      A score of each weight in the structure of `params`, float32, None for leaves that are not
      floating.

    Raises:
      SpecError: when there is no such state, or it is of another tree.

    References:
      Karnin, *A Simple Procedure for Pruning Back-Propagation Trained Neural Networks*, 1990.

    Examples:
      >>> import jax.numpy as jnp
      >>> start, sums = {"w": jnp.array([1.0])}, {"w": jnp.array([-0.5])}
      >>> karnin(KarninState((), start, sums), {"w": jnp.array([3.0])})["w"].tolist()
      [0.75]
    """
    is_one = lambda x: isinstance(x, KarninState)
    found = [x for x in jax.tree.leaves(state, is_leaf=is_one) if is_one(x)]
    if len(found) != 1:
        raise SpecError(
            f"the state holds {len(found)} of track_karnin and must hold one: wrap the optimizer "
            "as tx = track_karnin(tx)"
        )
    weights = Weights.of(params)
    try:
        start, sums = (weights.structure.flatten_up_to(x) for x in (found[0].start, found[0].sums))
    except ValueError as error:
        raise SpecError(f"the state is of another tree than the params: {error}") from None
    pairs = [(a, s) for a, s, c in zip(start, sums, weights.chosen) if c]

    def one(w: jax.Array, start: jax.Array, total: jax.Array) -> jax.Array:
        last, way = float32(w), float32(w) - float32(start)
        return jnp.where(way == 0, 0, -total * last / jnp.where(way == 0, 1, way))

    return weights.scores([one(w, *pair) for w, pair in zip(weights.values, pairs)])
