"""Coded streams: lossless, near the entropy, and safe on bytes that are none."""

import hashlib

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcompress as jc
from jaxcompress.checkpoint import entropy
from jaxcompress.checkpoint.entropy import CHUNK, decode_bytes, encode_bytes

KINDS = {
    "gauss": lambda rng, n: np.rint(rng.standard_normal(n) * 38).clip(-127, 127).astype(np.int8),
    "nibbles": lambda rng, n: rng.binomial(15, 0.5, n) * 16 + rng.binomial(15, 0.5, n),
    "mask": lambda rng, n: np.packbits(rng.random((n, 8)) < 0.1, axis=1)[:, 0],
    "few": lambda rng, n: rng.choice([3, 17, 200], n, p=[0.7, 0.2, 0.1]),
    "uniform": lambda rng, n: rng.integers(0, 256, n),
    "rare": lambda rng, n: (rng.random(n) < 1e-3) * 7,
}


def draw(kind, n):
    rng = np.random.default_rng([n, *kind.encode()])
    return KINDS[kind](rng, n).astype(np.int64).astype(np.uint8)


def entropy_bytes(symbols):
    return scipy.stats.entropy(np.bincount(symbols), base=2) * symbols.size / 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 100, 1000, 5000, 70_000, CHUNK, 1_000_003])
def test_streams_are_lossless_and_near_their_entropy(kind, n):
    symbols = draw(kind, n)
    coded = encode_bytes(symbols)
    np.testing.assert_array_equal(decode_bytes(coded, n), symbols)
    if kind == "mask" and 1000 <= n <= 5000:
        # A hundred or more frequencies to learn, each at a cost of log2(n) / 2 bits, are by
        # themselves more than is allowed; masks in files are coded by context (test_streams).
        return
    assert len(coded) <= max(n + 1, 5)
    assert len(coded) <= 1.01 * entropy_bytes(symbols) + 64


@settings(max_examples=60, derandomize=True, database=None)
@given(hnp.arrays(np.uint8, st.integers(0, 400)), st.integers(1, 3000))
def test_any_bytes_come_back(symbols, times):
    symbols = np.tile(symbols, times)[:300_000]
    np.testing.assert_array_equal(decode_bytes(encode_bytes(symbols), symbols.size), symbols)


def test_each_kind_is_chosen_where_it_is_the_shortest():
    kind = lambda symbols: encode_bytes(symbols)[0]
    assert kind(draw("uniform", 50_000)) == entropy.RAW
    assert kind(np.full(50_000, 9, np.uint8)) == entropy.CONSTANT
    assert kind(draw("few", 2_000_000)) == entropy.STATIC
    assert kind(draw("gauss", 1000)) == entropy.ADAPTIVE


def test_the_bytes_are_the_same_on_every_machine():
    """Models are of whole numbers, so the code cannot depend on how a machine rounds."""
    n = np.arange(300_000, dtype=np.uint64)
    noise = (n * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    steady = ((noise & 15) + ((noise >> 4) & 15) + ((noise >> 8) & 31)).astype(np.uint8)
    drifting = (steady * (n // 1000 % 5)).astype(np.uint8)
    digests = {
        name: (coded[0], len(coded), hashlib.sha256(coded).hexdigest()[:16])
        for name, coded in {
            "static": encode_bytes(steady),
            "adaptive": encode_bytes(drifting[:3000]),
        }.items()
    }
    assert digests == GOLDEN


GOLDEN = {"static": (2, 207267, "468efd23c4365d21"), "adaptive": (3, 1978, "5bce79fc430765f7")}


@settings(max_examples=300, derandomize=True, database=None)
@given(st.binary(max_size=80), st.integers(0, 1 << 45))
def test_any_bytes_decode_or_are_refused(data, n):
    try:
        out = decode_bytes(data, n)
    except jc.FileError:
        return
    assert out.shape == (n,)
    assert n <= max(1, len(data)) << 16


@pytest.mark.parametrize("kind", ["few", "gauss", "rare"])
def test_a_stream_of_another_length_is_refused(kind):
    symbols = draw(kind, 3000)
    coded = encode_bytes(symbols)
    for data in (coded[:-1], coded[:-4], coded + b"\0", coded + coded[-4:]):
        with pytest.raises(jc.FileError, match="stream"):
            decode_bytes(data, symbols.size)
    with pytest.raises(jc.FileError, match="too short to hold"):
        decode_bytes(coded, 1 << 40)
