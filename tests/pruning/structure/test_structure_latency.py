"""Plans for a measured budget, with a measure that counts, and once with a clock."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structure_models import array

from jaxcompress import SpecError
from jaxcompress.pruning.structure import groups, plan
from jaxcompress.pruning.structure.latency import Clock, plan_for_latency

PARAMS = {"a": array(0, 5, 64), "b": array(1, 64, 96), "c": array(2, 96, 3)}
X = array(3, 2, 5)


def network(p, x):
    return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]


def products(params):
    return sum(x.size for x in params.values())


def steps(params):
    """As on machines that fill vectors of 16: time goes up in steps."""
    return sum(-(-x.shape[0] // 16) * -(-x.shape[1] // 16) for x in params.values())


@pytest.mark.parametrize(
    ("count", "share", "allocation", "most"),
    [(products, 0.5, "uniform", 8), (products, 0.2, "global", 8), (steps, 0.5, "uniform", 16)],
)
def test_the_target_is_met_and_used(count, share, allocation, most):
    """Against all plans of the kind, of a fine grid of shares."""
    calls = []

    def measure(fn, params):
        calls.append(count(params))
        return calls[-1]

    options = {"allocation": allocation, "round_to": 1}
    made, trials = plan_for_latency(
        network, PARAMS, (X,), PARAMS, share, measure=measure, trials=most, **options
    )
    whole = count(PARAMS)
    assert calls[0] == whole
    assert len(calls) <= 1 + most
    assert [t.cost * whole for t in trials] == pytest.approx(calls[1:])
    found = groups(network, PARAMS, X)
    sized = lambda made: count({n: np.zeros(shape) for n, shape in made.shapes.items()}) / whole
    every = [sized(plan(found, PARAMS, n / 160, **options)) for n in range(161)]
    best = max(cost for cost in every if cost <= share)
    assert best * (1 - 0.02) <= sized(made) <= share


@settings(max_examples=4, derandomize=True, deadline=None, database=None)
@given(st.floats(0.05, 1.0), st.floats(0.3, 3.0), st.floats(0.0, 0.2))
def test_any_rising_cost(share, power, offset):
    """What is found is within the target; a finer one would not be, or trials are spent."""
    cost = lambda _, p: offset + (p["a"].shape[1] / 64) ** power
    whole = offset + 1
    try:
        made, trials = plan_for_latency(
            network, PARAMS, (X,), PARAMS, share, measure=cost, round_to=1, trials=12
        )
    except SpecError:
        assert offset + (3 / 64) ** power > share * whole  # 12 trials reach that few
        return
    n = made.shapes["a"][1]
    assert (offset + (n / 64) ** power) / whole <= share + 1e-9
    assert len(trials) <= 12
    assert n == 64 or (offset + ((n + 1) / 64) ** power) / whole > share * 0.98 or len(trials) == 12


def test_a_target_that_cannot_be_met_is_refused():
    with pytest.raises(SpecError, match=r"share=0.1 of the time cannot be met: with 0"):
        plan_for_latency(
            network, PARAMS, (X,), PARAMS, 0.1, measure=lambda f, p: 9 + products(p) * 1e-9
        )


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"share": 1.5}, "share=1.5"),
        ({"trials": 0}, "trials=0"),
        ({"tolerance": 1.0}, "tolerance=1.0"),
        ({"budget": "bytes"}, "leave out keep and budget"),
        ({"measure": lambda fn, params: 0.0}, "measure gave 0.0"),
        ({"measure": lambda fn, params: float("nan")}, "measure gave nan"),
    ],
)
def test_options_that_are_none_are_refused(options, word):
    with pytest.raises(SpecError, match=word):
        plan_for_latency(network, PARAMS, (X,), PARAMS, **{"measure": lambda f, p: 1.0, **options})


def test_with_a_clock():
    """Real times, of which nothing is said but that they are some."""
    clock = Clock(network, PARAMS, (X,), rounds=3, seconds=1e-4)
    made, trials = plan_for_latency(
        network, PARAMS, (X,), PARAMS, 1.0, measure=lambda fn, p: clock(fn, p), trials=2
    )
    assert made.shapes.keys() == groups(network, PARAMS, X).shapes.keys()
    assert all(trial.cost > 0 and np.isfinite(trial.cost) for trial in trials)
    assert clock(network, PARAMS) > 0
