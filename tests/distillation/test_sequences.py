"""Word by word: losses of tokens, samples, and what a student is taught on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jaxcompress as jc
from jaxcompress.distillation.divergences import jensen_shannon, reverse_kl
from jaxcompress.distillation.logits import soft_targets
from jaxcompress.distillation.on_policy import on_policy_tokens, sample_sequences
from jaxcompress.distillation.sequences import forced_logits, token_mask, word_level

WORDS = 5
MATRICES = [jax.random.normal(jax.random.key(n), (WORDS, WORDS)) for n in range(2)]


def step(state, token, matrices=MATRICES):
    """What comes next depends on all that came before."""
    embed, out = (jnp.asarray(m) for m in matrices)
    state = jnp.tanh(state @ embed + embed[token])
    return state @ out * 2, state


def logits(seed, shape=(3, 4, 6)):
    return jax.random.normal(jax.random.key(seed), shape) * 3


def test_word_level_by_loops():
    student, teacher = logits(0), logits(1)
    where = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    for loss in (soft_targets, reverse_kl, functools.partial(jensen_shannon, beta=0.2)):
        one = jax.jit(loss)
        for average in (True, False):
            expected = []
            for s, t, w in zip(student, teacher, where, strict=True):
                values = [float(one(a, b)) for a, b, c in zip(s, t, w, strict=True) if c]
                expected.append(sum(values) / (max(len(values), 1) if average else 1))
            found = word_level(student, teacher, loss=loss, where=where, average=average)
            np.testing.assert_allclose(found, expected, rtol=1e-5)
        whole = word_level(student, teacher, loss=loss)
        np.testing.assert_allclose(
            whole[0], float(np.mean(loss(student[0], teacher[0]))), rtol=1e-5
        )


def test_what_is_padded_does_not_matter():
    where = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).astype(bool)
    broken = [jnp.where(where[..., None], logits(n), jnp.nan) for n in (0, 1)]
    run = jax.jit(jax.value_and_grad(lambda s, t: word_level(s, t, where=where).sum()))
    value, grad = run(*broken)
    expected, plain = run(logits(0), logits(1))
    assert value == expected
    np.testing.assert_array_equal(grad, plain)
    assert not np.any(grad[~where])
    assert np.all(np.any(grad[where], axis=-1))
    assert not np.any(jax.grad(lambda t: word_level(logits(0), t).sum())(logits(1)))


def test_forced_logits_are_those_of_the_loop_and_differentiable():
    state, start = logits(2, (3, WORDS)), jnp.array([1, 0, 4])
    tokens = jax.random.randint(jax.random.key(0), (3, 6), 0, WORDS)
    found = jax.jit(functools.partial(forced_logits, step))(state, start, tokens)
    expected, last, at = [], start, state
    for t in range(6):
        one, at = step(at, last)
        expected.append(one)
        last = tokens[:, t]
    np.testing.assert_allclose(found, np.stack(expected, 1), rtol=1e-5, atol=1e-6)

    def loss(matrices):
        run = functools.partial(step, matrices=matrices)
        return word_level(forced_logits(run, state, start, tokens), found * 0.5).sum()

    check_grads(loss, (MATRICES,), order=1, modes=["rev"], rtol=2e-2)


def test_token_mask():
    tokens = jnp.array([[3, 0, 0, 5], [0, 1, 1, 1], [1, 2, 3, 4]])
    expected = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    np.testing.assert_array_equal(token_mask(tokens, 0), np.array(expected, bool))


def test_samples_have_the_probabilities_of_the_model():
    many, temperature = 20_000, 1.5
    state, start = jnp.broadcast_to(logits(3, (WORDS,)), (many, WORDS)), jnp.ones(many, int)
    run = jax.jit(
        functools.partial(sample_sequences, step, length=3, end=0), static_argnames="length"
    )
    found = np.asarray(run(state, start, jax.random.key(5), temperature=temperature))
    # Whatever follows an end is an end.
    ended = np.cumsum(found == 0, axis=1) > 0
    assert np.all(found[:, 1:][ended[:, :-1]] == 0)
    # Each two first tokens, with the probability that they have by the model in float64.
    soft = lambda z: np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    embed, out = (np.asarray(m, np.float64) for m in MATRICES)
    first = np.tanh(np.asarray(state[0], np.float64) @ embed + embed[1])
    p = soft(first @ out * 2 / temperature)
    for a in range(WORDS):
        after = soft(np.tanh(first @ embed + embed[a]) @ out * 2 / temperature)
        after = np.eye(WORDS)[0] if a == 0 else after
        for b in range(WORDS):
            share = np.mean((found[:, 0] == a) & (found[:, 1] == b))
            q = p[a] * after[b]
            # Within five standard deviations of the mean of that many draws.
            assert abs(share - q) <= 5 * np.sqrt(q * (1 - q) / many)
    np.testing.assert_array_equal(
        found, run(state, start, jax.random.key(5), temperature=temperature)
    )
    assert np.any(found != run(state, start, jax.random.key(6), temperature=temperature))


def test_no_gradient_passes_through_what_the_student_writes():
    state, start = logits(2, (3, WORDS)), jnp.array([1, 0, 4])
    data = jax.random.randint(jax.random.key(0), (3, 6), 0, WORDS)
    teacher = functools.partial(step, matrices=[m.T for m in MATRICES])

    def tokens(matrices, key, chosen=1.0):
        write = lambda key: sample_sequences(
            functools.partial(step, matrices=matrices), state, start, key, length=6, end=0
        )
        return on_policy_tokens(key, write, data, chosen=chosen)

    def loss(matrices, seen):
        forced = functools.partial(forced_logits, state=state, start=start, tokens=seen)
        student = forced(functools.partial(step, matrices=matrices))
        return word_level(student, forced(teacher), where=token_mask(seen, 0)).sum()

    key = jax.random.key(7)
    own = tokens(MATRICES, key)
    assert np.any(own != data)
    whole = jax.jit(jax.grad(lambda m: loss(m, tokens(m, key))))(MATRICES)
    apart = jax.jit(jax.grad(loss))(MATRICES, own)
    for a, b in zip(whole, apart, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert np.any(a)


def test_the_choice_between_own_sequences_and_data():
    data, write = jnp.ones((2, 3), jnp.uint8), lambda key: jnp.zeros((2, 3), jnp.int32)
    run = jax.jit(
        jax.vmap(lambda key, p: on_policy_tokens(key, write, data, chosen=p), in_axes=(0, None))
    )
    keys = jax.random.split(jax.random.key(0), 2000)
    found = np.asarray(run(keys, 0.3))
    assert found.dtype == np.uint8
    assert np.all(found == found[:, :1, :1])  # of one step, all or none
    # Four standard deviations of 2000 coins.
    assert abs(np.mean(found[:, 0, 0] == 0) - 0.3) < 4 * np.sqrt(0.21 / 2000)
    assert np.all(run(keys, 0.0) == 1)
    assert np.all(run(keys, 1.0) == 0)


def test_bad_input():
    state, start, key = logits(2, (3, WORDS)), jnp.array([1, 0, 4]), jax.random.key(0)
    with pytest.raises(jc.CompressError, match="no axis of tokens"):
        word_level(jnp.ones(4), jnp.ones(4))
    with pytest.raises(jc.CompressError, match=r"the loss gives \(\) for logits \(3, 4, 6\)"):
        word_level(logits(0), logits(1), loss=lambda s, t: jnp.sum(s * t))
    with pytest.raises(jc.CompressError, match=r"tokens \(2, 6\)"):
        forced_logits(step, state, start, jnp.zeros((2, 6), int))
    with pytest.raises(jc.CompressError, match="length=0"):
        sample_sequences(step, state, start, key, length=0)
    with pytest.raises(jc.CompressError, match="positive number"):
        sample_sequences(step, state, start, key, length=2, temperature=0.0)
    with pytest.raises(jc.CompressError, match="start is float32"):
        sample_sequences(step, state, start.astype(float), key, length=2)
    with pytest.raises(jc.CompressError, match=r"samples \(3, 2\) and data \(3, 6\)"):
        on_policy_tokens(key, lambda k: jnp.zeros((3, 2), int), jnp.zeros((3, 6), int), chosen=0.5)
    with pytest.raises(jc.CompressError, match="chosen=-1"):
        on_policy_tokens(key, lambda k: start[None], start[None], chosen=-1.0)


def test_sequences_without_tokens():
    np.testing.assert_array_equal(word_level(jnp.ones((2, 0, 3)), jnp.ones((2, 0, 3))), np.zeros(2))


class _Bare:
    """A node of a pytree without an equality of its own."""

    def __init__(self, inside: jax.Array) -> None:
        self.inside = inside


jax.tree_util.register_pytree_node(
    _Bare, lambda node: ((node.inside,), None), lambda _, inside: _Bare(*inside)
)


def test_states_are_compared_by_their_leaves() -> None:
    step = lambda state, token: (jnp.eye(3)[token], _Bare(state.inside + 1))
    start, tokens = np.array([0, 1]), jnp.array([[1], [2]])
    logits = forced_logits(step, _Bare(jnp.zeros(2)), start, tokens)
    np.testing.assert_array_equal(logits[:, 0], jnp.eye(3)[:2])
    other = lambda state, token: (jnp.eye(3)[token], _Bare(state.inside.astype(int)))
    with pytest.raises(jc.CompressError, match="alike"):
        forced_logits(other, _Bare(jnp.zeros(2)), start, tokens)


def test_a_mask_of_other_tokens_is_told() -> None:
    with pytest.raises(jc.CompressError, match="tokens are"):
        word_level(jnp.ones((2, 3, 4)), jnp.ones((2, 3, 4)), where=jnp.ones((2, 5)))
