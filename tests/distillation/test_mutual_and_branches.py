"""Students that teach one another, and branches with their ensemble, by the definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress.distillation.branches import (
    branch_gate,
    branch_gate_init,
    native_ensemble,
    native_ensemble_loss,
)
from jaxcompress.distillation.mutual import mutual_learning


def logits(seed, shape=(3, 4, 5), size=2.0):
    return jax.random.normal(jax.random.key(seed), shape) * size


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.sum(np.exp(x), -1, keepdims=True))


def kl(p, q):
    return np.sum(np.exp(p) * (p - q), -1)


mutual = jax.jit(mutual_learning, static_argnames="axis")


@pytest.mark.parametrize("t", [1.0, 3.0])
def test_mutual_learning_by_its_definition(t):
    students = logits(0)
    found = mutual(students, temperature=t)
    assert found.shape == (3, 4)
    log_p = [log_softmax(np.asarray(z) / t) for z in students]
    for k in range(3):
        wanted = sum(kl(log_p[other], log_p[k]) for other in range(3) if other != k) / 2 * t**2
        np.testing.assert_allclose(found[k], wanted, rtol=1e-5, atol=1e-6)


def test_mutual_learning_against_torch_with_others_fixed():
    torch = pytest.importorskip("torch")
    students = logits(1)
    grads = jax.jit(jax.grad(lambda z: jnp.sum(mutual(z))))(students)
    for k in range(3):
        own = torch.tensor(np.asarray(students[k]), requires_grad=True)
        others = [torch.tensor(np.asarray(z)) for n, z in enumerate(students) if n != k]
        loss = sum(
            torch.nn.functional.kl_div(
                torch.log_softmax(own, -1), torch.softmax(z, -1), reduction="sum"
            )
            for z in others
        )
        (loss / 2).backward()
        np.testing.assert_allclose(grads[k], own.grad.numpy(), rtol=1e-4, atol=1e-6)


@given(st.permutations(range(3)), st.integers(0, 100))
def test_mutual_learning_of_students_in_any_order(order, seed):
    students = logits(seed)
    found = mutual(students)
    assert np.all(np.asarray(found) >= 0)
    np.testing.assert_allclose(mutual(students[np.array(order)]), found[np.array(order)], rtol=1e-5)


def test_mutual_learning_of_two_equal_ones_and_in_lists():
    same = [logits(2)[0]] * 2
    np.testing.assert_array_equal(mutual(same), np.zeros((2, 4)))
    narrow = [z.astype(jnp.bfloat16) for z in logits(3)]
    found = mutual(narrow)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, mutual(jnp.stack(narrow)), rtol=1e-6)
    # Of two, the second teaches the first the forward divergence.
    a, b = logits(4)[:2]
    log_a, log_b = log_softmax(a), log_softmax(b)
    np.testing.assert_allclose(mutual([a, b]), [kl(log_b, log_a), kl(log_a, log_b)], rtol=1e-5)
    moved = mutual(logits(5).swapaxes(1, 2), axis=0)
    np.testing.assert_allclose(moved, mutual(logits(5)), rtol=1e-5)
    where = jnp.arange(5) < 3
    np.testing.assert_allclose(
        mutual(logits(5), where=where), mutual(logits(5)[..., :3]), rtol=1e-5
    )


def test_native_ensemble_loss_by_its_definition_and_whom_it_teaches():
    branches, labels = logits(6), jnp.array([0, 1, 2, 4])
    gate = jax.nn.softmax(logits(7, (4, 3)), -1)
    ensemble = np.einsum("nk,knc->nc", *(np.asarray(x, np.float64) for x in (gate, branches)))
    np.testing.assert_allclose(native_ensemble(branches, gate), ensemble, rtol=1e-5, atol=1e-6)
    hard = lambda z: -log_softmax(z)[np.arange(4), np.asarray(labels)]
    soft = lambda z: kl(log_softmax(ensemble / 3), log_softmax(np.asarray(z, np.float64) / 3)) * 9
    wanted = hard(ensemble) + sum(hard(z) + soft(z) for z in branches)
    loss = jax.jit(native_ensemble_loss)
    found = loss(branches, gate, labels)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    # The gate learns from the labels of the ensemble alone.
    of_gate = jax.jit(jax.grad(lambda g: loss(branches, g, labels).sum()))(gate)
    p = np.exp(log_softmax(ensemble)) - np.eye(5)[np.asarray(labels)]
    np.testing.assert_allclose(of_gate, np.einsum("nc,knc->nk", p, branches), rtol=1e-4, atol=1e-5)


def test_a_class_that_branches_exclude():
    branches, gate = logits(6, (3, 4, 5)), jax.nn.softmax(logits(7, (4, 3)), -1)
    masked = jnp.concatenate([branches, jnp.full((3, 4, 1), -jnp.inf)], -1)
    labels = jnp.arange(4)
    run = jax.jit(jax.value_and_grad(
        lambda b, g: native_ensemble_loss(b, g, labels).sum(), (0, 1)
    ))  # fmt: skip
    (value, (of_branches, of_gate)), (wanted, slopes) = run(masked, gate), run(branches, gate)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_allclose(of_gate, slopes[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(of_branches[..., :-1], slopes[0], rtol=1e-4, atol=1e-5)
    only = native_ensemble(masked, jnp.zeros((4, 3)).at[:, 0].set(1.0))
    np.testing.assert_array_equal(only, masked[0])


def test_the_gate():
    params = branch_gate_init(jax.random.key(0), 16, 3)
    features = logits(8, (4, 16))
    gate = branch_gate(params, features.astype(jnp.bfloat16))
    assert gate.dtype == jnp.float32
    np.testing.assert_allclose(gate.sum(-1), 1, rtol=1e-6)
    z = np.asarray(features, np.float64) @ np.asarray(params["kernel"], np.float64)
    np.testing.assert_allclose(branch_gate(params, features), np.exp(log_softmax(z)), rtol=1e-5)
    # A gate that is sure of a branch makes the ensemble that branch.
    only = native_ensemble(logits(9), jnp.eye(3)[jnp.array([1, 1, 1, 1])])
    np.testing.assert_array_equal(only, logits(9)[1])


def test_bad_input():
    with pytest.raises(jc.CompressError, match=r"students of shapes \[\(4, 5\)\]: give 2 or more"):
        mutual_learning(logits(0)[:1])
    with pytest.raises(jc.CompressError, match=r"students of shapes \[\(4, 5\), \(4, 4\)\]"):
        mutual_learning([logits(0)[0], logits(0)[0, :, :4]])
    with pytest.raises(jc.CompressError, match="axis of their own"):
        mutual_learning(jnp.ones(3))
    gate = jnp.ones((4, 2))
    with pytest.raises(jc.CompressError, match=r"its shape is \(4, 3\)"):
        native_ensemble(logits(0), gate)
    with pytest.raises(jc.CompressError, match=r"labels \(3,\) for logits \(4, 5\)"):
        native_ensemble_loss(logits(0), jnp.ones((4, 3)), jnp.zeros(3, int))
    with pytest.raises(jc.CompressError, match="branches=0"):
        branch_gate_init(jax.random.key(0), 4, 0)
    with pytest.raises(jc.CompressError, match=r"features \(4, 5\) do not meet a gate of 16"):
        branch_gate(branch_gate_init(jax.random.key(0), 16, 3), jnp.ones((4, 5)))
