"""Several teachers, or several tasks: ensembles, switching, annealing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.distillation.arguments import fixed, log_p, positive, share, stacked
from jaxcompress.errors import CompressError


def teacher_ensemble(
    teachers: jax.Array | Sequence[jax.Array],
    weights: Any = None,
    *,
    average: str = "probabilities",
    temperature: float | jax.Array = 1.0,
    axis: int = -1,
) -> jax.Array:
    """One teacher of several: the logits of their mean.

    Of `probabilities`, logits z with `softmax(z / T) = sum_k w_k softmax(teacher_k / T)`, to be
    used at the same T; of `logits`, `sum_k w_k teacher_k`, a geometric mean of probabilities.

    Args:
      teachers: logits of K teachers, `[K, ..., classes]` or a list of `[..., classes]`. No gradient
        passes to them.
      weights: `[K]`, or `[K, ...]` for each example its own; at least 0, and divided by their sum.
        None: equal. A teacher of weight 0 does not count at all.
      average: `probabilities` or `logits`.
      temperature: T, positive; with `logits` it is of no account.
      axis: the axis of the classes of one teacher.

    Returns:
      float32, `[..., classes]`, for the place of the teacher in any loss.

    Raises:
      CompressError: for shapes that do not fit, weights that are negative or all 0, or another
        average.

    References:
      Hinton, Vinyals and Dean, *Distilling the Knowledge in a Neural Network*, 2015; You et al.,
      *Learning from Multiple Teacher Networks*, 2017.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> sure, not_sure = jnp.array([[50.0, 0.0]]), jnp.array([[0.0, 0.0]])
      >>> jax.nn.softmax(teacher_ensemble([sure, not_sure])).round(4).tolist()
      [[0.75, 0.25]]
    """
    logits = fixed(stacked(teachers, "teachers"))
    if average not in ("probabilities", "logits"):
        raise CompressError(f"average={average!r}: write 'probabilities' or 'logits'")
    axis = axis if axis < 0 else axis + 1
    w = _weights(weights, logits, axis)
    # A teacher that does not count may hold anything, as no weight of 0 takes NaN or infinity away.
    logits = jnp.where(w == 0, 0.0, logits)
    if average == "logits":
        return jnp.sum(jnp.where(w == 0, 0.0, w * logits), axis=0)
    temperature = positive("temperature", temperature, 2.0)
    parts = log_p(logits, temperature, axis) + jnp.log(w)
    return temperature * jax.nn.logsumexp(parts, axis=0)


def _weights(weights: Any, logits: jax.Array, axis: int) -> jax.Array:
    """Weights of teachers that add up to 1, broadcastable to the logits."""
    if weights is None:
        weights = jnp.ones(len(logits))
    w = fixed(jnp.asarray(weights))
    each = list(logits.shape)
    del each[axis]
    if w.shape not in ((len(logits),), tuple(each)):
        raise CompressError(
            f"weights {w.shape} of teachers {logits.shape}: write one for each teacher, "
            f"{(len(logits),)}, or one for each of its examples, {tuple(each)}"
        )
    if not isinstance(w, jax.core.Tracer):
        seen = np.asarray(w)
        if not np.all((seen >= 0) & (seen < np.inf)) or not np.all(np.sum(seen, 0) > 0):
            raise CompressError("weights of teachers are numbers of at least 0, and not all 0")
    w = w / jnp.sum(w, axis=0)
    if w.ndim == 1:
        return w.reshape(-1, *[1] * (logits.ndim - 1))
    return jnp.expand_dims(w, axis)


def switched_teacher(
    teachers: Sequence[Callable[..., Any]], probabilities: Sequence[float] | None = None
) -> Callable[..., Any]:
    """One teacher of several for each batch, drawn by a key; the others do not run.

    Over many batches the student learns from all, at the price of one.

    Args:
      teachers: functions of the same arguments that return arrays of the same shapes and dtypes.
      probabilities: of being drawn; None: equal.

    Returns:
      A function of a random key and the arguments of the teachers.

    Raises:
      CompressError: for no teachers, or probabilities that are not one for each, at least 0 and of
        the sum 1.

    References:
      Fukuda et al., *Efficient Knowledge Distillation from an Ensemble of Teachers*, 2017.

    Examples:
      >>> import jax
      >>> teacher = switched_teacher([lambda x: x, lambda x: -x], [0.0, 1.0])
      >>> float(teacher(jax.random.key(0), 3.0))
      -3.0
    """
    teachers = tuple(teachers)
    if not teachers:
        raise CompressError("teachers=[]: give at least one function")
    even = np.full(len(teachers), 1 / len(teachers))
    p = even if probabilities is None else np.asarray(probabilities)
    if p.shape != (len(teachers),) or not np.all(p >= 0) or not abs(p.sum() - 1) < 1e-6:
        raise CompressError(
            f"probabilities={probabilities!r} of {len(teachers)} teachers: write one for each, at "
            "least 0, which add up to 1"
        )

    def drawn(key: jax.Array, *args: Any) -> Any:
        index = jax.random.choice(key, len(teachers), p=jnp.asarray(p, jnp.float32))
        return jax.lax.switch(index, teachers, *args)

    return drawn


def annealed_targets(
    labels: jax.Array,
    teacher: jax.Array,
    progress: float | jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
) -> jax.Array:
    """Targets that go over from the teacher to the labels: teacher annealing.

    `progress * y + (1 - progress) * softmax(teacher / T)`, for `optax.softmax_cross_entropy`; with
    progress `optax.linear_schedule(0.0, 1.0, steps)` the student leaves its teacher in the end.

    Args:
      labels: `[...]`, integers; or probabilities of the teacher's shape.
      teacher: logits, `[..., classes]`. No gradient passes to them.
      progress: from 0, the teacher, to 1, the labels; may be traced.
      temperature: T, positive.

    Returns:
      Probabilities in float32, `[..., classes]`.

    Raises:
      CompressError: for shapes that do not fit, or numbers out of range.

    References:
      Clark et al., *BAM! Born-Again Multi-Task Networks for Natural Language Understanding*, 2019.

    Examples:
      >>> import jax.numpy as jnp
      >>> annealed_targets(jnp.array([0]), jnp.zeros((1, 2)), 0.5).tolist()
      [[0.75, 0.25]]
    """
    progress = share("progress", progress)
    temperature = positive("temperature", temperature, 2.0)
    if labels.shape == teacher.shape[:-1]:
        labels = jax.nn.one_hot(labels, teacher.shape[-1])
    elif labels.shape != teacher.shape:
        raise CompressError(
            f"labels {labels.shape} for a teacher {teacher.shape}: give integers "
            f"{teacher.shape[:-1]} or probabilities {teacher.shape}"
        )
    soft = jnp.exp(log_p(fixed(teacher), temperature))
    return progress * fixed(labels) + (1 - progress) * soft


def multi_task(
    losses: Mapping[str, jax.Array], weights: Mapping[str, float | jax.Array] | None = None
) -> jax.Array:
    """The weighted sum over tasks of the mean loss of each.

    Each task counts by its weight, however many of its examples are in the batch.

    Args:
      losses: of each task, one value per example; tasks may have different numbers of examples, and
        one without any adds nothing.
      weights: of each task; None: 1.

    Returns:
      One float32 number.

    Raises:
      CompressError: for weights of other tasks than the losses'.

    References:
      Clark et al., *BAM! Born-Again Multi-Task Networks for Natural Language Understanding*, 2019.

    Examples:
      >>> import jax.numpy as jnp
      >>> losses = {"topic": jnp.array([1.0, 3.0]), "tone": jnp.array([5.0])}
      >>> float(multi_task(losses, {"topic": 1.0, "tone": 0.5}))
      4.5
    """
    weights = dict.fromkeys(losses, 1.0) if weights is None else weights
    if losses.keys() != weights.keys():
        raise CompressError(
            f"losses of {sorted(losses)} and weights of {sorted(weights)}: write one for each task"
        )
    mean = lambda x: jnp.sum(x.astype(jnp.float32)) / max(1, x.size)
    terms = (weights[task] * mean(losses[task]) for task in losses)
    return sum(terms, jnp.zeros(()))
