"""Values of other libraries' formats, and where their conventions part from ours."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.arrays.bits import pack_bits
from jaxcompress.arrays.formats import code_format


def weight(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ours(w, name, **kwargs):
    """The values of a [rows, inputs] weight."""
    return np.asarray(jc.Quantize(name, axis=-1, **kwargs)(jnp.asarray(w)).materialize())


@pytest.fixture
def gguf():
    return pytest.importorskip("gguf")


@pytest.fixture
def mx():
    """torchao's microscaling formats."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torch")
        pytest.importorskip("torchao")
        return pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")


@pytest.fixture
def qwix():
    pytest.importorskip("qwix")
    return pytest.importorskip("qwix._src.core.qarray")


def of_gguf(gguf, w, kind):
    kind = getattr(gguf.GGMLQuantizationType, kind)
    return gguf.quants.dequantize(gguf.quants.quantize(w, kind), kind)


def test_q8_0_of_gguf(gguf):
    w = weight(16, 256)
    theirs = of_gguf(gguf, w, "Q8_0")
    found = ours(w, "int8", group_size=32, scale_dtype="float16")
    wanted = np.abs(w.reshape(16, 8, 32)).max(-1, keepdims=True) / np.float32(127)
    step = wanted.astype(np.float16).astype(np.float32)
    # It divides by the scale before that is rounded to float16, to 2**-11: codes up to 127 move by
    # 0.062 at most, so that only quotients so close to a half may give another code, by one.
    x = w.reshape(16, 8, 32) / step
    near = np.abs(np.abs(x - np.floor(x)) - 0.5) <= np.abs(x) * 2.0**-11 + 1e-4
    codes = [np.round(v.reshape(x.shape) / step) for v in (found, theirs)]
    np.testing.assert_array_equal(codes[0][~near], codes[1][~near])
    assert np.abs(codes[0] - codes[1]).max() <= 1
    assert (codes[0] != codes[1]).mean() < 0.04
    np.testing.assert_array_equal(found.reshape(x.shape)[~near], theirs.reshape(x.shape)[~near])
    # Ours are the nearest for the scale that is stored.
    assert np.sum((found - w) ** 2) <= np.sum((theirs - w) ** 2)


def test_q8_0_of_gguf_rounds_halves_away_from_zero(gguf):
    w = np.arange(-32, 32, dtype=np.float32) / 2
    w[[0, 32]] = 127.0  # so that the step is 1
    theirs = of_gguf(gguf, w[None], "Q8_0")[0]
    found = ours(w[None], "int8", group_size=32, scale_dtype="float16")[0]
    other = found != theirs
    # Of the 32 halves those with an even whole part: -15.5 .. 15.5.
    halves = w % 1 == 0.5
    assert other.sum() == 16
    np.testing.assert_array_equal(other, halves & (np.trunc(w) % 2 == 0))


def test_q4_0_of_gguf_is_a_little_better_than_a_positive_scale(gguf):
    # Its scale may be negative: the largest magnitude always is code -8, whatever its sign, and no
    # code is left unused. Ours are positive; without clipping and with the best range they come
    # within a few percent, and zero points are better than either.
    w = weight(32, 256, seed=1)
    error = lambda values: float(np.sum((values - w) ** 2))
    theirs = error(of_gguf(gguf, w, "Q4_0"))
    options = {"group_size": 32, "scale_dtype": "float16", "estimator": "mse"}
    assert theirs < error(ours(w, "int4", convention="no_clip", **options)) < 1.05 * theirs
    assert error(ours(w, "uint4", symmetric=False, **options)) < theirs


def test_mxfp4_of_gguf(gguf):
    w = weight(16, 256) * np.float32(3)
    np.testing.assert_array_equal(ours(w, "mxfp4"), of_gguf(gguf, w, "MXFP4"))


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp8_e5m2", "mxfp4"])
def test_microscaling_of_torchao(mx, name):
    import torch

    dtype = {"mxfp8_e4m3": torch.float8_e4m3fn, "mxfp8_e5m2": torch.float8_e5m2,
             "mxfp4": torch.float4_e2m1fn_x2}[name]  # fmt: skip
    w = weight(16, 128) * np.float32(3)
    w[0, 0] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scale, data = mx.to_mx(torch.tensor(w), dtype, 32)
        powers = scale.view(torch.uint8).numpy().astype(np.float64) - 127
        if name == "mxfp4":
            packed = data.view(torch.uint8).numpy()
            codes = np.stack([packed & 15, packed >> 4], -1).reshape(16, 128)
            codes = np.asarray(code_format("fp4_e2m1").values())[
                np.where(codes < 8, 7 + codes.astype(int), 15 - codes.astype(int))
            ]
        else:
            codes = data.to(torch.float32).numpy()
    expected = codes * np.repeat(2.0 ** powers.reshape(16, 4), 32, 1)
    np.testing.assert_array_equal(ours(w, name), expected.astype(np.float32))


def test_nvfp4_of_torchao(mx):
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
        w = weight(16, 128)
        x = torch.tensor(w)
        outer = nv.per_tensor_amax_to_scale(x.abs().max())
        scale, data = nv.nvfp4_quantize(x, per_tensor_scale=outer)
        scale = scale.to(torch.float32).numpy().reshape(16, 8) * float(outer)
        packed = data.view(torch.uint8).numpy()
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(16, 128).astype(int)
    table = code_format("fp4_e2m1").values()
    theirs = table[np.where(codes < 8, 7 + codes, 15 - codes)] * np.repeat(scale, 16, 1)
    # One scale of scales for all from the first input axis on: here the inputs come first.
    found = np.asarray(jc.Quantize("nvfp4")(jnp.asarray(w.T)).materialize()).T
    # The same but for float32 rounding of products and inverses, and a code at a tie: one in 500.
    same = np.isclose(found, theirs, rtol=1e-6, atol=0)
    assert same.mean() > 0.998


@pytest.mark.parametrize("name", ["int8", "int4", "nf4"])
def test_tiles_of_qwix(qwix, name):
    w = weight(128, 8)
    dtype = {"int8": jnp.int8, "int4": jnp.int4, "nf4": "nf4"}[name]
    how = qwix.HowToQuantize(qtype=dtype, channelwise_axes=(1,), tiled_axes={0: 32})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = qwix.quantize(jnp.asarray(w), how)
        values = np.asarray(qwix.dequantize(theirs))
    # It takes `max|w|` as half a code above the last, 127.5 and 7.5: the convention `full`.
    convention = "absmax" if name == "nf4" else "full"
    leaf = jc.Quantize(name, group_size=32, scale_dtype="float32", convention=convention)
    leaf = leaf(jnp.asarray(w))
    # Two divisions in float32 that may be products with inverses there.
    np.testing.assert_allclose(leaf.scale, theirs.scale, rtol=1e-6)
    step = np.repeat(np.asarray(leaf.scale), 32, 0)
    found = np.asarray(leaf.materialize())
    same = np.isclose(found, values, rtol=2e-6, atol=0)
    # The largest of a group lies on a half, and one in a million elsewhere.
    largest = np.abs(w) == np.repeat(np.abs(w).reshape(4, 32, 8).max(1), 32, 0)
    assert same[~largest].all()
    assert (np.abs(found - values) <= step * 1.001).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_stream_and_scales_of_compressed_tensors(bits):
    w = weight(6, 64, seed=bits)
    # Its description: s = amax / ((2**b - 1) / 2); u = q + 2**(b - 1) is a little-endian stream of
    # bits for each row.
    top = 2 ** (bits - 1)
    scale = np.abs(w.reshape(6, 2, 32)).max(-1, keepdims=True) / np.float32((2**bits - 1) / 2)
    codes = np.clip(np.round(w.reshape(6, 2, 32) / scale), -top, top - 1).astype(int)
    leaf = jc.Quantize(
        f"int{bits}", axis=-1, group_size=32, convention="full", scale_dtype="float32"
    )(jnp.asarray(w))
    np.testing.assert_array_equal(leaf.scale, scale[..., 0])
    np.testing.assert_array_equal(
        leaf.materialize(), (codes.astype(np.float32) * scale).reshape(6, 64)
    )
    unsigned = (codes + top).reshape(6, 64)
    stream = (unsigned[..., None] >> np.arange(bits)) & 1
    expected = np.packbits(stream.reshape(6, -1), axis=-1, bitorder="little")
    words = pack_bits(jnp.asarray(unsigned, jnp.uint8), bits, axis=-1)
    np.testing.assert_array_equal(np.asarray(words).view(np.uint8).reshape(6, -1), expected)
