"""Losses on features against their definitions, in float64 and one example at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_checks import (
    check_against,
    check_degenerate,
    check_unmoved_by_masked,
    draw,
    run,
)

import jaxcompress as jc
from jaxcompress.distillation.activation_maps import attention_transfer, gradient_transfer
from jaxcompress.distillation.boundaries import activation_boundaries
from jaxcompress.distillation.factor import factor_transfer
from jaxcompress.distillation.flow import fsp, fsp_matrix
from jaxcompress.distillation.geometry import length, unit
from jaxcompress.distillation.hints import hint
from jaxcompress.distillation.margins import measured_margin, normal_margin, overhaul
from jaxcompress.distillation.variational import vid, vid_init

SHAPE = (5, 3, 4, 6)
NARROW = (5, 3, 4, 2)
MARGIN = -np.linspace(0.1, 1.0, 6)
PARAMS = {"raw_variance": jnp.linspace(-3.0, 3.0, 6)}


def each(one):
    """A reference of examples `[positions, channels]`, of the positions that count."""

    @functools.wraps(one)
    def all_of(student, teacher, where):
        return np.array([
            one(s[w], t[w]) if w.any() else 0.0 for s, t, w in zip(student, teacher, where)
        ])  # fmt: skip

    return all_of


@each
def hint_by_hand(s, t):
    return 0.5 * np.mean((s - t) ** 2)


def maps_by_hand(p, squared):
    @each
    def one(s, t):
        maps = []
        for x in (s, t):
            q = np.array([sum(abs(a) ** p for a in row) for row in x])
            maps.append(q / np.sqrt(q @ q))
        d = maps[0] - maps[1]
        return d @ d if squared else np.sqrt(d @ d)

    return one


def factors_by_hand(p):
    @each
    def one(s, t):
        d = (s / np.linalg.norm(s.ravel()) - t / np.linalg.norm(t.ravel())).ravel()
        return sum(abs(x) ** p for x in d) ** (1 / p)

    return one


@each
def vid_by_hand(s, t):
    var = np.log(1 + np.exp(np.asarray(PARAMS["raw_variance"], np.float64))) + 1e-5
    density = np.exp(-((t - s) ** 2) / (2 * var)) / np.sqrt(2 * np.pi * var)
    return np.mean(-np.log(density) - 0.5 * np.log(2 * np.pi))


@each
def boundaries_by_hand(s, t):
    on = (t > 0).astype(float)
    loss = on * np.maximum(0.7 - s, 0) ** 2 + (1 - on) * np.maximum(0.7 + s, 0) ** 2
    return np.mean(loss)


@each
def overhaul_by_hand(s, t):
    total = 0.0
    for row, other in zip(s, t):
        for x, y, m in zip(row, other, MARGIN):
            y = max(y, m)
            total += 0.0 if x <= y <= 0 else (y - x) ** 2
    return total / s.size


def vid_fixed(s, t, where=None):
    return vid(PARAMS, s, t, where=where)


def overhaul_fixed(s, t, where=None):
    return overhaul(s, t, jnp.asarray(MARGIN, jnp.float32), where=where)


attention = attention_transfer
attention_squared = functools.partial(attention_transfer, p=1, squared=True)
attention_cubed = functools.partial(attention_transfer, p=3)
factors = factor_transfer
factors_odd = functools.partial(factor_transfer, p=3.0)
boundaries = functools.partial(activation_boundaries, margin=0.7)
LOSSES = {
    "hint": (hint, hint_by_hand, SHAPE),
    "attention": (attention, maps_by_hand(2, False), NARROW),
    "attention_squared": (attention_squared, maps_by_hand(1, True), NARROW),
    "attention_cubed": (attention_cubed, maps_by_hand(3, False), NARROW),
    "factor": (factors, factors_by_hand(1), SHAPE),
    "factor_odd": (factors_odd, factors_by_hand(3), SHAPE),
    "vid": (vid_fixed, vid_by_hand, SHAPE),
    "boundaries": (boundaries, boundaries_by_hand, SHAPE),
    "overhaul": (overhaul_fixed, overhaul_by_hand, SHAPE),
}


def mask():
    where = np.random.default_rng(5).uniform(size=SHAPE[:-1]) < 0.6
    where[3] = False  # an example of which nothing counts
    return where


@pytest.mark.parametrize("name", LOSSES)
def test_by_definition(name):
    loss, reference, other = LOSSES[name]
    student, teacher, where = draw(1, SHAPE), draw(2, other), mask()
    # Some tens of float32 operations on numbers near 1, each to 1e-7.
    check_against(loss, reference, student, teacher, where, rtol=2e-5)
    check_unmoved_by_masked(loss, student, teacher, where)
    check_degenerate(loss, SHAPE, other, where)
    if name not in ("vid", "boundaries") and other == SHAPE:
        same = draw(3, SHAPE)
        values, grad, _ = run(loss, same, same, where)
        # The two directions may be rounded apart: 72 entries of some 0.1, each by 1e-8.
        at_most = 1e-6 if "factor" in name else 0
        assert np.all(np.abs(values) <= at_most)
        assert at_most or not np.any(grad)


def test_maps_and_factors_see_no_scale():
    student, teacher = draw(1, SHAPE), draw(2, NARROW)
    everything = np.ones_like(mask())
    for loss, other in ((attention, teacher), (factors, draw(2, SHAPE))):
        values = [
            run(loss, student * x, other * y, everything)[0] for x, y in ((1, 1), (2e-8, 3e12))
        ]
        np.testing.assert_allclose(values[0], values[1], rtol=1e-5)
    # Any order of channels, or signs of activations, has the same map.
    flipped = -student[..., ::-1]
    np.testing.assert_allclose(
        run(attention, flipped, flipped[..., :2], everything)[0],
        run(attention, student, student[..., -2:], everything)[0],
        rtol=1e-5,
    )


def test_tokens_narrow_dtypes_and_the_empty_batch():
    s, t = (jnp.asarray(draw(n, (3, 4, 6))) for n in (1, 2))
    row = np.array([True, True, False, True])
    losses = jax.jit(lambda s, t: [f(s, t) for f in (hint, attention, factors, vid_fixed)])
    for found, expected in zip(
        losses(s, t), [each(f.__wrapped__)(*map(np.float64, (s, t)), np.ones((3, 4), bool))
                       for f in (hint_by_hand, maps_by_hand(2, False), factors_by_hand(1), vid_by_hand)]):  # fmt: skip
        np.testing.assert_allclose(found, expected, rtol=2e-5)
    np.testing.assert_allclose(hint(s, t, where=row), hint(s[:, row], t[:, row]), rtol=1e-6)
    for dtype in (jnp.bfloat16, jnp.float16):
        s, t = s.astype(dtype), t.astype(dtype)
        wide = losses(s.astype(jnp.float32), t.astype(jnp.float32))
        for found, expected in zip(losses(s, t), wide):
            assert found.dtype == jnp.float32
            np.testing.assert_allclose(found, expected, rtol=1e-6)
    for found in losses(s[:0], t[:0]):
        assert found.shape == (0,)


def test_against_torch():
    torch = pytest.importorskip("torch")
    student, teacher = draw(1, SHAPE), draw(2, SHAPE)
    s, t = torch.tensor(student), torch.tensor(teacher)
    squared = functools.partial(attention_transfer, squared=True)
    found = jax.jit(lambda *x: [f(*x) for f in (hint, vid_fixed, squared)])(student, teacher)
    mse = torch.nn.functional.mse_loss(s, t, reduction="none").mean((1, 2, 3))
    np.testing.assert_allclose(2 * found[0], mse, rtol=1e-5)
    var = torch.nn.functional.softplus(torch.tensor(np.asarray(PARAMS["raw_variance"]))) + 1e-5
    nll = torch.nn.functional.gaussian_nll_loss(
        s, t, var.expand(s.shape), reduction="none", eps=1e-9
    )
    np.testing.assert_allclose(found[1], nll.mean((1, 2, 3)), rtol=1e-5)
    flat = [torch.nn.functional.normalize(x.pow(2).mean(-1).flatten(1)) for x in (s, t)]
    np.testing.assert_allclose(found[2], (flat[0] - flat[1]).pow(2).sum(-1), rtol=1e-5, atol=1e-7)


def test_variances_of_vid():
    for variance in (1e-3, 1.0, 5.0, 200.0):
        raw = vid_init(3, variance=variance)["raw_variance"]
        np.testing.assert_allclose(jax.nn.softplus(raw), variance, rtol=2e-5)
    # At the least loss, the variance is the mean of squares.
    s, t = draw(1, (400, 1)), draw(2, (400, 1))
    best = float(np.mean((s - t) ** 2))
    slope = jax.jit(jax.grad(lambda p: jnp.mean(vid(p, s, t))))
    # The two halves of the slope are some 0.2 each, known to about 1e-6; elsewhere they differ.
    assert abs(float(slope(vid_init(1, variance=best - 1e-5))["raw_variance"][0])) < 1e-5
    assert float(slope(vid_init(1, variance=best / 2))["raw_variance"][0]) < -0.1
    with pytest.raises(jc.CompressError, match="write vid_init\\(1\\)"):
        vid(vid_init(2), s, t)
    with pytest.raises(jc.CompressError, match="variance=0"):
        vid_init(2, variance=0)


def test_gradients_of_losses_are_matched():
    x = draw(1, (4, 3))
    w, v = draw(2, (3, 5)), draw(3, (3, 5))

    def loss_of(w):
        return lambda x: jnp.sum(jnp.sin(x @ w), axis=-1)

    def by_hand(w, v):
        ours, theirs = (np.cos(np.float64(x) @ y) @ np.float64(y).T for y in (w, v))
        return np.linalg.norm(ours - theirs, axis=-1)

    def total(w, v):
        values = gradient_transfer(loss_of(w), loss_of(v), x)
        squared = gradient_transfer(loss_of(w), loss_of(v), x, x, squared=True)
        return jnp.sum(values), (values, squared)

    run = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    (ours, theirs), (values, squared) = run(w, v)
    np.testing.assert_allclose(values, by_hand(w, v), rtol=1e-5)
    np.testing.assert_allclose(squared, by_hand(w, v) ** 2, rtol=1e-5)
    assert not np.any(theirs)
    way, h = draw(4, (3, 5)).astype(np.float64), 1e-5
    ends = [np.sum(by_hand(w + k * way, v)) for k in (h, -h)]
    np.testing.assert_allclose(np.sum(ours * way), (ends[0] - ends[1]) / (2 * h), rtol=1e-4)
    (same, _), (values, _) = run(v, v)
    assert np.all(np.isfinite(same))
    assert np.all(values < 1e-6)
    with pytest.raises(jc.CompressError, match=r"student inputs \(4, 3\)"):
        gradient_transfer(loss_of(w), loss_of(v), x, x[:2])


def matrices_by_hand(first, second):
    """`[channels, channels]` of `[positions, channels]`."""
    out = np.zeros((first.shape[1], second.shape[1]))
    for a, b in zip(first, second):
        out += np.outer(a, b)
    return out / len(first)


def test_flow_of_two_layers():
    first, second = draw(1, (3, 4, 4, 2)), draw(2, (3, 4, 4, 5))
    wide, other = draw(3, (3, 6, 2)), draw(4, (3, 6, 5))
    flat = lambda x: x.reshape(-1, x.shape[-1]).astype(np.float64)
    ours = np.array([matrices_by_hand(flat(a), flat(b)) for a, b in zip(first, second)])
    theirs = np.array([matrices_by_hand(flat(a), flat(b)) for a, b in zip(wide, other)])
    total = lambda s, t: jnp.sum(fsp(s, t))
    step = jax.jit(lambda s, t: (fsp(s, t), fsp_matrix(*s), jax.grad(total, (0, 1))(s, t)))
    values, matrices, grads = step((first, second), (wide, other))
    np.testing.assert_allclose(matrices, ours, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(values, np.mean((ours - theirs) ** 2, (1, 2)), rtol=1e-5)
    assert not any(np.any(x) for x in grads[1])
    # d/dF_pi = 2 (G - G_t)_ij S_pj / (positions * entries)
    slope = 2 * np.einsum("bij,bxyj->bxyi", ours - theirs, second) / (16 * 10)
    np.testing.assert_allclose(grads[0][0], slope, rtol=1e-4, atol=1e-6)
    where = np.random.default_rng(1).uniform(size=(3, 4, 4)) < 0.5
    bad = np.where(where[..., None], first, np.nan)
    masked = jax.jit(lambda x, y: (fsp_matrix(x, y, where=where), fsp((x, y), (x, y), where=where)))
    found, nothing = masked(bad, second)
    np.testing.assert_array_equal(nothing, 0)
    for i in range(3):
        kept = matrices_by_hand(*(x[i][where[i]].astype(np.float64) for x in (first, second)))
        np.testing.assert_allclose(found[i], kept, rtol=1e-5, atol=1e-6)
    with pytest.raises(jc.CompressError, match="need the same positions"):
        fsp_matrix(first, other)
    with pytest.raises(jc.CompressError, match=r"make a matrix \(3, 2, 5\) and the teacher's"):
        fsp((first, second), (wide, wide))


def test_margins():
    scipy = pytest.importorskip("scipy.special")
    a = np.array([-1e4, -50, -11, -9.9, -3, -1e-3, 0, 0.5, 1.99, 2.01, 5, 30, 1e3, 1e6])
    scale = np.geomspace(0.01, 3.0, a.size)
    # sqrt(2/pi) / erfcx is the density over the tail, without either; in float64 it leaves
    # a**2 * 1e-16 of the difference, so the largest come from its expansion.
    expected = scale * (a - np.sqrt(2 / np.pi) / scipy.erfcx(a / np.sqrt(2)))
    expected[-2:] = -scale[-2:] / a[-2:] * (1 - 2 / a[-2:] ** 2)
    mean = np.float32([*(a * scale), -2.0, 3.0, 0.5])
    found = jax.jit(normal_margin)(mean, np.float32([*-scale, 0.0, 0.0, 2.0]))
    # Below 2, a difference of numbers of up to 2.4 that is at least 0.37, each to some 1e-7 and
    # the logarithm of the tail to 4e-7.
    np.testing.assert_allclose(found[:-3], expected, rtol=3e-6)
    np.testing.assert_array_equal(found[-3:-1], [-2.0, 0.0])

    x = np.random.default_rng(0).normal(0.5, 2.0, (500, 40, 1)).astype(np.float32)
    half = np.arange(40) < 20
    measured = jax.jit(lambda x: [measured_margin(x), measured_margin(x, where=half)])(x)
    np.testing.assert_allclose(measured[0], np.mean(x[x < 0]), rtol=1e-5)
    np.testing.assert_allclose(measured[1], np.mean(x[:, :20][x[:, :20] < 0]), rtol=1e-5)
    # Of 8000 that are negative, of deviation 1.1: the mean is known to 0.013.
    np.testing.assert_allclose(measured[0], found[-1], atol=0.05)
    with pytest.raises(jc.CompressError, match="differ in shape"):
        normal_margin(jnp.zeros(2), jnp.zeros(3))
    with pytest.raises(jc.CompressError, match="margin has the shape"):
        overhaul(x, x, jnp.zeros(2))


def test_lengths_and_directions_at_zero_and_at_the_ends_of_the_range():
    @jax.jit
    def run(x):
        total = lambda x: sum(jnp.sum(length(x, p)) for p in (1, 1.5, 2, 3)) + jnp.sum(unit(x)[0])
        return length(x), length(x, 3), unit(x), jax.grad(total)(x)

    x = np.array(
        [[0, 0, 0], [3e38, 0, 0], [3, -4, 0], [2e-38, 0, 0], [1e-25, -1e-25, 0]], np.float32
    )
    two, three, direction, slope = map(np.asarray, run(x))
    np.testing.assert_allclose(two, [0, 3e38, 5, 0, np.sqrt(2) * 1e-25], rtol=1e-6, atol=3e-38)
    np.testing.assert_allclose(three[2], 91 ** (1 / 3), rtol=1e-6)
    np.testing.assert_allclose(direction[1:3], [[1, 0, 0], [0.6, -0.8, 0]], rtol=1e-6)
    np.testing.assert_array_equal(direction[[0, 3]], 0)
    assert np.all(np.isfinite(slope))
    np.testing.assert_array_equal(slope[0], 0)
    # The sum of the p-norms' slopes, of which that of p = 1 is the sign.
    norms = [
        np.abs(x[2]) ** (p - 1) * np.sum(np.abs(x[2]) ** p) ** (1 / p - 1) for p in (1, 1.5, 2, 3)
    ]
    np.testing.assert_allclose(slope[2], sum(norms) * np.sign(x[2]), rtol=1e-5)


def test_bad_input():
    x = draw(1, (2, 3, 4))
    with pytest.raises(jc.CompressError, match=r"student features \(2, 3, 4\) and teacher features "
                                               r"\(2, 3, 5\).*regressor"):  # fmt: skip
        hint(x, draw(1, (2, 3, 5)))
    with pytest.raises(jc.CompressError, match=r"where has the shape \(2, 3, 1\).*\(2, 3\)"):
        hint(x, x, where=np.ones((2, 3, 1), bool))
    with pytest.raises(jc.CompressError, match=r"write \[batch, \.\.\., channels\]"):
        hint(x[0, 0], x[0, 0])
    with pytest.raises(jc.CompressError, match="more than the channels"):
        attention_transfer(x, x[:, :2])
    with pytest.raises(jc.CompressError, match="positions"):
        attention_transfer(x[0], x[0])
    for bad in (0.5, float("nan")):
        with pytest.raises(jc.CompressError, match="write a power"):
            attention_transfer(x, x, p=bad)
        with pytest.raises(jc.CompressError, match="write a norm"):
            factor_transfer(x, x, p=bad)
    with pytest.raises(jc.CompressError, match="margin=-1"):
        activation_boundaries(x, x, margin=-1.0)


def test_features_without_positions_are_no_loss() -> None:
    x = jnp.ones((2, 0, 3))
    assert hint(x, x).tolist() == activation_boundaries(x, x).tolist() == [0.0, 0.0]
