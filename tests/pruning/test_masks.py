"""Patterns, masks of a tree and budgets, against numpy and torch."""

import functools
import itertools

import eight_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_select import reference_mask

import jaxcompress as jc
from jaxcompress import KernelAxes
from jaxcompress import pruning as P
from jaxcompress.pruning.allocation import lamp
from jaxcompress.pruning.patterns import lay
from jaxcompress.pruning.select import n_of_m_mask, top_mask

AXES = {
    (6, 10): KernelAxes((-2,), (-1,)),
    (3, 2, 5, 7): KernelAxes((-4, -3, -2), (-1,)),
    (8, 4, 6): KernelAxes((-3,), (-2, -1)),
    (4, 6, 9): KernelAxes((-3, -2), (-1,)),
}


def boxes(pattern, shape):
    """All places of each unit, in the order of the units, written out place by place."""
    units = {}
    axes = AXES[shape]
    for place in itertools.product(*map(range, shape)):
        if pattern == "filter":
            key = (place[max(axes.output)],)
        elif pattern == "channel":
            key = (place[max(axes.input)],)
        elif pattern == "vector":
            key = tuple(place[a] for a in axes.input)
        elif pattern == "head":
            key = (place[{(8, 4, 6): 1, (4, 6, 9): 0}[shape]],)
        elif pattern == "layer":
            key = ()
        else:
            i, o = max(axes.input), max(axes.output)
            at = [*place]
            at[i], at[o] = at[i] // 2, at[o] // 3
            key = tuple(at)
        units.setdefault(key, []).append(place)
    return [units[key] for key in sorted(units)]


CASES = [
    (pattern, shape)
    for shape in AXES
    for pattern in ("filter", "channel", "vector", "layer", "block:2x3", "head")
    if pattern != "head" or len(shape) == 3
]


@pytest.mark.parametrize(("pattern", "shape"), CASES)
def test_units_are_those_written_out(pattern, shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    laid = lay(pattern, shape, AXES[shape])
    units = boxes(pattern, shape)
    means = [np.mean([abs(x[p]) for p in unit], dtype=np.float64) for unit in units]
    # A sum of at most 210 float32 values below 5.
    np.testing.assert_allclose(np.ravel(laid.pooled(jnp.asarray(x))), means, rtol=210 * 2**-24)
    kept = np.zeros(len(units), bool)
    kept[:: 2 if len(units) > 1 else 1] = True
    mask = laid.spread(jnp.asarray(kept.reshape(laid.units(shape))), shape)
    for unit, stays in zip(units, kept):
        assert {bool(mask[p]) for p in unit} == {bool(stays)}


def test_masks_of_torch_for_whole_filters():
    torch = pytest.importorskip("torch")
    from torch.nn.utils import prune

    w = np.random.default_rng(0).normal(size=(3, 3, 4, 10)).astype(np.float32)
    for norm in (1, 2):
        conv = torch.nn.Conv2d(4, 10, 3)
        conv.weight.data = torch.tensor(w.transpose(3, 2, 0, 1).copy())
        prune.ln_structured(conv, "weight", amount=4, n=norm, dim=0)
        theirs = conv.weight_mask.numpy().transpose(2, 3, 1, 0).astype(bool)
        params = {"conv": {"kernel": jnp.asarray(w)}}
        scores = P.scores.filter_norm(params, p=norm)
        masks = P.make_masks(scores, 0.4, {"**/kernel": "filter"})
        np.testing.assert_array_equal(masks["conv"]["kernel"], theirs)


signed_mask = jax.jit(functools.partial(top_mask, signed=True))


@settings(max_examples=40)
@given(st.integers(0, 2**31 - 1), st.integers(0, 30), st.booleans())
def test_signed_ranks_are_those_of_a_stable_sort(seed, k, ties):
    rng = np.random.default_rng(seed)
    x = (
        rng.integers(-3, 3, 30).astype(np.float32)
        if ties
        else rng.normal(size=30).astype(np.float32)
    )
    x[rng.integers(0, 30, 3)] = rng.choice(
        np.array([-np.inf, np.inf, 1e-42, -1e-42, 0.0, -0.0], np.float32), 3
    )
    found = np.asarray(signed_mask(x, np.uint32(k)))
    order = sorted(range(30), key=lambda i: (-x[i], i))
    expected = np.zeros(30, bool)
    expected[order[:k]] = True
    np.testing.assert_array_equal(found, expected)


def test_signed_n_of_m():
    x = jnp.array([-1.0, -2.0, -3.0, -4.0, 5.0, -9.0, jnp.nan, 6.0, -jnp.inf])
    assert n_of_m_mask(x, 2, 4, -1, signed=True).tolist() == [
        True, True, False, False, False, False, True, True, True,
    ]  # fmt: skip


def test_lamp_is_its_formula():
    x = np.random.default_rng(0).normal(size=(6, 9)).astype(np.float32)
    x[0, :3] = x[1, 1]  # ties: by the lowest index, which comes last in the sum
    flat = np.abs(x.ravel()).astype(np.float64)
    order = sorted(range(54), key=lambda i: (flat[i], -i))
    expected = np.zeros(54)
    for n, i in enumerate(order):
        expected[i] = flat[i] ** 2 / sum(flat[j] ** 2 for j in order[n:])
    # A running sum of 54 float32 terms.
    np.testing.assert_allclose(np.ravel(lamp(jnp.asarray(x))), expected, rtol=54 * 2**-23)
    huge = lamp(jnp.asarray(x) * 1e30)
    np.testing.assert_allclose(np.ravel(huge), expected, rtol=54 * 2**-23)
    assert lamp(jnp.zeros((0, 3))).shape == (0, 3)
    assert not np.any(lamp(jnp.zeros(4)))


def test_lamp_keeps_the_order_of_many():
    x = jax.random.normal(jax.random.key(0), (200_000,))
    order = np.lexsort((-np.arange(200_000), np.abs(np.asarray(x))))
    assert np.all(np.diff(np.asarray(lamp(x))[order]) >= 0)


def test_bytes_of_stacks_are_those_of_the_fullest_layer():
    scale = jnp.array([1.0, 3.0, 9.0])[:, None, None]
    params = {"kernel": scale * jax.random.normal(jax.random.key(0), (3, 16, 8))}
    rules = {"kernel": "unstructured"}
    masks = P.make_masks(P.scores.magnitude(params), 0.9, rules, scope="global")
    stored = jc.Prune()(P.apply_masks(params, masks)["kernel"])
    assert P.sparse_bytes(params, masks) == stored.nbytes


def test_masks_under_lamp_are_a_global_threshold_on_its_scores():
    rng = np.random.default_rng(3)
    scores = {"a": rng.normal(size=(6, 9)), "b": 100 * rng.normal(size=(5, 4))}
    scores = {k: {"kernel": jnp.asarray(np.abs(v), jnp.float32)} for k, v in scores.items()}
    masks = P.make_masks(scores, 0.6, {"**/kernel": "unstructured"}, allocation="lamp")
    joined = np.concatenate([np.ravel(lamp(scores[k]["kernel"])) for k in "ab"])
    expected = reference_mask(joined, P.kept_count(74, 0.6))
    found = np.concatenate([np.ravel(masks[k]["kernel"]) for k in "ab"])
    np.testing.assert_array_equal(found, expected)


@settings(max_examples=12)
@given(
    st.floats(0, 1),
    st.sampled_from(["local", "global"]),
    st.sampled_from(["unstructured", "filter", "block:2x2"]),
    st.integers(0, 2**31 - 1),
)
def test_exactly_as_many_units_stay(sparsity, scope, pattern, seed):
    rng = np.random.default_rng(seed)
    shapes = {"a": (6, 9), "s": (2, 5, 4)}
    scores = {
        k: {"kernel": jnp.asarray(rng.normal(size=v), jnp.float32)} for k, v in shapes.items()
    }
    masks = P.make_masks(scores, sparsity, {"**/kernel": pattern}, scope=scope)
    sizes = {"unstructured": (1, 1), "filter": (99, 1), "block:2x2": (2, 2)}[pattern]
    units, kept = [], []
    for k, shape in shapes.items():
        mask = np.asarray(masks[k]["kernel"]).reshape(-1, *shape[-2:])
        first = mask[:, :: sizes[0], :: sizes[1]]
        units += [first[0].size] * len(mask)
        kept += list(first.sum((1, 2)))
    if scope == "global":
        assert sum(kept) == P.kept_count(sum(units), sparsity)
    else:
        assert kept == [P.kept_count(n, sparsity) for n in units]


def test_budgets_are_met_and_nearly_used():
    key = jax.random.key(0)
    params = {
        "conv": {"kernel": jax.random.normal(key, (3, 3, 4, 8))},
        "out": {"kernel": jax.random.normal(key, (128, 10)), "bias": jnp.zeros(10)},
    }

    def network(params, x):
        x = jax.lax.conv_general_dilated(
            x, params["conv"]["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return x.reshape(len(x), -1) @ params["out"]["kernel"] + params["out"]["bias"]

    scores = P.scores.magnitude(params)
    at = lambda s: P.make_masks(scores, s, {"**/kernel": "unstructured"}, scope="global")
    masks = P.fit_masks(at, P.count_kept, 500)
    assert P.count_kept(masks) == 500
    pruned = P.apply_masks(params, masks)
    small = jc.compress(pruned, {"**/kernel": jc.Prune()})
    stored = sum(small[k]["kernel"].nbytes for k in ("conv", "out"))
    assert P.sparse_bytes(params, masks) == stored
    masks = P.fit_masks(at, lambda m: P.sparse_bytes(params, m), 2_000, steps=12)
    assert 1_980 < P.sparse_bytes(params, masks) <= 2_000
    stats = jc.observe(network, params, [jnp.ones((6, 8, 8, 4))], ("abs_max",))
    dense = P.multiplications(at(0.0), stats, examples=6)
    assert dense == 16 * 288 + 1280  # 4 x 4 places, and one product
    masks = P.fit_masks(at, lambda m: P.multiplications(m, stats, 6), dense / 2, steps=12)
    assert dense / 2 - 16 <= P.multiplications(masks, stats, 6) <= dense / 2
    with pytest.raises(jc.SpecError, match="budget=-1: 0 is left when all is removed"):
        P.fit_masks(at, P.count_kept, -1)


@pytest.mark.thin(4)
@pytest.mark.parametrize("pattern", [None, "block:4x3", "vector", "channel", "filter", "2:4@-1"])
def test_prune_in_units_stores_what_stays(pattern):
    w = jax.random.normal(jax.random.key(0), (2, 6, 10))
    leaf = jc.Prune(0.5, pattern=pattern)(w)
    dense = np.asarray(leaf.materialize())
    assert leaf.batch_ndim == 1
    for layer, original in zip(dense, np.asarray(w)):
        mask = layer != 0
        np.testing.assert_array_equal(layer, np.where(mask, original, 0))
        if pattern == "2:4@-1":
            groups = np.pad(mask, ((0, 0), (0, 2))).reshape(6, 3, 4).sum(-1)
            assert groups.tolist() == [[2, 2, 2]] * 6
            continue
        laid = lay(pattern or "unstructured", (6, 10), KernelAxes((-2,), (-1,)))
        units = np.asarray(laid.pooled(jnp.asarray(original)))
        expected = reference_mask(units, P.kept_count(units.size, 0.5))
        np.testing.assert_array_equal(mask, laid.spread(jnp.asarray(expected), (6, 10)))


def test_wanda_compares_within_each_output():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(2, 12, 5)).astype(np.float32)
    x = rng.normal(size=(2, 40, 12)).astype(np.float32) * np.arange(1, 13, dtype=np.float32)
    fn = lambda params, x: jnp.einsum("lbi,lio->lbo", x, params["kernel"])
    params = {"kernel": jnp.asarray(w)}
    for names in (("gram",), ("second_moment",)):
        stats = jc.observe(fn, params, [x], names)
        small = jc.compress(params, {"kernel": jc.Prune(0.5, score="wanda")}, stats=stats)
        found = np.asarray(small["kernel"].materialize()) != 0
        scores = np.abs(w) * np.linalg.norm(x, axis=1)[:, :, None]
        for layer in range(2):
            for o in range(5):
                expected = reference_mask(scores[layer, :, o], 6)
                np.testing.assert_array_equal(found[layer, :, o], expected)
    with pytest.raises(jc.SpecError, match="kernel: the score 'wanda' looks at the inputs"):
        jc.compress(params, {"kernel": jc.Prune(0.5, score="wanda")})
    with pytest.raises(jc.RuleError, match="stats are of 'kernel', which is no leaf"):
        jc.compress({"w": params["kernel"]}, {"w": jc.Prune(0.5)}, stats=stats)
    other = {"kernel": jnp.ones((2, 4, 5))}
    with pytest.raises(jc.SpecError, match="the statistics are of 12 inputs and the weight has 4"):
        jc.compress(other, {"kernel": jc.Prune(0.5, score="wanda")}, stats=stats)
    spec = jc.Prune(0.5, pattern="channel", score="wanda")
    found = jc.compress(params, {"kernel": spec}, stats=stats)["kernel"].materialize()
    expected = [reference_mask(layer.mean(1), 6) for layer in scores]
    np.testing.assert_array_equal(np.any(found != 0, axis=2), expected)
    random = jc.compress(params, {"kernel": jc.Prune(0.5, score="random")}, key=jax.random.key(0))
    assert random["kernel"].kept == 30
    with pytest.raises(jc.SpecError, match="'random' draws: write compress"):
        jc.compress(params, {"kernel": jc.Prune(0.5, score="random")})


def test_schedules_are_their_formulas():
    steps = np.arange(0, 130)
    at = lambda s: np.array([float(s.sparsity(int(t))) for t in steps])
    way = np.clip((steps - 10) / 90, 0, 1)
    expected = np.where(steps < 10, 0, 1 - 0.9 * (0.05 / 0.9) ** way)
    found = at(P.exponential_schedule(0.95, begin=10, end=100, initial=0.1))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    rounds = np.clip((steps - 10) // 25 + 1, 0, 4)
    expected = np.where(steps < 10, 0, 1 - 0.2 ** (rounds / 4))
    schedule = P.iterative_schedule(0.8, rounds=4, every=25, begin=10)
    np.testing.assert_allclose(at(schedule), expected, atol=1e-6)
    assert [t for t in steps if bool(schedule.refreshes(int(t)))] == [10, 35, 60, 85]


def test_a_picture_names_every_leaf(tmp_path):
    report = P.sparsity_report({"a": {"kernel": jnp.eye(3)}, "b": jnp.ones(4)})
    P.draw_sparsity(report, tmp_path / "s.svg", schedule=P.periodic(0.5, every=10), step=25)
    text = (tmp_path / "s.svg").read_text()
    assert "<svg" in text
    with pytest.raises(jc.CompressError, match=r"s\.what"):
        P.draw_sparsity(report, tmp_path / "s.what")


def test_bad_input():
    with pytest.raises(jc.SpecError, match=r"sparsity=1\.5: write the share"):
        P.make_masks({"w": jnp.ones(3)}, 1.5, {"w": "unstructured"})
    with pytest.raises(jc.SpecError, match="'2:4@1': write a negative axis"):
        lay("2:4@1", (4, 4), KernelAxes((-2,), (-1,)))
    with pytest.raises(jc.SpecError, match="'block:0x4': write one of"):
        lay("block:0x4", (4, 4), KernelAxes((-2,), (-1,)))
    with pytest.raises(jc.SpecError, match="pattern='rows': write one of"):
        jc.Prune(0.5, pattern="rows")
    with pytest.raises(jc.SpecError, match="leaf: 'head' needs a kernel"):
        jc.Prune(0.5, pattern="head")(jnp.ones((4, 4)))
    with pytest.raises(jc.SpecError, match="write 'block:2x1'"):
        jc.Prune(0.5, pattern="block:2x2")(jnp.ones(4))


SHARDED = """
import sys
import jax, jax.numpy as jnp, numpy as np, jaxcompress as jc
from jax.sharding import AxisType, NamedSharding, PartitionSpec

mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(getattr(AxisType, sys.argv[1]),) * 2)
w = jax.random.normal(jax.random.key(0), (16, 32))
x = jax.random.normal(jax.random.key(1), (64, 16)) * jnp.arange(1, 17)
stats = jc.observe(lambda params, x: x @ params["kernel"], {"kernel": w}, [x], ("gram",))
for spec in (
    jc.Prune(0.5, score="wanda"),
    jc.Prune(0.5, pattern="filter"),
    jc.SparseGPT(0.5),
    jc.SparseGPT(0.5, pattern="2:4", quantize="int4", group_size=8),
):
    one = jc.compress({"kernel": w}, {"kernel": spec}, stats=stats)["kernel"]
    spread = jax.device_put(w, NamedSharding(mesh, PartitionSpec("x", "y")))
    many = jc.compress({"kernel": spread}, {"kernel": spec}, stats=stats)["kernel"]
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many)):
        np.testing.assert_array_equal(a, b)
        assert len(b.sharding.device_set) == 8
"""


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
def test_specs_with_statistics_on_a_mesh(axes):
    eight_devices.run(SHARDED, axes)
