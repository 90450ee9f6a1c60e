"""Which weights stay, against sorts of numpy; and the layouts that store them."""

import eight_devices
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcompress as jc
from jaxcompress.arrays.sparse import best_layout, encode
from jaxcompress.pruning.select import (
    has_nan,
    kept_count,
    kth_largest,
    n_of_m_mask,
    top_mask,
    top_masks,
)


def reference_mask(w, k):
    """The k largest magnitudes by a stable sort: ties go to the lowest index."""
    order = np.argsort(-np.abs(w.astype(np.float64)).reshape(-1), kind="stable")
    mask = np.zeros(w.size, bool)
    mask[order[:k]] = True
    return mask.reshape(w.shape)


def few_values(seed, n, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return rng.choice(np.round(rng.normal(size=97), 2), n).astype(dtype)


@pytest.mark.parametrize("k", [0, 1, 500, 50_000, 99_999, 100_000])
def test_top_mask_of_many_ties(k):
    w = few_values(0, 100_000)
    mask = np.asarray(top_mask(jnp.asarray(w), k))
    assert mask.sum() == k
    np.testing.assert_array_equal(mask, reference_mask(w, k))
    if 0 < k < w.size:
        threshold = np.partition(np.abs(w), -k)[-k]
        assert np.abs(w[mask]).min() == threshold
        assert np.abs(w[~mask]).max() <= threshold


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_top_mask_of_every_dtype_with_subnormals_and_signed_zeros(dtype):
    info = ml_dtypes.finfo(dtype)
    tiny = np.array(info.smallest_subnormal, dtype)
    # In steps of the bit pattern: jax on CPU would compute with subnormals as zeros.
    steps = np.arange(40).astype(np.uint32 if info.bits == 32 else np.uint16).view(dtype)
    w = np.concatenate([steps, -steps, [tiny, -tiny, -0.0, 0.0, info.max, info.min]]).astype(dtype)
    w = np.random.default_rng(0).permutation(w)
    for k in (1, 7, 50, 80, 83):
        mask = np.asarray(top_mask(jnp.asarray(w), k))
        np.testing.assert_array_equal(mask, reference_mask(w, k))


@settings(max_examples=40)
@given(
    hnp.arrays(np.float32, st.sampled_from([(4, 6), (2, 3, 4)]),
               elements=st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, -3.0, 2.0**-140, 2.0**127])),
    st.sampled_from([0.0, 0.1, 0.31, 0.5, 0.77, 1.0]),
)  # fmt: skip
def test_top_mask_keeps_exactly_the_rounded_count(w, sparsity):
    k = kept_count(w.size, sparsity)
    assert k == round(w.size * (1 - sparsity))
    mask = np.asarray(top_mask(jnp.asarray(w), k))
    np.testing.assert_array_equal(mask, reference_mask(w, k))


@pytest.mark.thin(8)
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (4, 8), (3, 5), (4, 4), (1, 1)])
@pytest.mark.parametrize("axis", [-1, -2, 0])
def test_n_of_m_against_brute_force(n, m, axis):
    w = few_values(n * m, 3 * 11 * 8).reshape(3, 11, 8)
    moved = np.moveaxis(w, axis, -1)
    expected = np.zeros(moved.shape, bool)
    for row in np.ndindex(moved.shape[:-1]):
        for start in range(0, moved.shape[-1], m):
            group = moved[row][start : start + m]
            expected[row][start : start + m] = reference_mask(group, min(n, len(group)))
    mask = n_of_m_mask(jnp.asarray(w), n, m, axis)
    np.testing.assert_array_equal(np.moveaxis(np.asarray(mask), axis, -1), expected)


def test_n_of_m_tells_subnormals_apart():
    w = jnp.array([1e-40, 2e-40, 3e-40, 0.0], jnp.float32)
    assert n_of_m_mask(w, 2, 4, -1).tolist() == [False, True, True, False]


def gap_entries(mask, bits):
    """Entries by walking over the mask: a value after each gap, an escape per full code."""
    escape, entries, gap = 2**bits - 1, 0, 0
    for kept in mask.reshape(-1):
        gap = gap + 1 if not kept else 0
        if gap == escape:
            entries, gap = entries + 1, 0
        entries += bool(kept)
    # Zeros after the last value need no entry.
    rest = mask.size - 1 - int(np.flatnonzero(mask.reshape(-1))[-1])
    return entries - rest // escape


def sizes(sparsities, fast):
    """Few of them are enough for each change, as each compiles a program."""
    return [s if s in fast else pytest.param(s, marks=pytest.mark.slow) for s in sparsities]


@pytest.mark.thin(4)
@pytest.mark.parametrize("shape", [(64, 100), pytest.param((37, 23), marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "sparsity",
    sizes([0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99], (0.0, 0.4, 0.6, 0.9, 0.99)),
)
def test_the_smaller_of_bit_mask_and_gaps_is_chosen(shape, sparsity):
    w = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    leaf = jc.Prune(sparsity)(jnp.asarray(w))
    kept = round(w.size * (1 - sparsity))
    mask = reference_mask(w, kept)
    # Entries of gaps come in multiples of 64, so that leaves of one shape share a program.
    sizes = [-(-gap_entries(mask, bits) // 64) * 64 * bits // 8 for bits in range(2, 9)]
    assert leaf.nbytes == 4 * kept + min(-(-w.size // 8), *sizes)
    assert leaf.values.shape == (kept,)
    np.testing.assert_array_equal(leaf.materialize(), np.where(mask, w, 0))
    np.testing.assert_array_equal(leaf.mask(), mask)


@pytest.mark.thin(4)
@pytest.mark.parametrize("place", [0, 1, 254, 255, 256, 4095, 99_999])
def test_gaps_longer_than_every_code(place):
    w = jnp.zeros(100_000).at[place].set(2.0)
    leaf = jc.SparseArray.from_mask(w, w != 0)
    assert leaf.layout == "gaps"
    assert leaf.kept == 1
    np.testing.assert_array_equal(leaf.materialize(), w)


@pytest.mark.parametrize("n", [1, 65, 1000])
@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_fully_dense_and_fully_empty(n, fill):
    w = jnp.full(n, fill)
    leaf = jc.SparseArray.from_mask(w, w != 0)
    assert leaf.kept == (n if fill else 0)
    np.testing.assert_array_equal(leaf.materialize(), w)


@pytest.mark.parametrize("layout", ["bitmask", *range(2, 9)])
def test_every_layout_holds_every_mask(layout):
    size, kept = 700, 9
    chosen = ("bitmask", 1, size) if layout == "bitmask" else ("gaps", layout, size)
    store = jax.jit(encode, static_argnums=(2, 3, 4))
    w = np.arange(1.0, size + 1, dtype=np.float32)
    rng = np.random.default_rng(layout == "bitmask" or layout)
    for span in (kept, 20, 100, size, size, size):
        mask = np.zeros(size, bool)
        mask[rng.integers(size - span + 1) + rng.choice(span, kept, replace=False)] = True
        leaf = store(jnp.asarray(w), jnp.asarray(mask), kept, chosen, 0)
        np.testing.assert_array_equal(leaf.materialize(), np.where(mask, w, 0))


@pytest.mark.parametrize("sparsity", [pytest.param(0.3, marks=pytest.mark.slow), 0.97])
def test_each_weight_of_a_stack_keeps_as_many(sparsity):
    w = np.random.default_rng(5).normal(size=(3, 40, 50)).astype(np.float32)
    w[1] *= 100  # one ranking over the stack would keep this layer alone
    leaf = jc.Prune(sparsity)(jnp.asarray(w))
    kept = round(2000 * (1 - sparsity))
    assert leaf.values.shape == (3, kept)
    expected = np.stack([np.where(reference_mask(x, kept), x, 0) for x in w])
    np.testing.assert_array_equal(leaf.materialize(), expected)
    one = jax.tree.map(lambda x: x[1], leaf)
    np.testing.assert_array_equal(one.materialize(), expected[1])


def test_a_stack_of_unequal_counts_is_refused():
    w = jnp.array([[1.0, 0.0], [1.0, 1.0]])
    with pytest.raises(ValueError, match=r"keep \[1, 2\] values"):
        jc.SparseArray.from_mask(w, w != 0, batch_ndim=1)


def test_a_weight_beyond_32_bit_positions_is_refused():
    with pytest.raises(ValueError, match="too large"):
        best_layout(jax.ShapeDtypeStruct((2**31,), bool), 3, 0)


def test_the_pattern_runs_along_the_inputs():
    w = jax.random.normal(jax.random.key(0), (16, 6))
    kept = jc.Prune(0.5, pattern="2:4")(w).mask()
    np.testing.assert_array_equal(kept.reshape(4, 4, 6).sum(1), 2)
    tree = jc.compress({"embedding": w.T}, {"**": jc.Prune(0.75, pattern="1:4")})
    np.testing.assert_array_equal(tree["embedding"].mask().reshape(6, 4, 4).sum(2), 1)


DISTRIBUTIONS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "uniform": lambda rng, n: rng.uniform(-1, 1, n),
    "lognormal": lambda rng, n: rng.lognormal(0, 4, n),
    "ties": lambda rng, n: np.round(rng.normal(size=n), 1),
    "mostly zero": lambda rng, n: np.where(rng.random(n) < 0.9, 0, rng.normal(size=n)),
    "constant": lambda rng, n: np.full(n, -2.5),
    "two clusters": lambda rng, n: rng.choice([1e-30, 1e30], n) * rng.uniform(1, 1.001, n),
    "huge": lambda rng, n: rng.choice([np.inf, 3.4e38, -3.4e38, 0.0], n),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_kth_largest_against_a_partition(name):
    w = DISTRIBUTIONS[name](np.random.default_rng(1), 30_011).astype(np.float32)
    find = jax.jit(kth_largest)
    for k in (1, 2, 77, 3_001, 15_005, 29_000, 30_010, 30_011):
        expected = np.partition(np.abs(w), -k)[-k]
        assert find(jnp.asarray(w), k) == expected
        mask = np.asarray(jax.jit(top_mask)(jnp.asarray(w), k))
        np.testing.assert_array_equal(mask, reference_mask(w, k))


def test_masks_across_arrays_are_those_of_the_joined_array():
    rng = np.random.default_rng(2)
    parts = [np.round(rng.normal(size=s), 1).astype(np.float32) for s in ((7, 5), (0, 3), (400,))]
    whole = np.concatenate([p.reshape(-1) for p in parts])
    for k in (0, 1, 100, 434, 435):
        masks = jax.jit(top_masks)([jnp.asarray(p) for p in parts], k)
        joined = np.concatenate([np.asarray(m).reshape(-1) for m in masks])
        np.testing.assert_array_equal(joined, reference_mask(whole, k))


def test_a_nan_counts_as_largest_whatever_its_bits():
    bits = np.array([0x7F800001, 0xFFFFFFFF, 0x7FC00000], np.uint32)
    w = np.concatenate([bits.view(np.float32), np.array([np.inf, 1.0, -2.0], np.float32)])
    for k in range(4):
        mask = np.asarray(top_mask(jnp.asarray(w), k))
        assert mask.sum() == k
        assert not mask[3:].any()
    assert np.asarray(top_mask(jnp.asarray(w), 4))[3]
    assert bool(has_nan(jnp.asarray(w)))
    assert not bool(has_nan(jnp.asarray(w[3:])))
    assert not bool(has_nan(jnp.zeros((0, 3))))


def test_a_count_may_be_traced_and_mapped():
    w = jnp.asarray(few_values(5, 600).reshape(3, 200))
    ks = jnp.array([0, 77, 200])
    masks = jax.jit(jax.vmap(top_mask))(w, ks)
    for row, k, mask in zip(w, ks, masks):
        np.testing.assert_array_equal(mask, reference_mask(np.asarray(row), int(k)))


SHARDED = """
import re, sys, jax, jax.numpy as jnp, numpy as np, jaxcompress as jc
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
kind = getattr(AxisType, sys.argv[1])
mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
x = jnp.round(jax.random.normal(jax.random.key(0), (64, 32)), 1)
functions = (jc.pruning.top_mask, jc.pruning.kth_largest,
             lambda x, k: jc.pruning.top_masks([x, -x], k),
             lambda x, k: jc.pruning.n_of_m_mask(x, 2, 4, -2))
for place in (P("a", "b"), P(None, ("b", "a"))):
    for f in functions:
        with jax.set_mesh(mesh):
            there = jax.device_put(x, NamedSharding(mesh, place))
            program = jax.jit(f).lower(there, 700).compile()
            out = program(there, 700)
        np.testing.assert_equal(*map(jax.device_get, (out, f(jax.device_get(x), 700))))
        text = program.as_text()
        for moved in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
            assert moved not in text, (place, moved)
        reduced = re.findall(r"(\\w+\\[[\\d,]*\\])\\S* all-reduce", text)
        assert set(reduced) <= {"u32[]", "f32[]"}, (place, reduced)
        assert reduced or f is functions[-1]
        if f is jc.pruning.top_mask:
            assert out.sharding.is_equivalent_to(there.sharding, 2)
"""


@pytest.mark.parametrize("axes", [pytest.param("Auto", marks=pytest.mark.slow), "Explicit"])
def test_devices_exchange_nothing_but_scalars(axes):
    eight_devices.run(SHARDED, axes)


def test_one_cpu_device_counts_in_sixteen_bits():
    program = jax.jit(top_mask).lower(jnp.ones((256, 512)), 10).compile()
    assert "u16[" in program.as_text()
    # In a vector of 4,096 sums nothing is lost, whatever the size.
    for n in (1, 4095, 4096, 4097, 20_001):
        w = jnp.where(jnp.arange(n) % 3 == 0, 2.0, 1.0)
        assert int(jax.jit(top_mask)(w, n // 2).sum()) == n // 2
