"""Taps against the hooks of the frameworks, and against functions that return the values."""

import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import jaxcompress as jc
from jaxcompress.distillation.taps import tap

X = jax.random.normal(jax.random.key(9), (5, 4))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.relu(nn.Dense(x.shape[-1], name="up")(x)), None


class Net(nn.Module):
    """A method, a module that is called twice, a scan, batch norm, dropout and remat."""

    def setup(self):
        self.shared = nn.Dense(4)
        lift = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3}
        self.layers = nn.scan(nn.remat(Block), **lift)()
        self.norm = nn.BatchNorm()
        self.drop = nn.Dropout(0.5)

    def embed(self, x):
        return {"once": self.shared(x), "twice": 2 * x, "size": x.shape[-1]}

    def __call__(self, x, train=False):
        x, _ = self.layers(self.embed(x)["once"], None)
        x = self.drop(self.norm(x, use_running_average=not train), deterministic=not train)
        return self.shared(x)


MODEL = Net()
VARIABLES = MODEL.init(jax.random.key(0), X)


def test_linen_modules_as_capture_intermediates_has_them():
    names = ["shared", "norm", "embed", "layers/up"]
    run = jax.jit(tap(MODEL.apply, names))
    out, found = run(VARIABLES, X)
    assert sorted(found) == sorted(names)
    plain, captured = MODEL.apply(VARIABLES, X, capture_intermediates=lambda *_: True)
    captured = captured["intermediates"]
    np.testing.assert_allclose(out, plain, rtol=1e-6)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    assert len(found["shared"]) == 2
    jax.tree.map(close, found["shared"], captured["shared"]["__call__"])
    close(found["norm"], captured["norm"]["__call__"][0])
    close(found["embed"]["twice"], 2 * X)
    assert found["embed"]["size"] == 4
    x = found["shared"][0]
    for n in range(3):  # what the scan stacked, layer by layer
        layer = jax.tree.map(lambda w, n=n: w[n], VARIABLES["params"]["layers"]["up"])
        up = x @ layer["kernel"] + layer["bias"]
        close(found["layers/up"][n], up)
        x = x + nn.relu(up)


def test_mutable_collections_rngs_and_static_arguments_stay():
    kwargs = {"mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(3)}, "train": True}
    expected = MODEL.apply(VARIABLES, X, **kwargs)
    (out, state), found = tap(MODEL.apply, ["norm", "drop"])(VARIABLES, X, **kwargs)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), (out, state), expected
    )
    dropped = np.asarray(found["drop"]) == 0
    assert 0 < dropped.mean() < 1
    np.testing.assert_allclose(found["drop"], np.where(dropped, 0, 2 * found["norm"]), rtol=1e-6)


def test_gradients_pass_through_what_is_tapped():
    run = tap(MODEL.apply, ["layers/up", "shared"])

    def by_tap(params):
        out, found = run({**VARIABLES, "params": params}, X)
        return jnp.sum(jnp.tanh(found["layers/up"])) + jnp.sum(out * found["shared"][0])

    def by_hand(params):
        dense = lambda p, x: x @ p["kernel"] + p["bias"]
        x = first = dense(params["shared"], X)
        total = 0
        for n in range(3):
            up = dense(jax.tree.map(lambda w, n=n: w[n], params["layers"]["up"]), x)
            total += jnp.sum(jnp.tanh(up))
            x = x + nn.relu(up)
        norm = params["norm"]
        x = x / jnp.sqrt(1 + 1e-5) * norm["scale"] + norm["bias"]
        return total + jnp.sum(dense(params["shared"], x) * first)

    params = VARIABLES["params"]
    found, expected = jax.jit(jax.grad(by_tap))(params), jax.jit(jax.grad(by_hand))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected
    )


def test_with_compressed_leaves_in_either_order():
    params = VARIABLES["params"]
    small = jc.compress(
        params, {"layers/up/kernel": jc.Quantize("int8"), "**/kernel": jc.LowRank(1)}
    )
    full = {**VARIABLES, "params": jc.decompress(small)}
    small = {**VARIABLES, "params": small}
    names = ["layers/up", "shared"]
    expected = tap(MODEL.apply, names)(full, X)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, jax.jit(tap(jc.compressed(MODEL.apply), names))(small, X), expected)
    jax.tree.map(close, jax.jit(jc.compressed(tap(MODEL.apply, names)))(small, X), expected)


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    @nnx.remat
    def __call__(self, x):
        return self.norm(nnx.relu(self.linear(x)))


class Graph(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Layer(rngs) for _ in range(2)])
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def encode(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def __call__(self, x):
        return self.drop(self.encode(x))


def test_nnx_modules_and_what_changes_in_them():
    model, other = Graph(nnx.Rngs(0)), Graph(nnx.Rngs(0))
    methods = [vars(cls)["__call__"] for cls in (Graph, nnx.Linear)]
    out, found = tap(model, ["encode", "layers/*/linear", "layers/1"])(X)
    assert sorted(found) == ["encode", "layers/0/linear", "layers/1", "layers/1/linear"]
    expected = other(X)  # running means and random counters are those of a plain call
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    plain = lambda m: jax.tree.leaves(nnx.state(m, nnx.Not(nnx.RngKey)))
    for a, b in zip(plain(model), plain(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    first = X @ model.layers[0].linear.kernel + model.layers[0].linear.bias
    np.testing.assert_allclose(found["layers/0/linear"], first, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["encode"], found["layers/1"])
    # No trace of it is left.
    assert [vars(cls)["__call__"] for cls in (Graph, nnx.Linear)] == methods
    assert not any(
        "jaxcompress" in str(name) for _, m in nnx.iter_modules(model) for name in vars(m)
    )
    _, again = tap(model.encode, "layers/0")(X)
    assert again["layers/0"].shape == (5, 4)
    # Random streams are arguments of their own, and modules may lie deeper.
    drop, rngs = nnx.Dropout(0.5), nnx.Rngs(0)
    run = tap(lambda tree, x, *, rngs: tree["drop"][0](x, rngs=rngs), "*")
    masks = [run({"drop": [drop]}, jnp.ones((8, 8)), rngs=rngs)[0] for _ in range(2)]
    assert rngs.default.count[...] == 2
    assert not np.array_equal(*masks)
    norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    tap(lambda tree, x: tree[0](x), "*")([norm], X)
    np.testing.assert_allclose(norm.mean[...], 0.01 * X.mean(0), rtol=1e-4)
    # One that cannot be changed inside of jit, and need not be.
    linear = model.layers[0].linear
    _, fixed = jax.jit(lambda x: tap(linear, "__call__")(x))(X)
    np.testing.assert_allclose(fixed["__call__"], linear(X), rtol=1e-6)


def test_nnx_merged_inside_stacked_and_compressed():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def stacked(rngs):
        return Layer(rngs)

    class Deep(nnx.Module):
        def __init__(self, rngs):
            self.layers = stacked(rngs)

        def __call__(self, x):
            run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return run(x, self.layers)

    graph, state = nnx.split(Deep(nnx.Rngs(0)))
    fn = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    fn(state, X)  # cached without tags
    out, found = tap(fn, ["layers/linear", "layers"])(state, X)
    assert found["layers/linear"].shape == (3, 5, 4)
    np.testing.assert_array_equal(found["layers"][-1], out)
    small = jc.compress(state, {"**/kernel": jc.Quantize("int8")})
    _, codes = jax.jit(tap(jc.compressed(fn), "layers/linear"))(small, X)
    np.testing.assert_allclose(codes["layers/linear"], found["layers/linear"], atol=0.1)


def test_nnx_in_its_own_jit_and_grad():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = (nnx.Linear(4, 4, rngs=rngs) for _ in range(2))
            self.norm = nnx.BatchNorm(4, rngs=rngs)

        @staticmethod
        def twice(x):
            return 2 * x

        def __call__(self, x):
            return self.b(self.norm(self.twice(self.a(x))))

    def tapped(model, x):
        out, found = tap(model, "a")(x)
        return jnp.sum(out**2) + jnp.sum(found["a"] ** 3)

    def plain(model, x):
        return jnp.sum(model(x) ** 2) + jnp.sum(model.a(x) ** 3)

    models = [Model(nnx.Rngs(0)) for _ in range(2)]
    grads = [nnx.jit(nnx.grad(fn))(model, X) for fn, model in zip((tapped, plain), models)]
    for found, expected in (grads, map(nnx.state, models)):  # running means have moved alike
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
        )
    assert np.any(models[0].norm.mean[...])


def flow(w, x):
    """Tags in a scan, in remat, in branches and in a while."""

    def body(c, wi):
        return checkpoint_name(jnp.tanh(c @ wi), "hidden"), c.sum()

    x, _ = jax.lax.scan(jax.checkpoint(body), x, w, reverse=True)
    twice = lambda x: checkpoint_name(2 * x, "branch")
    thrice = lambda x: checkpoint_name(checkpoint_name(3 * x, "branch") + 1, "other")
    x = jax.lax.cond(x.sum() > 0, twice, thrice, x)
    more = lambda x: checkpoint_name(x + 1, "turn")
    return jax.lax.while_loop(lambda x: checkpoint_name(jnp.max(x), "test") < 4, more, x)


def test_names_in_control_flow():
    w = jax.random.normal(jax.random.key(1), (3, 4, 4))
    run = jax.jit(tap(flow, ["hidden", "branch", "other", "turn"]))
    taken = set()
    for sign in (1, -1):
        out, found = run(w, sign * X)
        x, hidden = sign * X, []
        for wi in w[::-1]:
            x = jnp.tanh(x @ wi)
            hidden.append(x)
        np.testing.assert_allclose(found["hidden"], np.stack(hidden[::-1]), rtol=1e-5, atol=1e-6)
        taken.add(positive := bool(x.sum() > 0))
        np.testing.assert_allclose(
            found["branch"], (2 if positive else 3) * x, rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            found["other"], 0 * x if positive else 3 * x + 1, rtol=1e-5, atol=1e-6
        )
        np.testing.assert_array_equal(found["turn"], out)
        np.testing.assert_allclose(out, flow(w, sign * X), rtol=1e-5, atol=1e-6)
    assert taken == {True, False}


def test_a_module_in_several_branches():
    dense, norm = nn.Dense(4, name="dense"), nn.Dense(4, name="norm")
    params = dense.init(jax.random.key(0), X)

    def fn(params, x):
        first = lambda x: dense.apply(params, x)
        second = lambda x: 2 * norm.apply(params, dense.apply(params, -x))
        return jax.lax.cond(x.sum() > 0, first, second, x)

    run = jax.jit(tap(fn, "*"))
    for x in (X, -X):
        out, found = run(params, x)
        np.testing.assert_allclose(out, fn(params, x), rtol=1e-5, atol=1e-6)
        sign = 1 if x.sum() > 0 else -1
        called = found["__call__"]
        np.testing.assert_allclose(called[0], dense.apply(params, sign * x), rtol=1e-5, atol=1e-6)

    class Same(nn.Module):
        @nn.compact
        def __call__(self, x, keyed=False):
            return {"x": x} if keyed else x

    plain, keyed = lambda x: Same().apply({}, x), lambda x: Same().apply({}, x, True)["x"]
    with pytest.raises(jc.CompressError, match=r"float32\[5, 4\] of .*; give them two names"):
        tap(lambda x: jax.lax.cond(x.sum() > 0, plain, keyed, x), "*")(X)


def test_vmap_grad_and_taps_within_taps():
    class Turned(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="dense")(x)

    model = Turned()
    params = model.init(jax.random.key(0), X)
    mapped = jax.vmap(model.apply, in_axes=(None, 1), out_axes=1)
    _, found = tap(mapped, "dense")(params, X[:, None].repeat(3, 1))
    assert found["dense"].shape == (3, 5, 2)
    twice = jax.linear_transpose(lambda kernel: model.apply(kernel, X), params)
    _, found = tap(lambda y: (twice(y), model.apply(params, X)), "dense")(jnp.ones((5, 2)))
    assert found["dense"].shape == (5, 2)
    loss = lambda params, x: jnp.sum(jnp.square(model.apply(params, x)))
    (value, grads), found = tap(jax.value_and_grad(loss), "dense")(params, X)
    np.testing.assert_allclose(value, jnp.sum(jnp.square(found["dense"])), rtol=1e-6)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    inner = tap(model.apply, "dense")
    (out, first), second = tap(lambda p, x: inner(p, x), "*")(params, X)
    np.testing.assert_array_equal(first["dense"], second["dense"])
    np.testing.assert_array_equal(out, first["dense"])


def test_overridden_methods_and_other_threads():
    class Base(nn.Module):
        @nn.compact
        def __call__(self, x):
            return 2 * x

    class Sub(Base):
        def __call__(self, x):
            return super().__call__(x) + 1

    out, found = tap(lambda x: Sub().apply({}, x), "__call__")(X)
    np.testing.assert_array_equal(found["__call__"], out)
    model, values = nnx.Linear(4, 4, rngs=nnx.Rngs(0)), []

    def both(x):
        thread = threading.Thread(target=lambda: values.append(model(np.ones((1, 4)))))
        thread.start()
        thread.join()
        return model(x)

    _, found = tap(both, "__call__")(X)
    np.testing.assert_array_equal(found["__call__"], model(X))
    np.testing.assert_array_equal(values[0], model(np.ones((1, 4))))


def test_no_retrace_and_nothing_else_in_the_program():
    traces = []

    def fn(variables, x):
        traces.append(None)
        return MODEL.apply(variables, x)

    run = jax.jit(tap(fn, "norm"))
    run(VARIABLES, X)
    run(VARIABLES, X + 1)
    assert len(traces) == 1
    flops = lambda f: jax.jit(f).lower(VARIABLES, X).compile().cost_analysis()["flops"]
    assert flops(tap(MODEL.apply, "norm")) == flops(MODEL.apply)


def test_bad_names():
    there = "there are 'shared', 'embed', 'layers/up', 'layers', 'norm', 'drop', '__call__'"
    with pytest.raises(jc.RuleError, match=f"no intermediate value is named 'nor'; {there}"):
        tap(MODEL.apply, ["shared", "nor"])(VARIABLES, X)
    with pytest.raises(jc.RuleError, match="has none with a name: use Flax"):
        tap(jnp.sin, "a")(X)
    for bad in ((), [1], [None]):
        with pytest.raises(jc.RuleError, match="write one or more"):
            tap(jnp.sin, bad)
    with pytest.raises(jc.CompressError, match="'test' is inside of the test of a while"):
        tap(flow, "test")(jnp.ones((3, 4, 4)), X)

    @jax.custom_vjp
    def own(x):
        return checkpoint_name(x, "inner")

    own.defvjp(lambda x: (x, None), lambda _, g: (g,))
    with pytest.raises(jc.CompressError, match="'inner' is inside of a custom_vjp_call"):
        tap(own, "inner")(X)
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.shard_map(
        lambda x: checkpoint_name(x, "part"),
        mesh=mesh,
        in_specs=jax.sharding.PartitionSpec("d"),
        out_specs=jax.sharding.PartitionSpec("d"),
    )
    with pytest.raises(jc.CompressError, match="'part' is inside of a shard_map"):
        tap(spread, "part")(X)
    one = lambda x: checkpoint_name(x, "h")
    two = lambda x: checkpoint_name(x.T, "h").T
    with pytest.raises(jc.CompressError, match=r"'h' is float32\[4, 5\] in one branch"):
        tap(lambda x: jax.lax.cond(x.sum() > 0, one, two, x), "h")(X)
