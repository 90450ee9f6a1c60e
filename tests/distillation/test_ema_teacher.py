"""Mean teachers against a float64 average, in trees of every kind."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress.distillation.ema import ema_teacher, mean_teacher


def run(tx, params, steps):
    """The params after each step, all the states, under one jitted update."""
    state, seen = tx.init(params), [params]
    update = jax.jit(tx.update)
    for n in range(steps):
        grads = jax.tree.map(functools.partial(jnp.full_like, fill_value=np.cos(n)), params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    assert update._cache_size() == 1
    return seen, state


@pytest.mark.parametrize("ramp", [False, True])
def test_the_average_of_all_params(ramp):
    params = {"w": jax.random.normal(jax.random.key(0), (5,)), "b": jnp.zeros(())}
    seen, state = run(optax.chain(optax.adam(0.1), ema_teacher(0.7, ramp=ramp)), params, 12)
    for name in params:
        mean = np.asarray(seen[0][name], np.float64)
        for t, now in enumerate(seen[1:], 1):
            d = min(0.7, 1 - 1 / (t + 1)) if ramp else 0.7
            mean = d * mean + (1 - d) * np.asarray(now[name], np.float64)
        # 12 steps, each rounded to float32 a few times.
        np.testing.assert_allclose(mean_teacher(state, params)[name], mean, rtol=1e-5, atol=1e-6)


def test_the_ramp_is_the_plain_mean():
    seen, state = run(optax.chain(optax.sgd(0.1), ema_teacher(1.0)), {"w": jnp.arange(3.0)}, 9)
    mean = np.mean([np.asarray(p["w"], np.float64) for p in seen], axis=0)
    np.testing.assert_allclose(mean_teacher(state, seen[0])["w"], mean, rtol=1e-5, atol=1e-6)


def test_the_teacher_stays_when_the_state_is_donated():
    params = {"w": jnp.arange(3.0)}
    tx = ema_teacher()
    state = tx.init(params)
    teacher = mean_teacher(state, params)
    jax.jit(tx.update, donate_argnums=1)(params, state, params)
    np.testing.assert_array_equal(teacher["w"], np.arange(3))


def test_as_optax_takes_hyperparams_and_numbers():
    params = {"w": jnp.arange(3.0), "b": 1.0}
    updates = {"w": jnp.ones(3), "b": -1.0}
    tx = optax.inject_hyperparams(ema_teacher)(decay=0.75)
    state = tx.init(params)
    state.hyperparams["decay"] = jnp.float32(0.25)
    _, state = jax.jit(tx.update)(updates, state, params)
    teacher = mean_teacher(state, params)
    np.testing.assert_allclose(teacher["w"], np.arange(3) + 0.75, rtol=1e-6)
    assert float(teacher["b"]) == 0.25
    with pytest.raises(jc.CompressError, match="from 0 to 1"):
        ema_teacher(jnp.float32(2.0))


def test_the_updates_are_those_of_the_optimizer_alone():
    params = {"w": jnp.arange(3.0)}
    alone, _ = run(optax.adam(0.1), params, 4)
    beside, _ = run(optax.chain(optax.adam(0.1), ema_teacher()), params, 4)
    for a, b in zip(alone, beside):
        np.testing.assert_array_equal(a["w"], b["w"])


def test_a_schedule_and_small_steps_in_bfloat16():
    decay = optax.piecewise_constant_schedule(0.5, {2: 0.2})  # 0.5, 0.5, then 0.1
    params = {"w": jnp.ones((), jnp.bfloat16)}
    tx = ema_teacher(decay, ramp=False)
    state, mean = tx.init(params), 1.0
    for step in range(4):
        updates, state = tx.update({"w": jnp.bfloat16(1.0)}, state, params)
        params = optax.apply_updates(params, updates)
        d = float(decay(step))
        mean = d * mean + (1 - d) * float(params["w"])
        assert float(state.teacher["w"]) == pytest.approx(mean, rel=1e-6)
    assert mean_teacher(state, params)["w"].dtype == jnp.bfloat16
    # 1000 times 1e-3 of a step of 1: in bfloat16 each would be rounded away.
    tx = ema_teacher(0.999, ramp=False)
    start = jnp.zeros((), jnp.bfloat16)
    body = lambda state, _: (tx.update(jnp.bfloat16(1.0), state, start)[1], None)
    state, _ = jax.lax.scan(body, tx.init(start), None, 1000)
    assert float(state.teacher) == pytest.approx(1 - 0.999**1000, rel=1e-4)


def test_counters_masked_nodes_and_none():
    params = {"w": jnp.ones(2), "n": jnp.int32(3), "gone": None, "masked": optax.MaskedNode()}
    tx = ema_teacher(0.5, ramp=False)
    updates = {**params, "w": jnp.ones(2), "n": jnp.int32(1)}
    _, state = tx.update(updates, tx.init(params), params)
    found = mean_teacher(state, params)
    assert found["w"].tolist() == [1.5, 1.5]
    assert (int(found["n"]), found["gone"]) == (4, None)


def test_a_compressed_student_and_masks():
    dense = {"kernel": jax.random.normal(jax.random.key(1), (16, 8)), "bias": jnp.zeros(8)}
    params = jc.compress(dense, {"kernel": jc.FakeQuantize("int4")})
    trainable, rest = jc.partition(params)
    seen, state = run(optax.chain(optax.sgd(0.1), ema_teacher(0.5)), trainable, 3)
    teacher = jc.combine(mean_teacher(state, trainable), rest)
    assert jax.tree.structure(teacher) == jax.tree.structure(params)
    kernels = [np.asarray(jax.tree.leaves(p["kernel"])[0], np.float64) for p in seen]
    mean = kernels[0]
    for k in kernels[1:]:  # min(0.5, 1 - 1 / (t + 1)) is 0.5 from the first update on
        mean = (mean + k) / 2
    np.testing.assert_allclose(jax.tree.leaves(teacher["kernel"])[0], mean, rtol=1e-5, atol=1e-6)
    out = jc.compressed(lambda p, x: x @ p["kernel"] + p["bias"])(teacher, jnp.ones((2, 16)))
    assert out.shape == (2, 8)
    # It leaves the zeros of a sparse student alone, and has them where the student has them.
    prune = jc.pruning
    sparse = jc.sparsify(
        optax.sgd(0.1), prune.magnitude(), prune.one_shot(0.5), {"kernel": "unstructured"}
    )
    seen, state = run(optax.chain(sparse, ema_teacher(0.0, ramp=False)), dense, 3)
    np.testing.assert_array_equal(mean_teacher(state, dense)["kernel"], seen[-1]["kernel"])
    assert np.count_nonzero(mean_teacher(state, dense)["kernel"]) == 64


def test_bad_input():
    params = {"w": jnp.ones(2)}
    for decay in (-0.1, 1.1, float("nan"), "0.9"):
        with pytest.raises(jc.CompressError, match="write a share from 0 to 1"):
            ema_teacher(decay)
    tx = ema_teacher()
    with pytest.raises(jc.CompressError, match=r"tx.update\(grads, state, params\)"):
        tx.update(params, tx.init(params))
    with pytest.raises(jc.CompressError, match="0 mean teachers"):
        mean_teacher(optax.adam(0.1).init(params), params)
    with pytest.raises(jc.CompressError, match="another structure"):
        mean_teacher(tx.init(params), {"v": params["w"]})
