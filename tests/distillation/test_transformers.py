"""Losses of transformers against torch, their definitions in float64, and what leaves them alone."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.distillation.layer_maps import layer_map, over_layers
from jaxcompress.distillation.relations_qkv import (
    attention_kl,
    attention_scores,
    minilm,
    minilm_v2,
    relation_kl,
)
from jaxcompress.distillation.transformers import (
    attention_mse,
    hidden_states,
    patient,
    projection_init,
)

B, H, L, D = 2, 3, 5, 4
REAL = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)


def normal(seed, shape, size=1.0):
    return jax.random.normal(jax.random.key(seed), shape) * size


SCORES = normal(0, (B, H, L, L), 3), normal(1, (B, H, L, L), 3)
STATES = normal(2, (B, L, 6)), normal(3, (B, L, 6))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def attention_reference(student, teacher, real, t=1.0):
    """By loops, in float64; `real [batch, length]`."""
    student, teacher = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    out = []
    for b in range(len(student)):
        n = np.flatnonzero(real[b])
        rows = []
        for h in range(student.shape[1]):
            for q in n:
                p, r = softmax(teacher[b, h, q, n] / t), softmax(student[b, h, q, n] / t)
                rows.append(t * t * np.sum(p * np.log(p / r)))
        out.append(np.mean(rows))
    return np.array(out)


def scores_reference(x, heads):
    x = np.asarray(x, np.float64).reshape(B, L, heads, -1)
    return np.stack(
        [[x[b, :, h] @ x[b, :, h].T / np.sqrt(x.shape[-1]) for h in range(heads)] for b in range(B)]
    )


@pytest.mark.parametrize("real", [np.ones_like(REAL), REAL])
def test_attention_kl_and_mse_by_definition(real):
    where = None if real.all() else real
    found = jax.jit(attention_kl)(*SCORES, where=where)
    # Each divergence is a sum of L terms of size up to 6, and the softmax errs by a few eps.
    np.testing.assert_allclose(found, attention_reference(*SCORES, real), rtol=2e-6)
    soft = attention_kl(*SCORES, temperature=3.0, where=where)
    np.testing.assert_allclose(soft, attention_reference(*SCORES, real, 3.0), rtol=1e-5)
    mse = attention_mse(*SCORES, where=where)
    for b in range(B):
        n = np.flatnonzero(real[b])
        s, t = (np.asarray(x, np.float64)[b][:, n][:, :, n] for x in SCORES)
        np.testing.assert_allclose(mse[b], np.mean((s - t) ** 2), rtol=1e-6)


def test_attention_against_torch():
    torch = pytest.importorskip("torch")
    s, t = (torch.tensor(np.asarray(x)) for x in SCORES)
    s.requires_grad_()
    rows = torch.nn.functional.kl_div(
        torch.log_softmax(s, -1), torch.log_softmax(t, -1), reduction="none", log_target=True
    )
    loss = rows.sum(-1).mean((1, 2))
    np.testing.assert_allclose(attention_kl(*SCORES), loss.detach().numpy(), rtol=1e-5)
    loss.sum().backward()
    grad = jax.grad(lambda s: attention_kl(s, SCORES[1]).sum())(SCORES[0])
    np.testing.assert_allclose(grad, s.grad.numpy(), rtol=1e-4, atol=1e-7)
    logs = attention_kl(jax.nn.log_softmax(SCORES[0]), jax.nn.log_softmax(SCORES[1]))
    np.testing.assert_allclose(logs, attention_kl(*SCORES), rtol=1e-5)


def test_masks_of_pairs_and_queries_that_see_nothing():
    causal = np.tril(np.ones((L, L), bool))
    student, teacher = SCORES
    found = attention_kl(student, teacher, where=causal[None, None])
    hidden = [jnp.where(causal, x, -jnp.inf) for x in SCORES]  # as a model masks them itself
    np.testing.assert_allclose(found, attention_kl(*hidden), rtol=1e-6)
    nothing = causal.copy()
    nothing[0] = False
    less = attention_kl(student, teacher, where=nothing[None, None])
    # The first row sees itself alone, and its divergence is 0: without it, the mean has one less.
    np.testing.assert_allclose(less * (L - 1), found * L, rtol=1e-6)
    none = jax.grad(lambda s: attention_kl(s, teacher, where=np.zeros_like(REAL)).sum())
    np.testing.assert_array_equal(none(student), np.zeros_like(student))


def test_relations_by_definition():
    student, teacher = normal(4, (B, L, 2, 6)), normal(5, (B, L, 24), 2.0)
    relations = (scores_reference(student, 4), scores_reference(teacher, 4))
    found = relation_kl(student, teacher, heads=4, where=REAL)
    np.testing.assert_allclose(found, attention_reference(*relations, REAL), rtol=1e-5)
    np.testing.assert_allclose(
        attention_scores(teacher, teacher, heads=4), relations[1], rtol=1e-5, atol=1e-6
    )
    qkv = [
        tuple(normal(n, (B, L, H, depth)) for n in range(k, k + 3)) for k, depth in ((6, D), (9, 7))
    ]
    (q, k, v), (tq, tk, tv) = (
        tuple(np.asarray(x, np.float64).transpose(0, 2, 1, 3) for x in xs) for xs in qkv
    )
    swap = lambda x: x.transpose(0, 1, 3, 2)
    attention = attention_reference(q @ swap(k) / np.sqrt(D), tq @ swap(tk) / np.sqrt(7), REAL)
    value = attention_reference(v @ swap(v) / np.sqrt(D), tv @ swap(tv) / np.sqrt(7), REAL)
    np.testing.assert_allclose(minilm(*qkv, where=REAL), attention + value, rtol=1e-5)
    wide = [tuple(normal(n, (B, L, w)) for n in (20, 21, 22)) for w in (12, 24)]
    each = [
        attention_reference(scores_reference(s, 6), scores_reference(t, 6), REAL)
        for s, t in zip(*wide)
    ]
    found = minilm_v2(*wide, heads=6, weights=(1.0, 2.0, 0.5), where=REAL)
    np.testing.assert_allclose(found, each[0] + 2 * each[1] + 0.5 * each[2], rtol=1e-5)


def test_relations_know_no_rotation_of_heads_and_no_order_of_tokens():
    student, teacher = normal(4, (B, L, H, D)), normal(5, (B, L, H, 6))
    base = relation_kl(student, teacher)
    turn = jnp.linalg.qr(normal(6, (H, D, D)))[0]
    turned = jnp.einsum("blhd,hde->blhe", student, turn, precision="highest")
    np.testing.assert_allclose(relation_kl(turned, teacher), base, rtol=1e-5)
    order = np.array([3, 0, 4, 1, 2])
    moved = relation_kl(student[:, order], teacher[:, order])
    np.testing.assert_allclose(moved, base, rtol=1e-5)
    np.testing.assert_array_equal(relation_kl(student, student), np.zeros(B))


def test_hidden_states_and_projections():
    projection = normal(7, (6, 8), 0.3)
    teacher = normal(8, (B, L, 8))
    student = STATES[0]
    found = hidden_states(student, teacher, projection=projection, where=REAL)
    product = np.asarray(student, np.float64) @ np.asarray(projection, np.float64)
    for b in range(B):
        gap = (product - np.asarray(teacher, np.float64))[b, REAL[b]]
        np.testing.assert_allclose(found[b], np.mean(gap**2), rtol=1e-5)
    torch = pytest.importorskip("torch")
    plain = torch.nn.functional.mse_loss(
        *(torch.tensor(np.asarray(x)) for x in STATES), reduction="none"
    )
    np.testing.assert_allclose(hidden_states(*STATES), plain.mean((1, 2)).numpy(), rtol=1e-6)
    start = projection_init(jax.random.key(0), 4, 6)
    np.testing.assert_allclose(start @ start.T, np.eye(4), atol=1e-6)
    np.testing.assert_array_equal(projection_init(jax.random.key(0), 4, 4), np.eye(4))
    half = projection_init(jax.random.key(0), 4, 6, jnp.bfloat16)
    np.testing.assert_array_equal(half, start.astype(jnp.bfloat16))


def test_patient_against_torch_and_at_zero():
    torch = pytest.importorskip("torch")
    norm = lambda x: torch.nn.functional.normalize(torch.tensor(np.asarray(x))[:, 0], dim=-1)
    expected = (norm(STATES[0]) - norm(STATES[1])).square().sum(-1).numpy()
    np.testing.assert_allclose(patient(*STATES), expected, rtol=1e-5)
    for size in (1e-30, 1e30):  # no square vanishes or overflows
        np.testing.assert_allclose(patient(STATES[0] * size, STATES[1]), expected, rtol=1e-4)
    value, grad = jax.value_and_grad(lambda s: patient(s, STATES[1]).sum())(0 * STATES[0])
    np.testing.assert_allclose(value, B, rtol=1e-6)
    np.testing.assert_array_equal(grad, np.zeros_like(grad))


LOSSES = {
    "attention_kl": (attention_kl, SCORES),
    "attention_mse": (attention_mse, SCORES),
    "relation_kl": (relation_kl, (normal(4, (B, L, H, D)), normal(5, (B, L, H, D)))),
    "hidden_states": (hidden_states, STATES),
    "patient": (patient, STATES),
}


@pytest.mark.parametrize("name", LOSSES)
def test_derivatives_dtypes_and_equality(name):
    loss, (student, teacher) = LOSSES[name]
    total = jax.jit(lambda s, t: jnp.sum(loss(s, t)))
    grads = jax.grad(total, argnums=(0, 1))(student, teacher)
    assert not np.any(grads[1])
    towards = normal(11, student.shape)
    step = 2.0**-7
    slope = (
        total(student + step * towards, teacher) - total(student - step * towards, teacher)
    ) / (2 * step)
    # Of order step**2 = 6e-5, and eps / step = 2e-5 from rounding; the losses are about 1 to 30.
    np.testing.assert_allclose(jnp.vdot(grads[0], towards), slope, rtol=2e-3, atol=2e-3)
    np.testing.assert_array_equal(loss(teacher, teacher), np.zeros(B))
    assert np.all(loss(student, teacher) > 0)
    for dtype in (jnp.bfloat16, jnp.float16):
        narrow = [x.astype(dtype) for x in (student, teacher)]
        found = loss(*narrow)
        assert found.dtype == jnp.float32
        wide = loss(*(x.astype(jnp.float32) for x in narrow))
        np.testing.assert_allclose(found, wide, rtol=1e-6)
    np.testing.assert_allclose(
        jax.vmap(loss)(student[:, None], teacher[:, None])[:, 0], loss(student, teacher), rtol=1e-5
    )


@pytest.mark.parametrize("name", ["attention_kl", "attention_mse", "relation_kl", "hidden_states"])
@pytest.mark.parametrize("fill", [jnp.inf, jnp.nan])
def test_padding_may_hold_anything(name, fill):
    loss, (student, teacher) = LOSSES[name]
    scores = name.startswith("attention")
    real = REAL[:, None, :, None] & REAL[:, None, None, :] if scores else REAL
    real = real.reshape(*real.shape, *[1] * (student.ndim - real.ndim))
    dirty = [jnp.where(real, x, fill) for x in (student, teacher)]
    run = jax.value_and_grad(lambda s, t: loss(s, t, where=REAL).sum())
    value, grad = run(*dirty)
    expected, clean = run(student, teacher)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(grad, clean, rtol=1e-6)
    np.testing.assert_array_equal(np.where(real, 0, grad), np.zeros_like(grad))
    cut = [x[1:, :, :3, :3] if scores else x[1:, :3] for x in (student, teacher)]
    np.testing.assert_allclose(loss(student, teacher, where=REAL)[1:], loss(*cut), rtol=1e-6)


def test_layer_maps_as_published():
    assert [n + 1 for n in layer_map(4, 12)] == [3, 6, 9, 12]  # TinyBERT, n = 3 m
    assert [n + 1 for n in layer_map(6, 12)[:-1]] == [2, 4, 6, 8, 10]  # PKD-Skip
    assert [n + 1 for n in layer_map(6, 12, "last")[:-1]] == [7, 8, 9, 10, 11]  # PKD-Last
    assert [n + 1 for n in layer_map(3, 12)[:-1]] == [4, 8]
    assert [n + 1 for n in layer_map(3, 12, "last")[:-1]] == [10, 11]
    assert layer_map(6, 12, "spread") == (0, 2, 4, 7, 9, 11)
    assert layer_map(2, 5, "first") == (0, 1)
    assert layer_map(1, 7, "spread") == (0,)


@hypothesis.given(
    st.integers(1, 30), st.integers(0, 30), st.sampled_from(["uniform", "spread", "first", "last"])
)
def test_layer_maps_increase_and_stay_within(m, more, strategy):
    n = m + more
    found = layer_map(m, n, strategy)
    assert len(found) == m
    assert all(a < b for a, b in itertools.pairwise(found))
    assert found[0] >= 0
    assert found[-1] < n
    if strategy in ("uniform", "last"):
        assert found[-1] == n - 1
    if strategy in ("first", "spread"):
        assert found[0] == 0
    if more == 0:
        assert found == tuple(range(n))


def test_over_layers_of_lists_and_stacks():
    student, teacher = normal(12, (3, B, L, 6)), normal(13, (6, B, L, 6))
    layers = layer_map(3, 6)[:-1]
    expected = sum(hidden_states(student[i], teacher[n]) for i, n in ((0, 1), (1, 3)))
    np.testing.assert_allclose(over_layers(hidden_states, student, teacher, layers), expected)
    found = over_layers(hidden_states, list(student), list(teacher), layers, where=None)
    np.testing.assert_allclose(found, expected)
    qkv = [tuple(normal(n, (k, B, L, 6)) for n in (1, 2, 3)) for k in (3, 6)]
    trees = [dict(zip("qkv", x)) for x in qkv]
    last = functools.partial(minilm_v2, heads=2)
    each = lambda s, t: last(tuple(s[n] for n in "qkv"), tuple(t[n] for n in "qkv"))
    direct = last(tuple(x[0] for x in qkv[0]), tuple(x[5] for x in qkv[1]))
    np.testing.assert_allclose(over_layers(each, *trees, (5,)), direct)


def test_bad_shapes():
    bad = functools.partial(pytest.raises, jc.CompressError)
    with bad(match="must be of one shape"):
        attention_kl(SCORES[0], SCORES[1][:, :2])
    with bad(match=r"where \(2, 4\) is not the \[batch, length\]"):
        attention_kl(*SCORES, where=REAL[:, :4])
    with bad(match="does not broadcast to scores"):
        attention_kl(*SCORES, where=np.ones((3, 1, 5, 5)))
    with bad(match="say how many heads"):
        relation_kl(*STATES)
    with bad(match="width 6 cannot be split into 4 heads"):
        relation_kl(*STATES, heads=4)
    with bad(match="differ in more than their length"):
        attention_scores(jnp.ones((1, 2, 3, 4)), jnp.ones((1, 2, 3, 5)))
    with bad(match="differ in width; write projection"):
        hidden_states(STATES[0], jnp.ones((B, L, 8)))
    with bad(match="does not fit hidden states"):
        hidden_states(STATES[0], jnp.ones((B, L, 8)), projection=jnp.ones((8, 6)))
    with bad(match="have no token 5"):
        patient(*STATES, token=5)
    with bad(match=r"write its \(query, key, value\)"):
        minilm(SCORES, SCORES)
    with bad(match="at least 1 and at most 3"):
        layer_map(4, 3)
    with bad(match="write one of uniform, spread, first, last"):
        layer_map(1, 3, "skip")
    with bad(match="has none of number 3"):
        over_layers(hidden_states, STATES, STATES, (0, 3))
    with bad(match="write 1 to 2"):
        over_layers(hidden_states, STATES, STATES, ())
