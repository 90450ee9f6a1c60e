"""Input statistics, against inputs collected by hand: by Flax's interceptors, or in plain loops."""

import eight_devices
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jaxcompress as jc
from jaxcompress.input_stats import NAMES

# float32 sums of n products err by at most n eps relative to the sum of magnitudes; the references
# are float64. 1e-5 is 80 eps, for fewer than 1,000 terms that err at random.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def rows_of(x, contracted=1):
    """Inputs as float64 rows; the last axes are the contracted ones."""
    x = np.asarray(x, np.float64)
    return x.reshape(-1, int(np.prod(x.shape[x.ndim - contracted :])))


def check(found, rows, stack=()):
    """All statistics of one contraction against its rows."""
    rows = np.asarray(rows, np.float64)
    assert found.gram.dtype == jnp.float32
    np.testing.assert_array_equal(found.count, np.full(stack, rows.shape[-2]))
    np.testing.assert_allclose(found.gram, np.swapaxes(rows, -1, -2) @ rows, **TOLERANCE)
    np.testing.assert_allclose(found.second_moment, np.mean(rows**2, axis=-2), **TOLERANCE)
    np.testing.assert_allclose(found.abs_mean, np.mean(np.abs(rows), axis=-2), **TOLERANCE)
    np.testing.assert_allclose(found.abs_max, np.max(np.abs(rows), axis=-2), rtol=1e-6)
    edges = jc.histogram_edges().astype(np.float64)
    flat = np.abs(rows).reshape(*stack, -1).astype(np.float32)
    counted = np.stack([np.histogram(x, edges)[0] for x in flat.reshape(-1, flat.shape[-1])])
    if rows.dtype == np.float64 and found.histogram.sum() != counted.sum():
        raise AssertionError("values were counted twice or not at all")
    # A value within rounding of an edge may fall on either side.
    assert np.abs(found.histogram.reshape(counted.shape) - counted).sum() <= 2


def everything(fn, params, batches, **kwargs):
    return jc.observe(fn, params, batches, NAMES, **kwargs)


def intercepted(model, variables, *args):
    """The inputs of every Dense, DenseGeneral, Conv and Embed of a Linen model, by path."""
    seen = {}

    def record(call, args, kwargs, context):
        called = context.method_name in ("__call__", "attend")
        if called and isinstance(context.module, (nn.Dense, nn.DenseGeneral, nn.Conv, nn.Embed)):
            path = "/".join(("params", *context.module.path))
            seen.setdefault(path, []).append((context.method_name, args[0]))
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        model.apply(variables, *args)
    return seen


class Encoder(nn.Module):
    """Embedding, attention, a Dense, a DenseGeneral over two axes, and the tied head."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, 8, name="embed")
        x = embed(ids)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(x, x)
        x = nn.gelu(nn.Dense(12, name="up")(x))
        x = nn.DenseGeneral((2, 4), name="split")(x)
        x = nn.DenseGeneral(8, axis=(-2, -1), name="joined")(x)
        return embed.attend(x)


def test_dense_general_attention_embedding_and_tied_head():
    model, ids = Encoder(), jax.random.randint(jax.random.key(0), (3, 5), 0, 11)
    variables = model.init(jax.random.key(1), ids)
    # A last layer that makes no use of its values, and no gradient: argmax.
    apply = lambda v, ids: jnp.argmax(model.apply(v, ids), axis=-1)
    stats = everything(apply, variables, [ids[:2], ids[2:]])
    seen = intercepted(model, variables, ids)
    where = {
        "params/attention/query": ((-3,), 1),
        "params/attention/key": ((-3,), 1),
        "params/attention/value": ((-3,), 1),
        "params/attention/out": ((-3, -2), 2),
        "params/up": ((-2,), 1),
        "params/split": ((-3,), 1),
        "params/joined": ((-3, -2), 2),
    }
    for path, (axes, contracted) in where.items():
        ((_, x),) = seen[path]
        assert set(stats[f"{path}/kernel"]) == {axes}
        check(stats[f"{path}/kernel"][axes], rows_of(x, contracted))
    assert set(stats) == {*(f"{p}/kernel" for p in where), "params/embed/embedding"}
    (_, _), (method, head) = seen["params/embed"]
    table = stats["params/embed/embedding"]
    assert method == "attend"
    assert set(table) == {(-2,), (-1,)}
    check(table[-1,], rows_of(head))
    uses = np.bincount(np.asarray(ids).reshape(-1), minlength=11)
    look_up = table[-2,]
    assert look_up.count == ids.size
    np.testing.assert_array_equal(look_up.gram, uses)
    np.testing.assert_allclose(look_up.second_moment, uses / ids.size, rtol=1e-6)
    np.testing.assert_array_equal(look_up.abs_max, np.minimum(uses, 1))
    assert look_up.histogram.sum() == ids.size * 11
    assert look_up.histogram[127 * 8] == ids.size


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strides": (2, 1), "padding": ((1, 2), (0, 1))},
        {"kernel_dilation": 2, "padding": "VALID"},
        {"input_dilation": (1, 2), "padding": ((1, 1), (2, 0))},
        {"feature_group_count": 2},
        {"feature_group_count": 4},
    ],
    ids=str,
)
def test_patches_of_convolutions(options):
    model = nn.Conv(8, (3, 2), use_bias=False, **options)
    x = jax.random.normal(jax.random.key(0), (2, 7, 6, 4))
    params = model.init(jax.random.key(1), x)
    found = everything(model.apply, params, [x])["params/kernel"][-4, -3, -2]
    groups = options.get("feature_group_count", 1)
    gram = np.asarray(found.gram).reshape(groups, -1, found.gram.shape[-1])
    # The convolution is linear in its kernel: its outputs for unit kernels are the patches.
    size = gram.shape[-1]
    units = np.eye(size, dtype=np.float32).reshape(3, 2, 4 // groups, size)
    unit = nn.Conv(groups * size, (3, 2), use_bias=False, **options)
    patches = unit.apply({"params": {"kernel": jnp.tile(units, (1, 1, 1, groups))}}, x)
    patches = np.asarray(patches, np.float64).reshape(-1, groups, size)
    for group in range(groups):
        rows = patches[:, group]
        np.testing.assert_allclose(gram[group], rows.T @ rows, **TOLERANCE)
        of_group = jax.tree.map(lambda a, n=group: a[n], found) if groups > 1 else found
        check(of_group, rows)


def test_a_convolution_of_one_and_of_three_dimensions():
    for shape, kernel in (((2, 9, 3), (4,)), ((1, 4, 5, 3, 2), (2, 3, 1))):
        model = nn.Conv(5, kernel, use_bias=False)
        x = jax.random.normal(jax.random.key(0), shape)
        params = model.init(jax.random.key(1), x)
        ((axes, found),) = everything(model.apply, params, [x])["params/kernel"].items()
        assert axes == tuple(range(-len(kernel) - 2, -1))
        size = int(np.prod(kernel)) * shape[-1]
        units = np.eye(size, dtype=np.float32).reshape(*kernel, shape[-1], size)
        patches = nn.Conv(size, kernel, use_bias=False).apply({"params": {"kernel": units}}, x)
        check(found, np.asarray(patches, np.float64).reshape(-1, size))


def test_a_recurrent_network_that_closes_over_its_kernels():
    model, x = nn.RNN(nn.LSTMCell(4)), jax.random.normal(jax.random.key(0), (3, 6, 5))
    params = model.init(jax.random.key(1), x)
    stats = everything(model.apply, params, [x])
    hidden = np.asarray(model.apply(params, x))
    before = np.concatenate([np.zeros((3, 1, 4)), hidden[:, :-1]], axis=1)
    for gate in "ifgo":
        check(stats[f"params/cell/i{gate}/kernel"][-2,], rows_of(x))
        check(stats[f"params/cell/h{gate}/kernel"][-2,], rows_of(before))


def layers(stack, x):
    """tanh layers, one after the other, and the inputs of each."""
    inputs = []
    for w in np.asarray(stack, np.float64):
        inputs.append(x)
        x = np.tanh(x @ w)
    return np.stack(inputs), x


STACK = jax.random.normal(jax.random.key(0), (3, 4, 4)) / 2
X = np.asarray(jax.random.normal(jax.random.key(1), (5, 4)), np.float64)


def scanned(params, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]


def rematerialized(params, x):
    body = jax.checkpoint(lambda x, w: jnp.tanh(x @ w))
    return lax.scan(lambda x, w: (body(x, w), None), x, params["w"])[0]


def under_custom_rules(params, x):
    @jax.custom_vjp
    def layer(x, w):
        return jnp.tanh(x @ w)

    layer.defvjp(lambda x, w: (layer(x, w), None), lambda res, g: (g, g))
    inner = jax.custom_jvp(lambda x, w: layer(x, w))
    inner.defjvp(lambda p, t: (inner(*p), t[0]))
    return lax.scan(lambda x, w: (inner(x, w), None), x, params["w"])[0]


@pytest.mark.parametrize("fn", [scanned, rematerialized, under_custom_rules])
def test_a_scanned_stack_has_the_statistics_of_each_layer(fn):
    inputs, _ = layers(STACK, X)
    found = everything(fn, {"w": STACK}, [jnp.asarray(X, jnp.float32)])["w"][-2,]
    check(found, inputs, stack=(3,))


def test_stacks_of_stacks_and_reversed_scans():
    stack = jnp.stack([STACK, 2 * STACK])

    def fn(params, x):
        def inner(x, w):
            return jnp.tanh(x @ w), None

        return lax.scan(lambda x, ws: lax.scan(inner, x, ws, reverse=True), x, params["w"])[0]

    x, rows = X, []
    for block in np.asarray(stack, np.float64):
        inputs, x = layers(block[::-1], x)
        rows.append(inputs[::-1])
    found = everything(fn, {"w": stack}, [jnp.asarray(X, jnp.float32)])["w"][-2,]
    check(found, np.stack(rows), stack=(2, 3))


def test_a_stack_scanned_within_a_loop_and_a_weight_closed_over_within_a_scanned_stack():
    def fn(params, x):
        def block(x, w):
            return jnp.tanh(x @ w @ params["shared"]), None

        return lax.fori_loop(0, 2, lambda _, x: lax.scan(block, x, params["w"])[0], x)

    shared = np.asarray(STACK[0], np.float64)
    x, first, second = X, [[], [], []], []
    for _ in range(2):
        for n, w in enumerate(np.asarray(STACK, np.float64)):
            first[n].append(x)
            second.append(x @ w)
            x = np.tanh(x @ w @ shared)
    params = {"w": STACK, "shared": STACK[0]}
    stats = everything(fn, params, [jnp.asarray(X, jnp.float32)])
    check(stats["w"][-2,], np.stack([np.concatenate(f) for f in first]), stack=(3,))
    check(stats["shared"][-2,], np.concatenate(second))


def test_while_and_cond():
    def fn(params, x, n):
        def body(state):
            i, x = state
            x = lax.cond(i % 2 == 0, lambda x: x @ params["a"], lambda x: x @ params["b"], x)
            return i + 1, jnp.tanh(x)

        return lax.while_loop(lambda s: s[0] < n, body, (0, x))[1]

    a, b = np.asarray(STACK[:2], np.float64)
    x, even, odd = X, [], []
    for i in range(5):
        (odd if i % 2 else even).append(x)
        x = np.tanh(x @ (b if i % 2 else a))
    params = {"a": STACK[0], "b": STACK[1]}
    batch = (jnp.asarray(X, jnp.float32), jnp.int32(5))
    stats = everything(fn, params, [batch])
    check(stats["a"][-2,], np.concatenate(even))
    check(stats["b"][-2,], np.concatenate(odd))


def test_a_weight_used_twice_sums_and_stop_gradient_hides_nothing():
    def fn(params, x):
        hidden = lax.stop_gradient(jnp.round(x @ params["w"]))
        return jnp.argmax(hidden @ lax.stop_gradient(params["w"]).astype(jnp.float32))

    w = np.asarray(STACK[0], np.float64)
    found = everything(fn, {"w": STACK[0]}, [jnp.asarray(X, jnp.float32)])["w"][-2,]
    check(found, np.concatenate([X, np.round(X @ w)]))


def test_transposed_einsums_and_batched_experts():
    def fn(params, x):
        y = jnp.einsum("bi,oi->bo", x, params["rows"])
        return jnp.einsum("bi,eio->ebo", y, params["shared"]) @ params["experts"]

    keys = jax.random.split(jax.random.key(2), 3)
    params = {
        "rows": jax.random.normal(keys[0], (6, 4)),
        "shared": jax.random.normal(keys[1], (3, 6, 2)),
        "experts": jax.random.normal(keys[2], (3, 2, 5)),
    }
    stats = everything(fn, params, [jnp.asarray(X, jnp.float32)])
    y = X @ np.asarray(params["rows"], np.float64).T
    check(stats["rows"][-1,], X)
    check(stats["shared"][-2,], y)
    inputs = np.einsum("bi,eio->ebo", y, np.asarray(params["shared"], np.float64))
    check(stats["experts"][-2,], inputs, stack=(3,))


# Functions linear in a weight whose last axis is the output, which meets its inputs in another
# order than it has them; and the shape of the weight and of the inputs.
REORDERED = {
    "reversed": (lambda w, x: x @ w[::-1], (12, 2), (5, 12)),
    "merged": (lambda w, x: x @ w.transpose(1, 0, 2).reshape(12, 2), (3, 4, 2), (5, 12)),
    "shuffled": (
        lambda w, x: x @ w.reshape(3, 4, 2).transpose(1, 0, 2).reshape(12, 2), (12, 2), (5, 12),
    ),
    "split": (lambda w, x: jnp.einsum("bji,ijo->bo", x, w.reshape(3, 4, 2)), (12, 2), (5, 4, 3)),
    "split and reversed": (
        lambda w, x: jnp.einsum("bji,ijo->bo", x, w[::-1].reshape(3, 2, 2, 2)[:, ::-1].reshape(3, 4, 2)),
        (12, 2), (5, 4, 3),
    ),
    "two axes in the other order": (
        lambda w, x: jnp.tensordot(x, w, axes=((1, 2), (1, 0))), (3, 4, 2), (5, 4, 3),
    ),
    "a unit axis": (
        lambda w, x: jnp.einsum("zbk,zko->bo", x, w.reshape(1, 12, 2)), (12, 2), (1, 5, 12),
    ),
    "one by one": (
        lambda w, x: lax.conv_general_dilated(
            x[:, None], w.reshape(1, 12, 2), (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )[:, 0],
        (12, 2), (5, 12),
    ),
    "rows on the right": (lambda w, x: (w.T @ x.T).T, (12, 2), (5, 12)),
}  # fmt: skip


@pytest.mark.parametrize("name", REORDERED)
def test_inputs_come_in_the_order_of_the_weight(name):
    fn, shape, inputs = REORDERED[name]
    w, x = jax.random.normal(jax.random.key(0), shape), jax.random.normal(jax.random.key(1), inputs)
    # What multiplies each weight of the first output, for each row.
    rows = np.asarray(jax.jacobian(lambda w: fn(w, x)[..., 0])(w)[..., 0], np.float64)
    ((axes, found),) = everything(lambda p, x: fn(p["w"], x), {"w": w}, [x])["w"].items()
    assert axes == tuple(range(-len(shape), -1))
    check(found, rows.reshape(5, 12))


def test_a_transposed_convolution_with_a_flipped_kernel():
    x = jax.random.normal(jax.random.key(0), (2, 4, 5, 3))
    for transpose in (False, True):
        model = nn.ConvTranspose(3, (3, 2), (2, 1), transpose_kernel=transpose, use_bias=False)
        params = model.init(jax.random.key(1), x)
        first = lambda p, model=model: model.apply(p, x)[..., 0]
        jacobian = jax.jacobian(first)(params)["params"]["kernel"]
        ((axes, found),) = everything(model.apply, params, [x])["params/kernel"].items()
        # The axis of the outputs is the last one, or the one before it.
        rows = jacobian[..., 0, :] if transpose else jacobian[..., 0]
        assert axes == ((-4, -3, -1) if transpose else (-4, -3, -2))
        check(found, np.asarray(rows, np.float64).reshape(-1, 18))


def test_a_stack_in_another_order_and_one_that_is_split():
    stack, x = jax.random.normal(jax.random.key(0), (6, 6, 4)), np.zeros((3, 5, 2, 6))
    x = np.random.default_rng(0).normal(size=x.shape)
    fn = lambda p, x: jnp.einsum("mbnk,nmko->mbno", x, p["w"].reshape(2, 3, 6, 4))
    found = everything(fn, {"w": stack}, [jnp.asarray(x, jnp.float32)])["w"][-2,]
    check(found, x.transpose(2, 0, 1, 3).reshape(6, 5, 6), stack=(6,))
    merged = lambda p, x: jnp.einsum(
        "nbk,nko->nbo", x, p["w"].transpose(1, 0, 2, 3).reshape(6, 6, 4)
    )
    x = np.random.default_rng(1).normal(size=(6, 5, 6))
    two = {"w": stack.reshape(3, 2, 6, 4)}
    found = everything(merged, two, [jnp.asarray(x, jnp.float32)])["w"][-2,]
    check(found, x.reshape(2, 3, 5, 6).transpose(1, 0, 2, 3), stack=(3, 2))


@pytest.mark.parametrize("layers_of", [1, 3])
def test_a_scanned_weight_that_is_transposed_in_the_body(layers_of):
    stack = STACK[:layers_of]
    fn = lambda p, x: lax.scan(
        lambda x, w: (jnp.tanh(x @ w.reshape(2, 2, 4).reshape(4, 4).T), None), x, p["w"]
    )[0]
    inputs, _ = layers(jnp.swapaxes(stack, 1, 2), X)
    found = everything(fn, {"w": stack}, [jnp.asarray(X, jnp.float32)])["w"][-1,]
    check(found, inputs, stack=(layers_of,))


@pytest.mark.parametrize("mode", ["fill", "clip", "wrap"])
def test_look_ups_out_of_bounds(mode):
    ids = jnp.array([[0, -1, 7], [-7, 5, 5]])
    table = jnp.arange(6.0)[:, None] + 1
    fn = lambda p, ids: jnp.take(p["w"], ids, axis=0, mode=mode)
    found = everything(fn, {"w": table}, [ids])["w"][-2,]
    read = np.nan_to_num(np.asarray(fn({"w": table}, ids))).reshape(-1).astype(int)
    uses = np.bincount(read, minlength=7)[1:]
    np.testing.assert_array_equal(found.gram, uses)
    assert found.count == 6
    assert found.histogram[127 * 8] == uses.sum()
    assert found.histogram.sum() == 36


def test_the_zeros_of_many_look_ups_are_counted():
    ids = jnp.zeros((8, 1024), jnp.int32)
    fn = lambda p, ids: p["w"][ids].sum()
    found = jc.observe(fn, {"w": jnp.ones((2**18, 1))}, [ids], "histogram")["w"][-2,]
    assert found.histogram[0] == 2**13 * 2**18 - 2**13


def test_batches_without_rows_and_batches_that_meet_other_weights():
    x = jnp.asarray(X, jnp.float32)
    fn = lambda p, x: x @ p["w"] @ p["v"] if x.shape[0] > 3 else x @ p["v"]
    params = {"w": STACK[0], "v": STACK[1]}
    for order in ([x, x[:2], x[:0]], [x[:0], x[:2], x]):
        stats = everything(fn, params, order)
        check(stats["w"][-2,], X)
        hidden = X @ np.asarray(STACK[0], np.float64)
        check(stats["v"][-2,], np.concatenate([hidden, X[:2]]))
    # A prefix sum takes empty slices of its own.
    scan = lambda p, x: lax.associative_scan(lambda a, b: jnp.tanh(a @ p["w"]) + b, x)
    assert jc.observe(scan, params, [x])["w"][-2,].count > 0


def test_batches_add_up_whatever_their_size():
    apply = lambda params, batch: batch["x"] @ params["w"]
    params = {"w": STACK[0]}
    x = jnp.asarray(X, jnp.float32)
    whole = everything(apply, params, [{"x": x}])["w"][-2,]
    parts = everything(apply, params, ({"x": part} for part in (x[:2], x[2:4], x[4:])))["w"][-2,]
    np.testing.assert_allclose(whole.gram, parts.gram, **TOLERANCE)
    np.testing.assert_allclose(whole.abs_mean, parts.abs_mean, **TOLERANCE)
    np.testing.assert_array_equal(whole.abs_max, parts.abs_max)
    np.testing.assert_array_equal(whole.histogram, parts.histogram)
    assert whole.count == parts.count == 5


def test_bfloat16_models_accumulate_in_float32():
    x = jax.random.normal(jax.random.key(0), (4096, 2)).astype(jnp.bfloat16)
    apply = lambda params, x: x @ params["w"]
    params = {"w": jnp.ones((2, 2), jnp.bfloat16)}
    found = everything(apply, params, [x, x])["w"][-2,]
    # Products of bfloat16 are exact in float32, and 8,192 of them err by less than 2**-11.
    rows = np.asarray(x, np.float64)
    np.testing.assert_allclose(found.gram, 2 * rows.T @ rows, rtol=2**-11, atol=2.0)
    assert found.gram.dtype == jnp.float32
    # bfloat16 would have stopped counting at 256.
    assert found.second_moment[0] > 0.9


def test_nnx_and_compressed_params():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    apply = lambda state, x: nnx.merge(graph, state)(x)
    x = jnp.asarray(X, jnp.float32)
    check(everything(apply, state, [x])["kernel"][-2,], X)
    small = jc.compress(state, {"kernel": jc.Quantize("int8")})
    check(everything(apply, small, [x])["kernel"][-2,], X)


def test_leaves_are_chosen_and_static_arguments_stay():
    def fn(params, x, mode):
        return (x @ params["a"] @ params["b"]) if mode == "both" else x @ params["a"]

    params = {"a": STACK[0], "b": STACK[1]}
    x = jnp.asarray(X, jnp.float32)
    stats = jc.observe(fn, params, [(x, "both")], leaves="b")
    assert set(stats) == {"b"}
    assert stats["b"][-2,].abs_max is None
    assert set(jc.observe(fn, params, [(x, "one")])) == {"a"}


SHARDED = """
import sys, flax.linen as nn, jax, jax.numpy as jnp, numpy as np, jaxcompress as jc
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxcompress.input_stats import NAMES
assert len(jax.devices()) == 8
kind = getattr(AxisType, sys.argv[1])
mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
def same(one, other):
    assert one.keys() == other.keys()
    for path in one:
        for axes, found in one[path].items():
            assert found.fisher is other[path][axes].fisher is None
            for a, b in zip(found[:-1], other[path][axes]):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
stack, x = jax.random.normal(jax.random.key(0), (3, 4, 6)), jnp.ones((8, 4)) * jnp.arange(8.0)[:, None]
def fn(params, x):
    up = lambda x, w: (jnp.tanh(jnp.tanh(x @ w) @ params["down"]), None)
    return lax.scan(up, x, params["w"])[0]
params = {"w": stack, "down": jnp.ones((6, 4))}
alone = jc.observe(fn, params, [x], NAMES)
with jax.set_mesh(mesh):
    same(alone, jc.observe(fn, jax.tree.map(lambda a: put(a, P()), params), [put(x, P("data"))], NAMES))
    if kind == AxisType.Auto:  # weights that are split as well; an Explicit mesh has no type for it
        there = {"w": put(stack, P(None, None, "model")), "down": put(params["down"], P("model"))}
        same(alone, jc.observe(fn, there, [put(x, P("data"))], NAMES))
        model, ids = nn.Embed(16, 4), jnp.arange(8) * 2
        v = model.init(jax.random.key(0), ids)
        same(jc.observe(model.apply, v, [ids], NAMES),
             jc.observe(model.apply, v, [put(ids, P("data"))], NAMES))
        conv, x = nn.Conv(4, (3, 3)), jax.random.normal(jax.random.key(1), (8, 6, 6, 2))
        v = conv.init(jax.random.key(0), x)
        same(jc.observe(conv.apply, v, [x], NAMES),
             jc.observe(conv.apply, v, [put(x, P("data"))], NAMES))
"""


@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
def test_sums_are_over_all_devices(axes):
    eight_devices.run(SHARDED, axes)


def test_what_cannot_be_observed_is_said():
    x, params = jnp.asarray(X, jnp.float32), {"w": STACK[0], "other": STACK[1], "stack": STACK}
    apply = lambda params, x: x @ params["w"]
    with pytest.raises(jc.SpecError, match=r"^other meets|^other"):
        jc.observe(apply, params, [x], leaves=("w", "other"))
    with pytest.raises(jc.SpecError, match="no leaf of the params meets"):
        jc.observe(lambda params, x: x + params["w"].sum(), params, [x])
    with pytest.raises(jc.SpecError, match="batches is empty"):
        jc.observe(apply, params, [])
    with pytest.raises(jc.SpecError, match="write some of gram, second_moment"):
        jc.observe(apply, params, [x], ("hessian",))
    with pytest.raises(jc.RuleError, match="matches no leaf"):
        jc.observe(apply, params, [x], leaves="q")
    with pytest.raises(jc.SpecError, match="w: its inputs are NaN or infinite"):
        jc.observe(apply, params, [x.at[0, 0].set(jnp.nan)])

    def branch(params, x, taken):
        return lax.cond(taken, lambda x: x @ params["w"], lambda x: x @ params["other"], x)

    with pytest.raises(jc.SpecError, match=r"w: met no input on axes \(-2,\)"):
        jc.observe(branch, params, [(x, jnp.asarray(False))])
    with pytest.raises(jc.SpecError, match="2 of the 4 places of its axis -2 are taken out"):
        jc.observe(lambda params, x: x[:, :2] @ params["w"][:2], params, [x])
    with pytest.raises(jc.SpecError, match="2 of the 3 places of its axis -3 are taken out"):
        jc.observe(lambda p, x: jnp.stack([x, x]) @ p["stack"][:2], params, [x])
    scan = lambda w, x: lax.scan(lambda x, w: (x @ w, None), x, w)[0]
    for part in (slice(None, 2), slice(None, None, -1)):
        with pytest.raises(jc.SpecError, match="a scan runs over part of its stack, or in another"):
            jc.observe(lambda p, x, part=part: scan(p["stack"][part], x), params, [x])
    with pytest.raises(jc.SpecError, match="w: its inputs are complex, and only real ones"):
        jc.observe(lambda p, x: (x + 1j) @ p["w"], params, [x])
    with pytest.raises(jc.SpecError, match="meets inputs as one weight and as a stack"):
        jc.observe(
            lambda p, x: jnp.einsum("bi,nio->nbo", x, p["stack"]) + jnp.stack([x] * 3) @ p["stack"],
            params, [x],
        )  # fmt: skip
    with pytest.raises(jc.SpecError, match="w: its inputs are NaN or infinite"):
        jc.observe(apply, params, [x.at[0, 0].set(jnp.inf)], "histogram")
    with pytest.raises(jc.SpecError, match="entry of its axis -3 was taken by an index"):
        jc.observe(lambda params, x: x @ params["stack"][1], params, [x])


def test_a_progress_bar_on_standard_error(capsys):
    apply = lambda params, x: x @ params["w"]
    jc.observe(apply, {"w": STACK[0]}, [jnp.ones((2, 4))] * 3, progress=True)
    assert "observing" in capsys.readouterr().err
