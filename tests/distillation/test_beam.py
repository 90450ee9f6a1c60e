"""Beam search against all sequences there are, and against a plain one; what is chosen of it."""

import collections
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.distillation.beam import Beams, beam_search, closest
from jaxcompress.distillation.bleu import sentence_bleu

WORDS, LENGTH, BATCH, END = 4, 4, 2, 0
RNG = np.random.default_rng(0)
FROM, EMBED, TO, PLACE = (
    RNG.normal(size=shape) * size
    for shape, size in (((5, 5), 1), ((WORDS, 5), 1), ((5, WORDS), 1.5), ((LENGTH, WORDS), 0.5))
)
PLACE[:-1, END] -= 3  # so that what is best is not short
STATE = {"hidden": RNG.normal(size=(BATCH, 5)), "place": 0}
START = np.array([1, 3])


def step(state, token, xp=jnp):
    """A recurrent model with a shared position."""
    hidden = xp.tanh(state["hidden"] @ FROM + xp.asarray(EMBED)[token])
    logits = hidden @ TO + xp.asarray(PLACE)[state["place"]]
    return logits, {"hidden": hidden, "place": state["place"] + 1}


def log_p(tokens, one):
    """Of a sequence of the batch's `one`, in float64."""
    state, total = {"hidden": STATE["hidden"][one], "place": 0}, 0.0
    for last, token in zip((START[one], *tokens), tokens):
        logits, state = step(state, last, np)
        total += logits[token] - np.log(np.sum(np.exp(logits)))
    return total


def sequences(end):
    """All that end, and all that are cut."""
    for n in range(1, LENGTH + 1):
        for tokens in itertools.product(range(WORDS), repeat=n):
            if end in tokens[:-1] or (n < LENGTH and tokens[-1] != end):
                continue
            yield tokens


def rank(one, end, alpha):
    scored = [(log_p(s, one) / ((5 + len(s)) / 6) ** alpha, s) for s in sequences(end)]
    return sorted(scored, reverse=True)


def plain_beam(one, end, alpha, beam):
    """With lists."""
    score = lambda s: log_p(s, one) / ((5 + len(s)) / 6) ** alpha
    kept = [()]
    for _ in range(LENGTH):
        grown = []
        for s in kept:
            done = end is not None and end in s
            grown += [s] if done else [(*s, token) for token in range(WORDS)]
        kept = sorted(grown, key=score, reverse=True)[:beam]
    return [(score(s), s) for s in kept]


def search(end, alpha, beam):
    state = {"hidden": jnp.asarray(STATE["hidden"], jnp.float32), "place": jnp.int32(0)}
    run = jax.jit(
        lambda state, start: beam_search(
            step, state, start, beam=beam, length=LENGTH, end=end, length_penalty=alpha
        )
    )
    return run(state, jnp.asarray(START))


def check(found, expected, end):
    fill = 0 if end is None else end
    for one in range(BATCH):
        scores, best = zip(*expected(one))
        padded = [s + (fill,) * (LENGTH - len(s)) for s in best]
        # Sums of four logarithms of about 3, known to a few eps of that.
        np.testing.assert_allclose(found.scores[one][: len(best)], scores, rtol=1e-5)
        np.testing.assert_array_equal(found.sequences[one][: len(best)], padded)


@pytest.mark.parametrize(("end", "alpha"), [(END, 0.0), (END, 1.0), (None, 0.0)])
def test_a_wide_beam_finds_the_best_of_all(end, alpha):
    found = search(end, alpha, WORDS**LENGTH)
    count = len(list(sequences(end)))
    check(found, lambda one: rank(one, end, alpha), end)
    assert np.all(found.scores[:, count:] == -np.inf)  # there are no more


@pytest.mark.parametrize(("alpha", "beam"), [(0.0, 1), (0.0, 3), (1.5, 3)])
def test_narrow_beams(alpha, beam):
    found = search(END, alpha, beam)
    check(found, lambda one: plain_beam(one, END, alpha, beam), END)
    if beam == 1:
        for one in range(BATCH):
            state, token, greedy = {"hidden": STATE["hidden"][one], "place": 0}, START[one], []
            while len(greedy) < LENGTH and END not in greedy:
                logits, state = step(state, token, np)
                token = int(np.argmax(logits))
                greedy.append(token)
            greedy += [END] * (LENGTH - len(greedy))
            np.testing.assert_array_equal(found.sequences[one, 0], greedy)


def test_forbidden_words_dtypes_and_gradients():
    def forbidding(state, token):
        logits, state = step(state, token)
        return logits.at[:, 2].set(-jnp.inf).astype(jnp.bfloat16), state

    state = {"hidden": jnp.asarray(STATE["hidden"], jnp.float32), "place": jnp.int32(0)}
    found = beam_search(forbidding, state, jnp.asarray(START), beam=5, length=3, end=END)
    real = np.asarray(found.scores) > -np.inf
    assert not np.any(np.asarray(found.sequences)[real] == 2)
    assert (found.scores.dtype, found.sequences.dtype) == (jnp.float32, jnp.int32)

    def loss(scale):
        scaled = lambda state, token: (step(state, token)[0] * scale, step(state, token)[1])
        found = beam_search(scaled, state, jnp.asarray(START), beam=2, length=3, end=END)
        return jnp.sum(found.scores * scale) - jnp.sum(jax.lax.stop_gradient(found.scores)) * scale

    assert jax.jit(jax.grad(loss))(1.0) == 0.0


def test_the_search_stops_when_all_have_ended():
    calls = []

    def ends(state, token):
        jax.debug.callback(calls.append, token[0])
        return jnp.where(jnp.arange(3) == 0, 50.0, -jnp.inf) * jnp.ones((len(token), 1)), state

    found = beam_search(ends, None, jnp.array([1]), beam=2, length=100, end=0)
    jax.effects_barrier()
    assert len(calls) == 1
    assert found.sequences.shape == (1, 2, 100)


def plain_bleu(candidate, reference, order=4):
    """With counters."""
    if not candidate:
        return 0.0
    total = 0.0
    for n in range(1, order + 1):
        a, b = (
            collections.Counter(tuple(x[i : i + n]) for i in range(len(x) - n + 1))
            for x in (candidate, reference)
        )
        matches, count = sum((a & b).values()), sum(a.values())
        if n > 1:
            matches, count = matches + 1, count + 1
        total += math.log(matches / count) if matches else -math.inf
    brevity = min(1.0, math.exp(1 - len(reference) / len(candidate)))
    return brevity * math.exp(total / order)


def test_sentence_bleu():
    rng, run = np.random.default_rng(1), jax.jit(functools.partial(sentence_bleu, end=END))
    for _ in range(60):
        texts = [list(rng.integers(1, 4, rng.integers(0, 9))) for _ in range(2)]
        if rng.random() < 0.3:
            texts[1] = [*texts[0][:-1], 9]
        padded = [jnp.asarray((x + [END] + [5] * 9)[:9]) for x in texts]  # what follows is ignored
        expected = plain_bleu(*texts)
        assert float(run(*padded)) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    # By hand: 5 of 6 words, then (3 + 1) / (5 + 1), (1 + 1) / (4 + 1), (0 + 1) / (3 + 1).
    a, b = jnp.array([1, 2, 3, 4, 1, 6]), jnp.array([1, 2, 3, 5, 1, 6])
    by_hand = (5 / 6 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25
    run = jax.jit(sentence_bleu)
    assert float(run(a, b)) == pytest.approx(by_hand, rel=1e-5)
    assert float(run(a[:2], b[:2])) == 1.0  # shorter than the longest n-grams
    assert float(run(a, b + 9)) == 0.0


def test_interpolation_takes_what_is_most_like_the_reference():
    found = search(END, 0.0, 6)
    references = np.array([[2, 1, 3, 3, 1], [1, 1, 0, 0, 0]])
    bleu = functools.partial(sentence_bleu, end=END)
    taken = jax.jit(functools.partial(closest, similarity=bleu))(found, jnp.asarray(references))
    cut = lambda x: list(itertools.takewhile(lambda t: t != END, np.asarray(x).tolist()))
    for one in range(BATCH):
        scores = [plain_bleu(cut(s), cut(references[one])) for s in found.sequences[one]]
        np.testing.assert_array_equal(taken[one], found.sequences[one][int(np.argmax(scores))])
    # What is no sequence is never taken, however similar.
    beams = Beams(jnp.array([[[1, 1], [2, 2]]]), jnp.array([[-1.0, -jnp.inf]]))
    equal = lambda a, b: jnp.mean(a == b)
    assert closest(beams, jnp.array([[2, 2]]), equal).tolist() == [[1, 1]]


def test_bad_input():
    state, start = {"hidden": jnp.zeros((2, 5)), "place": jnp.int32(0)}, jnp.asarray(START)
    with pytest.raises(jc.CompressError, match="beam=0"):
        beam_search(step, state, start, beam=0, length=3)
    with pytest.raises(jc.CompressError, match=r"start is int32 of the shape \(2, 1\)"):
        beam_search(step, state, start[:, None], beam=1, length=3)
    with pytest.raises(jc.CompressError, match="they must be alike"):
        beam_search(lambda s, t: (step(s, t)[0], None), state, start, beam=1, length=3)
    with pytest.raises(jc.CompressError, match=r"\[batch, vocabulary\] is due"):
        beam_search(lambda s, t: (step(s, t)[0][0], s), state, start, beam=1, length=3)
    beams = Beams(jnp.zeros((2, 3, 4), int), jnp.zeros((2, 3)))
    with pytest.raises(jc.CompressError, match=r"references \(3, 4\)"):
        closest(beams, jnp.zeros((3, 4), int), sentence_bleu)
    with pytest.raises(jc.CompressError, match="order=0"):
        sentence_bleu(start, start, order=0)


def test_a_beam_of_no_sequences() -> None:
    step = lambda state, token: (jnp.eye(3)[token], state)
    found = beam_search(step, None, jnp.zeros(0, int), beam=2, length=3, end=0)
    assert found.sequences.shape == (0, 2, 3)
    assert found.scores.shape == (0, 2)
