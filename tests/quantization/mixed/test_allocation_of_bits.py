"""Mixed precision: the program against all assignments, errors against their formulas in numpy."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress import RuleError, SpecError
from jaxcompress.quantization.mixed import (
    allocate,
    best_choices,
    bops,
    budget_curve,
    draw_budget,
    sensitivities,
)
from jaxcompress.rules import glob

INT = [jc.Quantize(f"int{b}", group_size=16) for b in (2, 4, 8)]


def every(errors, costs, budgets):
    """The least error of all assignments within the budgets, or None."""
    best = None
    for choice in itertools.product(*[range(len(row)) for row in errors]):
        taken = [math.fsum(of[i][c] for i, c in enumerate(choice)) for of in costs]
        if all(t <= b for t, b in zip(taken, budgets)):
            error = math.fsum(errors[i][c] for i, c in enumerate(choice))
            best = error if best is None else min(best, error)
    return best


@st.composite
def problems(draw):
    """Few values, so that ties are many; costs up to millions, where a tolerance would show."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    error = st.sampled_from([0.0, 1e-9, 1e-4, 0.1, 0.25, 1.0, 7.0]) | st.floats(0, 1e3)
    cost = st.integers(0, 9) | st.integers(0, 10**7)
    table = lambda value: [draw(st.lists(value, min_size=n, max_size=n)) for n in sizes]
    costs = [table(cost) for _ in range(draw(st.integers(1, 2)))]
    share = draw(st.floats(0, 1))
    ends = [[sum(f(row) for row in of) for f in (min, max)] for of in costs]
    budgets = [lo + int(share * (hi - lo)) for lo, hi in ends]
    return table(error), costs, budgets


@settings(max_examples=60)
@given(problems())
def test_no_assignment_is_better(problem):
    errors, costs, budgets = problem
    best = every(errors, costs, budgets)
    if best is None:
        with pytest.raises(SpecError, match="all the budgets"):
            best_choices(errors, costs, budgets)
        return
    found = best_choices(errors, costs, budgets)
    assert found == best_choices(errors, costs, budgets)
    for of, budget in zip(costs, budgets):
        assert math.fsum(of[i][c] for i, c in enumerate(found)) <= budget
    # The solver stops within 1e-6 of an objective whose spread is scaled to 1e6.
    spread = max(map(max, errors)) - min(map(min, errors))
    got = math.fsum(errors[i][c] for i, c in enumerate(found))
    assert best <= got <= best + 1e-11 * spread + 1e-15


def test_a_case_by_hand():
    # 6 = 1 + 5 or 3 + 3: errors 8 + 0 and 3 + 4. A greedy choice by gain per cost (first item:
    # 5 / 2, second: 2 / 1, then 4 / 2) ends at 3 + 3 as well; with 5 it must take 3 + 2.
    errors, costs = [[8.0, 3.0], [6.0, 4.0, 0.0]], [[1, 3], [2, 3, 5]]
    assert best_choices(errors, [costs], [6]) == [1, 1]
    assert best_choices(errors, [costs], [5]) == [1, 0]
    assert best_choices(errors, [costs], [3]) == [0, 0]
    assert best_choices(errors, [costs], [8]) == [1, 2]


def test_of_equal_choices_the_first():
    assert best_choices([[1.0, 1.0, 1.0]], [[[2, 2, 2]]], [5]) == [0]
    assert best_choices([[1.0, 1.0]], [[[3, 2]]], [5]) == [1]


def problem(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"a": {"kernel": draw(32, 48), "bias": draw(48)}, "b": {"kernel": 0.2 * draw(48, 40)}}
    batches = [draw(20, 32), draw(12, 32)]
    return params, batches


def apply(params, x):
    return jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"]) @ params["b"]["kernel"]


def rounded(w, spec):
    return np.asarray(jc.decompress(spec(w)), np.float64)


def test_output_errors_are_those_of_the_outputs():
    params, batches = problem()
    table = sensitivities(apply, params, batches, choices=INT)
    x = np.concatenate(batches).astype(np.float64)
    inputs = {"a/kernel": x}
    hidden = x @ np.asarray(params["a"]["kernel"], np.float64) + np.asarray(params["a"]["bias"])
    inputs["b/kernel"] = np.tanh(hidden)
    assert [leaf.paths for leaf in table.leaves] == [("a/kernel",), ("b/kernel",)]
    for leaf in table.leaves:
        w = np.asarray(params[leaf.paths[0][0]]["kernel"], np.float64)
        y = inputs[leaf.paths[0]] @ w
        for candidate, spec in zip(leaf.candidates, INT):
            z = inputs[leaf.paths[0]] @ rounded(params[leaf.paths[0][0]]["kernel"], spec)
            want = np.sum((z - y) ** 2) / np.sum(y**2)
            # Sums of 32 * 48 products in float32; cancellation within them costs some more.
            assert candidate.error == pytest.approx(want, rel=1e-4)


def test_end_to_end_errors():
    params, batches = problem()
    table = sensitivities(apply, params, batches, choices=INT, sensitivity="end_to_end")
    y = np.concatenate([apply(params, x) for x in batches])
    changed = {**params, "b": {"kernel": jc.decompress(INT[0](params["b"]["kernel"]))}}
    z = np.concatenate([apply(changed, x) for x in batches])
    want = np.sum((z - y) ** 2) / np.sum(y**2)
    assert table.leaves[1].candidates[0].error == pytest.approx(float(want), rel=1e-4)


def quadratic(params, x, y):
    return jnp.mean(jnp.square(x @ params["w"] - y)) / 2


def test_hessian_errors_of_a_quadratic_loss():
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.choice([-1.0, 1.0], size=(64, 8)), jnp.float32)
    # Columns of a Hadamard-like design: x'x is diagonal, and so is the Hessian, x'x / (64 * 4).
    x = jnp.asarray(np.linalg.qr(np.asarray(x))[0] * 8, jnp.float32)
    w, y = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32), jnp.zeros((64, 4))
    spec = jc.Quantize("int3")
    table = sensitivities(
        quadratic, {"w": w}, [(x, y)], choices=[spec], sensitivity="hessian",
        key=jax.random.key(0), min_size=0,
    )  # fmt: skip
    d = rounded(w, spec) - np.asarray(w)
    # The diagonal is 64 / (64 * 4) = 1/4 everywhere; a sign probe is exact on it, up to the QR's
    # rounding of the other entries, 8 eps each.
    assert table.leaves[0].candidates[0].error == pytest.approx(np.sum(d**2) / 8, rel=1e-4)
    # A quadratic loss at its minimum rises by just that.
    rise = quadratic({"w": w + d}, x, x @ w) - quadratic({"w": w}, x, x @ w)
    assert float(rise) == pytest.approx(np.sum(d**2) / 8, rel=1e-4)


def test_a_loss_that_curves_downwards_counts_as_flat():
    table = sensitivities(
        lambda params, x: -jnp.sum(params["w"] ** 2), {"w": jnp.linspace(-1, 1, 32).reshape(8, 4)},
        [0.0], choices=[jc.Quantize("int2")], sensitivity="hessian", key=jax.random.key(0),
        min_size=0,
    )  # fmt: skip
    assert table.leaves[0].candidates[0].error == 0


def test_fisher_errors():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(6, 8)).astype(np.float32)
    w, y = rng.normal(size=(8, 4)).astype(np.float32), rng.normal(size=(6, 4)).astype(np.float32)
    spec = jc.Quantize("int3")
    table = sensitivities(
        quadratic, {"w": jnp.asarray(w)}, [(x, y)], choices=[spec], sensitivity="fisher", min_size=0
    )
    # Of one example the loss is |xw - y|^2 / 8, its gradient x (xw - y)' / 4.
    grads = [np.outer(a, a @ w - b) / 4 for a, b in zip(x, y)]
    d = rounded(jnp.asarray(w), spec) - w
    want = np.sum(np.mean(np.square(grads), axis=0) * d**2) / 2
    assert table.leaves[0].candidates[0].error == pytest.approx(float(want), rel=1e-4)


def test_an_own_sensitivity():
    params, _ = problem()
    seen = []

    def worst(path, leaf, approximate):
        seen.append(path)
        return jnp.max(jnp.abs(leaf - approximate))

    found = allocate(None, params, choices=INT, sensitivity=worst, budget={"code_bits": 4})
    assert set(seen) == {"a/kernel", "b/kernel"}
    assert found.as_json()["sensitivity"] == "own"


@pytest.mark.parametrize("kind", ["output", "end_to_end", "weight"])
def test_a_larger_budget_is_never_worse_and_never_exceeded(kind):
    params, batches = problem()
    table = sensitivities(apply, params, batches, choices=[*INT, None], sensitivity=kind)
    curve = budget_curve(table, 7, name="bytes")
    errors = [row["error"] for row in curve.rows]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0  # all dense
    assert all(row["taken"] <= row["budget"] for row in curve.rows)
    assert curve.rows[0]["taken"] == curve.rows[0]["budget"] == table.least()


@settings(max_examples=10)
@given(st.floats(0, 1), st.integers(0, 3))
def test_bytes_are_those_of_the_compressed_tree(share, seed):
    params, batches = problem(seed)
    table = sensitivities(apply, params, batches, choices=[*INT, None])
    budget = table.least() + share * (table.most() - table.least())
    found = table.allocate(budget)
    small = jc.compress(params, found.rules)
    assert found.bytes == jc.nbytes(small) <= budget
    shapes = jax.eval_shape(lambda p: jc.compress(p, found.rules), params)
    assert found.bytes == jc.nbytes(shapes)
    size = 32 * 48 + 48 * 40
    assert found.bits == 8 * (found.bytes - 4 * 48) / size
    best = every(
        [[c.error for c in leaf.candidates] for leaf in table.leaves],
        [[[c.bytes for c in leaf.candidates] for leaf in table.leaves]],
        [budget - 4 * 48],
    )
    assert found.error == pytest.approx(best, rel=1e-12, abs=1e-12)


def test_bits_with_and_without_scales():
    params, batches = problem()
    specs = [jc.Quantize("int4", group_size=16), jc.Quantize("int8", group_size=16)]
    table = sensitivities(apply, params, batches, choices=specs)
    # A bfloat16 scale to 16 weights is one more bit to a weight.
    assert table.least("bits") == 5.0
    assert table.least("code_bits") == 4.0
    assert table.allocate({"bits": 5.0}).code_bits == 4.0
    with pytest.raises(SpecError, match=r"bits=4\.99 is below the least possible, 5;"):
        table.allocate({"bits": 4.99})


def test_two_budgets_at_once_and_bit_operations():
    params, batches = problem()
    stats = jc.observe(apply, params, batches, ("gram",))
    cost = bops(stats, 32, activation_bits=8)
    table = sensitivities(apply, params, batches, choices=INT, stats=stats, costs={"bops": cost})
    # Each weight meets each example once: weights times bits times 8.
    first, second = 32 * 48, 48 * 40
    assert table.most("bops") == (first + second) * 8 * 8
    found = table.allocate({"bops": (first * 8 + second * 2) * 8, "bits": 9.0})
    assert found.cost("bops") <= (first * 8 + second * 2) * 8
    assert found.bits <= 9.0
    # 9 bits bind nothing here (8 and a bit for scales), so that one budget alone gives the same.
    assert found.rules == table.allocate({"bops": (first * 8 + second * 2) * 8}).rules


def test_a_table_of_latencies():
    params, batches = problem()
    costs = {"ms": {"a/kernel": [1.0, 2.0, 4.0], "b/kernel": [4.0, 1.0, 4.0]}}
    found = allocate(apply, params, batches, choices=INT, budget={"ms": 5.0}, costs=costs)
    assert found.rules == {"a/kernel": INT[2], "b/kernel": INT[1]}
    assert found.cost("ms") == 5.0
    with pytest.raises(SpecError, match="no entry for choice 1 of 'b/kernel'"):
        sensitivities(
            apply, params, batches, choices=INT, costs={"ms": {**costs["ms"], "b/kernel": [1.0]}}
        )
    with pytest.raises(SpecError, match="every choice has such a cost"):
        sensitivities(apply, params, batches, choices=INT, costs={"bytes": costs["ms"]})


def test_a_look_up_weighs_rows_by_how_often_they_are_seen():
    rng = np.random.default_rng(5)
    table = jnp.asarray(rng.normal(size=(16, 64)), jnp.float32)
    tokens = jnp.asarray([[3, 3, 5], [3, 5, 7]])
    fn = lambda params, tokens: params["embedding"][tokens]
    found = sensitivities(fn, {"embedding": table}, [tokens], choices=INT)
    w = np.asarray(table, np.float64)[np.asarray(tokens).ravel()]
    z = rounded(table, jc.Quantize("int4", group_size=16, axis=-1))
    z = z[np.asarray(tokens).ravel()]
    want = np.sum((z - w) ** 2) / np.sum(w**2)
    assert found.leaves[0].candidates[1].error == pytest.approx(want, rel=1e-4)


def test_a_stack_of_layers_and_a_grouped_convolution():
    rng = np.random.default_rng(6)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    stack, x = draw(3, 32, 32), draw(10, 32)

    def scanned(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["kernel"])[0]

    spec = jc.Quantize("int4")
    found = sensitivities(scanned, {"kernel": stack}, [x], choices=[spec])
    part = whole = 0.0
    for w in np.asarray(stack):
        d = x @ (rounded(jnp.asarray(w), spec) - w)
        part, whole = part + np.sum(d**2), whole + np.sum((x @ w) ** 2)
        x = np.tanh(x @ w)
    assert found.leaves[0].candidates[0].error == pytest.approx(float(part / whole), rel=1e-3)

    kernel, image = draw(3, 3, 4, 32), draw(2, 6, 6, 8)

    def convolved(params, image):
        return jax.lax.conv_general_dilated(
            image, params["kernel"], (1, 1), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2,
        )  # fmt: skip

    found = sensitivities(convolved, {"kernel": kernel}, [image], choices=[spec])
    y = convolved({"kernel": kernel}, image)
    z = convolved({"kernel": jc.decompress(spec(kernel))}, image)
    want = float(jnp.sum((z - y) ** 2) / jnp.sum(y**2))
    assert found.leaves[0].candidates[0].error == pytest.approx(want, rel=1e-3)


def test_tied_leaves_are_one_choice():
    w = jnp.asarray(np.random.default_rng(7).normal(size=(40, 40)), jnp.float32)
    params = {"a": w, "b": w, "c": w + 1}
    table = sensitivities(None, params, choices=INT, sensitivity="weight")
    assert [leaf.paths for leaf in table.leaves] == [("a", "b"), ("c",)]
    one = sensitivities(None, {"a": w}, choices=INT, sensitivity="weight")
    assert table.leaves[0].candidates[0].error == 2 * one.leaves[0].candidates[0].error
    found = table.allocate({"code_bits": 4})
    small = jc.compress(params, found.rules)
    assert small["a"] is small["b"]
    assert found.bytes == jc.nbytes({"a": small["a"], "c": small["c"]})


def test_what_stays_dense_is_counted():
    params = {"big": jnp.ones((64, 64)), "small": jnp.ones((4, 4)), "n": jnp.arange(3)}
    table = sensitivities(None, params, choices=INT, sensitivity="weight")
    assert [leaf.paths for leaf in table.leaves] == [("big",)]
    assert table.dense_bytes == 4 * 16 + 4 * 3
    only = sensitivities(None, params, choices={"b*": INT}, sensitivity="weight")
    assert only.dense_bytes == table.dense_bytes


def test_specs_that_need_statistics():
    params, batches = problem()
    specs = [jc.SparseGPT(0.0, quantize="int3"), jc.SparseGPT(0.0, quantize="int4")]
    stats = jc.observe(apply, params, batches, ("gram",))
    found = allocate(apply, params, batches, choices=specs, stats=stats, budget={"code_bits": 3.5})
    assert set(found.rules.values()) == set(specs)
    # The solver's error is what was predicted: its leaves are the ones that compress makes.
    again = sensitivities(apply, jc.decompress(params), batches, choices=specs)
    assert again.allocate({"code_bits": 3.5}).error == pytest.approx(found.error, rel=1e-5)
    assert jc.nbytes(jc.compress(params, found.rules, stats=stats)) == found.bytes


def test_a_leaf_whose_path_is_a_pattern():
    params = {"[a]*": {"w?": jnp.ones((40, 40))}, "a": {"w1": jnp.ones((40, 40)) * 2}}
    found = allocate(None, params, choices=INT, sensitivity="weight", budget={"code_bits": 5})
    assert jc.nbytes(jc.compress(params, found.rules)) == found.bytes
    for pattern in found.rules:
        assert sum(bool(glob(pattern).fullmatch(p)) for p in ("[a]*/w?", "a/w1")) == 1


def test_reports():
    params, batches = problem()
    table = sensitivities(apply, params, batches, choices=INT)
    found = table.allocate({"bits": 6.0})
    text = json.loads(json.dumps(found.as_json()))
    assert [row["path"] for row in text["rows"]] == ["a/kernel", "b/kernel"]
    assert sum(row["bytes"] for row in text["rows"]) + 4 * 48 == text["bytes"]
    assert sum(row["error"] for row in text["rows"]) == pytest.approx(text["error"])
    assert len(json.loads(json.dumps(table.as_json()))) == 6
    for shown in (str(found), str(table), found._repr_html_()):
        assert "a/kernel" in shown


def test_a_curve_with_measurements(tmp_path):
    params, batches = problem()
    table = sensitivities(apply, params, batches, choices=INT)
    y = apply(params, batches[0])

    def measure(found):
        small = jc.compress(params, found.rules)
        return jnp.mean((jc.compressed(apply)(small, batches[0]) - y) ** 2)

    curve = budget_curve(table, [3.0, 3.01, 9.0], measure=measure)
    assert curve.rows[0]["measured"] == curve.rows[1]["measured"] > curve.rows[2]["measured"] > 0
    assert "measured" in str(curve)
    draw_budget(curve, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(jc.CompressError):
        draw_budget(curve, tmp_path / "curve.nothing")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sensitivity": "best"}, "write one of output"),
        ({"choices": []}, "write specs"),
        ({"choices": [8]}, "write specs"),
        ({"sensitivity": "hessian"}, "draws probes"),
        ({"sensitivity": "hessian", "key": jax.random.key(0), "probes": 0}, "probes=0"),
        ({"min_size": 10**9}, "lower min_size"),
        ({"leaves": "a/*", "choices": {"**": INT}}, "leave out `leaves`"),
        ({"sensitivity": lambda *_: float("nan")}, "a/kernel: the error of .* is nan"),
        ({"budget": {"watts": 3}}, "'watts' is none of bytes, bits, code_bits"),
        ({"budget": {}}, "budget is empty"),
        ({"budget": {"bits": True}}, "write a number"),
        ({"budget": 100}, "bytes=100 is below the least possible"),
    ],
)
def test_refused(options, message):
    params, batches = problem()
    with pytest.raises(SpecError, match=message):
        allocate(apply, params, batches, **{"choices": INT, "budget": {"bits": 8}, **options})


def test_refused_without_what_is_needed():
    params, batches = problem()
    with pytest.raises(SpecError, match="needs fn and batches"):
        sensitivities(None, params, choices=INT)
    with pytest.raises(SpecError, match="fn is None"):
        sensitivities(None, params, batches, choices=INT, sensitivity="end_to_end")
    with pytest.raises(SpecError, match="batches is empty"):
        sensitivities(apply, params, choices=INT, sensitivity="end_to_end")
    with pytest.raises(RuleError, match="matches no leaf"):
        sensitivities(apply, params, batches, choices=INT, leaves="c/*")
    with pytest.raises(RuleError, match="axes names 'c'"):
        sensitivities(apply, params, batches, choices=INT, axes={"c": jc.KernelAxes((-2,), (-1,))})
    with pytest.raises(SpecError, match="no dense weights to choose for"):
        sensitivities(apply, jc.compress(params, {"a/kernel": INT[0]}), batches, choices=INT)


def test_the_chosen_bits_beat_the_same_bits_everywhere():
    # One layer meets inputs of great size in few directions, the other is harmless.
    params, batches = problem(1)
    params = {**params, "b": {"kernel": params["b"]["kernel"].at[0].mul(30.0)}}
    specs = [jc.Quantize(f"int{b}") for b in (3, 4, 5, 8)]
    found = allocate(
        apply, params, batches, choices=specs, sensitivity="end_to_end", budget={"code_bits": 4}
    )
    y = apply(params, batches[0])
    error = lambda rules: float(
        optax.losses.squared_error(
            jc.compressed(apply)(jc.compress(params, rules), batches[0]), y
        ).sum()
    )
    assert found.code_bits <= 4
    assert error(found.rules) < error({"*/kernel": jc.Quantize("int4")})
