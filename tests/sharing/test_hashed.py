"""Hashed weights: the hash against scikit-learn's, the values against least squares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress.arrays.base import try_rules
from jaxcompress.arrays.hashed import HashedArray, bucket_and_sign, murmur3
from jaxcompress.errors import SpecError
from jaxcompress.sharing.hashed import Hashed, hashed_values


def in_python(key, seed):
    """MurmurHash3 of four bytes, with Python's integers."""
    word = 2**32 - 1
    turn = lambda x, by: ((x << by) | (x >> (32 - by))) & word
    h = seed ^ turn(key * 0xCC9E2D51 & word, 15) * 0x1B873593 & word
    h = (turn(h, 13) * 5 + 0xE6546B64 & word) ^ 4
    h = (h ^ h >> 16) * 0x85EBCA6B & word
    h = (h ^ h >> 13) * 0xC2B2AE35 & word
    return h ^ h >> 16


def dense_by_loop(values, shape, seed):
    """The weights one by one, in Python's integers."""
    out = []
    for i in range(int(np.prod(shape))):
        h = in_python(i, seed)
        out.append((-1 if h >> 31 else 1) * values[(h % 2**31) % len(values)])
    return np.array(out, values.dtype).reshape(shape)


def test_the_hash_is_that_of_scikit_learn():
    utils = pytest.importorskip("sklearn.utils")
    keys = np.concatenate([np.arange(200), [2**31 - 1, 123456789]]).astype(np.int32)
    for seed in (0, 7, 2**31 + 5):
        theirs = utils.murmurhash3_32(keys, seed=seed, positive=True)
        np.testing.assert_array_equal(murmur3(jnp.asarray(keys, jnp.uint32), seed), theirs)


@settings(max_examples=50, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_the_hash_is_that_of_python_for_any_key_and_seed(key, seed):
    assert int(murmur3(np.uint32(key), seed)) == in_python(key, seed)


def test_known_weights_never_change():
    leaf = HashedArray.of(jnp.arange(1.0, 6.0), (2, 5), seed=3)
    np.testing.assert_array_equal(leaf, dense_by_loop(np.arange(1, 6, dtype=np.float32), (2, 5), 3))
    np.testing.assert_array_equal(jax.jit(lambda x: x.materialize())(leaf), leaf)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("buckets", [64, 100])
def test_buckets_and_signs_are_uniform_and_independent(buckets, seed):
    stats = pytest.importorskip("scipy.stats")
    n = 20_000
    bucket, sign = map(np.asarray, bucket_and_sign(jnp.arange(n, dtype=jnp.uint32), buckets, seed))
    table = np.bincount(2 * bucket + (sign > 0), minlength=2 * buckets)
    # All 2 K cells are equally likely; over four cases a good hash fails once in 25,000 times.
    assert 1e-5 < stats.chisquare(table).pvalue < 1 - 1e-5
    # Neighbours fall into the same bucket as often as chance has it, within 4.5 deviations.
    same = np.count_nonzero(bucket[1:] == bucket[:-1])
    mean = (n - 1) / buckets
    assert abs(same - mean) < 4.5 * np.sqrt(mean)


@pytest.mark.parametrize(("shape", "buckets"), [((7, 5), 9), ((3, 4, 6), 20), ((11,), 30)])
def test_the_start_is_the_least_squares_solution(shape, buckets):
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    n = w.size
    bucket, sign = map(np.asarray, bucket_and_sign(jnp.arange(n, dtype=jnp.uint32), buckets, 5))
    design = np.zeros((n, buckets))
    design[np.arange(n), bucket] = sign
    # numpy's least squares in float64; of buckets that nothing falls into, the least norm is 0.
    best = np.linalg.lstsq(design, w.reshape(-1).astype(np.float64), rcond=None)[0]
    # Means of n float32 values below 4: n eps * 4 is an upper bound.
    np.testing.assert_allclose(hashed_values(w, buckets, seed=5), best, atol=n * 6e-8 * 4)


def test_the_norm_survives_with_init_norm():
    w = jax.random.normal(jax.random.key(0), (32, 24))
    leaf = Hashed(8, init="norm")(w)
    # One rounded factor and two float32 sums of 768 squares by pairs: well below 1e-5.
    np.testing.assert_allclose(np.linalg.norm(leaf.materialize()), np.linalg.norm(w), rtol=1e-5)
    plain = np.linalg.norm(Hashed(8)(w).materialize())
    # Means of 8 independent weights keep an eighth of the squared norm.
    assert 0.25 < plain / np.linalg.norm(w) < 0.45


def test_huge_values_do_not_overflow():
    w = jnp.full((64,), 3e38)
    values = hashed_values(w, 1)
    sign = bucket_and_sign(jnp.arange(64, dtype=jnp.uint32), 1, 0)[1]
    np.testing.assert_allclose(values[0], 3e38 * (float(sign.sum()) / 64), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_gradients_are_signed_sums_in_float32(dtype):
    n, buckets = 4096, 2
    leaf = HashedArray.of(jnp.ones(buckets, dtype), (64, 64), seed=2)
    grad = jax.grad(lambda x: jnp.sum(x.materialize().astype(jnp.float32)))(leaf).values
    bucket, sign = map(np.asarray, bucket_and_sign(jnp.arange(n, dtype=jnp.uint32), buckets, 2))
    exact = np.array([sign[bucket == k].sum() for k in range(buckets)])
    assert grad.dtype == dtype
    np.testing.assert_array_equal(grad, exact.astype(dtype))
    squares = jax.grad(lambda x: jnp.sum((x.materialize().astype(jnp.float32)) ** 2) / 2)(leaf)
    # 2,000 ones, which a bfloat16 sum could not count.
    np.testing.assert_array_equal(squares.values, np.bincount(bucket).astype(dtype))


def test_a_model_runs_on_hashed_leaves_and_looks_rows_up():
    key = jax.random.key(1)
    params = {
        "embedding": jax.random.normal(key, (50, 16)),
        "kernel": jax.random.normal(key, (16, 4, 8)),
    }
    small = jc.compress(params, {"embedding": Hashed(4), "kernel": Hashed(buckets=40, seed=9)},
                        axes={"kernel": jc.KernelAxes((-3,), (-2, -1))})  # fmt: skip

    def apply(p, ids):
        x = p["embedding"][ids]
        y = jnp.einsum("...i,ihd->...hd", x, p["kernel"])
        z = x @ p["kernel"].reshape(16, 32)
        return y.reshape(*ids.shape, 32) + z, x @ p["embedding"].T

    ids = jnp.array([[0, 3, 49], [7, 60, -1]])  # one is out of bounds
    dense = jc.decompress(small)
    for ours, theirs in zip(jax.jit(jc.compressed(apply))(small, ids), jax.jit(apply)(dense, ids)):
        np.testing.assert_array_equal(ours, theirs)
    ids = ids.at[1, 1].set(6)  # what a gradient out of bounds goes to is nobody's promise
    loss = lambda p: sum(jnp.sum(y**2) for y in apply(p, ids))
    ours = jax.jit(jax.grad(jc.compressed(loss)))(small)
    through = jax.jit(jax.grad(lambda p: loss(jc.decompress(p))))(small)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(through)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_transposes_and_reshapes_stay_hashed():
    leaf = HashedArray.of(jnp.arange(1.0, 8.0), (6, 2, 4))
    turned = try_rules("transpose", (leaf,), {"permutation": (2, 0, 1)})
    np.testing.assert_array_equal(turned.materialize(), leaf.materialize().transpose(2, 0, 1))
    again = try_rules("reshape", (leaf,), {"new_sizes": (12, 4), "dimensions": None})
    np.testing.assert_array_equal(again.materialize(), leaf.materialize().reshape(12, 4))
    # Axes that no longer lie in row-major order cannot be merged.
    merged = try_rules("reshape", (turned,), {"new_sizes": (24, 2), "dimensions": None})
    assert merged is NotImplemented


def test_stacks_have_values_of_their_own():
    w = jax.random.normal(jax.random.key(0), (3, 8, 10))
    leaf = Hashed(4)(w)
    assert leaf.values.shape == (3, 20)
    each = jnp.stack([Hashed(4)(x).materialize() for x in w])
    # The sums of a stack may be taken in another order: 8 or so values below 4.
    np.testing.assert_allclose(leaf, each, atol=20 * 6e-8 * 4)
    _, scanned = jax.lax.scan(lambda c, x: (c, x.materialize()), 0, leaf)
    np.testing.assert_array_equal(scanned, leaf)
    np.testing.assert_array_equal(jax.vmap(lambda x: x.materialize())(leaf), leaf)


def test_it_saves_and_chains(tmp_path):
    w = jax.random.normal(jax.random.key(0), (32, 16)).astype(jnp.bfloat16)
    tree = {"a": Hashed(4)(w), "b": jc.chain(Hashed(4, seed=2**32 - 1), jc.Quantize("int8"))(w)}
    assert [x.describe() for x in tree.values()] == ["hashed 128", "hashed 128 of int8"]
    jc.save(tmp_path / "x.safetensors", tree)
    for name, leaf in jc.load(tmp_path / "x.safetensors").items():
        np.testing.assert_array_equal(leaf, tree[name])
        assert (leaf.seed, leaf.nbytes) == (tree[name].seed, tree[name].nbytes)
    assert tree["a"].nbytes == 128 * 2
    assert tree["a"].astype(jnp.float32).dtype == jnp.float32


def test_empty_weights():
    leaf = HashedArray.of(jnp.zeros((0,)), (0, 4))
    assert leaf.materialize().shape == (0, 4)
    assert hashed_values(jnp.zeros((0, 3)), 2).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Hashed(), "one of compression and buckets"),
        (lambda: Hashed(2, buckets=2), "one of compression and buckets"),
        (lambda: Hashed(0.5), "at least 1"),
        (lambda: Hashed(2, seed=-1), "2\\*\\*32 - 1"),
        (lambda: Hashed(2, init="mean"), "least_squares"),
        (lambda: Hashed(buckets=9)(jnp.ones((2, 2))), "at most 4"),
        (lambda: Hashed(2)(jnp.ones(())), "scalar"),
        (lambda: HashedArray.of(jnp.ones(0), (3,)), "K at least 1"),
        (lambda: HashedArray.of(jnp.ones(2), (2**20, 2**13)), "split it"),
    ],
)
def test_bad_input_is_refused(make, match):
    with pytest.raises(SpecError, match=match):
        make()
