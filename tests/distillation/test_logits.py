"""Soft targets against torch, a closed form, its limits, and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.distillation import soft_targets


def logits(seed, shape=(6, 10), size=3.0):
    return jax.random.normal(jax.random.key(seed), shape) * size


def reference(student, teacher, t):
    """In float64, by the definition."""
    student, teacher = (np.asarray(x, np.float64) / t for x in (student, teacher))
    log = lambda x: (
        x
        - np.log(np.sum(np.exp(x - x.max(-1, keepdims=True)), -1, keepdims=True))
        - (x.max(-1, keepdims=True))
    )
    p = np.exp(log(teacher))
    return t**2 * np.sum(p * (log(teacher) - log(student)), -1)


@pytest.mark.parametrize("t", [0.1, 1.0, 4.0, 100.0, 1000.0])
def test_values_and_gradients(t):
    student, teacher = logits(0), logits(1)
    found = jax.jit(soft_targets)(student, teacher, temperature=t)
    # Each term is d**2 / 2 for small d = log q - log p, which is known to about 2 eps: so to a
    # share of 4 eps / d, where d is about 4 / T.
    np.testing.assert_allclose(
        found, reference(student, teacher, t), rtol=1e-5 + 4 * 2**-23 * t, atol=1e-6
    )
    grad = jax.grad(lambda s: jnp.sum(soft_targets(s, teacher, temperature=t)))(student)
    soft = lambda x: np.exp(np.asarray(x, np.float64) / t)
    p, q = (soft(x) / soft(x).sum(-1, keepdims=True) for x in (teacher, student))
    np.testing.assert_allclose(grad, t * (q - p), rtol=1e-4, atol=3e-7 * max(t, 1))


def test_against_torch():
    torch = pytest.importorskip("torch")
    student, teacher = logits(2), logits(3)
    s = torch.tensor(np.asarray(student), requires_grad=True)
    p = torch.softmax(torch.tensor(np.asarray(teacher)) / 4, -1)
    loss = (
        torch.nn.functional.kl_div(torch.log_softmax(s / 4, -1), p, reduction="none").sum(-1) * 16
    )
    np.testing.assert_allclose(
        soft_targets(student, teacher, temperature=4.0), loss.detach().numpy(), rtol=1e-5
    )
    loss.sum().backward()
    grad = jax.grad(lambda x: soft_targets(x, teacher, temperature=4.0).sum())(student)
    np.testing.assert_allclose(grad, s.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_its_limit_is_the_squared_difference_of_logits():
    student, teacher = logits(4, size=1.0), logits(5, size=1.0)
    gap = (student - student.mean(-1, keepdims=True)) - (teacher - teacher.mean(-1, keepdims=True))
    limit = np.sum(np.square(gap), -1) / (2 * 10)
    found = reference(student, teacher, 1e4)
    np.testing.assert_allclose(found, limit, rtol=1e-3)
    np.testing.assert_allclose(soft_targets(student, teacher, temperature=50.0), limit, rtol=0.1)


def test_certain_teachers_masked_classes_and_narrow_dtypes():
    certain = jnp.array([[0.0, -jnp.inf, -jnp.inf], [1e30, 0.0, -1e30]])
    student = jnp.array([[0.5, 0.1, -jnp.inf], [1.0, 0.0, 2.0]])
    loss, grad = jax.value_and_grad(lambda s: soft_targets(s, certain).sum())(student)
    expected = -jax.nn.log_softmax(student)[jnp.arange(2), 0].sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert np.all(np.isfinite(grad))
    narrow = soft_targets(logits(0).astype(jnp.bfloat16), logits(1).astype(jnp.bfloat16))
    assert narrow.dtype == jnp.float32
    wide = soft_targets(*(logits(n).astype(jnp.bfloat16).astype(jnp.float32) for n in (0, 1)))
    np.testing.assert_array_equal(narrow, wide)
    where = jnp.arange(10) < 7
    np.testing.assert_allclose(
        soft_targets(logits(0), logits(1), where=where),
        soft_targets(logits(0)[:, :7], logits(1)[:, :7]), rtol=1e-5,
    )  # fmt: skip
    moved = soft_targets(logits(0).T, logits(1).T, axis=0)
    np.testing.assert_allclose(moved, soft_targets(logits(0), logits(1)), rtol=1e-5)


def test_no_gradient_reaches_the_teacher_and_itself_costs_nothing():
    student = logits(0)
    grad = jax.grad(lambda t: soft_targets(student, t, temperature=2.0).sum())(logits(1))
    assert not np.any(grad)
    np.testing.assert_array_equal(soft_targets(student, student, temperature=3.0), np.zeros(6))


def test_bad_input():
    with pytest.raises(
        jc.CompressError, match=r"student logits \(6, 10\) and teacher logits \(6, 9"
    ):
        soft_targets(logits(0), logits(0)[:, :9])
    with pytest.raises(jc.CompressError, match="axis of their own"):
        soft_targets(jnp.ones(()), jnp.ones(()))
    with pytest.raises(jc.CompressError, match="temperature has the shape"):
        soft_targets(logits(0), logits(1), temperature=jnp.ones(6))
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(jc.CompressError, match="write a positive number"):
            soft_targets(logits(0), logits(1), temperature=bad)
