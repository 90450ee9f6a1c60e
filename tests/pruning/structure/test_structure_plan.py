"""Plans: which channels stay, by scores, shares and budgets."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from structure_models import array

from jaxcompress import CompressError, RuleError, SpecError
from jaxcompress.pruning import scores as S
from jaxcompress.pruning.structure import groups, keep_channels, plan, shrink_params

PARAMS = {"a": array(0, 5, 32), "b": array(1, 32), "c": array(2, 32, 48), "d": array(3, 48, 3)}


def network(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["a"] + p["b"]) @ p["c"]) @ p["d"]


@pytest.fixture(scope="module")
def found():
    return groups(network, PARAMS, jax.ShapeDtypeStruct((2, 5), jnp.float32))


def kept(made, path, axis):
    leaf = next(leaf for leaf in made.leaves if leaf.path == path)
    return leaf.kept[axis]


def test_the_largest_sums_over_the_group_stay(found):
    made = plan(found, PARAMS, 0.25)
    a, b, c, d = (np.abs(np.asarray(PARAMS[n])) for n in "abcd")
    first = a.sum(0) + b + c.sum(1)
    second = c.sum(0) + d.sum(1)
    for path, axis, total, n in (("a", 1, first, 8), ("b", 0, first, 8), ("c", 0, first, 8),
                                 ("c", 1, second, 16), ("d", 0, second, 16)):  # fmt: skip
        # A quarter of 48 is 12, halfway between two multiples of 8: the larger.
        assert kept(made, path, axis) == tuple(sorted(np.argsort(-total)[:n]))
    assert kept(made, "a", 0) is None
    assert made.shapes == {"a": (5, 8), "b": (8,), "c": (8, 16), "d": (16, 3)}


def test_signed_scores_and_ties(found):
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    assert kept(plan(found, ones, 0.25), "b", 0) == tuple(range(8))
    falling = ones | {"b": -jnp.arange(32.0)}
    assert kept(plan(found, falling, 0.25), "b", 0) == tuple(range(24, 32))
    assert kept(plan(found, falling, 0.25, signed=True), "b", 0) == tuple(range(8))


@pytest.mark.parametrize("budget", ["parameters", "bytes", "multiplications"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_a_budget_is_met_and_used(found, budget, allocation):
    made = plan(found, PARAMS, 0.5, budget=budget, allocation=allocation, round_to=1)
    n, m = made.shapes["c"]
    cost = {
        "parameters": lambda n, m: 5 * n + n + n * m + 3 * m,
        "bytes": lambda n, m: 4 * (5 * n + n + n * m + 3 * m),
        "multiplications": lambda n, m: 2 * (5 * n + n * m + 3 * m),
    }[budget]
    assert cost(n, m) <= 0.5 * cost(32, 48)
    # One more channel of both would be too many.
    assert cost(n + 1, m + 1) > 0.5 * cost(32, 48)


def test_counts_are_those_of_the_smaller_leaves(found):
    for n, m in itertools.product((1, 17, 32), (2, 48)):
        a, c = found.removable if found.removable[0].size == 32 else found.removable[::-1]
        made = keep_channels(found, {a: range(n), c: range(m)})
        small = shrink_params(PARAMS, made)
        count = sum(x.size for x in jax.tree.leaves(small))
        assert found.parameters({a: n, c: m}) == count
        assert found.nbytes({a: n, c: m}) == 4 * count
        assert count == sum(math.prod(shape) for shape in made.shapes.values())
        assert found.multiplications({a: n, c: m}) == 2 * (5 * n + n * m + 3 * m)


def test_global_channels_compete_by_their_share_of_the_mean(found):
    weights = {n: jnp.abs(x) for n, x in PARAMS.items()}
    even = plan(found, weights, 0.5, allocation="global", round_to=1)
    # One group ten times as large in all: its order and its share are the same.
    scaled = weights | {"d": weights["d"] * 1e-6, "c": weights["c"] * 1e-6}
    low = plan(found, scaled, 0.5, allocation="global", round_to=1)
    n, m = even.shapes["c"]
    assert n + m == 40
    assert sum(low.shapes["c"]) == 40
    assert low.shapes["c"][1] > 8


def test_shares_by_path_and_by_group(found):
    made = plan(found, PARAMS, {"a": 0.5, "d": 0.75}, round_to=4)
    assert made.shapes["c"] == (16, 36)
    made = plan(found, PARAMS, {"a": 0.5})
    assert made.shapes["c"] == (16, 48)
    made = plan(found, PARAMS, 0.5, only=lambda group: group.size == 48)
    assert made.shapes["c"] == (32, 24)


def test_heads_and_what_lies_in_blocks_are_rounded_by_places():
    """Heads of 4 by twos, since 8 places are two of them; their depth in twos, for four times."""
    params = {n: array(i, 6, 16) for i, n in enumerate("qkv")} | {"o": array(4, 16, 2)}

    def attention(p, x):
        q, k, v = ((x @ p[n]).reshape(-1, 4, 4) for n in "qkv")
        weights = jax.nn.softmax(jnp.einsum("ihd,jhd->hij", q, k))
        return jnp.einsum("hij,jhd->ihd", weights, v).reshape(-1, 16) @ p["o"]

    found = groups(attention, params, array(5, 3, 6))
    heads = lambda group: len(group.members) == 4
    assert plan(found, params, 0.6, only=heads).shapes["o"] == (8, 2)
    assert plan(found, params, 0.8, only=heads).shapes["o"] == (16, 2)
    assert plan(found, params, 0.8, only=heads, round_to=4).shapes["o"] == (12, 2)


def test_scores_of_the_library_fit(found):
    loss = lambda p, batch: jnp.sum(network(p, batch) ** 2)
    batches = [array(7, 4, 5)]
    for scores in (S.magnitude(PARAMS), S.taylor(loss, PARAMS, batches)):
        assert plan(found, scores, 0.5).shapes["c"] == (16, 24)


def test_leaves_without_a_score_count_for_nothing(found):
    readers = {"a": None, "b": None, "c": PARAMS["c"], "d": PARAMS["d"]}
    made = plan(found, readers, 0.5)
    c = np.abs(np.asarray(PARAMS["c"]))
    assert kept(made, "b", 0) == tuple(sorted(np.argsort(-c.sum(1))[:16]))
    assert plan(found, {"c": PARAMS["c"], "d": PARAMS["d"]}, 0.5) == made
    # Those of the norms of inputs have none for a bias.
    norms = S.wanda(network, PARAMS, [array(7, 4, 5)])
    assert norms["b"] is None
    assert plan(found, norms, 0.5).shapes["c"] == (16, 24)
    with pytest.raises(CompressError, match="no score of any leaf of the group of"):
        plan(found, {"a": PARAMS["a"]}, 0.5)
    with pytest.raises(CompressError, match="no such leaf"):
        plan(found, {**PARAMS, "e": PARAMS["d"]}, 0.5)


def test_what_cannot_be_is_refused(found):
    group = found.removable[0]
    with pytest.raises(SpecError, match=r"keep=0.01 of the parameters cannot be met"):
        plan(found, PARAMS, 0.01, budget="parameters")
    with pytest.raises(SpecError, match="budget='time'"):
        plan(found, PARAMS, budget="time")
    with pytest.raises(SpecError, match="allocation='lamp'"):
        plan(found, PARAMS, allocation="lamp")
    with pytest.raises(SpecError, match="round_to=0"):
        plan(found, PARAMS, round_to=0)
    with pytest.raises(SpecError, match="shares by path"):
        plan(found, PARAMS, {"a": 0.5}, budget="bytes")
    with pytest.raises(RuleError, match="matches no leaf"):
        plan(found, PARAMS, {"e": 0.5})
    with pytest.raises(RuleError, match="no group from which"):
        plan(found, PARAMS, {"a": 0.5, "b": 0.5})
    with pytest.raises(CompressError, match="score of c"):
        plan(found, {**PARAMS, "c": PARAMS["d"]})
    with pytest.raises(CompressError, match="NaN"):
        plan(found, {**PARAMS, "b": PARAMS["b"] * jnp.nan})
    with pytest.raises(CompressError, match=f"channels 0 to {group.size - 1}"):
        keep_channels(found, {group: [group.size]})
    with pytest.raises(CompressError, match="keep some"):
        keep_channels(found, {group: []})
    pinned = next(group for group in found.groups if group.pinned)
    with pytest.raises(CompressError, match="nothing can be removed"):
        keep_channels(found, {pinned: [0]})
