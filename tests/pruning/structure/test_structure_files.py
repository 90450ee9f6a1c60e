"""A smaller model in a file: its plan beside its leaves, and the same function elsewhere."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from structure_models import array, mlp, resnet

import jaxcompress as jc
from jaxcompress import CompressError, FileError
from jaxcompress.checkpoint.file import read_plan
from jaxcompress.pruning.structure import groups, plan, shrink, shrunk


def half(make=mlp):
    (fn, params, args), _ = make()
    found = plan(groups(fn, params, *args), params, 0.5, round_to=2)
    return fn, params, args, found


@pytest.mark.parametrize("coded", [False, True])
def test_the_plan_is_in_the_file(tmp_path, coded):
    fn, params, (x,), found = half()
    small, fewer = shrink(fn, params, found)
    path = tmp_path / "small.safetensors"
    jc.save(path, fewer, {"mine": "yes"}, plan=found, coded=coded)
    assert read_plan(path) == found
    assert jc.read_metadata(path) == {"mine": "yes"}
    np.testing.assert_array_equal(shrunk(fn, read_plan(path))(jc.load(path), x), small(fewer, x))


def test_compressed_leaves_have_the_shapes_of_the_plan(tmp_path):
    """Each leaf in another form; lazy leaves as well."""
    fn, params, (x,), found = half()
    small, fewer = shrink(fn, params, found)
    rules = {"a": jc.Quantize("int8"), "c": jc.LowRank(1), "d": jc.Prune(0.5)}
    stored, path = jc.compress(fewer, rules), tmp_path / "small.safetensors"
    jc.save(path, jc.compress(fewer, rules, lazy=True), plan=found)
    run = jax.jit(jc.compressed(shrunk(fn, read_plan(path))))
    np.testing.assert_array_equal(run(jc.load(path), x), run(stored, x))
    # As on the dense values that the leaves stand for: sums of six products in float32.
    np.testing.assert_allclose(run(stored, x), small(jc.decompress(stored), x), atol=1e-5)


def test_a_tree_of_another_plan_is_not_saved(tmp_path):
    _, params, _, found = half()
    path = tmp_path / "small.safetensors"
    with pytest.raises(CompressError, match=r"the plan is for a of shape \(3, 4\)"):
        jc.save(path, params, plan=found)
    assert not path.exists()


def test_files_without_a_plan_or_with_a_damaged_one(tmp_path):
    path = tmp_path / "dense.safetensors"
    jc.save(path, {"w": jnp.ones(3)})
    with pytest.raises(FileError, match="no plan was saved in it"):
        read_plan(path)

    class Broken:
        check = staticmethod(lambda leaves, whole: None)
        to_json = staticmethod(lambda: "[[1")

    jc.save(path, {"w": jnp.ones(3)}, plan=Broken())
    with pytest.raises(FileError, match=r"dense.safetensors: the header is damaged: this is no"):
        read_plan(path)


@pytest.mark.slow
def test_another_process_runs_the_same_function(tmp_path):
    fn, params, (x,), found = half(resnet)
    small, fewer = shrink(fn, params, found)
    stored = jc.compress(fewer, {"params/c1*/kernel": jc.Quantize("int8")})
    path, out = tmp_path / "small.safetensors", tmp_path / "out.npy"
    jc.save(path, stored, plan=found, coded=True)
    script = Path(__file__).with_name("loaded_elsewhere.py")
    subprocess.run([sys.executable, script, path, out], check=True)
    np.testing.assert_array_equal(np.load(out), jax.jit(jc.compressed(small))(stored, x))


@pytest.mark.slow
def test_a_state_of_nnx_comes_back_into_its_containers(tmp_path):
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)])

        def __call__(self, x):
            return self.layers[1](nnx.relu(self.layers[0](x)))

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    fn, x = lambda state, x: nnx.merge(graph, state)(x), array(0, 4, 3)
    found = plan(groups(fn, state, x), state, 0.5, round_to=2)
    small, fewer = shrink(fn, state, found)
    jc.save(tmp_path / "nnx.safetensors", fewer, plan=found)
    again = jc.load(tmp_path / "nnx.safetensors", like=state)
    loaded = shrunk(fn, read_plan(tmp_path / "nnx.safetensors"))
    np.testing.assert_array_equal(loaded(again, x), small(fewer, x))
