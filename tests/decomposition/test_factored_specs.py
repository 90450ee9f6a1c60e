"""The specs of factored leaves: their errors against numpy, exact recovery, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.decomposition.factored import even_split

normal = lambda *shape: jnp.asarray(
    np.random.default_rng(len(shape)).normal(size=shape), jnp.float32
)


def planted(expression, sizes, lead=()):
    """A dense array that a network makes exactly."""
    rng = np.random.default_rng(1)
    terms = expression.split("->")[0].split(",")
    factors = [
        jnp.asarray(rng.normal(size=(*lead, *(sizes[c] for c in t))), jnp.float32) for t in terms
    ]
    return jc.FactoredArray.of(factors, expression).materialize()


# What makes the array exactly, and the spec that has to find it again.
EXACT = {
    "tucker conv": (
        jc.Tucker((2, 3)), "hwRS,iR,oS->h,w,i,o",
        {"h": 3, "w": 3, "i": 8, "o": 9, "R": 2, "S": 3},
    ),
    "tucker all": (
        jc.Tucker((2, 2, 2, 3), axes="all"), "RSTU,hR,wS,iT,oU->h,w,i,o",
        {"h": 3, "w": 4, "i": 8, "o": 9, "R": 2, "S": 2, "T": 2, "U": 3},
    ),
    "cp": (
        jc.CP(2, iterations=300), "hR,wR,iR,oR->h,w,i,o",
        {"h": 3, "w": 3, "i": 8, "o": 9, "R": 2},
    ),
    "train": (
        jc.TensorTrain(3, cores=3), "aiR,RbjS,Sck->abc,ijk",
        {"a": 2, "b": 3, "c": 4, "i": 3, "j": 3, "k": 4, "R": 3, "S": 3},
    ),
    "train conv": (
        jc.TensorTrain((2, 3, 2)), "iR,RhS,SwT,To->h,w,i,o",
        {"h": 3, "w": 3, "i": 8, "o": 9, "R": 2, "S": 3, "T": 2},
    ),
    "separable": (
        jc.Separable(4), "hiR,Rwo->h,w,i,o", {"h": 3, "w": 3, "i": 8, "o": 9, "R": 4},
    ),
    "kronecker": (
        jc.Kronecker(2, block=(4, 6)), "Tai,Tbj->ab,ij", {"T": 2, "a": 6, "i": 5, "b": 4, "j": 6},
    ),
    "monarch": (
        jc.Monarch(4), "kic,ckd->ki,cd", {"k": 4, "i": 6, "c": 4, "d": 5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("lead", [(), (2,)], ids=["one", "stack"])
@pytest.mark.thin(4)
def test_what_has_the_form_is_found(name, lead):
    spec, expression, sizes = EXACT[name]
    dense = planted(expression, sizes, lead)
    ndim = dense.ndim - len(lead)
    axes = {"w": jc.KernelAxes(tuple(range(-ndim, -1)), (-1,))}
    leaf = jc.compress({"w": dense}, {"w": spec}, axes=axes)["w"]
    assert leaf.shape == dense.shape
    assert leaf.nbytes < dense.nbytes
    # Singular vectors by Gram matrices: off by some sqrt(eps) = 3e-4 at worst, ALS by its tolerance.
    error = float(jnp.linalg.norm(leaf.materialize() - dense) / jnp.linalg.norm(dense))
    assert error < (5e-3 if name == "cp" else 1e-3)


@pytest.mark.parametrize(
    "spec", [jc.TensorRing(3, cores=3), jc.BlockTerm(2, 2), jc.CP(4)], ids=repr
)
def test_the_rest_takes_what_it_can(spec):
    """No form is recovered surely; what is left is less than all, and the ranks bound the gain."""
    dense = normal(36, 64)
    leaf = spec(dense)
    error = float(jnp.linalg.norm(leaf.materialize() - dense) / jnp.linalg.norm(dense))
    # Of a normal matrix n values cannot explain more than n degrees of freedom; twice that is room.
    values = sum(f.size for f in leaf.factors)
    assert 1 - 4 * values / dense.size < error**2 < 1


@pytest.mark.parametrize("order", ["HWIO", "OIHW"])
def test_the_channels_of_a_convolution(order):
    kernel = normal(3, 3, 8, 6)
    axes = jc.KernelAxes((-4, -3, -2), (-1,))
    if order == "OIHW":
        kernel, axes = kernel.transpose(3, 2, 0, 1), jc.KernelAxes((-3, -2, -1), (-4,))
    leaf = jc.compress({"w": kernel}, {"w": jc.Tucker((2, 3))}, axes={"w": axes})["w"]
    # The first rank is that of the inputs, wherever they stand.
    assert [f.shape for f in leaf.factors[1:]] == [(8, 2), (6, 3)]


def test_the_channels_of_a_transposed_convolution():
    axes = {"w": jc.KernelAxes((-4, -3, -1), (-2,))}  # height, width, outputs, inputs
    kernel = normal(3, 3, 16, 32)
    leaf = jc.compress({"w": kernel}, {"w": jc.Tucker((4, 8))}, axes=axes)["w"]
    assert [f.shape for f in leaf.factors[1:]] == [(32, 4), (16, 8)]
    leaf = jc.compress({"w": kernel}, {"w": jc.Separable(8)}, axes=axes)["w"]
    assert [f.shape for f in leaf.factors] == [(3, 32, 8), (8, 3, 16)]


def test_ranks_go_with_the_axes_as_they_are_written():
    leaf = jc.Tucker((4, 8), axes=(-1, -2))(normal(3, 3, 16, 32))
    assert [f.shape for f in leaf.factors[1:]] == [(32, 4), (16, 8)]


def test_large_half_precision_weights_have_finite_factors():
    w = (3e3 * (1 + 0.1 * normal(64, 64))).astype(jnp.float16)
    for spec in (jc.Tucker(4), jc.TensorTrain(4), jc.BlockTerm(2, 2), jc.CP(4)):
        leaf = spec(w)
        assert all(bool(jnp.all(jnp.isfinite(f))) for f in leaf.factors)
        error = leaf.materialize().astype(jnp.float32) - w.astype(jnp.float32)
        assert float(jnp.linalg.norm(error)) < 0.2 * float(jnp.linalg.norm(w.astype(jnp.float32)))


def test_empty_stacks_have_empty_factors():
    axes = {"w": jc.KernelAxes((-2,), (-1,))}
    for spec in (
        jc.LowRank("vbmf"),
        jc.LowRank(energy=0.5),
        jc.Tucker("vbmf"),
        jc.TensorTrain(error=0.1),
    ):
        context = jc.LeafContext("w", axes["w"])
        assert spec(jnp.zeros((0, 8, 8)), context).shape == (0, 8, 8)


def test_trains_by_any_error():
    w = jnp.asarray(np.random.default_rng(2).normal(size=(2, 12, 12)), jnp.float32)
    context = jc.LeafContext("w", jc.KernelAxes((-3, -2), (-1,)))
    leaf = jc.TensorTrain(error=0.9)(w, context)
    assert float(jnp.linalg.norm(leaf.materialize() - w)) <= 0.9 * float(jnp.linalg.norm(w))


def test_attention_kernels_keep_their_axes():
    axes = {"query/kernel": jc.KernelAxes((-3,), (-2, -1))}
    params = {"query": {"kernel": normal(32, 4, 8)}}
    for spec in (jc.TensorTrain(8), jc.Tucker((8, 2, 4), axes="all"), jc.CP(8)):
        leaf = jc.compress(params, {"**": spec}, axes=axes)["query"]["kernel"]
        assert leaf.shape == (32, 4, 8)
        x = normal(5, 32)
        run = jc.compressed(lambda x, w: jnp.einsum("bd,dhk->bhk", x, w))
        np.testing.assert_allclose(
            run(x, leaf), jnp.einsum("bd,dhk->bhk", x, leaf.materialize()), atol=1e-3
        )


def test_a_train_by_its_error():
    dense = normal(64, 64)
    for error in (0.1, 0.5):
        leaf = jc.TensorTrain(error=error)(
            planted("aiR,Rbj->ab,ij", dict.fromkeys("aibjR", 8)) + 0.01 * dense
        )
        made = planted("aiR,Rbj->ab,ij", dict.fromkeys("aibjR", 8)) + 0.01 * dense
        found = float(jnp.linalg.norm(leaf.materialize() - made) / jnp.linalg.norm(made))
        assert found <= error + 1e-5
    with pytest.raises(jc.CompressError, match="outside of jit"):
        jax.jit(jc.TensorTrain(error=0.1))(dense)


@pytest.mark.parametrize(
    ("spec", "shape", "word"),
    [
        (jc.Tucker(0.99), (3, 3, 8, 8), "saves nothing"),
        (jc.Tucker((1, 2, 3)), (8, 8), "one for each"),
        (jc.Tucker(2, axes=(-5,)), (8, 8), "are not those"),
        (jc.CP(64), (8, 8), "saves nothing"),
        (jc.TensorTrain(64), (8, 8), "saves nothing"),
        (jc.Separable(2), (8, 8), "window of two axes"),
        (jc.Kronecker(block=(3, 3)), (8, 8), "is of a matrix"),
        (jc.Monarch(3), (8, 8), "is of a matrix"),
        (jc.BlockTerm(2, (1, 2, 3)), (36, 64), "one for each"),
    ],
    ids=repr,
)
def test_refusals(spec, shape, word):
    with pytest.raises(jc.SpecError, match=word):
        spec(normal(*shape))


@pytest.mark.parametrize(
    "bad",
    [
        lambda: jc.Tucker(0), lambda: jc.Tucker(1.5), lambda: jc.CP(0), lambda: jc.TensorTrain(),
        lambda: jc.TensorTrain(4, error=0.1), lambda: jc.TensorRing(error=0.1), lambda: jc.Monarch(0),
        lambda: jc.BlockTerm(0, 2), lambda: jc.Kronecker(block=(2,)), lambda: jc.Separable(-1),
    ],
)  # fmt: skip
def test_bad_specs(bad):
    with pytest.raises(jc.SpecError, match="write"):
        bad()


def test_ranks_by_the_noise():
    kernel = planted("hwRS,iR,oS->h,w,i,o", {"h": 3, "w": 3, "i": 24, "o": 32, "R": 2, "S": 4})
    noisy = kernel + 0.1 * normal(3, 3, 24, 32)
    leaf = jc.Tucker("vbmf")(noisy)
    assert [f.shape for f in leaf.factors] == [(3, 3, 2, 4), (24, 2), (32, 4)]
    with pytest.raises(jc.CompressError, match="outside of jit"):
        jax.jit(jc.Tucker("vbmf"))(noisy)
    with pytest.raises(jc.SpecError, match="two axes"):
        jc.Tucker("vbmf", axes="all")(noisy)


def test_a_bias_has_no_form():
    with pytest.raises(jc.SpecError, match="kernels only"):
        jc.CP(2)(normal(8))


@pytest.mark.parametrize(("n", "count"), [(384, 3), (36, 2), (97, 2), (1, 3), (64, 4)])
def test_even_splits_are_the_best_of_all(n, count):
    import itertools

    divisors = [d for d in range(1, n + 1) if n % d == 0]
    best = min(max(c) for c in itertools.product(divisors, repeat=count) if np.prod(c) == n)
    found = even_split(n, count)
    assert np.prod(found) == n
    assert max(found) == best
    assert list(found) == sorted(found)


def test_narrow_leaves_and_recipes():
    leaf = jc.Tucker(0.25)(normal(3, 3, 8, 8).astype(jnp.bfloat16))
    assert leaf.dtype == jnp.bfloat16
    recipe = jc.Recipe.from_yaml("rules: [{match: '**', tucker: {ranks: [2, 3]}}]")
    assert recipe.rules[0].spec == jc.Tucker((2, 3))
