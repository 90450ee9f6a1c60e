"""Sums of leaves: equal to the dense sum bit for bit, wherever they are used."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress import SpecError
from jaxcompress.arrays.summed import SumArray


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def leaf_of(w, dtype=jnp.float32):
    w = w.astype(dtype)
    outlier = jnp.abs(w) > 1.5
    codes = jc.Quantize("int4")(jnp.where(outlier, 0, w))
    return SumArray.of(codes, jc.SparseArray.from_mask(w, outlier))


@settings(max_examples=20)
@given(st.integers(1, 9), st.integers(1, 5), st.sampled_from(["float32", "bfloat16", "float16"]))
def test_the_sum_is_rounded_once(k, n, dtype):
    terms = [normal(seed, k, n).astype(dtype) for seed in range(3)]
    leaf = SumArray.of(*terms)
    wide = sum(np.asarray(x, np.float32) for x in terms)
    np.testing.assert_array_equal(leaf.materialize(), np.asarray(jnp.asarray(wide).astype(dtype)))
    assert (leaf.shape, leaf.dtype) == ((k, n), terms[0].dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_and_look_ups_are_those_of_the_dense_sum(dtype):
    leaf, x = leaf_of(normal(0, 12, 8), dtype), normal(1, 4, 12).astype(dtype)
    dense = leaf.materialize()
    for fn in (
        lambda w: x @ w,
        lambda w: w.T @ x.T,
        lambda w: w[jnp.array([3, 1, 3])],
        lambda w: jnp.take(w, jnp.array([1, 40]), axis=0, mode="clip"),
        lambda w: w.astype(jnp.bfloat16).sum(0),
    ):
        np.testing.assert_array_equal(jax.jit(jc.compressed(fn))(leaf), jax.jit(fn)(dense))


def test_it_trains_nests_saves_and_scans(tmp_path):
    w = normal(2, 6, 6)
    factors = jc.LowRank(2)(w)
    leaf = SumArray.of(jc.Quantize("int4")(w - factors.materialize()), factors)
    assert leaf.describe() == "int4 + rank 2"
    x = normal(3, 5, 6)
    loss = jc.compressed(lambda w: jnp.mean((x @ w - x) ** 2))
    trainable, rest = jc.partition(leaf)
    optimizer = optax.adam(0.05)
    state, first = optimizer.init(trainable), float(loss(leaf))
    for _ in range(20):
        grads = jax.grad(lambda t: loss(jc.combine(t, rest)))(trainable)
        updates, state = optimizer.update(grads, state)
        trainable = optax.apply_updates(trainable, updates)
    trained = jc.combine(trainable, rest)
    assert float(loss(trained)) < first / 2
    np.testing.assert_array_equal(trained.first.materialize(), leaf.first.materialize())
    jc.save(tmp_path / "sum.safetensors", {"w": trained})
    back = jc.load(tmp_path / "sum.safetensors")["w"]
    np.testing.assert_array_equal(back.materialize(), trained.materialize())
    assert jax.tree.structure(back) == jax.tree.structure(trained)

    stack = jax.tree.map(lambda *xs: jnp.stack(xs), leaf, trained)
    scan = lambda ws, x: jax.lax.scan(lambda x, w: (x @ w, None), x, ws)[0]
    assert stack.batch_ndim == 1
    got = jax.jit(jc.compressed(scan))(stack, x)
    np.testing.assert_allclose(got, scan(stack.materialize(), x), rtol=1e-5, atol=1e-5)


def test_a_fake_quantized_term_is_finalized():
    w = normal(4, 6, 4)
    leaf = SumArray.of(jc.FakeQuantize("int4")(w), jc.Quantize("int4")(w / 100))
    stored = leaf.finalize()
    assert isinstance(stored.first, jc.QuantizedArray)
    np.testing.assert_array_equal(stored.materialize(), leaf.materialize())


def test_what_is_refused():
    with pytest.raises(SpecError, match=r"shapes \(2,\) and \(3,\) do not add up"):
        SumArray.of(jnp.ones(2), jnp.ones(3))
    with pytest.raises(SpecError, match="write floating ones"):
        SumArray.of(jnp.ones(2, int), jnp.ones(2, int))
