"""Iterative pruning: what each rewind starts from, exact counts, and going on after a kill."""

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
    with pytest.raises(jc.FileError, match="score='magnitude', not 'test_a_run"):
        killed_run.run(train, tmp_path, score=lambda params: params)
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
