"""Product and residual codebooks: values, gradients, look-ups, files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.arrays.fake_product import FakeProductArray
from jaxcompress.arrays.product import ProductArray
from jaxcompress.errors import SpecError
from jaxcompress.quantization import QuantNoise
from jaxcompress.sharing.fake_product import FakeProductQuantize, refresh_codebooks
from jaxcompress.sharing.product import ProductQuantize


def drawn(stages=2, m=2, k=8, d=3, rows=5, blocks=4, length=None, axis=-1, dtype="float32"):
    """A leaf of random indices, and its dense array by plain loops."""
    rng = np.random.default_rng(0)
    indices = rng.integers(0, k, (rows, stages * blocks))
    books = rng.normal(size=(stages, m, k, d)).astype(dtype)
    length = blocks * d if length is None else length
    dense = np.zeros((rows, blocks * d), np.float32)
    for s in range(stages):
        for r in range(rows):
            for b in range(blocks):
                book = books[s, b * m // blocks]
                dense[r, b * d : (b + 1) * d] += book[indices[r, s * blocks + b]]
    dense = dense[:, :length]
    if axis == -2:
        indices, dense = indices.T, dense.T
    leaf = ProductArray.of(jnp.asarray(indices), jnp.asarray(books), axis=axis, length=length)
    return leaf, dense


CASES = {
    "one": {"stages": 1, "m": 1},
    "residual": {},
    "each place": {"m": 4, "stages": 1, "k": 200},
    "short": {"length": 11},
    "rows": {"axis": -2, "k": 5},
}


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_plain_loops(case):
    leaf, dense = drawn(**CASES[case])
    assert leaf.shape == dense.shape
    np.testing.assert_array_equal(leaf.materialize(), dense)
    np.testing.assert_array_equal(jax.jit(lambda x: x.materialize())(leaf), dense)
    bits = max(1, (leaf.codebooks.shape[-2] - 1).bit_length())
    n = leaf.indices.shape[leaf.axis]
    packed = -(-n * bits // 8) if bits in (1, 2, 4, 8) else -(-n // 8) * bits
    other = dense.size // dense.shape[leaf.axis]
    assert leaf.nbytes == packed * other + leaf.codebooks.nbytes


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_vectors_gradient_is_the_sum_over_its_blocks(dtype):
    indices = np.random.default_rng(1).integers(0, 4, (300, 20))
    books = jnp.ones((1, 1, 4, 2), dtype)
    leaf = ProductArray.of(jnp.asarray(indices), books)
    trainable, rest = jc.partition({"w": leaf})
    total = lambda t: jc.compressed(lambda p: p["w"].astype(jnp.float32).sum())(jc.combine(t, rest))
    grad = jax.grad(total)(trainable)["w"].codebooks
    counts = np.bincount(indices.ravel(), minlength=4)
    assert grad.dtype == dtype
    # Counted in float32 and rounded once.
    want = np.broadcast_to(counts[:, None], (4, 2))
    rtol = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(grad[0, 0].astype(jnp.float32), want, rtol=rtol)


def test_only_rows_that_are_looked_up_are_decoded():
    leaf, dense = drawn(rows=50)
    ids = jnp.array([[3, 49], [0, 3]])
    run = jc.compressed(lambda p, ids: p["embedding"][ids])
    np.testing.assert_array_equal(run({"embedding": leaf}, ids), dense[ids])
    made = str(jax.make_jaxpr(run)({"embedding": leaf}, ids))
    assert "50,12]" not in made  # the table itself is nowhere


def test_a_tied_table_runs_transposed_and_products_agree_bit_for_bit():
    leaf, dense = drawn(rows=6)
    x = jax.random.normal(jax.random.key(0), (4, 12))
    for fn, args in (
        (lambda p, x: x @ p["w"].T, x),
        (lambda p, x: x[:, :6] @ p["w"], x),
        (lambda p, x: p["w"][1:3], x),
    ):
        np.testing.assert_array_equal(
            jax.jit(jc.compressed(fn))({"w": leaf}, args), jax.jit(fn)({"w": dense}, args)
        )


def test_stacks_are_scanned_and_mapped():
    w = jax.random.normal(jax.random.key(0), (3, 8, 6))
    leaf = ProductQuantize(block=4, bits=3)(w)
    assert leaf.codebooks.shape == (3, 1, 1, 8, 4)
    assert leaf.batch_ndim == 1
    dense = leaf.materialize()
    _, rows = jax.lax.scan(lambda c, x: (c, x.materialize()), 0, leaf)
    np.testing.assert_array_equal(rows, dense)
    np.testing.assert_array_equal(jax.vmap(lambda x: x.materialize())(leaf), dense)


def test_file_chain_and_cast(tmp_path):
    w = jax.random.normal(jax.random.key(0), (16, 6))
    plain = ProductQuantize(block=4, bits=4)(w)
    leaf = jc.chain(ProductQuantize(block=4, bits=4), jc.Quantize("int8"))(w)
    assert leaf.codebooks.scale.shape == (1, 1, 1, 4)  # one for each coordinate
    assert leaf.describe() == "product 16 x 4 of int8"
    jc.save(tmp_path / "x.safetensors", {"a": plain, "b": leaf}, coded=True)
    again = jc.load(tmp_path / "x.safetensors")
    for name, before in (("a", plain), ("b", leaf)):
        np.testing.assert_array_equal(again[name].materialize(), before.materialize())
    # int8 of values below 4: half a step of 4 / 127.
    np.testing.assert_allclose(leaf.materialize(), plain.materialize(), atol=0.02)
    cast = plain.astype(jnp.bfloat16)
    np.testing.assert_array_equal(cast.materialize(), plain.materialize().astype(jnp.bfloat16))


def test_shapes_that_do_not_fit():
    with pytest.raises(SpecError, match="do not fit"):
        ProductArray.of(jnp.zeros((2, 3), int), jnp.zeros((2, 1, 4, 2)))
    with pytest.raises(SpecError, match="do not fit"):
        ProductArray.of(jnp.zeros((2, 3), int), jnp.zeros((1, 2, 4, 2)))


def test_what_is_trained_is_what_is_stored():
    w = jax.random.normal(jax.random.key(0), (12, 6))
    leaf = FakeProductQuantize(ProductQuantize(block=4, bits=3))(w)
    stored = leaf.finalize()
    np.testing.assert_array_equal(stored.materialize(), jax.jit(lambda x: x.materialize())(leaf))
    # Each block is the nearest of the vectors, by brute force.
    blocks = np.float64(w).reshape(3, 4, 6).transpose(0, 2, 1)
    far = ((blocks[:, :, None] - np.float64(leaf.codebooks[0, 0])) ** 2).sum(axis=-1)
    np.testing.assert_array_equal(stored.indices.materialize(), np.argmin(far, axis=-1))
    ct = jax.random.normal(jax.random.key(1), w.shape)
    grad = jax.grad(lambda w: jnp.sum(ct * leaf.replace(weight=w).materialize()))(w)
    np.testing.assert_array_equal(grad, ct)  # straight through


def test_quant_noise_rounds_whole_blocks():
    w = jax.random.normal(jax.random.key(0), (40, 30))
    spec = QuantNoise(FakeProductQuantize(ProductQuantize(block=4, bits=3)), 0.3, block_size=4)
    params = jc.compress({"w": w}, {"w": spec})
    noisy = jc.pruning.gates.sample(params, jax.random.key(1))["w"].materialize()
    hard = params["w"].materialize()
    rounded = np.asarray(noisy == hard).reshape(10, 4, 30)
    assert np.all(rounded.all(axis=1) | np.asarray(noisy == w).reshape(10, 4, 30).all(axis=1))
    # 300 draws of 0.3: five standard deviations are 0.13.
    assert abs(rounded.all(axis=1).mean() - 0.3) < 0.13
    assert isinstance(jc.finalize(params)["w"], ProductArray)


def test_refreshed_codebooks_lose_less():
    w = jax.random.normal(jax.random.key(0), (16, 6))
    leaf = FakeProductQuantize(ProductQuantize(block=2, bits=3))(w)
    moved = leaf.replace(weight=2 * w + 1)
    fresh = refresh_codebooks({"w": moved})["w"]
    lost = lambda x: float(jnp.sum((x.materialize() - x.weight) ** 2))
    assert isinstance(fresh, FakeProductArray)
    assert lost(fresh) < 0.5 * lost(moved)
