"""What a teacher would write: beam search, and the choice of one of the beam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.distillation.sequences import Step, vocabulary
from jaxcompress.errors import CompressError


class Beams(NamedTuple):
    """What `beam_search` finds, the best first.

    Attributes:
      sequences: tokens `[batch, beam, length]`, filled with `end` after an end.
      scores: logarithms of probabilities `[batch, beam]`, float32, over the penalty of the length;
        minus infinity where there are fewer sequences than the beam is wide.
    """

    sequences: jax.Array
    scores: jax.Array


class _Search(NamedTuple):
    """All beams after t tokens; leaves `[batch, beam, ...]`, but for t and the model's state."""

    t: jax.Array
    state: Any
    token: jax.Array
    total: jax.Array
    score: jax.Array
    length: jax.Array
    ended: jax.Array
    sequences: jax.Array


def beam_search(
    step: Step,
    state: Any,
    start: jax.Array,
    *,
    beam: int,
    length: int,
    end: int | None = None,
    length_penalty: float | jax.Array = 0.0,
) -> Beams:
    """The most probable sequences of a model, as far as a beam finds them.

    After each token the `beam` best sequences are kept, ended or not, by
    `log p / ((5 + n) / 6)**length_penalty` of those with n tokens, an end included. With a beam as
    wide as there are sequences the result is exact; with a beam of 1 it is the greedy sequence. For
    sequence-level distillation the student learns the best sequence of the teacher as if it were
    data: by the cross entropy of its `forced_logits`, where `token_mask` holds.

    Args:
      step: `step(state, token) -> (logits, state)`, pure: from the last tokens `[batch]` to logits
        `[batch, vocabulary]` of the next. It is called with `batch * beam` sequences.
      state: what it begins with, after a prompt or an encoder if there is one: a pytree whose
        arrays have the batch along their first axis; leaves without axes, such as a position, are
        shared.
      start: the token before the first, integers `[batch]`.
      beam: how many sequences are kept, at least 1.
      length: the most tokens of a sequence; one that has not ended by then is cut.
      end: the token that ends a sequence; None: all have the full length.
      length_penalty: the exponent; 0: none, which favours short sequences.

    Returns:
      The sequences and their scores, the best first. The search is jitted as part of what calls it,
      stops when all beams have ended, and passes no gradient.

    Raises:
      CompressError: for a beam or a length below 1, shapes that do not fit, or a state that comes
        out otherwise than it went in.

    References:
      Kim and Rush, *Sequence-Level Knowledge Distillation*, 2016; Wu et al., *Google's Neural
      Machine Translation System*, 2016 (the penalty).

    Examples:
      >>> import jax.numpy as jnp
      >>> table = jnp.log(jnp.array([[1.0, 0.0, 0.0], [0.1, 0.3, 0.6], [0.7, 0.2, 0.1]]))
      >>> step = lambda state, token: (table[token], state)
      >>> found = beam_search(step, None, jnp.array([1]), beam=2, length=4, end=0)
      >>> found.sequences[0].tolist(), [f"{p:.3f}" for p in jnp.exp(found.scores[0])]
      ([[2, 0, 0, 0], [1, 2, 0, 0]], ['0.420', '0.126'])
    """
    start = jnp.asarray(start)
    words = vocabulary(step, state, start)
    if beam < 1 or length < 1:
        raise CompressError(f"beam={beam}, length={length}: both are at least 1")
    batch = start.shape[0]
    wide = lambda x: x if jnp.ndim(x) == 0 else jnp.repeat(jnp.asarray(x), beam, axis=0)
    first = jnp.broadcast_to(jnp.where(jnp.arange(beam) == 0, 0.0, -jnp.inf), (batch, beam))
    none = jnp.zeros((batch, beam), jnp.int32)
    begin = _Search(
        t=jnp.zeros((), jnp.int32),
        state=jax.tree.map(wide, state),
        token=jnp.broadcast_to(start[:, None], (batch, beam)),
        total=first,
        score=first,
        length=none,
        ended=none.astype(bool),
        sequences=jnp.full((batch, beam, length), 0 if end is None else end, jnp.int32),
    )

    def advance(at: _Search) -> _Search:
        logits, state = jax.lax.stop_gradient(step(at.state, at.token.reshape(-1)))
        logs = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(batch, beam, words)
        if end is not None:
            stay = jnp.where(jnp.arange(words) == end, 0.0, -jnp.inf)
            logs = jnp.where(at.ended[..., None], stay, logs)
        count = at.length + ~at.ended
        totals = at.total[..., None] + logs
        scores = totals / (((5.0 + count) / 6.0) ** length_penalty)[..., None]
        score, index = jax.lax.top_k(scores.reshape(batch, beam * words), beam)
        parent, token = index // words, (index % words).astype(start.dtype)
        pick = lambda x: jnp.take_along_axis(x, parent, axis=1)
        rows = (jnp.arange(batch)[:, None] * beam + parent).reshape(-1)
        sequences = jnp.take_along_axis(at.sequences, parent[..., None], axis=1)
        return _Search(
            t=at.t + 1,
            state=jax.tree.map(lambda x: x if x.ndim == 0 else x[rows], state),
            token=token,
            total=jnp.take_along_axis(totals.reshape(batch, beam * words), index, axis=1),
            score=score,
            length=pick(count),
            ended=at.ended if end is None else pick(at.ended) | (token == end),
            sequences=sequences.at[:, :, at.t].set(token.astype(jnp.int32)),
        )

    def goes_on(at: _Search) -> jax.Array:
        return (at.t < length) & jnp.any(~at.ended & (at.total > -jnp.inf))

    found = jax.lax.while_loop(goes_on, advance, jax.lax.stop_gradient(begin))
    return Beams(found.sequences, found.score)


def closest(
    beams: Beams,
    references: jax.Array,
    similarity: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Sequence-level interpolation: of each beam, the sequence most similar to the reference.

    Of equally similar ones it is the most probable. The student then learns what the teacher might
    have written, as near as it comes to the data.

    Args:
      beams: from `beam_search`.
      references: the data, tokens `[batch, length of their own]`.
      similarity: of a candidate `[length]` and its reference, one number; such as
        `functools.partial(sentence_bleu, end=end)`.

    Returns:
      Tokens `[batch, length]`.

    Raises:
      CompressError: for references that are not one for each beam.

    References:
      Kim and Rush, *Sequence-Level Knowledge Distillation*, 2016.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxcompress.distillation.bleu import sentence_bleu
      >>> beams = Beams(jnp.array([[[1, 2, 3], [1, 2, 4]]]), jnp.array([[-1.0, -2.0]]))
      >>> closest(beams, jnp.array([[2, 4, 5]]), sentence_bleu).tolist()
      [[1, 2, 4]]
    """
    if references.ndim != 2 or len(references) != len(beams.sequences):
        raise CompressError(
            f"references {references.shape} are not [batch, length] for the beams "
            f"{beams.sequences.shape}"
        )
    among = jax.vmap(similarity, in_axes=(0, None))
    scores = jax.vmap(among)(beams.sequences, references)
    best = jnp.argmax(jnp.where(beams.scores > -jnp.inf, scores, -jnp.inf), axis=1)
    return jnp.take_along_axis(beams.sequences, best[:, None, None], axis=1)[:, 0]
