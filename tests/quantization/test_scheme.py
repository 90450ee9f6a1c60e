"""Every format, granularity, range and rounding of `Quantize`, against other implementations."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress.arrays.formats import code_format
from jaxcompress.arrays.ranges import laplace_clip, normal_clip
from jaxcompress.arrays.scheme import Scheme

FORMATS = [
    "int1", "int2", "int5", "int8", "uint1", "uint3", "binary", "ternary", "pow2_3", "pow2_4",
    "fixed8.5", "fp8_e4m3", "fp8_e5m2", "fp6_e2m3", "fp6_e3m2", "fp4_e2m1", "nf4",
    "mxfp8_e4m3", "mxfp6_e2m3", "mxfp4", "mxint8", "nvfp4",
]  # fmt: skip


def options(name):
    return {"symmetric": False} if name in ("int1", "uint1", "uint3") else {}


def weight(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def error(w, leaf):
    return float(jnp.sum((w - leaf.materialize()) ** 2))


@pytest.mark.thin(8)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_fake_and_stored_values_are_the_same_bits(name, dtype):
    w = weight(2, 37, 9).astype(dtype).at[:, 3].set(0)
    stored = jc.Quantize(name, **options(name))(w)
    fake = jc.FakeQuantize(name, **options(name))(w)
    values = np.asarray(stored.materialize())
    assert stored.dtype == dtype
    np.testing.assert_array_equal(jax.jit(lambda leaf: leaf.materialize())(fake), values)
    final = fake.finalize()
    assert jax.tree.structure(final) == jax.tree.structure(stored)
    for a, b in zip(jax.tree.leaves(final), jax.tree.leaves(stored), strict=True):
        np.testing.assert_array_equal(a, b)
    if name != "binary":
        assert not np.any(values[:, 3])


@pytest.mark.thin(4)
@pytest.mark.parametrize("name", ["binary", "fp6_e3m2", "nf4", "nvfp4", "mxfp4", "blocks"])
def test_leaves_move_loop_and_save(name, tmp_path):
    spec = jc.Quantize("int4", group_size=(8, 4)) if name == "blocks" else jc.Quantize(name)
    w, x = weight(3, 32, 10), weight(5, 32, seed=1)
    params = {"stack": {"kernel": w}, "table": {"embedding": weight(7, 32)}}
    small = jc.compress(params, {"**": spec})
    dense = jc.decompress(small)

    def fn(params, x):
        kernel, table = params["stack"]["kernel"], params["table"]["embedding"]
        scanned = jax.lax.scan(lambda c, k: (c, x @ k), 0, kernel)[1]
        looked_up = table[jnp.array([0, 6])]
        return scanned, x @ table.T, looked_up, kernel[1, :, 2:7], jnp.moveaxis(kernel, 2, 1)[0]

    for a, b in zip(jax.jit(jc.compressed(fn))(small, x), jax.jit(fn)(dense, x), strict=True):
        np.testing.assert_array_equal(a, b)
    jc.save(tmp_path / "small.safetensors", small)
    back = jc.load(tmp_path / "small.safetensors")
    assert jax.tree.structure(back) == jax.tree.structure(small)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(small), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_bytes_are_those_of_the_format():
    w = weight(64, 32)
    for name, size in (
        ("binary", 8 * 32 + 2 * 32),
        ("ternary", 16 * 32 + 2 * 32),
        ("int3", 24 * 32 + 2 * 32),
        ("mxfp6_e2m3", 48 * 32 + 2 * 32),
        ("nvfp4", 32 * 32 + 4 * 32 + 4),
    ):
        assert jc.Quantize(name)(w).nbytes == size
    assert jc.Quantize("int4", group_size=(16, 16))(w).nbytes == 1024 + 2 * 4 * 2
    double = jc.Quantize("nf4", group_size=8, scale_format="uint8", scale_group_size=4)(w)
    assert double.nbytes == 1024 + 8 * 32 + 4 * 2 * 32


@pytest.mark.parametrize("shape", [(32, 16), (33, 10), (5, 3)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_against_numpy(shape, symmetric):
    w = np.asarray(weight(*shape))
    spec = jc.Quantize("int4", group_size=(8, 4), symmetric=symmetric, scale_dtype="float32")
    found = np.asarray(spec(jnp.asarray(w)).materialize())
    for i, j in itertools.product(range(0, shape[0], 8), range(0, shape[1], 4)):
        block = w[i : i + 8, j : j + 4]
        if symmetric:
            s = np.abs(block).max() / np.float32(7)
            expected = np.round(block / s) * s
        else:
            lo, hi = min(block.min(), 0), max(block.max(), 0)
            s = np.float32(2) * ((hi / 2 - lo / 2) / np.float32(15))
            z = np.round(-8 - lo / s)
            expected = (np.clip(np.round(block / s) + z, -8, 7) - z) * s
        np.testing.assert_array_equal(found[i : i + 8, j : j + 4], expected.astype(np.float32))


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="torch has a version for this Python")


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4"])
def test_microscaling_formats_against_the_specification(name):
    # Section 6.3 of the specification: X = 2**(floor(log2(max)) - emax), P = V / X, saturated.
    element, emax, largest = {
        "mxfp8_e4m3": (ml_dtypes.float8_e4m3fn, 8, 448),
        "mxfp8_e5m2": (ml_dtypes.float8_e5m2, 15, 57344),
        "mxfp6_e2m3": (ml_dtypes.float6_e2m3fn, 2, 7.5),
        "mxfp6_e3m2": (ml_dtypes.float6_e3m2fn, 4, 28),
        "mxfp4": (ml_dtypes.float4_e2m1fn, 2, 6),
    }[name]
    w = np.asarray(weight(96, 5)) * np.float32(10)
    blocks = w.reshape(3, 32, 5)
    scale = np.exp2(np.floor(np.log2(np.abs(blocks).max(axis=1, keepdims=True))) - emax)
    scaled = np.clip(blocks / scale.astype(np.float32), -largest, largest)
    expected = scaled.astype(element).astype(np.float32) * scale
    np.testing.assert_array_equal(jc.Quantize(name)(jnp.asarray(w)).materialize(),
                                  expected.reshape(96, 5))  # fmt: skip


def test_nvfp4_against_its_formula():
    w = np.asarray(weight(64, 6))
    leaf = jc.Quantize("nvfp4")(jnp.asarray(w))
    blocks = w.reshape(4, 16, 6)
    wanted = np.abs(blocks).max(axis=1) / np.float32(6)
    outer = wanted.max() / np.float32(448)
    scale = (wanted / outer).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * outer
    codes = (blocks / scale[:, None]).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    expected = np.clip(codes, -6, 6) * scale[:, None]
    np.testing.assert_array_equal(leaf.materialize(), expected.reshape(64, 6))
    assert leaf.scale.format == "fp8_e4m3"
    assert leaf.scale.scale.shape == (1, 1)


def test_quantized_scales_are_never_zero():
    w = weight(64, 4).at[:32].multiply(1e-6)
    for fmt in ("uint8", "fp8_e4m3", "int8"):
        leaf = jc.Quantize("int8", group_size=32, scale_format=fmt)(w)
        assert np.all(np.asarray(leaf.scale.materialize()) > 0)
        assert np.all(np.isfinite(leaf.materialize()))
    nothing = jc.Quantize("nvfp4")(jnp.zeros((32, 2)))
    assert not np.any(nothing.materialize())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_mse_range_against_a_fine_grid(bits, symmetric):
    w = weight(256, 3, seed=bits)
    spec = jc.Quantize(f"int{bits}", estimator="mse", symmetric=symmetric, scale_dtype="float32")
    leaf = spec(w)
    found = np.sum((np.asarray(w) - np.asarray(leaf.materialize())) ** 2, axis=0)
    for column in range(3):
        x = np.asarray(w)[:, column]
        lo, hi = x.min(), x.max()
        best = np.inf
        for share in np.linspace(0.005, 1, 1000):
            if symmetric:
                s, z, q0 = share * max(-lo, hi) / (2 ** (bits - 1) - 1), 0, -(2 ** (bits - 1)) + 1
            else:
                s, q0 = share * (hi - lo) / (2**bits - 1), -(2 ** (bits - 1))
                z = np.round(q0 - share * lo / s)
            q = np.clip(np.round(x / s) + z, q0, 2 ** (bits - 1) - 1)
            best = min(best, np.sum((x - (q - z) * s) ** 2))
        # 100 shares of the range against 1000: the error is piecewise quadratic in the share, and
        # a hundredth of the range off it changes by a few percent at most.
        assert best * (1 - 1e-5) <= found[column] <= 1.03 * best


def test_binary_and_ternary_scales_are_the_best():
    w = weight(33, 4)
    for name in ("binary", "ternary"):
        leaf = jc.Quantize(name, scale_dtype="float32")(w)
        for column in range(4):
            x = np.sort(np.abs(np.asarray(w)[:, column], dtype=np.float64))[::-1]
            kept = [33] if name == "binary" else range(1, 34)
            best = min(np.sum(x**2) - np.sum(x[:k]) ** 2 / k for k in kept)
            found = np.sum((np.asarray(w - leaf.materialize())[:, column]).astype(np.float64) ** 2)
            # Sums of 33 squares in float32 choose the scale: an error e of it costs 33 e**2.
            assert found == pytest.approx(best, rel=1e-5)


def test_percentiles_against_numpy():
    w = weight(200, 2)
    x = np.asarray(w)
    spec = jc.Quantize("int8", estimator="percentile:98.5", scale_dtype="float32")
    top = np.percentile(np.abs(x), 98.5, axis=0)
    # Interpolated in float32, as is the division by 127: a few units in the last place.
    np.testing.assert_allclose(spec(w).scale[0], top / 127, rtol=1e-6)
    leaf = jc.Quantize(
        "uint8", estimator="percentile:98", symmetric=False, scale_dtype="float32",
        group_size=40,
    )(w)  # fmt: skip
    parts = x.reshape(5, 40, 2)
    width = np.percentile(parts, 99, axis=1) - np.percentile(parts, 1, axis=1)
    np.testing.assert_allclose(leaf.scale, width / 255, rtol=2e-6)


def test_aciq_constants_are_the_published_ones():
    # Banner et al., table 1 and their program, two decimals, cut off.
    laplace = [2.83, 3.89, 5.03, 6.20, 7.41, 8.64, 9.89]
    normal = [1.71, 2.15, 2.55, 2.93, 3.28, 3.61, 3.92]
    for bits, a, b in zip(range(2, 9), laplace, normal, strict=True):
        assert laplace_clip(2**bits) == pytest.approx(a, abs=0.0101)
        assert normal_clip(2**bits) == pytest.approx(b, abs=0.0101)


def test_aciq_clips_near_the_best_of_its_distributions():
    rng = np.random.default_rng(0)
    for draw in (rng.standard_normal, rng.laplace):
        x = draw(size=20_000).astype(np.float32)[:, None]
        w = jnp.asarray(x)
        clipped = error(w, jc.Quantize("int4", estimator="aciq")(w))
        full = error(w, jc.Quantize("int4")(w))
        best = error(w, jc.Quantize("int4", estimator="mse")(w))
        # The formula takes the noise of rounding as uniform and 16 levels, of which 15 are used.
        assert clipped < min(full, 1.1 * best)


combinations = st.tuples(
    st.sampled_from(FORMATS),
    st.sampled_from([(1, 1), (0, 3), (7, 3), (33, 5), (2, 18, 4)]),
    st.sampled_from([None, 5, (4, 3)]),
    st.sampled_from([None, "min_max", "mse", "percentile:95", "aciq"]),
    st.sampled_from([None, "uint8", "fp8_e4m3"]),
    st.sampled_from([1e-30, 1.0, 1e30]),
)


@settings(max_examples=4)
@given(combinations)
def test_any_combination_is_sound(drawn):
    is_sound(*drawn)


@pytest.mark.slow
@settings(max_examples=80)
@given(combinations)
def test_any_combination_is_sound_again(drawn):
    is_sound(*drawn)


def is_sound(name, shape, group, estimator, scale_format, size):
    preset = name.startswith(("mx", "nv"))
    how = dict(options(name), estimator=estimator)
    if not preset:
        how |= {"group_size": group, "scale_format": scale_format}
    w = weight(*shape) * size
    w = w * (jnp.arange(shape[-1]) != 1)
    fake = jc.FakeQuantize(name, **how)(w)
    stored = jc.Quantize(name, **how)(w)
    values = np.asarray(stored.materialize())
    assert values.shape == shape
    assert np.all(np.isfinite(values))
    np.testing.assert_array_equal(fake.materialize(), values)
    if name != "binary" and shape[-1] > 1:
        assert not np.any(values[..., 1])


def test_stochastic_rounding_takes_a_key_and_has_the_right_mean():
    w = weight(20_000, 1).at[0].set(4.0)
    spec = jc.Quantize("int3", rounding="stochastic", scale_dtype="float32")
    one = jc.compress({"kernel": w}, {"kernel": spec}, key=jax.random.key(1))["kernel"]
    again = jc.compress({"kernel": w}, {"kernel": spec}, key=jax.random.key(1))["kernel"]
    other = jc.compress({"kernel": w}, {"kernel": spec}, key=jax.random.key(2))["kernel"]
    np.testing.assert_array_equal(one.materialize(), again.materialize())
    assert np.any(np.asarray(one.materialize()) != np.asarray(other.materialize()))
    step = float(one.scale[0, 0])
    change = np.asarray(one.materialize() - w, np.float64)
    assert np.max(np.abs(change)) <= step * (1 + 1e-6)
    # Rounding up or down has a variance of at most step**2 / 4: five standard errors.
    assert abs(change.mean()) < 5 * (step / 2) / np.sqrt(20_000)
    with pytest.raises(jc.SpecError, match=r"kernel: stochastic rounding needs a key"):
        jc.compress({"kernel": w}, {"kernel": spec})


def test_training_is_straight_through_in_every_format():
    w = weight(16, 4)
    for name in ("nf4", "fp8_e4m3", "ternary", "binary", "mxfp4"):
        fake = jc.FakeQuantize(name)(w)
        grad = jax.grad(lambda leaf: jnp.sum(leaf.materialize() ** 2))(fake)
        np.testing.assert_array_equal(grad.weight, 2 * fake.materialize())
    fixed = jc.FakeQuantize("fixed4.2", range="static")(jnp.array([[1.0], [1.85], [3.0]]))
    grad = jax.grad(lambda leaf: jnp.sum(leaf.materialize()))(fixed)
    assert grad.weight.tolist() == [[1.0], [1.0], [0.0]]  # beyond 1.75 + 0.125


def test_presets_are_what_they_stand_for():
    assert jc.Quantize("mxfp4") == jc.Quantize(
        "fp4_e2m1", group_size=32, scale_dtype="float8_e8m0fnu", convention="power_of_two"
    )
    recipe = jc.Recipe.from_yaml("rules: [{match: '**', quantize: {format: nf4, group_size: 64}}]")
    assert recipe.rules[0].spec == jc.Quantize("nf4", group_size=64)
    assert code_format(jc.Quantize("nvfp4").format).bits == 4


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: jc.Quantize("nf4", symmetric=False), "nf4 has no zero points"),
        (lambda: jc.Quantize("fixed8.5", symmetric=False), "no zero points"),
        (lambda: jc.Quantize("int1"), "write binary, or symmetric=False"),
        (lambda: jc.Quantize("int4", group_size=(4, 0)), "group_size"),
        (lambda: jc.Quantize("int4", group_size=(4, 4, 4)), "group_size"),
        (lambda: jc.Quantize("int4", group_size=(4, 4))(jnp.ones(8)), "no axis of outputs"),
        (lambda: jc.Quantize("int4", estimator="best"), "estimator='best'"),
        (lambda: jc.Quantize("int4", estimator="percentile:0"), "percentile:0"),
        (lambda: jc.Quantize("int4", rounding="up"), "rounding='up'"),
        (lambda: jc.FakeQuantize("int4", rounding="stochastic"), "FakeQuantize rounds to nearest"),
        (lambda: jc.Quantize("int4", scale_dtype="float8_e4m3fn"), "scale_format='fp8_e4m3'"),
        (lambda: jc.Quantize("int4", scale_format="binary"), "holds magnitudes"),
        (lambda: jc.Quantize("int4", scale_format="int3"), "holds magnitudes"),
        (lambda: jc.Quantize("int4", scale_group_size=4), "needs a scale_format"),
        (lambda: jc.Quantize("int4", scale_format="uint8", scale_group_size=0), "at least 1"),
    ],
)
def test_what_does_not_go_together_says_what_to_write(make, text):
    with pytest.raises(jc.SpecError, match=text):
        make()


def test_estimators_of_groups_along_one_of_several_axes_choose_for_each_group():
    # With groups the other axes keep scales of their own: a kernel is its slices.
    w = weight(2, 3, 8, 4)
    for estimator in ("mse", "percentile:90"):
        spec = jc.Quantize("int3", group_size=4, estimator=estimator, axis=(0, 1, 2))
        found = spec(w)
        assert found.scale.shape == (2, 3, 2, 4)
        one = jc.Quantize("int3", group_size=4, estimator=estimator, axis=-2)(w.reshape(6, 8, 4))
        np.testing.assert_array_equal(found.materialize().reshape(6, 8, 4), one.materialize())


@pytest.mark.parametrize("name", ["ternary", "int4"])
@pytest.mark.parametrize("group", [None, 2])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_estimators_of_nothing(name, group, shape):
    spec = jc.Quantize(name, estimator="percentile:95", group_size=group)
    leaf = spec(jnp.zeros(shape))
    assert leaf.materialize().shape == shape
    plain = jc.Quantize(name, estimator="min_max", group_size=group)(jnp.zeros(shape))
    assert leaf.scale.shape == plain.scale.shape
    assert jc.Quantize(name, estimator="mse", group_size=group)(jnp.zeros(shape)).shape == shape


def test_the_order_of_axes_is_of_no_matter_to_a_scale():
    w = weight(2, 5, 3)
    first, second = (
        Scheme("ternary", axes, scale_dtype="float32").scales(w)[0] for axes in ((-1, -2), (-2, -1))
    )
    np.testing.assert_array_equal(first, second)
