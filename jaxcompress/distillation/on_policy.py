"""What the student writes itself, as what it is taught on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.distillation.arguments import positive, share
from jaxcompress.distillation.sequences import Step, vocabulary
from jaxcompress.errors import CompressError


def sample_sequences(
    step: Step,
    state: Any,
    start: jax.Array,
    key: jax.Array,
    *,
    length: int,
    temperature: float | jax.Array = 1.0,
    end: int | None = None,
) -> jax.Array:
    """Sequences drawn from a model, each token from `softmax(logits / T)`.

    Args:
      step: `step(state, token) -> (logits, state)`; see `beam_search`.
      state: what it begins with.
      start: the token before the first, integers `[batch]`.
      key: a random key.
      length: the most tokens of a sequence.
      temperature: T, positive; may be traced.
      end: the token that ends a sequence; None: all have the full length.

    Returns:
      Tokens `[batch, length]`, int32, filled with `end` after an end. No gradient passes through
      the sampling, which stops when all have ended.

    Raises:
      CompressError: for a length below 1, a temperature that is no positive number, shapes that do
        not fit, or a state that comes out otherwise than it went in.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> table = jnp.array([[0.0, 99.0], [99.0, 0.0]])
      >>> step = lambda state, token: (table[token], state)
      >>> sample_sequences(step, None, jnp.array([0]), jax.random.key(0), length=4).tolist()
      [[1, 0, 1, 0]]
    """
    start = jnp.asarray(start)
    vocabulary(step, state, start)
    if length < 1:
        raise CompressError(f"length={length}: write at least 1")
    temperature = positive("temperature", temperature, 1.0)
    batch = start.shape[0]
    tokens = jnp.full((batch, length), 0 if end is None else end, jnp.int32)

    def advance(at: tuple[Any, ...]) -> tuple[Any, ...]:
        t, state, token, ended, tokens = at
        logits, state = jax.lax.stop_gradient(step(state, token))
        scaled = logits.astype(jnp.float32) / temperature
        token = jax.random.categorical(jax.random.fold_in(key, t), scaled).astype(start.dtype)
        if end is not None:
            token = jnp.where(ended, end, token)
            ended |= token == end
        return t + 1, state, token, ended, tokens.at[:, t].set(token.astype(jnp.int32))

    goes_on = lambda at: (at[0] < length) & ~jnp.all(at[3])
    begin = (jnp.zeros((), jnp.int32), state, start, jnp.zeros(batch, bool), tokens)
    return jax.lax.while_loop(goes_on, advance, jax.lax.stop_gradient(begin))[-1]


def on_policy_tokens(
    key: jax.Array,
    sample: Callable[[jax.Array], jax.Array],
    data: jax.Array,
    *,
    chosen: float | jax.Array,
) -> jax.Array:
    """The tokens of a step of generalized distillation: the student's own, or the data's.

    With the probability `chosen` (lambda in the paper) the whole batch is what the student writes,
    else it is the data; what is not needed is not computed. The loss of the step is then
    `word_level` of both models' logits on these tokens, with a divergence of the user's choice: 1
    is on-policy distillation, 0 supervised. So the student learns from its own mistakes, which data
    do not hold.

    Args:
      key: a random key.
      sample: from a key to tokens of the shape of the data, such as `sample_sequences` of the
        student's present params.
      data: tokens `[batch, length]`.
      chosen: from 0 to 1; may be traced.

    Returns:
      Tokens of the shape and dtype of the data.

    Raises:
      CompressError: for samples that are not of the data's shape, or a probability outside of 0
        to 1.

    References:
      Agarwal et al., *On-Policy Distillation of Language Models: Learning from Self-Generated
      Mistakes*, 2024 (GKD).

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> data, write = jnp.ones((2, 3), int), lambda key: jnp.zeros((2, 3), int)
      >>> on_policy_tokens(jax.random.key(0), write, data, chosen=1.0).tolist()
      [[0, 0, 0], [0, 0, 0]]
    """
    chosen = share("chosen", chosen)
    coin, own = jax.random.split(key)
    shape = jax.eval_shape(sample, own).shape
    if shape != data.shape:
        raise CompressError(f"samples {shape} and data {data.shape} differ in shape")
    tokens = lambda key: jax.lax.stop_gradient(sample(key)).astype(data.dtype)
    return jax.lax.cond(jax.random.bernoulli(coin, chosen), tokens, lambda _: data, own)
