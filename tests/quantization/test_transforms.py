"""Re-parametrizations: the function is unchanged, and what they promise holds."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

import jaxcompress as jc
from jaxcompress.quantization.activations import QuantizeInput
from jaxcompress.quantization.transforms import (
    Rotate,
    SmoothQuant,
    correct_biases,
    equalize,
    fold_batch_norms,
    relu_mean,
    smooth_into_norms,
)

U = 2.0**-24  # half an ulp of 1 in float32


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def outliers(rows=64, n=24, seed=1):
    """Inputs of which every eighth is forty times as large."""
    return normal(rows, n, seed=seed) * jnp.where(jnp.arange(n) % 8 == 0, 40.0, 1.0)


def run(params, x):
    return x @ params["kernel"]


def test_smoothing_takes_the_published_scales_and_leaves_the_function():
    params, x = {"kernel": normal(24, 8)}, outliers()
    stats = jc.observe(run, params, [x], ("abs_max",))
    for alpha in (0.0, 0.5, 0.8, 1.0):
        leaf = jc.compress(params, {"kernel": SmoothQuant(alpha)}, stats=stats)["kernel"]
        of_x, of_w = np.abs(wide(x)).max(0), np.abs(wide(params["kernel"])).max(1)
        s = of_x**alpha / of_w ** (1 - alpha)
        # A power in float32 is off by some ulps.
        np.testing.assert_allclose(1 / wide(leaf.scale)[:, 0], s, rtol=32 * U)
        both = (wide(x) * wide(leaf.scale)[:, 0]) @ wide(leaf.weight)
        terms = np.abs(wide(x)) @ np.abs(wide(params["kernel"]))
        # s w and 1 / s are rounded once each: three half ulps a term at the most.
        assert np.all(np.abs(both - wide(x) @ wide(params["kernel"])) <= 4 * U * terms)


def test_smoothing_brings_eight_bits_nearer():
    params, x = {"kernel": normal(24, 8)}, outliers()
    stats = jc.observe(run, params, [x], ("abs_max",))
    exact = wide(x) @ wide(params["kernel"])

    def error(*specs):
        small = jc.compress(
            params, {"kernel": jc.chain(*specs)}, stats=stats, key=jax.random.key(0)
        )
        return np.sqrt(np.mean((wide(jax.jit(jc.compressed(run))(small, x)) - exact) ** 2))

    for dynamic in (QuantizeInput("int8"), QuantizeInput("int8", per="tensor", range="static")):
        plain = error(jc.Quantize("int8"), dynamic)
        assert error(SmoothQuant(), jc.Quantize("int8"), dynamic) < 0.7 * plain


def test_rotation_spreads_an_outlier():
    x = normal(64, 96, seed=1).at[:, 5].multiply(20.0)
    params, key = {"kernel": normal(96, 8)}, jax.random.key(0)
    low = jc.Quantize("int8"), QuantizeInput("int4")
    plain, turned = (
        jc.compress(params, {"kernel": jc.chain(*specs)}, key=key)
        for specs in (low, (Rotate(), *low))
    )
    error = lambda p: np.sqrt(np.mean((jax.jit(jc.compressed(run))(p, x) - run(params, x)) ** 2))
    # A step of 60 / 7 or so takes all 95 others away; one of 60 / sqrt(96) / 7 does not.
    assert error(turned) < 0.5 * error(plain)


def test_static_ranges_follow_the_scale():
    params, x = {"kernel": normal(24, 8)}, outliers()
    stats = jc.observe(run, params, [x], ("abs_max",))
    static = QuantizeInput("int8", per="tensor", range="static")
    rules = {"kernel": jc.chain(SmoothQuant(), jc.Quantize("int8"), static)}
    leaf = jc.compress(params, rules, stats=stats)["kernel"]
    largest = np.abs(np.asarray(x) * np.asarray(leaf.scale)[:, 0]).max()
    np.testing.assert_allclose(leaf.weight.scale[0, 0], largest / 127, rtol=4 * U)


def test_stacks_attention_and_convolutions_are_smoothed():
    x = normal(6, 4, seed=1)
    stacked = {"kernel": normal(3, 4, 4)}
    scan = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["kernel"])[0]
    heads = {"out": {"kernel": normal(2, 3, 5)}}
    project = lambda p, x: jnp.einsum("bhd,hdo->bo", x, p["out"]["kernel"])
    images = {"kernel": normal(3, 3, 4, 6)}
    convolve = lambda p, x: jax.lax.conv_general_dilated(
        x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    for fn, params, inputs in (
        (scan, stacked, x),
        (project, heads, normal(6, 2, 3, seed=1)),
        (convolve, images, normal(2, 5, 5, 4, seed=1)),
    ):
        stats = jc.observe(fn, params, [inputs], ("abs_max",))
        small = jc.compress(params, {"**": SmoothQuant()}, stats=stats)
        y, expected = jc.compressed(fn)(small, inputs), fn(params, inputs)
        # Up to 36 terms below 12 each, in three layers that may double an error.
        np.testing.assert_allclose(y, expected, rtol=0, atol=8 * 36 * 36 * U)
        (leaf,) = jax.tree.leaves(small, is_leaf=jc.is_compressed)
        assert leaf.scale.size > 1


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="norm")(x)
        return nn.Dense(6, name="a")(y) + nn.Dense(6, name="b")(y)


def test_smoothing_into_a_norm():
    x = outliers(n=16)
    params = Block().init(jax.random.key(0), x)["params"]
    params["norm"]["scale"] = jnp.exp(2 * normal(16, seed=5))
    params["norm"]["bias"] = normal(16, seed=6)
    fn = lambda p, x: Block().apply({"params": p}, x)
    stats = jc.observe(fn, params, [x], ("abs_max",), leaves="*/kernel")
    smooth = smooth_into_norms(params, {"norm": ["a/kernel", "b/kernel"]}, stats)
    largest = stats["a/kernel"][(-2,)].abs_max
    of_w = jnp.maximum(*(jnp.abs(params[n]["kernel"]).max(1) for n in "ab"))
    s = jnp.sqrt(largest / of_w)
    np.testing.assert_allclose(smooth["norm"]["scale"], params["norm"]["scale"] / s, rtol=32 * U)
    np.testing.assert_allclose(
        smooth["b"]["kernel"], params["b"]["kernel"] * s[:, None], rtol=32 * U
    )
    terms = float(jnp.max(largest) * jnp.max(of_w)) * 32
    np.testing.assert_allclose(fn(smooth, x), fn(params, x), rtol=0, atol=16 * U * terms)


class Net(nn.Module):
    depthwise: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), name="one")(x))
        groups = 6 if self.depthwise else 1
        x = nn.relu(nn.Conv(6, (3, 3), name="two", feature_group_count=groups, use_bias=False)(x))
        return nn.Dense(4, name="last")(x.reshape(len(x), -1))


PAIRS = [("one/kernel", "one/bias", "two/kernel"), ("two/kernel", None, "last/kernel")]


@pytest.mark.parametrize("depthwise", [pytest.param(False, marks=pytest.mark.slow), True])
def test_equalization_leaves_the_function_and_evens_the_ranges(depthwise):
    x = normal(3, 5, 5, 2, seed=1)
    net = Net(depthwise)
    params = net.init(jax.random.key(0), x)["params"]
    params["one"]["kernel"] *= jnp.exp(2 * normal(6, seed=2))
    params["one"]["bias"] = normal(6, seed=3)
    even = equalize(params, PAIRS, iterations=20)
    fn = jax.jit(lambda p: net.apply({"params": p}, x))
    y, expected = fn(even), fn(params)
    # Each scale rounds each term thrice, in 20 turns of two pairs; sums are of 150 terms at most.
    limit = (3 * 40 + 150) * U * 8 * float(jnp.abs(expected).max())
    np.testing.assert_allclose(y, expected, rtol=0, atol=limit)
    r1 = jnp.abs(even["two"]["kernel"]).max((0, 1, 2))
    r2 = jnp.abs(even["last"]["kernel"]).reshape(25, 6, 4).max((0, 2))
    np.testing.assert_allclose(r1, r2, rtol=1e-3)  # converges linearly
    once = equalize(params, PAIRS[1:])
    r1 = jnp.abs(params["two"]["kernel"]).max((0, 1, 2))
    r2 = jnp.abs(params["last"]["kernel"]).reshape(25, 6, 4).max((0, 2))
    found = jnp.abs(once["two"]["kernel"]).max((0, 1, 2))
    np.testing.assert_allclose(found, jnp.sqrt(r1 * r2), rtol=16 * U)


@pytest.mark.parametrize("groups", [1, 4, 12])
def test_corrected_biases_have_no_mean_error(groups):
    x = normal(5, 6, 6, 12, seed=1) + jnp.arange(12) / 6
    params = {"kernel": normal(3, 3, 12 // groups, 24), "bias": normal(24, seed=2)}
    fn = lambda p, x: jax.lax.conv_general_dilated(
        x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    ) + p["bias"]  # fmt: skip
    stats = jc.observe(fn, params, [x], ("mean",), leaves="kernel")
    small = jc.compress(params, {"kernel": jc.Quantize("int3")})
    fixed = correct_biases(params, small, stats)
    mean = lambda p: np.mean(wide(fn(jc.decompress(p), x)), axis=(0, 1, 2))
    exact = mean(params)
    # Sums of up to 108 terms of up to 4 * 6, whose means are taken over 180 places.
    np.testing.assert_allclose(mean(fixed), exact, rtol=0, atol=108 * 24 * 16 * U)
    assert np.max(np.abs(mean(small) - exact)) > 0.05
    assert fixed["kernel"] is small["kernel"]


def test_the_mean_of_a_relu_is_its_integral():
    for mu, sigma in ((0.3, 1.2), (-2.0, 0.7), (4.0, 0.5)):
        density = lambda z, m=mu, s=sigma: (
            np.exp(-(((z - m) / s) ** 2) / 2) / s / np.sqrt(2 * np.pi)
        )
        expected = scipy.integrate.quad(lambda z, d=density: z * d(z), 0, 20)[0]
        np.testing.assert_allclose(relu_mean(mu, sigma), expected, rtol=0, atol=8 * U * 4)
    assert relu_mean(jnp.array([-1.0, 1.0]), jnp.zeros(2)).tolist() == [0.0, 1.0]


class Normed(nn.Module):
    bias: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), name="conv", use_bias=self.bias)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="norm")(x))
        return nn.BatchNorm(use_running_average=True, name="last")(nn.Dense(4, name="dense")(x))


@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_batch_norm_is_the_identity(bias):
    x, net = normal(3, 5, 5, 2, seed=1), Normed(bias)
    variables = net.init(jax.random.key(0), x)
    key = iter(range(100))
    variables = jax.tree.map(
        lambda v: v + 0.3 * jnp.abs(normal(*v.shape, seed=next(key))), variables
    )
    folded = fold_batch_norms(variables, {"conv": "norm"}, epsilon=1e-3)
    folded = fold_batch_norms(folded, {"dense": "last"})
    y, expected = net.apply(folded, x), net.apply(variables, x)
    # Sums of 18 and 6 terms of up to 8, scaled by at most 3.
    np.testing.assert_allclose(y, expected, rtol=0, atol=24 * 8 * 3 * 16 * U)
    norm = folded["batch_stats"]["norm"]
    assert np.all(norm["mean"] == 0)
    np.testing.assert_allclose(norm["var"] + 1e-3, 1, rtol=2 * U)
    g = variables["params"]["norm"]["scale"] / jnp.sqrt(
        variables["batch_stats"]["norm"]["var"] + 1e-3
    )
    expected = wide(variables["params"]["conv"]["kernel"]) * wide(g)
    np.testing.assert_allclose(folded["params"]["conv"]["kernel"], expected, rtol=4 * U)


def test_refusals():
    w = {"kernel": normal(4, 3), "norm": {"scale": jnp.ones(5)}}
    stats = jc.observe(run, w, [normal(2, 4)], ("abs_max",), leaves="kernel")
    with pytest.raises(jc.SpecError, match="alpha=2"):
        SmoothQuant(2)
    with pytest.raises(jc.SpecError, match="abs_max"):
        jc.compress(w, {"kernel": SmoothQuant()})
    with pytest.raises(jc.SpecError, match="put it first"):
        jc.chain(jc.Quantize("int8"), SmoothQuant())(w["kernel"])
    with pytest.raises(jc.SpecError, match="4 inputs, and 'norm' makes 5"):
        smooth_into_norms(w, {"norm": ["kernel"]}, stats)
    with pytest.raises(jc.RuleError, match="no leaf"):
        equalize(w, [("kernel", None, "other")])
    with pytest.raises(jc.SpecError, match="do not follow"):
        equalize(w, [("kernel", None, "kernel")])
    with pytest.raises(jc.SpecError, match="2 means"):
        correct_biases(w, w, {"kernel": jnp.ones(2)})
    with pytest.raises(jc.SpecError, match="12 means"):
        correct_biases(w, w, {"kernel": jnp.ones(12)})
    with pytest.raises(jc.SpecError, match="no inputs"):
        Rotate()(jnp.ones(3))
    with pytest.raises(jc.RuleError, match="no leaf"):
        fold_batch_norms({"params": w}, {"a": "norm"})
