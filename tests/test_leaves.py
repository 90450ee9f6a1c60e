"""What all leaves have in common: they are pytrees with a size, a dtype and a dense value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

W = jax.random.normal(jax.random.key(0), (3, 16, 12))
FORMS = {
    "int8": jc.Quantize("int8"),
    "int4_groups": jc.Quantize("int4", group_size=8),
    "uint3_affine": jc.Quantize("uint3", symmetric=False),
    "bitmask": jc.Prune(0.5),
    "gaps": jc.Prune(0.99),
    "low_rank": jc.LowRank(4),
    "codebook": jc.Codebook(3),
    "sparse_int4": jc.chain(jc.Prune(0.5), jc.Quantize("int4")),
    "sparse_codebook": jc.chain(jc.Prune(0.5), jc.Codebook(2)),
    "low_rank_int8": jc.chain(jc.LowRank(4), jc.Quantize("int8")),
    "low_rank_sparse": jc.chain(jc.LowRank(4), jc.Prune(0.5)),
    "codebook_int8": jc.chain(jc.Codebook(3), jc.Quantize("int8")),
}


@pytest.fixture(params=FORMS)
def leaf(request):
    return FORMS[request.param](W)


@pytest.mark.thin(8)
def test_shape_dtype_and_sizes_are_those_of_the_dense_array(leaf):
    dense = leaf.materialize()
    assert leaf.shape == dense.shape == W.shape
    assert (leaf.ndim, leaf.size) == (dense.ndim, dense.size)
    assert leaf.dtype == dense.dtype == W.dtype
    assert leaf.nbytes == sum(x.nbytes for x in jax.tree.leaves(leaf)) == jc.nbytes({"w": leaf})
    assert f"float32{list(W.shape)}" in repr(leaf)
    assert leaf.describe() in repr(leaf)


def test_a_leaf_is_a_pytree_node(leaf):
    flat, structure = jax.tree.flatten(leaf)
    again = jax.tree.unflatten(structure, flat)
    assert type(again) is type(leaf)
    assert all(isinstance(x, jax.Array) for x in flat)
    assert hash(structure) == hash(jax.tree.structure(again))
    out = jax.jit(lambda x: x)(leaf)
    assert jax.tree.structure(out) == structure
    np.testing.assert_array_equal(out.materialize(), leaf.materialize())
    shapes = jax.eval_shape(lambda: leaf)
    assert (shapes.shape, shapes.dtype, jc.nbytes(shapes)) == (leaf.shape, leaf.dtype, leaf.nbytes)
    jax.tree.map(lambda x: None, leaf)  # placeholders in place of arrays
    repr(jax.tree.unflatten(structure, [None] * len(flat)))


def test_scan_and_vmap_slice_a_stack(leaf):
    dense = leaf.materialize()
    _, rows = jax.lax.scan(lambda c, x: (c, x.materialize()), 0, leaf)
    if leaf.batch_ndim or isinstance(leaf, jc.QuantizedArray):
        np.testing.assert_array_equal(rows, dense)
        mapped = jax.vmap(lambda x: x.materialize())(leaf)
        np.testing.assert_array_equal(mapped, dense)


def test_a_cast_that_a_leaf_accepts_is_that_of_its_dense_array(leaf):
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        cast = leaf.astype(dtype)
        if cast is not None:
            assert cast.dtype == cast.materialize().dtype == dtype
            np.testing.assert_allclose(
                cast.materialize().astype(jnp.float32), leaf.materialize(), atol=0.05
            )


def test_only_floating_children_train(leaf):
    mask = jax.tree.leaves(jc.trainable_mask(leaf))
    arrays = jax.tree.leaves(leaf)
    assert len(mask) == len(arrays)
    for on, x in zip(mask, arrays):
        assert not on or jnp.issubdtype(x.dtype, jnp.floating)
    storage = isinstance(leaf, jc.QuantizedArray)
    nested = leaf.describe().endswith(("int4", "int8")) and not storage
    assert any(mask) is not (storage or nested)


def test_a_storage_leaf_is_final(leaf):
    assert leaf.finalize() is leaf
    assert jc.finalize({"w": leaf})["w"] is leaf


@pytest.mark.parametrize(
    ("left", "right"),
    [((4, 2), (3, 5)), ((4, 2), (2,)), ((2,), (2, 5)), ((7, 4, 2), (6, 2, 5))],
)
def test_factors_that_do_not_meet_are_refused(left, right):
    with pytest.raises(ValueError, match="do not meet in one rank"):
        jc.LowRankArray.of(jnp.ones(left), jnp.ones(right))


def test_leaves_of_two_types_have_two_structures():
    # Equal static fields and as many children: a program compiled for one must not run the other.
    learned = jc.quantization
    trees = [spec(jnp.eye(4)) for spec in (learned.DoReFa(3), learned.WRPN(3))]
    assert [x.static for x in trees[:1]] == [x.static for x in trees[1:]]
    one, other = map(jax.tree.structure, trees)
    assert one != other
    assert {one: 1, other: 2} == {other: 2, one: 1}
    assert [type(jc.finalize(x)).__name__ for x in trees] == ["CodebookArray", "QuantizedArray"]
