"""Optimizer states in eight bits: torchao's codes, bounds by arithmetic, training beside float."""

import functools

import eight_devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcompress as jc
from jaxcompress import SpecError
from jaxcompress.arrays.dynamic import DynamicArray, dynamic_map
from jaxcompress.quantization.state import quantize_state
from jaxcompress.quantization.state.blockwise import Blockwise

EPS = float(np.finfo(np.float32).eps)
# Half of the widest gap of values, of shares of a block's largest.
WIDEST = {
    ("dynamic8", True): 0.9 / 64 / 2,
    ("dynamic8", False): 0.9 / 128 / 2,
    ("int8", True): 1 / 254,
    ("int8", False): 1 / 510,
}
FORMATS = ["dynamic8", "int8"]
# A few only, for each is compiled.
shapes = st.sampled_from([(1,), (13,), (3, 7), (2, 9, 1, 3)])


@functools.cache
def torchao_utils():
    pytest.importorskip("torch")
    return pytest.importorskip("torchao.optim.quant_utils")


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_that_of_torchao(signed):
    theirs = np.array(torchao_utils().create_dynamic_map(signed), np.float32)
    # Theirs come of a float32 sum and product, ours are rounded once: two units in the last place.
    np.testing.assert_allclose(dynamic_map(signed), theirs, rtol=2 * EPS, atol=0)
    assert np.all(np.diff(dynamic_map(signed)) > 0)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_torchao(signed):
    import torch

    utils = torchao_utils()
    x = np.random.default_rng(0).normal(size=(32, 512)).astype(np.float32) ** 3
    x = x if signed else np.abs(x)
    table = torch.tensor(utils.create_dynamic_map(signed))
    shares, scale = utils.scale_tensor(torch.tensor(x), 256)
    theirs = utils.quantize_8bit_with_qmap(shares, table).numpy()
    ours = DynamicArray.quantize(jnp.asarray(x), axis=-1, group_size=256, signed=signed)
    np.testing.assert_array_equal(scale.numpy(), np.asarray(ours.scale).ravel())
    codes = np.asarray(ours.codes)
    # They differ only where a share lies on a middle, to the rounding of two sums.
    off = codes != theirs
    off &= ~((theirs == 0) & (codes == 1) & (not signed))  # what is positive stays so
    assert off.mean() < 1e-3
    near = np.abs(dynamic_map(signed)[codes] - shares.numpy())
    other = np.abs(dynamic_map(signed)[theirs] - shares.numpy())
    np.testing.assert_allclose(near[off], other[off], rtol=0, atol=4 * EPS)
    values = utils.dequant_with_qmap(torch.tensor(codes), table, scale).numpy()
    np.testing.assert_allclose(np.asarray(ours.materialize()), values, rtol=2 * EPS)


@pytest.mark.parametrize("signed", [True, False])
def test_the_nearest_of_all_values(signed):
    rng = np.random.default_rng(1)
    share = (10.0 ** rng.uniform(-8, 0, 4000)).astype(np.float32)
    share = np.concatenate([share, dynamic_map(signed), [1.0]]).astype(np.float32)
    share *= rng.choice([-1, 1], share.shape).astype(np.float32) if signed else 1
    share = np.abs(share) if not signed else share
    leaf = DynamicArray.quantize(
        jnp.asarray(np.append(share, np.float32(1.0))), axis=-1, group_size=10_000, signed=signed
    )
    got = np.abs(np.asarray(leaf.materialize(), np.float64)[:-1] - share)
    table = dynamic_map(signed).astype(np.float64)
    table = table if signed else np.append(table[1:], [0.0])
    best = np.abs(share[:, None].astype(np.float64) - table).min(axis=1)
    if not signed:  # what is positive goes to the least positive value, not to zero
        tiny = (share > 0) & (share < table.min(initial=1, where=table > 0))
        best[tiny] = got[tiny]
    # Of the difference, what the rounding of the middle and of the value leaves.
    assert np.all(got <= best + 2 * EPS * np.abs(share) + 1e-12)


@functools.partial(jax.jit, static_argnums=(1, 2))
def encoded(x, how, signed):
    return how.encode(x, signed, None)


@settings(max_examples=40)
@given(st.data(), st.sampled_from(FORMATS), st.booleans(), st.sampled_from([1, 4, 256]))
def test_rounding_is_bounded(data, name, signed, block):
    shape = data.draw(shapes)
    value = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
    x = data.draw(hnp.arrays(np.float32, shape, elements=value))
    x = x if signed else np.abs(x)
    leaf = encoded(jnp.asarray(x), Blockwise(name, block), signed)
    y = np.asarray(leaf.materialize(), np.float64)
    assert leaf.shape == shape
    assert jax.tree.leaves(leaf)[0].dtype.itemsize == 1
    # Each block's own largest value bounds it.
    axis, size = leaf.axis + x.ndim, leaf.group_size
    blocks = np.split(x, range(size, x.shape[axis], size), axis)
    largest = np.concatenate(
        [np.broadcast_to(np.abs(b).max(axis=axis, keepdims=True), b.shape) for b in blocks], axis
    ).astype(np.float64)
    bound = largest * (WIDEST[name, signed] + 4 * EPS) + 1e-37
    if not signed:  # a positive value is stored as the least positive one or more
        bound = (
            np.maximum(bound, largest / 255 * (1 + 4 * EPS) + 1e-37) if name == "int8" else bound
        )
    assert np.all(np.abs(y - x) <= bound)
    assert np.all(y[x == 0] == 0)
    if not signed:
        # Below the normal numbers the product of a tiny scale and a tiny share may be flushed.
        kept = largest > 1e-30
        assert np.all(y[(x > 0) & kept] > 0)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("signed", [True, False])
def test_at_random_the_mean_is_the_moment(name, signed):
    rng = np.random.default_rng(2)
    x = (10 ** rng.uniform(-2, 0, 32)).astype(np.float32)
    x[0] = 1.0
    x *= rng.choice([-1, 1], 32).astype(np.float32) if signed else 1
    x[0] = 1.0
    encode = jax.jit(
        jax.vmap(lambda key: Blockwise(name, 32).encode(jnp.asarray(x), signed, key).materialize())
    )
    n = 4000
    y = np.asarray(encode(jax.random.split(jax.random.key(0), n)), np.float64)
    gap = 2 * WIDEST[name, signed]
    # A draw between two neighbours has a deviation of half a gap at most; six of the mean's.
    assert np.all(np.abs(y.mean(axis=0) - x) < 6 * gap / 2 / np.sqrt(n))
    assert np.all(np.abs(y - x) <= gap + 4 * EPS)
    assert np.all(y[:, 0] == 1)
    assert len(np.unique(y[:, 5])) == 2


def train(tx, params, steps=60):
    target = jax.tree.map(
        lambda p: jnp.sin(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params
    )

    def loss(p):
        return sum(
            jnp.mean((a.astype(jnp.float32) - b.astype(jnp.float32)) ** 2)
            for a, b in zip(jax.tree.leaves(p), jax.tree.leaves(target))
        )

    @jax.jit
    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    (params, state), losses = jax.lax.scan(step, (params, tx.init(params)), None, steps)
    return params, state, np.asarray(losses)


def small_params(dtype=jnp.float32):
    return {"a": {"kernel": jnp.zeros((24, 40), dtype), "bias": jnp.zeros(40, dtype)}}


OPTIMIZERS = {
    "adam": optax.adam(0.05),
    "adamw": optax.adamw(0.05),
    "sgd": optax.sgd(20.0, momentum=0.9),
    "rmsprop": optax.rmsprop(0.02),
    "amsgrad": optax.amsgrad(0.05),
    "lion": optax.lion(0.02),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.05)),
    "masked": optax.chain(
        optax.masked(optax.set_to_zero(), {"a": {"kernel": False, "bias": True}}),
        optax.masked(optax.adam(0.05), {"a": {"kernel": True, "bias": False}}),
    ),
    "hyperparams": optax.inject_hyperparams(optax.adam)(learning_rate=0.05),
    "multi": optax.MultiSteps(optax.adam(0.05), 2),
    "partition": optax.partition({"x": optax.adam(0.05)}, {"a": {"kernel": "x", "bias": "x"}}),
}


@pytest.mark.thin(4)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer(name):
    params = small_params()
    small = quantize_state(OPTIMIZERS[name], block_size=16, min_size=100)
    _, state, losses = train(small, params)
    _, dense, expected = train(OPTIMIZERS[name], params)
    leaves = jax.tree.leaves(state, is_leaf=jc.is_compressed)
    moments = [x for x in leaves if jc.is_compressed(x)]
    assert moments
    assert all(x.shape == (24, 40) for x in moments)  # and no bias, of 40 values
    # 4 bytes become 1 and a scale of 4 bytes to 16 values.
    whole = 24 * 40 * len(moments)
    saved = whole * 4 - (whole + 4 * 24 * len(moments) * 3)
    assert jc.nbytes(dense) - jc.nbytes(state) == saved
    # A moment is off by a percent of its block's largest: so is a step, and the curve by a few.
    np.testing.assert_allclose(losses, expected, atol=0.05 * expected[0])
    assert losses[-1] < 0.5 * losses[0]


def test_means_of_squares_are_without_signs():
    state = quantize_state(optax.adam(0.1), min_size=100).init(small_params())
    assert state.inner[0].mu["a"]["kernel"].signed
    assert not state.inner[0].nu["a"]["kernel"].signed
    linear = quantize_state(optax.adam(0.1), "int8", min_size=100).init(small_params())
    assert linear.inner[0].mu["a"]["kernel"].format == "int8"
    assert linear.inner[0].nu["a"]["kernel"].format == "uint8"


def test_accumulated_gradients_and_copies_stay_as_they_are():
    tx = quantize_state(optax.MultiSteps(optax.adam(0.1), 4), min_size=100)
    state = tx.init(small_params())
    assert isinstance(state.inner.acc_grads["a"]["kernel"], jax.Array)
    assert jc.is_compressed(state.inner.inner_opt_state[0].mu["a"]["kernel"])
    free = quantize_state(optax.contrib.schedule_free_adamw(0.1), min_size=100)
    assert isinstance(free.init(small_params()).inner.z["a"]["kernel"], jax.Array)


def test_inside_multi_steps():
    tx = optax.MultiSteps(quantize_state(optax.adam(0.05), min_size=100, key=jax.random.key(1)), 2)
    _, state, losses = train(tx, small_params())
    assert jc.is_compressed(state.inner_opt_state.inner[0].mu["a"]["kernel"])
    assert losses[-1] < 0.5 * losses[0]


def test_around_sparsify():
    params = {"a": {"kernel": jnp.ones((24, 40)) + jnp.arange(960.0).reshape(24, 40) / 960}}
    tx = quantize_state(
        jc.sparsify(
            optax.adam(0.05), jc.pruning.magnitude(), jc.pruning.one_shot(0.75),
            {"a/kernel": "unstructured"},
        ),
        min_size=100,
    )  # fmt: skip
    params, _, _ = train(tx, params)
    assert int(jnp.sum(params["a"]["kernel"] != 0)) == 240


def test_nothing_is_traced_twice_and_zero_moments_stay():
    traces = []
    inner = optax.adam(0.1)

    def update(*args):
        traces.append(1)
        return inner.update(*args)

    tx = quantize_state(optax.GradientTransformation(inner.init, update), min_size=100)
    params = small_params()
    state, step = tx.init(params), jax.jit(tx.update)
    grads = jax.tree.map(jnp.ones_like, params)
    grads["a"]["kernel"] = grads["a"]["kernel"].at[:, ::2].set(0.0)
    for _ in range(3):
        updates, state = step(grads, state, params)
    assert len(traces) == 1
    for moment in (state.inner[0].mu, state.inner[0].nu):
        value = np.asarray(moment["a"]["kernel"])
        assert np.all(value[:, ::2] == 0)
        assert np.all(value[:, 1::2] != 0)
    assert np.all(np.asarray(updates["a"]["kernel"])[:, ::2] == 0)


def test_a_small_mean_of_squares_never_becomes_zero():
    # Beside a gradient of 1, one of 1e-5 has a square 1e10 times smaller: below all codes.
    params = {"w": jnp.zeros((4, 64))}
    grads = {"w": jnp.full((4, 64), 1e-5).at[:, 0].set(1.0)}
    for name in FORMATS:
        tx = quantize_state(optax.adam(1.0, eps=1e-30), name, min_size=0)
        state, step = tx.init(params), jax.jit(tx.update)
        for _ in range(5):
            updates, state = step(grads, state, params)
            # At most |m| / sqrt(v) of plain Adam, which is 1 up to bias correction.
            assert float(jnp.max(jnp.abs(updates["w"]))) < 1.1
        assert np.all(np.asarray(state.inner[0].nu["w"]) > 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_moments(dtype):
    tx = quantize_state(optax.sgd(10.0, momentum=0.9), min_size=100)
    _, state, losses = train(tx, small_params(dtype))
    moment = state.inner[0].trace["a"]["kernel"]
    assert moment.dtype == dtype
    assert losses[-1] < 0.5 * losses[0]


def test_a_key_moves_on():
    tx = quantize_state(optax.adam(0.1), min_size=100, key=jax.random.key(0))
    params = small_params()
    grads = jax.tree.map(lambda p: jnp.linspace(0.1, 1, p.size).reshape(p.shape), params)
    step = jax.jit(tx.update)
    first = step(grads, tx.init(params), params)[1]
    again = step(grads, tx.init(params), params)[1]
    second = step(grads, first, params)[1]
    codes = lambda state: np.asarray(state.inner[0].mu["a"]["kernel"].codes)
    np.testing.assert_array_equal(codes(first), codes(again))
    assert jnp.any(jax.random.key_data(first.key) != jax.random.key_data(second.key))
    other = quantize_state(optax.adam(0.1), min_size=100, key=jax.random.key(1))
    assert np.any(
        codes(jax.jit(other.update)(grads, other.init(params), params)[1]) != codes(first)
    )


def test_many_networks_at_once():
    tx = quantize_state(optax.adam(0.1), min_size=100)
    params = jax.tree.map(lambda p: jnp.stack([p, p + 1]), small_params())
    grads = jax.tree.map(lambda p: jnp.sin(jnp.arange(p.size) * 1.0).reshape(p.shape), params)
    state = jax.jit(jax.vmap(tx.init))(params)
    updates, state = jax.jit(jax.vmap(tx.update))(grads, state, params)
    one = jax.tree.map(lambda p: p[1], (params, grads))
    expected, _ = jax.jit(tx.update)(one[1], tx.init(one[0]), one[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-5), updates, expected)


@pytest.mark.parametrize("name", FORMATS)
def test_a_state_is_saved_and_comes_back(tmp_path, name):
    tx = quantize_state(optax.adam(0.05), name, min_size=100)
    params = small_params()
    _, state, _ = train(tx, params, 5)
    jc.save(tmp_path / "state.safetensors", state.inner[0]._asdict())
    back = jc.load(tmp_path / "state.safetensors")
    leaf = back["mu"]["a"]["kernel"]
    assert type(leaf) is type(state.inner[0].mu["a"]["kernel"])
    np.testing.assert_array_equal(leaf, state.inner[0].mu["a"]["kernel"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "int4"}, "write one of dynamic8, int8"),
        ({"block_size": 0}, "block_size=0"),
        ({"min_size": -1}, "min_size=-1"),
    ],
)
def test_refused(options, message):
    with pytest.raises(SpecError, match=message):
        quantize_state(optax.adam(0.1), **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_on_a_mesh(kind):
    out = eight_devices.run(
        f"""
        import jax, jax.numpy as jnp, numpy as np, optax
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from jaxcompress.quantization.state import quantize_state
        mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.{kind},))
        w = jnp.sin(jnp.arange(64 * 512.0)).reshape(64, 512)
        params, grads = {{"w": w}}, {{"w": jnp.cos(w * 9)}}
        for name in ("dynamic8", "int8"):
            tx = quantize_state(optax.adam(0.1), name)
            step = jax.jit(tx.update)
            u, s = tx.init(params), None
            plain = step(grads, tx.init(params), params)
            place = lambda t: jax.device_put(t, NamedSharding(mesh, P("x")))
            state = tx.init(place(params))
            for _ in range(2):
                updates, state = step(place(grads), state, place(params))
            plain = step(grads, plain[1], params)
            codes = state.inner[0].mu["w"].codes
            assert codes.sharding.spec[0] == "x", codes.sharding
            np.testing.assert_array_equal(codes, plain[1].inner[0].mu["w"].codes)
            np.testing.assert_allclose(updates["w"], plain[0]["w"], rtol=1e-5)
        print("same")
        """
    )
    assert out.split() == ["same"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"format": "int8"}, {"key": jax.random.key(0)}])
def test_digits_like_with_floats(options):
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)
    keys = jax.random.split(jax.random.key(3), 2)
    start = {
        "a": jax.nn.initializers.lecun_normal()(keys[0], (64, 300)),
        "b": jax.nn.initializers.lecun_normal()(keys[1], (300, 10)),
    }

    def loss(params, x, y):
        logits = jax.nn.relu(x @ params["a"]) @ params["b"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def run(tx):
        @jax.jit
        def step(carry, i):
            params, state = carry
            at = jax.random.randint(jax.random.fold_in(jax.random.key(0), i), (64,), 0, 1400)
            value, grads = jax.value_and_grad(loss)(params, x[at], y[at])
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        (params, _), losses = jax.lax.scan(step, (start, tx.init(start)), jnp.arange(600))
        hits = jnp.argmax(jax.nn.relu(x[1400:] @ params["a"]) @ params["b"], -1) == y[1400:]
        return float(hits.mean()), np.asarray(losses)

    accuracy, losses = run(quantize_state(optax.adam(1e-3), min_size=1000, **options))
    expected, reference = run(optax.adam(1e-3))
    # 397 images: the deviation of a share near 0.93 is 0.013.
    assert expected > 0.9
    assert abs(accuracy - expected) < 0.02
    smooth = lambda z: z.reshape(-1, 50).mean(axis=1)
    # Linear codes hold small squares too large, which slows the first steps.
    assert np.all(np.abs(smooth(losses) - smooth(reference)) < 0.02 + 0.15 * smooth(reference))
