"""Algorithms of `sparsify` against loops written out in numpy, and what holds for all of them."""

import eight_devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from test_select import reference_mask

import jaxcompress as jc
from jaxcompress import pruning as P
from jaxcompress.pruning.algorithms.base import Moment, draws
from jaxcompress.pruning.algorithms.redistribute import shared_out
from jaxcompress.pruning.moments import owned

RULES = {"**/kernel": "unstructured"}
ALGORITHMS = {
    "lamp": P.magnitude(allocation="lamp"),
    "random": P.random(),
    "set": P.set_(),
    "rigl": P.rigl(end=40),
    "gse": P.gse(),
    "snfs": P.snfs(initial="magnitude"),
    "dsr": P.dsr(threshold=1.0),
    "deep_r": P.deep_r(0.01, temperature=1e-3),
    "straight_through": P.straight_through(),
    "top_kast": P.top_kast(backward=0.5, l2=1e-3),
    "movement": P.movement(scope="global"),
    "taylor": P.taylor(),
}


def tree(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "a": {"kernel": jax.random.normal(keys[0], (8, 12), dtype), "bias": jnp.ones(12, dtype)},
        "stack": {"kernel": jax.random.normal(keys[2], (3, 6, 4), dtype)},
    }


def waves(p):
    """A gradient that is another at each place."""
    return jnp.sin(3 * p + jnp.arange(p.size, dtype=p.dtype).reshape(p.shape))


def steps(tx, params, n, grad=waves):
    """So many steps in one scan: the params, the state, and masks and nonzeros after each."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.tree.map(grad, params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), [(p["kernel"], m["kernel"]) for p, m in
                                 zip(params.values(), state.masks.values())]  # fmt: skip

    run = jax.jit(lambda carry: lax.scan(step, carry, length=n))
    return run((params, tx.init(params)))


def some(names, fast):
    """The names as parameters, those that others stand for among the slow ones."""
    return [n if n in fast else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize(
    "name", some(ALGORITHMS, ("lamp", "rigl", "snfs", "dsr", "deep_r", "movement"))
)
def test_as_many_weights_as_the_schedule_says_after_every_update(name):
    schedule = P.cubic_schedule(0.8, begin=2, end=17, every=4)
    dtype = jnp.bfloat16 if name in ("rigl", "movement") else jnp.float32
    tx = jc.sparsify(optax.adam(0.2), ALGORITHMS[name], schedule, RULES)
    (params, _), seen = steps(tx, tree(dtype), 24)
    masks = [np.asarray(m).reshape(24, -1).sum(1) for _, m in seen]
    total = masks[0] + masks[1]
    now, first = 168, 168
    lost = 2 if name in ("random", "set", "rigl", "gse", "deep_r") else 0
    for t in range(24):
        if schedule.refreshes(t):
            way = (np.float32(np.clip(17 - t, 0, 15)) / np.float32(15)) ** 3
            ends = [P.kept_count(n, 0.8) for n in (96, 24, 24, 24)]
            now = sum(
                last + int(np.round(way * np.float32(n - last)))
                for n, last in zip((96, 24, 24, 24), ends)
            )
        # Allocations give a remainder to some leaves, and the ends are rounded as a whole.
        assert abs(total[t] - now) <= 2 + lost, (t, total[t], now)
    assert total[0] == first
    final = P.kept_count(168, 0.8) if lost or name in ("lamp", "movement") else sum(ends)
    assert final - lost <= total[-1] <= final
    for (weights, mask), p in zip(seen, params.values()):
        assert not np.any(np.asarray(weights, np.float32)[~np.asarray(mask)])
        assert p["kernel"].dtype == dtype
        assert np.all(np.isfinite(np.asarray(p["kernel"], np.float32)))
    if name in ("set", "rigl", "gse", "snfs", "dsr", "straight_through"):
        came = [
            np.any(m[t + 1] & ~m[t])
            for m in map(np.asarray, (seen[0][1], seen[1][1]))
            for t in range(23)
        ]
        assert any(came), "no weight came back"


def rigl_step(w, g, mask, kept, share):
    """A choice of RigL in numpy, from the paper's algorithm 1."""
    active = int(mask.sum())
    gone = int(np.round(np.float32(share) * np.float32(active)))
    stay = reference_mask(np.where(mask, np.abs(w) + 1e-6, 0), active - gone)
    grown = reference_mask(np.where(stay, 0, np.abs(g) + 1e-6), kept - int(stay.sum()))
    return stay | grown


def test_rigl_is_the_published_loop():
    rng = np.random.default_rng(0)
    target = rng.normal(size=(9, 11)).astype(np.float32)
    w = rng.normal(size=(9, 11)).astype(np.float32)
    tx = jc.sparsify(
        optax.sgd(0.1, momentum=0.9), P.rigl(drop=0.3, end=20, initial="magnitude"),
        P.periodic(0.7, every=3), {"w": "unstructured"},
    )  # fmt: skip
    params, momentum = {"w": jnp.asarray(w)}, np.zeros_like(w)
    state = tx.init(params)
    mask, kept = np.ones_like(w, bool), P.kept_count(99, 0.7)
    scale = rng.uniform(0.1, 1, size=(9, 11)).astype(np.float32)
    update = jax.jit(tx.update)
    for t in range(24):
        gradient = scale * (w - target)
        updates, state = update({"w": jnp.asarray(gradient)}, state, params)
        if t % 3 == 0:
            share = 0.3 * 0.5 * (1 + np.cos(np.pi * min(1, t / 20)))
            new = reference_mask(w, kept) if t == 0 else rigl_step(w, gradient, mask, kept, share)
            momentum[new & ~mask] = 0
            mask = new
        momentum = np.where(mask, gradient, 0) + np.float32(0.9) * momentum
        w = np.where(mask, w - np.float32(0.1) * momentum, 0)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(state.masks["w"], mask, err_msg=str(t))
        # Two float32 roundings of each of 24 steps, on values below 8.
        np.testing.assert_allclose(params["w"], w, atol=24 * 2 * 8 * 2**-24)
        w = np.array(params["w"])


def test_movement_is_the_published_loop():
    """S collects -w g, the largest S stay, and only what is in the mask is trained."""
    rng = np.random.default_rng(1)
    w = rng.normal(size=(5, 7)).astype(np.float32)
    tx = jc.sparsify(
        optax.sgd(0.1), P.movement(), P.periodic(0.6, every=2, begin=1), {"w": "unstructured"}
    )
    params, state = {"w": jnp.asarray(w)}, None
    state = tx.init(params)
    mask, score = np.ones_like(w, bool), np.zeros_like(w)
    for t in range(9):
        gradient = rng.normal(size=w.shape).astype(np.float32)
        updates, state = tx.update({"w": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        score = score - gradient * w
        if t % 2 == 1:
            order = np.argsort(-score.ravel(), kind="stable")
            mask = np.zeros(35, bool)
            mask[order[: P.kept_count(35, 0.6)]] = True
            mask = mask.reshape(w.shape)
        w = w - np.float32(0.1) * np.where(mask, gradient, 0)
        np.testing.assert_array_equal(params["w"] != 0, mask)
        np.testing.assert_allclose(params["w"], np.where(mask, w, 0), atol=1e-5)
        np.testing.assert_allclose(state.memory.dense[0], w, atol=1e-5)


def test_straight_through_trains_the_dense_copy():
    rng = np.random.default_rng(2)
    w = rng.normal(size=(5, 7)).astype(np.float32)
    tx = jc.sparsify(
        optax.sgd(0.5), P.straight_through(), P.periodic(0.6, every=1), {"w": "unstructured"}
    )
    params = {"w": jnp.asarray(w)}
    state = tx.init(params)
    for _ in range(6):
        gradient = rng.normal(size=w.shape).astype(np.float32)
        updates, state = tx.update({"w": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        mask = reference_mask(w, P.kept_count(35, 0.6))
        w = w - np.float32(0.5) * gradient
        np.testing.assert_array_equal(state.memory.dense[0], w)
        np.testing.assert_array_equal(params["w"] != 0, mask)
        np.testing.assert_allclose(params["w"], np.where(mask, w, 0), rtol=3e-7, atol=3e-7)


def test_top_kast_updates_its_larger_set_alone():
    w = jnp.arange(1.0, 21.0).reshape(4, 5)
    tx = jc.sparsify(
        optax.sgd(1.0), P.top_kast(backward=0.5, l2=0.25), P.one_shot(0.8), {"w": "unstructured"}
    )
    _, state = tx.update({"w": jnp.ones((4, 5))}, tx.init({"w": w}), {"w": w})
    flat = np.asarray(w).ravel()
    expected = np.where(
        flat > 16, flat - 1 - 0.25 * flat, np.where(flat > 10, flat - 1 - 0.25 / 0.2 * flat, flat)
    )
    np.testing.assert_allclose(state.memory.dense[0].ravel(), expected, rtol=1e-6)
    assert int(state.masks["w"].sum()) == 4


def test_deep_rewiring_drops_what_crosses_zero():
    w = jnp.array([[0.5, -0.5, 0.2, -0.2]])
    tx = jc.sparsify(
        optax.sgd(1.0), P.deep_r(1.0, l1=0.0, initial="magnitude"), P.periodic(0.5, every=1),
        {"w": "unstructured"},
    )  # fmt: skip
    state, params = tx.init({"w": w}), {"w": w}
    updates, state = tx.update({"w": jnp.array([[0.7, 0.7, 0, 0]])}, state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], [[-0.2, -1.2, 0, 0]], atol=1e-6)
    updates, state = tx.update({"w": jnp.zeros((1, 4))}, state, params)
    mask = np.asarray(state.masks["w"])[0]
    assert mask[1], "it kept its sign"
    assert mask.sum() == 2
    assert optax.apply_updates(params, updates)["w"][0, 1] == params["w"][0, 1]


def test_deep_rewiring_pulls_and_shakes_by_its_formula():
    w = jnp.where(jnp.arange(20_000) % 2 == 0, 5.0, -5.0).reshape(100, 200)
    tx = jc.sparsify(
        optax.sgd(0.1),
        P.deep_r(0.1, l1=2.0, temperature=0.05),
        P.one_shot(0.0),
        {"w": "unstructured"},
    )
    updates, _ = tx.update({"w": jnp.zeros_like(w)}, tx.init({"w": w}), {"w": w})
    noise = np.asarray(updates["w"] + 0.1 * 2.0 * jnp.sign(w)).ravel()
    deviation = np.sqrt(2 * 0.1 * 0.05)
    # Five standard errors of a mean and of a standard deviation of 20,000 values.
    assert abs(noise.mean()) < 5 * deviation / np.sqrt(20_000)
    assert abs(noise.std() / deviation - 1) < 5 / np.sqrt(2 * 20_000)


def test_dsr_doubles_and_halves_its_threshold():
    params = {"w": jnp.arange(1.0, 101.0).reshape(10, 10)}
    grads = {"w": jnp.zeros((10, 10))}
    dsr = P.dsr(drop=0.1, initial="magnitude")
    tx = jc.sparsify(optax.sgd(0.0), dsr, P.periodic(0.0, every=1), {"w": "unstructured"})
    update = jax.jit(tx.update)
    _, state = update(grads, tx.init(params), params)
    for threshold, factor in ((2.0, 2.0), (10.5, 1.0), (50.0, 0.5)):
        memory = state.memory._replace(own=jnp.float32(threshold))
        _, then = update(grads, state._replace(memory=memory), params)
        assert float(then.memory.own) == threshold * factor


def test_sparse_momentum_moves_weights_to_the_leaf_of_larger_momentum():
    params = {k: {"kernel": jnp.full((10, 10), 1.0)} for k in "ab"}
    grads = {"a": {"kernel": jnp.full((10, 10), 0.01)}, "b": {"kernel": jnp.full((10, 10), 1.0)}}
    tx = jc.sparsify(optax.sgd(1e-3), P.snfs(drop=0.5), P.periodic(0.8, every=1), RULES)
    state = tx.init(params)
    counts = []
    for _ in range(3):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        counts.append([int(m["kernel"].sum()) for m in state.masks.values()])
    assert counts[0] == [20, 20]
    # 10 of each stay; 20 are divided 0.01 to 1.0: all but none to the second, rounded down.
    assert counts[1] == [11, 29]
    assert all(sum(c) == 40 for c in counts)


share_out = jax.jit(shared_out)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 10_000)), min_size=1, max_size=6),
    st.data(),
)
def test_what_is_shared_out_is_exact_and_fits(parts, data):
    parts = [*parts, *[(0.0, 0)] * (6 - len(parts))]  # one shape
    weights, room = zip(*parts)
    total = data.draw(st.integers(0, sum(room)))
    found = np.asarray(
        share_out(jnp.int32(total), jnp.asarray(weights, jnp.float32), jnp.asarray(room, jnp.int32))
    )
    assert found.sum() == total
    assert np.all(found >= 0)
    assert np.all(found <= room)


INNER = {
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2),
    "momentum": lambda: optax.sgd(1e-2, momentum=0.9),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "lion": lambda: optax.lion(1e-2),
    "rmsprop": lambda: optax.rmsprop(1e-2, momentum=0.5),
    "adagrad": lambda: optax.adagrad(1e-2),
    "muon": lambda: optax.contrib.muon(1e-2),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-2), 2),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(1e-2),
    "masked": lambda: optax.masked(optax.adam(1e-2), {"a": True, "stack": False}),
}


@pytest.mark.parametrize("name", some(INNER, ("adam", "adafactor", "muon", "MultiSteps")))
def test_moments_of_regrown_weights_begin_anew(name):
    """At a choice: as the wrapped optimizer alone on a state that was set back by hand."""
    inner = INNER[name]()
    params = {"a": {"kernel": jnp.linspace(-1, 1, 48).reshape(8, 6), "bias": jnp.ones(6)},
              "stack": {"kernel": jnp.linspace(1, 2, 24).reshape(2, 4, 3)}}  # fmt: skip
    tx = jc.sparsify(inner, P.set_(drop=0.5), P.periodic(0.5, every=1), RULES)
    state = tx.init(params)
    plain = optax.with_extra_args_support(inner)
    update, alone, seen = jax.jit(tx.update), jax.jit(plain.update), 0
    for t in range(4):
        grads = jax.tree.map(lambda p, t=t: jnp.cos(5 * p + t), params)
        updates, then = update(grads, state, params)
        new = [
            np.asarray(a["kernel"] & ~b["kernel"])
            for a, b in zip(then.masks.values(), state.masks.values())
        ]
        seen += sum(int(x.sum()) for x in new)
        before = by_hand(state.inner, plain.init(params), new)
        _, expected = alone(P.apply_masks(grads, then.masks), before, params)
        for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(then.inner)):
            np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-7)
        params, state = optax.apply_updates(params, updates), then
    assert seen


def by_hand(state, fresh, regrown):
    """Every array of a kernel's shape whose path names that kernel, set back where it regrew."""
    names = {("a", (8, 6)): regrown[0], ("stack", (2, 4, 3)): regrown[1]}
    flat, structure = jax.tree_util.tree_flatten_with_path(state)
    out = []
    for (path, x), y in zip(flat, jax.tree.leaves(fresh)):
        text = jax.tree_util.keystr(path)
        for (owner, shape), mask in names.items():
            if f"'{owner}'" in text and "'kernel'" in text and np.shape(x) == shape:
                x = jnp.where(mask, y, x)
        out.append(x)
    return jax.tree.unflatten(structure, out)


def test_moments_belong_to_the_leaf_with_the_longest_path():
    params = {"kernel": jnp.ones((2, 2)), "a": {"kernel": jnp.ones((2, 2))}}
    tx = optax.adam(1.0)
    state = jax.tree.map(lambda x: x + 3, tx.init(params))
    found = owned(state, tx.init(params), params, [1])
    assert [x.tolist() for x in found.starts[0]] == [[[0, 0], [0, 0]]] * 2
    back = found.put([[jnp.eye(2), x] for x, _ in found.moments()])
    assert back[0].mu["kernel"].tolist() == [[1, 0], [0, 1]]
    assert back[0].nu["kernel"].tolist() == [[3, 3], [3, 3]]
    assert back[0].mu["a"]["kernel"].tolist() == [[3, 3], [3, 3]]


@pytest.mark.parametrize(
    "pattern", some(["2:4", "1:2@-1", "block:2x2", "filter", "channel"], ("2:4", "block:2x2"))
)
def test_rigl_in_every_pattern(pattern):
    share = 0.5
    tx = jc.sparsify(optax.adam(1e-2), P.rigl(), P.periodic(share, every=2), {"**/kernel": pattern})
    params = {"a": {"kernel": jax.random.normal(jax.random.key(0), (8, 12))}}
    _, [(_, masks)] = steps(tx, params, 9)
    masks = np.asarray(masks)
    assert np.any(masks[-1] & ~masks[0])
    assert np.all(masks.reshape(9, -1).sum(1) == 48)
    for mask in masks:
        if pattern == "2:4":
            assert np.all(mask.reshape(2, 4, 12).sum(1) == 2)
        elif pattern == "1:2@-1":
            assert np.all(mask.reshape(8, 6, 2).sum(2) == 1)
        elif pattern == "block:2x2":
            assert np.isin(mask.reshape(4, 2, 6, 2).sum((1, 3)), (0, 4)).all()
        else:
            assert np.isin(mask.sum(0 if pattern == "filter" else 1), (0, 8, 12)).all()


def test_ac_dc_is_dense_and_sparse_in_turn():
    schedule = P.cyclic_schedule(0.75, sparse=3, dense=2, begin=1, end=11)
    tx = jc.sparsify(optax.sgd(0.5), P.magnitude(), schedule, RULES)
    pull = lambda p: p - jnp.linspace(-3, 3, p.size).reshape(p.shape)
    _, seen = steps(tx, tree(), 14, grad=pull)
    counts = np.asarray(seen[0][1]).reshape(14, -1).sum(1)
    d, s = 96, 24
    assert counts.tolist() == [d, s, s, s, d, d, s, s, s, d, d, s, s, s]
    masks = np.asarray(seen[0][1])
    assert np.any(masks[6] != masks[1]), "the second sparse phase chose anew"


def test_static_masks_are_those_given_and_soft_movement_follows_its_penalty():
    params = tree()
    masks = P.make_masks(P.scores.magnitude(params), 0.5, RULES, scope="global")
    tx = jc.sparsify(optax.adam(0.1), P.static(masks), P.one_shot(0.9), RULES)
    (_, state), _ = steps(tx, params, 3)
    for mask, wanted in zip(jax.tree.leaves(state.masks), jax.tree.leaves(masks)):
        np.testing.assert_array_equal(mask, wanted)
    zeros = P.apply_masks(params, masks)
    tx = jc.sparsify(optax.adam(0.1), P.static(), P.one_shot(0.9), RULES)
    (trained, _), _ = steps(tx, zeros, 3)
    for name in params:
        np.testing.assert_array_equal(trained[name]["kernel"] != 0, zeros[name]["kernel"] != 0)
    left = []
    for penalty in (0.0, 50.0):
        tx = jc.sparsify(
            optax.sgd(0.0),
            P.soft_movement(penalty=penalty, rate=0.3),
            P.periodic(0.5, every=1),
            RULES,
        )
        (_, state), _ = steps(tx, params, 20, grad=lambda p: jnp.zeros_like(p))
        left.append(P.sparsity_report(state).kept)
    assert left == [168, 0]


def test_bad_input():
    bad = lambda match: pytest.raises(jc.CompressError, match=match)
    init = lambda algorithm, rules=RULES: jc.sparsify(
        optax.sgd(0.1), algorithm, P.periodic(0.5, every=1), rules
    ).init(tree())
    with bad("drop=1.5: write a share from 0 to 1"):
        P.rigl(drop=1.5)
    with bad("initial='dense': write one of random, magnitude"):
        P.set_(initial="dense")
    with bad("a/kernel: '2:4' fixes how many weights a leaf keeps"):
        init(P.snfs(), {"a/kernel": "2:4"})
    with bad("allocation='lamp' compares all weights anew"):
        init(P.rigl(allocation="lamp"))
    with bad("deep rewiring knows single weights"):
        init(P.deep_r(0.1), {"a/kernel": "filter"})
    with bad("stack/kernel: .* want a mask of shape .3, 6, 4.*have none"):
        init(P.static({"a": {"kernel": jnp.ones((8, 12), bool)}}))
    with bad("one threshold cannot rank units of several kinds"):
        init(P.magnitude(scope="global"), {"a/kernel": "filter", "**/kernel": "unstructured"})
    with bad("'heads': write one of unstructured, n:m"):
        init(P.magnitude(), {"a/kernel": "heads"})
    with bad("needs a kernel .in, heads, depth."):
        init(P.magnitude(), {"a/kernel": "head"})
    with bad("sparsity=1 is in no number"):
        P.exponential_schedule(1.0, end=3)


def test_a_gradient_that_is_not_finite_is_passed_over():
    params = {"a": {"kernel": jax.random.normal(jax.random.key(0), (8, 10))}}
    good = {"a": {"kernel": 1e3 * jax.random.normal(jax.random.key(1), (8, 10))}}
    bad = jax.tree.map(lambda g: g.at[0, 0].set(jnp.nan).at[0, 1].set(jnp.inf), good)
    inner = optax.apply_if_finite(optax.sgd(1e-6), 5)
    for algorithm in (P.rigl(drop=0.3, initial="magnitude"), P.taylor(), P.movement(), P.snfs()):
        tx = jc.sparsify(inner, algorithm, P.periodic(0.5, every=1), RULES)
        update = jax.jit(tx.update)
        _, first = update(good, tx.init(params), params)
        _, state = update(bad, first, params)
        kept = np.asarray(state.masks["a"]["kernel"] & first.masks["a"]["kernel"]).sum()
        # No more than the share of 40 goes; scores that are averaged hardly move in one update.
        assert kept >= 28
        for x in jax.tree.leaves(state.memory):
            assert np.all(np.isfinite(x))


@pytest.mark.parametrize(
    "inner",
    [
        pytest.param(optax.adam(0.1), marks=pytest.mark.slow),
        optax.adamw(0.1, weight_decay=0.1),
    ],
)
def test_what_is_outside_of_the_set_keeps_its_value(inner):
    for algorithm in (P.movement(), P.top_kast(backward=0.5)):
        tx = jc.sparsify(inner, algorithm, P.one_shot(0.8, at=2), RULES)
        (_, state), _ = steps(tx, tree(), 3)
        (_, after), _ = steps(tx, tree(), 8)
        masks = [m["kernel"] for m in after.masks.values()]
        if after.memory.own[0].dtype == bool:  # the larger set of Top-KAST
            masks = after.memory.own
        for mask, a, b in zip(masks, state.memory.dense, after.memory.dense):
            out = ~np.asarray(mask)
            np.testing.assert_array_equal(np.asarray(a)[out], np.asarray(b)[out])
            assert np.any(np.asarray(a) != np.asarray(b))


def test_random_masks_only_lose_weights():
    tx = jc.sparsify(optax.sgd(0.0), P.random(), P.cubic_schedule(0.8, end=12, every=2), RULES)
    _, seen = steps(tx, tree(), 14)
    for _, mask in seen:
        mask = np.asarray(mask)
        assert not np.any(mask[1:] & ~mask[:-1])


def test_a_nested_state_is_not_taken_for_moments():
    params = [jax.random.normal(k, (8, 8)) for k in jax.random.split(jax.random.key(0))]
    inner = jc.sparsify(
        optax.sgd(0.0), P.straight_through(), P.one_shot(0.5), {"1": "unstructured"}
    )
    tx = jc.sparsify(inner, P.rigl(), P.periodic(0.5, every=1), {"0": "unstructured"})
    state = tx.init(params)
    for _ in range(3):  # not jitted: init of the inner one is run inside of a trace
        _, state = tx.update(params, state, params)
    np.testing.assert_array_equal(state.inner.memory.dense[0], params[1])


def test_static_masks_of_fake_quantized_leaves():
    params = jc.compress(tree(), {"**/kernel": jc.FakeQuantize("int8")})
    tx = jc.sparsify(optax.sgd(0.1), P.magnitude(), P.one_shot(0.5), RULES)
    _, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    static = jc.sparsify(optax.sgd(0.1), P.static(state.masks), P.one_shot(0.9), RULES)
    _, then = static.update(jax.tree.map(jnp.ones_like, params), static.init(params), params)
    for a, b in zip(jax.tree.leaves(state.masks), jax.tree.leaves(then.masks)):
        np.testing.assert_array_equal(a, b)


EXPLICIT = """
import jax, jax.numpy as jnp, numpy as np, optax, sys
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import jaxcompress as jc
from jaxcompress import pruning as P

mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
w = jax.random.normal(jax.random.key(0), (16, 32))
g = jax.random.normal(jax.random.key(1), (16, 32))
place = NamedSharding(mesh, PartitionSpec("x", "y"))
cases = [(P.rigl(), "unstructured"), (P.magnitude(), "filter"), (P.magnitude(allocation="lamp"), "unstructured")]
if sys.argv[1] == "all":
    cases += [(a, "unstructured") for a in (
        P.set_(), P.gse(), P.snfs(), P.dsr(), P.deep_r(0.1), P.random(), P.movement(), P.top_kast(backward=0.2),
        P.straight_through(), P.taylor())]
    cases += [(P.magnitude(), p) for p in ("channel", "vector", "layer", "block:4x4", "block:3x5", "2:4")]
for algorithm, pattern in cases:
    tx = jc.sparsify(optax.adam(0.1), algorithm, P.periodic(0.5, every=1), {"w": pattern})
    out = []
    for put in (lambda x: x, lambda x: jax.device_put(x, place)):
        params, update = {"w": put(w)}, jax.jit(tx.update)
        state = tx.init(params)
        for _ in range(2):
            updates, state = update({"w": put(g)}, state, params)
            params = optax.apply_updates(params, updates)
        out.append((params["w"], state.masks["w"]))
    (a, m), (b, n) = out
    assert n.sharding.is_equivalent_to(place, 2), (algorithm, pattern)
    np.testing.assert_array_equal(m, n, err_msg=f"{algorithm} {pattern}")
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
scores = {"w": jax.device_put(jnp.abs(w), place)}
masks = P.make_masks(scores, 0.5, {"w": "filter"})["w"]
np.testing.assert_array_equal(masks, P.make_masks({"w": jnp.abs(w)}, 0.5, {"w": "filter"})["w"])
"""


@pytest.mark.parametrize("which", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_on_a_mesh_with_explicit_axes(which):
    eight_devices.run(EXPLICIT, which)


@pytest.mark.parametrize(
    "name", some(["random", "set", "rigl", "deep_r", "movement", "taylor"], ("rigl", "movement"))
)
def test_leaves_chosen_one_by_one_are_those_chosen_together(name, monkeypatch):
    algorithm = P.movement() if name == "movement" else ALGORITHMS[name]
    schedule = P.cubic_schedule(0.7, begin=1, end=9, every=3)

    def run():
        tx = jc.sparsify(optax.adam(0.2), algorithm, schedule, {"**/kernel": "unstructured"})
        return steps(tx, tree(), 12)[0]

    assert algorithm.apart
    alone = run()
    monkeypatch.setattr(type(algorithm), "apart", False)
    jax.tree.map(np.testing.assert_array_equal, alone, run())


def test_draws_of_rows_are_uniform_and_other_in_each_leaf():
    like = [jnp.zeros((513, 255))] * 2  # more than are drawn at once, and no whole blocks of it
    moment = Moment([], [], [], [], jnp.int32(3), jnp.asarray(False), [0, 1])
    first, second = np.asarray(draws(like, moment, 0))
    assert np.mean(first == second) < 1e-3  # of 2**16 values
    assert len(np.unique(first)) > 0.8 * 2**16  # all but exp(-2) of them, in two draws of each
    for u in (first, second, first[-1:], first[256:258]):
        # The mean of n uniform numbers is off by 6 standard deviations in 1 of 5e8 draws.
        assert abs(u.mean() - 0.5) < 6 / (12 * u.size) ** 0.5
    (alone,) = draws(like[1:], moment._replace(numbers=[1]), 0)
    np.testing.assert_array_equal(alone, second)


@pytest.mark.parametrize("name", ["global", "random", "rigl", "set", "movement"])
def test_nothing_of_a_choice_is_computed_where_none_is_due(name):
    algorithm = P.magnitude(scope="global") if name == "global" else ALGORITHMS[name]
    tx = jc.sparsify(optax.adam(0.1), algorithm, P.periodic(0.5, every=100), RULES)
    params = {x: {"kernel": jnp.ones((96, 64))} for x in "ab"}
    step = jax.jit(lambda state, params: tx.update(params, state, params))
    text = step.lower(tx.init(params), params).compile().as_text()
    outside = text[text.index("ENTRY") :]
    # Keys of weights, places of ties and random bits are all uint32.
    assert "u32[96,64]" in text
    assert "u32[96,64]" not in outside
