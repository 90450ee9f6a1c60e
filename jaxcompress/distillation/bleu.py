"""How similar a sequence is to a reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcompress.distillation.sequences import token_mask
from jaxcompress.errors import CompressError


def sentence_bleu(
    candidate: jax.Array, reference: jax.Array, *, end: int | None = None, order: int = 4
) -> jax.Array:
    """BLEU of one sentence, smoothed: the geometric mean of the precisions of its n-grams.

    `min(1, exp(1 - r / c)) (prod_n m_n / l_n)**(1 / order)`, where c and r are the lengths, l_n is
    the number of n-grams of the candidate and m_n how many of them the reference has, each counted
    as often as it is there. For n above 1, both are one more than counted, so that a sentence
    without a common 4-gram is not zero.

    Args:
      candidate: tokens `[length]`.
      reference: tokens `[length of its own]`.
      end: the token that ends both, which does not count, nor do those after it; None: all count.
      order: the longest n-grams.

    Returns:
      A float32 number from 0 to 1; 0 for a candidate without tokens.

    Raises:
      CompressError: for more axes than one, or an order below 1.

    References:
      Papineni et al., *BLEU: a Method for Automatic Evaluation of Machine Translation*, 2002; Lin
      and Och, *ORANGE: a Method for Evaluating Automatic Evaluation Metrics for Machine
      Translation*, 2004 (the smoothing).

    Examples:
      >>> import jax.numpy as jnp
      >>> float(sentence_bleu(jnp.array([1, 2, 3, 4]), jnp.array([1, 2, 3, 4])))
      1.0
    """
    if candidate.ndim != 1 or reference.ndim != 1 or order < 1:
        raise CompressError(
            f"candidate {candidate.shape}, reference {reference.shape} and order={order}: write "
            "two arrays of tokens and at least 1"
        )
    sizes = [
        jnp.asarray(x.shape[0] if end is None else jnp.sum(token_mask(x, end) & (x != end)))
        for x in (candidate, reference)
    ]
    c, r = (size.astype(jnp.float32) for size in sizes)
    logs = jnp.zeros(())
    for n in range(1, order + 1):
        matches = _matches(candidate, reference, sizes[0], sizes[1], n)
        more = 0.0 if n == 1 else 1.0
        # Where no token matches, the logarithm of zero makes the whole zero.
        logs += jnp.log(matches + more) - jnp.log(jnp.maximum(c - n + 1, 0) + more)
    brevity = jnp.minimum(0.0, 1 - r / jnp.maximum(c, 1))
    return jnp.where(c > 0, jnp.exp(brevity + logs / order), 0.0)


def _matches(a: jax.Array, b: jax.Array, a_size: jax.Array, b_size: jax.Array, n: int) -> jax.Array:
    """How many n-grams of a are in b, each at most as often as it is there."""
    if min(a.shape[0], b.shape[0]) < n:
        return jnp.zeros(())
    grams = lambda x: jnp.stack([x[i : x.shape[0] - n + 1 + i] for i in range(n)], axis=1)
    a, b = grams(a), grams(b)
    of_a, of_b = (jnp.arange(len(x)) <= size - n for x, size in ((a, a_size), (b, b_size)))
    count = lambda x, real: jnp.sum(jnp.all(a[:, None] == x[None], axis=-1) & real, axis=1)
    there, here = count(b, of_b), count(a, of_a)
    # Each n-gram of a is met as often as it is here, so that its count is shared out.
    return jnp.sum(jnp.where(of_a, jnp.minimum(there, here) / jnp.maximum(here, 1), 0.0))
