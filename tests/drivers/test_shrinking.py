"""Channels removed little by little: shares of the whole, one plan, an optimizer that goes on."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress import CompressError, FileError, SpecError
from jaxcompress.drivers.shrinking import _between, iterative_shrinking
from jaxcompress.pruning.structure import groups, mask_channels, shrunk


def array(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {"a": array(0, 3, 12), "bias": array(1, 12), "b": array(2, 12, 8), "c": array(3, 8, 2)}
X, Y = array(4, 16, 3), array(5, 16, 2)
OPTIMIZER = optax.adam(0.02)


def apply(p, x):
    return jnp.tanh(jnp.tanh(x @ p["a"] + p["bias"]) @ p["b"]) @ p["c"]


def loss(p):
    return jnp.mean((apply(p, X) - Y) ** 2)


def steps(loss, params, state, n=2):
    @jax.jit
    def step(params, state):
        updates, state = OPTIMIZER.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(n):
        params, state = step(params, state)
    return params, state


def train(fn, params, state, round):
    return steps(lambda p: jnp.mean((fn(p, X) - Y) ** 2), params, state)


run = functools.partial(
    iterative_shrinking, fn=apply, params=PARAMS, example=(X,), keeps=[0.75, 0.5], round_to=1
)


@functools.cache
def whole_run():
    return tuple(run(train, state=OPTIMIZER.init(PARAMS)))


def test_it_is_the_training_of_the_masked_model():
    """Masked params and moments, trained by the whole function: the same, step after step."""
    params, state = PARAMS, OPTIMIZER.init(PARAMS)
    for done in whole_run():
        moments = state[0]._replace(
            mu=mask_channels(state[0].mu, done.plan), nu=mask_channels(state[0].nu, done.plan)
        )
        masked = lambda p, plan=done.plan: loss(mask_channels(p, plan))
        params, state = steps(masked, mask_channels(params, done.plan), (moments, *state[1:]))
        assert int(done.state[0].count) == int(state[0].count) == 2 * (done.number + 1)
        # Adam divides by the root of its second moments: rounding of 1e-7, some ten times larger.
        for got, kept in ((done.params, params), (done.state[0].mu, state[0].mu)):
            for path, want in kept.items():
                place = next(leaf for leaf in done.plan.leaves if leaf.path == path)
                at = np.ix_(
                    *(range(n) if k is None else k for n, k in zip(place.shape, place.kept))
                )
                np.testing.assert_allclose(got[path], want[at], atol=2e-5)


def test_shares_are_of_the_whole_and_what_is_gone_stays_so():
    sizes = [(done.params["a"].shape[1], done.params["c"].shape[0]) for done in whole_run()]
    assert sizes == [(12, 8), (9, 6), (6, 4)]
    first, second, third = (done.plan for done in whole_run())
    assert second.then(_between(second, third)) == third
    assert all(k is None for leaf in first.leaves for k in leaf.kept)
    for a, b in zip(second.leaves, third.leaves):
        assert all(x is None or set(y) < set(x) for x, y in zip(a.kept, b.kept))
    # The ones with the least magnitude of what was trained, of all leaves with two axes.
    trained = whole_run()[0].params
    score = np.abs(trained["a"]).sum(0) + np.abs(trained["b"]).sum(1)
    assert second.leaves[1].kept[0] == tuple(sorted(np.argsort(-score, kind="stable")[:9]))


def test_scores_and_other_functions_of_the_round():
    """A score from gradients of a loss on the smaller params, and a budget of multiplications."""
    told = []

    def gradients(fn, params, round):
        told.append((round.number, round.keep, params["a"].shape))
        grads = jax.jit(jax.grad(shrunk(loss, round.plan)))(params)
        return jax.tree.map(lambda g, w: g * w, grads, params)

    def still(fn, params, state, round):
        own, same = jax.jit(lambda p: (shrunk(loss, round.plan)(p), jnp.mean((fn(p, X) - Y) ** 2)))(
            params
        )
        assert jnp.allclose(own, same)
        return params, state

    *_, last = run(still, state=None, score=gradients, budget="multiplications", round_to=2)
    assert [number for number, *_ in told] == [1, 2]
    assert told[0][2] == (3, 12)
    found = groups(apply, PARAMS, X)
    small = sum(np.prod(last.params[name].shape) for name in "abc")
    assert 16 * small <= found.multiplications() / 2
    assert last.state is None


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_zero_scores_never_bring_anything_back(allocation):
    """Ties of all: the first stay, and of these the first again."""
    zeros = lambda fn, params, round: jax.tree.map(jnp.zeros_like, params)
    still = lambda fn, params, state, round: (params, state)
    keeps = [0.75, 0.5, 0.25]
    done = [*run(still, state=None, keeps=keeps, score=zeros, allocation=allocation)]
    for before, after in itertools.pairwise(done):
        for a, b in zip(before.plan.leaves, after.plan.leaves):
            assert all(x is None or set(y) <= set(x) for x, y in zip(a.kept, b.kept))


def test_a_run_that_was_killed_goes_on(tmp_path):
    calls = []

    def stops(fn, params, state, round, at=None):
        calls.append(round.number)
        if round.number == at:
            raise RuntimeError("out of power")
        return train(fn, params, state, round)

    start = lambda train, **options: [
        *run(train, state=OPTIMIZER.init(PARAMS), folder=tmp_path, **options)
    ]
    with pytest.raises(RuntimeError, match="out of power"):
        start(functools.partial(stops, at=2))
    assert calls == [0, 1, 2]
    calls.clear()
    done = start(stops)
    assert calls == [2]
    for a, b in zip(done, whole_run()):
        assert a.plan == b.plan
        jax.tree.map(np.testing.assert_array_equal, (a.params, a.state), (b.params, b.state))
    calls.clear()
    start(stops)
    assert calls == []
    with pytest.raises(FileError, match="of a run with keeps"):
        start(stops, keeps=[0.5])


def test_shares_by_path_and_wrong_input():
    still = lambda fn, params, state, round: (params, state)
    *_, last = run(still, state=None, keeps=[{"a": 0.5}])
    assert (last.params["a"].shape, last.params["c"].shape) == ((3, 6), (8, 2))
    with pytest.raises(SpecError, match=r"keeps=\[\]"):
        [*run(still, state=None, keeps=[])]
    with pytest.raises(jc.RuleError, match="other"):
        [*run(still, state=None, keeps=[{"other": 0.5}])]
    with pytest.raises(SpecError, match="return the params and the state"):
        [*run(lambda fn, params, state, round: params, state=None)]
    with pytest.raises(SpecError, match="train returned another tree in round 0"):
        [*run(lambda fn, params, state, round: ({}, state), state=None)]
    with pytest.raises(SpecError, match="has no name to keep in the folder"):
        [*run(still, state=None, score=lambda fn, p, round: p, folder="never")]
    wrong = lambda fn, params, round: PARAMS
    with pytest.raises(CompressError, match="the plan is for"):
        [*run(still, state=None, score=wrong)]
