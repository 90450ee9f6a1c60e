"""Distillation of models that write one token after the other: word by word.

Such a model is a pure function `step(state, token) -> (logits, state)`: from a state of what came
before, a pytree whose arrays have the sequences along their first axis, and the last token of each,
`[batch]`, to logits of the next, `[batch, vocabulary]`. Leaves of the state without axes, such as
the position in a cache, are shared by all sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.distillation.arguments import counted, mean_of, pair
from jaxcompress.distillation.logits import soft_targets
from jaxcompress.errors import CompressError

Step = Callable[[Any, jax.Array], tuple[jax.Array, Any]]


def vocabulary(step: Step, state: Any, token: jax.Array) -> int:
    """How many tokens a step knows.

    Raises:
      CompressError: for tokens that are no integers `[batch]`, logits that are not
        `[batch, vocabulary]`, or a state that comes out otherwise than it went in.
    """
    if token.ndim != 1 or not jnp.issubdtype(token.dtype, jnp.integer):
        raise CompressError(
            f"start is {token.dtype} of the shape {token.shape}: write integers of shape [batch]"
        )
    logits, after = jax.eval_shape(step, state, token)
    if logits.ndim != 2 or logits.shape[0] != token.shape[0]:
        raise CompressError(
            f"step gives logits {logits.shape} for tokens {token.shape}: [batch, vocabulary] is due"
        )
    kinds = lambda tree: jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", tree)
    # By their leaves: what a state is made of may have no equality of its own.
    if jax.tree.flatten(kinds(state)) != jax.tree.flatten(kinds(after)):
        raise CompressError(
            f"step takes the state {kinds(state)} and gives {kinds(after)}; they must be alike"
        )
    return int(logits.shape[1])


def forced_logits(step: Step, state: Any, start: jax.Array, tokens: jax.Array) -> jax.Array:
    """The logits of each token of given sequences, where each follows the given ones before it.

    It is one scan, differentiable. A transformer does the same for all places at once in its
    ordinary forward pass, which is faster.

    Args:
      step: `step(state, token) -> (logits, state)`; see `beam_search`.
      state: what it begins with.
      start: the token before the first, integers `[batch]`.
      tokens: the sequences, integers `[batch, length]`.

    Returns:
      Logits `[batch, length, vocabulary]`.

    Raises:
      CompressError: for shapes that do not fit, or a state that comes out otherwise than it went
        in.

    Examples:
      >>> import jax.numpy as jnp
      >>> table = jnp.array([[0.0, 2.0], [1.0, 0.0]])  # logits of what follows 0, and 1
      >>> step = lambda state, token: (table[token], state)
      >>> forced_logits(step, None, jnp.array([0]), jnp.array([[1, 1]])).tolist()
      [[[0.0, 2.0], [1.0, 0.0]]]
    """
    start = jnp.asarray(start)
    vocabulary(step, state, start)
    if tokens.ndim != 2 or tokens.shape[0] != start.shape[0]:
        raise CompressError(f"tokens {tokens.shape} are not [batch, length] for {start.shape}")
    inputs = jnp.concatenate([start[None], tokens.T.astype(start.dtype)])[:-1]

    def advance(state: Any, token: jax.Array) -> tuple[Any, jax.Array]:
        logits, state = step(state, token)
        return state, logits

    return jnp.moveaxis(jax.lax.scan(advance, state, inputs)[1], 0, 1)


def token_mask(tokens: jax.Array, end: int) -> jax.Array:
    """True for the tokens up to the first `end`, which counts too.

    Args:
      tokens: integers `[..., length]`.
      end: the token that ends a sequence.

    Examples:
      >>> import jax.numpy as jnp
      >>> token_mask(jnp.array([[4, 0, 0], [4, 5, 6]]), end=0).tolist()
      [[True, True, False], [True, True, True]]
    """
    ended = jnp.cumsum(tokens == end, axis=-1)
    return ended - (tokens == end) == 0


def word_level(
    student: jax.Array,
    teacher: jax.Array,
    *,
    loss: Callable[[jax.Array, jax.Array], jax.Array] = soft_targets,
    where: jax.Array | None = None,
    average: bool = True,
) -> jax.Array:
    """Word-level distillation: a loss of each token's logits, over the tokens of a sequence.

    `sum_t w_t loss(student_t, teacher_t)`, over `sum_t w_t` if it is an average, where w is 1 for
    tokens that count. Both models saw the same tokens before each: those of the data, of the
    teacher (`beam_search`), or of the student itself (`on_policy_tokens`).

    Args:
      student: logits `[..., length, vocabulary]`.
      teacher: logits of the same shape. No gradient passes to them.
      loss: of two arrays of logits, one value for each token; set its options with
        `functools.partial`.
      where: which tokens count, broadcastable to `[..., length]`, as from `token_mask`; None: all.
        What the logits of the others are does not matter, and they have no gradient.
      average: whether the sum is divided by the number of tokens that count.

    Returns:
      One float32 value per sequence, `[...]`; 0 where no token counts.

    Raises:
      CompressError: for shapes that differ, logits without an axis of tokens, or a loss that does
        not give one value for each token.

    References:
      Kim and Rush, *Sequence-Level Knowledge Distillation*, 2016.

    Examples:
      >>> import functools
      >>> import jax.numpy as jnp
      >>> from jaxcompress.distillation.divergences import jensen_shannon
      >>> loss = functools.partial(jensen_shannon, beta=0.9)
      >>> word_level(jnp.ones((2, 7, 50)), jnp.ones((2, 7, 50)), loss=loss).shape
      (2,)
    """
    student, teacher = pair(student, teacher, "logits")
    if student.ndim < 2:
        raise CompressError(f"logits {student.shape} have no axis of tokens before the last")
    where = counted(where, student.shape[:-1], "tokens")
    if where is not None:
        student, teacher = (jnp.where(where[..., None], x, 0.0) for x in (student, teacher))
    values = loss(student, teacher)
    if values.shape != student.shape[:-1]:
        raise CompressError(
            f"the loss gives {values.shape} for logits {student.shape}: one value for each token, "
            f"{student.shape[:-1]}, is due"
        )
    batch_ndim = values.ndim - 1
    if average:
        return mean_of(values, batch_ndim, jnp.asarray(True) if where is None else where)
    return jnp.sum(values, axis=-1, where=where)
