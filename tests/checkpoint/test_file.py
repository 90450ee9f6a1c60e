"""Files: what is written comes back, whatever is damaged is told, and nothing is lost."""

import collections
import copy
import json
import os
import struct
import weakref
import zlib
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from flax.core import FrozenDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress.checkpoint import container

W = jax.random.normal(jax.random.key(0), (3, 16, 12))
FORMS = {
    "int8": jc.Quantize("int8"),
    "int3": jc.Quantize("int3", group_size=5),
    "uint4_affine": jc.Quantize("uint4", symmetric=False, group_size=8),
    "bitmask": jc.Prune(0.5),
    "gaps": jc.Prune(0.98),
    "low_rank": jc.LowRank(4),
    "codebook": jc.Codebook(3),
    "sparse_int4": jc.chain(jc.Prune(0.5), jc.Quantize("int4")),
    "sparse_codebook_int8": jc.chain(jc.Prune(0.5), jc.Codebook(2), jc.Quantize("int8")),
    "low_rank_sparse": jc.chain(jc.LowRank(4), jc.Prune(0.5)),
}


def tree():
    return {
        **{name: spec(W) for name, spec in FORMS.items()},
        "dense": {"bfloat16": W.astype(jnp.bfloat16), "bias": jnp.arange(5.0)},
    }


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).dtype == np.asarray(y).dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "small.safetensors"
    jc.save(path, tree(), metadata={"model": "a test", "é": "ü"})
    return path


def test_a_tree_comes_back_leaf_by_leaf(saved):
    same(jc.load(saved), tree())
    assert jc.read_metadata(saved) == {"model": "a test", "é": "ü"}


def test_the_file_takes_what_the_leaves_take(saved):
    size = os.path.getsize(saved)
    (head,) = struct.unpack("<Q", saved.read_bytes()[:8])
    assert size == 8 + head + jc.nbytes(tree())


def test_any_safetensors_reader_sees_the_arrays(saved):
    tensors = safetensors.numpy.load_file(saved)
    np.testing.assert_array_equal(tensors["dense/bias"], np.arange(5.0))
    words = tensors["int3.codes.words"]
    assert words.dtype == np.uint8
    np.testing.assert_array_equal(words, tree()["int3"].codes.words)


def test_equal_trees_give_equal_bytes(saved, tmp_path):
    shuffled = dict(reversed(tree().items()))
    jc.save(tmp_path / "again", shuffled, metadata={"é": "ü", "model": "a test"})
    assert (tmp_path / "again").read_bytes() == saved.read_bytes()


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6, dtype=np.int64).reshape(2, 3),
        np.array([1.0, 2.0**60], np.float64),
        np.array([True, False]),
        np.array(3 + 4j, np.complex64),
        np.array(["7"], "S1").view(np.uint8),
        np.zeros((0, 4), np.float32),
        np.float32(2.5),
        np.float64(2.5),
        np.int64(2**40),
        np.bool_(True),
        np.arange(4).astype(ml_dtypes.float8_e4m3fn),
        np.arange(-2, 2).astype(ml_dtypes.int4),
        np.arange(4).astype(ml_dtypes.float6_e2m3fn),  # which jax has not on every backend
        np.arange(12.0)[::3],
        np.arange(4, dtype=">f4"),
    ],
    ids=lambda v: f"{v.dtype}{list(v.shape)}",
)
def test_arrays_of_every_dtype(value, tmp_path):
    jc.save(tmp_path / "x", {"x": value})
    back = jc.load(tmp_path / "x")["x"]
    assert back.dtype == np.asarray(value).dtype.newbyteorder("=")
    np.testing.assert_array_equal(np.asarray(back), value)


def test_plain_values_and_containers(tmp_path):
    mixed = {"n": 3, "on": True, "rate": 0.1, "name": "é", "none": None, "empty": {}, 7: (1, [2.0]),
             "big": 10**30, "nan": float("inf")}  # fmt: skip
    jc.save(tmp_path / "x", mixed)
    assert jc.load(tmp_path / "x") == mixed
    jc.save(tmp_path / "bare", W)
    np.testing.assert_array_equal(jc.load(tmp_path / "bare"), W)


class Pair(NamedTuple):
    left: object
    right: object


def test_other_containers_come_back_by_like(tmp_path):
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    _, state = nnx.split(model)
    boxed = nn.Partitioned(jnp.ones(3), ("x",))
    named = {"nnx": state, "box": boxed, "frozen": FrozenDict({"a": jnp.ones(2)}),
             "pair": Pair(jnp.zeros(1), FORMS["int8"](W))}  # fmt: skip
    jc.save(tmp_path / "x", named)
    plain = jc.load(tmp_path / "x")
    assert isinstance(plain["nnx"], dict)
    assert isinstance(plain["pair"]["right"], jc.QuantizedArray)
    back = jc.load(tmp_path / "x", like=named)
    same(back, named)
    assert isinstance(back["pair"], Pair)
    with pytest.raises(jc.FileError, match=r"missing \['other'\]"):
        jc.load(tmp_path / "x", like={**named, "other": 1.0})
    with pytest.raises(jc.FileError, match=r"extra \['box'\]"):
        jc.load(tmp_path / "x", like={k: v for k, v in named.items() if k != "box"})


def test_keys_that_read_alike_do_not_collide(tmp_path):
    odd = {"n": {1: jnp.ones(1)}, "n/1": jnp.zeros(2), "a": {"b": jnp.ones(3)}, "a/b": jnp.ones(4),
           "../../etc": jnp.ones(5), "__metadata__": jnp.ones(6), "": jnp.ones(7)}  # fmt: skip
    jc.save(tmp_path / "x", odd)
    same(jc.load(tmp_path / "x"), odd)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_lazy_leaves_are_read_one_at_a_time(saved, monkeypatch):
    lazy = jc.load(saved, lazy=True)
    eager = tree()
    for path in FORMS:
        assert isinstance(lazy[path], jc.LazyArray)
        assert (lazy[path].shape, lazy[path].dtype) == (W.shape, W.dtype)
        assert lazy[path].nbytes == eager[path].nbytes
    assert jc.nbytes(lazy) == jc.nbytes(eager)
    same(lazy["sparse_int4"].load(), eager["sparse_int4"])
    np.testing.assert_array_equal(jnp.asarray(lazy["int8"]), eager["int8"].materialize())
    np.testing.assert_array_equal(np.asarray(lazy["dense"]["bias"]), np.arange(5.0))
    np.testing.assert_array_equal(jc.decompress(lazy)["low_rank"], eager["low_rank"].materialize())
    read = []
    load = jc.LazyArray.load
    monkeypatch.setattr(jc.LazyArray, "load", lambda self: read.append(self.shape) or load(self))
    jc.load(saved, lazy=True)
    assert read == []
    small = jc.compress(lazy, {"dense/bias": None, "dense/bfloat16": jc.Quantize("int4")})
    assert len(read) == len(FORMS) + 2
    assert isinstance(small["dense"]["bfloat16"], jc.QuantizedArray)
    same(small["gaps"], eager["gaps"])


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("lazy", [False, True])
def test_leaves_at_several_places_are_stored_once_and_are_one_again(tmp_path, coded, lazy):
    kernel, dense = FORMS["sparse_int4"](W), jnp.ones((50, 50))
    table = jnp.arange(8.0)
    codes = jc.PackedArray.pack(jnp.arange(400).reshape(20, 20) % 8, 3)
    tied = {
        "a": kernel, "b": {"a": kernel, "dense": dense}, "c": [dense, dense],
        "books": [jc.CodebookArray(codes, table, -1), jc.CodebookArray(codes, table, -1)],
    }  # fmt: skip
    jc.save(tmp_path / "tied", tied, coded=coded)
    alone = {"a": kernel, "dense": dense, "books": tied["books"][0]}
    jc.save(tmp_path / "alone", alone, coded=coded)
    sizes = [sum(r["bytes"] for r in jc.contents(tmp_path / x).rows) for x in ("tied", "alone")]
    assert sizes[0] == sizes[1]
    back = jc.load(tmp_path / "tied", lazy=lazy)
    assert back["a"] is back["b"]["a"]
    assert back["c"][0] is back["c"][1] is back["b"]["dense"]
    assert back["books"][0] is back["books"][1]  # of the same parts, and so the same
    jc.save(tmp_path / "again", back, coded=coded)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "tied").read_bytes()
    same(jc.load(tmp_path / "again"), tied)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"a": {"f": print}}, "a/f: a builtin_function_or_method cannot be saved"),
        ({"a": jax.random.key(0)}, "a: a random key cannot be saved"),
        ({(1, 2): 1.0}, r"key \(1, 2\)"),
        ({"a": np.array([object()])}, "a: arrays of dtype object"),
        ({"a": np.array(["text"])}, "a: arrays of dtype <U4"),
        ({"a": np.zeros(3, "V1")}, "a: arrays of dtype"),
        ({"a": np.zeros(3, [("x", "u1")])}, "a: arrays of dtype"),
        ({"a": 10**5000}, "cannot be written as JSON"),
        (
            {"a": jc.CodebookArray(jnp.zeros((2, 2), jnp.uint8), 2.0, -1)},
            "a.centroids is 2.0; a child",
        ),
    ],
)
def test_what_cannot_be_saved_is_told_and_leaves_the_old_file(bad, text, tmp_path):
    jc.save(tmp_path / "x", {"old": jnp.ones(2)})
    with pytest.raises(jc.FileError, match=text):
        jc.save(tmp_path / "x", {"ok": jnp.ones(3), **bad})
    same(jc.load(tmp_path / "x"), {"old": jnp.ones(2)})
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_what_is_nested_too_deeply_is_told(tmp_path):
    tree = jnp.ones(3)
    for _ in range(2000):
        tree = [tree]
    with pytest.raises(jc.FileError, match="nested too deeply"):
        jc.save(tmp_path / "x", tree)
    assert not list(tmp_path.iterdir())


def test_a_header_that_readers_would_refuse_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(container, "_MOST", 1000)
    with pytest.raises(jc.FileError, match="readers take 1000"):
        jc.save(tmp_path / "x", {f"a{i}": jnp.ones(1) for i in range(50)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("order", ["given", "reversed", "tied"])
def test_reading_ahead_holds_two_leaves_whatever_the_order(tmp_path, order):
    jc.save(tmp_path / "x", {f"l{i:02}": np.full(500, i, np.float32) for i in range(30)})
    lazy = jc.load(tmp_path / "x", lazy=True)
    if order == "reversed":
        lazy = collections.OrderedDict(reversed(lazy.items()))
    if order == "tied":
        lazy = {"a": lazy["l29"], **lazy, "z": lazy["l00"]}
    loads, alive, most = [], set(), [0]
    load = jc.LazyArray.load

    def counted(self):
        array = np.array(load(self))
        key = len(loads)
        loads.append(key)
        alive.add(key)
        weakref.finalize(array, alive.discard, key)
        most[0] = max(most[0], len(alive))
        return array

    for leaf in set(lazy.values()):
        leaf.load = counted.__get__(leaf)
    jc.save(tmp_path / "y", lazy)
    assert len(loads) == 30
    assert most[0] <= 4  # one is written, one is coded, one was read ahead, and one comes
    same(jc.load(tmp_path / "y")["l29"], np.full(500, 29, np.float32))


def test_metadata_are_strings_and_not_ours(tmp_path):
    with pytest.raises(jc.FileError, match="metadata"):
        jc.save(tmp_path / "x", {}, metadata={"epochs": 3})
    with pytest.raises(jc.FileError, match="jaxcompress"):
        jc.save(tmp_path / "x", {}, metadata={"jaxcompress": "mine"})
    assert not list(tmp_path.iterdir())


def test_half_a_surrogate_pair_is_refused(tmp_path):
    for tree, metadata in (({"\udc80": 1}, {}), ({"a": "\udc80"}, {}), ({}, {"a": "\udc80"})):
        with pytest.raises(jc.FileError, match="no valid text"):
            jc.save(tmp_path / "x", tree, metadata=metadata)
    assert not list(tmp_path.iterdir())


def test_specs_of_numpy_numbers_make_leaves_that_can_be_saved(tmp_path):
    tree = {
        "a": jc.Quantize("int4", group_size=np.int64(4), axis=np.int64(-2))(W),
        "b": jc.Codebook(np.int32(3), iterations=np.int64(2))(W),
        "c": jc.LowRank(np.int64(2))(W),
        "d": jc.Prune(np.float32(0.5))(W),
    }
    jc.save(tmp_path / "x", tree)
    same(jc.load(tmp_path / "x"), tree)


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    from jaxcompress.checkpoint import file

    jc.save(tmp_path / "x", {"old": jnp.ones(2)})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        jc.save(tmp_path / "x", {"new": jnp.ones(3)})
    monkeypatch.undo()
    same(jc.load(tmp_path / "x"), {"old": jnp.ones(2)})
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    with pytest.raises(FileNotFoundError):
        jc.save(tmp_path / "missing" / "x", {"new": jnp.ones(3)})


def test_a_new_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    jc.save(tmp_path / "x", {"a": jnp.ones(2)})
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_files_that_are_not_ours(tmp_path):
    with pytest.raises(FileNotFoundError):
        jc.load(tmp_path / "none")
    with pytest.raises(jc.FileError, match="is a folder"):
        jc.load(tmp_path)
    safetensors.numpy.save_file({"a": np.ones(3)}, tmp_path / "plain")
    with pytest.raises(jc.FileError, match=r"jc\.open_params"):
        jc.load(tmp_path / "plain")
    (tmp_path / "pickle").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(jc.FileError, match="a pickle, which could run code and is not opened"):
        jc.load(tmp_path / "pickle")


@pytest.mark.parametrize("lazy", [False, True])
def test_a_truncated_file_is_told(saved, tmp_path, lazy):
    whole = saved.read_bytes()
    (head,) = struct.unpack("<Q", whole[:8])
    for n in (0, 1, 7, 8, 9, 8 + head // 2, 8 + head, 9 + head, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:n])
        with pytest.raises(jc.FileError, match="not a whole safetensors file"):
            jc.load(tmp_path / "cut", lazy=lazy)


def rewritten(source, target, change):
    """The file with its description changed, and the checksum of its header made anew."""
    whole = source.read_bytes()
    (head,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + head])
    ours = json.loads(header["__metadata__"]["jaxcompress"])
    header["__metadata__"]["jaxcompress"] = json.dumps(change(ours))
    header["__metadata__"]["jaxcompress.checksum"] = "0" * 8
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.replace(b'"00000000"', b'"%08x"' % zlib.crc32(text), 1)
    target.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + head :])


def test_a_newer_version_and_an_unknown_form(saved, tmp_path):
    rewritten(saved, tmp_path / "new", lambda h: {**h, "version": 99})
    with pytest.raises(jc.FileError, match=r"version 99 .* update jaxcompress"):
        jc.load(tmp_path / "new")

    def foreign(header):
        text = json.dumps(header).replace('"form": "codebook"', '"form": "them.wavelet"')
        return json.loads(text)

    rewritten(saved, tmp_path / "foreign", foreign)
    with pytest.raises(jc.FileError, match=r"'them\.wavelet', which is not registered"):
        jc.load(tmp_path / "foreign")
    # Lazily, all other leaves can still be read.
    lazy = jc.load(tmp_path / "foreign", lazy=True)
    same(lazy["int8"].load(), tree()["int8"])
    with pytest.raises(jc.FileError, match="not registered"):
        lazy["codebook"].load()


@pytest.mark.parametrize("name", ["i4,(", "f4,f4", "2float32", "float32,", "O", "f4", "object", ""])
def test_a_dtype_is_a_name_and_nothing_more(tmp_path, name):
    jc.save(tmp_path / "x", {"w": np.ones(4).astype(ml_dtypes.float8_e4m3fn)})

    def change(header):
        return json.loads(json.dumps(header).replace("float8_e4m3fn", name))

    rewritten(tmp_path / "x", tmp_path / "y", change)
    with pytest.raises(jc.FileError, match="unknown dtype"):
        jc.load(tmp_path / "y")


def test_a_damaged_leaf_is_named(saved, tmp_path):
    def change(header):
        (node,) = (child for name, child in header["tree"]["dict"] if name == "int8")
        node["children"]["scale"] = {"value": 3}
        return header

    rewritten(saved, tmp_path / "damaged", change)
    with pytest.raises(jc.FileError, match=r"damaged: int8, a 'quantized' leaf.*its scale is 3"):
        jc.load(tmp_path / "damaged")


def places(node, path=()):
    """Every place in a JSON value."""
    yield path
    if isinstance(node, (dict, list)):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from places(child, (*path, key))


def leaves_of(tree):
    """The leaves of dicts and lists, whose keys may be of two types, which jax cannot sort."""
    if not isinstance(tree, (dict, list, tuple)):
        return [tree]
    children = tree.values() if isinstance(tree, dict) else tree
    return [leaf for child in children for leaf in leaves_of(child)]


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 2**40), st.floats(), st.text(max_size=3),
    st.sampled_from(["float32", "../x", "int8", "low_rank", "bias", "dense/bias"]),
    st.lists(st.integers(-1, 3), max_size=3), st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
)  # fmt: skip


@settings(
    max_examples=120, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(st.data())
def test_a_damaged_description_is_told_or_harmless(saved, tmp_path, data):
    """Whatever one place of the header is changed to, `load` says so or gives sound leaves."""

    def change(header):
        header = copy.deepcopy(header)
        place = data.draw(st.sampled_from(list(places(header["tree"]))[1:]))
        node = header["tree"]
        for key in place[:-1]:
            node = node[key]
        if data.draw(st.booleans()):
            node[place[-1]] = data.draw(JUNK)
        else:
            del node[place[-1]]
        return header

    rewritten(saved, tmp_path / "damaged", change)
    try:
        loaded = jc.load(tmp_path / "damaged")
    except jc.FileError:
        return
    for leaf in leaves_of(loaded):
        if jc.is_compressed(leaf):
            dense = leaf.materialize()
            assert (dense.shape, dense.dtype) == (leaf.shape, leaf.dtype)
