"""Product and residual quantization of leaves: errors, weightings, shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.errors import SpecError
from jaxcompress.rules import KernelAxes
from jaxcompress.sharing.product import ProductQuantize, ResidualQuantize
from jaxcompress.specs import LeafContext

W = jax.random.normal(jax.random.key(0), (16, 12))


def lost(leaf, w=W):
    return float(jnp.sum((leaf.materialize() - w) ** 2))


def test_the_error_is_that_of_scikit_learn_on_the_blocks():
    cluster = pytest.importorskip("sklearn.cluster")
    w = jax.random.normal(jax.random.key(1), (64, 40))
    leaf = ProductQuantize(block=4, bits=4, iterations=100)(w)
    blocks = np.asarray(w).reshape(16, 4, 40).transpose(0, 2, 1).reshape(-1, 4)
    # It has converged: scikit-learn finds nothing to improve. In float32, 1e-4 is plenty.
    book = np.asarray(leaf.codebooks[0, 0])
    peer = cluster.KMeans(16, init=book, n_init=1, tol=0, max_iter=100).fit(blocks)
    assert lost(leaf, w) == pytest.approx(peer.inertia_, rel=1e-4)
    # Another local minimum than the best of five starts, but none that is far from it.
    assert lost(leaf, w) < 1.1 * cluster.KMeans(16, n_init=5, random_state=0).fit(blocks).inertia_
    every = ((blocks[:, None] - np.asarray(leaf.codebooks[0, 0])) ** 2).sum(axis=-1)
    assert lost(leaf, w) == pytest.approx(every.min(axis=1).sum(), rel=1e-5)


def test_blocks_of_one_are_a_codebook():
    leaf = ProductQuantize(block=1, bits=3, iterations=100)(W)
    assert lost(leaf) < 1.15 * lost(jc.Codebook(3, iterations=100)(W))


@pytest.mark.parametrize("axis", ["input", "output"])
def test_codebooks_for_each_place_and_short_blocks(axis):
    w = W[:, :10] if axis == "output" else W[:10]
    leaf = ProductQuantize(block=4, bits=2, codebooks=None, axis=axis)(w)
    assert leaf.shape == w.shape
    assert leaf.codebooks.shape == (1, 3, 4, 4)
    one = ProductQuantize(block=4, bits=2, axis=axis)(w)
    assert lost(leaf, w) < lost(one, w)
    # What fills the last block up is no value: its two coordinates are those of k-means of pairs.
    last = (w[:, 8:] if axis == "output" else w[8:].T)[:, None]
    book = leaf.codebooks[0, 2, :, :2]
    best = jnp.min(jnp.sum((last - book) ** 2, axis=-1), axis=1).sum()
    got = leaf.materialize() - w
    got = jnp.sum((got[:, 8:] if axis == "output" else got[8:]) ** 2)
    assert float(got) == pytest.approx(float(best), rel=1e-5)


def test_stages_and_sweeps_lose_less():
    one = lost(ResidualQuantize(1, block=4, bits=3)(W))
    two = lost(ResidualQuantize(2, block=4, bits=3, sweeps=0)(W))
    swept = lost(ResidualQuantize(2, block=4, bits=3, sweeps=3)(W))
    assert swept <= two < 0.7 * one


def test_importances_weigh_rows():
    h = jnp.where(jnp.arange(12) < 3, 100.0, 1.0)
    spec = ProductQuantize(block=4, bits=3)
    weighed = spec.fit(W, h)
    error = lambda leaf: float(jnp.sum(h * (leaf.materialize() - W) ** 2))
    assert error(weighed) < error(spec(W))
    # A weight that is the same everywhere is none.
    np.testing.assert_allclose(
        spec.fit(W, 3.0 * jnp.ones(())).materialize(), spec(W).materialize(), atol=1e-5
    )


def test_the_gram_weighting_loses_less_of_the_outputs():
    # Inputs that are correlated within blocks alone: there the metric is that of the outputs.
    x = jax.random.normal(jax.random.key(2), (400, 4, 4))
    mixed = jax.random.normal(jax.random.key(3), (4, 4, 4))
    x = jnp.einsum("nbi,bij->nbj", x, mixed).reshape(400, 16)
    params = {"kernel": jax.random.normal(jax.random.key(4), (16, 200))}
    fn = lambda p, x: x @ p["kernel"]
    stats = jc.observe(fn, params, [x], ("gram", "second_moment"))
    errors = {}
    for weighting in (None, "second_moment", "gram"):
        rules = {"*": ProductQuantize(block=4, bits=4, weighting=weighting)}
        small = jc.decompress(jc.compress(params, rules, stats=stats))
        errors[weighting] = float(jnp.sum((fn(small, x) - fn(params, x)) ** 2))
    assert errors["gram"] < 0.9 * min(errors[None], errors["second_moment"])


def test_gram_of_a_convolution_is_cut_at_every_place():
    kernel = jax.random.normal(jax.random.key(0), (2, 2, 6, 5))
    x = jax.random.normal(jax.random.key(1), (8, 5, 5, 6))
    numbers = ("NHWC", "HWIO", "NHWC")
    fn = lambda p, x: jax.lax.conv_general_dilated(
        x, p["kernel"], (1, 1), "SAME", dimension_numbers=numbers
    )
    stats = jc.observe(fn, {"kernel": kernel}, [x], ("gram",))
    spec = ProductQuantize(block=4, bits=3, weighting="gram")
    context = LeafContext(
        "kernel", KernelAxes((-4, -3, -2), (-1,)), None, stats["kernel"][(-4, -3, -2)]
    )
    _, metric = spec.measured(kernel, context, spec.plan(kernel, context))
    gram = np.asarray(stats["kernel"][(-4, -3, -2)].gram)
    assert metric.shape == (1, 8, 4, 4)
    mean = np.trace(gram) / 32  # eight blocks of four, the short ones filled up
    np.testing.assert_allclose(
        metric[0, 2], gram[6:10, 6:10] / mean + 0.01 * np.eye(4), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        metric[0, 7, :2, :2], gram[22:24, 22:24] / mean + 0.01 * np.eye(2), rtol=1e-4, atol=1e-6
    )
    assert spec(kernel, context).shape == kernel.shape


def test_bfloat16_stacks_and_codebook_dtypes():
    w = jax.random.normal(jax.random.key(0), (2, 8, 6)).astype(jnp.bfloat16)
    leaf = ProductQuantize(block=4, bits=2)(w)
    assert (leaf.dtype, leaf.codebooks.dtype) == (jnp.bfloat16, jnp.bfloat16)
    alone = ProductQuantize(block=4, bits=2)(w[1])
    np.testing.assert_array_equal(leaf.materialize()[1], alone.materialize())
    narrow = ProductQuantize(block=4, bits=2, codebook_dtype="float16")(W)
    assert (narrow.dtype, narrow.codebooks.dtype) == (jnp.float32, jnp.float16)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProductQuantize(block=0), "block=0"),
        (lambda: ProductQuantize(bits=9), "bits=9"),
        (lambda: ProductQuantize(codebooks=0), "codebooks=0"),
        (lambda: ProductQuantize(axis="rows"), "axis='rows'"),
        (lambda: ProductQuantize(weighting="hessian"), "weighting="),
        (lambda: ProductQuantize(weighting="gram", axis="output"), "couples"),
        (lambda: ProductQuantize(codebook_dtype="int8"), "codebook_dtype"),
        (lambda: ProductQuantize(codebooks=3)(W), "do not divide 4 blocks"),
        (lambda: ProductQuantize(weighting="gram")(W), "jc.observe"),
        (lambda: ProductQuantize(axis="output")(jnp.ones(3)), "no output axis"),
        (lambda: ProductQuantize()(jnp.ones((4, 0))), "holds no values"),
        (lambda: ResidualQuantize(0), "stages=0"),
        (lambda: ProductQuantize().fit(W, jnp.zeros(())), "some positive"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(SpecError, match=message):
        make()
