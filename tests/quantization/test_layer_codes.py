"""Codes in the metric of a layer's outputs, against published loops, brute force and RTN."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress import SpecError
from jaxcompress.quantization.solvers import adaround, awq, gptq, hqq, obq, signround, spqr

INT4 = jc.Quantize("int4", group_size=8, scale_dtype="float32")
UINT3 = jc.Quantize("uint3", group_size=8, symmetric=False, scale_dtype="float32")
SOLVERS = {
    "gptq": gptq,
    "act_order": lambda *a: gptq(*a, act_order=True),
    "obq": obq,
    "awq": lambda *a: awq(*a)[0],
    "adaround": lambda *a: adaround(*a, steps=200),
    "signround": lambda *a: signround(*a, steps=50),
    "spqr": lambda *a: spqr(*a, outliers=0.03),
}


def problem(k=24, n=6, samples=200, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, k)) * rng.uniform(0.5, 2, k) + rng.normal(size=(samples, 1))
    return rng.normal(size=(k, n)).astype(np.float32), (x.T @ x).astype(np.float32)


def error_of(w, values, gram):
    d = np.asarray(w, np.float64) - np.asarray(values, np.float64)
    return float(np.trace(d.T @ np.asarray(gram, np.float64) @ d))


def numpy_scales(w, spec):
    """`[1, N]` scales and zero points of rows that share them."""
    if spec.symmetric:
        return np.abs(w).max(axis=0) / 7, np.zeros(w.shape[1])
    low, high = np.minimum(w.min(axis=0), 0), np.maximum(w.max(axis=0), 0)
    scale = (high - low) / 7
    return scale, np.clip(np.round(-low / scale), 0, 7)


def numpy_round(w, scale, zero, spec):
    low, high = (-7, 7) if spec.symmetric else (0, 7)
    codes = np.clip(np.round(w / scale) + zero, low, high)
    return codes, (codes - zero) * scale


def published(w, gram, spec, *, block, damping, act_order=False, group=8):
    """`fasterquant` of github.com/IST-DASLab/gptq in float64, on `[N, K]`, static groups if ordered."""
    w, h = np.asarray(w.T, np.float64), np.asarray(gram, np.float64)
    k = len(h)
    groups = [numpy_scales(w[:, g : g + group].T, spec) for g in range(0, k, group)]
    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(k)
    w, h = w[:, order].copy(), h[order][:, order]
    h = h + damping * np.mean(np.diag(h)) * np.eye(k)
    hinv = np.linalg.cholesky(np.linalg.inv(h)).T
    codes, values = np.zeros_like(w), np.zeros_like(w)
    for i1 in range(0, k, block):
        i2 = min(i1 + block, k)
        w1, hinv1, err1 = w[:, i1:i2].copy(), hinv[i1:i2, i1:i2], np.zeros((len(w), i2 - i1))
        for i in range(i2 - i1):
            if act_order:
                scale, zero = groups[order[i1 + i] // group]
            elif (i1 + i) % group == 0:
                scale, zero = numpy_scales(w1[:, i : i + group].T, spec)
            codes[:, i1 + i], q = numpy_round(w1[:, i], scale, zero, spec)
            values[:, i1 + i] = q
            err = (w1[:, i] - q) / hinv1[i, i]
            w1[:, i:] -= np.outer(err, hinv1[i, i:])
            err1[:, i] = err
        w[:, i2:] -= err1 @ hinv[i1:i2, i2:]
    back = np.argsort(order)
    return codes[:, back].T, values[:, back].T


@pytest.mark.parametrize("spec", [INT4, UINT3], ids=["int4", "uint3"])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_is_the_published_loop(spec, act_order):
    w, gram = problem(32, 12)
    options = {"damping": 0.01, "act_order": act_order}
    found = gptq(jnp.asarray(w), jnp.asarray(gram), spec, block_size=16, **options)
    codes, values = published(w, gram, spec, block=16, **options)
    # Float32 moves a weight by K eps cond, some 1e-4 of a step: no code lies that near to a tie.
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_allclose(found.weight, values, atol=1e-3)
    assert float(found.error) == pytest.approx(error_of(w, found.weight, gram), rel=1e-4)


@pytest.mark.parametrize(("group", "act_order"), [(8, False), (64, False), (8, True)])
@pytest.mark.slow
def test_pieces_of_a_block_change_nothing(group, act_order):
    """Groups within and beyond the 32 rows that are done one by one, of blocks of 64."""
    w, gram = problem(128, 6, samples=1000)
    spec = jc.Quantize("int4", group_size=group, scale_dtype="float32")
    options = {"damping": 0.01, "act_order": act_order}
    found = gptq(jnp.asarray(w), jnp.asarray(gram), spec, block_size=64, **options)
    codes, _ = published(w, gram, spec, block=64, group=group, **options)
    # Of 768 values 1e-4 of a step off, a few percent of a code may lie at a tie and move others.
    assert np.mean(np.asarray(found.codes) == codes) > 0.97


def best_of_all(w, gram, scale, codes=range(-7, 8)):
    choices = np.array(list(itertools.product(codes, repeat=len(w)))) * scale
    d = w - choices
    return np.min(np.einsum("ci,ij,cj->c", d, gram.astype(np.float64), d))


@pytest.mark.parametrize("name", ["gptq", "act_order", "obq"])
def test_against_all_choices(name):
    spec, ratios, plain = jc.Quantize("int4", scale_dtype="float32"), [], []
    for seed in range(6):
        w, gram = problem(4, 1, seed=seed)
        best = best_of_all(w[:, 0], gram, np.abs(w).max() / 7)
        found = SOLVERS[name](jnp.asarray(w), jnp.asarray(gram), spec)
        assert float(found.error) >= best * (1 - 1e-3)
        ratios.append(float(found.error))
        plain.append(error_of(w, spec(jnp.asarray(w)).materialize(), gram))
    assert np.mean(ratios) <= np.mean(plain)


@pytest.mark.parametrize("name", ["adaround", "signround"])
def test_against_all_choices_of_up_and_down(name):
    """Two thirds of the way from rounding to nearest to the best of the 256 choices, and more."""
    spec, w, gram = jc.Quantize("int4", scale_dtype="float32"), *problem(8, 12)
    found = SOLVERS[name](jnp.asarray(w), jnp.asarray(gram), spec)
    scale, best = np.abs(w).max(axis=0) / 7, 0.0
    for column, s in zip(w.T, scale):
        floor = np.floor(column / s)
        choices = (floor + np.array(list(itertools.product((0, 1), repeat=8)))) * s
        choices = choices[(np.abs(choices) <= 7.5 * s).all(axis=1)]
        d = column - choices
        best += np.min(np.einsum("ci,ij,cj->c", d, gram.astype(np.float64), d))
    plain = error_of(w, spec(jnp.asarray(w)).materialize(), gram)
    share = {"adaround": 2 / 3, "signround": 1 / 3}[name]
    assert best * (1 - 1e-3) <= float(found.error) <= plain - share * (plain - best)


def test_one_and_two_inputs():
    """One input: nothing can make up for anything. Two of which one is rounded: done by hand."""
    w, gram = problem(1, 5)
    spec = jc.Quantize("int4", scale_dtype="float32")
    for solve in (gptq, obq):
        np.testing.assert_array_equal(solve(w, gram, spec).codes, np.sign(w) * 7)
    # d1 = 0.4 is rounded to 0; without damping the other becomes 5.2 + 0.8 * 0.4 = 5.52, so 6.
    w, gram = jnp.array([[0.4], [5.2], [7.0]]), np.eye(3, dtype=np.float32)
    gram[0, 1] = gram[1, 0] = 0.8
    assert gptq(w, gram, spec, damping=0.0).codes[:, 0].tolist() == [0, 6, 7]
    # OBQ begins with 7 (free), then 5.2 (0.2 off, 0.4 the other): 0.4 + 0.8 * 0.2 = 0.56, so 1.
    assert obq(w, gram, spec, damping=0.0).codes[:, 0].tolist() == [1, 5, 7]


SLOW_UINT3 = [INT4, pytest.param(UINT3, marks=pytest.mark.slow)]


@pytest.mark.thin(4)
@pytest.mark.parametrize("name", list(SOLVERS))
@pytest.mark.parametrize("spec", SLOW_UINT3, ids=["int4", "uint3"])
def test_better_than_nearest_and_what_the_codes_say(name, spec):
    w, gram = map(jnp.asarray, problem(32, 12))
    found = SOLVERS[name](w, gram, spec)
    assert float(found.error) < error_of(w, spec(w).materialize(), gram)
    assert float(found.error) == pytest.approx(error_of(w, found.weight, gram), rel=1e-3)
    if name in ("awq", "spqr"):
        return
    leaf = jc.QuantizedArray.from_codes(
        found.codes, found.scale, found.zero_point, spec.format, -2, 8, w.dtype
    )
    np.testing.assert_array_equal(leaf.materialize(), found.weight)


SLOW_BUT_TWO = [
    pytest.param(name, marks=() if name in ("gptq", "adaround") else pytest.mark.slow)
    for name in SOLVERS
]


@pytest.mark.parametrize("name", SLOW_BUT_TWO)
def test_zeros_dead_inputs_and_singular_matrices(name):
    w, gram = problem(16, 12, samples=4)  # of rank 4
    gram[3], gram[:, 3] = 0, 0
    w[5:7, :4] = 0
    found = SOLVERS[name](jnp.asarray(w), jnp.asarray(gram), INT4)
    weight = np.asarray(found.weight)
    assert np.isfinite(weight).all()
    assert np.isfinite(float(found.error))
    assert not weight[5:7, :4].any()
    # Nothing is known of the fourth input, so its weights are the nearest of their groups' grid.
    step = np.float32(found.scale).reshape(2, 12)[0]
    assert weight[3].any()
    assert np.all(np.abs(weight[3] - w[3]) <= step / 2 * (1 + 1e-6))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["gptq", "act_order", "adaround", "awq", "spqr"])
@pytest.mark.slow
def test_stacks_and_narrow_dtypes(name, dtype):
    both = [problem(16, 12, seed=s) for s in (1, 2)]
    w = jnp.stack([jnp.asarray(w) for w, _ in both]).astype(dtype)
    gram = jnp.stack([jnp.asarray(g) for _, g in both])
    found = SOLVERS[name](w, gram, INT4)
    assert found.weight.dtype == dtype
    for i in range(2):
        one = SOLVERS[name](w[i], gram[i], INT4)
        np.testing.assert_array_equal(found.codes[i], one.codes)
        np.testing.assert_array_equal(found.weight[i], one.weight)


def test_narrower_ranges_are_never_worse_for_the_group():
    w, gram = map(jnp.asarray, problem(32, 12))
    diagonal = jnp.diag(jnp.diag(gram))  # inputs that are independent: the search is exact
    plain, searched = (gptq(w, diagonal, INT4, tries=t) for t in (0, 20))
    assert float(searched.error) < float(plain.error)
    # By brute force: for each group and column the best of the same 21 ranges.
    shares, total = 1 - 0.7 * np.arange(21) / 20, 0.0
    for g in range(0, 32, 8):
        rows, weights = np.asarray(w[g : g + 8], np.float64), np.diag(gram)[g : g + 8, None]
        errors = []
        for share in shares:
            scale = np.abs(rows * share).max(axis=0) / 7
            gap = rows - np.clip(np.round(rows / scale), -7, 7) * scale
            errors.append((weights * gap**2).sum(axis=0))
        total += np.min(errors, axis=0).sum()
    assert float(searched.error) == pytest.approx(total, rel=1e-3)


def test_awq_is_the_best_of_its_grid():
    w, gram = problem(16, 12)
    gram = gram * np.outer(*(2 * [np.geomspace(0.1, 10, 16)]))
    magnitude = np.sqrt(np.diag(gram))
    found, inverse = awq(jnp.asarray(w), jnp.asarray(gram), INT4, jnp.asarray(magnitude))
    errors = []
    for j in range(20):
        s = magnitude.astype(np.float64) ** (j / 20)
        s = s / np.sqrt(s.max() * s.min())
        scaled = s[:, None] * w
        values = np.zeros_like(scaled)
        for g in (0, 8):
            part = scaled[g : g + 8]
            values[g : g + 8] = numpy_round(part, *numpy_scales(part, INT4), INT4)[1]
        errors.append(error_of(w, values / s[:, None], gram))
    assert float(found.error) == pytest.approx(min(errors), rel=1e-2)
    assert np.argmin(errors) > 0
    s = magnitude ** (np.argmin(errors) / 20)
    np.testing.assert_allclose(inverse, np.sqrt(s.max() * s.min()) / s, rtol=1e-5)


def test_outliers_are_exact_in_number_and_beside_the_codes():
    w, gram = problem(32, 12)
    w[3, 2] = 40.0
    found = spqr(jnp.asarray(w), jnp.asarray(gram), INT4, outliers=0.02)
    mask = np.asarray(found.mask)
    assert mask.sum() == round(0.02 * 32 * 12)
    assert mask[3, 2]  # which would cost its whole group
    assert not np.asarray(found.codes)[mask].any()
    assert float(found.error) < float(gptq(jnp.asarray(w), jnp.asarray(gram), INT4).error) / 2


@pytest.mark.slow
@settings(max_examples=20)
@given(st.booleans(), st.integers(0, 99), st.sampled_from(["int3", "uint4"]), st.booleans())
def test_hqq_never_has_more_of_its_error(grouped, seed, format, heavy):
    rng = np.random.default_rng(seed)
    w = rng.standard_t(2, (20, 3)) if heavy else rng.normal(size=(20, 3))
    w = jnp.asarray(w, jnp.float32).at[4].set(0.0)
    spec = jc.Quantize(
        format, group_size=8 if grouped else None, symmetric=format[0] == "i", axis=(-2,)
    )
    scheme = spec.scheme
    plain, found = (
        scheme.values(scheme.codes(w, *p), *p, jnp.float32)
        for p in (scheme.scales(w), hqq(w, scheme))
    )
    norm = lambda x: float(jnp.sum(jnp.abs(w - x) ** 0.7))
    assert norm(found) <= norm(plain) * (1 + 1e-5)
    assert not np.asarray(found[4]).any()  # zero stays exact


def test_hqq_finds_a_grid_beside_an_outlier():
    """Codes of a grid and one weight beyond it: the grid is found, which plain rounding misses."""
    codes = np.array([-3, -2, -1, 0, 1, 2, 3, 3, -3, 1, 2, -1] * 4)
    w = jnp.asarray(np.append(codes, 3.4)[:, None], jnp.float32)
    scheme = jc.Quantize("int3", axis=(-2,), scale_dtype="float32").scheme
    assert float(scheme.scales(w)[0][0, 0]) == pytest.approx(3.4 / 3)
    # One error of 0.4 in 49 weights moves the fit by 3 * 0.4 / sum(codes**2) = 0.6% at most.
    assert float(hqq(w, scheme)[0][0, 0]) == pytest.approx(1.0, abs=0.006)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda w, g: gptq(w, g, None), "gptq: quantize=None: write such as"),
        (lambda w, g: gptq(w, g, "int4"), "write such as jc.Quantize"),
        (lambda w, g: gptq(w, g, jc.FakeQuantize("int4")), "write such as jc.Quantize"),
        (lambda w, g: gptq(w, g, jc.Quantize("int4", axis=0)), "leave out axis"),
        (lambda w, g: gptq(w, g, jc.Quantize("nvfp4")), "scale_format"),
        (lambda w, g: gptq(w, g, jc.Quantize("int4", group_size=(8, 8))), "write group_size=8"),
        (lambda w, g: gptq(w, g[:2], INT4), "do not fit"),
        (lambda w, g: gptq(w, g * jnp.inf, INT4), "NaN or beyond float32"),
        (lambda w, g: gptq(w, g, INT4, damping=-1), "share of the mean diagonal"),
        (lambda w, g: gptq(w, g, INT4, tries=-1), "how many narrower ranges"),
        (lambda w, g: gptq(w, g, INT4, act_order=1), "write True or False"),
        (lambda w, g: gptq(w, g, INT4, block_size=0), "at least 1"),
        (lambda w, g: spqr(w, g, INT4, outliers=2), "share of weights to keep"),
        (lambda w, g: awq(w, g, INT4, jnp.ones(2)), r"need \(4,\)"),
        (lambda w, g: awq(w, g, INT4, steps=0), "how many exponents"),
        (lambda w, g: adaround(w, g, INT4, steps=0), "steps=0"),
        (lambda w, g: adaround(w, g, INT4, strength=-1), "strength=-1"),
        (lambda w, g: adaround(w, g, jc.Quantize("nf4")), "nf4"),
        (lambda w, g: signround(w, g, INT4, learning_rate=0), "learning_rate=0"),
        (lambda w, g: hqq(w, jc.Quantize("int4", axis=(-2,)).scheme, norm=0), "norm=0"),
    ],
)
def test_what_is_refused(call, text):
    with pytest.raises(SpecError, match=text):
        call(jnp.ones((4, 2)), jnp.eye(4))


@pytest.mark.parametrize("name", list(SOLVERS))
def test_weights_that_there_are_none_of(name):
    found = SOLVERS[name](jnp.zeros((3, 0)), jnp.eye(3), INT4)
    assert found.codes.shape == (3, 0)
    assert found.scale.shape == (1, 0)


def test_nothing_depends_on_the_scale_of_inputs_and_weights():
    w, gram = map(jnp.asarray, problem(16, 4))
    plain = gptq(w, gram, INT4)
    for factor in (2.0**-60, 2.0**60):
        np.testing.assert_array_equal(gptq(w, gram * factor, INT4).codes, plain.codes)
        np.testing.assert_array_equal(gptq(w * factor, gram, INT4).codes, plain.codes)


@pytest.mark.slow
def test_it_runs_under_jit():
    w, gram = map(jnp.asarray, problem(16, 4))
    traced = jax.jit(lambda w, gram: gptq(w, gram, INT4).codes)(w, gram)
    np.testing.assert_array_equal(traced, gptq(w, gram, INT4).codes)
