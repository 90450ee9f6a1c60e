"""Penalties and their proximal steps: against formulas, brute force and optimality conditions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

import jaxcompress as jc
from jaxcompress.pruning.growl import growl, owl_prox
from jaxcompress.pruning.penalties import (
    group_lasso,
    l1,
    sparse_group_lasso,
    weight_elimination,
)
from jaxcompress.pruning.proximal import proximal

RULES = {"w": "vector"}  # the rows of a matrix


def rows(w):
    return np.sqrt((w**2).sum(axis=-1))


def owl(norms, strength, spread, share):
    p = round(share * len(norms))
    weights = [strength + spread * max(p - i, 0) for i in range(1, len(norms) + 1)]
    return float(np.dot(np.sort(norms)[::-1], weights))


# Each with its formula in float64.
PENALTIES = {
    "l1": (l1(0.3, RULES), lambda w: 0.3 * np.abs(w).sum()),
    "group": (group_lasso(0.4, RULES), lambda w: 0.4 * rows(w).sum()),
    "sized": (
        group_lasso(0.4, RULES, size_weights=True),
        lambda w: 0.4 * np.sqrt(w.shape[-1]) * rows(w).sum(),
    ),
    "sparse group": (
        sparse_group_lasso(0.5, RULES, mix=0.25),
        lambda w: 0.5 * (0.25 * np.abs(w).sum() + 0.75 * np.sqrt(w.shape[-1]) * rows(w).sum()),
    ),
    "growl": (growl(0.2, RULES, spread=0.15), lambda w: owl(rows(w), 0.2, 0.15, 1.0)),
    "growl, half": (
        growl(0.2, RULES, spread=0.3, share=0.5),
        lambda w: owl(rows(w), 0.2, 0.3, 0.5),
    ),
}
ELIMINATION = (
    weight_elimination(0.7, RULES, scale=0.5),
    lambda w: 0.7 * ((w / 0.5) ** 2 / (1 + (w / 0.5) ** 2)).sum(),
)


def example(seed=0, shape=(4, 3)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def differences(fn, x, h=1e-5):
    """Central differences in float64; their error is of order h^2."""
    x = x.astype(np.float64)
    out = np.zeros_like(x)
    for i in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[i] = h
        out[i] = (fn(x + step) - fn(x - step)) / (2 * h)
    return out


def slowly(*names):
    """Names, of which those that another one contains are slow."""
    repeats = ("group", "sized", "growl, half")
    mark = pytest.mark.slow
    return [pytest.param(n, marks=mark) if n in repeats else n for n in names]


@pytest.mark.parametrize("name", slowly(*PENALTIES, "elimination"))
def test_value_and_gradient_are_those_of_the_formula(name):
    penalty, formula = PENALTIES.get(name, ELIMINATION)
    w = example()
    value, grad = jax.value_and_grad(penalty)({"w": jnp.asarray(w)})
    # Sums of a dozen float32 terms of about 1, a few roundings of 6e-8 each.
    np.testing.assert_allclose(value, formula(w.astype(np.float64)), rtol=2e-6)
    np.testing.assert_allclose(grad["w"], differences(formula, w), atol=5e-6)
    # The subgradient at zero is zero, of a weight and of a whole group, and never NaN.
    w[1], w[0, 0] = 0, 0
    grad = jax.grad(penalty)({"w": jnp.asarray(w)})["w"]
    assert np.all(np.isfinite(grad))
    assert not np.any(np.asarray(grad)[1])


@pytest.mark.parametrize("name", slowly("group", "sparse group", "growl", "growl, half"))
def test_the_step_lands_where_brute_force_finds_the_minimum(name):
    penalty, formula = PENALTIES[name]
    w = example(1, (3, 2)) * 0.8
    w[2] *= 0.1
    rate = 0.5
    tx = proximal(optax.identity(), penalty, rate)
    params = {"w": jnp.asarray(w)}
    updates, _ = tx.update({"w": jnp.zeros_like(params["w"])}, tx.init(params), params)
    ours = np.asarray(optax.apply_updates(params, updates)["w"], np.float64)

    def objective(x):
        x = x.reshape(w.shape)
        return 0.5 * ((x - w) ** 2).sum() + rate * formula(x)

    options = {"maxiter": 4000, "maxfev": 8000, "xatol": 1e-9, "fatol": 1e-12, "adaptive": True}
    found = min(
        optimize.minimize(objective, start, method="Nelder-Mead", options=options).fun
        for start in (w.ravel(), ours.ravel(), np.full(w.size, 1e-3))
    )
    # A float32 rounding of about 1e-7 times slopes of about 1 moves the objective by 1e-6 at most;
    # the objective is 1-strongly convex, so ours is within sqrt(2e-6) of the minimum in any case.
    assert objective(ours.ravel()) <= found + 1e-6
    assert objective(ours.ravel()) < objective(w.ravel())


def minimax(z):
    """The isotonic regression onto falling sequences, by its minimax formula, in float64."""
    n, total = len(z), np.concatenate([[0], np.cumsum(z)])
    mean = lambda j, k: (total[k + 1] - total[j]) / (k + 1 - j)
    return np.array(
        [min(max(mean(j, k) for k in range(i, n)) for j in range(i + 1)) for i in range(n)]
    )


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 40), min_size=7, max_size=7),
    st.lists(st.integers(0, 16), min_size=7, max_size=7),
)
def test_owl_prox_is_the_minimax_formula(norms, weights):
    norms, weights = np.array(norms) / 8, np.sort(np.array(weights) / 8)[::-1]
    out = np.asarray(JITTED(jnp.float32(norms), jnp.float32(weights)))
    order = np.argsort(-norms, kind="stable")
    expected = np.zeros(7)
    expected[order] = np.maximum(minimax(norms[order] - weights), 0)
    # Eighths are exact, so only the last division rounds.
    np.testing.assert_allclose(out, expected, rtol=2e-7)
    assert np.all(out[expected == 0] == 0)


JITTED = jax.jit(owl_prox)


def test_owl_prox_against_a_quadratic_program():
    # The norm is the largest of a linear form over all permutations, in each a constraint.
    import itertools

    v, weights = np.array([2.0, 1.9, 0.4, 1.1]), np.array([1.0, 0.6, 0.3, 0.1])
    forms = np.array([np.array(weights)[list(p)] for p in itertools.permutations(range(4))])
    cone = {
        "type": "ineq",
        "fun": lambda x: x[-1] - forms @ x[:-1],
        "jac": lambda x: np.concatenate([-forms, np.ones((len(forms), 1))], axis=1),
    }
    solved = optimize.minimize(
        lambda x: 0.5 * ((x[:-1] - v) ** 2).sum() + x[-1],
        np.concatenate([v, [5.0]]), constraints=[cone], bounds=[(0, None)] * 5, method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )  # fmt: skip
    assert solved.success
    # A solver that stops at a gap of g is within sqrt(2 g) of the solution: 2e-7 here, and room.
    np.testing.assert_allclose(
        JITTED(jnp.float32(v), jnp.float32(weights)), solved.x[:-1], atol=1e-5
    )


def test_proximal_gradient_descent_solves_the_lasso():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 12)), rng.normal(size=40)
    a[:, :3] += b[:, None]
    strength, rate = 8.0, 1 / np.linalg.eigvalsh(a.T @ a)[-1]
    loss = lambda p: 0.5 * jnp.sum((jnp.float32(a) @ p["w"] - jnp.float32(b)) ** 2)
    tx = proximal(optax.sgd(rate), l1(strength, {"w": "unstructured"}), rate)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = {"w": jnp.ones(12)}
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=400)[0])
    (params, state) = run((params, tx.init(params)))
    assert int(state.step) == 400
    w = np.asarray(params["w"], np.float64)
    slope = a.T @ (a @ w - b)
    assert 0 < np.count_nonzero(w) < 12
    # The conditions of optimality: the slope is -strength sign(w) there, at most that elsewhere.
    # The slope is a difference of sums of about 40 in float32: 40 * 6e-8 * 10 terms = 2e-5.
    at = w != 0
    np.testing.assert_allclose(slope[at], -strength * np.sign(w[at]), atol=1e-3)
    assert np.all(np.abs(slope[~at]) <= strength + 1e-3)


def test_zeros_are_exact_in_a_stack_of_bfloat16_under_adam_and_accumulation():
    w = jax.random.normal(jax.random.key(0), (2, 6, 4)).astype(jnp.bfloat16)
    params = {"w": w, "empty": jnp.zeros((0, 3)), "b": jnp.ones(4)}
    rules = {"w": "filter", "empty": "vector"}
    inner = optax.MultiSteps(optax.adam(1e-3), 2)
    rate = optax.linear_schedule(0.2, 0.4, 1)
    tx = proximal(inner, group_lasso(10.0, rules), rate)
    state, grads = tx.init(params), jax.tree.map(jnp.ones_like, params)
    update = jax.jit(tx.update)
    first, state = update(grads, state, params)
    assert not any(np.any(x) for x in jax.tree.leaves(first))  # in the middle of an accumulation
    assert int(state.step) == 0
    updates, state = update(grads, state, params)
    assert int(state.step) == 1
    after = optax.apply_updates(params, updates)
    norms = np.sqrt((np.asarray(w, np.float32) ** 2).sum(axis=1))
    zero = np.all(np.asarray(after["w"], np.float32) == 0, axis=1)
    # Adam moves each weight by 1e-3, so a norm by 2.5e-3 at most; none is so near the threshold.
    assert np.all(np.abs(norms - 2.0) > 0.0025)
    np.testing.assert_array_equal(zero, norms < 2.0)
    np.testing.assert_array_equal(zero, ~np.any(np.asarray(after["w"], np.float32), axis=1))
    assert zero.any()
    assert not zero.all()
    assert after["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(after["b"], 0.999, rtol=1e-5)
    for huge in (1e30, 1e-25):  # norms of such weights neither overflow nor vanish
        value = group_lasso(1.0, RULES)({"w": jnp.full((1, 4), huge)})
        np.testing.assert_allclose(value, 2 * huge, rtol=1e-6)
    assert float(ELIMINATION[0]({"w": jnp.full((1, 1), 1e30)})) == pytest.approx(0.7)


def test_the_rate_may_be_an_array_and_change():
    params = {"w": jnp.array([[0.5, -2.0]])}
    zeros = jax.tree.map(jnp.zeros_like, params)
    penalty, after = l1(2.0, RULES), lambda updates: (params["w"] + updates["w"]).tolist()
    for rate in (0.5, np.float32(0.5), np.array(0.5), jnp.float32(0.5)):
        tx = proximal(optax.sgd(0.5), penalty, rate)
        assert after(tx.update(zeros, tx.init(params), params)[0]) == [[0.0, -1.0]]
    make = optax.inject_hyperparams(proximal, static_args=("inner", "penalty"))
    tx = make(optax.sgd(0.5), penalty, learning_rate=0.5)
    state, update = tx.init(params), jax.jit(tx.update)
    assert after(update(zeros, state, params)[0]) == [[0.0, -1.0]]
    state.hyperparams["learning_rate"] = jnp.float32(0.125)
    assert after(update(zeros, state, params)[0]) == [[0.25, -1.75]]


def test_errors_say_what_to_write():
    params = {"w": jnp.ones((4, 4))}
    for bad in (
        lambda: l1(-1.0, RULES), lambda: growl(1.0, RULES, spread=1.0, share=2.0),
        lambda: sparse_group_lasso(1.0, RULES, mix=3.0), lambda: weight_elimination(1.0, RULES, scale=0),
        lambda: l1(True, RULES), lambda: l1(10**400, RULES), lambda: growl(1.0, RULES, spread=np.nan),
        lambda: proximal(optax.sgd(1.0), PENALTIES["l1"][0], jnp.ones(2)),
        lambda: proximal(optax.sgd(1.0), PENALTIES["l1"][0], jnp.float32(-1.0)),
        lambda: proximal(optax.sgd(1.0), PENALTIES["l1"][0], jnp.bool_(True)),
    ):  # fmt: skip
        with pytest.raises(jc.SpecError, match="write"):
            bad()
    with pytest.raises(jc.SpecError, match="add the penalty to the loss"):
        proximal(optax.sgd(1.0), ELIMINATION[0], 1.0)
    with pytest.raises(jc.RuleError, match="no groups to penalize"):
        l1(1.0, {"w": "2:4"})(params)
    with pytest.raises(jc.RuleError, match="matches no leaf"):
        proximal(optax.sgd(1.0), l1(1.0, {"v": "unstructured"}), 1.0).init(params)
    tx = proximal(optax.sgd(1.0), PENALTIES["l1"][0], 1.0)
    with pytest.raises(jc.SpecError, match="needs the params"):
        tx.update(params, tx.init(params))
