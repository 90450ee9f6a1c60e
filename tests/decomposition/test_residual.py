"""A low-rank part beside codes or a few values: what is guaranteed, and against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress import SpecError
from jaxcompress.arrays.adapted import AdaptedArray
from jaxcompress.decomposition.residual import alternate, low_rank_correction
from jaxcompress.decomposition.residual_spec import LoftQ, LowRankPlusQuantized, LowRankPlusSparse
from jaxcompress.quantization import QuantizeInput

CODES = {
    "nf4": jc.Quantize("nf4", group_size=16),
    "int3": jc.Quantize("int3", group_size=8),
    "int2": jc.Quantize("int2"),
}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def error(w, leaf):
    return float(np.sum((np.asarray(w, np.float64) - np.asarray(leaf, np.float64)) ** 2))


def nearest(w, rank):
    u, s, v = np.linalg.svd(w, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def straightforward_loftq(w, rank, quantize, iterations):
    """As the paper has it, in float64 but for the codes; the error after each iteration."""
    low, errors = np.zeros_like(w), []
    for _ in range(iterations):
        codes = np.asarray(quantize(jnp.asarray(w - low, jnp.float32)).materialize(), np.float64)
        low = nearest(w - codes, rank)
        errors.append(np.sum((w - codes - low) ** 2))
    return errors


@pytest.mark.parametrize("codes", CODES)
def test_loftq_follows_the_published_iteration(codes):
    w = normal(0, 32, 24)
    parts = alternate(jnp.asarray(w), 4, CODES[codes], iterations=4)
    want = straightforward_loftq(w.astype(np.float64), 4, CODES[codes], 4)
    # A code at a tie may fall to the other side in float32, and the next ones after it.
    np.testing.assert_allclose(parts.errors, want, rtol=0.02)
    np.testing.assert_allclose(parts.errors[0], want[0], rtol=1e-4)
    found = np.asarray(parts.rest.materialize()) + np.asarray(parts.left @ parts.right)
    np.testing.assert_allclose(error(w, found), np.min(parts.errors), rtol=1e-4)


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.sampled_from(sorted(CODES)), st.booleans())
def test_it_is_never_worse_than_codes_alone_nor_than_fewer_iterations(seed, codes, heavy):
    """Guaranteed: the last step is the best possible, and the best of all iterations is kept."""
    w = normal(seed, 32, 24)
    w = jnp.asarray(w**3 if heavy else w)
    alone = error(w, CODES[codes](w).materialize())
    errors = np.asarray(alternate(w, 4, CODES[codes], iterations=4).errors)
    # Squared errors of sums of 768 terms in float32.
    assert errors[0] <= alone * (1 + 1e-5)
    kept = [error(w, LoftQ(4, CODES[codes], iterations=n)(w).materialize()) for n in (1, 4)]
    assert kept[1] <= kept[0] * (1 + 1e-4)
    np.testing.assert_allclose(kept, [errors[0], errors.min()], rtol=1e-3)


def test_on_average_each_iteration_gains():
    """Not guaranteed for one matrix: scales follow the range, so the steps are no projections."""
    w = jnp.asarray(normal(1, 64, 32, 24))  # a stack of 64
    errors = alternate(w, 4, CODES["nf4"], iterations=5).errors
    assert np.all(np.diff(errors) < 0)
    assert errors[-1] < 0.95 * errors[0]


def with_outliers(m, n):
    """Two inputs and two outputs with weights twelve times as large as the others."""
    w = normal(2, m, n)
    w[[3, 17]] *= 12
    w[:, [5, 9]] *= 12
    return jnp.asarray(w)


def test_svdquant_takes_outliers_out_at_equal_bytes():
    w = with_outliers(128, 128)
    leaf = LowRankPlusQuantized(8, "int4", group_size=64)(w)
    # The factors: 8 * 256 float32, four bits a weight. Plain codes with as many bytes: eight bits
    # take as much again as four; finer groups: the bytes of the factors as bfloat16 scales.
    finer = jc.Quantize("int4", group_size=4)(w)
    assert leaf.nbytes <= finer.nbytes * 1.05
    plain = jc.Quantize("int4", group_size=64)(w)
    errors = [error(w, x.materialize()) for x in (leaf, finer, plain)]
    assert errors[0] < errors[1] / 1.5 < errors[2] / 2
    assert leaf.nbytes == leaf.base.nbytes + 4 * 8 * 256


def test_svdquant_is_no_worse_than_the_published_order_without_the_refit():
    w = with_outliers(64, 48)
    low = nearest(np.asarray(w, np.float64), 4)
    codes = CODES["nf4"](jnp.asarray(np.asarray(w) - low, jnp.float32)).materialize()
    published = error(w, np.asarray(codes) + low)
    assert error(w, LowRankPlusQuantized(4, CODES["nf4"])(w).materialize()) <= published


@pytest.mark.parametrize("magnitude", [0.5, 20.0])
def test_low_rank_plus_sparse_finds_what_was_planted(magnitude):
    rng = np.random.default_rng(3)
    low = normal(4, 40, 3) @ normal(5, 3, 30) / 5
    sparse = np.zeros(1200, np.float32)
    sparse[rng.choice(1200, 48, replace=False)] = magnitude * rng.choice([-1, 1], 48)
    w = jnp.asarray(low + sparse.reshape(40, 30))
    leaf = LowRankPlusSparse(3, 1 - 48 / 1200, iterations=20)(w)
    assert isinstance(leaf.base, jc.SparseArray)
    # Rounding of float32 values of 20 and of three products: 1e-5 of the norm.
    np.testing.assert_allclose(leaf.delta.materialize(), low, atol=2e-4)
    np.testing.assert_allclose(leaf.base.materialize(), sparse.reshape(40, 30), atol=2e-4)


SPARSE = jax.jit(LowRankPlusSparse(3, 0.9, iterations=4))


@settings(max_examples=10)
@given(st.integers(0, 10**6))
def test_no_iteration_of_low_rank_plus_sparse_is_worse(seed):
    w = jnp.asarray(normal(seed, 20, 15) ** 3)

    def kept(x):
        least = jnp.sort(jnp.abs(x).ravel())[::-1]
        return jnp.where(jnp.abs(x) >= least[29], x, 0.0)

    errors = np.asarray(alternate(w, 3, kept, iterations=4).errors)
    assert np.all(np.diff(errors) <= 1e-5 * errors[0])
    got = SPARSE(w)
    np.testing.assert_allclose(error(w, got.materialize()), errors[-1], rtol=1e-3)


@pytest.mark.thin(4)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "spec",
    [
        LoftQ(3, "nf4", group_size=16, iterations=2),
        LowRankPlusQuantized(3, "int4"),
        LowRankPlusSparse(3, 0.8, iterations=2),
    ],
)
def test_stacks_and_heads_in_every_dtype(spec, dtype):
    w = jnp.asarray(normal(6, 2, 16, 3, 6)).astype(dtype)  # two layers of three heads
    rules, params = {"**/kernel": spec}, {"query": {"kernel": w}}
    leaf = jc.compress(params, rules)["query"]["kernel"]
    assert isinstance(leaf, AdaptedArray)
    assert (leaf.shape, leaf.dtype, leaf.batch_ndim) == (w.shape, dtype, 1)
    assert (leaf.delta.left.shape, leaf.delta.right.shape) == ((2, 16, 3), (2, 3, 3, 6))
    assert leaf.delta.left.dtype == leaf.base.dtype == dtype
    alone = 0 * w[0] if isinstance(spec, LowRankPlusSparse) else spec.of_rest()(w[0])
    assert error(w[0], leaf.materialize()[0]) < error(w[0], alone)


@pytest.mark.slow
def test_a_split_inside_of_jit_is_the_one_outside():
    w = jnp.asarray(normal(6, 2, 16, 6))
    for spec in (LoftQ(3, "nf4", iterations=2), LowRankPlusQuantized(3, "int4")):
        inside, outside = jax.jit(spec)(w), spec(w)
        # Up to ties between codes, which these weights have none of.
        np.testing.assert_allclose(inside.materialize(), outside.materialize(), atol=1e-4)


@pytest.mark.slow
def test_any_spec_may_compress_the_rest():
    w, x = jnp.asarray(with_outliers(64, 32)), jnp.asarray(normal(7, 200, 64))
    stats = jc.observe(lambda p, x: x @ p["w"], {"w": w}, [x], ("gram",))
    small = jc.compress({"w": w}, {"w": LowRankPlusQuantized(4, jc.GPTQ("int3"))}, stats=stats)["w"]
    plain = LowRankPlusQuantized(4, jc.Quantize("int3"))(w)
    outputs = lambda leaf: error(x @ w, x @ leaf.materialize())
    assert outputs(small) < outputs(plain)
    codes = jc.chain(jc.Quantize("int4"), QuantizeInput("int8"))
    both = LowRankPlusQuantized(4, codes)(w)
    assert both.describe() == "int4, input int8 per token + rank 4"
    y = jc.compressed(lambda w, x: x @ w)(both, x)
    assert error(x @ w, y) < 0.05 * float(jnp.sum((x @ w) ** 2))


def test_the_correction_is_the_best_in_the_metric_of_its_scale():
    w = normal(8, 24, 16)
    codes, s = jc.Quantize("int3")(jnp.asarray(w)), np.exp(normal(9, 24))
    left, right = low_rank_correction(jnp.asarray(w), codes, 3, scale=jnp.asarray(s))
    lost = w.astype(np.float64) - np.asarray(codes.materialize())
    want = np.linalg.svd(s[:, None] * lost, compute_uv=False)
    got = np.linalg.svd(s[:, None] * (lost - np.asarray(left @ right)), compute_uv=False)
    # What is left are the other singular values (Eckart and Young).
    np.testing.assert_allclose(np.sum(got**2), np.sum(want[3:] ** 2), rtol=1e-4)
    plain = low_rank_correction(jnp.asarray(w), codes, 3)
    np.testing.assert_allclose(np.asarray(plain[0] @ plain[1]), nearest(lost, 3), atol=1e-4)
    zero = low_rank_correction(jnp.asarray(w), codes, 3, scale=jnp.zeros(24))
    np.testing.assert_allclose(zero[0] @ zero[1], nearest(lost, 3), atol=1e-4)


def test_what_the_splits_refuse():
    for spec in (LoftQ, LowRankPlusQuantized, LowRankPlusSparse):
        with pytest.raises(SpecError, match="rank=0: write a whole number"):
            spec(0)
        with pytest.raises(SpecError, match="rank 9 is impossible for a 12 x 8 matrix"):
            spec(9)(jnp.ones((12, 8)))
        with pytest.raises(SpecError, match=r"shape \(8,\) is no matrix"):
            spec(1)(jnp.ones(8))
    with pytest.raises(SpecError, match="iterations=0"):
        LoftQ(2, iterations=0)
    with pytest.raises(SpecError, match="write group_size within Quantize"):
        LoftQ(2, jc.Quantize("nf4"), group_size=4)
    with pytest.raises(SpecError, match="quantize=4: write such as 'nf4'"):
        LoftQ(2, 4)
    with pytest.raises(SpecError, match="int99"):
        LoftQ(2, "int99")
    with pytest.raises(SpecError, match="rank=5 is impossible"):
        alternate(jnp.ones((4, 4)), 5, CODES["nf4"])
    with pytest.raises(SpecError, match="write one of shape"):
        low_rank_correction(jnp.ones((4, 4)), jnp.ones((4, 4)), 1, scale=jnp.ones(3))
    assert jc.Recipe.from_yaml("rules: [{match: '**', loftq: {rank: 4, quantize: nf4}}]")
