"""Mean teachers: the exponential average of the student's params, beside the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcompress.distillation.arguments import share
from jaxcompress.errors import CompressError
from jaxcompress.specs import is_number


class EmaTeacherState(NamedTuple):
    """What `ema_teacher` remembers.

    Attributes:
      step: how many updates there were, int32.
      teacher: the average, in float32 or wider; what is no floating array is the newest.
    """

    step: jax.Array
    teacher: Any


def ema_teacher(
    decay: float | jax.Array | Callable[[jax.Array], Any] = 0.999, *, ramp: bool = True
) -> optax.GradientTransformation:
    """Averages the params that an optimizer makes, and leaves its updates as they are.

    `teacher <- d teacher + (1 - d) (params + updates)`, from the params at the beginning on. It is
    the last of an `optax.chain`, so that it sees the updates that are applied; `optax.ema` averages
    the updates themselves. The average is taken in float32, since a small share of a small step
    would be lost in bfloat16. Batch statistics are no params: average them with
    `optax.incremental_update`.

    Trees with compressed leaves: initialize it with what `jaxcompress.partition` says is trained.

    Args:
      decay: d, from 0 to 1; or a schedule, a function of the count of updates before this one.
      ramp: `d_t = min(d, 1 - 1 / (t + 1))` in update t = 1, 2, ...: the plain mean of all params
        so far, for as long as that forgets faster than d does.

    Returns:
      A transformation whose `update` needs the params; `mean_teacher` takes the teacher out.

    Raises:
      CompressError: for a decay outside of 0 to 1; by `update`, for no params.

    References:
      Tarvainen and Valpola, *Mean Teachers Are Better Role Models: Weight-Averaged Consistency
      Targets Improve Semi-Supervised Deep Learning Results*, 2017.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> params = {"w": jnp.array([0.0])}
      >>> tx = optax.chain(optax.sgd(1.0), ema_teacher(0.9, ramp=False))
      >>> updates, state = tx.update({"w": jnp.array([-1.0])}, tx.init(params), params)
      >>> round(float(mean_teacher(state, params)["w"][0]), 6)
      0.1
    """
    if isinstance(decay, jax.Array):  # such as optax.inject_hyperparams gives it, traced or not
        decay = share("decay", decay)
    elif not callable(decay) and not is_number(decay, 0, 1):
        raise CompressError(f"decay={decay!r}: write a share from 0 to 1, such as 0.999")

    def init(params: Any) -> EmaTeacherState:
        return EmaTeacherState(jnp.zeros((), jnp.int32), jax.tree.map(_wide, params))

    def update(updates: Any, state: EmaTeacherState, params: Any = None) -> Any:
        if params is None:
            raise CompressError(
                "ema_teacher averages params: write tx.update(grads, state, params)"
            )
        count = optax.safe_increment(state.step)
        d = jnp.asarray(decay(state.step) if callable(decay) else decay, jnp.float32)
        if ramp:
            d = jnp.minimum(d, 1 - 1 / (count + 1))
        # As they land, rounded to the dtype of the params.
        landed = optax.apply_updates(params, updates)
        average = lambda old, new: old + (1 - d) * (new - old) if _is_float(new) else new
        teacher = jax.tree.map(average, state.teacher, jax.tree.map(_wide, landed))
        return updates, EmaTeacherState(count, teacher)

    return optax.GradientTransformation(init, update)


def mean_teacher(state: Any, params: Any) -> Any:
    """The teacher in the state of an optimizer, in the dtypes of the params.

    Args:
      state: of an optimizer with one `ema_teacher`, however deep in it.
      params: a tree of the structure that the optimizer was initialized with.

    Raises:
      CompressError: for a state with no `ema_teacher` or several, or params of another structure.

    References:
      As `ema_teacher`.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> params = {"w": jnp.ones(2, jnp.bfloat16)}
      >>> state = optax.chain(optax.adam(1e-3), ema_teacher()).init(params)
      >>> mean_teacher(state, params)["w"].dtype
      dtype(bfloat16)
    """
    ours = lambda x: isinstance(x, EmaTeacherState)
    found = [x for x in jax.tree.leaves(state, is_leaf=ours) if ours(x)]
    if len(found) != 1:
        raise CompressError(
            f"the state has {len(found)} mean teachers; give that of one "
            "optax.chain(..., ema_teacher())"
        )
    wanted: Any = jax.tree.structure(params)
    if wanted != jax.tree.structure(found[0].teacher):
        raise CompressError(
            "the params are of another structure than the mean teacher: give the part that the "
            "optimizer trains, as jaxcompress.partition does"
        )
    # A copy, as the state is donated to the next step.
    return jax.tree.map(lambda t, p: jnp.array(t, jnp.result_type(p)), found[0].teacher, params)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _wide(x: Any) -> jax.Array:
    """A copy in float32 or wider, so that neither is gone when the other is donated."""
    dtype = jnp.promote_types(jnp.result_type(x), jnp.float32) if _is_float(x) else None
    return jnp.array(x, dtype)
