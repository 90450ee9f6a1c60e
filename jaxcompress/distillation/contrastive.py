"""Contrastive representation distillation, with a memory bank as explicit state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.distillation.arguments import positive
from jaxcompress.distillation.geometry import product, unit
from jaxcompress.distillation.maps import examples as flat_examples
from jaxcompress.distillation.regressors import regressor, regressor_init
from jaxcompress.errors import CompressError

Params = dict[str, dict[str, jax.Array]]
Bank = dict[str, jax.Array]


def crd_init(
    key: jax.Array,
    student_channels: int,
    teacher_channels: int,
    examples: int,
    *,
    dim: int = 128,
) -> tuple[Params, Bank]:
    """The embeddings of `crd`, which are trained with the student, and its memory bank.

    Args:
      key: a random key.
      student_channels: how many features the student has for an example.
      teacher_channels: how many the teacher has.
      examples: how many examples the training data have.
      dim: how many numbers an embedding has.

    Returns:
      `params`, linear maps for `student` and `teacher`; and `bank`, with an embedding of length 1
      for each example, `[examples, dim]`, of `student` and `teacher`, random at first, and the
      logarithms of the two normalising constants, which the first batch sets.

    Raises:
      CompressError: for sizes that are not positive.

    References:
      Tian, Krishnan and Isola, *Contrastive Representation Distillation*, 2020.

    Examples:
      >>> import jax
      >>> params, bank = crd_init(jax.random.key(0), 8, 16, examples=100, dim=4)
      >>> bank["student"].shape, params["teacher"]["kernel"].shape
      ((100, 4), (16, 4))
    """
    if examples < 2:
        raise CompressError(f"examples={examples}: write how many the data have, at least 2")
    keys = jax.random.split(key, 4)
    params = {
        "student": regressor_init(keys[0], student_channels, dim),
        "teacher": regressor_init(keys[1], teacher_channels, dim),
    }
    bank = {
        "student": unit(jax.random.normal(keys[2], (examples, dim), jnp.float32)),
        "teacher": unit(jax.random.normal(keys[3], (examples, dim), jnp.float32)),
        "log_z": jnp.zeros(2, jnp.float32),
        "started": jnp.zeros((), bool),
    }
    return params, bank


def crd_negatives(
    key: jax.Array,
    indices: jax.Array,
    count: int,
    examples: int,
    *,
    labels: jax.Array | None = None,
) -> jax.Array:
    """Random examples to set against those of a batch, drawn with replacement.

    Args:
      key: a random key.
      indices: which examples the batch has, `[batch]`.
      count: how many to draw for each.
      examples: how many examples there are.
      labels: the class of each example, `[examples]`: none is drawn of an example's own class.
        None: any but the example itself.

    Returns:
      Indices, `[batch, count]`. Of an example whose class has all examples, any of them.

    Raises:
      CompressError: for labels of another shape.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> drawn = crd_negatives(jax.random.key(0), jnp.array([0, 2]), 50, 3)
      >>> [sorted(set(row)) for row in drawn.tolist()]
      [[1, 2], [0, 1]]
    """
    indices = jnp.asarray(indices)
    if labels is None:
        order, first, own = None, indices, jnp.ones_like(indices)
    else:
        if jnp.shape(labels) != (examples,):
            raise CompressError(
                f"labels have the shape {jnp.shape(labels)}: write one for each of {examples} "
                "examples"
            )
        labels = jnp.asarray(labels)
        order = jnp.argsort(labels)
        ends = [
            jnp.searchsorted(labels[order], labels[indices], side=side)
            for side in ("left", "right")
        ]
        first, own = ends[0], ends[1] - ends[0]
    # Drawn among the others, and those that come after one's own moved behind it.
    others = jnp.maximum(examples - own, 1)[:, None]
    drawn = jax.random.randint(key, (indices.size, count), 0, others)
    drawn = drawn + jnp.where(drawn >= first[:, None], own[:, None], 0)
    drawn = drawn % examples
    return drawn if order is None else order[drawn]


def crd(
    params: Params,
    bank: Bank,
    student: jax.Array,
    teacher: jax.Array,
    indices: jax.Array,
    negatives: jax.Array,
    *,
    temperature: float | jax.Array = 0.07,
    momentum: float = 0.5,
    where: jax.Array | None = None,
) -> tuple[jax.Array, Bank]:
    """Noise-contrastive estimation of which of the teacher's examples a student's is.

    With unit embeddings s of a student's example and t of the teacher's, and the bank's of the same
    example (positive) and of K others (negatives), `-log h(+) - sum_k log(1 - h(k))` with
    `h = p / (p + K / n)` and `p = exp(<s, t> / T) / Z`, of n examples in the bank: once with s and
    the teacher's bank, once with t and the student's, added up. Each Z is n times the mean of
    `exp(<s, t> / T)` over the first batch, and stays. Computed from logarithms throughout. The mean
    over the examples is the paper's loss.

    Args:
      params: the embeddings, from `crd_init`; trained with the student, the teacher's too.
      bank: the memory, from `crd_init` or the call before. No gradient passes to it.
      student: features, `[batch, ...]`, flattened.
      teacher: features, `[batch, ...]`, flattened. No gradient passes to them.
      indices: which example of the bank each is, `[batch]`, none twice.
      negatives: for each, others to tell it from, `[batch, K]`, as from `crd_negatives`.
      temperature: T, positive; may be traced.
      momentum: the share of the old embedding in the new one, from 0 to below 1.
      where: `[batch]`, which examples count; None: all. The others' values are zero, and the bank
        keeps what it has of them.

    Returns:
      One float32 value per example, `[batch]`, and the new bank, in which the batch's embeddings
      are `momentum * old + (1 - momentum) * new`, brought to length 1.

    Raises:
      CompressError: for batches that differ, a mask or indices of another shape, indices outside of
        the bank, a temperature that is no positive number, or a momentum out of range.

    References:
      Tian, Krishnan and Isola, *Contrastive Representation Distillation*, 2020.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> params, bank = crd_init(jax.random.key(0), 8, 16, examples=100, dim=4)
      >>> indices = jnp.array([7, 3])
      >>> negatives = crd_negatives(jax.random.key(1), indices, 10, 100)
      >>> student, teacher = jnp.ones((2, 8)), jnp.ones((2, 16))
      >>> loss, bank = jax.jit(crd)(params, bank, student, teacher, indices, negatives)
      >>> loss.shape, bool(bank["started"])
      ((2,), True)
    """
    temperature = positive("temperature", temperature, 0.07)
    if not 0 <= momentum < 1:
        raise CompressError(f"momentum={momentum}: write a share from 0 to below 1, such as 0.5")
    student, teacher, where = flat_examples(student, teacher, where)
    bank = jax.tree.map(jnp.asarray, bank)
    rows = _rows(bank, indices, negatives, where.size)
    ours, theirs = (
        unit(regressor(params[name], x).astype(jnp.float32))
        for name, x in (("student", student), ("teacher", teacher))
    )
    new: dict[str, Any] = {"started": bank["started"] | jnp.any(where)}
    losses, log_z = jnp.zeros(where.size), []
    for side, (anchor, other) in enumerate(((ours, "teacher"), (theirs, "student"))):
        scores = _scores(anchor, jax.lax.stop_gradient(bank[other]), rows) / temperature
        first = jnp.where(bank["started"], bank["log_z"][side], _log_z(scores, where, bank[other]))
        log_z.append(jax.lax.stop_gradient(first))
        losses += _contrast(scores - log_z[-1], bank[other].shape[0])
    new["log_z"] = jnp.stack(log_z)
    # An index out of range is dropped.
    at = jnp.where(where, rows[:, 0], bank["student"].shape[0])
    for name, x in (("student", ours), ("teacher", theirs)):
        moved = momentum * bank[name][rows[:, 0]] + (1 - momentum) * x
        new[name] = bank[name].at[at].set(unit(jax.lax.stop_gradient(moved)), mode="drop")
    return jnp.where(where, losses, 0.0), new


def _rows(bank: Bank, indices: jax.Array, negatives: jax.Array, batch: int) -> jax.Array:
    """Which of the bank each example is set against, its own first: `[batch, 1 + K]`."""
    if jnp.shape(indices) != (batch,) or jnp.shape(negatives)[:-1] != (batch,):
        raise CompressError(
            f"indices {jnp.shape(indices)} and negatives {jnp.shape(negatives)} for a batch of "
            f"{batch}: write [batch] and [batch, count]"
        )
    if not jnp.shape(negatives)[-1]:
        raise CompressError("negatives have no examples: write at least one for each")
    n = bank["student"].shape[0]
    for name, x in (("indices", indices), ("negatives", negatives)):
        if not isinstance(x, jax.core.Tracer) and np.any(
            (np.asarray(x) < 0) | (np.asarray(x) >= n)
        ):
            raise CompressError(f"{name} go outside of the bank, which has 0 to {n - 1}")
    return jnp.concatenate([jnp.asarray(indices)[:, None], jnp.asarray(negatives)], axis=1)


def _scores(anchor: jax.Array, memory: jax.Array, rows: jax.Array) -> jax.Array:
    """The products of each embedding with its rows of the memory, `[batch, 1 + K]`."""
    if memory.shape[0] <= rows.shape[1] * memory.shape[1]:
        # The products with all are a smaller array than the rows that are looked up.
        return jnp.take_along_axis(product("bd,nd->bn", anchor, memory), rows, axis=1)
    return product("bd,bkd->bk", anchor, memory[rows])


def _log_z(scores: jax.Array, where: jax.Array, memory: jax.Array) -> jax.Array:
    """The logarithm of n times the mean of the exponentials; zero if no example counts."""
    count = jnp.sum(where) * scores.shape[1]
    total = jax.nn.logsumexp(scores, where=jnp.broadcast_to(where[:, None], scores.shape))
    mean = jnp.where(count > 0, total, 0.0) - jnp.log(jnp.maximum(count, 1))
    return mean + np.log(memory.shape[0])


def _contrast(log_p: jax.Array, n: int) -> jax.Array:
    """`-log h(+) - sum_k log(1 - h(k))`, of the positive first."""
    logits = log_p - np.log((log_p.shape[1] - 1) / n)
    others = jnp.sum(jax.nn.log_sigmoid(-logits[:, 1:]), axis=1)
    return -jax.nn.log_sigmoid(logits[:, 0]) - others
