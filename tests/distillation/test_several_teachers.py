"""Ensembles, switching, annealing, tasks, and the choice of examples: by their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress.distillation import soft_targets
from jaxcompress.distillation.small_loss import co_teaching, small_losses
from jaxcompress.distillation.teachers import (
    annealed_targets,
    multi_task,
    switched_teacher,
    teacher_ensemble,
)


def logits(seed, shape=(3, 4, 5), size=3.0):
    return jax.random.normal(jax.random.key(seed), shape) * size


def softmax(x):
    x = np.exp(np.asarray(x, np.float64) - np.max(x, -1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


@pytest.mark.parametrize("t", [0.1, 1.0, 4.0])
def test_the_mean_of_probabilities(t):
    teachers, weights = logits(0), jnp.array([1.0, 2.0, 5.0])
    ensemble = jax.jit(teacher_ensemble)
    found = ensemble(teachers, weights, temperature=t)
    wanted = sum(w / 8 * softmax(np.asarray(z) / t) for w, z in zip((1, 2, 5), teachers))
    # Logits of some hundreds at T = 0.1 are known to 1e-5.
    np.testing.assert_allclose(softmax(np.asarray(found) / t), wanted, rtol=2e-5, atol=1e-7)
    each = jnp.stack([jnp.full(4, w) for w in (1.0, 2.0, 5.0)])
    np.testing.assert_allclose(ensemble(teachers, each, temperature=t), found, rtol=1e-6)
    # As the teacher of a loss at that temperature it is the mean of the teachers.
    student = logits(1)[0]
    log_q = np.log(softmax(np.asarray(student) / t))
    loss = jax.jit(soft_targets)(student, found, temperature=t)
    np.testing.assert_allclose(
        loss, t**2 * np.sum(wanted * (np.log(wanted + 1e-300) - log_q), -1), rtol=1e-4, atol=1e-6
    )


def test_the_mean_of_logits():
    teachers = logits(2)
    found = teacher_ensemble(teachers, [0.5, 0.25, 0.25], average="logits")
    wanted = np.einsum("k,knc->nc", [0.5, 0.25, 0.25], np.asarray(teachers, np.float64))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    moved = teacher_ensemble(list(teachers.swapaxes(1, 2)), axis=0)
    np.testing.assert_allclose(moved, teacher_ensemble(teachers).T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_certain_teachers_and_weights_of_zero(average):
    certain = jnp.array([[0.0, -jnp.inf, -jnp.inf]])
    other = jnp.array([[1.0, 2.0, -jnp.inf]])
    ensemble = jax.jit(lambda weights: teacher_ensemble([certain, other], weights, average=average))
    np.testing.assert_allclose(ensemble([0.0, 1.0]), other if average == "logits" else
                               other - jax.nn.logsumexp(other), rtol=1e-6)  # fmt: skip
    # What one that does not count says may be anything: here it has not seen an example.
    for nothing in (jnp.nan, jnp.inf, -jnp.inf):
        unseen = [other, jnp.full((1, 3), nothing)]
        found = teacher_ensemble(unseen, [[1.0], [0.0]], average=average)
        np.testing.assert_array_equal(found, ensemble([0.0, 1.0]))
    both = ensemble([1.0, 1.0])
    assert not np.any(np.isnan(both))
    assert both[0, 2] == -jnp.inf
    grad = jax.jit(jax.grad(lambda s: soft_targets(s, both).sum()))(jnp.zeros((1, 3)))
    assert np.all(np.isfinite(grad))


def test_no_gradient_reaches_teachers():
    grad = jax.grad(lambda z: teacher_ensemble(z, temperature=2.0).sum())(logits(3))
    assert not np.any(grad)
    grad = jax.grad(lambda z: annealed_targets(jnp.zeros(4, int), z, 0.3).max())(logits(3)[0])
    assert not np.any(grad)


def test_switching_draws_each_teacher_by_its_probability_and_runs_one():
    ran = []

    def teacher(n):
        def run(x):
            jax.debug.callback(lambda: ran.append(n))
            return x + n

        return run

    draw = jax.jit(switched_teacher([teacher(n) for n in range(3)], [0.2, 0.5, 0.3]))
    found = [float(draw(jax.random.key(n), 10.0)) for n in range(30)]
    jax.effects_barrier()
    assert [10 + n for n in ran] == found
    quiet = switched_teacher([lambda x, n=n: x + n for n in range(3)], [0.2, 0.5, 0.3])
    keys = jax.random.split(jax.random.key(0), 4000)
    counts = np.bincount(np.asarray(jax.vmap(lambda k: quiet(k, 0))(keys)), minlength=3)
    # Four standard deviations of the share of 4000: 4 sqrt(p (1 - p) / 4000) < 0.032.
    np.testing.assert_allclose(counts / 4000, [0.2, 0.5, 0.3], atol=0.032)


def test_annealed_targets_against_torch():
    torch = pytest.importorskip("torch")
    teacher, student, labels = logits(4)[0], logits(5)[0], jnp.array([0, 1, 2, 4])
    for progress in (0.0, 0.3, 1.0):
        targets = annealed_targets(labels, teacher, progress, temperature=2.0)
        np.testing.assert_allclose(targets.sum(-1), 1, rtol=1e-6)
        z = torch.tensor(np.asarray(student))
        soft = torch.softmax(torch.tensor(np.asarray(teacher)) / 2, -1)
        hard = torch.eye(5)[torch.tensor([0, 1, 2, 4])]
        wanted = torch.nn.functional.cross_entropy(
            z, progress * hard + (1 - progress) * soft, reduction="none"
        )
        found = optax.softmax_cross_entropy(student, targets)
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5)
    same = annealed_targets(jax.nn.one_hot(labels, 5), teacher, 0.3, temperature=2.0)
    np.testing.assert_allclose(
        same, annealed_targets(labels, teacher, 0.3, temperature=2.0), rtol=1e-6
    )


def test_tasks_count_by_their_weights():
    losses = {"a": jnp.array([1.0, 2.0, 6.0]), "b": jnp.array([[4.0]]), "none": jnp.zeros(0)}
    assert float(multi_task(losses)) == 7.0
    assert float(multi_task(losses, {"a": 0.5, "b": 2.0, "none": 9.0})) == 9.5
    assert float(multi_task({})) == 0.0
    with pytest.raises(jc.CompressError, match=r"\['b'\] and weights of \['c'\]"):
        multi_task({"b": losses["b"]}, {"c": 1.0})


chosen = jax.jit(lambda losses, keep, where: small_losses(losses, keep, where=where))


@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.5, float("inf"), float("nan")]), min_size=8, max_size=8),
    st.sampled_from([0.0, 0.25, 0.3, 0.5, 0.8, 1.0]),
    st.lists(st.booleans(), min_size=8, max_size=8),
)
def test_small_losses_by_sorting(losses, keep, where):
    found = np.asarray(chosen(jnp.array(losses), jnp.float32(keep), jnp.array(where)))
    counted = [i for i in range(8) if where[i]]
    key = lambda i: (np.isnan(losses[i]), losses[i] if losses[i] == losses[i] else 0.0, i)
    wanted = sorted(counted, key=key)[: round(float(np.float32(keep) * np.float32(len(counted))))]
    assert sorted(np.flatnonzero(found)) == sorted(wanted)


def test_co_teaching_exchanges_what_is_easy():
    first, second = jnp.array([1.0, 9.0, 2.0, 8.0]), jnp.array([7.0, 1.0, 2.0, 8.0])
    for_first, for_second = co_teaching(first, second, 0.5)
    assert for_first.tolist() == [False, True, True, False]
    assert for_second.tolist() == [True, False, True, False]
    grad = jax.grad(lambda x: jnp.mean(x, where=co_teaching(x, second, 0.5)[0]))(first)
    assert grad.tolist() == [0.0, 0.5, 0.5, 0.0]
    wide = small_losses(first.reshape(2, 2), 0.25)
    assert wide.tolist() == [[True, False], [False, False]]


def test_the_schedule_of_co_teaching_is_a_linear_one():
    tau, ramp = 0.2, 10
    schedule = optax.linear_schedule(1.0, 1.0 - tau, ramp)
    for t in (0, 1, 5, 10, 50):
        assert float(schedule(t)) == pytest.approx(1 - min(t / ramp * tau, tau), abs=1e-6)


def test_bad_input():
    teachers = logits(0)
    for weights in ([1.0, 2.0], jnp.ones((3, 5))):
        with pytest.raises(jc.CompressError, match=r"write one for each teacher, \(3,\)"):
            teacher_ensemble(teachers, weights)
    for weights in ([1.0, -1.0, 2.0], [0.0, 0.0, 0.0], [1.0, jnp.nan, 1.0]):
        with pytest.raises(jc.CompressError, match="at least 0, and not all 0"):
            teacher_ensemble(teachers, weights)
    with pytest.raises(jc.CompressError, match="average='median'"):
        teacher_ensemble(teachers, average="median")
    with pytest.raises(jc.CompressError, match="teachers of shapes"):
        teacher_ensemble([])
    with pytest.raises(jc.CompressError, match="give at least one function"):
        switched_teacher([])
    for p in ([1.0], [0.5, 0.6], [-0.5, 1.5]):
        with pytest.raises(jc.CompressError, match="which add up to 1"):
            switched_teacher([abs, abs], p)
    with pytest.raises(jc.CompressError, match=r"give integers \(4,\) or probabilities \(4, 5\)"):
        annealed_targets(jnp.zeros(3, int), teachers[0], 0.5)
    with pytest.raises(jc.CompressError, match=r"progress=2\.0: write a number from 0 to 1"):
        annealed_targets(jnp.zeros(4, int), teachers[0], 2.0)
    with pytest.raises(jc.CompressError, match=r"keep=-0\.1: write a number from 0 to 1"):
        small_losses(jnp.ones(3), -0.1)
    with pytest.raises(jc.CompressError, match=r"keep has the shape \(3,\)"):
        small_losses(jnp.ones(3), jnp.ones(3))
    with pytest.raises(jc.CompressError, match=r"losses \(3,\) and \(2,\) differ"):
        co_teaching(jnp.ones(3), jnp.ones(2), 0.5)
