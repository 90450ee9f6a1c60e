"""The command line, on files that other tools wrote and read."""

import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import serialization

import jaxcompress as jc
from jaxcompress.cli import main

W = np.asarray(jax.random.normal(jax.random.key(0), (64, 96)))
TENSORS = {
    "encoder.layer.0.dense.weight": W,
    "encoder.layer.0.dense.bias": np.ones(64, np.float32),
    "encoder.LayerNorm.weight": np.ones(96, np.float32),
    "embeddings.weight": np.tile(W, (2, 1)),
    "position_ids": np.arange(64, dtype=np.int64)[None],
}


@pytest.fixture
def source(tmp_path):
    safetensors.numpy.save_file(TENSORS, tmp_path / "model.safetensors")
    return str(tmp_path / "model.safetensors")


def run(capsys, *args, code=0):
    assert main([str(a) for a in args]) == code
    out = capsys.readouterr()
    if code == 0:
        assert out.err == ""
    return out.out if code == 0 else out


def test_a_file_goes_there_and_back(capsys, source, tmp_path):
    small, back = tmp_path / "small.safetensors", tmp_path / "back.safetensors"
    told = run(capsys, "compress", source, small, "--recipe", "int8")
    assert "x smaller" in told
    tree = jc.load(small)
    kernel = tree["encoder"]["layer"]["0"]["dense"]["weight"]
    # PyTorch's weights have their outputs first: one scale for each row.
    assert isinstance(kernel, jc.QuantizedArray)
    assert kernel.scale.shape == (64, 1)
    run(capsys, "decompress", small, back)
    tensors = safetensors.numpy.load_file(back)
    assert set(tensors) == set(TENSORS)
    for name, array in TENSORS.items():
        assert tensors[name].dtype == array.dtype
        # Half a step of a 127th of the greatest weight in the row, and a bfloat16 scale.
        step = np.abs(array).max(axis=-1, keepdims=True) / 127 * (0.5 + 127 / 256)
        assert (np.abs(tensors[name] - array) <= step).all()


def test_lossless_gives_every_bit_back(capsys, source, tmp_path):
    small, back = tmp_path / "small.safetensors", tmp_path / "back.safetensors"
    run(capsys, "compress", source, small, "-r", "lossless", "-q")
    run(capsys, "decompress", small, back, "-q")
    tensors = safetensors.numpy.load_file(back)
    for name, array in TENSORS.items():
        assert tensors[name].tobytes() == array.tobytes()
    assert os.path.getsize(small) < os.path.getsize(source)


def test_what_the_command_writes_is_what_the_library_writes(capsys, source, tmp_path):
    run(capsys, "compress", source, tmp_path / "a", "-r", "int4-g64")
    recipe = jc.Recipe.preset("int4-g64")
    small = jc.compress(jc.open_params(source), recipe)
    jc.save(tmp_path / "b", small, {"separator": "."}, coded=True, recipe=recipe)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("suffix", [".npz", ".msgpack"])
def test_other_formats_come_out(capsys, source, tmp_path, suffix):
    run(capsys, "compress", source, tmp_path / "small", "-r", "lossless")
    out = tmp_path / f"back{suffix}"
    run(capsys, "decompress", tmp_path / "small", out)
    if suffix == ".npz":
        with np.load(out) as found:
            tensors = dict(found)
    else:
        tree = serialization.msgpack_restore(out.read_bytes())
        tensors = {".".join(p.split("/")): x for p, x in jc.rules.flatten(tree)[0]}
    assert set(tensors) == set(TENSORS)
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(tensors[name], array)
    run(capsys, "compress", out, tmp_path / "again", "-r", "int8")


def test_decompressing_casts(capsys, source, tmp_path):
    run(capsys, "compress", source, tmp_path / "small", "-r", "int8")
    run(capsys, "decompress", tmp_path / "small", tmp_path / "x.safetensors", "--dtype", "bfloat16")
    tensors = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert tensors["embeddings.weight"].dtype == jnp.bfloat16
    assert tensors["position_ids"].dtype == np.int64
    out = run(capsys, "decompress", tmp_path / "x.safetensors", tmp_path / "x.npz", code=1)
    assert "npz does not keep" in out.err
    assert not (tmp_path / "x.npz").exists()


def test_inspect(capsys, source, tmp_path):
    small, png = tmp_path / "small.safetensors", tmp_path / "x.png"
    run(capsys, "compress", source, small, "-r", "int4-g32")
    text = run(capsys, "inspect", small, "--png", png)
    assert "encoder/layer/0/dense/weight" in text
    assert "recipe int4-g32" in " ".join(text.split())  # a long path wraps the title
    assert png.stat().st_size > 1000
    assert "embeddings" in run(capsys, "inspect", small, "--tree")
    found = json.loads(run(capsys, "inspect", small, "--json"))
    assert found["total"] == small.stat().st_size
    assert {row["path"] for row in found["rows"]} == {n.replace(".", "/") for n in TENSORS}
    dense = json.loads(run(capsys, "inspect", source, "--json"))
    assert [row["form"] for row in dense["rows"]] == ["dense"] * 5


def test_diff(capsys, source, tmp_path):
    small = tmp_path / "small.safetensors"
    run(capsys, "compress", source, small, "-r", "int8")
    assert "encoder/layer/0/dense/weight" in run(capsys, "diff", source, small)
    rows = json.loads(run(capsys, "diff", source, small, "--json", "--max-relative", "0.02"))[
        "rows"
    ]
    assert max(row["relative"] for row in rows) <= 0.02
    run(capsys, "diff", source, small, "--max-relative", "0.0001", code=3)
    run(capsys, "diff", source, source, "--max-relative", "0")
    safetensors.numpy.save_file({"other": W}, tmp_path / "other.safetensors")
    run(capsys, "diff", source, tmp_path / "other.safetensors", "--max-relative", "9", code=3)


def test_a_dry_run_writes_nothing_and_is_right(capsys, source, tmp_path):
    rows = json.loads(
        run(capsys, "compress", source, tmp_path / "x", "-r", "uint4-g32", "--dry-run", "--json")
    )["rows"]
    assert not (tmp_path / "x").exists()
    run(capsys, "compress", source, tmp_path / "x", "-r", "uint4-g32")
    leaves = dict(jc.rules.flatten(jc.load(tmp_path / "x"))[0])
    assert {row["path"]: row["after"] for row in rows} == {
        p: jc.nbytes(x) for p, x in leaves.items()
    }
    recipe = tmp_path / "r.yaml"
    recipe.write_text("rules: [{match: '**/weight', min_ndim: 2, low_rank: {energy: 0.9}}]")
    text = run(capsys, "compress", source, tmp_path / "y", "-r", recipe, "--dry-run")
    assert "by values" in text
    assert "LowRank(energy=0.9)" in text


def test_json_of_every_command(capsys, source, tmp_path):
    told = json.loads(run(capsys, "compress", source, tmp_path / "x", "-r", "int8", "--json"))
    assert told["after"] == (tmp_path / "x").stat().st_size
    told = json.loads(run(capsys, "decompress", tmp_path / "x", tmp_path / "y.npz", "--json"))
    assert told["bytes"] == (tmp_path / "y.npz").stat().st_size
    assert "int8" in json.loads(run(capsys, "recipe", "show", "--json"))
    assert "rules" in json.loads(run(capsys, "recipe", "show", "int8", "--json"))["yaml"]
    told = json.loads(run(capsys, "recipe", "validate", "int8", "--on", source, "--json"))
    assert (told["leaves"], told["compressed"]) == (5, 2)


def test_json_has_no_numbers_that_json_has_not(capsys, tmp_path):
    safetensors.numpy.save_file({"a": np.zeros(3)}, tmp_path / "a.safetensors")
    safetensors.numpy.save_file({"a": np.full(3, np.nan)}, tmp_path / "b.safetensors")
    text = run(capsys, "diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--json")
    (row,) = json.loads(text, parse_constant=pytest.fail)["rows"]
    assert row["max"] is None


def test_the_input_is_never_written_over(capsys, source, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name, some in (("a", list(TENSORS)[:2]), ("b", list(TENSORS)[2:])):
        safetensors.numpy.save_file({n: TENSORS[n] for n in some}, folder / f"{name}.safetensors")
    weight_map = {n: f"{'a' if i < 2 else 'b'}.safetensors" for i, n in enumerate(TENSORS)}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for given, out in ((folder, folder / "a.safetensors"), (index, folder / "b.safetensors"),
                       (index, index), (folder, folder / "new.safetensors")):  # fmt: skip
        told = run(capsys, "compress", given, out, "-r", "int8", code=1).err
        assert "is the input" in told
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    os.link(source, tmp_path / "other-name")
    assert (
        "is the input"
        in run(capsys, "compress", source, tmp_path / "other-name", "-r", "int8", code=1).err
    )


def test_only_files_are_replaced_and_links_are_followed(capsys, source, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert (
        "no regular file"
        in run(capsys, "compress", source, tmp_path / "pipe", "-r", "int8", code=1).err
    )
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    run(capsys, "compress", source, tmp_path / "link", "-r", "int8")
    assert (tmp_path / "link").is_symlink()
    assert jc.load(tmp_path / "there" / "file") is not None


@pytest.mark.parametrize("name", ["small.bin", "small.npz", "small.msgpack", "small.pt", "small"])
def test_what_a_file_is_does_not_depend_on_its_name(capsys, source, tmp_path, name):
    run(capsys, "compress", source, tmp_path / name, "-r", "int8")
    assert "recipe int8" in " ".join(run(capsys, "inspect", tmp_path / name).split())
    assert run(capsys, "recipe", "show", tmp_path / name) == run(capsys, "recipe", "show", "int8")
    (tmp_path / "folder").mkdir()
    shutil.copy(tmp_path / name, tmp_path / "folder" / "x.safetensors")
    assert "recipe int8" in " ".join(run(capsys, "inspect", tmp_path / "folder").split())


def test_a_dry_run_fails_where_the_run_would(capsys, source, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "rules: [{match: '**/weight', min_ndim: 2, chain: [{quantize: int8}, {prune: 0.5}]}]"
    )
    for options in (["--dry-run"], []):
        told = run(capsys, "compress", source, tmp_path / "x", "-r", recipe, *options, code=1).err
        assert "cannot follow in a chain" in told
    run(capsys, "compress", source, tmp_path / "small", "-r", "int8")
    told = run(
        capsys,
        "compress",
        tmp_path / "small",
        tmp_path / "x",
        "-r",
        "int4-g64",
        "--dry-run",
        code=1,
    )
    assert "cannot follow in a chain" in told.err
    recipe.write_text("rules: [{match: '**/weight', min_ndim: 2, low_rank: {energy: 0.9}}]")
    assert "of 3 of 5 leaves" in run(
        capsys, "compress", source, tmp_path / "x", "-r", recipe, "--dry-run"
    )


def test_names_that_are_no_tree_come_back(capsys, tmp_path):
    tensors = {"a": W, "a/b": W, "c.d": W}
    safetensors.numpy.save_file(tensors, tmp_path / "in.safetensors")
    run(capsys, "compress", tmp_path / "in.safetensors", tmp_path / "x", "-r", "lossless")
    run(capsys, "decompress", tmp_path / "x", tmp_path / "y.safetensors")
    assert set(safetensors.numpy.load_file(tmp_path / "y.safetensors")) == set(tensors)
    deep = {"a." * 3000 + "x": W}
    safetensors.numpy.save_file(deep, tmp_path / "deep.safetensors")
    run(capsys, "inspect", tmp_path / "deep.safetensors")


def test_eight_bit_floats_go_out_as_such(capsys, tmp_path):
    jc.save(
        tmp_path / "x", {"a": jnp.arange(4).astype(jnp.float8_e4m3fn), "b": jnp.ones(3, jnp.int4)}
    )
    assert "int4, which safetensors does not hold" in run(
        capsys, "decompress", tmp_path / "x", tmp_path / "y.safetensors", code=1).err  # fmt: skip
    run(capsys, "decompress", tmp_path / "x", tmp_path / "y.msgpack")
    jc.save(tmp_path / "x", {"a": jnp.arange(4).astype(jnp.float8_e4m3fn)})
    run(capsys, "decompress", tmp_path / "x", tmp_path / "y.safetensors")
    assert jc.open_params(tmp_path / "y.safetensors")["a"].load().dtype == jnp.float8_e4m3fn


def test_trees_that_are_none_and_pictures_of_no_kind(capsys, source, tmp_path):
    jc.save(tmp_path / "x", {1: jnp.ones(3), "a": jnp.ones(3)})
    for args in (
        ["compress", "{x}", "{x}2", "-r", "lossless"],
        ["decompress", "{x}", "{x}.npz"],
        ["diff", "{x}", "{x}"],
    ):
        args = [a.format(x=tmp_path / "x") for a in args]
        assert "Keys of one dict are all texts" in run(capsys, *args, code=1).err
    assert "foo" in run(capsys, "inspect", source, "--png", tmp_path / "x.foo", code=1).err


def test_letters_that_the_terminal_has_not(tmp_path):
    safetensors.numpy.save_file({"größe.weight": W}, tmp_path / "in.safetensors")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "jaxcompress", "inspect", tmp_path / "in.safetensors"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "gr\\xf6\\xdfe" in done.stdout


def test_recipes(capsys, source, tmp_path):
    assert run(capsys, "recipe", "show").split()[:2] == ["lossless", "int8"]
    text = run(capsys, "recipe", "show", "int4-g64")
    (tmp_path / "mine.yaml").write_text(text)
    run(capsys, "compress", source, tmp_path / "a", "-r", tmp_path / "mine.yaml")
    run(capsys, "compress", source, tmp_path / "b", "-r", "int4-g64")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    shutil.copy(tmp_path / "a", tmp_path / "a.safetensors")
    assert run(capsys, "recipe", "show", tmp_path / "a.safetensors") == text
    assert "sound, 3 rules; 2 of 5 leaves" in run(
        capsys, "recipe", "validate", tmp_path / "mine.yaml", "--on", source
    )
    (tmp_path / "mine.yaml").write_text(text.replace("group_size", "groupsize"))
    out = run(capsys, "recipe", "validate", tmp_path / "mine.yaml", code=1)
    assert "key 'groupsize': unknown; did you mean 'group_size'?" in out.err


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["compress", "{s}", "{t}/x", "-r", "int9"], "neither a file nor a preset"),
        (["compress", "{t}/none", "{t}/x", "-r", "int8"], "none: No such file"),
        (["compress", "{s}", "{t}/none/x", "-r", "int8"], "none is no folder; make it first"),
        (["compress", "{s}", "{t}", "-r", "int8"], "is a folder; write the name of a file"),
        (["compress", "{s}", "{s}", "-r", "int8"], "is the input; write another name"),
        (
            ["decompress", "{s}", "{t}/x.bin"],
            "write a name that ends in .safetensors, .npz, .msgpack",
        ),
        (["inspect", "{t}"], ""),
        (["diff", "{s}", "{t}/none"], "none: No such file"),
        (["recipe", "validate", "{s}"], "jaxcompress did not write"),
    ],
)
def test_errors_are_one_line_that_says_what_to_do(capsys, source, tmp_path, args, text):
    args = [a.format(s=source, t=tmp_path) for a in args]
    if args[0] == "inspect":
        shutil.copy(source, tmp_path / "second.safetensors")
        text = "holds several models"
    out = run(capsys, *args, code=1)
    assert out.out == ""
    assert out.err.startswith("jaxcompress: ")
    assert out.err.count("\n") == 1
    assert text in out.err
    assert set(os.listdir(tmp_path)) <= {"model.safetensors", "second.safetensors"}


def test_a_leaf_that_cannot_be_compressed_leaves_no_file(capsys, tmp_path):
    bad = {"a.weight": W, "b.weight": np.where(W > 2, np.nan, W)}
    safetensors.numpy.save_file(bad, tmp_path / "in.safetensors")
    (tmp_path / "out").write_text("old")
    out = run(
        capsys, "compress", tmp_path / "in.safetensors", tmp_path / "out", "-r", "int8", code=1
    )
    assert "b/weight: " in out.err
    assert "NaN" in out.err
    assert (tmp_path / "out").read_text() == "old"
    assert set(os.listdir(tmp_path)) == {"in.safetensors", "out"}


def test_interrupting_leaves_no_file(capsys, source, tmp_path, monkeypatch):
    from jaxcompress.checkpoint import file

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(file, "write_container", stop)
    out = run(capsys, "compress", source, tmp_path / "x", "-r", "int8", code=130)
    assert "interrupted" in out.err
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize(
    "args", [[], ["compress"], ["compress", "a", "b"], ["nothing"], ["diff", "a"]]
)
def test_a_wrong_command_line_is_told(capsys, args):
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    assert "usage: jaxcompress" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(capsys, shell):
    with pytest.raises(SystemExit) as caught:
        main(["--print-completion", shell])
    assert caught.value.code == 0
    script = capsys.readouterr().out
    assert "decompress" in script
    assert "max-relative" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script.encode(), check=True)


def test_the_module_runs_as_a_process_and_stops_with_its_reader(source, tmp_path):
    command = [sys.executable, "-m", "jaxcompress"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"jaxcompress {jc.__version__}\n"
    many = {f"layer_{i:04}.weight": np.zeros((1, 1), np.float32) for i in range(3000)}
    safetensors.numpy.save_file(many, tmp_path / "many.safetensors")
    shell = f"{sys.executable} -m jaxcompress inspect {tmp_path}/many.safetensors | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
