"""A teacher of few bytes: the largest logits, and codes of few bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.distillation.logits import soft_targets
from jaxcompress.distillation.stored_logits import TopLogits, top_k_logits, top_k_soft_targets


def logits(seed, shape=(6, 10), size=3.0):
    return jax.random.normal(jax.random.key(seed), shape) * size


@jax.jit
def both(student, teacher):
    """The values, and the gradient of their sum."""
    values, pull = jax.vjp(lambda s: top_k_soft_targets(s, teacher), student)
    return values, pull(jnp.ones_like(values))[0]


def definition(student, teacher, k, t):
    """By loops: k classes and the rest, in float64."""
    found = []
    for s, z in zip(*(np.asarray(x, np.float64) / t for x in (student, teacher)), strict=True):
        q, p = (np.exp(x) / np.exp(x).sum() for x in (s, z))
        top = np.argsort(-p)[:k]
        total = sum(p[i] * np.log(p[i] / q[i]) for i in top)
        p_rest, q_rest = 1 - p[top].sum(), 1 - q[top].sum()
        found.append(t**2 * (total + p_rest * np.log(p_rest / q_rest)))
    return np.array(found)


@pytest.mark.parametrize("t", [1.0, 4.0])
def test_values_gradients_and_the_bound(t):
    student, teacher = logits(0), logits(1)
    whole = soft_targets(student, teacher, temperature=t)
    before = np.zeros(6)
    for k in (1, 3, 8, 10):
        values, grad = both(student, top_k_logits(teacher, k, temperature=t))
        if k < 10:
            np.testing.assert_allclose(values, definition(student, teacher, k, t), rtol=2e-5)
        # The more classes stand alone, the more is told apart.
        assert np.all(values >= before - 1e-6)
        before = values
    np.testing.assert_allclose(before, whole, rtol=1e-5)
    p, q = (jax.nn.softmax(x / t) for x in (teacher, student))
    np.testing.assert_allclose(grad, t * (q - p), rtol=1e-4, atol=2e-6)
    # Equal, where the rest is shared out as the teacher does.
    top = top_k_logits(teacher, 3, temperature=t)
    alike = teacher.at[jnp.arange(6)[:, None], top.indices].set(0.5)
    np.testing.assert_allclose(
        top_k_soft_targets(alike, top), soft_targets(alike, teacher, temperature=t), rtol=1e-4
    )


def test_a_pytree_of_few_bytes():
    teacher = logits(2, (5, 4, 300))
    top = jax.jit(lambda x: top_k_logits(x, 8, temperature=2.0, dtype="float16"))(teacher)
    assert isinstance(top, TopLogits)
    assert (top.values.dtype, top.indices.dtype, top.rest.dtype) == ("float16", "uint16", "float16")
    assert top_k_logits(logits(0), 2).indices.dtype == "uint8"
    assert sum(x.nbytes for x in jax.tree.leaves(top)) == 20 * (8 * 2 + 8 * 2 + 2)
    np.testing.assert_array_equal(
        top.indices, np.argsort(-np.asarray(teacher), kind="stable")[..., :8]
    )
    # A batch is taken as from any pytree, and it maps.
    some = jax.tree.map(lambda x: x[jnp.array([3, 1])], top)
    student = logits(3, (2, 4, 300))
    values = top_k_soft_targets(student, some)
    np.testing.assert_allclose(jax.vmap(top_k_soft_targets)(student, some), values, rtol=1e-5)
    # What was stored is rounded, and no longer sums to 1: it counts as it is after division by that.
    kept = [np.asarray(x, np.float64) for x in (some.values, some.rest[..., None])]
    p = np.exp(np.concatenate(kept, axis=-1))
    p /= p.sum(-1, keepdims=True)
    q = np.asarray(jax.nn.softmax(student / 2), np.float64)
    q_top = np.take_along_axis(q, np.asarray(some.indices, int), axis=-1)
    q = np.concatenate([q_top, 1 - q_top.sum(-1, keepdims=True)], axis=-1)
    np.testing.assert_allclose(values, 4 * np.sum(p * np.log(p / q), axis=-1), rtol=3e-5)


def test_certain_teachers():
    certain = jnp.full((6, 10), -jnp.inf).at[:, 2].set(0.0)
    for k in (1, 3, 10):
        top = top_k_logits(certain, k)
        values, grad = both(logits(0), top)
        np.testing.assert_allclose(values, -jax.nn.log_softmax(logits(0))[:, 2], rtol=1e-5)
        assert np.all(np.isfinite(grad))
    grad = jax.grad(lambda t: top_k_soft_targets(logits(0), top_k_logits(t, 3)).sum())(logits(1))
    assert not np.any(grad)


def test_codes_of_eight_bits_with_a_scale_per_example():
    student, teacher = logits(0, (6, 100)), logits(1, (6, 100))
    stored = jc.Quantize("int8", axis=-1)(teacher)
    assert stored.nbytes == 6 * (100 + 2)
    loss = jc.compressed(lambda s, t: soft_targets(s, t, temperature=2.0))
    values = jax.jit(loss)(student, stored)
    grad = jax.jit(jax.grad(lambda s, t: loss(s, t).sum()))(student, stored)
    plain = lambda t: soft_targets(student, t, temperature=2.0)
    np.testing.assert_allclose(values, plain(stored.materialize()), rtol=1e-6)
    # Logits are off by half a step e; log p by e, and the gap to the student's too. With
    # p' = p exp(r), |r| <= e: |sum p' g' - p g| <= (exp(e) - 1) sum p |g| + exp(e) e.
    error = np.asarray(jnp.max(jnp.abs(stored.materialize() - teacher), -1), np.float64) / 2
    r = np.expm1(2 * error)
    p, gap = jax.nn.softmax(teacher / 2), jax.nn.log_softmax(teacher / 2)
    gap -= jax.nn.log_softmax(student / 2)
    bound = 4 * (r * np.sum(p * np.abs(gap), -1) + (1 + r) * 2 * error)
    assert np.all(np.abs(values - plain(teacher)) <= bound)
    assert np.all(error < 0.05)  # or the bound would say nothing
    batch = jnp.array([4, 1])
    some = jc.compressed(lambda s, t: soft_targets(s[batch], t[batch], temperature=2.0))
    np.testing.assert_allclose(some(student, stored), values[batch], rtol=1e-6)
    assert np.all(np.isfinite(grad))


def test_bad_input():
    for k in (0, 11):
        with pytest.raises(jc.CompressError, match=rf"k={k} of logits \(6, 10\)"):
            top_k_logits(logits(0), k)
    with pytest.raises(jc.CompressError, match="temperature is traced"):
        jax.jit(lambda t: top_k_logits(logits(0), 2, temperature=t))(2.0)
    with pytest.raises(jc.CompressError, match="positive number"):
        top_k_logits(logits(0), 2, temperature=0.0)
    with pytest.raises(jc.CompressError, match=r"\(5, 10\) and \(6,\) stored examples"):
        top_k_soft_targets(logits(0)[:5], top_k_logits(logits(1), 2))
    with pytest.raises(jc.CompressError, match="student has 8 classes and the stored teacher 10"):
        jax.jit(top_k_soft_targets)(logits(0)[:, :8], top_k_logits(logits(1), 2))


def test_classes_that_the_student_has_alone_are_of_the_rest():
    student, top = logits(0), top_k_logits(logits(1), 3)
    more = jnp.concatenate([student, jnp.full((6, 2), -jnp.inf)], axis=-1)
    np.testing.assert_allclose(
        top_k_soft_targets(more, top), top_k_soft_targets(student, top), rtol=1e-6
    )
    full = jnp.concatenate([student, student[:, :2]], axis=-1)
    q = jax.nn.log_softmax(full)
    q_top = jnp.take_along_axis(q, top.indices.astype(int), axis=-1)
    q_rest = np.log1p(-np.exp(np.asarray(q_top, np.float64)).sum(-1))
    p_top, p_rest = np.exp(np.asarray(top.values)), np.exp(np.asarray(top.rest))
    expected = (p_top * (top.values - q_top)).sum(-1) + p_rest * (top.rest - q_rest)
    np.testing.assert_allclose(top_k_soft_targets(full, top), expected, rtol=1e-4, atol=1e-6)
