"""Divergences against their definitions in float64, torch, their limits and bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress.distillation import divergences as dv
from jaxcompress.distillation.logits import soft_targets

SHARE = 0.3
LOSSES = {
    "forward_kl": dv.forward_kl,
    "reverse_kl": dv.reverse_kl,
    "jensen_shannon": lambda s, t, **kw: dv.jensen_shannon(s, t, beta=SHARE, **kw),
    "skewed_kl": lambda s, t, **kw: dv.skewed_kl(s, t, alpha=SHARE, **kw),
    "skewed_reverse_kl": lambda s, t, **kw: dv.skewed_reverse_kl(s, t, alpha=SHARE, **kw),
}
every = pytest.mark.parametrize("name", LOSSES)


def compiled(loss):
    """Values and the gradient of their sum, at a traced temperature and mask."""

    def both(student, teacher, t, where):
        run = lambda s: loss(s, teacher, temperature=t, where=where)
        values, pull = jax.vjp(run, student)
        return values, pull(jnp.ones_like(values))[0]

    run = jax.jit(both)
    return lambda s, te, t=1.0, where=True: run(s, te, t, jnp.broadcast_to(where, s.shape))


RUN = {name: compiled(loss) for name, loss in LOSSES.items()}


def logits(seed, shape=(6, 10), size=3.0):
    return jax.random.normal(jax.random.key(seed), shape) * size


def softmax(x, t=1.0):
    x = np.asarray(x, np.float64) / t
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    """By the definition, term by term."""
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def definition(name, student, teacher, t=1.0, share=SHARE):
    found = []
    for q, p in zip(softmax(student, t), softmax(teacher, t), strict=True):
        m = share * p + (1 - share) * q
        found.append(
            {
                "forward_kl": lambda p=p, q=q: kl(p, q),
                "reverse_kl": lambda p=p, q=q: kl(q, p),
                "jensen_shannon": lambda p=p, q=q, m=m: share * kl(p, m) + (1 - share) * kl(q, m),
                "skewed_kl": lambda p=p, m=m: kl(p, m),
                "skewed_reverse_kl": lambda p=p, q=q: kl(q, share * q + (1 - share) * p),
            }[name]()
        )
    return np.array(found)


@every
@pytest.mark.parametrize("t", [0.1, 4.0, 100.0])
def test_values_and_gradients(name, t):
    student, teacher = (np.asarray(logits(n)) for n in (0, 1))
    values, grad = RUN[name](student, teacher, t)
    # A term is about d**2 / 2 for small d = log q - log p, of about 4 / t and known to some eps.
    rtol = 1e-5 + 4 * 2**-23 * t
    expected = definition(name, student, teacher, t)
    np.testing.assert_allclose(values, expected, rtol=rtol, atol=1e-6)
    # Central differences in float64 with a step of 1e-4 of t are off by about 1e-9 / t; logarithms
    # of up to 20 / t or log 20 are known to 2 eps of that, so a gradient to as much over t.
    student, expected = student.astype(np.float64), np.zeros((6, 10))
    for i, move in enumerate(1e-4 * t * np.eye(10)):
        above, below = (definition(name, student + s * move, teacher, t) for s in (1, -1))
        expected[:, i] = (above - below) / (2e-4 * t)
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=2**-22 * max(20 / t, 3) / t)


@every
def test_certain_predictions(name):
    """All values and gradients are finite, whatever the temperature."""
    student = logits(0).at[1, 0].set(90.0).at[1, 1].set(-90.0)
    certain = jnp.full((6, 10), -jnp.inf if name != "reverse_kl" else -1e30).at[:, 0].set(0.0)
    certain = certain.at[1].set(jnp.zeros(10).at[0].set(-90.0).at[1].set(90.0))
    certain = certain.at[2].set(jnp.zeros(10).at[0].set(1e30).at[1].set(-1e30))
    for t in (0.1, 1.0, 100.0):
        values, grad = RUN[name](student, certain, t)
        assert np.all(np.isfinite(values))
        assert np.all(values > 0)
        assert np.all(np.isfinite(grad))
    if name == "reverse_kl":  # the student does what the teacher never does
        assert RUN[name](student, certain.at[0, 1].set(-jnp.inf))[0][0] == jnp.inf


@every
def test_classes_that_do_not_count(name):
    plain = RUN[name](logits(0)[:, :8], logits(1)[:, :8])
    last = jnp.arange(10) >= 8
    # Classes that neither gives a chance, as a masked part of a vocabulary.
    for out in (-jnp.inf, jnp.finfo(jnp.float32).min):
        values, grad = RUN[name](*(jnp.where(last, out, logits(n)) for n in (0, 1)))
        np.testing.assert_allclose(values, plain[0], rtol=1e-5)
        np.testing.assert_allclose(grad[:, :8], plain[1], rtol=1e-4, atol=1e-6)
        assert not np.any(grad[:, 8:])
    # Left out by `where`, whatever is there; and an example of which nothing counts.
    where = ~last & (jnp.arange(6) > 0)[:, None]
    values, grad = RUN[name](jnp.where(last, jnp.nan, logits(0)), logits(1), 1.0, where)
    np.testing.assert_allclose(values[1:], plain[0][1:], rtol=1e-5)
    np.testing.assert_allclose(grad[1:, :8], plain[1][1:], rtol=1e-4, atol=1e-6)
    assert values[0] == 0
    assert not np.any(grad[0])
    assert not np.any(grad[:, 8:])


@every
def test_axes_and_narrow_dtypes(name):
    moved = LOSSES[name](logits(0).T, logits(1).T, axis=0)
    np.testing.assert_allclose(moved, RUN[name](logits(0), logits(1))[0], rtol=1e-5)
    narrow = [logits(n).astype(jnp.bfloat16) for n in (0, 1)]
    values, grad = RUN[name](*narrow)
    assert (values.dtype, grad.dtype) == (jnp.float32, jnp.bfloat16)
    wide = RUN[name](*(x.astype(jnp.float32) for x in narrow))[0]
    np.testing.assert_allclose(values, wide, rtol=1e-6)


@every
def test_the_teacher_has_no_gradient_and_itself_costs_nothing(name):
    student = logits(0)
    assert not np.any(jax.grad(lambda t: LOSSES[name](student, t).sum())(logits(1)))
    # A mixture of p with itself is p to a rounding of its logarithm, whose square this is.
    assert np.all(np.abs(RUN[name](student, student)[0]) < 1e-11)
    assert LOSSES[name](student[:0], student[:0]).shape == (0,)


row = st.lists(st.floats(-30, 30, width=32), min_size=7, max_size=7)


@settings(max_examples=40, deadline=None)
@given(row, row, st.floats(0.125, 16, width=32), st.permutations(range(7)))
def test_bounds_and_permutations(student, teacher, t, order):
    s, te, order = (np.asarray(x) for x in (student, teacher, order))
    s, te = s.astype(np.float32), te.astype(np.float32)
    limits = {
        "jensen_shannon": -SHARE * np.log(SHARE) - (1 - SHARE) * np.log(1 - SHARE),
        "skewed_kl": -np.log(SHARE),
        "skewed_reverse_kl": -np.log(SHARE),
    }
    for name, run in RUN.items():
        value = float(run(s, te, t)[0])
        assert -1e-12 <= value <= limits.get(name, np.inf) * (1 + 1e-5)
        moved = float(run(s[order], te[order], t)[0])
        # Logarithms are known to eps of their size, of up to 480.
        assert moved == pytest.approx(value, rel=1e-5, abs=1e-9)


def test_limits():
    student, teacher = logits(2, size=1.0), logits(3, size=1.0)
    forward, reverse = dv.forward_kl(student, teacher), dv.reverse_kl(student, teacher)
    for share in (0.0, 1e-4):
        for skewed, plain in ((dv.skewed_kl, forward), (dv.skewed_reverse_kl, reverse)):
            found = skewed(student, teacher, alpha=share)
            np.testing.assert_allclose(found, plain, rtol=1e-5 + 20 * share)
    # The first term beyond the limit is beta times the chi-squared divergence, here below 50.
    beta = 2e-3
    js = dv.jensen_shannon(student, teacher, beta=beta) / beta
    np.testing.assert_allclose(js, forward, rtol=0.1)
    js = dv.jensen_shannon(student, teacher, beta=1 - beta) / beta
    np.testing.assert_allclose(js, reverse, rtol=0.1)
    half = dv.jensen_shannon(student, teacher)
    np.testing.assert_allclose(half, dv.jensen_shannon(teacher, student), rtol=1e-5)
    np.testing.assert_allclose(
        9 * dv.forward_kl(student, teacher, temperature=3.0),
        soft_targets(student, teacher, temperature=3.0),
        rtol=1e-6,
    )


def test_against_torch():
    torch = pytest.importorskip("torch")
    kl_div = torch.nn.functional.kl_div
    s, t = (torch.tensor(np.asarray(logits(n))) for n in (4, 5))
    log_q, log_p = torch.log_softmax(s / 2, -1), torch.log_softmax(t / 2, -1)
    weight = torch.tensor(SHARE)
    log_m = torch.logaddexp(log_p + weight.log(), log_q + (1 - weight).log())
    log_r = torch.logaddexp(log_q + weight.log(), log_p + (1 - weight).log())
    full = lambda a, b: kl_div(b, a, log_target=True, reduction="none").sum(-1)
    expected = {
        "forward_kl": full(log_p, log_q),
        "reverse_kl": full(log_q, log_p),
        "jensen_shannon": SHARE * full(log_p, log_m) + (1 - SHARE) * full(log_q, log_m),
        "skewed_kl": full(log_p, log_m),
        "skewed_reverse_kl": full(log_q, log_r),
    }
    for name, loss in LOSSES.items():
        found = loss(logits(4), logits(5), temperature=2.0)
        np.testing.assert_allclose(found, expected[name].numpy(), rtol=2e-5, err_msg=name)


def test_bad_input():
    a = logits(0)
    for loss in LOSSES.values():
        with pytest.raises(jc.CompressError, match=r"teacher logits \(6, 9\) differ"):
            loss(a, a[:, :9])
        with pytest.raises(jc.CompressError, match="write a positive number"):
            loss(a, a, temperature=0.0)
    for bad in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(jc.CompressError, match="without 0 and 1"):
            dv.jensen_shannon(a, a, beta=bad)
    for loss in (dv.skewed_kl, dv.skewed_reverse_kl):
        with pytest.raises(jc.CompressError, match="from 0 to 1"):
            loss(a, a, alpha=1.5)
        with pytest.raises(jc.CompressError, match="alpha has the shape"):
            loss(a, a, alpha=jnp.ones(6))
