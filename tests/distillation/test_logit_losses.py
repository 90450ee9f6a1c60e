"""Logit regression, labels beside a teacher, DKD, DIST, and teachers with noise or of labels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import jaxcompress as jc
from jaxcompress.distillation.correlation import dist
from jaxcompress.distillation.decoupled import dkd
from jaxcompress.distillation.logits import distillation_loss, logit_regression, soft_targets
from jaxcompress.distillation.noise import noisy_logits, virtual_teacher

LABELS = jnp.array([0, 3, 9, 3, 1, 7])


def logits(seed, shape=(6, 10), size=3.0):
    return jax.random.normal(jax.random.key(seed), shape) * size


def softmax(x, t=1.0):
    x = np.asarray(x, np.float64) / t
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))


def both(loss, student):
    """The values, and the gradient of their sum."""

    def run(student):
        values, pull = jax.vjp(loss, student)
        return values, pull(jnp.ones_like(values))[0]

    return jax.jit(run)(student)


def differences(f, x, step=1e-4):
    """The gradient of a float64 function by central differences."""
    x, grad = np.asarray(x, np.float64), np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        move = np.zeros(x.shape)
        move[i] = step
        grad[i] = (f(x + move) - f(x - move)) / (2 * step)
    return grad


def test_logit_regression():
    student, teacher = logits(0), logits(1)
    s, t = (np.asarray(x, np.float64) for x in (student, teacher))
    np.testing.assert_allclose(
        logit_regression(student, teacher), ((s - t) ** 2).mean(-1), rtol=1e-6
    )
    found = logit_regression(student, teacher, centered=True)
    np.testing.assert_allclose(found, np.var(s - t, axis=-1), rtol=1e-5)
    shifted = logit_regression(student + 7.0, teacher, centered=True)
    np.testing.assert_allclose(shifted, found, rtol=1e-5)
    # The limit of soft targets; the next term of the series is of the order of |logits| / T.
    soft = soft_targets(student, teacher, temperature=1000.0)
    np.testing.assert_allclose(soft, found / 2, rtol=1e-2)
    grad = jax.grad(lambda s: logit_regression(s, teacher).sum())(student)
    np.testing.assert_allclose(grad, 2 * (s - t) / 10, rtol=1e-5, atol=1e-6)
    assert not np.any(jax.grad(lambda t: logit_regression(student, t).sum())(teacher))


@pytest.mark.parametrize("centered", [False, True])
def test_logit_regression_leaves_out_what_does_not_count(centered):
    where = (jnp.arange(10) < 7) & (jnp.arange(6) > 0)[:, None]
    teacher = jnp.where(where, logits(1), -jnp.inf)
    run = lambda s: logit_regression(s, teacher, centered=centered, where=where)
    values, grad = both(run, logits(0))
    expected = logit_regression(logits(0)[1:, :7], logits(1)[1:, :7], centered=centered)
    np.testing.assert_allclose(values, np.append(0, expected), rtol=1e-5)
    assert np.all(np.isfinite(grad))
    assert not np.any(grad[~where])
    moved = logit_regression(logits(0).T, teacher.T, centered=centered, axis=0, where=where.T)
    np.testing.assert_allclose(moved, values, rtol=1e-5)


def test_regression_and_labels_against_torch():
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    s, t = (torch.tensor(np.asarray(logits(n))) for n in (2, 3))
    s.requires_grad_()
    expected = functional.mse_loss(s, t, reduction="none").mean(-1)
    found = logit_regression(logits(2), logits(3))
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-6)
    soft = functional.kl_div(
        torch.log_softmax(s / 4, -1), torch.log_softmax(t / 4, -1), reduction="none",
        log_target=True,
    ).sum(-1)  # fmt: skip
    hard = functional.cross_entropy(s, torch.tensor(np.asarray(LABELS)).long(), reduction="none")
    expected = 0.7 * 16 * soft + 0.3 * hard
    run = jax.jit(lambda x, a: distillation_loss(x, logits(3), LABELS, alpha=a, temperature=4.0))
    values, grad = both(lambda x: run(x, 0.7), logits(2))
    np.testing.assert_allclose(values, expected.detach().numpy(), rtol=1e-5)
    expected.sum().backward()
    np.testing.assert_allclose(grad, s.grad.numpy(), rtol=1e-4, atol=1e-6)
    for alpha, one in ((1.0, 16 * soft), (0.0, hard)):
        np.testing.assert_allclose(run(logits(2), alpha), one.detach().numpy(), rtol=1e-5)
    # Smoothing by e leaves 1 - e + e / K to the label; what is less is the entropy of the teacher.
    smooth = functional.cross_entropy(
        s, torch.tensor(np.asarray(LABELS)).long(), reduction="none", label_smoothing=0.2
    )
    teacher = virtual_teacher(LABELS, 10, correct=1 - 0.2 + 0.2 / 10)
    entropy = -jnp.sum(jnp.exp(teacher) * teacher, axis=-1)
    found = soft_targets(logits(2), teacher) + entropy
    np.testing.assert_allclose(found, smooth.detach().numpy(), rtol=1e-5)


def test_labels_with_masks_and_axes():
    where = jnp.arange(10) < 8
    labels, options = jnp.minimum(LABELS, 7), {"alpha": 0.5, "temperature": 2.0}
    found = distillation_loss(logits(0), logits(1), labels, where=where, **options)
    none = where & (jnp.arange(6) > 0)[:, None]
    run = lambda s: distillation_loss(s, logits(1), labels, where=none, **options)
    values, grad = both(run, logits(0))
    np.testing.assert_allclose(values, found.at[0].set(0), rtol=1e-5)
    assert np.all(np.isfinite(grad))
    assert not np.any(grad[~none])
    cut = distillation_loss(logits(0)[:, :8], logits(1)[:, :8], labels, **options)
    np.testing.assert_allclose(found, cut, rtol=1e-5)
    moved = distillation_loss(logits(0).T, logits(1).T, labels, axis=0, **options)
    plain = distillation_loss(logits(0), logits(1), labels, **options)
    np.testing.assert_allclose(moved, plain, rtol=1e-5)


def dkd_definition(student, teacher, labels, alpha, beta, t):
    """Of both published parts, by loops."""
    found = []
    for q, p, y in zip(softmax(student, t), softmax(teacher, t), labels, strict=True):
        tckd = kl([p[y], 1 - p[y]], [q[y], 1 - q[y]])
        others = [c for c in range(len(p)) if c != y]
        nckd = kl(p[others] / (1 - p[y]), q[others] / (1 - q[y]))
        found.append(t**2 * (alpha * tckd + beta * nckd))
    return np.array(found)


@pytest.mark.parametrize("t", [0.5, 4.0, 100.0])
def test_dkd(t):
    student, teacher = logits(4), logits(5)
    run = lambda s: dkd(s, teacher, LABELS, alpha=1.5, beta=8.0, temperature=t)
    values, grad = both(run, student)
    expected = dkd_definition(student, teacher, LABELS, 1.5, 8.0, t)
    # As in soft targets: a share of 4 eps / d of terms of d**2 / 2, with d of about 4 / t.
    np.testing.assert_allclose(values, expected, rtol=1e-5 + 4 * 2**-23 * t)
    loss = lambda s: dkd_definition(s, teacher, LABELS, 1.5, 8.0, t).sum()
    np.testing.assert_allclose(grad, differences(loss, student), rtol=2e-4, atol=2e-4)
    # Soft targets are both parts, where the others count by what the teacher leaves them.
    left = jnp.asarray(1 - softmax(teacher, t)[np.arange(6), LABELS], jnp.float32)
    parts = dkd(student, teacher, LABELS, alpha=1.0, beta=left, temperature=t)
    whole = soft_targets(student, teacher, temperature=t)
    np.testing.assert_allclose(parts, whole, rtol=2e-5 + 8 * 2**-23 * t)


def test_dkd_of_certain_teachers_masks_and_axes():
    label = jax.nn.one_hot(LABELS, 10, dtype=bool)
    options = {"alpha": 1.0, "beta": 8.0, "temperature": 1.0}
    # Certain with infinities: nothing is said of the others. With finite logits, it still is.
    silent = jnp.where(label, 0.0, -jnp.inf)
    values, grad = both(lambda s: dkd(s, silent, LABELS, **options), logits(0))
    hard = optax.softmax_cross_entropy_with_integer_labels(logits(0), LABELS)
    np.testing.assert_allclose(values, hard, rtol=1e-5)
    expected = jax.nn.softmax(logits(0)) - label
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-6)
    sure = jnp.where(label, 1e4, logits(1))
    others = lambda x: x[~label].reshape(6, 9)
    expected = hard + 8 * soft_targets(others(logits(0)), others(logits(1)))
    values, grad = both(lambda s: dkd(s, sure, LABELS, **options), logits(0))
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert np.all(np.isfinite(grad))
    # Masks: all but the label, and some of the others.
    for where in (label, label | (jnp.arange(10) < 5)):
        loss = lambda s, w=where: dkd(s, logits(1), LABELS, where=w, **options)
        values, grad = both(loss, logits(0))
        out = [np.where(where, logits(n), -1e4).astype(np.float64) for n in (0, 1)]
        if where is label:
            np.testing.assert_array_equal(values, np.zeros(6))
        else:
            kept = [np.where(where, softmax(x), 0) for x in out]
            for value, q, p, y in zip(values, *kept, LABELS, strict=True):
                rest = [c for c in range(10) if c != y and p[c] > 0]
                expected = kl([p[y], 1 - p[y]], [q[y], 1 - q[y]]) + 8 * kl(
                    p[rest] / p[rest].sum(), q[rest] / q[rest].sum()
                )
                assert value == pytest.approx(expected, rel=1e-5)
        assert np.all(np.isfinite(grad))
        assert not np.any(grad[~where])
    moved = dkd(logits(0).T, logits(1).T, LABELS, axis=0)
    np.testing.assert_allclose(moved, dkd(logits(0), logits(1), LABELS), rtol=1e-5)
    assert not np.any(jax.grad(lambda t: dkd(logits(0), t, LABELS).sum())(logits(1)))
    np.testing.assert_array_equal(dkd(logits(0), logits(0), LABELS), np.zeros(6))


def dist_definition(student, teacher, beta, gamma, t):
    q, p = softmax(student, t), softmax(teacher, t)
    r = lambda a, b: scipy.stats.pearsonr(a, b).statistic
    inter = np.array([1 - r(a, b) for a, b in zip(q, p, strict=True)])
    intra = np.mean([1 - r(a, b) for a, b in zip(q.T, p.T, strict=True)])
    return beta * inter + gamma * intra


@pytest.mark.parametrize("t", [0.25, 4.0])
def test_dist(t):
    student, teacher = logits(6), logits(7)
    run = lambda s: dist(s, teacher, beta=2.0, gamma=0.5, temperature=t)
    values, grad = both(run, student)
    expected = dist_definition(student, teacher, 2.0, 0.5, t)
    # Correlations are sums of products of at most 1, known to a few eps.
    np.testing.assert_allclose(values, expected, atol=5e-6)
    loss = lambda s: dist_definition(s, teacher, 2.0, 0.5, t).sum()
    np.testing.assert_allclose(grad, differences(loss, student), rtol=1e-3, atol=1e-4 / t)


def test_dist_of_constants_small_values_and_masks():
    run = jax.jit(jax.grad(lambda s, t: dist(s, t).sum()))
    # Uniform predictions say nothing; a correlation with them is 0 and passes no gradient.
    np.testing.assert_allclose(dist(jnp.zeros((6, 10)), logits(1)), 2 * np.ones(6), atol=1e-6)
    assert not np.any(run(jnp.zeros((6, 10)), logits(1)))
    assert not np.any(run(logits(1), jnp.zeros((6, 10))))
    # In half of the examples, all but one class are about 1e-25, whose squares are no float32: their correlations still are.
    far = [logits(n).at[:3, 0].set(60.0) for n in (0, 1)]
    np.testing.assert_allclose(dist(*far), dist_definition(*far, 1, 1, 1), atol=1e-5)
    assert np.all(np.isfinite(run(*far)))
    certain = jnp.where(jax.nn.one_hot(LABELS, 10, dtype=bool), 0.0, -jnp.inf)
    assert np.all(np.isfinite(run(logits(0), certain)))
    # Examples and classes that do not count.
    where = (jnp.arange(10) < 7) & (jnp.arange(6) > 1)[:, None]
    broken = jnp.where(jnp.arange(10) == 8, jnp.nan, logits(0))
    values, grad = both(lambda s: dist(s, logits(1), where=where), broken)
    np.testing.assert_allclose(values[2:], dist(logits(0)[2:, :7], logits(1)[2:, :7]), atol=1e-6)
    assert not np.any(values[:2])
    assert np.all(np.isfinite(grad))
    assert not np.any(grad[~where])
    # All leading axes are one batch, and classes may lie elsewhere.
    flat = dist(logits(0), logits(1))
    tall = dist(logits(0).reshape(2, 3, 10), logits(1).reshape(2, 3, 10))
    np.testing.assert_allclose(tall.reshape(6), flat, atol=1e-6)
    np.testing.assert_allclose(dist(logits(0).T, logits(1).T, axis=0), flat, atol=1e-6)
    # A gain or a shift of probabilities is no difference, so neither is a factor of both models.
    assert np.all(np.abs(dist(logits(0), logits(0))) < 1e-6)


def test_noisy_teachers():
    z = logits(8, (2000, 20)).at[:, 0].set(-jnp.inf)
    noisy = noisy_logits(jax.random.key(1), z, sigma=0.3, chosen=0.25)
    assert np.all(noisy[:, 0] == -jnp.inf)
    changed = np.any(np.asarray(noisy != z), axis=-1)
    # Of 2000 with probability 1/4: within four standard deviations of sqrt(2000 / 4 * 3 / 4).
    assert abs(changed.sum() - 500) < 4 * np.sqrt(375)
    xi = np.asarray((noisy / z - 1)[changed][:, 1:], np.float64)
    # Of n = 9500 normal draws, four standard deviations of the mean and of the deviation.
    assert abs(xi.mean()) < 4 * 0.3 / np.sqrt(xi.size)
    assert abs(xi.std() - 0.3) < 4 * 0.3 / np.sqrt(2 * xi.size)
    assert abs(np.corrcoef(xi[:, 0], xi[:, 1])[0, 1]) < 4 / np.sqrt(len(xi))
    again = noisy_logits(jax.random.key(1), z, sigma=0.3, chosen=0.25)
    np.testing.assert_array_equal(noisy, again)
    assert np.any(noisy != noisy_logits(jax.random.key(2), z, sigma=0.3, chosen=0.25))
    np.testing.assert_array_equal(noisy_logits(jax.random.key(1), z, sigma=9.0, chosen=0.0), z)
    run = lambda t: noisy_logits(jax.random.key(0), t, sigma=0.3).sum()
    assert not np.any(jax.grad(run)(logits(0)))


def test_virtual_teachers():
    teacher = virtual_teacher(LABELS, 10, correct=0.9)
    p = np.full((6, 10), 0.1 / 9)
    p[np.arange(6), LABELS] = 0.9
    np.testing.assert_allclose(jnp.exp(teacher), p, rtol=1e-5)
    hard = optax.softmax_cross_entropy_with_integer_labels(logits(0), LABELS)
    sure = virtual_teacher(LABELS, 10, correct=1.0)
    np.testing.assert_allclose(soft_targets(logits(0), sure), hard, rtol=1e-5)


def test_bad_input():
    a = logits(0)
    bad_labels = (LABELS[:5], LABELS.astype(float), jax.nn.one_hot(LABELS, 10))
    for labels in bad_labels:
        with pytest.raises(jc.CompressError, match=r"write integers of the shape \(6,\)"):
            dkd(a, a, labels)
        with pytest.raises(jc.CompressError, match=r"write integers of the shape \(6,\)"):
            distillation_loss(a, a, labels, alpha=0.5, temperature=1.0)
    with pytest.raises(jc.CompressError, match="alpha=2"):
        distillation_loss(a, a, LABELS, alpha=2.0, temperature=1.0)
    for loss in (logit_regression, dist, lambda s, t: dkd(s, t, LABELS)):
        with pytest.raises(jc.CompressError, match=r"teacher logits \(6, 9\) differ"):
            loss(a, a[:, :9])
    with pytest.raises(jc.CompressError, match="sigma=-1"):
        noisy_logits(jax.random.key(0), a, sigma=-1.0)
    with pytest.raises(jc.CompressError, match="chosen=3"):
        noisy_logits(jax.random.key(0), a, sigma=1.0, chosen=3.0)
    with pytest.raises(jc.CompressError, match="scalars"):
        noisy_logits(jax.random.key(0), jnp.ones(()), sigma=1.0)
    with pytest.raises(jc.CompressError, match="write integers"):
        virtual_teacher(LABELS.astype(float), 10, correct=0.9)
    with pytest.raises(jc.CompressError, match="classes=1"):
        virtual_teacher(LABELS, 1, correct=0.9)
    with pytest.raises(jc.CompressError, match="correct=9"):
        virtual_teacher(LABELS, 10, correct=9)


def test_masks_of_logits_are_numbers_or_booleans_and_broadcast_to_them() -> None:
    student, teacher, labels = jnp.eye(2, 3), jnp.ones((2, 3)), jnp.array([0, 1])
    losses = (
        soft_targets,
        logit_regression,
        dist,
        lambda s, t, where: dkd(s, t, labels, where=where),
        lambda s, t, where: distillation_loss(
            s, t, labels, alpha=0.5, temperature=2.0, where=where
        ),
    )
    for loss in losses:
        expected = loss(student, teacher, where=jnp.array([True, True, False]))
        for dtype in (int, float):
            actual = loss(student, teacher, where=jnp.array([1, 1, 0], dtype))
            np.testing.assert_array_equal(actual, expected)
        for shape in ((4,), (5, 2, 3)):
            with pytest.raises(jc.CompressError, match="where has the shape"):
                loss(student, teacher, where=jnp.ones(shape, bool))


def test_a_label_without_weight_may_be_impossible_for_the_student():
    student, teacher = jnp.array([[0.0, -jnp.inf, 1.0]]), jnp.array([[0.0, -jnp.inf, 2.0]])
    loss = lambda s, alpha: jnp.sum(
        distillation_loss(s, teacher, jnp.array([1]), alpha=alpha, temperature=2.0)
    )
    value, grad = jax.jit(jax.value_and_grad(loss))(student, 1.0)
    soft = soft_targets(student, teacher, temperature=2.0)[0]
    np.testing.assert_allclose(value, soft, rtol=1e-5)  # some roundings of float32
    assert np.isfinite(grad).all()
    assert loss(student, 0.5) == jnp.inf
