"""Coders against their bounds, brute force and each other; the sizes of a tree."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress.arrays.sparse import encode
from jaxcompress.errors import CompressError
from jaxcompress.report.coding import (
    CODERS,
    coded_sizes,
    decode_symbols,
    encode_symbols,
)


def entropy(symbols, alphabet):
    shares = np.bincount(symbols, minlength=alphabet) / max(1, len(symbols))
    shares = shares[shares > 0]
    return -len(symbols) * np.sum(shares * np.log2(shares))


def check(symbols, alphabet):
    symbols = np.asarray(symbols, np.int64)
    counts, n = np.bincount(symbols, minlength=alphabet), len(symbols)
    least = entropy(symbols, alphabet)
    for coder in CODERS:
        stream = encode_symbols(symbols, alphabet, coder)
        np.testing.assert_array_equal(decode_symbols(stream, counts, n, coder), symbols)
        assert stream.table.size == alphabet
        if np.count_nonzero(counts) < 2:
            assert stream.bits == 0
            continue
        assert stream.bits >= least - 1e-6
        if coder == "huffman":
            assert stream.bits < least + n  # each code less than one bit above -log2(share)
            assert stream.bits <= 32 * stream.words.size < stream.bits + 32
            assert np.sum(2.0 ** -stream.table[stream.table > 0].astype(float)) == 1  # Kraft
        else:
            # Frequencies on a grid of eighths of an octave are off by 2^(1/16), which costs up to
            # 2/16 bits a symbol; and the coder ends on words of 32 bits, of which it has two.
            assert stream.bits <= least + n / 8 + 64 + 32


@settings(max_examples=60, derandomize=True)
@given(st.lists(st.integers(0, 6), max_size=60))
def test_any_symbols_come_back(symbols):
    check(symbols, 7)


@pytest.mark.parametrize("alphabet", [2, 16, 300])
def test_skewed_symbols_come_back_within_their_bounds(alphabet):
    rng = np.random.default_rng(0)
    symbols = np.minimum(rng.geometric(0.6, size=5000) - 1, alphabet - 1)
    check(symbols, alphabet)
    least = entropy(symbols, alphabet)
    ans, ranged = (encode_symbols(symbols, alphabet, c).bits for c in ("ans", "range"))
    # In the mean the grid costs (log 2 / 8)^2 / 24 nats a symbol, 5e-4 bits; both end in words.
    assert ans < least * 1.002 + 64 + 5000 * 1e-3
    assert abs(ranged - ans) <= 64


def test_the_huffman_code_is_the_shortest_of_all():
    counts = [9, 5, 4, 1, 1]
    symbols = np.repeat(np.arange(5), counts)
    lengths = itertools.product(range(1, 5), repeat=5)
    # Every prefix code fulfils Kraft's inequality, and every such set of lengths is one's.
    best = min(np.dot(counts, x) for x in lengths if sum(2.0**-n for n in x) <= 1)
    assert encode_symbols(symbols, 5, "huffman").bits == best


def test_a_tree_is_read_symbol_by_symbol():
    w = jax.random.normal(jax.random.key(0), (48, 40))
    shared = jc.Codebook(3)(w)
    kept = round(w.size * 0.2)
    mask = jnp.abs(w) >= jnp.sort(jnp.abs(w), axis=None)[-kept]
    tree = {
        "codebook": shared,
        "again": shared,
        "mask": encode(w, mask, kept, ("bitmask", 1, w.size), 0),
        "gaps": jc.Prune(0.98)(w),
        "int5": jc.Quantize("int5")(w),
        "dense": w,
        "step": jnp.arange(3),
        "step.words": jnp.arange(3),  # a dense array, whatever its key looks like
    }
    table = coded_sizes(tree)
    rows = {row["path"]: row for row in table.rows}
    assert [row["path"] for row in table.rows] == [
        "again.indices.words", "gaps.index.words", "int5.codes.words",
        "mask.index.words",
    ]  # fmt: skip
    codes = np.asarray(shared.indices.materialize()).ravel()
    row = rows["again.indices.words"]
    assert (row["symbols"], row["alphabet"], row["stored"]) == (w.size, 8, 3 * w.size)
    assert row["entropy"] == pytest.approx(entropy(codes, 8))
    assert row["huffman"] == encode_symbols(codes, 8, "huffman").total
    share = kept / w.size
    row = rows["mask.index.words"]
    bits = -share * np.log2(share) - (1 - share) * np.log2(1 - share)
    assert row["entropy"] == pytest.approx(w.size * bits)
    # Of two symbols each has a code of one bit, whatever their shares.
    assert row["huffman"] == w.size + 2 * 8
    assert row["ans"] < 0.75 * row["huffman"]
    gaps = np.asarray(tree["gaps"].index.materialize()).ravel()
    assert rows["gaps.index.words"]["symbols"] == gaps.size
    assert rows["gaps.index.words"]["entropy"] == pytest.approx(entropy(gaps, gaps.max() + 1))
    for row in table.rows:
        assert row["entropy"] <= min(row["huffman"], row["range"], row["ans"])
        assert row["file"] <= row["stored"]
    text = str(table)
    assert "mask.index.words" in text
    assert "total" in text
    assert table.total("stored") == sum(row["stored"] for row in table.rows)


def test_the_file_takes_what_is_said(tmp_path):
    leaf = jc.Codebook(4)(jax.random.normal(jax.random.key(1), (256, 128)))
    row = coded_sizes({"w": leaf}).rows[0]
    jc.save(tmp_path / "x", {"w": leaf}, coded=True)
    from safetensors import safe_open

    with safe_open(tmp_path / "x", "numpy") as file:
        assert 8 * file.get_tensor("w.indices.words").nbytes == row["file"]


@pytest.mark.parametrize("coder", ["huffman", "range", "ans"])
def test_no_symbols_take_no_codes(coder):
    stream = encode_symbols([], 3, coder)
    assert (stream.bits, stream.table.tolist()) == (0, [0, 0, 0])


def test_bad_symbols_are_refused():
    with pytest.raises(CompressError, match="outside of 0 to 2"):
        encode_symbols([0, 3], 3, "ans")
    with pytest.raises(CompressError, match="huffman, range, ans"):
        encode_symbols([0, 1], 3, "deflate")
