"""Bit packing against a slow loop over single bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress.arrays import bits as module
from jaxcompress.arrays.bits import packed_length, period
from jaxcompress.errors import SpecError

# Compiled as a whole: step by step, each operation of each shape would be compiled alone.
pack_bits = jax.jit(module.pack_bits, static_argnums=1, static_argnames=("axis", "block"))
unpack_bits = jax.jit(module.unpack_bits, static_argnums=(1, 2), static_argnames=("axis", "block"))


def slow_pack(codes: np.ndarray, bits: int, block: int) -> np.ndarray:
    """The layout of one axis, written out bit by bit."""
    p, q = period(bits)
    codes = np.pad(codes, (0, -len(codes) % p))
    out = []
    for start in range(0, len(codes), block):
        part = codes[start : start + block]
        run = len(part) // p
        words = np.zeros(q * run, np.uint8)
        for k in range(p):
            for j in range(run):
                for b in range(bits):
                    r, shift = divmod(bits * k + b, 8)
                    words[r * run + j] |= (int(part[k * run + j]) >> b & 1) << shift
        out.append(words)
    return np.concatenate(out) if out else np.zeros(0, np.uint8)


def codes_of(shape, bits, seed=0):
    return np.random.default_rng(seed).integers(0, 2**bits, shape).astype(np.uint8)


@pytest.mark.parametrize("bits", range(1, 9))
def test_period_is_the_shortest_run_that_ends_on_a_byte(bits):
    p, q = period(bits)
    assert p * bits == 8 * q
    assert all(k * bits % 8 for k in range(1, p))


@pytest.mark.thin(8)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("blocks", [None, 3])
def test_layout_matches_the_bit_loop(bits, blocks):
    p, _ = period(bits)
    block = None if blocks is None else blocks * p
    for n in (0, 1, 33, 8 * p):
        codes = codes_of(n, bits, n)
        words = pack_bits(jnp.asarray(codes), bits, block=block)
        assert words.dtype == jnp.uint8
        assert words.shape == (packed_length(n, bits),)
        np.testing.assert_array_equal(words, slow_pack(codes, bits, block or p))
        np.testing.assert_array_equal(unpack_bits(words, bits, n, block=block), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_default_layout_is_numpys_little_endian_bitstream(bits):
    codes = codes_of(40, bits)
    stream = np.unpackbits(codes[:, None], axis=1, bitorder="little")[:, :bits]
    expected = np.packbits(stream.reshape(-1), bitorder="little")
    np.testing.assert_array_equal(pack_bits(jnp.asarray(codes), bits), expected)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("axis", [-3, -2, 2])
def test_every_axis(bits, axis):
    block = 2 * period(bits)[0]
    codes = codes_of((5, 18, 11), bits)
    words = pack_bits(jnp.asarray(codes), bits, axis=axis, block=block)
    expected = np.apply_along_axis(slow_pack, axis, codes, bits, block)
    np.testing.assert_array_equal(words, expected)
    back = unpack_bits(words, bits, codes.shape[axis], axis=axis, block=block)
    np.testing.assert_array_equal(back, codes)


@settings(max_examples=15)
@given(data=st.data(), bits=st.integers(1, 8))
def test_round_trip(data, bits):
    shape = tuple(data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=3)))
    axis = data.draw(st.integers(-len(shape), -1))
    block = data.draw(st.none() | st.integers(1, 4).map(lambda k: k * period(bits)[0]))
    dtype = data.draw(st.sampled_from([np.uint8, np.int32, np.int8]))
    codes = codes_of(shape, bits if dtype != np.int8 else min(bits, 7), 1).astype(dtype)
    words = pack_bits(jnp.asarray(codes), bits, axis=axis, block=block)
    n = shape[axis]
    assert words.shape[axis] == packed_length(n, bits)
    back = unpack_bits(words, bits, n, axis=axis, block=block)
    assert back.dtype == jnp.uint8
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("bits", [1, 3, 4, 5, 6])
def test_padding_is_zero(bits):
    p, q = period(bits)
    word = pack_bits(jnp.full(1, 2**bits - 1, jnp.uint8), bits)
    assert word.shape == (q,)
    assert int(np.unpackbits(np.asarray(word)).sum()) == bits
    assert p > 1


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_jit_and_vmap(bits):
    codes = jnp.asarray(codes_of((3, 4, 19), bits))
    pack = lambda c: module.pack_bits(c, bits, axis=-1)
    words = pack(codes)
    np.testing.assert_array_equal(jax.jit(pack)(codes), words)
    np.testing.assert_array_equal(jax.vmap(jax.vmap(pack))(codes), words)
    unpack = jax.jit(jax.vmap(lambda w: module.unpack_bits(w, bits, 19)))
    np.testing.assert_array_equal(unpack(words), codes)


def test_unpacking_has_no_concatenation():
    words = jnp.zeros((16, 128), jnp.uint8)
    for bits in range(1, 9):
        n = 128 * 8 // bits // 8 * 8
        if packed_length(n, bits) != 128:
            continue
        text = str(jax.make_jaxpr(lambda w, b=bits, n=n: module.unpack_bits(w, b, n))(words))
        assert "concatenate" not in text


@pytest.mark.parametrize(
    "call",
    [
        lambda x: pack_bits(x, 0),
        lambda x: pack_bits(x, 9),
        lambda x: pack_bits(x, 4, axis=1),
        lambda x: pack_bits(x, 4, block=3),
        lambda x: pack_bits(x, 3, block=0),
        lambda x: unpack_bits(x, 4, 9),
        lambda x: unpack_bits(x, 4, 17),
    ],
)
def test_errors(call):
    with pytest.raises(SpecError):
        call(jnp.zeros(8, jnp.uint8))
