"""Contrastive distillation against its definition in float64, and its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from loss_checks import draw

import jaxcompress as jc
from jaxcompress.distillation.contrastive import crd, crd_init, crd_negatives

N, BATCH, K, T = 40, 6, 12, 0.2
KEY = jax.random.key(0)
STUDENT, TEACHER = draw(1, (BATCH, 5)), draw(2, (BATCH, 2, 4))
INDICES = np.array([3, 0, 39, 17, 8, 21])
WHERE = np.array([True, True, False, True, True, False])


@functools.cache
def start(dim=4):
    return jax.jit(functools.partial(crd_init, student_channels=5, teacher_channels=8,
                                     examples=N, dim=dim))(KEY)  # fmt: skip


def negatives():
    return np.random.default_rng(3).integers(0, N, (BATCH, K))


@jax.jit
def run(params, bank, student, teacher, indices, others, where):
    def total(params, student, teacher, bank):
        loss, new = crd(
            params, bank, student, teacher, indices, others, temperature=T, momentum=0.3, where=where
        )  # fmt: skip
        return jnp.sum(loss), (loss, new)

    (_, out), grads = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(
        params, student, teacher, bank
    )
    return *out, grads


def embedded(layer, x):
    out = x.reshape(len(x), -1) @ np.float64(layer["kernel"]) + np.float64(layer["bias"])
    return out / np.linalg.norm(out, axis=1, keepdims=True)


def by_hand(params, bank, student, teacher, others, where, log_z=None):
    """Losses, constants, and both embeddings, by the ratios of probabilities themselves."""
    s, t = embedded(params["student"], student), embedded(params["teacher"], teacher)
    losses, constants = np.zeros(len(s)), []
    for side, (anchor, memory) in enumerate(((s, bank["teacher"]), (t, bank["student"]))):
        memory = np.float64(memory)
        exps = np.array([
            [np.exp(anchor[i] @ memory[j] / T) for j in [INDICES[i], *others[i]]]
            for i in range(len(s))
        ])  # fmt: skip
        z = np.mean(exps[where]) * N if log_z is None else np.exp(log_z[side])
        constants.append(np.log(z))
        p = exps / z
        h = p / (p + K / N)
        losses -= np.log(h[:, 0]) + np.log(1 - h[:, 1:]).sum(1)
    return np.where(where, losses, 0), constants, s, t


@pytest.mark.parametrize("where", [np.ones(BATCH, bool), WHERE])
def test_by_definition(where):
    params, bank = start()
    others = negatives()
    loss, new, grads = run(params, bank, STUDENT, TEACHER, INDICES, others, where)
    expected, constants, s, t = by_hand(params, bank, STUDENT, TEACHER, others, where)
    # Scores of up to 5 are known to 1e-6, and so are the logarithms of which 26 are added.
    np.testing.assert_allclose(loss, expected, rtol=2e-5)
    np.testing.assert_allclose(new["log_z"], constants, rtol=1e-5)
    assert bool(new["started"])
    for name, x in (("student", s), ("teacher", t)):
        memory = np.float64(bank[name])
        for i in np.flatnonzero(where):
            moved = 0.3 * memory[INDICES[i]] + 0.7 * x[i]
            memory[INDICES[i]] = moved / np.linalg.norm(moved)
        np.testing.assert_allclose(new[name], memory, atol=1e-6)
    # Slopes, with the constants where the first batch has set them.
    assert not np.any(grads[2])
    rng, h = np.random.default_rng(4), 1e-5
    ways = jax.tree.map(lambda x: rng.normal(size=x.shape), (params, STUDENT))

    def total(step):
        moved = jax.tree.map(lambda x, way: np.float64(x) + step * way, (params, STUDENT), ways)
        return np.sum(by_hand(moved[0], bank, moved[1], TEACHER, others, where, constants)[0])

    slope = (total(h) - total(-h)) / (2 * h)
    terms = [np.sum(g * w) for g, w in zip(jax.tree.leaves(grads[:2]), jax.tree.leaves(ways))]
    np.testing.assert_allclose(np.sum(terms), slope, rtol=1e-4, atol=1e-4 * np.sum(np.abs(terms)))


def test_the_constants_stay_and_masked_examples_are_nothing():
    params, bank = start()
    _, bank, _ = run(params, bank, STUDENT, TEACHER, INDICES, negatives(), WHERE)
    student, teacher = STUDENT.copy(), TEACHER.copy()
    student[~WHERE] = teacher[~WHERE] = np.nan
    moved = np.where(WHERE, 2.0, 1.0)[:, None]
    loss, new, grads = run(params, bank, student * moved + 1, teacher, INDICES, negatives(), WHERE)
    np.testing.assert_array_equal(new["log_z"], bank["log_z"])
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves((loss, new, grads)))
    for name in ("student", "teacher"):
        np.testing.assert_array_equal(new[name][INDICES[~WHERE]], bank[name][INDICES[~WHERE]])
        lengths = np.linalg.norm(new[name], axis=1)
        np.testing.assert_allclose(lengths, 1, rtol=1e-6)


def test_a_batch_of_which_nothing_counts_starts_nothing():
    params, bank = start()
    nothing = np.zeros(BATCH, bool)
    loss, new, grads = run(params, bank, STUDENT, TEACHER, INDICES, negatives(), nothing)
    assert not np.any(loss)
    assert not any(np.any(g) for g in jax.tree.leaves(grads))
    assert not bool(new["started"])
    np.testing.assert_allclose(new["student"], bank["student"], atol=1e-6)


def test_features_of_zero_give_numbers():
    params, bank = start()
    zero = jax.tree.map(jnp.zeros_like, params)
    found = run(zero, bank, 0 * STUDENT, 0 * TEACHER, INDICES, negatives(), WHERE)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found))


def test_looked_up_and_multiplied_scores_are_the_same():
    # With more examples than negatives times numbers, rows are looked up.
    wide = jax.jit(lambda: crd_init(KEY, 5, 8, 200, dim=4))()
    few = np.random.default_rng(5).integers(0, N, (BATCH, K))
    short = wide[0], {k: v[:N] if v.ndim == 2 else v for k, v in wide[1].items()}
    started = {"started": jnp.array(True), "log_z": jnp.log(jnp.array([200.0, 200.0]))}
    looked = run(wide[0], {**wide[1], **started}, STUDENT, TEACHER, INDICES, few, WHERE)[0]
    # Z is n times a mean, so that of a smaller bank is smaller; K / n is larger: h is the same.
    started["log_z"] = jnp.log(jnp.array([float(N), float(N)]))
    products = run(short[0], {**short[1], **started}, STUDENT, TEACHER, INDICES, few, WHERE)[0]
    np.testing.assert_allclose(looked, products, rtol=1e-5)


def test_negatives():
    labels = np.random.default_rng(1).integers(0, 4, N)
    draw_some = jax.jit(lambda k: [crd_negatives(k, INDICES, 4000, N),
                                   crd_negatives(k, INDICES, 4000, N, labels=labels)])  # fmt: skip
    any_other, other_class = (np.asarray(x) for x in draw_some(KEY))
    for i, row, row_of_class in zip(INDICES, any_other, other_class):
        for drawn, allowed in ((row, np.arange(N) != i), (row_of_class, labels != labels[i])):
            counts = np.bincount(drawn, minlength=N)
            assert not np.any(counts[~allowed])
            # Poisson counts of 100 or more on average: six deviations.
            mean = 4000 / allowed.sum()
            assert np.all(np.abs(counts[allowed] - mean) < 6 * np.sqrt(mean))
    # Where there is no other class, any are drawn.
    one_class = jax.jit(lambda k: crd_negatives(k, INDICES, 50, N, labels=np.zeros(N, int)))(KEY)
    assert np.min(one_class) >= 0
    assert np.max(one_class) < N


@pytest.mark.slow
def test_a_student_learns_to_tell_examples_apart():
    x = jnp.asarray(draw(1, (N, 8)))
    params, bank = jax.jit(lambda k: crd_init(k, 8, 8, N, dim=16))(KEY)
    tx = optax.adam(0.01)

    @jax.jit
    def step(params, bank, state, key):
        order = jax.random.permutation(key, N)[:20]
        others = crd_negatives(key, order, 10, N)

        def total(params):
            loss, new = crd(params, bank, jnp.tanh(x[order]), x[order], order, others)
            return jnp.mean(loss), new

        (loss, bank_), grads = jax.value_and_grad(total, has_aux=True)(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), bank_, state, loss

    state, losses = tx.init(params), []
    for key in jax.random.split(KEY, 300):
        params, bank, state, loss = step(params, bank, state, key)
        losses.append(float(loss))
    assert np.mean(losses[-20:]) < 0.3 * np.mean(losses[:5])
    closest = np.argmax(np.asarray(bank["student"] @ bank["teacher"].T), axis=1)
    assert np.mean(closest == np.arange(N)) > 0.9


def test_bad_input():
    params, bank = start()
    rest = (STUDENT, TEACHER)
    for indices, others, message in (
        (INDICES[:3], negatives(), r"indices \(3,\) and negatives \(6, 12\) for a batch of 6"),
        (INDICES, negatives()[:, :0], "at least one"),
        (INDICES + 1, negatives(), "indices go outside of the bank, which has 0 to 39"),
        (INDICES, negatives() - 40, "negatives go outside"),
    ):
        with pytest.raises(jc.CompressError, match=message):
            crd(params, bank, *rest, indices, others)
    with pytest.raises(jc.CompressError, match="momentum=1"):
        crd(params, bank, *rest, INDICES, negatives(), momentum=1.0)
    with pytest.raises(jc.CompressError, match="temperature=0"):
        crd(params, bank, *rest, INDICES, negatives(), temperature=0.0)
    with pytest.raises(jc.CompressError, match="examples=1"):
        crd_init(KEY, 5, 8, 1)
    with pytest.raises(jc.CompressError, match=r"labels have the shape \(3,\)"):
        crd_negatives(KEY, INDICES, 4, N, labels=np.zeros(3, int))
