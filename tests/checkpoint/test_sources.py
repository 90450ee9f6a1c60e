"""Weights that other tools wrote: their own writers make the files that are opened here."""

import json
import pickle
import warnings
import weakref
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn
from flax import serialization
from flax.traverse_util import flatten_dict

import jaxcompress as jc
from jaxcompress.checkpoint import file

PARAMS = {
    "encoder": {
        "dense": {"kernel": np.arange(24, dtype=np.float32).reshape(4, 6), "bias": np.ones(6)},
        "ids": np.arange(3, dtype=np.int64),
    },
    "half": jnp.linspace(-1, 1, 8).astype(jnp.bfloat16),
}


def same(tree, expected):
    ours = flatten_dict(jc.decompress(tree), sep="/")
    theirs = flatten_dict(expected, sep="/")
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert np.asarray(ours[name]).dtype == np.asarray(value).dtype, name
        np.testing.assert_array_equal(np.asarray(ours[name]), np.asarray(value), name)


def flat(sep, params=PARAMS):
    return {k: np.asarray(v) for k, v in flatten_dict(params, sep=sep).items()}


@pytest.mark.parametrize("sep", [".", "/"])
def test_safetensors_files(tmp_path, sep):
    safetensors.numpy.save_file(flat(sep), tmp_path / "model.safetensors")
    tree = jc.open_params(tmp_path / "model.safetensors")
    assert all(isinstance(leaf, jc.LazyArray) for leaf in jax.tree.leaves(tree))
    same(tree, PARAMS)
    same(jc.open_params(tmp_path), PARAMS)


def test_eight_bit_floats_of_other_tools(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    values = torch.arange(-4, 4, dtype=torch.float32)
    saved = {"a": values.to(torch.float8_e4m3fn), "b": values.to(torch.float8_e5m2)}
    save_file({**saved, "c": values.to(torch.bfloat16)}, tmp_path / "x.safetensors")
    tree = jc.open_params(tmp_path / "x.safetensors")
    dtypes = [tree[name].load().dtype.name for name in "abc"]
    assert dtypes == ["float8_e4m3fn", "float8_e5m2", "bfloat16"]
    for name in "abc":
        np.testing.assert_array_equal(tree[name].load().astype(jnp.float32), values.numpy())


def test_names_that_are_no_tree_stay_as_they_are(tmp_path):
    for names in (("a", "a.b"), ("a.b", "a.b.c", "a.d")):
        arrays = {name: np.full(2, i, np.float32) for i, name in enumerate(names)}
        safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors")
        tree = jc.open_params(tmp_path / "x.safetensors")
        assert set(tree) == set(names)
        assert all(float(tree[name].load()[0]) == i for i, name in enumerate(names))


def sharded(folder, weight_map=None):
    folder.mkdir(exist_ok=True)
    tensors = flat(".")
    names = list(tensors)
    shards = {"model-1-of-2.safetensors": names[:2], "model-2-of-2.safetensors": names[2:]}
    for shard, some in shards.items():
        safetensors.numpy.save_file({n: tensors[n] for n in some}, folder / shard)
    weight_map = weight_map or {n: shard for shard, some in shards.items() for n in some}
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def test_hugging_face_folders(tmp_path):
    folder = sharded(tmp_path / "model")
    same(jc.open_params(folder), PARAMS)
    same(jc.open_params(folder / "model.safetensors.index.json"), PARAMS)


@pytest.mark.parametrize(
    "shard",
    ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a\\b", "", 3, "a\0b"],
)
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, shard):
    safetensors.numpy.save_file(flat("."), tmp_path / "outside.safetensors")
    folder = sharded(tmp_path / "model", {"encoder.ids": shard})
    with pytest.raises(jc.FileError, match="no file beside the index"):
        jc.open_params(folder)


def test_an_index_that_does_not_fit_its_files(tmp_path):
    folder = sharded(tmp_path / "a", {"encoder.ids": "model-3-of-2.safetensors"})
    with pytest.raises(jc.FileError, match=r"'model-3-of-2\.safetensors' that it names is missing"):
        jc.open_params(folder)
    folder = sharded(tmp_path / "b", {"nothing": "model-1-of-2.safetensors"})
    with pytest.raises(jc.FileError, match="does not hold 'nothing'"):
        jc.open_params(folder)
    index = folder / "model.safetensors.index.json"
    for text, message in (
        ('{"weight_map": {"a": "x", "a": "y"}}', "'a' comes twice"),
        ('{"weight_map": 3}', "no 'weight_map'"), ("[1]", "a JSON object"), ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
    ):  # fmt: skip
        index.write_text(text)
        with pytest.raises(jc.FileError, match=message):
            jc.open_params(folder)


def test_several_models_in_one_folder_are_not_guessed_at(tmp_path):
    for name in ("a", "b"):
        safetensors.numpy.save_file({"w": np.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(jc.FileError, match=r"several models \(a\.safetensors, b\.safetensors\)"):
        jc.open_params(tmp_path)


def test_flax_msgpack_files(tmp_path):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.relu(nn.Dense(5)(x)))

    params = Net().init(jax.random.key(0), jnp.ones((1, 4)))
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.to_bytes(params))
    same(jc.open_params(tmp_path / "flax_model.msgpack"), params)
    same(jc.open_params(tmp_path), params)
    whole = serialization.to_bytes(PARAMS)
    (tmp_path / "x.msgpack").write_bytes(whole)
    same(jc.open_params(tmp_path / "x.msgpack"), PARAMS)
    for bad in (whole[:-1], whole[: len(whole) // 2], b"", b"\xc1", whole + b"\0", b"\x93\1\2\3"):
        (tmp_path / "x.msgpack").write_bytes(bad)
        with pytest.raises(jc.FileError, match="msgpack"):
            jc.open_params(tmp_path / "x.msgpack")


def test_orbax_folders(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    tree = {**PARAMS, "layers": [np.ones((2, 2), np.float32), np.zeros(3, np.float32)]}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step" / "default", tree)
    found = jc.open_params(tmp_path / "step" / "default")
    leaves = dict(jc.rules.flatten(found)[0])
    assert all(isinstance(leaf, jc.LazyArray) for leaf in leaves.values())
    assert set(leaves) == {path for path, _ in jc.rules.flatten(tree)[0]}
    for path, value in jc.rules.flatten(tree)[0]:
        np.testing.assert_array_equal(np.asarray(leaves[path].load()), np.asarray(value), path)
    with pytest.raises(jc.FileError, match=r"name one of its folders, such as .*step/default"):
        jc.open_params(tmp_path / "step")


def test_npz_files(tmp_path):
    params = {"a": {"b": np.arange(6.0).reshape(2, 3), "n": np.int32(3)}, "f": np.ones((3, 2)).T}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **flat("/", params))
        same(jc.open_params(tmp_path / "x.npz"), params)


def test_npz_files_with_pickles_or_bfloat16_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", objects=np.array([{}], object))
    with pytest.raises(jc.FileError, match="pickled objects, which could run code"):
        jc.open_params(tmp_path / "a.npz")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.savez(tmp_path / "b.npz", half=np.asarray(PARAMS["half"]))
    with pytest.raises(jc.FileError, match="cast to float32 before"):
        jc.open_params(tmp_path / "b.npz")


def test_a_torch_checkpoint_is_refused(tmp_path):
    """Torch keeps a pickle in a zip archive, whatever the name of the file."""
    for name in ("pytorch_model.bin", "model.npz", "x.safetensors"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"w": 1}))
        with pytest.raises(jc.FileError, match="which could run code and is not opened"):
            jc.open_params(tmp_path / name)
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(jc.FileError, match="a pickle, which could run code"):
        jc.open_params(tmp_path / "old.pt")


def test_any_byte_of_an_npz_that_is_changed_is_told_or_harmless(tmp_path):
    """Zip has a checksum of each array, none of what is around it."""
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", w=np.arange(40.0))
        whole = (tmp_path / "x.npz").read_bytes()
        for place in range(len(whole)):
            flipped = bytearray(whole)
            flipped[place] ^= 0x55
            (tmp_path / "x.npz").write_bytes(flipped)
            try:
                jc.decompress(jc.open_params(tmp_path / "x.npz"))
            except jc.FileError:
                continue


def test_an_index_of_our_own_files_is_refused(tmp_path):
    folder = sharded(tmp_path / "model")
    jc.save(folder / "model-1-of-2.safetensors", flat("."), coded=True)
    with pytest.raises(jc.FileError, match="is a file of jaxcompress; open it by itself"):
        jc.open_params(folder)


@pytest.mark.parametrize("cut", [10, 100, -30, -1])
def test_npz_files_that_were_cut(tmp_path, cut):
    np.savez(tmp_path / "x.npz", w=np.ones(100))
    whole = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(whole[:cut])
    with pytest.raises(jc.FileError):
        jc.open_params(tmp_path / "x.npz")


def test_an_npz_whose_array_is_longer_than_it_says(tmp_path):
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000,), }"
    header += b" " * (118 - len(header)) + b"\n"
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
        archive.writestr("w.npy", data + bytes(80))
    with pytest.raises(jc.FileError, match="not as long as its header says"):
        jc.open_params(tmp_path / "x.npz")


def test_what_is_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError):
        jc.open_params(tmp_path / "none")
    with pytest.raises(jc.FileError, match="no weights that are known"):
        jc.open_params(tmp_path)
    (tmp_path / "notes.txt").write_text("hello, these are notes and no weights")
    with pytest.raises(jc.FileError, match="not a whole safetensors file"):
        jc.open_params(tmp_path / "notes.txt")


def test_our_own_files_open_as_well(tmp_path):
    small = jc.compress(PARAMS, {"**/kernel": jc.Quantize("int4")})
    jc.save(tmp_path / "x.safetensors", small, coded=True)
    tree = jc.open_params(tmp_path / "x.safetensors")
    assert isinstance(tree["encoder"]["dense"]["kernel"].load(), jc.QuantizedArray)


def test_a_model_goes_through_leaf_by_leaf(tmp_path, monkeypatch):
    """From file to file, no two leaves are held: the peak of a model is that of its leaves."""
    arrays = {f"layer.{i}.weight": np.full((64, 64), i, np.float32) for i in range(6)}
    safetensors.numpy.save_file(arrays, tmp_path / "in.safetensors")
    alive, most = set(), [0]
    put = file._Writer.put

    def watched(self, name, array, layout, held):
        assert not held
        alive.add(name)
        weakref.finalize(array, alive.discard, name)
        most[0] = max(most[0], len(alive))
        return put(self, name, array, layout, held)

    monkeypatch.setattr(file._Writer, "put", watched)
    lazy = jc.compress(
        jc.open_params(tmp_path / "in.safetensors"), {"**": jc.Quantize("int8")}, lazy=True
    )
    jc.save(tmp_path / "out.safetensors", lazy, coded=True)
    assert most[0] <= 4  # codes and scale of a leaf, and of the one before it
    small = jc.load(tmp_path / "out.safetensors")
    for name, array in arrays.items():
        layer, i, weight = name.split(".")
        # The greatest weight is half a step off at most, a step being a 127th of it.
        np.testing.assert_allclose(np.asarray(small[layer][i][weight]), array, rtol=1 / 254)
