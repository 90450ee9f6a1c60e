"""Iterative pruning: what each rewind starts from, exact counts, and going on after a kill."""

import functools
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import killed_run
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.drivers import Trained, iterative_pruning, lottery_ticket
from jaxcompress.pruning import kept_count

RULES = {"kernel": "unstructured"}
START = {"kernel": jnp.arange(1.0, 101.0), "bias": jnp.ones(2)}


def add_one(params, masks, round):
    """A training that also moves what is masked: its zeros are not trusted."""
    return jax.tree.map(lambda x: x + 1, params)


def other_score(params):
    return params


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert np.asarray(x).dtype == np.asarray(y).dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("rewind", ["none", "weights", "learning_rate"])
def test_where_each_round_starts(rewind):
    told = []

    def train(params, masks, round):
        told.append(round)
        return add_one(params, masks, round)

    done = [
        *iterative_pruning(
            train, START, sparsity=0.9, rounds=4, rules=RULES, rewind=rewind
        )
    ]  # fmt: skip
    assert [r.number for r in told] == [0, 1, 2, 3, 4]
    assert {r.rewind for r in told} == {rewind}
    for k, (r, found) in enumerate(zip(told, done)):
        assert r.sparsity == found.sparsity == pytest.approx(1 - 0.1 ** (k / 4), abs=1e-15)
        keep = kept_count(100, found.sparsity)
        # The largest stay the largest, so that all is known: `keep` of them, from where they began.
        mask = np.arange(100) >= 100 - keep
        begun = np.arange(1, 101) + (0 if rewind == "weights" else k)
        np.testing.assert_array_equal(found.masks["kernel"], mask)
        np.testing.assert_array_equal(found.start["kernel"], np.where(mask, begun, 0))
        np.testing.assert_array_equal(found.params["kernel"], np.where(mask, begun + 1, 0))
        assert found.params["bias"][0] == (2 if rewind == "weights" else k + 2)
    assert done[-1].sparsity == 0.9


def test_rewinding_to_an_early_step():
    def train(params, masks, round):
        early = add_one(params, masks, round)
        last = add_one(early, masks, round)
        return Trained(last, early) if round.number == 0 else last

    first, second = lottery_ticket(train, START, sparsity=0.5, rounds=1, rules=RULES)
    np.testing.assert_array_equal(first.start["kernel"], START["kernel"])
    np.testing.assert_array_equal(second.start["kernel"][50:], START["kernel"][50:] + 1)
    assert not np.any(second.start["kernel"][:50])


def test_what_was_removed_stays_removed_whatever_the_scores():
    # Each score is a permutation of the one before: without the masks others would go.
    turn = iter(range(10))
    score = lambda params: {**params, "kernel": jnp.roll(jnp.arange(-50.0, 50.0), 17 * next(turn))}
    done = [
        *iterative_pruning(
            add_one, START, sparsity=0.9, rounds=3, rules={"kernel": "unstructured"}, score=score
        )
    ]  # fmt: skip
    masks = [np.asarray(d.masks["kernel"]) for d in done]
    assert [int(m.sum()) for m in masks] == [kept_count(100, d.sparsity) for d in done]
    for before, after in zip(masks, masks[1:]):  # noqa: RUF007
        assert not np.any(after & ~before)


def test_counts_that_grow_bring_nothing_back():
    shapes = [(1, 1), (11, 1), (2, 4)]
    params = {str(i): jnp.ones(shape) for i, shape in enumerate(shapes)}
    done = [
        *lottery_ticket(
            lambda params, masks, round: params, params, sparsity=0.9, rounds=4,
            rules={"*": "unstructured"}, allocation="erk",
        )
    ]  # fmt: skip
    asked = [jc.pruning.allocation.erk(shapes, d.sparsity) for d in done]
    assert [n[0] for n in asked] == [1, 1, 0, 1, 0]  # the case shows what it is to show
    kept = [[int(m.sum()) for m in d.masks.values()] for d in done]
    assert kept == np.minimum.accumulate(asked).tolist()
    for d in done:
        assert [int(np.count_nonzero(x)) for x in d.start.values()] == kept[d.number]


def test_a_training_may_donate_what_it_is_given():
    step = jax.jit(lambda params: jax.tree.map(lambda x: x + 1, params), donate_argnums=0)
    train = lambda params, masks, round: step(params)
    *_, last = lottery_ticket(train, START, sparsity=0.5, rounds=2, rules=RULES)
    assert last.params["bias"].tolist() == [2, 2]
    assert not START["bias"].is_deleted()


def test_a_run_that_failed_goes_on_with_the_same_bits(tmp_path):
    whole = [*killed_run.run(killed_run.trainer(), None)]
    train = killed_run.trainer(calls=(calls := []))

    def fails(params, masks, round):
        if round.number == 2:
            raise RuntimeError("out of power")
        return train(params, masks, round)

    with pytest.raises(RuntimeError, match="out of power"):
        [*killed_run.run(fails, tmp_path)]
    resumed = [*killed_run.run(train, tmp_path)]
    assert calls == [0, 1, 2, 3]
    for a, b in zip(whole, resumed, strict=True):
        assert a[:2] == b[:2]
        same(a[2:], b[2:])
    assert [*killed_run.run(train, tmp_path)][-1].number == 3
    assert calls == [0, 1, 2, 3]  # all are read
    with pytest.raises(jc.FileError, match=r"rounds=3, not 4; write another folder"):
        killed_run.run(train, tmp_path, rounds=4)
    ours = "score='jaxcompress.pruning.scores.basic.magnitude', not 'test_iterative.other_score'"
    with pytest.raises(jc.FileError, match=ours):
        killed_run.run(train, tmp_path, score=other_score)
    for unnamed in (lambda params: params, functools.partial(other_score)):
        with pytest.raises(jc.SpecError, match=r"no name to keep in the folder.*with def"):
            killed_run.run(train, tmp_path, score=unnamed)
    other = {**killed_run.PARAMS, "steps": jnp.int32(1)}
    with pytest.raises(jc.FileError, match="is of a run with other params"):
        lottery_ticket(
            train, other, folder=tmp_path, sparsity=0.8, rounds=3, rules=killed_run.RULES,
            scope="global",
        )  # fmt: skip
    damaged = tmp_path / "round-01.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    with pytest.raises(jc.FileError, match="round-01"):
        [*killed_run.run(train, tmp_path)]


def test_a_gap_ends_what_is_read(tmp_path):
    run = lambda by, **options: [
        *lottery_ticket(
            lambda params, masks, round: calls.append(round.number)
            or jax.tree.map(lambda x: x + by, params),
            START, sparsity=0.5, rounds=3, rules=RULES, folder=tmp_path, **options,
        )
    ]  # fmt: skip
    path = lambda k: tmp_path / f"round-{k:02d}.safetensors"
    calls = []
    run(1.0)
    path(1).unlink()
    calls.clear()
    again = run(2.0)  # of another training, so that the old rounds 2 and 3 would be seen
    assert calls == [1, 2, 3]
    assert [float(r.params["bias"][0]) for r in again] == [2, 3, 3, 3]
    # One that is killed behind round 1 leaves no round of the run before.
    path(1).unlink()
    rounds = lottery_ticket(
        add_one, START, sparsity=0.5, rounds=3, rules=RULES, folder=tmp_path
    )  # fmt: skip
    next(rounds), next(rounds)
    rounds.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == [path(0).name, path(1).name]


def test_files_of_a_folder_that_are_no_rounds_of_it(tmp_path):
    folder = tmp_path / "run"
    run = lambda params=START: [
        *lottery_ticket(add_one, params, sparsity=0.5, rounds=2, rules=RULES, folder=folder)
    ]
    path = lambda k: folder / f"round-{k:02d}.safetensors"
    run()
    # The same values under other names.
    with pytest.raises(jc.FileError, match="is of a run with other params"):
        lottery_ticket(
            add_one, {"kernel": START["kernel"], "a": START["bias"]}, sparsity=0.5, rounds=2,
            rules=RULES, folder=folder,
        )  # fmt: skip
    spare = path(0).rename(tmp_path / "spare")
    path(2).rename(path(0))
    spare.rename(path(2))
    with pytest.raises(jc.FileError, match=r"round-00.safetensors holds round 2"):
        run()
    path(0).unlink(), path(2).unlink()
    path(1).rename(tmp_path / "outside.safetensors")
    path(1).symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(jc.FileError, match=r"round-01.safetensors is a link"):
        run()


def test_numbers_keys_and_texts_in_a_folder(tmp_path):
    params = {**START, "key": jax.random.key(3), "name": "net", "scale": 2.0, "n": np.float32(1)}
    train = lambda params, masks, round: {**params, "kernel": params["kernel"] + 1}
    run = lambda params, train=train: [
        *iterative_pruning(
            train, params, sparsity=np.float32(0.5), rounds=np.int64(2), rules=RULES,
            folder=tmp_path,
        )
    ]  # fmt: skip
    first, again = run(params), run(params, None)
    assert [type(r.sparsity) for r in first] == [float] * 3
    for a, b in zip(first, again, strict=True):
        assert jax.random.key_data(a.params["key"]).tolist() == [0, 3]
        assert a.params["key"] == b.params["key"]
        assert (a.params["name"], a.params["scale"]) == (b.params["name"], b.params["scale"])
        np.testing.assert_array_equal(a.params["kernel"], b.params["kernel"])
    for other in ({"key": jax.random.key(4)}, {"name": "other"}, {"scale": 3.0}):
        with pytest.raises(jc.FileError, match="other params"):
            run({**params, **other})
    with pytest.raises(jc.SpecError, match="what: a object cannot be kept"):
        run({**params, "what": object()})


def test_rounds_that_are_read_lie_where_the_params_do(tmp_path):
    mesh = jax.make_mesh((1,), ("m",), axis_types=(jax.sharding.AxisType.Explicit,))
    place = jax.NamedSharding(mesh, jax.P("m"))
    params = {"kernel": jax.device_put(START["kernel"], place), "bias": START["bias"]}
    train = lambda params, masks, round: params if round.number else Trained(params, params)
    run = lambda train: [
        *lottery_ticket(train, params, sparsity=0.5, rounds=1, rules=RULES, folder=tmp_path)
    ]
    run(train)
    for found in run(None):
        for x in (found.params, found.masks, found.start):
            assert x["kernel"].sharding == place
        assert not found.params["bias"].committed


@pytest.mark.slow
def test_a_killed_process_goes_on_with_the_same_bits(tmp_path):
    script = str(Path(killed_run.__file__))
    call = lambda *args: subprocess.run([sys.executable, script, *map(str, args)]).returncode
    assert call(tmp_path / "whole", tmp_path / "whole.safetensors") == 0
    assert call(tmp_path / "cut", tmp_path / "cut.safetensors", 2) == -signal.SIGKILL
    assert sorted(p.name for p in (tmp_path / "cut").glob("round-*")) == [
        "round-00.safetensors",
        "round-01.safetensors",
    ]
    assert call(tmp_path / "cut", tmp_path / "cut.safetensors") == 0
    whole, cut = (tmp_path / f"{name}.safetensors" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "sparsity=1.0: write the share"),
        ({"sparsity": "0.5"}, "sparsity='0.5': write the share"),
        ({"rounds": 0}, "rounds=0: write a whole number"),
        ({"rewind": "all"}, "rewind='all': write one of none, weights, learning_rate"),
        ({"rules": {"kernle": "unstructured"}}, "matches no leaf"),
        ({"scope": "all"}, "scope='all'"),
    ],
)
def test_refused_before_any_training(options, message):
    def train(params, masks, round):
        raise AssertionError

    with pytest.raises(jc.CompressError, match=message):
        iterative_pruning(
            train, START, **({"sparsity": 0.5, "rounds": 1, "rules": RULES} | options)
        )


def test_what_a_training_must_return():
    run = lambda train: [*iterative_pruning(train, START, sparsity=0.5, rounds=1, rules=RULES)]
    with pytest.raises(jc.SpecError, match="another tree in round 0"):
        run(lambda params, masks, round: {"kernel": params["kernel"]})
    with pytest.raises(jc.SpecError, match="another tree in round 0"):
        run(lambda params, masks, round: {**params, "bias": jnp.ones(3)})
    with pytest.raises(jc.SpecError, match="only round 0 has an early"):
        run(lambda params, masks, round: Trained(params, params))


def test_progress_is_shown(capsys):
    [
        *iterative_pruning(
            add_one, START, sparsity=0.5, rounds=1, rules=RULES, progress=True
        )
    ]  # fmt: skip
    assert "training" in capsys.readouterr().err
