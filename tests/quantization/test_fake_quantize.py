"""Fake quantization: what is trained is what is stored, and gradients pass straight through."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jaxcompress as jc

SPECS = {
    "int8": jc.FakeQuantize("int8"),
    "int8 static": jc.FakeQuantize("int8", range="static"),
    "int4 groups": jc.FakeQuantize("int4", group_size=5, convention="full"),
    "uint3 affine groups": jc.FakeQuantize("uint3", group_size=4, symmetric=False),
    "uint8 affine static": jc.FakeQuantize("uint8", symmetric=False, range="static"),
    "int2 no clip": jc.FakeQuantize("int2", convention="no_clip"),
    "int6 float32 scales": jc.FakeQuantize("int6", scale_dtype="float32", axis=-1),
}


def as_stored(spec):
    """The `Quantize` of the same fields."""
    names = ("group_size", "axis", "symmetric", "scale_dtype", "convention")
    return jc.Quantize(spec.format, **{name: getattr(spec, name) for name in names})


@pytest.mark.thin(4)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, jnp.float32) for name in SPECS),
        ("int8", jnp.bfloat16),
        ("uint3 affine groups", jnp.bfloat16),
        ("int4 groups", jnp.float16),
    ],
)
def test_fake_and_stored_values_are_the_same_bits(name, dtype):
    w = jax.random.normal(jax.random.key(0), (3, 17, 9), jnp.float32).astype(dtype)
    leaf = SPECS[name](w)
    stored = as_stored(SPECS[name])(w)
    final = leaf.finalize()
    assert leaf.dtype == final.dtype == w.dtype
    assert jax.tree.structure(final) == jax.tree.structure(stored)
    for a, b in zip(jax.tree.leaves(final), jax.tree.leaves(stored), strict=True):
        np.testing.assert_array_equal(a, b)
    for run in (lambda f: f, jax.jit):
        values = run(lambda leaf: leaf.materialize())(leaf)
        np.testing.assert_array_equal(values, final.materialize())
    mapped = jax.vmap(lambda leaf: leaf.materialize())(leaf)
    np.testing.assert_array_equal(mapped, final.materialize())


@settings(max_examples=3)
@given(
    st.integers(0, 2**31 - 1),
    st.sampled_from([(1, 1), (7, 3), (16, 5), (2, 33, 4)]),
    st.integers(2, 8), st.booleans(), st.sampled_from([None, 1, 4, 7]),
    st.sampled_from([1e-30, 1.0, 1e30]), st.floats(0, 1),
)  # fmt: skip
def test_zeros_stay_and_finalize_changes_nothing(seed, shape, bits, symmetric, group, size, share):
    key, mask = jax.random.split(jax.random.key(seed))
    w = jax.random.normal(key, shape) * size * jax.random.bernoulli(mask, share, shape)
    name = f"{'' if symmetric else 'u'}int{bits}"
    leaf = jc.FakeQuantize(name, group_size=group, symmetric=symmetric)(w)
    values = leaf.materialize()
    assert not np.any(np.asarray(values)[np.asarray(w) == 0])
    np.testing.assert_array_equal(values, leaf.finalize().materialize())


def test_gradients_pass_straight_through_and_stop_where_clipped():
    w = jnp.array([[0.9, -2.0], [1.0, 0.3], [-0.2, 1.0]])
    leaf = jc.FakeQuantize("int4", range="static", scale_dtype="float32")(w)
    np.testing.assert_array_equal(leaf.scale, np.float32([[1 / 7, 2 / 7]]))
    # Codes now: 7.4 rounds to 7; 7.6 and -7.6 would round to 8 and are clipped.
    moved = jnp.array([[7.4, -7.6], [7.6, 7.49], [-7.4, 0.0]]) * leaf.scale
    leaf = leaf.replace(weight=moved)
    # Codes are within +-7, as the convention has them: -8 is none.
    codes = np.float32([[7, -7], [7, 7], [-7, 0]])
    np.testing.assert_array_equal(leaf.materialize(), codes * leaf.scale)
    np.testing.assert_array_equal(leaf.finalize().materialize(), codes * leaf.scale)
    weights = jnp.arange(1.0, 7.0).reshape(3, 2)
    loss = lambda leaf: jnp.sum(weights * leaf.materialize())
    grad = jax.grad(loss, allow_int=True)(leaf).weight
    np.testing.assert_array_equal(grad, [[1, 0], [0, 4], [5, 6]])
    np.testing.assert_array_equal(leaf.in_range(), [[1, 0], [0, 1], [1, 1]])
    # Forward mode agrees, and nothing is clipped where the range follows the weight.
    through = jax.jvp(lambda w: leaf.replace(weight=w).materialize(), (moved,), (weights,))[1]
    np.testing.assert_array_equal(through, grad)
    follows = jc.FakeQuantize("int4")(moved)
    np.testing.assert_array_equal(jax.grad(loss)(follows).weight, weights)


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float32"])
def test_no_weight_is_clipped_when_a_static_range_is_made(scale_dtype):
    # A bfloat16 scale may be rounded down, which moves code 255 by up to half a step.
    w = jax.random.normal(jax.random.key(0), (256, 512))
    for format, symmetric in (("uint8", False), ("int8", True), ("uint4", False)):
        spec = jc.FakeQuantize(format, symmetric=symmetric, range="static", scale_dtype=scale_dtype)
        assert bool(jnp.all(spec(w).in_range()))


def test_against_torch_fake_quantize():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    w = rng.normal(size=(40, 6)).astype(np.float32)
    spec = jc.FakeQuantize("uint8", symmetric=False, range="static", scale_dtype="float32")
    leaf = spec(jnp.asarray(w))
    moved = (w * rng.uniform(0.5, 2.0, w.shape)).astype(np.float32)
    leaf = leaf.replace(weight=jnp.asarray(moved))
    tensor = torch.tensor(moved, requires_grad=True)
    expected = torch.fake_quantize_per_channel_affine(
        tensor,
        torch.tensor(np.asarray(leaf.scale)[0]),
        torch.tensor(np.asarray(leaf.zero_point)[0].astype(np.int32)),
        1, 0, 255,
    )  # fmt: skip
    # torch multiplies by the inverse of the scale where we divide, so a tie may fall elsewhere.
    same = np.isclose(leaf.materialize(), expected.detach().numpy(), rtol=1e-6, atol=1e-7)
    assert same.mean() > 0.99
    expected.sum().backward()
    ours = jax.grad(lambda leaf: jnp.sum(leaf.materialize()), allow_int=True)(leaf).weight
    theirs = tensor.grad.numpy()
    # It takes the rounded code for the test of the range, as we do; but for ties.
    assert (np.asarray(ours) == theirs).mean() > 0.99
    assert 0 < (theirs == 0).mean() < 1


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.remat(nn.Dense)(8)(jnp.tanh(x)), None


class Everything(nn.Module):
    """A table with a tied head, a convolution, attention, a recurrence and a scanned stack."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(13, 8, name="embed")
        x = embed(ids)
        x = nn.Conv(8, (3,), name="conv")(x)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(x, x)
        x = nn.RNN(nn.GRUCell(8), name="rnn")(x)

        scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = scan(name="stack")(x, None)
        return embed.attend(x)


@pytest.mark.parametrize(
    "name",
    [
        "int8 static",
        pytest.param("int8", marks=pytest.mark.slow),
        pytest.param("uint3 affine groups", marks=pytest.mark.slow),
    ],
)
def test_logits_of_the_trained_and_the_final_model_are_the_same_bits(name):
    model, ids = Everything(), jax.random.randint(jax.random.key(0), (2, 6), 0, 13)
    variables = model.init(jax.random.key(1), ids)
    axes = jc.kernel_axes(model.apply, variables, ids)
    rules = {"**/kernel": SPECS[name], "**/embedding": SPECS[name]}
    fake = jc.compress(variables, rules, axes=axes)
    trainable, rest = jc.partition(fake)
    apply = jax.jit(jc.compressed(model.apply))
    loss = lambda t: jnp.mean(jc.compressed(model.apply)(jc.combine(t, rest), ids) ** 2)
    grads = jax.jit(jax.grad(loss))(trainable)
    assert all(float(jnp.max(jnp.abs(g))) > 0 for g in jax.tree.leaves(grads))
    tx = optax.adam(1e-2)
    updates, _ = tx.update(grads, tx.init(trainable), trainable)
    fake = jc.combine(optax.apply_updates(trainable, updates), rest)
    final = jc.finalize(fake)
    assert {type(x) for x in jax.tree.leaves(final, is_leaf=jc.is_compressed)} >= {
        jc.QuantizedArray
    }
    logits = apply(fake, ids)
    np.testing.assert_array_equal(logits, apply(final, ids))
    np.testing.assert_array_equal(logits, jax.jit(model.apply)(jc.decompress(final), ids))


def test_the_gradient_is_that_of_the_rounded_model_at_the_weight():
    """Straight through: the chain rule of the dense function at the rounded kernel."""
    x = jax.random.normal(jax.random.key(0), (5, 12))
    w = jax.random.normal(jax.random.key(1), (12, 4))
    fn = lambda w, x: jnp.sum(jnp.tanh(x @ w) ** 2)
    leaf = jc.FakeQuantize("int4", group_size=4)(w)
    ours = jax.jit(jax.grad(jc.compressed(fn)))(leaf, x).weight
    np.testing.assert_allclose(ours, jax.grad(fn)(leaf.materialize(), x), rtol=1e-5, atol=1e-6)


def test_mixed_precision_computes_in_bfloat16_and_trains_float32():
    model = nn.Dense(6, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (4, 8))
    params = jc.compress(model.init(jax.random.key(1), x), {"**/kernel": jc.FakeQuantize("int8")})
    apply = jax.jit(jc.compressed(model.apply))
    out = apply(params, x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, apply(jc.finalize(params), x))
    grads = jax.grad(lambda p: jnp.sum(jc.compressed(model.apply)(p, x).astype(jnp.float32)))(
        params
    )
    assert grads["params"]["kernel"].weight.dtype == jnp.float32


def test_it_loops_saves_and_reports(tmp_path):
    params = {"w": jax.random.normal(jax.random.key(0), (4, 6, 6))}
    small = jc.compress(params, {"w": jc.FakeQuantize("int8", range="static")})
    jc.save(tmp_path / "small.safetensors", small)
    back = jc.load(tmp_path / "small.safetensors")
    assert jax.tree.structure(back) == jax.tree.structure(small)
    np.testing.assert_array_equal(back["w"].materialize(), small["w"].materialize())
    assert jc.summary(params, small).rows[0]["form"] == "fake int8"
    assert jc.nbytes(small) > jc.nbytes(params)
    fn = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]
    x = jnp.ones((2, 6))
    np.testing.assert_array_equal(
        jax.jit(jc.compressed(fn))(small, x), jax.jit(fn)(jc.decompress(small), x)
    )


def test_bad_input():
    with pytest.raises(jc.SpecError, match="range='learned': write 'dynamic' or 'static'"):
        jc.FakeQuantize("int8", range="learned")
    with pytest.raises(jc.SpecError, match="unknown format 'int9'"):
        jc.FakeQuantize("int9")
    assert repr(jc.FakeQuantize("int8", range="static")) == "FakeQuantize('int8', range='static')"
