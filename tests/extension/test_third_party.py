"""A leaf type from outside of the package does all that the built-in ones do."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc

sys.path.insert(0, str(Path(__file__).parent))
import circulant
from circulant import Circulant, CirculantArray

N = 6
W = jax.random.normal(jax.random.key(0), (N, N))
X = jax.random.normal(jax.random.key(1), (4, N))
# A product by FFT has an error of a few eps log2(6) times |x| |c|, 8 * 2.6 * 1.2e-7 * 2.5 * 2.5.
TOLERANCE = 2e-5


def test_its_spec_finds_the_nearest_one():
    leaf = jc.compress({"w": W}, {"w": Circulant()})["w"]
    dense = np.asarray(leaf.materialize())
    # The projection on an orthogonal basis, by least squares.
    basis = np.stack([np.roll(np.eye(N), k, axis=1).ravel() for k in range(N)], 1)
    best = basis @ np.linalg.lstsq(basis, np.asarray(W).ravel(), rcond=None)[0]
    np.testing.assert_allclose(dense.ravel(), best, atol=1e-6)
    with pytest.raises(jc.SpecError, match=r"a/w: shape \(2, 3\) is not square"):
        jc.compress({"a": {"w": jnp.ones((2, 3))}}, {"a/w": Circulant()})


def test_its_rule_runs_and_the_rest_falls_back():
    leaf = Circulant()(W)
    dense = leaf.materialize()
    circulant.CALLS.clear()
    out = jax.jit(jc.compressed(lambda w, x: x @ w))(leaf, X)
    assert circulant.CALLS == ["dot_general"]
    np.testing.assert_allclose(out, X @ dense, atol=TOLERANCE)
    other = jax.jit(jc.compressed(lambda w, x: (w @ x.T).sum() + jnp.linalg.det(w)))(leaf, X)
    np.testing.assert_allclose(other, (dense @ X.T).sum() + jnp.linalg.det(dense), rtol=1e-4)
    assert circulant.CALLS == ["dot_general"]


def test_it_stacks_scans_maps_and_trains():
    stack = Circulant()(jnp.stack([W, W.T, W + 1]) / 3)
    assert stack.shape == (3, N, N)
    fn = lambda w, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
    out = jax.jit(jc.compressed(fn))(stack, X)
    np.testing.assert_allclose(out, fn(stack.materialize(), X), atol=TOLERANCE)
    trainable, rest = jc.partition({"w": stack})

    def loss(run, expand):
        return lambda t: (run(expand(jc.combine(t, rest))["w"], X) ** 2).sum()

    ours = jax.grad(loss(jc.compressed(fn), lambda t: t))(trainable)
    plain = jax.grad(loss(fn, jc.decompress))(trainable)
    np.testing.assert_allclose(ours["w"].row, plain["w"].row, atol=20 * TOLERANCE)
    updates, _ = optax.sgd(0.1).update(ours, optax.sgd(0.1).init(trainable))
    assert optax.apply_updates(trainable, updates)["w"].shape == (3, N, N)


def test_it_is_reported_nested_and_placed():
    tree = {"w": W}
    small = jc.compress(tree, {"w": Circulant()})
    (row,) = jc.summary(tree, small).rows
    assert (row["form"], row["after"]) == ("tests.circulant", 4 * N)
    mixed = jc.LowRankArray.of(small["w"], jnp.ones((N, 3)))
    out = jax.jit(jc.compressed(lambda w, x: x @ w))(mixed, X)
    np.testing.assert_allclose(out, X @ small["w"].materialize() @ jnp.ones((N, 3)), atol=5e-5)
    mesh = jax.make_mesh((1,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "a"))
    assert small["w"].shardings(whole).row.spec == jax.sharding.PartitionSpec()


def test_it_is_saved_and_a_process_without_it_is_told(tmp_path):
    leaf = Circulant()(W)
    path = tmp_path / "circulant.safetensors"
    jc.save(path, {"w": leaf, "b": jnp.ones(2)})
    back = jc.load(path)["w"]
    assert isinstance(back, CirculantArray)
    np.testing.assert_array_equal(back.row, leaf.row)
    program = (
        "import sys, jaxcompress as jc\n"
        "try: jc.load(sys.argv[1])\n"
        "except jc.FileError as error: print(error)\n"
        "print(jc.load(sys.argv[1], lazy=True)['b'].load())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, check=True
    )
    assert "'tests.circulant', which is not registered" in done.stdout
    assert "import the package that defines it" in done.stdout
    assert "[1. 1.]" in done.stdout


def test_the_command_line_lists_it_and_takes_its_module(tmp_path, monkeypatch):
    path = tmp_path / "circulant.safetensors"
    jc.save(path, {"w": Circulant()(W), "b": jnp.ones(2)}, coded=True)
    command = [sys.executable, "-m", "jaxcompress"]
    run = lambda *args: subprocess.run([*command, *args], capture_output=True, text=True)
    listed = run("inspect", path, "--json")
    assert listed.returncode == 0, listed.stderr
    rows = {row["path"]: row for row in json.loads(listed.stdout)["rows"]}
    assert rows["w"]["form"] == "tests.circulant"
    assert rows["w"]["shape"] == list(W.shape)
    out = tmp_path / "dense.npz"
    refused = run("decompress", path, out)
    assert refused.returncode == 1
    assert "import the package that defines it" in refused.stderr
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    assert run("--import", "circulant", "decompress", path, out).returncode == 0
    with np.load(out) as found:
        np.testing.assert_array_equal(found["w"], Circulant()(W).materialize())
    assert "No module named 'none'" in run("--import", "none", "inspect", path).stderr


def test_a_form_belongs_to_one_class_and_lists_its_fields():
    with pytest.raises(jc.CompressError, match=r"'tests\.circulant' is already registered"):

        @jc.register_array("tests.circulant", children=("x",))
        class Other(jc.CompressedArray):
            x: jax.Array

    with pytest.raises(jc.CompressError, match="listed once"):

        @jc.register_array("tests.other", children=("x",))
        class Another(jc.CompressedArray):
            x: jax.Array
            y: int
