"""Distillation losses against references in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def compiled(loss):
    """Values, and gradients of their weighted sum with respect to student and teacher."""

    def total(student, teacher, weights, where):
        values = loss(student, teacher, where=where)
        return jnp.sum(weights * values), values

    return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))


def weights_of(batch):
    return np.random.default_rng(9).uniform(0.5, 2.0, batch).astype(np.float32)


def run(loss, student, teacher, where):
    """Values, and gradients of the student and the teacher."""
    weights = weights_of(student.shape[0])
    (_, values), grads = compiled(loss)(student, teacher, weights, where)
    assert values.dtype == jnp.float32
    assert values.shape == student.shape[:1]
    return np.asarray(values), *(np.asarray(g, np.float64) for g in grads)


def draw(seed, shape, size=1.0):
    return (np.random.default_rng(seed).normal(size=shape) * size).astype(np.float32)


def check_against(loss, reference, student, teacher, where, rtol):
    """Values and slopes are the reference's, and no gradient reaches the teacher.

    The reference takes `student, teacher, where` in float64. Its central differences are exact to
    about h**2 = 1e-10 and eps / h = 1e-11.
    """
    s, t = student.astype(np.float64), teacher.astype(np.float64)
    way, h = np.random.default_rng(8).normal(size=s.shape), 1e-5
    for mask in (np.ones_like(where), where):
        values, grad, other = run(loss, student, teacher, mask)
        np.testing.assert_allclose(values, reference(s, t, mask), rtol=rtol, atol=1e-7)
        assert not np.any(other)
        weights = weights_of(student.shape[0])
        ends = [np.sum(weights * reference(s + step * way, t, mask)) for step in (h, -h)]
        slope = (ends[0] - ends[1]) / (2 * h)
        # The sum of many terms of either sign is known to the share of their sizes.
        np.testing.assert_allclose(
            np.sum(grad * way), slope, rtol=rtol, atol=1e-5 * np.sum(np.abs(grad * way))
        )


def check_degenerate(loss, shape, other, where):
    """Zeros, equal examples, and large and small features give numbers, in either; returns the values."""
    found = {}
    students, teachers = (
        {
            "drawn": draw(seed, x),
            "zero": np.zeros(x, np.float32),
            "constant": np.broadcast_to(draw(seed, x[1:]), x),
            "large": draw(seed, x, 1e15),
            "small": draw(seed, x, 1e-15),
        }
        for seed, x in ((1, shape), (2, other))
    )
    for mask in (np.ones_like(where), where):
        for a, student in students.items():
            for b, teacher in teachers.items():
                values, grad, _ = found[a, b] = run(loss, student, teacher, mask)
                assert np.all(np.isfinite(values)), (a, b)
                assert np.all(np.isfinite(grad)), (a, b)
    return found


def check_unmoved_by_masked(loss, student, teacher, where):
    """What is masked may be anything: neither values nor gradients change."""
    before, grad, _ = run(loss, student, teacher, where)
    for bad in (np.inf, np.nan):
        student, teacher = np.array(student), np.array(teacher)
        student[~where] = teacher[~where] = bad
        after, new, _ = run(loss, student, teacher, where)
        np.testing.assert_array_equal(after, before)
        np.testing.assert_array_equal(new, grad)
        assert not np.any(new[~where])
