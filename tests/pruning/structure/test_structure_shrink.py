"""The smaller model is the masked one: values, gradients, loops, random numbers and states."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structure_models import FAST, SLOW, array

import jaxcompress as jc
from jaxcompress import CompressError
from jaxcompress.pruning.structure import (
    Plan,
    groups,
    keep_channels,
    mask_channels,
    shrink,
    shrink_params,
    shrink_state,
    shrunk,
)


def random_plan(found, seed):
    """Some channels of every group, at least one."""
    rng = np.random.default_rng(seed)
    pick = lambda n: rng.choice(n, rng.integers(1, n + 1), replace=False).tolist()
    return keep_channels(found, {group: pick(group.size) for group in found.removable})


def close(a, b):
    """Sums of some hundred products in float32, in another order: 1e-5 of the largest."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * max(1, float(jnp.abs(x).max())))


def agree(fn, params, args, plan):
    """Values and gradients of a loss that sees all outputs."""

    def loss(fn):
        return lambda p: jnp.sum(jnp.sin(fn(p, *args)))

    small, fewer = shrink(fn, params, plan)
    masked = mask_channels(params, plan)
    (a, ga), (b, gb) = (
        jax.jit(jax.value_and_grad(loss(f)))(p) for f, p in ((fn, masked), (small, fewer))
    )
    close(a, b)
    close(shrink_params(ga, plan), gb)


@pytest.mark.parametrize("name", FAST)
def test_smaller_is_masked(name):
    (fn, params, args), _ = FAST[name]()
    agree(fn, params, args, random_plan(groups(fn, params, *args), 0))


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("seed", [0, 1])
def test_smaller_is_masked_slow(name, seed):
    (fn, params, args), _ = SLOW[name]()
    agree(fn, params, args, random_plan(groups(fn, params, *args), seed))


ACTS = {
    "relu": jax.nn.relu, "tanh": jnp.tanh, "silu": jax.nn.silu, "exp": jnp.exp, "cos": jnp.cos,
    "softmax": jax.nn.softmax, "double": lambda h: jnp.concatenate([h, -h], -1)[..., 2:8],
    "fold": lambda h: h.reshape(-1, 2, 3).sum(1)[:, [0, 1, 2, 0, 1, 2]],
    "halves": lambda h: jnp.concatenate([h[:, 3:], h[:, :3]], -1) * h,
    "turns": lambda h: jnp.stack([h[:, ::2], -h[:, 1::2]], -1).reshape(h.shape),
    "heads": lambda h: jnp.einsum("bhd,bhe->bde", *(h.reshape(-1, 3, 2),) * 2).reshape(-1, 4)[:, :1] * h,
    "centred": lambda h: h - jnp.mean(h, -1, keepdims=True),
    "squares": lambda h: h / jnp.sqrt(jnp.sum(h**2, -1, keepdims=True) + 1),
    "outer": lambda h: (h[:, :, None] * h[:, None, :]).sum(-1),
    "where": lambda h: jnp.where(h > 0, h, 1.0),
    "padded": lambda h: jnp.pad(h[:, :4], ((0, 0), (1, 1))) + h,
    "position": lambda h: h * jnp.arange(6.0) + jnp.eye(6)[2],
    "mixed": lambda h: h @ jnp.eye(6)[::-1],
    "tiled": lambda h: jnp.tile(h[:, :3], (1, 2)) + h,
    "repeated": lambda h: jnp.repeat(h[:, :3], 2, axis=1) * h,
    "loop": lambda h: jax.lax.fori_loop(0, 3, lambda i, c: jnp.sin(c) + i, h),
    "branch": lambda h: jax.lax.cond(h[0, 0] > 0, lambda h: h * 2, jnp.exp, h),
    "while": lambda h: jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 2), (0, h))[1],
}  # fmt: skip


@settings(max_examples=3, derandomize=True, deadline=None, database=None)
@given(st.lists(st.sampled_from(sorted(ACTS)), min_size=2, max_size=4), st.integers(0, 99))
def test_no_composition_of_operations_is_removed_from_wrongly(names, seed):
    """Layers with operations between them that mix channels in all ways."""
    check_composition(names, seed)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(st.sampled_from(sorted(ACTS)), min_size=1, max_size=4), st.integers(0, 99))
def test_no_composition_of_operations_is_removed_from_wrongly_slow(names, seed):
    check_composition(names, seed)


def check_composition(names, seed):
    params = {f"{n}{i}": 0.3 * array(i, 6, 6) for i in range(len(names)) for n in "ab"}
    params |= {"in": array(7, 3, 6), "out": array(8, 6, 2), "bias": array(9, 6)}

    def fn(p, x):
        h = x @ p["in"] + p["bias"]
        for i, name in enumerate(names):
            h = h * 0.5 + ACTS[name](h @ p[f"a{i}"]) @ p[f"b{i}"]
        return h @ p["out"]

    x = array(10, 2, 3)
    plan = random_plan(groups(fn, params, x), seed)
    small, fewer = shrink(fn, params, plan)
    want, got = jax.jit(fn)(mask_channels(params, plan), x), jax.jit(small)(fewer, x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * (1 + float(jnp.abs(want).max())))


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTS)
def test_each_operation_alone(name):
    check_composition([name], 3)


def conv(x, kernel, groups=1, dilate=1):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", (dilate, 1), None, layout, feature_group_count=groups
    )


def shuffled(x, groups):
    """The channels of ShuffleNet: of all groups in turns."""
    n, h, w, c = x.shape
    return x.reshape(n, h, w, groups, c // groups).swapaxes(3, 4).reshape(x.shape)


def to_space(x):
    n, h, w, c = x.shape
    x = (
        x.reshape(n, h, w, 2, 2, c // 4)
        .transpose(0, 1, 3, 2, 4, 5)
        .reshape(n, 2 * h, 2 * w, c // 4)
    )
    return jnp.concatenate([x] * 4, -1)[:, :h, :w]


# Of eight channels to eight; each may use a kernel `k(*shape)`.
LAYERS = {
    "conv": lambda x, k: conv(x, k(3, 3, 8, 8)),
    "depthwise": lambda x, k: conv(x, k(3, 3, 1, 8), 8),
    "multiplied": lambda x, k: conv(conv(x, k(3, 3, 1, 16), 8), k(1, 1, 16, 8)),
    "grouped": lambda x, k: conv(x, k(1, 3, 4, 8), 2),
    "shuffle": lambda x, k: shuffled(conv(x, k(1, 1, 2, 8), 4), 4),
    "shuffled": lambda x, k: shuffled(conv(x, k(1, 1, 8, 8)), 2),
    "relu": lambda x, k: jax.nn.relu(x + k(8)),
    "swish": lambda x, k: jax.nn.silu(x * k(8)) + k(8),
    "residual": lambda x, k: x + conv(jax.nn.relu(conv(x, k(1, 1, 8, 6))), k(1, 1, 6, 8)),
    "excite": lambda x, k: x * jax.nn.sigmoid(jnp.tanh(x.mean((1, 2)) @ k(8, 3)) @ k(3, 8))[:, None, None],
    "gate": lambda x, k: (lambda y: y[..., :8] * jax.nn.sigmoid(y[..., 8:]))(conv(x, k(1, 1, 8, 16))),
    "dense": lambda x, k: jnp.concatenate([x[..., 3:], conv(x, k(1, 1, 8, 3))], -1),
    "pool": lambda x, k: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "SAME"),
    "pad": lambda x, k: jnp.pad(conv(x, k(1, 1, 8, 5)), ((0, 0), (0, 0), (0, 0), (1, 2))),
    "space": lambda x, k: to_space(x),
    "layer norm": lambda x, k: (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1) * k(8),
    "rms norm": lambda x, k: x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1) * k(8),
    "group norm": lambda x, k: (lambda y: (y * jax.lax.rsqrt((y**2).mean((1, 2, 4), keepdims=True) + 1)).reshape(x.shape))(x.reshape(*x.shape[:3], 2, 4)),
    "flat": lambda x, k: (x.reshape(len(x), -1) @ k(72, 72)).reshape(x.shape),
    "attention": lambda x, k: jnp.einsum("nij,njc->nic", jax.nn.softmax(jnp.einsum("nic,njc->nij", *(x.reshape(len(x), 9, 8) @ k(8, 8) for _ in range(2)))), x.reshape(len(x), 9, 8)).reshape(x.shape),
    "channel attention": lambda x, k: jnp.einsum("nhwc,ncd->nhwd", x, jnp.einsum("nhwc,nhwd->ncd", x, conv(x, k(1, 1, 8, 8)))),
    "scan": lambda x, k: jax.lax.scan(lambda c, w: (jnp.tanh(c @ w) + c, c.sum()), x, k(2, 8, 8))[0],
    "rows": lambda x, k: jax.lax.scan(lambda c, r: ((y := jnp.tanh(c @ k(8, 8) + r)), y), jnp.zeros_like(x[:, 0]), x.swapaxes(0, 1))[1].swapaxes(0, 1),
    "transposed": lambda x, k: (x.swapaxes(2, 3) @ k(3, 3)).swapaxes(2, 3),
    "vmapped": lambda x, k: jax.vmap(lambda y, w: y * w, (-1, 0), -1)(x, k(8)),
    "looked up": lambda x, k: x + k(5, 8)[jnp.arange(3)],
    "table": lambda x, k: x * jnp.linspace(0.5, 1, 8) + jnp.cos(jnp.arange(8.0)),
    "dropout": lambda x, k: jnp.where(jax.random.bernoulli(jax.random.key(0), 0.7, x.shape), x, 0),
}  # fmt: skip


@pytest.mark.slow
@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=5), st.integers(0, 99))
def test_no_composition_of_layers_is_removed_from_wrongly(names, seed):
    check_layers(names, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LAYERS))
def test_each_layer_alone(name):
    check_layers(["conv", name, "relu", "conv"], 5)


def check_layers(names, seed):
    params = {"in": 0.5 * array(0, 2, 8), "out": 0.5 * array(1, 8, 2)}

    def fn(p, x, made=None):
        h = x @ p["in"]
        for i, name in enumerate(names):
            count = iter(range(9))

            def kernel(*shape, i=i, count=count):
                path = f"{i}-{next(count)}"
                if made is not None:
                    made[path] = shape
                    return jnp.zeros(shape)
                return p[path]

            h = LAYERS[name](h, kernel)
        return h.mean((1, 2)) @ p["out"]

    x, made = array(seed, 3, 3, 3, 2), {}
    jax.eval_shape(lambda p, x: fn(p, x, made), params, x)
    for n, (path, shape) in enumerate(made.items()):
        params[path] = array(n + 2, *shape) / np.sqrt(shape[-2:][0])
    plan = random_plan(groups(fn, params, x), seed)
    small, fewer = shrink(fn, params, plan)
    want, got = jax.jit(fn)(mask_channels(params, plan), x), jax.jit(small)(fewer, x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * (1 + float(jnp.abs(want).max())))


def test_other_functions_of_the_params_and_other_batches():
    """One plan for a loss, at other shapes, with dropout whose random numbers stay those."""
    params = {"a": array(0, 3, 8), "b": array(1, 8, 2)}

    def fn(p, x, key=None):
        h = jax.nn.relu(x @ p["a"])
        if key is not None:
            h = jnp.where(jax.random.bernoulli(key, 0.5, h.shape), h / 0.5, 0)
        return h @ p["b"]

    plan = random_plan(groups(fn, params, array(2, 2, 3)), 1)
    assert 0 < plan.shapes["a"][1] < 8
    x, key = array(3, 5, 3), jax.random.key(3)
    small, fewer = shrink(fn, params, plan)
    close(jax.jit(small)(fewer, x, key=key), fn(mask_channels(params, plan), x, key=key))
    loss = lambda p, x: jnp.mean(fn(p, x) ** 2)
    close(shrunk(loss, plan)(fewer, x), loss(mask_channels(params, plan), x))


@pytest.mark.slow
def test_batch_norm_in_training_gives_smaller_statistics():
    (apply, params, args), _ = SLOW["resnet"]()
    train = lambda p, x: apply(p, x, train=True, mutable=["batch_stats"])
    plan = random_plan(groups(apply, params, *args), 2)
    small, fewer = shrink(train, params, plan)
    (a, masked), (b, stats) = (
        train(mask_channels(params, plan), *args),
        jax.jit(small)(fewer, *args),
    )
    close(a, b)
    close(shrink_params(params | masked, plan)["batch_stats"], stats["batch_stats"])


def test_relu_keeps_its_derivative_at_zero():
    """Its rule meets zeros that know of no channels; at 0 it is 0, and that of max is 1/2."""
    fn = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
    params = {"up": array(0, 3, 6).at[:, 2].set(0), "down": array(1, 6, 2)}
    x = array(2, 4, 3)
    plan = keep_channels(groups(fn, params, x), _first(fn, params, x))
    small, fewer = shrink(fn, params, plan)
    slope = jax.jit(jax.grad(lambda p: small(p, x).sum()))(fewer)["up"]
    assert not slope[:, 1].any()
    assert slope[:, 0].any()


def hidden(act):
    params = {"up": array(0, 3, 6), "down": array(1, 6, 2)}
    fn = lambda p, x: act(x @ p["up"]) @ p["down"]
    return fn, params, array(2, 4, 3)


def test_a_custom_derivative_stays():
    """One that is not the derivative of what is computed, and that looks at its values."""
    act = jax.custom_jvp(lambda x: jnp.round(x))
    act.defjvp(lambda x, t: (jnp.round(x[0]), 3 * t[0] * jnp.cos(x[0])))
    fn, params, x = hidden(act)
    agree(fn, params, (x,), keep_channels(groups(fn, params, x), _first(fn, params, x)))


def _first(fn, params, x):
    (group,) = groups(fn, params, x).removable
    return {group: [0, 2, 5]}


def test_a_custom_backward_pass_stays():
    """One that is no derivative, with residuals that are computed, given and of another scale."""

    def backward(kept, g):
        x, slope, table = kept
        return g * slope + jnp.sign(x) * table[: x.shape[-1]], None

    act = jax.custom_vjp(lambda x, n: jnp.round(x) * n)
    table = jnp.arange(6.0)
    act.defvjp(lambda x, n: (jnp.round(x) * n, (x, jnp.cos(x), table)), backward)
    fn, params, x = hidden(lambda h: act(h, 2))
    plan = keep_channels(groups(fn, params, x), _first(fn, params, x))
    agree(fn, params, (x,), plan)
    whole, same = shrink(fn, params, keep_channels(groups(fn, params, x), {}))
    close(jax.grad(lambda p: whole(p, x).sum())(same), jax.grad(lambda p: fn(p, x).sum())(params))


def test_a_backward_pass_that_sums_over_removed_channels_is_refused():
    act = jax.custom_vjp(lambda x: x)
    act.defvjp(lambda x: (x, None), lambda _, g: (g - jnp.mean(g, -1, keepdims=True),))
    fn, params, x = hidden(act)
    plan = keep_channels(groups(fn, params, x), _first(fn, params, x))
    small, fewer = shrink(fn, params, plan)
    close(small(fewer, x), fn(mask_channels(params, plan), x))
    with pytest.raises(CompressError, match="cannot do without"):
        jax.grad(lambda p: small(p, x).sum())(fewer)


def test_training_goes_on_as_that_of_the_masked_model():
    fn, params, x = hidden(jnp.tanh)
    plan = keep_channels(groups(fn, params, x), _first(fn, params, x))
    loss = lambda fn: lambda p: jnp.sum((fn(p, x) - 1) ** 2)
    optimizer = optax.chain(optax.clip(1.0), optax.adamw(0.05))

    def steps(fn, p, state, n):
        @jax.jit
        def step(p, state):
            updates, state = optimizer.update(jax.grad(loss(fn))(p), state, p)
            return optax.apply_updates(p, updates), state

        for _ in range(n):
            p, state = step(p, state)
        return p, state

    whole = mask_channels(params, plan)
    whole, state = steps(fn, whole, optimizer.init(whole), 2)
    # The masked model is masked after each step, as its moments are.
    whole, moments = mask_channels(whole, plan), state
    small, fewer = shrink(fn, whole, plan)
    fewer, _ = steps(small, fewer, shrink_state(moments, whole, plan), 1)
    whole, _ = steps(fn, whole, moments, 1)
    close(shrink_params(whole, plan), fewer)


def test_the_state_of_a_part_of_the_variables():
    """With Linen the plan is of all variables, and the optimizer has the params alone."""
    _, params, x = hidden(jnp.tanh)
    variables = {"params": params, "batch_stats": {"mean": jnp.zeros(6)}}
    centred = lambda p, x, mean: jnp.tanh(x @ p["up"] - mean) @ p["down"]
    apply = lambda v, x: centred(v["params"], x, v["batch_stats"]["mean"])
    plan = keep_channels(groups(apply, variables, x), _first(apply, variables, x))
    state = optax.adam(0.1).init(params)
    small = shrink_state(state, params, plan.under("params"))
    fewer = shrink_params(variables, plan)["params"]
    assert jax.tree.map(jnp.shape, small[0].mu) == jax.tree.map(jnp.shape, fewer)
    with pytest.raises(CompressError, match=r'plan.under\("params"\)'):
        shrink_state(state, variables, plan)
    with pytest.raises(CompressError, match="no leaf of the plan"):
        plan.under("param")


def test_little_by_little():
    """The smaller function has groups of its own, and both plans together are one of the whole."""
    fn, params, x = hidden(lambda h: h * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1))
    first = keep_channels(groups(fn, params, x), _first(fn, params, x))
    small, fewer = shrink(fn, params, first)
    found = groups(small, fewer, x)
    (group,) = found.removable
    second = keep_channels(found, {group: [0, 2]})
    smaller, least = shrink(small, fewer, second)
    both = first.then(second)
    assert both.leaves[0].kept == ((0, 5), None)
    close(shrink_params(params, both), least)
    close(smaller(least, x), fn(mask_channels(params, both), x))
    close(shrunk(fn, both)(least, x), fn(mask_channels(params, both), x))
    with pytest.raises(CompressError, match="the plan is for"):
        second.then(first)


def test_factored_moments_are_refused():
    fn, params, x = hidden(jnp.tanh)
    plan = keep_channels(groups(fn, params, x), _first(fn, params, x))
    state = optax.adafactor(0.1, min_dim_size_to_factor=2).init(params)
    with pytest.raises(CompressError, match="begin it anew"):
        shrink_state(state, params, plan)


def test_smaller_and_then_compressed():
    fn, params, x = hidden(jnp.tanh)
    plan = keep_channels(groups(fn, params, x), _first(fn, params, x))
    small, fewer = shrink(fn, params, plan)
    stored = jc.compress(fewer, {"up": jc.Quantize("int8")})
    close(jc.compressed(small)(stored, x), small(jc.decompress(stored), x))
    with pytest.raises(CompressError, match="compress what is left"):
        shrink_params(jc.compress(params, {"up": jc.Quantize("int8")}), plan)


def test_a_plan_of_another_function_is_refused():
    fn, params, x = hidden(jnp.tanh)
    plan = keep_channels(groups(fn, params, x), _first(fn, params, x))
    small, fewer = shrink(lambda p, x: jax.nn.softmax(x @ p["up"]) @ p["down"], params, plan)
    with pytest.raises(CompressError, match="cannot do without"):
        small(fewer, x)
    split = lambda p, x: (x @ p["up"]).reshape(-1, 2, 3).sum(1) @ p["down"][:3]
    with pytest.raises(CompressError, match="go together with others"):
        shrunk(split, plan)(fewer, x)
    with pytest.raises(CompressError, match=r"the plan is for down of shape \(3, 2\)"):
        small(params, x)


def test_a_saved_plan_gives_the_same_function(tmp_path):
    fn, params, x = hidden(jnp.tanh)
    plan = keep_channels(groups(fn, params, x), _first(fn, params, x))
    small, fewer = shrink(fn, params, plan)
    jc.save(tmp_path / "model.safetensors", fewer, metadata={"plan": plan.to_json()})
    read = Plan.from_json(jc.read_metadata(tmp_path / "model.safetensors")["plan"])
    assert read == plan
    assert hash(read) == hash(plan)
    again = jc.load(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(shrunk(fn, read)(again, x), small(fewer, x))


@pytest.mark.parametrize(
    "text",
    [
        "", "[1]", "{}", '{"kept": [], "leaves": [["w", [3], [0]]]}',
        '{"kept": [[0, 5]], "leaves": [["w", [3], [0]]]}',
        '{"kept": [[1, 0]], "leaves": [["w", [3], [0]]]}',
        '{"kept": [[0]], "leaves": [["w", [3, 2], [0]]]}',
    ],
)  # fmt: skip
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(jc.FileError, match="no plan"):
        Plan.from_json(text)
