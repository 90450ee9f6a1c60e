"""`proximal`: an optimizer whose steps end on the proximal operator of a penalty."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcompress.errors import SpecError
from jaxcompress.pruning.checks import check_strength
from jaxcompress.pruning.penalties import Penalty, wide
from jaxcompress.pruning.wrapper import ends_an_update


class ProximalState(NamedTuple):
    """The state of `proximal`.

    Attributes:
      step: updates so far, int32; of `optax.MultiSteps` only the real ones.
      inner: the state of the wrapped optimizer.
    """

    step: jax.Array
    inner: Any


def proximal(
    inner: optax.GradientTransformation,
    penalty: Penalty,
    learning_rate: float | jax.Array | Callable[[jax.Array], Any],
) -> optax.GradientTransformationExtraArgs:
    """Applies the prox of a penalty after each update of `inner`; what it takes away is zero.

    With `u = inner(g)` and `rate` the learning rate,

        update = prox_{rate * penalty}(w + u) - w

    so that `optax.apply_updates` lands on the prox, exactly 0 where that is 0. With `optax.sgd` of
    the same rate this is proximal gradient descent on loss + penalty. After an adaptive
    optimizer the prox stays the Euclidean one at the plain rate, decoupled from the gradient's
    scale as the decay of AdamW is; it is then not descent on that sum, but its zeros are as exact.

    It must be the outermost link, as `sparsify`: a transformation after it would move the zeros. In
    `proximal(optax.MultiSteps(...), ...)` it acts at the end of an accumulation only, and a
    schedule counts those.

    Args:
      inner: the optimizer.
      penalty: `l1`, `group_lasso`, `sparse_group_lasso` or `growl`.
      learning_rate: what the strength is multiplied by: that of the optimizer, a float, a scalar
        array or a schedule. To change it between steps, write
        `optax.inject_hyperparams(proximal, static_args=("inner", "penalty"))`.

    Returns:
      An optax transformation; its `update` needs the params.

    Raises:
      RuleError: from `init`, for a rule that matches nothing, or a pattern without groups.
      SpecError: for what is no penalty or has no prox, a learning rate that is no number of at
        least 0 (where it is concrete), and from `update` without params.

    References:
      Parikh and Boyd, *Proximal Algorithms*, 2014.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from jaxcompress.pruning.penalties import l1
      >>> params = {"kernel": jnp.array([0.5, -2.0])}
      >>> tx = proximal(optax.sgd(0.5), l1(2.0, {"kernel": "unstructured"}), 0.5)
      >>> updates, _ = tx.update({"kernel": jnp.zeros(2)}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["kernel"].tolist()
      [0.0, -1.0]
    """
    if not isinstance(penalty, Penalty) or type(penalty).prox is Penalty.prox:
        raise SpecError(
            f"{penalty!r} has no proximal step: write one of l1, group_lasso, sparse_group_lasso "
            "and growl, or add the penalty to the loss"
        )
    if not callable(learning_rate):
        learning_rate = _rate(learning_rate)
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> ProximalState:
        penalty.sites(params)
        return ProximalState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(
        updates: Any, state: ProximalState, params: Any = None, **extra: Any
    ) -> tuple[Any, ProximalState]:
        if params is None:
            raise SpecError("proximal needs the params: write tx.update(grads, state, params)")
        steps, inner_state = inner.update(updates, state.inner, params, **extra)
        done = ends_an_update(state.inner, inner_state)
        rate = learning_rate(state.step) if callable(learning_rate) else learning_rate
        rate = jnp.asarray(rate, jnp.float32) * done
        flat: tuple[list[Any], Any] = jax.tree.flatten(params)
        weights, structure = flat
        moves = structure.flatten_up_to(steps)
        for site in penalty.sites(params):
            w, move = wide(weights[site.place]), moves[site.place]
            move = jnp.zeros_like(w) if move is None else move
            to = penalty.prox(site, w + move, rate.astype(w.dtype))
            # Within an accumulation nothing moves, not by a rounding either.
            moves[site.place] = jnp.where(done > 0, to - w, move)
        return jax.tree.unflatten(structure, moves), ProximalState(state.step + done, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _rate(x: Any) -> Any:
    """A number or a scalar array of numbers; what is traced is known by its type alone."""
    if not isinstance(x, (jax.Array, np.ndarray)):
        return check_strength("learning_rate", x, 0.1)
    if (
        x.shape
        or not jnp.issubdtype(x.dtype, jnp.number)
        or jnp.issubdtype(x.dtype, jnp.complexfloating)
    ):
        raise SpecError(
            f"learning_rate: an array of {x.dtype} and shape {tuple(x.shape)} is no rate; write a "
            "number or a scalar array of at least 0, such as 0.1"
        )
    return x if isinstance(x, jax.core.Tracer) else check_strength("learning_rate", x.item(), 0.1)
