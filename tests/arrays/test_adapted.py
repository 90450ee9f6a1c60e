"""A frozen weight and a change beside it: two products, and no gradient as large as the weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxcompress as jc
from jaxcompress import SpecError
from jaxcompress.arrays.adapted import AdaptedArray

BASES = {"dense": None, "nf4": jc.Quantize("nf4", group_size=8), "sparse": jc.Prune(0.5)}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def leaf_of(base="nf4", dtype=jnp.float32, shape=(16, 12), lead=(), scale=0.5):
    *first, last = shape
    w = normal(0, *lead, *shape).astype(dtype)
    left, right = normal(1, *lead, *first, 3), normal(2, *lead, 3, last)
    low = jc.LowRankArray.of(left.astype(dtype), right.astype(dtype), left_ndim=len(first))
    spec = BASES[base]
    return AdaptedArray.of(w if spec is None else spec(w), low, scale=scale)


def equations(jaxpr):
    """All of a jaxpr, those within others included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.thin(6)
def test_the_value_is_the_sum_rounded_once(base, dtype):
    leaf = leaf_of(base, dtype)
    dense = leaf.base if base == "dense" else leaf.base.materialize()
    exact = np.asarray(dense, np.float64) + 0.5 * (
        np.asarray(leaf.delta.left, np.float64) @ np.asarray(leaf.delta.right, np.float64)
    )
    got = leaf.materialize()
    assert (got.shape, got.dtype, leaf.dtype) == (leaf.shape, dtype, dtype)
    # Three terms of some 10 in float32 are off by 1e-5; then one rounding, half a unit.
    slack = np.abs(exact) * float(jnp.finfo(dtype).eps) / 2 * 1.01 + 1e-5
    assert np.all(np.abs(np.asarray(got, np.float64) - exact) <= slack)


@pytest.mark.parametrize("base", BASES)
def test_products_and_look_ups_are_those_of_the_dense_sum(base):
    leaf, x = leaf_of(base), normal(3, 5, 16)
    dense = leaf.materialize()
    for fn in (
        lambda w: x @ w,
        lambda w: w.T @ x.T,
        lambda w: x[:, :12] @ w.T,
        lambda w: w[jnp.array([3, 1, 3])],
        lambda w: w.reshape(4, 48).sum(0) + w[2:6, None].sum(),
    ):
        # Sums of 16 terms of some 10 in another order: 16 * 10 * 2**-24 = 1e-5, times a few.
        np.testing.assert_allclose(jc.compressed(fn)(leaf), fn(dense), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_no_gradient_is_as_large_as_the_weight(base):
    leaf, x = leaf_of(base), normal(3, 5, 16)

    def loss(delta, x):
        y = jc.compressed(lambda w, x: x @ w)(leaf.replace(delta=delta), x)
        return jnp.sum(jnp.sin(y))

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(leaf.delta, x)
    products = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    shapes = {e.outvars[0].aval.shape for e in products}
    assert len(products) >= 6
    assert not shapes & {(16, 12), (12, 16)}

    got, dx = jax.grad(loss, argnums=(0, 1))(leaf.delta, x)
    dense = lambda delta, x: jnp.sum(jnp.sin(x @ leaf.replace(delta=delta).materialize()))
    want, dense_dx = jax.grad(dense, argnums=(0, 1))(leaf.delta, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), got, want)
    np.testing.assert_allclose(dx, dense_dx, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_a_convolution_runs_as_a_thin_one_beside_that_of_the_base(base):
    leaf, x = leaf_of(base, shape=(3, 3, 8, 12)), normal(3, 2, 6, 6, 8)

    def run(w, x):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=layout)

    np.testing.assert_allclose(
        jc.compressed(run)(leaf, x), run(leaf.materialize(), x), rtol=1e-3, atol=1e-3
    )
    loss = lambda d: jnp.sum(jc.compressed(run)(leaf.replace(delta=d), x) ** 2)
    outs = [
        e.outvars[0].aval.shape for e in equations(jax.make_jaxpr(jax.grad(loss))(leaf.delta).jaxpr)
    ]
    assert (3, 3, 8, 3) in outs  # the gradient of the left factor
    grads = [
        e.outvars[0].aval.shape
        for e in equations(jax.make_jaxpr(jax.grad(loss))(leaf.delta).jaxpr)
        if e.primitive.name == "conv_general_dilated"
    ]
    assert grads
    assert not any(sorted(shape) == [3, 3, 8, 12] for shape in grads)


def test_scan_and_vmap_slice_both():
    leaf, x = leaf_of("nf4", shape=(8, 8), lead=(3,)), normal(3, 2, 8)
    assert leaf.batch_ndim == 1
    scan = lambda ws, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]
    got = jax.jit(jc.compressed(scan))(leaf, x)
    np.testing.assert_allclose(got, scan(leaf.materialize(), x), rtol=1e-4, atol=1e-4)
    batched = jax.vmap(jc.compressed(lambda w, x: x @ w), in_axes=(0, None))(leaf, x)
    np.testing.assert_allclose(batched, x @ leaf.materialize(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_compressed_base_stays_and_gives_the_same_bits(dtype, tmp_path):
    """Stored and trained run the same products, of factors in the same dtype."""
    leaf, x = leaf_of("nf4", dtype), normal(3, 5, 16).astype(dtype)
    wide = jax.tree.map(lambda y: y.astype(jnp.float32) * 1.001, leaf.delta)
    trained = leaf.replace(delta=wide)  # of more precision than is used
    stored = trained.finalize()
    assert isinstance(stored.base, jc.QuantizedArray)
    assert (trained.dtype, stored.delta.dtype) == (dtype, dtype)
    jc.save(tmp_path / "adapted.safetensors", {"w": stored})
    loaded = jc.load(tmp_path / "adapted.safetensors")["w"]
    assert jax.tree.structure(loaded) == jax.tree.structure(stored)
    run = jax.jit(jc.compressed(lambda w, x: (x @ w, w[jnp.array([1, 5])], w.T @ x.T)))
    for other in (stored, loaded):
        for a, b in zip(run(trained, x), run(other, x), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_dense_base_takes_the_change_in():
    leaf = leaf_of("dense", jnp.bfloat16)
    merged = leaf.finalize()
    assert isinstance(merged, jax.Array)
    np.testing.assert_array_equal(merged, leaf.materialize())


def test_casts_keep_the_change_thin():
    leaf = leaf_of("nf4")
    low = leaf.astype(jnp.bfloat16)
    assert (low.dtype, low.delta.dtype) == (jnp.bfloat16, jnp.float32)
    assert isinstance(low.base, jc.QuantizedArray)
    assert low.materialize().dtype == jnp.bfloat16
    up = leaf_of("nf4", jnp.bfloat16).astype(jnp.float32)
    assert isinstance(up.delta, jc.LowRankArray)
    assert isinstance(up.base, jax.Array)  # what is rounded to bfloat16 stays so
    assert leaf.astype(jnp.int32) is None


def test_only_the_change_is_trained_and_the_base_is_compressed_further():
    leaf = leaf_of("dense")
    mask = jc.trainable_mask(leaf)
    assert jax.tree.leaves(mask) == [False, True, True]
    both = jc.Quantize("int4", group_size=4)(leaf)
    assert both.describe() == "int4/4 + rank 3"
    assert both.base.scale.shape == (4, 12)  # groups along the leaf's own inputs
    assert both.nbytes == both.base.nbytes + 4 * 3 * (16 + 12)


def test_where_the_parts_lie():
    mesh = jax.make_mesh((1,), ("model",))
    where = leaf_of("dense").shardings(NamedSharding(mesh, PartitionSpec(None, "model")))
    assert where.base.spec == PartitionSpec(None, "model")
    assert where.delta.right.spec == PartitionSpec(None, "model")
    assert where.delta.left.spec == PartitionSpec(None, None)


def test_what_is_refused_of_an_adapted_leaf():
    low = jc.LowRankArray.of(jnp.ones((4, 1)), jnp.ones((1, 3)))
    with pytest.raises(SpecError, match=r"shape \(4, 3\) does not fit a weight of shape \(3, 4\)"):
        AdaptedArray.of(jnp.ones((3, 4)), low)
    with pytest.raises(SpecError, match="weight of dtype int32: write a floating one"):
        AdaptedArray.of(jnp.ones((4, 3), int), low)
    with pytest.raises(SpecError, match="scale=inf: write a finite number"):
        AdaptedArray.of(jnp.ones((4, 3)), low, scale=float("inf"))
