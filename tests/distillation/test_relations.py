"""Losses on relations between examples against their definitions, pair by pair, in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_checks import check_against, check_degenerate, check_unmoved_by_masked, draw, run

import jaxcompress as jc
from jaxcompress.distillation.alignment import cka
from jaxcompress.distillation.congruence import correlation_congruence
from jaxcompress.distillation.probabilistic import pkt
from jaxcompress.distillation.relational import rkd_angle, rkd_distance
from jaxcompress.distillation.similarity import similarity_preserving

SHAPE, OTHER = (7, 5), (7, 2, 4)
WHERE = np.array([True, False, True, True, False, True, True])
EVERYONE = np.ones(7, bool)


def of_those_that_count(by_hand):
    """A reference `[b, features] -> [b]`, on the examples that count; the others have zero."""

    @functools.wraps(by_hand)
    def all_of(student, teacher, where):
        out = np.zeros(len(where))
        out[where] = by_hand(*(x.reshape(len(x), -1)[where] for x in (student, teacher)))
        return out

    return all_of


def huber(x, delta=1.0):
    return 0.5 * x * x if abs(x) <= delta else delta * (abs(x) - 0.5 * delta)


@of_those_that_count
def similarity_by_hand(s, t):
    rows = []
    for x in (s, t):
        g = np.array([[a @ b for b in x] for a in x])
        rows.append(np.array([r / np.sqrt(r @ r) for r in g]))
    return np.array([d @ d / len(s) for d in rows[0] - rows[1]])


def distance_by_hand(delta):
    @of_those_that_count
    def by_hand(s, t):
        b = len(s)
        pairs = [(i, j) for i in range(b) for j in range(b) if i != j]
        out = np.zeros(b)
        mean = [np.mean([np.linalg.norm(x[i] - x[j]) for i, j in pairs]) for x in (s, t)]
        for i, j in pairs:
            d = [np.linalg.norm(x[i] - x[j]) / m for x, m in zip((s, t), mean)]
            out[i] += huber(d[0] - d[1], delta) / (b - 1)
        return out

    return by_hand


@of_those_that_count
def angle_by_hand(s, t):
    b, out = len(s), np.zeros(len(s))
    for i in range(b):
        for j in range(b):
            for k in range(b):
                if len({i, j, k}) == 3:
                    cos = []
                    for x in (s, t):
                        u, v = x[i] - x[j], x[k] - x[j]
                        cos.append(u @ v / np.linalg.norm(u) / np.linalg.norm(v))
                    out[j] += huber(cos[0] - cos[1], 0.5) / ((b - 1) * (b - 2))
    return out


def correlation_by_hand(gamma, order):
    def kernel(x, y):
        x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
        if order is None:
            return np.exp(-gamma * np.sum((x - y) ** 2))
        series = [(2 * gamma * (x @ y)) ** p / math.factorial(p) for p in range(order + 1)]
        return np.exp(-2 * gamma) * sum(series)

    @of_those_that_count
    def by_hand(s, t):
        out = [sum((kernel(s[i], s[j]) - kernel(t[i], t[j])) ** 2 for j in range(len(s)))
               for i in range(len(s))]  # fmt: skip
        return np.array(out) / len(s)

    return by_hand


@of_those_that_count
def pkt_by_hand(s, t):
    kernel = lambda x, y: 0.5 * (x @ y / np.linalg.norm(x) / np.linalg.norm(y) + 1)
    out = np.zeros(len(s))
    for i in range(len(s)):
        others = [j for j in range(len(s)) if j != i]
        p, q = ([kernel(x[i], x[j]) for j in others] for x in (t, s))
        p, q = np.array(p) / sum(p), np.array(q) / sum(q)
        out[i] = sum(p * np.log(p / q))
    return out


@of_those_that_count
def cka_by_hand(s, t):
    b = len(s)
    centre = np.eye(b) - np.ones((b, b)) / b
    ours, theirs = (centre @ (x @ x.T) @ centre for x in (s, t))
    ours, theirs = (k / np.sqrt(np.sum(k * k)) for k in (ours, theirs))
    return b * np.sum((ours - theirs) ** 2, axis=1) / 2


linear_huber = functools.partial(rkd_distance, delta=0.2)
angle = functools.partial(rkd_angle, delta=0.5)
series = functools.partial(correlation_congruence, gamma=0.4, order=2)
exact = functools.partial(correlation_congruence, gamma=0.7, order=None)
LOSSES = {
    "similarity": (similarity_preserving, similarity_by_hand),
    "distance": (rkd_distance, distance_by_hand(1.0)),
    "distance_linear": (linear_huber, distance_by_hand(0.2)),
    "angle": (angle, angle_by_hand),
    "series": (series, correlation_by_hand(0.4, 2)),
    "exact": (exact, correlation_by_hand(0.7, None)),
    "pkt": (pkt, pkt_by_hand),
    "cka": (cka, cka_by_hand),
}


SHIFTS = ("distance", "distance_linear", "angle", "cka")


def rotation(n, seed=6):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]


@pytest.mark.parametrize("name", LOSSES)
def test_by_definition(name):
    loss, reference = LOSSES[name]
    student, teacher = draw(1, SHAPE), draw(2, OTHER)
    # Cosines and distances near 1 are known to some 2e-7, and the losses are squares of their
    # differences of about 0.3: to 4e-7 / 0.3 each, ten times in the worst of a few.
    check_against(loss, reference, student, teacher, WHERE, rtol=3e-5)
    check_unmoved_by_masked(loss, student, teacher, WHERE)

    # Scales and rotations change nothing, and shifts for some.
    plain = run(loss, student, teacher, EVERYONE)[0]
    moved = 1e4 * (student @ rotation(5) + (2.0 if name in SHIFTS else 0.0))
    # The rotated features are rounded again, by 6e-8 of up to 5.
    found = run(loss, moved.astype(np.float32), teacher, EVERYONE)[0]
    np.testing.assert_allclose(found, plain, rtol=3e-5)
    # The examples in another order have their values in that order.
    order = np.array([3, 1, 6, 0, 2, 5, 4])
    again = run(loss, student[order], teacher[order], EVERYONE)[0]
    np.testing.assert_allclose(again, plain[order], rtol=3e-5)

    found = check_degenerate(loss, SHAPE, OTHER, WHERE)
    for a in ("zero", "constant"):
        np.testing.assert_allclose(found[a, a][0], 0, atol=1e-12)
        assert np.max(np.abs(found[a, a][1])) < 1e-4
    assert all(np.all(values >= 0) for values, _, _ in found.values())


@functools.cache
def all_losses():
    """Compiled once for each shape, without a mask."""
    return jax.jit(lambda s, t: {name: loss(s, t) for name, (loss, _) in LOSSES.items()})


def test_equal_relations_cost_nothing():
    x = draw(1, (7, 8))
    y = (x @ rotation(8)).astype(np.float32)
    for name, values in all_losses()(y, x).items():
        # Squares of differences of 1e-7; the Huber loss near zero is a square too.
        assert np.all(values < 1e-11), name
        assert np.all(values >= 0), name
    # No mask is a mask of all.
    other = draw(2, (7, 8))
    for name, values in all_losses()(y, other).items():
        expected = LOSSES[name][1](np.float64(y), np.float64(other), EVERYONE)
        np.testing.assert_allclose(values, expected, rtol=3e-5, err_msg=name)


def test_batches_of_one_and_of_none():
    for batch in (1, 0):
        x = draw(1, (batch, 8))
        for name, values in all_losses()(x, 3 * x).items():
            np.testing.assert_allclose(values, np.zeros(batch), atol=1e-12, err_msg=name)


def test_published_sums():
    s, t = draw(1, (7, 8)), draw(2, (7, 8))
    found = all_losses()(s, t)
    norm = lambda x: x @ x.T / np.linalg.norm(x @ x.T, axis=1, keepdims=True)
    frobenius = np.sum((norm(s) - norm(t)) ** 2) / 49
    np.testing.assert_allclose(found["similarity"].mean(), frobenius, rtol=1e-5)
    c = [x - x.mean(0) for x in (s, t)]
    linear = np.sum((c[0].T @ c[1]) ** 2)
    linear /= np.linalg.norm(c[0].T @ c[0]) * np.linalg.norm(c[1].T @ c[1])
    np.testing.assert_allclose(found["cka"].mean(), 1 - linear, rtol=1e-5)


def test_against_torch():
    torch = pytest.importorskip("torch")
    s, t = draw(1, (7, 8)), draw(2, (7, 8))
    found = all_losses()(s, t)
    d = [torch.pdist(torch.tensor(x)) for x in (s, t)]
    loss = torch.nn.functional.huber_loss(*(x / x.mean() for x in d))
    np.testing.assert_allclose(found["distance"].mean(), loss, rtol=1e-5)
    cosines = [
        torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)
        for x in (torch.tensor(s), torch.tensor(t))
    ]
    q, p = (0.5 * (c + 1) * (1 - torch.eye(7)) + 1e-30 for c in cosines)
    q, p = (x / x.sum(1, keepdim=True) for x in (q, p))
    kl = torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(1)
    np.testing.assert_allclose(found["pkt"], kl, rtol=1e-4)


def test_more_examples_than_are_done_at_once():
    # 16 at a time, and 5 more.
    s, t = draw(1, (21, 3)), draw(2, (21, 3))
    where = np.arange(21) != 18
    found = jax.jit(lambda s, t: [f(s, t, where=where) for f in (angle, rkd_distance)])(s, t)
    for values, by_hand in zip(found, (angle_by_hand, distance_by_hand(1.0))):
        expected = by_hand(np.float64(s), np.float64(t), where)
        np.testing.assert_allclose(values, expected, rtol=3e-5)


def test_clusters_far_from_zero():
    # Classes that have nearly collapsed, all of them far away.
    rng = np.random.default_rng(7)
    centres = rng.normal(size=(3, 5))[[0, 0, 1, 1, 2, 2, 2]]
    student = (50 + centres + 1e-2 * rng.normal(size=SHAPE)).astype(np.float32)
    teacher = draw(2, OTHER)
    # Cosines of sides of 1e-2 and 3 are known to 300 times 1e-7, and differ by some 0.3.
    for name in ("distance", "angle"):
        loss, reference = LOSSES[name]
        check_against(loss, reference, student, teacher, EVERYONE, rtol=3e-4)


def test_no_array_has_all_pairs_and_their_features():
    x = jax.ShapeDtypeStruct((256, 1024), jnp.float32)
    for loss in (rkd_distance, rkd_angle):
        grad = jax.jit(jax.grad(lambda s, t, loss=loss: jnp.sum(loss(s, t))))
        temporary = grad.lower(x, x).compile().memory_analysis().temp_size_in_bytes
        # All pairs and their features would be 268 MB, and all triples 67 MB, each several times.
        assert temporary < 150e6, (loss, temporary)


def test_opposite_examples():
    # The student has as opposite what the teacher has as equal, and the other way round.
    student = np.array([[1, 0], [-1, 0], [1, 0], [0, 1], [0, -1], [1, 1], [2, 2]], np.float32)
    teacher = student[::-1].copy()
    for name in ("pkt", "angle", "cka"):
        values, grad, _ = run(LOSSES[name][0], np.pad(student, ((0, 0), (0, 3))), np.pad(
            teacher, ((0, 0), (0, 6))).reshape(OTHER), EVERYONE)  # fmt: skip
        assert np.all(np.isfinite(values))
        assert np.all(np.isfinite(grad))
        assert np.sum(values) > 0.1


def test_bad_input():
    x = draw(1, (4, 3))
    for loss, _ in LOSSES.values():
        with pytest.raises(jc.CompressError, match=r"\(4, 3\) and teacher features \(3, 3\)"):
            loss(x, x[:3])
        with pytest.raises(jc.CompressError, match=r"where has the shape \(3,\), and the batch"):
            loss(x, x, where=np.ones(3, bool))
    for loss in (rkd_distance, rkd_angle):
        with pytest.raises(jc.CompressError, match="delta=0"):
            loss(x, x, delta=0.0)
    with pytest.raises(jc.CompressError, match="gamma=-1"):
        correlation_congruence(x, x, gamma=-1.0)
    with pytest.raises(jc.CompressError, match="order=0"):
        correlation_congruence(x, x, order=0)
