"""Arrays as coded streams: every dtype, every bit count, every kind of mask."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress.arrays.layout import Fields, Mask
from jaxcompress.checkpoint.masks import decode_mask, encode_mask, gaps_to_mask, mask_to_gaps
from jaxcompress.checkpoint.streams import (
    decode_array,
    encode_array,
    pack_fields,
    unpack_fields,
)

RNG = np.random.default_rng(0)
# Rows and columns of unlike scale, as real layers have them.
W = jax.random.normal(jax.random.key(0), (96, 160)) * jnp.exp(
    0.6 * jax.random.normal(jax.random.key(1), (160,))
    + 0.6 * jax.random.normal(jax.random.key(2), (96, 1))
)


def bernoulli_bytes(p, n):
    return scipy.stats.bernoulli(p).entropy() / np.log(2) * n / 8


@pytest.mark.parametrize(
    "dtype",
    ["float32", "bfloat16", "float16", "float64", "int64", "int16", "bool", "complex64", "int8",
     "float8_e4m3fn", "uint32"],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(), (0, 3), (7, 1, 3), (40, 50)])
def test_arrays_of_every_dtype_come_back(dtype, shape):
    array = np.asarray(RNG.standard_normal(shape) * 9).astype(dtype)
    # Zeros compress, whatever the dtype; and so each takes the way of coded arrays.
    array = np.stack([array, np.zeros_like(array)] * 40)
    found = encode_array(array, None)
    if found is None:
        assert array.size == 0
        return
    how, data = found
    back = decode_array(how, data, array.shape, array.dtype)
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tobytes() == array.tobytes()


def test_exponents_are_coded_apart_from_mantissas():
    """Weights of one scale have few exponents: a float32 normal has 2.4 bits of them and a sign."""
    array = RNG.standard_normal((256, 256)).astype(np.float32)
    _, data = encode_array(array, None)
    exponents = (array.view(np.uint32) >> 23) & 255
    bits = 24 + scipy.stats.entropy(np.bincount(exponents.reshape(-1)), base=2)
    assert len(data) <= 1.001 * bits * array.size / 8 + 200


@pytest.mark.thin(8)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize(
    ("shape", "axis"), [((24, 5), -2), ((30, 7), -1), ((2, 37, 3), -2), ((0, 4), -1), ((3, 64), -1)]
)
@pytest.mark.parametrize("blocks", [1, 4])
def test_fields_are_the_codes(bits, shape, axis, blocks):
    block = blocks * (8 // int(np.gcd(bits, 8)))
    codes = RNG.integers(0, 2**bits, shape)
    packed = jc.PackedArray.pack(jnp.asarray(codes), bits, axis=axis, block=block)
    words = np.asarray(packed.words)
    fields = packed.layouts()["words"]
    assert fields == Fields(bits, axis, shape[axis], block)
    symbols = unpack_fields(words, fields)
    counts = np.bincount(symbols, minlength=2**bits)
    padding = symbols.size - codes.size
    counts[0] -= padding
    np.testing.assert_array_equal(counts, np.bincount(codes.reshape(-1), minlength=2**bits))
    np.testing.assert_array_equal(pack_fields(symbols, fields, words.shape), words)


def test_three_bit_codes_are_coded_as_codes():
    codes = RNG.binomial(7, 0.5, (64, 256))
    packed = jc.PackedArray.pack(jnp.asarray(codes), 3, axis=-2)
    how, data = encode_array(np.asarray(packed.words), packed.layouts()["words"])
    assert how["as"] == "fields"
    entropy = scipy.stats.entropy(np.bincount(codes.reshape(-1)), base=2) * codes.size / 8
    assert len(data) <= 1.01 * entropy + 64


def index_of(spec, w):
    leaf = spec(w)
    return np.asarray(leaf.index.words), leaf.layouts()["index"], leaf


@pytest.mark.thin(8)
@pytest.mark.parametrize("w", [W, W[:23, :30], jnp.stack([W[:32], W[32:64]]), W[0]])
@pytest.mark.parametrize(
    "spec",
    [jc.Prune(0.5), jc.Prune(0.9), jc.Prune(0.995), jc.Prune(1.0), jc.Prune(0.5, pattern="2:4")],
    ids=repr,
)  # fmt: skip
def test_masks_of_every_kind_come_back(w, spec):
    words, layout, _ = index_of(spec, w)
    found = encode_array(words, layout)
    if found is not None:
        how, data = found
        np.testing.assert_array_equal(decode_array(how, data, words.shape, words.dtype), words)
        assert len(data) < words.nbytes


def test_n_of_m_masks_take_the_bits_of_their_patterns():
    """Six patterns of 2:4, so log2(6) bits for four weights."""
    words, layout, leaf = index_of(jc.Prune(0.5, pattern="2:4"), W)
    how, data = encode_array(words, layout)
    assert how["as"] == "columns"
    assert len(data) <= 1.01 * np.log2(6) / 4 * leaf.size / 8 + 64


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_masks_with_full_and_empty_rows_take_less_than_their_density_allows(sparsity):
    big = jnp.tile(W, (4, 4)) * jax.random.normal(jax.random.key(3), (384, 640))
    words, layout, leaf = index_of(jc.Prune(sparsity), big)
    how, data = encode_array(words, layout)
    assert how["as"] == "densities"
    assert len(data) < 0.9 * bernoulli_bytes(sparsity, leaf.size)


def test_even_masks_take_what_their_density_allows():
    mask = RNG.random((300, 400)) < 0.1
    leaf = jc.SparseArray.from_mask(jnp.ones(mask.shape), jnp.asarray(mask))
    _, data = encode_array(np.asarray(leaf.index.words), leaf.layouts()["index"])
    assert len(data) <= 1.01 * bernoulli_bytes(mask.mean(), mask.size) + 64


@settings(max_examples=60, derandomize=True, database=None)
@given(st.integers(8, 70), st.integers(8, 70), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_masks_by_density_come_back(rows, width, p, seed):
    bits = (np.random.default_rng(seed).random((rows, width)) < p).astype(np.uint8)
    np.testing.assert_array_equal(decode_mask(encode_mask(bits), rows, width), bits)


def test_a_mask_of_several_chunks_comes_back():
    bits = (RNG.random((700, 1001)) < np.linspace(0.01, 0.9, 1001)).astype(np.uint8)
    np.testing.assert_array_equal(decode_mask(encode_mask(bits), 700, 1001), bits)


@settings(max_examples=60, derandomize=True, database=None)
@given(st.integers(2, 8), st.floats(0, 1), st.integers(0, 2**32 - 1), st.integers(0, 9))
def test_gaps_are_their_mask(bits, p, seed, spare):
    mask = (np.random.default_rng(seed).random((2, 333)) < p).astype(np.uint8)
    entries = 333 + 333 // (2**bits - 1) + spare
    codes = mask_to_gaps(mask, bits, entries)
    np.testing.assert_array_equal(gaps_to_mask(codes, bits, 333), mask)
    few = int(mask.sum(axis=1).max()) - 1
    if few >= 0:
        assert mask_to_gaps(mask, bits, few) is None
    if mask.any():
        assert gaps_to_mask(codes, bits, int(np.nonzero(mask)[1].max())) is None


def test_gaps_that_the_mask_does_not_give_back_keep_their_own_form():
    """An escape that was not needed makes other gaps for the same mask."""
    codes = np.full((1, 400), 3, np.uint8)
    codes[0, ::2] = 1  # two escapes of three zeros where a longer code would do
    words = np.packbits(
        np.unpackbits(codes[..., None], axis=-1, count=2, bitorder="little").reshape(1, -1),
        axis=-1, bitorder="little",
    )  # fmt: skip
    layout = Mask(100, 2000, 2, 400)
    assert gaps_to_mask(codes, 2, 2000) is not None
    how, data = encode_array(words, layout)
    np.testing.assert_array_equal(decode_array(how, data, words.shape, words.dtype), words)
    codes[0, 0] = 3  # and gaps that lead out of the mask
    assert gaps_to_mask(codes, 2, 20) is None


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_padding_that_is_not_zero_is_kept(sparsity):
    """Nobody reads those bits; but a file gives back every bit that it was given."""
    leaf = jc.Prune(sparsity)(W[:31, :61])
    words = np.asarray(leaf.index.words).copy()
    words[-1] |= 128
    found = encode_array(words, leaf.layouts()["index"])
    if found is not None:
        np.testing.assert_array_equal(decode_array(*found, words.shape, words.dtype), words)


JUNK = st.one_of(st.integers(-2, 2**33), st.sampled_from([0, 1, 2, 3, 8, "rows", None, 2.5]))


@pytest.fixture(scope="module")
def coded():
    specs = [jc.Prune(0.99), jc.Prune(0.5, pattern="2:4"), jc.Prune(0.9), jc.Prune(0.97)]
    out = []
    for spec in specs:
        words, layout, _ = index_of(spec, W)
        out.append((words, *encode_array(words, layout)))
    out.append(
        (np.zeros((30, 30), np.float32), *encode_array(np.zeros((30, 30), np.float32), None))
    )
    return out


@settings(max_examples=400, derandomize=True, database=None)
@given(st.data())
def test_damaged_descriptions_and_bytes_are_refused_or_harmless(coded, data):
    words, how, stream = data.draw(st.sampled_from(coded))
    how, stream, shape = dict(how), bytearray(stream), list(words.shape)
    kind = data.draw(st.integers(0, 3))
    if kind == 0:
        how[data.draw(st.sampled_from(sorted(how)))] = data.draw(JUNK)
    elif kind == 1:
        shape[0] = data.draw(st.integers(0, 2**40))
    elif kind == 2:
        stream[data.draw(st.integers(0, len(stream) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        del stream[data.draw(st.integers(0, len(stream) - 1)) :]
    try:
        out = decode_array(how, bytes(stream), tuple(shape), words.dtype)
    except (jc.FileError, ValueError, TypeError):  # `load` turns all of them into a FileError
        return
    assert (out.shape, out.dtype) == (tuple(shape), words.dtype)


def test_eight_bit_floats_are_bytes():
    array = np.zeros((40, 40), ml_dtypes.float8_e5m2)
    how, data = encode_array(array, None)
    assert how == {"as": "planes"}
    assert len(data) == 5
