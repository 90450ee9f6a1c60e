"""`ScaledArray` and `RotatedArray`: the same function, however the leaf is used."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jaxcompress as jc
from jaxcompress.arrays import hadamard
from jaxcompress.arrays.rotated import RotatedArray
from jaxcompress.arrays.scaled import ScaledArray

EPS = float(jnp.finfo(jnp.float32).eps)


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def scaled(weight, axis=-2, seed=7):
    shape = [n if a == axis + weight.ndim else 1 for a, n in enumerate(weight.shape)]
    return ScaledArray.of(weight, jnp.exp(normal(*shape, seed=seed)))


def rotated(w, axis=-2):
    return RotatedArray.rotate(w, axis=axis, key=jax.random.key(3))


MAKERS = {
    "scaled": scaled,
    "scaled int8": lambda w, axis=-2: scaled(jc.Quantize("int8", axis=axis)(w), axis),
    "scaled int4": lambda w, axis=-2: scaled(jc.Quantize("int4", axis=axis, group_size=4)(w), axis),
    "rotated": rotated,
    "rotated int4": lambda w, axis=-2: (leaf := rotated(w, axis)).replace(
        weight=jc.Quantize("int4", axis=axis)(leaf.weight)
    ),
    "both": lambda w, axis=-2: scaled(rotated(w, axis), axis),
    "scaled rank": lambda w, axis=-2: scaled(jc.LowRank(2)(w), axis),
}
RULES = {
    "dot": lambda w, x: x @ w,
    "dot, weight first": lambda w, x: lax.dot_general(w, x, (((0,), (1,)), ((), ()))),
    "transposed": lambda w, x: jnp.einsum("oi,bi->bo", w.T, x),
    "transposed back": lambda w, x: x @ w.T.T,
    "reshaped": lambda w, x: x @ w.reshape(1, *w.shape)[0].reshape(w.shape),
    "new axis": lambda w, x: jnp.einsum("bi,aio->bo", x, w[None]),
    "outputs cut": lambda w, x: x @ w[:, 1:3],
    "dynamic slice": lambda w, x: x @ lax.dynamic_slice_in_dim(w, 2, 3, 1),
    "inputs cut": lambda w, x: x[:, ::2] @ w[::2],
    "outputs contracted": lambda w, x: (x @ w) @ w.T,
    "rows": lambda w, x: w[jnp.array([3, 0, 3])],
    "rows out of bounds": lambda w, x: w.at[jnp.array([3, 99])].get(mode="fill", fill_value=2.0),
    "sum": lambda w, x: jnp.sum(w * w),
    "scan over inputs": lambda w, x: lax.scan(lambda c, z: (c + z[1] * z[0], 0.0),
                                              jnp.zeros(w.shape[1]), (w, x[0]))[0],
}  # fmt: skip


def close(y, expected, scale, terms):
    """Each of `terms` products is off by 3 eps / 2 and their sum by eps a term, at the most."""
    assert y.dtype == expected.dtype
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, rtol=0, atol=8 * terms * EPS * scale)


@pytest.mark.thin(4)
@pytest.mark.parametrize("make", MAKERS)
def test_the_function_is_that_of_the_dense_weight(make):
    leaf, x = MAKERS[make](normal(12, 8)), normal(5, 12, seed=1)
    dense = leaf.materialize()
    every = lambda w, x: {name: fn(w, x) for name, fn in RULES.items()}
    found, expected = jax.jit(jc.compressed(every))(leaf, x), jax.jit(every)(dense, x)
    # Two products in a row at most: 12 and 8 terms of up to |x| |w| each.
    scale = float(jnp.max(jnp.abs(x)) * max(1, jnp.max(jnp.abs(dense))) ** 2 * 12)
    for name in RULES:
        close(found[name], expected[name], scale, 20)


@pytest.mark.parametrize("make", MAKERS)
def test_gradients_of_inputs_are_those_of_the_dense_weight(make):
    leaf, x = MAKERS[make](normal(12, 8)), normal(5, 12, seed=1)
    loss = lambda w, x: jnp.sum(jnp.sin(x @ w))
    dense = leaf.materialize()
    scale = float(jnp.max(jnp.abs(dense))) * 8 * (1 + float(jnp.max(jnp.abs(x @ dense))))
    close(jax.grad(jc.compressed(loss), 1)(leaf, x), jax.grad(loss, 1)(dense, x), scale, 20)


@pytest.mark.thin(4)
@pytest.mark.parametrize("make", ["scaled", "scaled int8", "rotated", "rotated int4", "both"])
def test_stacked_leaves_are_sliced_by_scan_and_vmap(make):
    leaf = jax.vmap(MAKERS[make])(normal(3, 8, 8))
    assert leaf.shape == (3, 8, 8)
    assert leaf.batch_ndim >= 1
    x = normal(5, 8, seed=1)
    fn = lambda w, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
    dense = leaf.materialize()
    scale = 24 * float(jnp.max(jnp.abs(dense))) ** 3 * 8**3
    close(jc.compressed(fn)(leaf, x), fn(dense, x), scale, 8)
    batched = lambda w, x: jnp.einsum("bi,lio->lbo", x, w)
    close(jc.compressed(batched)(leaf, x), batched(dense, x), scale, 8)


def test_one_scan_slices_what_it_runs_over():
    leaf = jax.vmap(MAKERS["scaled int8"])(normal(3, 8, 8))
    fn = lambda w, x: lax.scan(lambda x, w: (x @ w, None), x, w)[0]
    jaxpr = str(jax.make_jaxpr(jc.compressed(fn))(leaf, normal(5, 8)))
    assert "f32[3,8,8]" not in jaxpr  # the stack is never expanded


@pytest.mark.thin(4)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("make", ["scaled int8", "rotated", "both"])
def test_dtypes(make, dtype):
    w, x = normal(16, 8, dtype=dtype), normal(4, 16, seed=1, dtype=dtype)
    leaf = MAKERS[make](w)
    assert leaf.dtype == dtype
    y = jc.compressed(lambda w, x: x @ w)(leaf, x)
    dense = np.asarray(leaf.materialize(), np.float64)
    exact = np.asarray(x, np.float64) @ dense
    # x and w are each rounded a few times, the outcome once; norms as bounds of the rotated.
    norms = np.linalg.norm(np.asarray(x, np.float64), axis=1).max() * max(
        np.linalg.norm(dense, axis=0).max(), 1
    )
    assert y.dtype == dtype
    limit = 16 * float(jnp.finfo(dtype).eps) * norms
    if make == "both":  # a scale moves large rows against small ones
        limit *= float(jnp.max(leaf.scale) / jnp.min(leaf.scale))
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=0, atol=limit)


@pytest.mark.parametrize("make", ["scaled int8", "rotated", "rotated int4"])
def test_a_cast_to_bfloat16_stays_small(make):
    leaf, x = MAKERS[make](normal(16, 8)), normal(4, 16, seed=1)
    fn = lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ np.asarray(leaf.materialize(), np.float64)
    y = np.asarray(jc.compressed(fn)(leaf, x), np.float64)
    norms = np.linalg.norm(x, axis=1).max() * np.linalg.norm(leaf.materialize(), axis=0).max()
    np.testing.assert_allclose(y, exact, rtol=0, atol=8 * 2.0**-8 * norms)
    assert type(leaf.astype(jnp.bfloat16)) is type(leaf)
    assert leaf.astype(jnp.int8) is None


@pytest.mark.thin(4)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("make", ["scaled", "scaled int8", "rotated"])
def test_convolutions(make, groups):
    kernel, x = normal(3, 3, 4, 6), normal(2, 8, 8, 4 * groups, seed=1)
    leaf = MAKERS[make](kernel, axis=-2)
    fn = lambda w, x: lax.conv_general_dilated(
        x, w, (2, 1), "SAME", feature_group_count=groups, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    dense = leaf.materialize()
    scale = float(jnp.max(jnp.abs(dense)) * jnp.max(jnp.abs(x)))
    close(jc.compressed(fn)(leaf, x), fn(dense, x), scale, 36)


def test_integer_inputs_are_scaled_in_the_weight_dtype():
    leaf = scaled(normal(4, 3))
    x = jnp.array([[1, 2, -3, 4]])
    y = jc.compressed(lambda w, x: lax.dot_general(
        x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32))(leaf, x)  # fmt: skip
    close(y, x.astype(jnp.float32) @ leaf.materialize(), 30.0, 4)


@pytest.mark.slow
@given(n=st.integers(1, 200), transposed=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=8)
def test_the_transform_is_orthogonal(n, transposed, seed):
    x = normal(2, n, seed=seed)
    y = hadamard.transform(x, transposed=transposed)
    # log2(n) + order additions, each off by eps / 2 of the norm.
    limit = EPS * (8 + hadamard.factors(n)[1]) * float(jnp.linalg.norm(x))
    np.testing.assert_allclose(
        hadamard.transform(y, transposed=not transposed), x, rtol=0, atol=limit
    )
    np.testing.assert_allclose(jnp.linalg.norm(y), jnp.linalg.norm(x), rtol=0, atol=limit)


@pytest.mark.parametrize("n", [1, 2, 64])
def test_a_power_of_two_is_the_matrix_of_scipy(n):
    expected = scipy.linalg.hadamard(n) / np.sqrt(n)
    np.testing.assert_allclose(hadamard.transform(jnp.eye(n)), expected, atol=4 * EPS)


@pytest.mark.thin(4)
@pytest.mark.parametrize("n", [12, 20, 24, 96, 384, 44, 160])
def test_lengths_of_one_block_mix_all_inputs_evenly(n):
    blocks, order, power = hadamard.factors(n)
    assert blocks == 1
    assert order * power == n
    matrix = np.asarray(hadamard.transform(jnp.eye(n)), np.float64) * np.sqrt(n)
    np.testing.assert_allclose(np.abs(matrix), 1, atol=16 * EPS)
    np.testing.assert_allclose(matrix @ matrix.T, n * np.eye(n), atol=n * n * 16 * EPS)


@pytest.mark.parametrize("order", [4, 8, 12, 20, 24, 224])
def test_paley(order):
    h = hadamard.paley(order).astype(int)
    assert set(np.unique(h)) == {-1, 1}
    assert np.array_equal(h @ h.T, order * np.eye(order, dtype=int))


@pytest.mark.parametrize("make", MAKERS)
def test_files_keep_every_bit(make, tmp_path):
    leaf = MAKERS[make](normal(12, 8))
    jc.save(tmp_path / "w.safetensors", {"kernel": leaf})
    back = jc.load(tmp_path / "w.safetensors")["kernel"]
    assert jax.tree.structure(back) == jax.tree.structure(leaf)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(leaf), strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)


def test_a_chain_goes_on_inside_along_the_same_inputs():
    w = normal(6, 8)
    axes = jc.KernelAxes((-1,), (-2,))
    context = jc.LeafContext("kernel", axes)
    leaf = jc.Quantize("int4")(scaled(w, axis=-1), context)
    assert leaf.weight.scale.shape == (6, 1)
    assert leaf.describe() == "scaled int4"
    assert jc.Quantize("int8")(rotated(w)).weight.describe() == "int8"


def test_finalize_and_training():
    leaf = scaled(jc.FakeQuantize("int4")(normal(12, 8)))
    fn = jax.jit(jc.compressed(lambda w, x: x @ w))
    x = normal(4, 12, seed=2)
    assert isinstance(leaf.finalize().weight, jc.QuantizedArray)
    assert np.array_equal(fn(leaf, x), fn(leaf.finalize(), x))
    grads = jax.grad(lambda w: jnp.sum(fn(w, x) ** 2))(leaf)
    assert float(jnp.max(jnp.abs(grads.weight.weight))) > 0
    assert jc.trainable_mask(leaf).weight.weight
    assert not jc.trainable_mask(leaf).scale


def test_refusals():
    w = normal(4, 3)
    with pytest.raises(jc.SpecError, match="does not fit a weight"):
        ScaledArray.of(w, jnp.ones(4))
    with pytest.raises(jc.SpecError, match="floating"):
        ScaledArray.of(w, jnp.ones((4, 1), int))
    with pytest.raises(jc.SpecError, match="not among the 2 axes"):
        RotatedArray.rotate(w, axis=2)
    with pytest.raises(jc.SpecError, match="write 4 of them"):
        RotatedArray.rotate(w, signs=jnp.ones(3))
