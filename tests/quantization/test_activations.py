"""Quantized inputs: integer arithmetic, gradients, and trained against stored."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jaxcompress as jc
from jaxcompress.arrays.learned_input import LearnedInputArray, UnitInputArray
from jaxcompress.arrays.quantized_input import QuantizedInputArray, without_input
from jaxcompress.arrays.rotated import RotatedArray
from jaxcompress.arrays.scaled import ScaledArray
from jaxcompress.quantization.activations import (
    PACT,
    DoReFaInput,
    LSQInput,
    QuantizeInput,
    moving_average,
    quantize_gradient,
)

FORMATS = [("int8", True), ("int8", False), ("uint8", False), ("int4", True), ("uint4", False)]


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def dot(w, x):
    return x @ w


def numpy_grid(x, format, symmetric, axes):
    """Scale, zero point and int64 codes by the formulas, in float32 as the leaf has them."""
    fmt = (int(format[-1]), not format.startswith("u"))
    top = 2 ** (fmt[0] - fmt[1]) - 1
    low = -top - 1 if fmt[1] else 0
    x = np.asarray(x, np.float32)
    least = np.minimum(x.min(axes, keepdims=True), 0)
    most = np.maximum(x.max(axes, keepdims=True), 0)
    if symmetric:
        scale, zero = np.maximum(-least, most) / np.float32(top), 0
        low = -top
    else:
        scale = 2 * ((most / 2 - least / 2) / np.float32(2 ** fmt[0] - 1))
        zero = np.round(np.clip(low - least / scale, low, top)).astype(np.int64)
    codes = np.clip(np.round(x / scale) + zero, low, top).astype(np.int64)
    return scale, zero, codes


@pytest.mark.parametrize(("format", "symmetric"), FORMATS)
@pytest.mark.parametrize("per", ["token", "tensor"])
@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.slow)])
def test_integers_are_those_of_int64_arithmetic(format, symmetric, per, bits):
    w, x = normal(40, 8), normal(2, 5, 40, seed=1) + 0.5
    stored = jc.Quantize(f"int{bits}")(w)
    leaf = QuantizedInputArray(stored, None, None, format, per, symmetric)
    y = jax.jit(jc.compressed(dot))(leaf, x)
    scale, zero, codes = numpy_grid(x, format, symmetric, 2 if per == "token" else (0, 1, 2))
    weights = jc.decompress({"w": stored.codes})["w"] if bits < 8 else stored.codes
    total = np.einsum("abi,io->abo", codes - zero, np.asarray(weights, np.int64))
    # Two float32 products in this order, each rounded once: the same bits.
    expected = total.astype(np.float32) * scale * np.asarray(stored.scale, np.float32)
    assert np.array_equal(y, expected)
    jaxpr = str(jax.make_jaxpr(jc.compressed(dot))(leaf, x))
    assert "preferred_element_type=int32" in jaxpr


SHAPES = {
    "weight first": (lambda w, x: lax.dot_general(w, x, (((0,), (1,)), ((), ()))), (12, 8), (5, 12)),
    "two inputs": (lambda w, x: jnp.einsum("bhd,hdo->bo", x, w), (3, 4, 8), (5, 3, 4)),
    "two outputs": (lambda w, x: jnp.einsum("bti,ihd->bthd", x, w), (12, 2, 4), (2, 3, 12)),
    "stack": (lambda w, x: jnp.einsum("lbi,lio->lbo", x, w), (3, 12, 8), (3, 5, 12)),
    "batch inside": (lambda w, x: jnp.einsum("bli,lio->blo", x, w), (3, 12, 8), (5, 3, 12)),
}  # fmt: skip


@pytest.mark.parametrize(
    "shape", [pytest.param(s, marks=pytest.mark.slow) if "out" in s else s for s in SHAPES]
)
def test_integers_and_values_agree_for_any_contraction(shape):
    """Both paths sum the same terms; floats are off by eps a term, at most 12 of them."""
    fn, weight, inputs = SHAPES[shape]
    axes = {"two inputs": (-3, -2), "two outputs": (-3,)}.get(shape, (-2,))
    w, x = normal(*weight), normal(*inputs, seed=1) - 0.3
    stored = jc.Quantize("int8", axis=axes)(w)
    leaves = [
        QuantizedInputArray(stored, None, None, "int8", p, False) for p in ("token", "tensor")
    ]
    run = jax.jit(lambda leaves, x: [jc.compressed(fn)(leaf, x) for leaf in leaves])
    values = [leaf.replace(weight=stored.materialize()) for leaf in leaves]
    limit = 16 * 12 * 2.0**-24 * float(jnp.abs(x).max() * jnp.abs(w).max() * 12)
    for y, expected in zip(run(leaves, x), run(values, x), strict=True):
        np.testing.assert_allclose(y, expected, rtol=0, atol=limit)
    for leaf in leaves:
        assert "int32" in str(jax.make_jaxpr(jc.compressed(fn))(leaf, x))


@pytest.mark.parametrize("groups", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("format", "symmetric"), [("int8", True), ("uint8", False)])
@pytest.mark.parametrize("padding", [((1, 1), (2, 1)), ((0, 0), (0, 0))])
def test_convolutions_pad_with_the_value_zero(groups, format, symmetric, padding):
    kernel, x = normal(3, 3, 4, 6), normal(2, 7, 8, 4 * groups, seed=1) + 0.7
    fn = lambda w, x: lax.conv_general_dilated(
        x, w, (2, 1), padding, lhs_dilation=(1, 2), feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    stored = jc.Quantize("int8")(kernel)
    leaf = QuantizedInputArray(stored, None, None, format, "token", symmetric)
    scale, zero, codes = numpy_grid(x, format, symmetric, (1, 2, 3))
    total = fn(jnp.asarray(stored.codes, jnp.int32), jnp.asarray(codes - zero, jnp.int32))
    scales = np.asarray(stored.scale, np.float32)
    expected = np.asarray(total).astype(np.float32) * scale * scales
    assert np.array_equal(jc.compressed(fn)(leaf, x), expected)


@pytest.mark.slow
@given(
    inputs=st.integers(1, 40), outputs=st.integers(1, 9), rows=st.integers(0, 5),
    format=st.sampled_from(FORMATS), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=5)
def test_the_error_is_that_of_rounding(inputs, outputs, rows, format, seed):
    w, x = normal(inputs, outputs, seed=seed), normal(rows, inputs, seed=seed + 1)
    leaf = QuantizedInputArray(w, None, None, format[0], "token", format[1])
    y = np.asarray(jax.jit(jc.compressed(dot))(leaf, x), np.float64)
    if rows:
        bits = int(format[0][-1])
        span = (
            np.abs(x).max(1) * 2 if format[1] else np.ptp(np.append(x, np.zeros((rows, 1)), 1), 1)
        )
        # Half a step for each input (a zero point that was rounded moves the ends by another half).
        step = span / (2**bits - 2 if format[1] else 2**bits - 1)
        limit = step[:, None] * np.abs(w).sum(0) * (1.01 if not format[1] else 0.51)
        assert np.all(np.abs(y - np.asarray(x, np.float64) @ np.asarray(w, np.float64)) <= limit)


def torch_static(x, scale, zero, low, high, w, cotangent):
    x = torch.tensor(np.asarray(x), requires_grad=True)
    y = torch.fake_quantize_per_tensor_affine(x, scale, zero, low, high) @ torch.tensor(
        np.asarray(w)
    )
    y.backward(torch.tensor(np.asarray(cotangent)))
    return y.detach().numpy(), x.grad.numpy()


@pytest.mark.parametrize("affine", [False, True])
def test_static_ranges_are_those_of_torch(affine):
    w, x, cotangent = normal(16, 4), 2 * normal(6, 16, seed=1), normal(6, 4, seed=2)
    scale, zero = np.float32(0.02), 9 if affine else None
    low, high = (0, 255) if affine else (-127, 127)
    leaf = QuantizedInputArray(
        w, jnp.full((1, 1), scale), None if zero is None else jnp.full((1, 1), zero, jnp.uint8),
        "uint8" if affine else "int8", "tensor", not affine,
    )  # fmt: skip
    y, back = jax.vjp(lambda x: jc.compressed(dot)(leaf, x), x)
    theirs, gradient = torch_static(x, float(scale), zero or 0, low, high, w, cotangent)
    # torch multiplies by 1 / scale: ties aside the codes are the same; then 16 terms of a float sum.
    np.testing.assert_allclose(y, theirs, rtol=0, atol=16 * 2.0**-23 * 16 * 3)
    assert 0 < np.sum(gradient == 0) < gradient.size
    np.testing.assert_allclose(back(cotangent)[0], gradient, rtol=0, atol=4 * 2.0**-23 * 4 * 3)


def test_gradients_through_integers_are_those_of_the_values():
    w, x, cotangent = normal(16, 4), normal(6, 16, seed=1), normal(6, 4, seed=2)
    leaf = jc.chain(jc.FakeQuantize("int8"), QuantizeInput("int8"))(w)
    run = jax.jit(lambda leaf, x: jc.compressed(dot)(leaf, x))
    y, back = jax.vjp(run, leaf, x)
    of_leaf, of_x = back(cotangent)
    scale, _, codes = numpy_grid(x, "int8", True, 1)
    dense = np.asarray(leaf.finalize().materialize())
    atol = 16 * 16 * 2.0**-24 * 9
    np.testing.assert_allclose(of_x, cotangent @ dense.T, rtol=0, atol=atol)
    np.testing.assert_allclose(
        of_leaf.weight.weight, (scale * codes).T.astype(np.float32) @ cotangent, rtol=0, atol=atol
    )
    assert np.array_equal(y, run(leaf.finalize(), x))
    assert "int32" in str(jax.make_jaxpr(jc.compressed(dot))(leaf, x))


INNER = {
    "fake int8": jc.FakeQuantize("int8"),
    "fake int4/8": jc.FakeQuantize("int4", group_size=8),
    "fake affine": jc.FakeQuantize("uint8", symmetric=False),
    "rank": jc.LowRank(3),
    "sparse": jc.Prune(0.5),
}


@pytest.mark.thin(8)
@pytest.mark.parametrize(
    ("inner", "dtype"), [(i, jnp.float32) for i in INNER] + [("fake int8", jnp.bfloat16)]
)
@pytest.mark.parametrize(
    "spec",
    [QuantizeInput("int8"), PACT("uint4"), LSQInput("int8", step=0.02), DoReFaInput("uint4")],
)
def test_what_is_trained_is_what_ships(inner, dtype, spec):
    w, x = normal(16, 4, dtype=dtype), normal(6, 16, seed=1, dtype=dtype)
    leaf = jc.chain(INNER[inner], spec)(w)
    run = jax.jit(jc.compressed(dot))
    stored = leaf.finalize()
    assert isinstance(stored, QuantizedInputArray)
    y = run(leaf, x)
    assert y.dtype == dtype
    assert np.array_equal(y, run(stored, x))
    gradient = jax.grad(lambda leaf: jnp.sum(run(leaf, x) ** 2), allow_int=True)(leaf)
    assert jax.tree.structure(gradient) == jax.tree.structure(leaf)


def published_pact(x, alpha, levels, d):
    scale = alpha / levels
    y = np.round(np.clip(x, 0, alpha) / scale) * scale
    return y, np.where((x >= 0) & (x < alpha), d, 0), np.sum(np.where(x >= alpha, d, 0))


def published_lsq(x, step, low, high, d):
    """Esser et al., equations 1 to 3."""
    v = x / step
    inside = (v > low) & (v < high)
    of_step = np.where(inside, np.round(v) - v, np.where(v <= low, low, high))
    y = np.round(np.clip(v, low, high)) * step
    return y, np.where(inside, d, 0), np.sum(of_step * d)


def test_pact_gradients_are_the_published_ones():
    x, d = 3 * normal(6, 16, seed=1), normal(6, 16, seed=2)
    leaf = LearnedInputArray(jnp.eye(16), jnp.full((1, 1), 2.5), "uint4", "pact")
    y, back = jax.vjp(lambda leaf, x: jc.compressed(dot)(leaf, x), leaf, x)
    expected, of_x, of_alpha = published_pact(np.asarray(x), 2.5, 15, np.asarray(d))
    of_leaf, gradient = back(d)
    # Rounding of 2.5 / 15 in float32, and 96 summed terms of up to 4.
    np.testing.assert_allclose(y, expected, rtol=0, atol=4 * 2.0**-23)
    np.testing.assert_allclose(gradient, of_x, rtol=0, atol=2.0**-20)
    np.testing.assert_allclose(of_leaf.bound[0, 0], of_alpha, rtol=0, atol=96 * 4 * 2.0**-23)
    assert 0 < np.sum(np.asarray(x) >= 2.5) < x.size


@pytest.mark.parametrize("format", ["int4", "uint4"])
def test_lsq_gradients_are_the_published_ones(format):
    x, d = 2 * normal(6, 16, seed=1), normal(6, 16, seed=2)
    low, high = (-8, 7) if format == "int4" else (0, 15)
    leaf = LearnedInputArray(jnp.eye(16), jnp.full((1, 1), 0.25), format, "lsq")
    y, back = jax.vjp(lambda leaf, x: jc.compressed(dot)(leaf, x), leaf, x)
    expected, of_x, of_step = published_lsq(np.asarray(x), 0.25, low, high, np.asarray(d))
    of_leaf, gradient = back(d)
    assert np.array_equal(y, expected)  # a step of 2**-2: nothing is rounded
    np.testing.assert_allclose(gradient, of_x, rtol=0, atol=2.0**-20)
    limit = 96 * 16 * 4 * 2.0**-23
    factor = 1 / np.sqrt(16 * high)
    np.testing.assert_allclose(of_leaf.bound[0, 0], factor * of_step, rtol=0, atol=limit)


def test_dorefa_inputs():
    x, d = normal(6, 16, seed=1), normal(6, 16, seed=2)
    leaf = UnitInputArray(jnp.eye(16), "uint2")
    y, back = jax.vjp(lambda x: jc.compressed(dot)(leaf, x), x)
    np.testing.assert_allclose(y, np.round(3 * np.clip(x, 0, 1)) / 3, rtol=0, atol=2.0**-23)
    inside = (np.asarray(x) >= 0) & (np.asarray(x) < 1)
    np.testing.assert_allclose(back(d)[0], np.where(inside, d, 0), rtol=0, atol=2.0**-20)


def test_a_rounded_gradient_is_right_in_the_mean_and_on_the_levels():
    d = normal(2, 8, seed=3)
    keys = jax.random.split(jax.random.key(0), 4000)
    one = lambda key: jax.vjp(lambda x: quantize_gradient(x, key, 3), jnp.zeros((2, 8)))[1](d)[0]
    found = np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)
    largest = np.abs(d).max(1, keepdims=True)
    levels = (found / largest * 7 + 7) / 2
    np.testing.assert_allclose(levels, np.round(levels), rtol=0, atol=1e-5)
    assert levels.min() >= 0
    assert levels.max() <= 7 + 1e-5
    # A value lies within a level, 2 m / 7, so its deviation is at most m / 7; five of the mean's.
    assert np.all(np.abs(found.mean(0) - np.asarray(d)) <= 5 * (largest / 7) / np.sqrt(4000) + 1e-6)
    with pytest.raises(jc.SpecError, match="bits=0"):
        quantize_gradient(d, keys[0], 0)


def test_stacks_are_scanned():
    w, x = normal(3, 8, 8), normal(5, 8, seed=1)
    fn = lambda w, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
    for spec in (QuantizeInput("int8"), PACT("uint8"), LSQInput("int8", step=0.02), DoReFaInput()):
        leaf = jc.chain(jc.Quantize("int8"), spec)(w)
        y = x
        for layer in range(3):
            one = jax.tree.map(lambda a, n=layer: a[n], leaf)
            y = jnp.tanh(jc.compressed(dot)(one, y))
        found = jc.compressed(fn)(leaf, x)
        assert np.array_equal(found, y), spec
        assert np.array_equal(found, jc.compressed(fn)(leaf.finalize(), x)), spec
        assert "f32[3,8,8]" not in str(jax.make_jaxpr(jc.compressed(fn))(leaf, x))


def test_activations_of_a_function_are_those_of_the_leaves():
    params = {"a": {"kernel": normal(12, 8)}, "b": {"kernel": normal(8, 4)}, "bias": normal(4)}
    fn = lambda p, x: jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"] + p["bias"]
    x, rules = normal(5, 12, seed=1), {"**/kernel": QuantizeInput("int8")}
    small = jc.compress(params, {"**/kernel": jc.Quantize("int8")})
    both = {"**/kernel": jc.chain(jc.Quantize("int8"), QuantizeInput("int8"))}
    expected = jc.compressed(fn)(jc.compress(params, both), x)
    assert np.array_equal(jc.compressed(fn, activations=rules)(small, x), expected)
    after = jc.compress(small, rules)
    assert np.array_equal(jc.compressed(fn)(after, x), expected)
    run = jax.jit(jc.compressed(fn, activations=rules))
    run(small, x)
    assert run._cache_size() == 1
    run(small, 2 * x)
    assert run._cache_size() == 1
    assert isinstance(without_input(after["a"]["kernel"]), jc.QuantizedArray)
    with pytest.raises(jc.RuleError, match="matches no leaf"):
        jc.compressed(fn, activations={"c": QuantizeInput("int8")})(small, x)


def test_inputs_are_rounded_inside_of_scales_and_rotations():
    w, x = normal(16, 4), normal(6, 16, seed=1)
    for leaf in (
        ScaledArray.of(w, jnp.exp(normal(16, 1))),
        RotatedArray.rotate(w, key=jax.random.key(0)),
    ):
        both = jc.chain(jc.Quantize("int8"), QuantizeInput("int8"))(leaf)
        assert isinstance(both.weight, QuantizedInputArray)
        assert "int32" in str(jax.make_jaxpr(jc.compressed(dot))(both, x))
        y, dense = jc.compressed(dot)(both, x), x @ leaf.materialize()
        assert float(jnp.max(jnp.abs(y - dense))) < 0.05 * float(jnp.max(jnp.abs(dense)))


def observed(*names, x=None):
    x = normal(64, 16, seed=1) if x is None else x
    return jc.observe(lambda p, x: x @ p["kernel"], {"kernel": normal(16, 4)}, [x], names)


@pytest.mark.parametrize("estimator", ["max", "percentile", "mse", "entropy"])
def test_static_ranges_from_statistics(estimator):
    params, x = {"kernel": normal(16, 4)}, normal(64, 16, seed=1)
    stats = observed("abs_max" if estimator == "max" else "histogram")
    spec = QuantizeInput("int8", per="tensor", range="static", estimator=estimator)
    leaf = jc.compress(params, {"kernel": jc.chain(jc.Quantize("int8"), spec)}, stats=stats)[
        "kernel"
    ]
    top = float(jnp.abs(x).max())
    assert leaf.scale.shape == (1, 1)
    if estimator == "max":
        assert np.float32(leaf.scale[0, 0]) == np.float32(top) / np.float32(127)
    else:  # within the range, up to the edge of the last bin
        assert 0.4 * top < float(leaf.scale[0, 0]) * 127 <= 1.125 * top
    y = jc.compressed(dot)(leaf, x)
    assert float(jnp.max(jnp.abs(y - x @ params["kernel"]))) < 0.5 * top


def test_static_affine_ranges_and_averages():
    x = jnp.abs(normal(64, 16, seed=1)) - 0.1
    stats = observed("minimum", "maximum", x=x)
    found = stats["kernel"][(-2,)]
    assert np.array_equal(found.minimum, np.minimum(np.min(x, 0), 0))
    assert np.array_equal(found.maximum, np.maximum(np.max(x, 0), 0))
    spec = QuantizeInput("uint8", per="tensor", range="static", symmetric=False)
    leaf = jc.compress({"kernel": normal(16, 4)}, {"kernel": spec}, stats=stats)["kernel"]
    scale, zero, _ = numpy_grid(x, "uint8", False, (0, 1))
    assert np.array_equal(leaf.scale, scale)
    assert np.array_equal(leaf.zero_point, zero)
    again = moving_average([stats, observed("minimum", "maximum", x=2 * x)], 0.5)
    assert np.array_equal(again["kernel"][(-2,)].maximum, 1.5 * found.maximum)


def test_a_stack_has_a_static_scale_for_each_weight():
    w = normal(3, 8, 8)
    fn = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["kernel"])[0]
    stats = jc.observe(fn, {"kernel": w}, [normal(16, 8, seed=1)], ("abs_max", "abs_mean"))
    spec = QuantizeInput("int8", per="tensor", range="static")
    leaf = jc.compress({"kernel": w}, {"kernel": spec}, stats=stats)["kernel"]
    largest = np.asarray(stats["kernel"][(-2,)].abs_max).max(-1)
    assert np.array_equal(leaf.scale[:, 0, 0], largest / np.float32(127))
    lsq = jc.compress({"kernel": w}, {"kernel": LSQInput("int4")}, stats=stats)["kernel"]
    mean = np.asarray(stats["kernel"][(-2,)].abs_mean).mean(-1)
    np.testing.assert_allclose(lsq.bound[:, 0, 0], 2 * mean / np.sqrt(7), rtol=2.0**-21)
    assert jc.trainable_mask(lsq).bound


def test_files_keep_every_bit(tmp_path):
    w, x = normal(16, 4), normal(6, 16, seed=1)
    tree = {
        "a": jc.chain(jc.Quantize("int4"), QuantizeInput("int8", symmetric=False))(w),
        "b": jc.chain(jc.FakeQuantize("int8"), PACT("uint4"))(w),
        "c": DoReFaInput("uint4")(w),
    }
    fn = lambda p, x: [x @ w for w in jax.tree.leaves(p)]
    jc.save(tmp_path / "m.safetensors", tree)
    back = jc.load(tmp_path / "m.safetensors")
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for a, b in zip(jc.compressed(fn)(tree, x), jc.compressed(fn)(back, x), strict=True):
        assert np.array_equal(a, b)


def test_rows_are_read_as_they_are():
    w = normal(12, 8)
    leaf = jc.chain(jc.Quantize("int8", axis=-1), QuantizeInput("int8"))(w)
    fn = lambda w, x: (w[jnp.array([1, 5])], x @ w.T)
    rows, y = jc.compressed(fn)(leaf, normal(3, 8, seed=1))
    assert np.array_equal(rows, leaf.materialize()[jnp.array([1, 5])])
    assert y.shape == (3, 12)
    assert "int32" in str(jax.make_jaxpr(jc.compressed(fn))(leaf, normal(3, 8)))


def test_sums_that_could_overflow_are_floating():
    w, x = jnp.ones((70000, 1)), jnp.full((1, 70000), 3.0)
    leaf = QuantizedInputArray(jc.Quantize("int8")(w), None, None, "uint8", "token", False)
    assert "int32" not in str(jax.make_jaxpr(jc.compressed(dot))(leaf, x)).split("dot_general")[-1]


REFUSED = [
    (lambda: QuantizeInput("int9"), "unknown format|write"),
    (lambda: QuantizeInput("fp8"), "write int2"),
    (lambda: QuantizeInput("uint8"), "symmetric=False"),
    (lambda: QuantizeInput("int8", per="row"), "per='row'"),
    (lambda: QuantizeInput("int8", range="fixed"), "range='fixed'"),
    (lambda: QuantizeInput("int8", range="static"), "per='tensor'"),
    (lambda: QuantizeInput("int8", estimator="mse"), "range='static'"),
    (lambda: QuantizeInput("int8", estimator="best"), "estimator='best'"),
    (lambda: PACT("int8"), "write 'uint8'"),
    (lambda: PACT("uint8", alpha=0.0), "alpha=0.0"),
    (lambda: DoReFaInput("int4"), "write 'uint4'"),
    (lambda: LSQInput("int8", step=-1.0), "step=-1.0"),
    (lambda: LSQInput("int8")(jnp.ones((2, 2))), "abs_mean"),
    (lambda: QuantizeInput("int8", per="tensor", range="static")(jnp.ones((2, 2))), "abs_max"),
    (lambda: QuantizeInput("int8")(jnp.ones(3)), "no contracted inputs"),
    (lambda: QuantizeInput("int8")(QuantizeInput("int8")(jnp.ones((2, 2)))), "rounded already"),
    (lambda: moving_average([]), "0 statistics"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_refusals(make, message):
    with pytest.raises(jc.SpecError, match=message):
        make()
