"""One budget over all layers, against brute force over all choices of ranks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import SpecError
from jaxcompress.decomposition.budget import allocate_ranks, allocated, rank_errors
from jaxcompress.decomposition.data_aware import fisher_stats

EPS = float(np.finfo(np.float32).eps)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def decaying(seed, m, n, rate):
    u, v = (np.linalg.qr(np.asarray(normal(seed + i, k, k)))[0] for i, k in enumerate((m, n)))
    k = min(m, n)
    return jnp.asarray((u[:, :k] * rate ** np.arange(k)) @ v[:k], jnp.float32)


PARAMS = {
    "a": {"kernel": decaying(0, 12, 8, 0.5), "bias": normal(1, 8)},
    "b": {"kernel": decaying(2, 8, 10, 0.9)},
    "c": {"kernel": jnp.stack([decaying(4, 10, 10, 0.7), decaying(6, 10, 10, 0.8)])},
}
X = normal(8, 40, 12) * jnp.linspace(0.1, 3.0, 12)


def model(params, x):
    x = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"]) @ params["b"]["kernel"]
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["c"]["kernel"])[0]


def loss_fn(params, x):
    return jnp.mean(jnp.sum(model(params, x) ** 2, axis=-1))


def table(metric, **options):
    fn = {"output": model, "fisher": loss_fn, "weights": None}[metric]
    batches = [] if fn is None else [X]
    return rank_errors(fn, PARAMS, batches, metric=metric, min_size=0, **options)


def stats_of(metric):
    if metric == "output":
        return jc.observe(model, PARAMS, [X])
    return fisher_stats(loss_fn, PARAMS, [X]) if metric == "fisher" else None


@pytest.fixture(scope="module", params=["weights", "output", "fisher"])
def measured(request):
    return request.param, table(request.param)


def test_the_errors_are_those_of_what_compress_makes(measured):
    metric, found = measured
    stats = stats_of(metric)
    assert [leaf.paths[0] for leaf in found.leaves] == ["a/kernel", "b/kernel", "c/kernel"]
    for leaf in found.leaves:
        path = leaf.paths[0]
        w = PARAMS[path[0]]["kernel"]
        dense = np.asarray(w, np.float64)
        for candidate in (leaf.candidates[1], leaf.candidates[-1]):
            small = jc.compress(PARAMS, {path: candidate.spec}, stats=stats)
            made = small[path[0]]["kernel"]
            assert candidate.bytes == made.nbytes < 4 * w.size
            d = np.asarray(made.materialize(), np.float64) - dense
            if metric == "weights":
                wanted = np.sum(d**2) / np.sum(dense**2)
            elif metric == "output":
                gram = np.asarray(stats[path][(-2,)].gram, np.float64)
                square = lambda x, gram=gram: np.sum(x * (gram @ x))
                wanted = square(d) / square(dense)
            else:
                rows = np.asarray(stats[path][(-2,)].fisher, np.float64) / w.shape[-1]
                wanted = np.sum(rows[..., None] * d**2) / 2
            scale = candidate.error if metric == "fisher" else 1.0
            assert abs(candidate.error - wanted) <= 1e-3 * candidate.error + 100 * EPS * scale


@pytest.mark.parametrize("share", [0.35, 0.5, 0.77])
@pytest.mark.parametrize("unit", ["bytes", "multiplications"])
@pytest.mark.thin(10)
def test_it_is_the_best_of_all_choices(measured, share, unit):
    metric, found = measured
    if metric == "weights" and unit == "multiplications":
        with pytest.raises(SpecError, match="give fn and batches"):
            allocated(found, share, unit)
        return
    cost = (lambda c: c.bytes) if unit == "bytes" else (lambda c: c.costs["multiplications"])
    choices = [leaf.candidates for leaf in found.leaves]
    most = share * sum(cost(of[0]) for of in choices)
    within = [
        sum(c.error for c in pick)
        for pick in itertools.product(*choices)
        if sum(cost(c) for c in pick) <= most
    ]
    best = allocated(found, share, unit)
    assert sum(cost(c) for _, c in best.chosen) <= most
    np.testing.assert_allclose(best.error, min(within), rtol=1e-9)
    small = jc.compress(PARAMS, best.rules, stats=stats_of(metric))
    assert jc.nbytes(small) == best.bytes
    jc.compressed(model)(small, X)


def test_multiplications_are_counted_where_they_are_made():
    leaves = table("output").leaves
    # 40 examples, each with as many products as there are weights.
    assert [leaf.candidates[0].costs["multiplications"] for leaf in leaves] == [
        40 * 12 * 8, 40 * 8 * 10, 40 * 2 * 10 * 10,
    ]  # fmt: skip
    assert leaves[0].candidates[1].costs["multiplications"] == 40 * (12 + 8)
    conv = {"kernel": normal(0, 3, 3, 2, 6)}
    fn = lambda params, x: jax.lax.conv_general_dilated(
        x, params["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    found = rank_errors(fn, conv, [normal(1, 2, 7, 7, 2)], min_size=0).leaves[0]
    assert found.candidates[0].costs["multiplications"] == 2 * 25 * 18 * 6
    assert found.candidates[2].costs["multiplications"] == 2 * 25 * 2 * (18 + 6)


def test_a_larger_budget_is_never_worse_and_the_largest_leaves_all_dense(measured):
    _, found = measured
    errors = [allocated(found, share).error for share in np.linspace(0.3, 1, 12)]
    assert all(x >= y for x, y in itertools.pairwise(errors))
    assert set(allocated(found, 1.0).rules.values()) == {None}
    assert errors[-1] == 0


def test_an_amount_is_of_the_whole_tree():
    found = table("weights")
    whole = jc.nbytes(PARAMS)
    budget = int(0.6 * whole)
    best = allocate_ranks(None, PARAMS, metric="weights", min_size=0, budget=budget)
    assert best.bytes <= budget
    assert best.choices == allocated(found, budget).choices
    assert found.dense_bytes == PARAMS["a"]["bias"].nbytes


def test_given_ranks_leaves_and_tied_leaves():
    found = rank_errors(
        None, PARAMS, metric="weights", min_size=0, candidates=[4, 2, 99], leaves="[ab]/kernel"
    )
    assert [[c.spec for c in leaf.candidates] for leaf in found.leaves] == [
        [None, jc.LowRank(2), jc.LowRank(4)],
        [None, jc.LowRank(2), jc.LowRank(4)],
    ]
    few = table("weights", candidates=2)
    assert all(len(leaf.candidates) == 3 for leaf in few.leaves)
    w = PARAMS["a"]["kernel"]
    tied = rank_errors(None, {"x": w, "y": w}, metric="weights", min_size=0)
    assert tied.leaves[0].paths == ("x", "y")
    assert tied.leaves[0].candidates[0].bytes == w.nbytes


def test_without_names_leaves_that_no_rank_helps_stay_out():
    params = {"w": normal(0, 12, 8), "v": normal(1, 12, 2, 2), "unused": normal(2, 9, 9)}

    def fn(params, x):
        grouped = jax.lax.conv_general_dilated(
            x[..., None] * jnp.ones(4), params["v"], (1,), "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2,
        )  # fmt: skip
        return grouped.sum() + x @ params["w"]

    axes = {"v": jc.KernelAxes((-3, -2), (-1,))}
    found = rank_errors(fn, params, [X], min_size=0, axes=axes)
    assert [leaf.paths for leaf in found.leaves] == [("w",)]
    with pytest.raises(SpecError, match=r"no leaf has a choice.*lower min_size"):
        rank_errors(fn, params, [X])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda t: allocated(t, 0.1), r"below the least possible, \d+"),
        (lambda t: allocated(t, 200), r"below the least possible, \d+"),
        (lambda t: allocated(t, 0), "budget=0"),
        (lambda t: allocated(t, 0.5, "flops"), "unit='flops'"),
        (lambda t: table("weights", candidates=0), "candidates=0"),
        (lambda t: table("weights", candidates=[0.5]), "how many ranks"),
        (lambda t: table("weights", candidates=[50]), "write ranks up to 4"),
        (lambda t: rank_errors(None, PARAMS, metric="energy"), "metric='energy'"),
        (lambda t: rank_errors(None, PARAMS), "needs fn and batches"),
        (lambda t: rank_errors(None, jc.compress(PARAMS, {"a/kernel": jc.LowRank(2)}),
                               metric="weights", min_size=0), "jc.decompress"),
    ],
)  # fmt: skip
def test_what_cannot_be_says_what_to_write(make, text):
    with pytest.raises(SpecError, match=text):
        make(table("weights"))
