"""What specs refuse, how they compile, and the codes they find against other implementations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import specs

W = jax.random.normal(jax.random.key(0), (24, 10))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: jc.LowRank(), "one of rank and energy"),
        (lambda: jc.LowRank(2, energy=0.5), "one of rank and energy"),
        (lambda: jc.LowRank(0), "rank=0"),
        (lambda: jc.LowRank(2.5), "rank=2.5"),
        (lambda: jc.LowRank("2"), "rank='2'"),
        (lambda: jc.LowRank(energy=0.0), "energy=0.0"),
        (lambda: jc.LowRank(energy=1.01), "energy=1.01"),
        (lambda: jc.LowRank(11)(W), "rank 11 is impossible for a 24 x 10.*at most 10"),
        (lambda: jc.LowRank(1)(W[0]), "no matrix"),
        (lambda: jax.jit(jc.LowRank(energy=0.5))(W), "jit hides"),
        (lambda: jc.Prune(-0.1), "sparsity=-0.1"),
        (lambda: jc.Prune(1.1), "sparsity=1.1"),
        (lambda: jc.Prune(float("nan")), "sparsity=nan"),
        (lambda: jc.Prune("0.5"), "sparsity='0.5'"),
        (lambda: jc.Prune(0.5, score="loudness"), "score='loudness'"),
        (lambda: jc.Prune(0.5, pattern="1:4"), r"write Prune\(0.75, pattern='1:4'\)"),
        (lambda: jc.Prune(0.5, pattern="2of4"), "pattern='2of4'"),
        (lambda: jc.Prune(0.0, pattern="5:4"), "pattern='5:4'"),
        (lambda: jc.Prune(0.5)(W[0, 0]), "a scalar"),
        (lambda: jc.Quantize("int9"), "int9"),
        (lambda: jc.Quantize("float8"), "float8"),
        (lambda: jc.Quantize(8), "format=8"),
        (lambda: jc.Quantize("uint4"), "symmetric=False"),
        (lambda: jc.Quantize("int4", group_size=0), "group_size=0"),
        (lambda: jc.Quantize("int4", group_size=2.5), "group_size=2.5"),
        (lambda: jc.Quantize("int4", convention="mine"), "convention='mine'"),
        (lambda: jc.Quantize("int4", scale_dtype="float3"), "scale_dtype='float3'"),
        (lambda: jc.Quantize("int4", scale_dtype="int8"), "scale_dtype='int8'"),
        (lambda: jc.Quantize("int4", axis=2)(W), "axis=2 is not among the 2 axes"),
        (lambda: jc.Quantize("int4", axis=(0, -3))(W), "is not among"),
        (lambda: jc.Quantize("int4", axis=())(W), "is not among"),
        (lambda: jc.Quantize("int4")(W[0, 0]), "a scalar"),
        (lambda: jc.Codebook(0), "bits=0"),
        (lambda: jc.Codebook(9), "bits=9"),
        (lambda: jc.Codebook(2.0), "bits=2.0"),
        (lambda: jc.Codebook(2, init="best"), "init='best'"),
        (lambda: jc.Codebook(2, iterations=-1), "iterations=-1"),
        (lambda: jc.Codebook(2, init="random")(W), "needs a key"),
        (lambda: jc.Codebook(2)(W[0, 0]), "a scalar"),
        (lambda: jc.chain(), "at least one spec"),
        (lambda: jc.chain(jc.Prune(0.5), "int8"), "'int8'"),
        (lambda: jc.chain(jc.Quantize("int8"), jc.Prune(0.5))(W), "put it first"),
        (lambda: jc.chain(jc.Prune(0.5), jc.LowRank(1))(W), r"leaf\.values: .*no matrix"),
    ],
)
def test_an_impossible_spec_says_what_to_write(make, text):
    with pytest.raises(jc.SpecError, match=text):
        make()


def test_an_error_in_a_tree_names_the_leaf():
    with pytest.raises(jc.SpecError, match="block/kernel: rank 11"):
        jc.compress({"block": {"kernel": W}}, {"**": jc.LowRank(11)})


SPECS = [
    jc.Quantize("int8"),
    jc.Quantize("int4", group_size=7),
    jc.Quantize("uint3", symmetric=False, group_size=4),
    jc.Prune(0.6),
    jc.Prune(0.5, pattern="2:4"),
    jc.LowRank(3),
    jc.Codebook(3),
    jc.chain(jc.Prune(0.5), jc.Quantize("int8")),
    jc.chain(jc.LowRank(3), jc.Quantize("int8")),
]


@pytest.mark.thin(4)
@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_specs_run_under_jit_and_vmap(spec):
    dense = spec(W).materialize()
    np.testing.assert_allclose(jax.jit(spec)(W).materialize(), dense, atol=1e-5)
    stack = jnp.stack([W, 2 * W[::-1]])
    mapped = jax.vmap(spec)(stack)
    assert mapped.shape == stack.shape
    np.testing.assert_allclose(mapped.materialize()[0], dense, atol=1e-5)
    np.testing.assert_allclose(
        jax.vmap(lambda leaf: leaf.materialize())(mapped)[1], spec(2 * W[::-1]).materialize(),
        atol=1e-5,
    )  # fmt: skip


@pytest.mark.thin(4)
@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_a_stack_is_compressed_weight_by_weight(spec):
    stack = jnp.stack([W, 5 * W[::-1], jnp.zeros_like(W)])
    leaf = spec(stack)
    assert leaf.shape == stack.shape
    for i in range(3):
        np.testing.assert_allclose(leaf.materialize()[i], spec(stack[i]).materialize(), atol=1e-5)


@pytest.mark.thin(8)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_half_precision_leaves_keep_their_dtype(spec, dtype):
    leaf = spec(W.astype(dtype))
    assert leaf.dtype == leaf.materialize().dtype == dtype
    wide = spec(W.astype(dtype).astype(jnp.float32)).materialize()
    np.testing.assert_allclose(leaf.materialize().astype(jnp.float32), wide, atol=0.05)


@pytest.mark.thin(8)
@pytest.mark.parametrize("spec", [*SPECS[:5], jc.Codebook(3), *SPECS[7:8]], ids=repr)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 1, 1)])
def test_leaves_of_one_value(spec, shape):
    leaf = spec(jnp.full(shape, -3.0))
    dense = np.asarray(leaf.materialize())
    assert dense.shape == shape
    if not (isinstance(spec, (jc.Prune, specs.Chain))):
        np.testing.assert_allclose(dense, -3.0, rtol=2**-8)


def test_equal_shapes_and_specs_compile_once():
    count = specs._apply_anywhere._cache_size
    w = jnp.ones((37, 11))
    tree = {str(i): w * i for i in range(5)}
    before = count()
    jc.compress(tree, {"**": jc.Quantize("int5", group_size=8)})
    assert count() == before + 1
    jc.compress(tree, {"**": jc.Quantize("int5", group_size=8)})
    assert count() == before + 1
    jc.compress(tree, {"**": jc.Quantize("int5", group_size=9)})
    assert count() == before + 2


@pytest.mark.thin(8)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("n", [1, 8, 13, 64, 100])
def test_bytes_of_packed_codes_are_exact(bits, n):
    p, q = 8 // np.gcd(bits, 8), bits // np.gcd(bits, 8)
    w = jax.random.normal(jax.random.key(1), (n, 6))
    assert jc.Quantize(f"int{bits}")(w).nbytes == -(-n // p) * q * 6 + 6 * 2
    assert jc.Quantize(f"int{bits}", axis=-1)(w).nbytes == n * -(-6 // p) * q + n * 2
    affine = jc.Quantize(f"uint{bits}", symmetric=False, scale_dtype="float32")(w)
    assert affine.nbytes == -(-n // p) * q * 6 + 6 * 4 + 6 * q
    shared = jc.Codebook(bits)(w)
    assert shared.nbytes == -(-n // p) * q * 6 + 4 * 2**bits


def test_a_group_size_that_does_not_divide_pads_and_keeps_the_length():
    w = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    leaf = jc.Quantize("int4", group_size=4, scale_dtype="float32")(jnp.asarray(w))
    assert leaf.shape == (10, 3)
    assert leaf.scale.shape == (3, 3)
    assert leaf.nbytes == 5 * 3 + 9 * 4
    expected = np.concatenate([round_to_codes(g, 7, 0)[1] for g in (w[:4], w[4:8], w[8:])])
    np.testing.assert_array_equal(leaf.materialize(), expected)


def test_a_group_longer_than_the_axis_is_one_group():
    leaf = jc.Quantize("int4", group_size=1000)(W)
    assert leaf.scale.shape == (1, 10)
    np.testing.assert_array_equal(leaf.materialize(), jc.Quantize("int4")(W).materialize())


def round_to_codes(w, top, axis):
    """Codes and values of symmetric rounding with an exact float32 scale."""
    scale = np.max(np.abs(w), axis=axis, keepdims=True) / np.float32(top)
    codes = np.clip(np.round(w / scale), -top, top)
    return codes, (codes.astype(np.float32) * scale).astype(np.float32)


@pytest.mark.thin(8)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("axis", [0, 1, (0, 1)])
def test_symmetric_codes_are_numpys(bits, axis):
    w = np.random.default_rng(bits).normal(size=(50, 40)).astype(np.float32)
    leaf = jc.Quantize(f"int{bits}", axis=axis, scale_dtype="float32")(jnp.asarray(w))
    codes, values = round_to_codes(w, 2 ** (bits - 1) - 1, axis)
    np.testing.assert_array_equal(np.asarray(jc.decompress(leaf.codes)), codes)
    np.testing.assert_array_equal(leaf.materialize(), values)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_bfloat16_scale_is_rounded_before_the_codes(bits):
    w = np.random.default_rng(bits).normal(size=(50, 40)).astype(np.float32)
    leaf = jc.Quantize(f"int{bits}")(jnp.asarray(w))
    scale = np.asarray(leaf.scale.astype(jnp.float32))
    top = 2 ** (bits - 1) - 1
    exact = np.abs(w).max(0, keepdims=True) / np.float32(top)
    np.testing.assert_array_equal(scale, np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float32))
    error = np.abs(np.asarray(leaf.materialize()) - w)
    # Nothing moves by more than half a step, except that the ends clip by what the scale lost.
    assert np.all(error <= scale * (0.5 + top * 2.0**-8) * (1 + 1e-6))
    inside = np.abs(w) <= scale * top
    assert np.all(error[inside] <= (0.5001 * scale + 0 * w)[inside])


def test_int8_per_channel_codes_are_torchs():
    torch = pytest.importorskip("torch")
    w = np.random.default_rng(0).normal(size=(128, 64)).astype(np.float32)
    leaf = jc.Quantize("int8", scale_dtype="float32")(jnp.asarray(w))
    scale = torch.from_numpy(np.array(leaf.scale[0]))
    theirs = torch.fake_quantize_per_channel_affine(
        torch.from_numpy(w), scale, torch.zeros(64, dtype=torch.int32), 1, -127, 127
    )
    # Torch multiplies by the inverse of the scale, so a tie or so falls to the other side.
    step = np.abs(np.asarray(leaf.materialize()) - theirs.numpy()) / np.asarray(leaf.scale)
    assert np.mean(step > 1e-3) <= 2e-3
    assert step.max() <= 1.001


@pytest.mark.parametrize("convention", ["full", "no_clip"])
def test_int4_group_codes_are_torchaos(convention):
    pytest.importorskip("torch")
    pytest.importorskip("torchao")
    import torch
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        quantize_affine,
    )

    mapping = {
        "full": MappingType.SYMMETRIC, "no_clip": MappingType.SYMMETRIC_NO_CLIPPING_ERR,
    }[convention]  # fmt: skip
    w = np.random.default_rng(0).normal(size=(16, 128)).astype(np.float32)  # torch: [out, in]
    x, block = torch.from_numpy(w), (1, 32)
    scale, zero = choose_qparams_affine(x, mapping, block, torch.int8, -8, 7, eps=1e-12)
    theirs = quantize_affine(x, block, scale, zero, torch.int8, -8, 7).numpy()
    leaf = jc.Quantize("int4", group_size=32, scale_dtype="float32", convention=convention)(
        jnp.asarray(w.T)
    )
    np.testing.assert_allclose(leaf.scale, scale.numpy().T, rtol=1e-6)
    ours = np.asarray(leaf.codes.materialize()).T
    # It multiplies by the inverse of the scale, so codes differ by one where w / scale is within
    # two roundings of a half: in the full range that is every group's greatest magnitude, 7.5.
    ratio = np.abs(w / np.repeat(scale.numpy(), 32, axis=1))
    tie = np.abs(ratio - np.floor(ratio) - 0.5) <= 8 * 2.0**-22
    assert np.abs(ours - theirs).max() <= 1
    assert not np.any((ours != theirs) & ~tie)
    assert np.mean(ours == theirs) > 0.98


def test_codebook_is_scikit_learns_from_the_same_start():
    cluster = pytest.importorskip("sklearn.cluster")
    w = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32)
    # At quantiles no cluster is empty; scikit-learn moves empty ones elsewhere.
    start = np.quantile(w, (np.arange(16) + 0.5) / 16)[:, None]
    reference = cluster.KMeans(16, init=start, n_init=1, algorithm="lloyd", tol=0, max_iter=300)
    reference.fit(w.reshape(-1, 1))
    leaf = jc.Codebook(4, init="density", iterations=300)(jnp.asarray(w))
    np.testing.assert_allclose(
        np.sort(leaf.centroids), np.sort(reference.cluster_centers_[:, 0]), atol=1e-4
    )
    error = float(jnp.sum((leaf.materialize() - w) ** 2))
    assert error == pytest.approx(reference.inertia_, rel=1e-4)


@pytest.mark.thin(4)
@pytest.mark.parametrize("follow", [jc.Quantize("int4", group_size=16), jc.Codebook(3)], ids=repr)
@pytest.mark.parametrize("prune", [jc.Prune(0.5), jc.Prune(0.97), jc.Prune(0.5, pattern="2:4")])
def test_a_pruned_zero_stays_exactly_zero(follow, prune, tmp_path):
    w = W + 3.0  # a codebook of the whole leaf would have no centroid near zero
    kept = prune(w).mask()
    leaf = jc.chain(prune, follow)(w)
    jc.save(tmp_path / "leaf", leaf)
    for small in (leaf, jc.load(tmp_path / "leaf")):
        dense = np.asarray(small.materialize())
        np.testing.assert_array_equal(dense[~kept], 0.0)
        assert np.all(dense[kept] > 0)


@pytest.mark.parametrize("follow", [jc.Quantize("int4"), jc.Quantize("int8"), jc.Codebook(3)])
def test_a_chain_where_nothing_is_kept(follow):
    leaf = jc.chain(jc.Prune(0.9), follow)(jnp.ones(3))
    np.testing.assert_array_equal(leaf.materialize(), np.zeros(3))


def test_chains_flatten_and_nest():
    a, b, c = jc.Prune(0.5), jc.Codebook(4), jc.Quantize("int8")
    assert jc.chain(jc.chain(a, b), c) == jc.chain(a, b, c)
    assert jc.chain(a) is a
    leaf = jc.chain(a, b, c)(W)
    assert isinstance(leaf.values.centroids, jc.QuantizedArray)
    by_hand = b(a(W).values).replace(centroids=c(b(a(W).values).centroids))
    np.testing.assert_array_equal(leaf.values.materialize(), by_hand.materialize())


def test_prune_without_a_sparsity_stores_the_zeros_that_are_there():
    w = np.random.default_rng(0).normal(size=(3, 8, 10)).astype(np.float32)
    w[np.random.default_rng(1).random(w.shape) < 0.8] = 0
    for leaf, most in ((jnp.asarray(w[0]), int((w[0] != 0).sum())),
                       (jnp.asarray(w), max(int((x != 0).sum()) for x in w))):  # fmt: skip
        small = jc.Prune()(leaf)
        np.testing.assert_array_equal(small.materialize(), leaf)
        assert small.kept == most
    assert jc.Prune()(jnp.zeros((4, 4))).kept == 0
    with pytest.raises(jc.SpecError, match="counts the zeros of a concrete array"):
        jax.jit(jc.Prune())(jnp.asarray(w[0]))
    with pytest.raises(jc.SpecError, match="'2:4' needs its sparsity"):
        jc.Prune(pattern="2:4")
