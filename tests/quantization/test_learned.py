"""Trained quantized weights: what is trained is what is stored, whatever the method."""

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
from jaxcompress.pruning.gates import sample
from jaxcompress.quantization import learned
from jaxcompress.quantization.learned.sums import exact_mean, exact_sum

SPECS = {
    "lsq": learned.LSQ("int2"),
    "lsq groups": learned.LSQ("int4", group_size=5),
    "lsq tensor": learned.LSQ("int3", granularity="tensor", scale_dtype="float32"),
    "lsq+": learned.LSQPlus("uint3"),
    "lsq+ signed groups": learned.LSQPlus("int4", group_size=4),
    "dorefa": learned.DoReFa(3),
    "wrpn": learned.WRPN(4),
    "dsq": learned.DSQ(2),
    "dsq channel": learned.DSQ(4, granularity="channel"),
    "qil": learned.QIL(3),
    "binary connect": learned.BinaryConnect(),
    "xnor": learned.XNOR(),
    "xnor groups": learned.XNOR(group_size=4),
    "loss aware": learned.LossAwareBinary(),
    "multi-bit": learned.MultiBit(2),
    "multi-bit 3": learned.MultiBit(3, rounds=1),
    "twn": learned.TWN(),
    "twn groups": learned.TWN(granularity="channel", group_size=3),
    "bitnet": learned.BitNet(),
    "ttq": learned.TTQ(),
    "noise": learned.QuantNoise(learned.LSQ("int2"), 0.3, block_size=2),
    "fake noise": learned.QuantNoise(jc.FakeQuantize("int3")),
}
NO_ZERO = (
    "dorefa",
    "binary connect",
    "xnor",
    "xnor groups",
    "loss aware",
    "multi-bit",
    "multi-bit 3",
)
WITH_ZERO = [name for name in SPECS if name not in NO_ZERO]


def values(leaf):
    return leaf.materialize()


compiled = jax.jit(values)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("lsq groups", jnp.float32), ("lsq+", jnp.bfloat16), ("dsq", jnp.float32),
        ("ttq", jnp.bfloat16), ("xnor groups", jnp.float16),
        *(pytest.param(name, dtype, marks=pytest.mark.slow)
          for name in SPECS for dtype in (jnp.float32, jnp.bfloat16)),
    ],
)  # fmt: skip
def test_trained_and_stored_values_are_the_same_bits(name, dtype):
    w = jax.random.normal(jax.random.key(0), (3, 17, 9), jnp.float32).astype(dtype)
    leaf = SPECS[name](w)
    final = leaf.finalize()
    assert leaf.dtype == final.dtype == w.dtype
    assert leaf.shape == final.shape == w.shape
    assert final.nbytes < 0.7 * w.nbytes  # scales and zero points of groups of four included
    expected = np.asarray(compiled(final))
    assert np.isfinite(expected.astype(np.float32)).all()
    np.testing.assert_array_equal(compiled(leaf), expected)
    # A stack of three is three.
    one = SPECS[name](w[1])
    np.testing.assert_array_equal(compiled(one), expected[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_step_by_step_and_mapped_values_are_the_same_bits(name):
    leaf = SPECS[name](jax.random.normal(jax.random.key(0), (3, 17, 9)))
    expected = leaf.finalize().materialize()
    np.testing.assert_array_equal(values(leaf), expected)
    np.testing.assert_array_equal(jax.vmap(values)(leaf), expected)


@pytest.mark.parametrize(
    "name",
    [n if n == "lsq+" else pytest.param(n, marks=pytest.mark.slow) for n in WITH_ZERO],
)
@settings(max_examples=5)
@given(
    st.integers(0, 2**31 - 1), st.sampled_from([1e-30, 1.0, 1e30]), st.floats(0, 1),
)  # fmt: skip
def test_zeros_stay(name, seed, size, share):
    key, mask = jax.random.split(jax.random.key(seed))
    w = jax.random.normal(key, (7, 3)) * size * jax.random.bernoulli(mask, share, (7, 3))
    leaf = SPECS[name](w)
    out = np.asarray(compiled(leaf))
    assert not out[np.asarray(w) == 0].any()
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(out, compiled(leaf.finalize()))


def train(params, x, y, steps, lr=0.02):
    """Adam on a dense layer; the losses."""
    trainable, rest = jc.partition(params)
    tx = optax.adam(lr)

    def loss(t):
        return jnp.mean(
            (jc.compressed(lambda p, x: jnp.tanh(x @ p["w"]))(jc.combine(t, rest), x) - y) ** 2
        )

    def step(carry, _):
        t, state = carry
        value, grads = jax.value_and_grad(loss)(t)
        updates, state = tx.update(grads, state, t)
        return (optax.apply_updates(t, updates), state), value

    (trainable, _), losses = jax.jit(lambda t: lax.scan(step, (t, tx.init(t)), None, length=steps))(
        trainable
    )
    return jc.combine(trainable, rest), losses


@pytest.mark.parametrize(
    "name",
    [n if n == "xnor" else pytest.param(n, marks=pytest.mark.slow) for n in SPECS],
)
def test_training_lowers_the_loss(name):
    keys = jax.random.split(jax.random.key(3), 3)
    x = jax.random.normal(keys[0], (64, 12))
    y = jnp.tanh(x @ (0.5 * jax.random.normal(keys[1], (12, 4))))
    params = jc.compress({"w": 0.3 * jax.random.normal(keys[2], (12, 4))}, {"w": SPECS[name]})
    params, losses = train(params, x, y, 80)
    assert losses[-10:].mean() < 0.75 * losses[0]
    fn = jax.jit(jc.compressed(lambda p, x: x @ p["w"]))
    np.testing.assert_array_equal(fn(params, x), fn(jc.finalize(params), x))


@pytest.mark.parametrize(
    "name",
    ["lsq", *(pytest.param(n, marks=pytest.mark.slow) for n in ("xnor", "ttq", "dsq", "noise"))],
)
def test_it_scans_over_a_stack(name):
    params = {"w": jax.random.normal(jax.random.key(0), (4, 6, 6))}
    small = jc.compress(params, {"w": SPECS[name]})
    fn = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]
    x = jnp.ones((2, 6))
    out = jax.jit(jc.compressed(fn))(small, x)
    np.testing.assert_array_equal(out, jax.jit(fn)(jc.decompress(small), x))
    np.testing.assert_array_equal(out, jax.jit(jc.compressed(fn))(jc.finalize(small), x))
    trainable, rest = jc.partition(small)
    grads = jax.grad(lambda t: jnp.sum(jc.compressed(fn)(jc.combine(t, rest), x)))(trainable)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    "name",
    ["ttq", *(pytest.param(n, marks=pytest.mark.slow) for n in ("lsq+", "loss aware", "noise"))],
)
def test_it_saves_and_loads(name, tmp_path):
    small = {"w": SPECS[name](jax.random.normal(jax.random.key(0), (6, 5)))}
    jc.save(tmp_path / "small.safetensors", small)
    back = jc.load(tmp_path / "small.safetensors")
    assert jax.tree.structure(back) == jax.tree.structure(small)
    np.testing.assert_array_equal(back["w"].materialize(), small["w"].materialize())
    jc.save(tmp_path / "final.safetensors", jc.finalize(small))
    final = jc.load(tmp_path / "final.safetensors")
    np.testing.assert_array_equal(final["w"].materialize(), small["w"].materialize())


@pytest.mark.slow
def test_mixed_precision_trains_float32_and_computes_in_bfloat16():
    model = nn.Dense(6, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (4, 8))
    params = jc.compress(model.init(jax.random.key(1), x), {"**/kernel": learned.LSQ("int4")})
    apply = jax.jit(jc.compressed(model.apply))
    out = apply(params, x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, apply(jc.finalize(params), x))


@pytest.mark.parametrize(
    ("axes", "group"),
    [
        ((-2, -1), None), ((-2,), 4),
        *(pytest.param(axes, group, marks=pytest.mark.slow)
          for axes, group in (((-1,), None), ((-2,), None), ((-1,), 4), ((-2, -1), 4))),
    ],
)  # fmt: skip
def test_exact_sums_against_float64(axes, group):
    x = np.random.default_rng(0).normal(size=(3, 10, 7)).astype(np.float32) * 1e-3
    x[0, 0, 0] = 100.0
    ours = np.asarray(jax.jit(lambda x: exact_sum(x, axes, group))(x))
    if group is None:
        expected = x.astype(np.float64).sum(axes, keepdims=True)
    else:
        starts = np.arange(0, x.shape[axes[-1]], group)
        expected = np.add.reduceat(x.astype(np.float64), starts, axes[-1])
    # Each value is off by at most half of 2**-26 of the largest's power of two, at most 70 are
    # summed, and a few float32 additions round.
    atol = 70 * 2.0**-27 * 64
    np.testing.assert_allclose(ours, expected, rtol=2.0**-22, atol=atol)


def test_an_exact_sum_does_not_depend_on_the_order():
    x = np.random.default_rng(1).normal(size=100_003).astype(np.float32)
    total = jax.jit(lambda x: exact_sum(x, (-1,)))
    shuffled = np.random.default_rng(2).permutation(x)
    a, b = (float(total(jnp.asarray(y))[0]) for y in (x, shuffled))
    assert a == b
    expected = x.astype(np.float64).sum()
    # Each value to half of 2**-26 of the largest's power of two, 4; a few float32 additions.
    assert abs(a - expected) < 100_003 * 2.0**-27 * 4 + 2.0**-21 * abs(expected)
    grad = jax.jit(jax.grad(lambda x: exact_mean(x, (-1,), 50_000)[0]))(jnp.asarray(x))
    np.testing.assert_array_equal(grad, np.where(np.arange(x.size) < 50_000, np.float32(2e-5), 0))


def test_noise_rounds_the_share_that_it_says_and_passes_the_rest():
    w = jax.random.normal(jax.random.key(0), (64, 64))
    params = {"w": learned.QuantNoise(learned.LSQ("int2"), 0.3, block_size=4)(w)}
    draw = jax.jit(sample)
    drawn = draw(params, jax.random.key(1))["w"]
    same = draw(params, jax.random.key(1))["w"]
    np.testing.assert_array_equal(drawn.noise, same.noise)
    assert not np.array_equal(drawn.noise, draw(params, jax.random.key(2))["w"].noise)
    # 1,024 blocks: four standard deviations are 0.057.
    assert abs(float(drawn.noise.mean()) - 0.3) < 0.06
    blocks = np.asarray(drawn.noise).reshape(16, 4, 64)
    assert (blocks == blocks[:, :1]).all()
    out, rounded = np.asarray(compiled(drawn)), np.asarray(compiled(params["w"]))
    np.testing.assert_array_equal(out, np.where(drawn.noise, rounded, w))
    grad = jax.jit(jax.grad(lambda leaf: jnp.sum(leaf.materialize()), allow_int=True))(drawn)
    weight = np.asarray(grad.quantized.weight)
    assert (weight[~np.asarray(drawn.noise)] == 1).all()
    assert 0 < (weight == 0).mean() < 0.3  # those that are rounded and clipped
    np.testing.assert_array_equal(compiled(drawn.quiet()), rounded)
    np.testing.assert_array_equal(compiled(drawn.finalize()), rounded)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: learned.LSQ("uint4"), "no negative codes: write 'int4'"),
        (lambda: learned.LSQ("int4", granularity="row"), "write 'channel' or 'tensor'"),
        (lambda: learned.LSQ("int4", group_size=0), "write a whole number"),
        (lambda: learned.TWN(group_size=4), "write granularity='channel'"),
        (lambda: learned.LSQ("int4", scale_dtype="int8"), "write a floating dtype"),
        (lambda: learned.DoReFa(1), "write a whole number from 2 to 8"),
        (lambda: learned.DSQ(4, alpha=0.7), "write a number from 0.001 to 0.5"),
        (lambda: learned.TTQ(0.0), "between 0 and 1"),
        (lambda: learned.TWN(-1.0), "at least 0"),
        (lambda: learned.MultiBit(5), "from 1 to 4"),
        (lambda: learned.QuantNoise(jc.FakeQuantize("int4"), 0.0), "above 0 and at most 1"),
        (lambda: learned.QuantNoise("int4"), "write one such as FakeQuantize"),
        (lambda: learned.LSQ("int4")(jnp.float32(1.0)), "a scalar has no axis"),
        (lambda: learned.QuantNoise(jc.Quantize("int4"))(jnp.ones(4)), "no dense weight"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(jc.SpecError, match=message):
        make()
    assert repr(learned.LSQ("int4", group_size=8)) == "LSQ('int4', group_size=8)"
