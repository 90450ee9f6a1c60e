"""A teacher's outputs on disk: what comes back, what a kill leaves, and what is refused."""

import collections
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import killed_cache
import numpy as np
import pytest
import safetensors

import jaxcompress as jc
from jaxcompress.checkpoint.file import map_arrays
from jaxcompress.distillation import soft_targets
from jaxcompress.drivers import teacher_cache
from jaxcompress.drivers.teacher_cache import TeacherCache, cache_teacher

X, PARAMS = killed_cache.X, killed_cache.PARAMS
EXPECTED = jax.tree.map(np.asarray, killed_cache.teacher(PARAMS, X))


def same(found, indices=slice(None)):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[indices], rtol=1e-6), found, EXPECTED)


def test_outputs_by_index(tmp_path):
    cache = killed_cache.write(tmp_path)
    assert len(cache) == 23
    same(cache[:])
    order = np.array([22, 0, 7, 7, -1, 5])
    same(cache[order], order)
    same(TeacherCache(tmp_path)[3:20:4], slice(3, 20, 4))
    assert jax.tree.structure(cache[:2]) == jax.tree.structure(EXPECTED)
    assert cache[[]]["logits"].shape == (0, 3)
    # Any reader of safetensors reads them.
    with safetensors.safe_open(tmp_path / "shard-000004.safetensors", "numpy") as file:
        np.testing.assert_allclose(file.get_tensor("logits"), EXPECTED["logits"][20:], rtol=1e-6)


def test_few_files_are_open(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "_OPEN", 4)
    x = np.arange(40, dtype=np.float32)
    fn = lambda w, x: {"twice": w * x, "more": x + 1}
    cache = cache_teacher(fn, 2.0, x, tmp_path, shard_size=np.int64(2), batch_size=np.int64(2))
    before = len(os.listdir("/dev/fd"))
    for seed in range(2):  # the second time by files that were closed meanwhile
        indices = np.random.default_rng(seed).permutation(40)
        found = cache[indices]
        np.testing.assert_array_equal(found["twice"], 2 * x[indices])
        np.testing.assert_array_equal(found["more"], x[indices] + 1)
    assert len(os.listdir("/dev/fd")) - before <= 4


def test_a_kill_costs_one_shard(tmp_path):
    command = [sys.executable, str(Path(killed_cache.__file__)), str(tmp_path), "13"]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    # Examples 10 to 14 were under way; nothing is there in parts.
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "shard-000000.safetensors",
        "shard-000001.safetensors",
        "structure.safetensors",
    ]
    with pytest.raises(
        jc.FileError, match=r"shard-000002\.safetensors is missing; run cache_teacher"
    ):
        TeacherCache(tmp_path)
    cache = killed_cache.write(tmp_path, calls=(calls := []))
    assert min(c.min() for c in calls[1:]) == 10  # the first call is for the shapes
    same(cache[:])
    killed_cache.write(tmp_path, calls=(calls := []))
    assert len(calls) == 1


def test_other_runs_are_refused(tmp_path):
    inputs = {"x": X}
    fn = lambda params, batch: batch["x"] @ params["kernel"]
    write = lambda params=PARAMS, inputs=inputs, fn=fn, **options: cache_teacher(
        fn, params, inputs, tmp_path, batch_size=8, **options
    )
    write()
    other = {"kernel": PARAMS["kernel"] + 1e-6}
    changed = X.copy()
    changed[-1, -1] += 1
    for options, message in [
        ({"params": other}, "is of another teacher"),
        ({"inputs": {"x": changed}}, "is of other inputs"),
        ({"inputs": {"x": X[:-1]}}, "is of other inputs"),
        ({"name": "softened"}, "name='', not 'softened'"),
        ({"shard_size": 7}, "shard_size=4096, not 7"),
        ({"dtype": "bfloat16"}, "outputs="),
        ({"fn": lambda p, b: (b["x"] @ p["kernel"])[:, :2]}, "outputs="),
        ({"fn": lambda p, b: 2 * b["x"] @ p["kernel"]}, "another function of the same params"),
    ]:
        with pytest.raises(jc.FileError, match=message):
            write(**options)
    write()
    shard = tmp_path / "shard-000000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(jc.FileError, match="'output' is damaged: its checksum"):
        TeacherCache(tmp_path)[:1]
    shard.rename(tmp_path / "shard-000003.safetensors")
    with pytest.raises(jc.FileError, match="holds shard 0; give it back its name"):
        write()


def test_weights_that_a_teacher_has_within_itself(tmp_path):
    closed = lambda w: lambda _, x: x @ w
    cache_teacher(closed(PARAMS["kernel"]), None, X, tmp_path)
    cache_teacher(closed(PARAMS["kernel"].copy()), None, X, tmp_path)
    with pytest.raises(jc.FileError, match="is of another teacher"):
        cache_teacher(closed(2 * PARAMS["kernel"]), None, X, tmp_path)


def test_smaller_outputs_and_other_containers(tmp_path):
    logits = lambda params, x: x @ params["kernel"]
    exact = X @ PARAMS["kernel"]
    narrow = cache_teacher(logits, PARAMS, X, tmp_path / "narrow", dtype="bfloat16")[:]
    np.testing.assert_array_equal(narrow, exact.astype(jnp.bfloat16))
    tiny = cache_teacher(logits, PARAMS, X, tmp_path / "tiny", dtype="float8_e4m3fn")[:]
    np.testing.assert_array_equal(tiny, exact.astype(jnp.float8_e4m3fn))
    int8 = jc.Quantize("int8", axis=-1)
    cached = cache_teacher(lambda p, x: int8(logits(p, x)), PARAMS, X, tmp_path / "codes")
    for cache in (cached, TeacherCache(tmp_path / "codes")):
        rows = cache[np.array([4, 2])]
        assert isinstance(rows, jc.QuantizedArray)
        # Half a step of 127 to the largest of a row, and what a scale in bfloat16 adds.
        bound = np.abs(exact).max(-1, keepdims=True)[[4, 2]] / 127 * 0.51
        assert np.all(np.abs(np.asarray(rows.materialize()) - exact[[4, 2]]) <= bound)
    loss = jax.jit(jc.compressed(soft_targets))(jnp.asarray(exact[[4, 2]]), rows)
    assert np.all(np.asarray(loss) < 1e-3)
    Pair = collections.namedtuple("Pair", "logits hidden")
    pair = lambda p, x: Pair(logits(p, x), x)
    cache = cache_teacher(pair, PARAMS, X, tmp_path / "pair")
    assert isinstance(cache[:3], Pair)
    assert isinstance(TeacherCache(tmp_path / "pair")[:3], dict)
    np.testing.assert_array_equal(
        TeacherCache(tmp_path / "pair", like=Pair(0, 0))[:3].hidden, X[:3]
    )


def test_one_trace_and_bad_arguments(tmp_path):
    traces = []

    def fn(params, x):
        traces.append(x.shape)
        return x @ params["kernel"]

    cache_teacher(fn, PARAMS, X, tmp_path / "a", batch_size=4, shard_size=6)
    assert traces == [(4, 4)]
    for run, inputs, options, message in [
        (fn, X, {"batch_size": 0}, "write 1 or more"),
        (fn, lambda i: X[i], {}, "write examples=, how many, and data="),
        (fn, X[:0], {}, "no examples"),
        (fn, (X, X[:3]), {}, "write arrays"),
        (fn, X, {"examples": 4}, "the inputs have 23"),
        (lambda p, x: x.sum(), X, {}, "one entry for each example"),
        (
            lambda p, x: {"a/b": x, "a": {"b": x}},
            X,
            {},
            "two outputs of the teacher are called 'a/b'",
        ),
        (lambda p, x: jax.random.split(jax.random.key(0), len(x)), X, {}, "is a random key"),
    ]:
        with pytest.raises(jc.SpecError, match=message):
            cache_teacher(run, PARAMS, inputs, tmp_path / "b", **options)
    jc.save(tmp_path / "coded.safetensors", {"x": jnp.zeros(1000)}, coded=True)
    with pytest.raises(jc.FileError, match="'x' is coded, so it cannot be mapped"):
        map_arrays(tmp_path / "coded.safetensors")
    cache = TeacherCache(tmp_path / "a")
    with pytest.raises(IndexError, match="index 23 of 23"):
        cache[[0, 23]]
    with pytest.raises(jc.SpecError, match="one axis of integers"):
        cache[np.zeros(23, bool)]
    with pytest.raises(FileNotFoundError):
        TeacherCache(tmp_path / "none")
