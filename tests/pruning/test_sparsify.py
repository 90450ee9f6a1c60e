"""Pruning as an optimizer wrapper: exact counts, other implementations, and what it wraps."""

import functools

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
from jaxcompress import KernelAxes
from jaxcompress.pruning import (
    SparsifyState,
    cubic_schedule,
    kept_count,
    magnitude,
    one_shot,
    periodic,
)

RULES = {"**/kernel": "unstructured"}


def tree(seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "a": {"kernel": jax.random.normal(keys[0], (8, 12), dtype), "bias": jnp.ones(12, dtype)},
        "b": {"kernel": jax.random.normal(keys[1], (12, 5), dtype) * 3},
        "stack": {"kernel": jax.random.normal(keys[2], (3, 6, 4), dtype)},
    }


def random_steps(tx, params, steps, seed=0, init=None):
    """Random gradients for so many steps in one scan; the params after each step."""

    def step(carry, key):
        params, state = carry
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        grads = [jax.random.normal(k, p.shape, p.dtype) for k, p in zip(keys, leaves)]
        updates, state = tx.update(jax.tree.unflatten(structure, grads), state, params)
        params = optax.apply_updates(params, updates)
        # By layer of the stack, as each keeps equally many.
        counts = [jnp.sum(p["kernel"] != 0, axis=(-1, -2)) for p in params.values()]
        masks = [m["kernel"] for m in state.masks.values()]
        masked = [jnp.sum(m, axis=(-1, -2)) for m in masks if isinstance(m, jax.Array)]
        return (params, state), (counts, masked)

    run = jax.jit(lambda carry, keys: lax.scan(step, carry, keys))
    state = tx.init(params) if init is None else init
    return run((params, state), jax.random.split(jax.random.key(seed), steps))


def counted(schedule, sizes, steps):
    """How many weights stay after each step, by the documented arithmetic, in numpy."""
    out, now = [], list(sizes)
    for t in range(steps):
        if bool(schedule.refreshes(t)):
            left = np.float32(np.clip(schedule.end - t, 0, schedule.end - schedule.begin))
            share = left / np.float32(max(1, schedule.end - schedule.begin))
            if schedule.initial == schedule.final:
                share = np.float32(0)
            for i, n in enumerate(sizes):
                first, last = (kept_count(n, s) for s in (schedule.initial, schedule.final))
                way = share * share * share * np.float32(first - last)
                now[i] = last + int(np.round(way))
        out.append(list(now))
    return np.array(out)


schedules = st.one_of(
    st.builds(
        lambda final, begin, length, every: cubic_schedule(
            final, begin=begin, end=begin + length, every=every
        ),
        st.floats(0, 1), st.integers(0, 300), st.integers(1, 1500), st.integers(1, 90),
    ),
    st.builds(one_shot, st.floats(0, 1), at=st.integers(0, 1000)),
    st.builds(periodic, st.floats(0, 1), every=st.integers(1, 90), begin=st.integers(0, 300)),
)  # fmt: skip


@settings(max_examples=5)
@given(schedules, st.integers(0, 2**31 - 1))
@pytest.mark.slow
def test_exact_nonzeros_at_each_of_ten_thousand_random_steps(schedule, seed):
    steps = 2000  # in each of five examples
    tx = jc.sparsify(optax.sgd(0.01), magnitude(), schedule, RULES)
    params = {name: tree()[name] for name in ("a", "stack")}
    _, (counts, masked) = random_steps(tx, params, steps, seed)
    expected = counted(schedule, [96, 24], steps)
    for n, (nonzero, kept) in enumerate(zip(counts, masked)):
        layers = np.asarray(nonzero).reshape(steps, -1)
        for layer in layers.T:
            np.testing.assert_array_equal(layer, expected[:, n])
        np.testing.assert_array_equal(nonzero, kept)


@pytest.mark.slow
@settings(max_examples=20)
@given(schedules, st.integers(0, 2**31 - 1))
def test_exact_nonzeros_over_many_more_steps(schedule, seed):
    steps = 10_000
    tx = jc.sparsify(optax.adam(0.01), magnitude(scope="global"), schedule, RULES)
    _, (_, masked) = random_steps(tx, tree(), steps, seed)
    total = sum(np.asarray(m).reshape(steps, -1).sum(axis=1) for m in masked)
    expected = counted(schedule, [96 + 60 + 72], steps)[:, 0]
    np.testing.assert_array_equal(total, expected)


@pytest.mark.parametrize("every", [3, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("algorithm", [magnitude(allocation="erk"), magnitude(scope="global")])
def test_the_final_sparsity_is_exact_whatever_the_interval(every, algorithm):
    schedule = cubic_schedule(0.77, begin=2, end=31, every=every)
    tx = jc.sparsify(optax.adam(0.05), algorithm, schedule, RULES)
    (params, state), _ = random_steps(tx, tree(), 40)
    kept = sum(int(jnp.sum(p["kernel"] != 0)) for p in params.values())
    total = 96 + 60 + 72
    if algorithm.scope == "global":
        assert kept == kept_count(total, 0.77)
    else:
        # A stack of three layers may give up two weights, so that they keep equally many.
        assert 0 <= kept_count(total, 0.77) - kept <= 2
    assert jc.pruning.sparsity_report(params).rows != jc.pruning.sparsity_report(state).rows
    assert jc.pruning.sparsity_report(state).kept == kept


def test_the_trajectory_of_a_plain_numpy_loop():
    """Gradual pruning with momentum, written out: gradient masked, weights masked."""
    schedule = cubic_schedule(0.8, begin=2, end=14, every=3)
    tx = jc.sparsify(optax.sgd(0.1, momentum=0.9), magnitude(), schedule, {"w": "unstructured"})
    rng = np.random.default_rng(0)
    w = rng.normal(size=(6, 7)).astype(np.float32)
    target = rng.normal(size=(6, 7)).astype(np.float32)
    params, momentum, mask = {"w": jnp.asarray(w)}, np.zeros_like(w), np.ones_like(w, bool)
    state = tx.init(params)
    kept = counted(schedule, [42], 20)[:, 0]
    for t in range(20):
        grads = jax.grad(lambda p: 0.5 * jnp.sum((p["w"] - target) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if schedule.refreshes(t):
            mask = reference_mask(w, kept[t])
        momentum = np.where(mask, w - target, 0) + np.float32(0.9) * momentum
        w = np.where(mask, w - np.float32(0.1) * momentum, 0)
        np.testing.assert_array_equal(params["w"] != 0, mask)
        np.testing.assert_allclose(params["w"], w, rtol=1e-5, atol=1e-6)


def test_masks_of_torch():
    torch = pytest.importorskip("torch")
    from torch.nn.utils import prune

    rng = np.random.default_rng(0)
    weights = [rng.normal(size=s).astype(np.float32) for s in ((20, 30), (30, 7))]
    params = {f"layer_{i}": {"kernel": jnp.asarray(w)} for i, w in enumerate(weights)}
    for scope in ("local", "global"):
        layers = [torch.nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights]
        for layer, w in zip(layers, weights):
            layer.weight.data = torch.tensor(w)
        if scope == "global":
            # As a count: torch rounds the share of the total, and we what stays of it.
            removed = 810 - kept_count(810, 0.83)
            prune.global_unstructured(
                [(layer, "weight") for layer in layers], prune.L1Unstructured, amount=removed
            )
        else:
            for layer, w in zip(layers, weights):
                prune.l1_unstructured(layer, "weight", amount=w.size - kept_count(w.size, 0.83))
        tx = jc.sparsify(optax.sgd(1.0), magnitude(scope=scope), one_shot(0.83), RULES)
        _, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        for mask, layer in zip(jax.tree.leaves(state.masks), layers):
            np.testing.assert_array_equal(mask, layer.weight_mask.numpy().astype(bool))


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_n_of_m_comes_gradually_and_stays(pattern):
    n, m = map(int, pattern.split(":"))
    schedule = cubic_schedule(0.9, end=30, every=2)
    tx = jc.sparsify(optax.sgd(0.03), magnitude(), schedule, {"*/kernel": pattern})
    params = {"a": {"kernel": jax.random.normal(jax.random.key(0), (16, 6))}}
    state = tx.init(params)
    update = jax.jit(tx.update)
    for t in range(35):
        grads = jax.tree.map(lambda p, t=t: jnp.sin(p * (t + 1)), params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        kept = np.asarray(params["a"]["kernel"] != 0).T
        kept = kept.reshape(*kept.shape[:-1], -1, m).sum(axis=-1)
        share = np.float32(1) - np.float32(min(t // 2 * 2, 30)) / np.float32(30)
        last = max(n, kept_count(m, 0.9))
        assert np.all(kept == last + int(np.round(share**3 * np.float32(m - last)))), t
    assert np.all(kept == n)


INNER = {
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "momentum": lambda: optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "adafactor": lambda: optax.adafactor(1e-2),
    "lion": lambda: optax.lion(1e-2),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(
        optax.linear_schedule(1e-2, 0.0, 50)
    ),
    "masked": lambda: optax.masked(optax.adam(1e-2), {"a": True, "b": True, "stack": False}),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-2), 4),
    "inject_hyperparams of MultiSteps": lambda: optax.inject_hyperparams(
        lambda learning_rate: optax.MultiSteps(
            optax.adam(learning_rate), 4
        ).gradient_transformation()
    )(1e-2),
    "sparsify": lambda: jc.sparsify(optax.adam(1e-2), magnitude(), one_shot(0.75), {"b/*": "1:4"}),
}


QUICK = ("adam", "momentum", "MultiSteps", "sparsify")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in INNER]
)
def test_zeros_are_exact_under_every_optimizer(name):
    rules = {"b/kernel": None, **RULES} if name == "sparsify" else RULES
    tx = jc.sparsify(INNER[name](), magnitude(), cubic_schedule(0.9, end=8, every=4), rules)
    (params, state), (counts, masked) = random_steps(tx, tree(), 48)
    every = 4 if "MultiSteps" in name else 1
    assert state.step == 48 // every
    for path, site in (("a", 96), ("stack", 24)):
        mask = state.masks[path]["kernel"]
        assert np.all(np.sum(mask, axis=(-1, -2)) == kept_count(site, 0.9))
        assert not np.any(np.asarray(params[path]["kernel"])[~np.asarray(mask)])
        assert np.all(np.isfinite(params[path]["kernel"]))
    if name == "sparsify":
        assert np.all(np.sum(params["b"]["kernel"] != 0, axis=0) == 3)
        assert jc.pruning.sparsity_report(state).size == 96 + 72 + 60
    else:
        for nonzero, kept in zip(counts, masked):
            np.testing.assert_array_equal(nonzero, kept)


def test_the_schedule_counts_real_updates_and_accumulation_changes_no_weight():
    schedule = one_shot(0.5, at=2)
    tx = jc.sparsify(optax.MultiSteps(optax.sgd(0.1), 3), magnitude(), schedule, RULES)
    params = tree()
    state, seen, update = tx.init(params), [], jax.jit(tx.update)
    for _ in range(12):
        grads = jax.tree.map(jnp.ones_like, params)
        updates, state = update(grads, state, params)
        after = optax.apply_updates(params, updates)
        changed = bool(jnp.any(after["a"]["bias"] != params["a"]["bias"]))
        params = after
        seen.append((int(state.step), changed, int(jnp.sum(params["a"]["kernel"] != 0))))
    # Update 2 begins with micro-step 6, and its masks are chosen there.
    assert seen == [((i + 1) // 3, i % 3 == 2, 96 if i < 6 else 48) for i in range(12)]


def test_the_inner_optimizer_sees_the_gradient_of_the_sparse_network():
    tx = jc.sparsify(
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)),
        magnitude(), one_shot(0.75), {"w": "unstructured"},
    )  # fmt: skip
    params = {"w": jnp.array([1.0, 2.0, 3.0, 40.0])}
    grads = {"w": jnp.array([300.0, 300.0, 300.0, 3.0])}
    updates, _ = tx.update(grads, tx.init(params), params)
    # The norm is 3, that of the one weight that stays, so its gradient is clipped to 1.
    np.testing.assert_array_equal(updates["w"], [-1.0, -2.0, -3.0, -1.0])


def test_bfloat16_params_with_a_float32_state():
    inner = optax.adam(1e-2, mu_dtype=jnp.float32)
    tx = jc.sparsify(inner, magnitude(), cubic_schedule(0.8, end=20, every=2), RULES)
    params = tree(dtype=jnp.bfloat16)
    (params, state), (counts, masked) = random_steps(tx, params, 30)
    assert params["a"]["kernel"].dtype == jnp.bfloat16
    assert state.inner[0].mu["a"]["kernel"].dtype == jnp.float32
    assert np.all(np.asarray(masked[0])[-1] == kept_count(96, 0.8))
    for path in params:
        mask = np.asarray(state.masks[path]["kernel"])
        assert not np.any(np.asarray(params[path]["kernel"])[~mask])
    # A kept bfloat16 weight may step onto zero; no masked one may leave it.
    assert all(np.all(np.asarray(c) <= np.asarray(m)) for c, m in zip(counts, masked))

    # Updates wider or narrower than the weights land on zero all the same.
    for wide, narrow in ((jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float32)):
        cast = optax.stateless(lambda u, _, to=wide: jax.tree.map(lambda x: x.astype(to), u))
        tx = jc.sparsify(cast, magnitude(), one_shot(0.5), {"w": "unstructured"})
        w = jax.random.normal(jax.random.key(0), (64,)).astype(narrow)
        updates, _ = tx.update({"w": w}, tx.init({"w": w}), {"w": w})
        after = optax.apply_updates({"w": w}, updates)["w"]
        assert after.dtype == narrow
        assert int(jnp.sum(after == 0)) == 32


def test_one_trace_for_all_steps_and_donated_buffers():
    traces = []
    tx = jc.sparsify(optax.adam(1e-2), magnitude(), cubic_schedule(0.9, end=9, every=3), RULES)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, x):
        traces.append(None)
        grads = jax.grad(lambda p: jnp.sum((x @ p["a"]["kernel"] @ p["b"]["kernel"]) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = tree()
    state = tx.init(params)
    first = params["a"]["kernel"]
    for _ in range(15):
        params, state = step(params, state, jnp.ones((2, 8)))
    assert len(traces) == 1
    assert first.is_deleted()
    assert int(jnp.sum(params["a"]["kernel"] != 0)) == kept_count(96, 0.9)


def test_a_state_restored_by_orbax_goes_on_bit_for_bit(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    schedule = cubic_schedule(0.9, end=30, every=4)
    tx = jc.sparsify(optax.adamw(1e-2), magnitude(scope="global"), schedule, RULES)
    (params, state), _ = random_steps(tx, tree(), 13, seed=1)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"params": params, "state": state})
        checkpointer.wait_until_finished()
        abstract = jax.eval_shape(lambda: {"params": params, "state": state})
        back = checkpointer.restore(tmp_path / "state", abstract)
    assert isinstance(back["state"], SparsifyState)
    straight, _ = random_steps(tx, params, 20, seed=2, init=state)
    resumed, _ = random_steps(tx, back["params"], 20, seed=2, init=back["state"])
    for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_many_networks_at_once():
    tx = jc.sparsify(optax.sgd(0.1), magnitude(), cubic_schedule(0.8, end=6, every=2), RULES)
    alone = [random_steps(tx, tree(seed), 9)[0][0] for seed in range(2)]
    many = jax.tree.map(lambda *x: jnp.stack(x), *(tree(seed) for seed in range(2)))
    states = jax.vmap(tx.init)(many)

    def step(params, state, key):
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        grads = [jax.random.normal(k, p.shape) for k, p in zip(keys, leaves)]
        updates, state = tx.update(jax.tree.unflatten(structure, grads), state, params)
        return optax.apply_updates(params, updates), state

    run = jax.jit(jax.vmap(step, (0, 0, None)))
    for key in jax.random.split(jax.random.key(0), 9):
        many, states = run(many, states, key)
    assert jc.pruning.sparsity_report(states).rows[0]["size"] == 2 * 96
    for n, params in enumerate(alone):
        one = jax.tree.map(lambda x, n=n: x[n], many)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, params)


def test_a_nan_is_named():
    params = tree()
    tx = jc.sparsify(optax.sgd(0.1), magnitude(), periodic(0.9, every=1), RULES)
    state = tx.init(params)
    broken = jax.tree.map(jnp.copy, params)
    broken["b"]["kernel"] = broken["b"]["kernel"].at[3, 2].set(jnp.nan)
    with pytest.raises(jc.SpecError, match="b/kernel: 1 of 60 weights are NaN"):
        tx.init(broken)
    infinite = {**params, "b": {"kernel": params["b"]["kernel"].at[0].set(jnp.inf)}}
    with pytest.raises(jc.SpecError, match="b/kernel: 5 of 60 weights are NaN or infinite"):
        tx.init(infinite)
    updates, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), state, broken)
    after = optax.apply_updates(broken, updates)
    # It is kept, where it is seen, and the report says which leaf it is in.
    assert np.isnan(after["b"]["kernel"][3, 2])
    assert int(jnp.sum(state.masks["b"]["kernel"])) == kept_count(60, 0.9)
    rows = {row["path"]: row["nan"] for row in jc.pruning.sparsity_report(state).rows}
    assert rows == {"a/kernel": False, "b/kernel": True, "stack/kernel": False}
    assert "yes" in str(jc.pruning.sparsity_report(after))


def test_bad_input():
    params = tree()
    tx = jc.sparsify(optax.sgd(0.1), magnitude(), one_shot(0.5), RULES)
    with pytest.raises(jc.SpecError, match=r"needs the params: write tx\.update"):
        tx.update(params, tx.init(params))

    def init(rules, tree=params, **kwargs):
        return jc.sparsify(optax.sgd(0.1), magnitude(), one_shot(0.5), rules, **kwargs).init(tree)

    with pytest.raises(jc.RuleError, match="rule 'kernel' matches no leaf; the nearest paths are"):
        init({"kernel": "unstructured"})
    with pytest.raises(jc.RuleError, match="'dense': write one of unstructured"):
        init({"**/kernel": "dense"})
    with pytest.raises(jc.RuleError, match=r"pattern=0\.5: write one of unstructured"):
        init({"**/kernel": 0.5})
    with pytest.raises(jc.RuleError, match="'step' of int32, and only floating arrays"):
        init({"*": "unstructured"}, {"step": jnp.zeros((), jnp.int32)})
    with pytest.raises(jc.RuleError, match="'scale', a scalar, which cannot be pruned"):
        init({"*": "unstructured"}, {"scale": jnp.ones(())})
    with pytest.raises(jc.RuleError, match="axes names 'c/kernel', which is no leaf"):
        init(RULES, axes={"c/kernel": KernelAxes((-2,), (-1,))})
    for wrong in (KernelAxes((-3, -2), (-1,)), KernelAxes((0,), (1,)), KernelAxes((-1,), (-1,))):
        with pytest.raises(jc.RuleError, match=r"axes of 'a/kernel' are .* write its last axes as"):
            init(RULES, axes={"a/kernel": wrong})
    look = jc.sparsify(
        optax.lookahead(optax.sgd(0.1), 5, 0.5),
        magnitude(),
        one_shot(0.5),
        {"**/kernel": "unstructured"},
    )
    both = optax.LookaheadParams.init_synced(params)
    with pytest.raises(jc.SpecError, match="another structure than the params"):
        look.update(params, look.init(both), both)
    small = {"w": jc.Quantize("int8")(jnp.ones((4, 4)))}
    with pytest.raises(jc.RuleError, match="a QuantizedArray that holds no dense weight"):
        init({"*": "unstructured"}, small)
    with pytest.raises(
        jc.SpecError, match=r"1:4 removes 0\.75 .* ends at 0\.5: write a final spars"
    ):
        init({"**/kernel": "1:4"})
    with pytest.raises(jc.SpecError, match="is no algorithm: write one such as"):
        jc.sparsify(optax.sgd(0.1), "magnitude", one_shot(0.5), RULES)
    with pytest.raises(jc.SpecError, match="is no schedule: write one such as"):
        jc.sparsify(optax.sgd(0.1), magnitude(), 0.5, RULES)


def test_a_leaf_without_a_gradient():
    tx = jc.sparsify(optax.sgd(0.1), magnitude(), one_shot(0.5), {"w": "unstructured"})
    params = {"w": jnp.array([1.0, -2.0, 3.0, -4.0]), "b": jnp.ones(2)}
    updates, _ = tx.update({"w": None, "b": params["b"]}, tx.init(params), params)
    np.testing.assert_array_equal(updates["w"], [-1.0, 2.0, 0.0, 0.0])


def test_empty_and_odd_shapes():
    params = {"empty": jnp.zeros((0, 4)), "one": jnp.ones((1, 1)), "vector": jnp.arange(1.0, 8.0)}
    for scope in ("local", "global"):
        tx = jc.sparsify(
            optax.sgd(0.1), magnitude(scope=scope), one_shot(0.5), {"*": "unstructured"}
        )
        updates, _ = tx.update(params, tx.init(params), params)
        after = optax.apply_updates(params, updates)
        kept = sum(int(jnp.sum(p != 0)) for p in after.values())
        assert kept == (kept_count(8, 0.5) if scope == "global" else kept_count(7, 0.5))


def test_optax_tools_find_their_way_in_the_state():
    inner = optax.inject_hyperparams(optax.adam)(1e-2)
    tx = jc.sparsify(inner, magnitude(), one_shot(0.5), RULES)
    params = tree()
    state = tx.init(params)
    assert optax.tree_utils.tree_get(state, "learning_rate") == np.float32(1e-2)
    doubled = optax.tree_utils.tree_map_params(
        tx, lambda x: 2 * x, state, transform_non_params=lambda x: x
    )
    assert jax.tree.structure(doubled) == jax.tree.structure(state)


SHARDED = """
import re, sys, jax, jax.numpy as jnp, numpy as np, optax, jaxcompress as jc
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
kind = getattr(AxisType, sys.argv[1])
mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
params = {f"layer_{i}": {"kernel": jax.random.normal(jax.random.key(i), (64, 64))} for i in range(2)}
x = jax.random.normal(jax.random.key(9), (16, 64))
def loss(params, x):
    for layer in params.values():
        x = jnp.tanh(x @ layer["kernel"])
    return jnp.mean(x ** 2)
rules = {"layer_0/*": "unstructured", "layer_1/*": "2:4" if sys.argv[2] == "local" else "unstructured"}
tx = jc.sparsify(optax.adam(1e-2), jc.pruning.magnitude(scope=sys.argv[2]),
                 jc.pruning.cubic_schedule(0.5, end=6, every=2), rules)
@jax.jit
def step(params, state, x):
    updates, state = tx.update(jax.grad(loss)(params, x), state, params)
    return optax.apply_updates(params, updates), state
def train(params, x):
    state = tx.init(params)
    for _ in range(8):
        params, state = step(params, state, x)
    return params, state
alone, _ = train(params, x)
with jax.set_mesh(mesh):
    put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    # Along one axis of the weights, replicated along the other: a data-parallel step on both kinds.
    there = jax.tree.map(lambda p: put(p, P(None, "model") if kind == AxisType.Auto else P()), params)
    spread, state = train(there, put(x, P("data")))
    for mask in jax.tree.leaves(state.masks):
        assert mask.sharding.is_equivalent_to(there["layer_0"]["kernel"].sharding, 2), mask.sharding
    for name in alone:
        a, b = alone[name]["kernel"], spread[name]["kernel"]
        np.testing.assert_array_equal(a != 0, b != 0)
        np.testing.assert_allclose(a, b, atol=1e-5)
    # The optimizer alone, on weights that are split both ways: nothing is gathered.
    there = jax.tree.map(lambda p: put(p, P("data", "model")), params)
    text = jax.jit(tx.update).lower(there, jax.jit(tx.init)(there), there).compile().as_text()
    for moved in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert moved not in text, moved
    assert set(re.findall(r"(\\w+\\[[\\d,]*\\])\\S* all-reduce", text)) <= {"u32[]", "f32[]"}
"""


@pytest.mark.parametrize(
    ("axes", "scope"),
    [
        ("Auto", "local"),
        ("Explicit", "global"),
        pytest.param("Auto", "global", marks=pytest.mark.slow),
        pytest.param("Explicit", "local", marks=pytest.mark.slow),
    ],
)
def test_devices_train_the_same_network_and_exchange_only_counts(axes, scope):
    eight_devices.run(SHARDED, axes, scope)
