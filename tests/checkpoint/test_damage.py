"""A file with any byte changed or cut off is refused in words, and nothing is half written."""

import json
import multiprocessing
import os
import resource
import struct
import subprocess
import sys
import tracemalloc
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jaxcompress as jc
from jaxcompress.checkpoint.streams import decode_array


def small_tree(zeros=40):
    w = np.sin(np.arange(128.0) ** 2).reshape(16, 8).astype(np.float32)
    return {
        "int8": jc.QuantizedArray.quantize(jnp.asarray(w), "int8"),
        "zeros": np.zeros((zeros, zeros), np.float32),
        "bias": np.arange(5, dtype=np.float32),
        "name": "é",
    }


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "coded"])
def small(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("damage") / "small.safetensors"
    tree = small_tree(40 if request.param else 4)  # coded, the many zeros are a few bytes
    jc.save(path, tree, {"note": "n"}, coded=request.param, recipe=jc.Recipe.of({}))
    return path


def told(path, **how):
    """The message of the one kind of error that a damaged file may give."""
    with pytest.raises(jc.FileError) as caught:
        jc.decompress(jc.load(path, **how))
    return str(caught.value)


def test_every_byte_counts(small, tmp_path):
    whole = small.read_bytes()
    target = tmp_path / "flipped"
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        target.write_bytes(flipped)
        message = told(target)
        assert str(target) in message
        assert "\n" not in message


def test_every_length_but_the_whole_is_told(small, tmp_path):
    whole = small.read_bytes()
    target = tmp_path / "cut"
    for length in range(len(whole)):
        target.write_bytes(whole[:length])
        assert "not a whole safetensors file" in told(target)
    target.write_bytes(whole + b"\0")
    assert "not a whole safetensors file" in told(target)


def test_a_lazy_leaf_is_checked_when_it_is_read(small, tmp_path):
    whole = bytearray(small.read_bytes())
    whole[-1] ^= 1
    (tmp_path / "x").write_bytes(whole)
    lazy = jc.load(tmp_path / "x", lazy=True)
    good = [name for name in ("int8", "zeros", "bias") if not _refuses(lazy[name])]
    assert len(good) == 2
    assert "is damaged: its checksum does not match" in told(tmp_path / "x", lazy=True)


def _refuses(leaf):
    try:
        leaf.load()
    except jc.FileError:
        return True
    return False


def resealed(path, target, change):
    """The file with its JSON changed by hand and every checksum of the header right."""
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    ours = json.loads(header["__metadata__"]["jaxcompress"])
    data = change(header, ours, bytearray(whole[8 + length :]))
    header["__metadata__"]["jaxcompress"] = json.dumps(ours)
    header["__metadata__"]["jaxcompress.checksum"] = "0" * 8
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.replace(b'"00000000"', b'"%08x"' % zlib.crc32(text), 1)
    target.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))


def node_of(ours, name):
    return next(child for key, child in ours["tree"]["dict"] if key == name)


def test_a_promise_beyond_the_file_is_refused_before_anything_is_allocated(tmp_path):
    jc.save(tmp_path / "x", small_tree(), coded=True)
    for shape in ([2**40], [2**20, 2**20], [2**62, 2**62], [0], [-1], ["3"], 3, None):

        def promise(header, ours, data, shape=shape):
            node = node_of(ours, "zeros")
            assert "coded" in node
            node["shape"] = shape
            return data

        resealed(tmp_path / "x", tmp_path / "y", promise)
        tracemalloc.start()
        message = told(tmp_path / "y")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert str(tmp_path / "y") in message
        # numpy reports what it asks for: never the promise, a file of this size has no megabytes.
        assert peak < 64 << 20


def test_a_file_that_is_replaced_is_still_read_as_it_was(tmp_path):
    jc.save(tmp_path / "x", {"w": np.zeros(1000, np.float32)})
    lazy = jc.load(tmp_path / "x", lazy=True)
    jc.save(tmp_path / "x", {"other": np.ones(3, np.float32)})
    np.testing.assert_array_equal(lazy["w"].load(), np.zeros(1000))


def test_a_tensor_that_is_too_large_for_the_file_is_refused(tmp_path):
    jc.save(tmp_path / "x", small_tree())

    def longer(header, ours, data):
        header["zeros"]["shape"] = [40, 40_000_000]
        header["zeros"]["data_offsets"][1] += 4 * 40 * 39_999_960
        return data

    resealed(tmp_path / "x", tmp_path / "y", longer)
    assert "not a whole safetensors file" in told(tmp_path / "y")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda h, o: o.update(version=3), "version 3 .* update jaxcompress"),
        (lambda h, o: o.update(version=1), "version 1 .* save it anew"),
        (lambda h, o: o.update(version="2"), "version '2'"),
        (lambda h, o: o.pop("crc32"), "one checksum for each tensor"),
        (lambda h, o: o["crc32"].pop(), "one checksum for each tensor"),
        (lambda h, o: o["crc32"].reverse(), "checksum does not match"),
        (lambda h, o: o.update(tree=7), "an unknown kind of node"),
        (lambda h, o: node_of(o, "bias").update(array="nothing"), "'nothing' that is not there"),
        (lambda h, o: node_of(o, "zeros")["coded"].update({"as": "magic"}), "in an unknown way"),
    ],
    ids=["newer", "older", "text", "no-sums", "few-sums", "other-sums", "tree", "name", "coding"],
)
def test_damage_under_a_right_checksum_is_told(tmp_path, change, text):
    jc.save(tmp_path / "x", small_tree(), coded=True)

    def changed(header, ours, data):
        change(header, ours)
        return data

    resealed(tmp_path / "x", tmp_path / "y", changed)
    with pytest.raises(jc.FileError, match=text):
        jc.load(tmp_path / "y")


def test_a_node_that_says_more_or_says_two_things_is_refused(tmp_path):
    jc.save(tmp_path / "x", small_tree(), coded=True)

    def more(header, ours, data):
        node_of(ours, "zeros")["x"] = 1
        return data

    def other(header, ours, data):
        ours["tree"]["dict"].append(["twin", {**node_of(ours, "zeros"), "shape": [1600]}])
        return data

    for change, text in ((more, "what is not known"), (other, "two things of tensor 'zeros'")):
        resealed(tmp_path / "x", tmp_path / "y", change)
        assert text in told(tmp_path / "y")


def test_many_rows_of_gaps_in_few_bytes_take_no_time(tmp_path):
    """A mask of eight million rows of one weight, all of them empty, in half a kilobyte."""
    n = 8_000_000
    data = b"\x01" + bytes(4 * -(-n // 8 >> 18))
    how = {"as": "columns", "width": 1, "size": 1, "bits": 2, "entries": 1}
    out = decode_array(how, data, (n, 1), np.dtype(np.uint8))
    assert (out == 3).all()


def test_another_tool_that_wrote_the_header_anew_is_told(small, tmp_path):
    whole = small.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    metadata = header.pop("__metadata__")
    text = json.dumps({**header, "__metadata__": metadata}).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])
    assert "no checksum; it was written anew by another tool" in told(tmp_path / "x")


def test_a_key_that_comes_twice_is_refused(tmp_path):
    jc.save(tmp_path / "x", {"a": np.ones(3)})
    whole = (tmp_path / "x").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    text = whole[8 : 8 + length].rstrip()
    twice = text[:-1] + b"," + text[text.index(b'"a":') :]
    zeroed = twice[:40] + b"00000000" + twice[48:]
    twice = twice[:40] + b"%08x" % zlib.crc32(zeroed) + twice[48:]
    (tmp_path / "y").write_bytes(struct.pack("<Q", len(twice)) + twice + whole[8 + length :])
    assert "comes twice" in told(tmp_path / "y") or "not a whole" in told(tmp_path / "y")


def test_deep_nesting_is_refused(tmp_path):
    for text in (b"[" * 100_000, b'{"a":' * 100_000):
        (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text)
        told(tmp_path / "x")


WRITE = """
import resource, signal, sys, numpy as np, jaxcompress as jc
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
w = np.random.default_rng(0).standard_normal((300, 300)).astype(np.float32)
try:
    jc.save(sys.argv[1], {"new": w, "zeros": np.zeros((600, 600), np.int8)}, coded=sys.argv[3] == "1")
except OSError as error:
    sys.exit(17)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on file sizes")
@pytest.mark.parametrize("coded", ["0", "1"])
def test_a_disk_that_is_full_leaves_the_old_file(tmp_path, coded):
    path = tmp_path / "x"
    jc.save(path, {"old": jnp.ones(2)})
    before = path.read_bytes()
    for limit in (100, 100_000, 250_000):
        run = subprocess.run([sys.executable, "-c", WRITE, path, str(limit), coded])
        assert run.returncode == 17
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["x"]


def _write_often(path, value, times):
    for _ in range(times):
        jc.save(path, {"w": np.full((100, 100), value, np.float32)}, coded=value % 2 == 0)


def test_two_writers_to_one_path_never_mix(tmp_path):
    path = tmp_path / "x"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_often, args=(path, v, 60)) for v in (2, 3)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            w = np.asarray(jc.load(path)["w"])
            assert np.unique(w).size == 1
            seen.add(float(w[0, 0]))
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert seen <= {2.0, 3.0}
    assert seen
    assert os.listdir(tmp_path) == ["x"]


def test_a_pickle_and_an_archive_are_refused_in_words(tmp_path):
    import pickle

    (tmp_path / "a.safetensors").write_bytes(pickle.dumps({"w": [1.0] * 1000}))
    assert "a pickle, which could run code and is not opened" in told(tmp_path / "a.safetensors")
    np.savez(tmp_path / "b.npz", w=np.ones(3))
    assert "a zip archive" in told(tmp_path / "b.npz")


def test_a_header_that_begins_like_a_pickle_is_none(tmp_path):
    """The length 0x0480 of a header has the first bytes of a pickle."""
    text = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    text += b" " * (0x0480 - len(text))
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    assert safetensors.numpy.load_file(tmp_path / "x.safetensors")["w"].shape == (1,)
    assert jc.open_params(tmp_path / "x.safetensors")["w"].shape == (1,)
