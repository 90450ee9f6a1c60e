"""`SparseGPT` on leaves: every kind of kernel is the solver on its matrix, from `observe`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcompress as jc
from jaxcompress import KernelAxes, SpecError
from jaxcompress.pruning import kept_count
from jaxcompress.pruning.solvers import SparseGPT, sparsegpt


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def correlated(seed, *lead):
    x = np.random.default_rng(seed).normal(size=(*lead, 48, 12)) + 1
    return jnp.asarray(np.swapaxes(x, -1, -2) @ x, jnp.float32)


# All are matrices of 12 inputs and 12 outputs to the solver, so that it is compiled once.
PARAMS = {
    "plain": {"kernel": normal(0, 12, 12), "bias": jnp.zeros(12)},
    "query": {"kernel": normal(1, 12, 3, 4)},
    "stack": {"kernel": normal(2, 2, 12, 12)},
    "conv": {"kernel": normal(3, 2, 2, 3, 12)},
}
GRAMS = {
    "plain/kernel": ((-2,), correlated(0)),
    "query/kernel": ((-3,), correlated(1)),
    "stack/kernel": ((-2,), correlated(2, 2)),
    "conv/kernel": ((-4, -3, -2), correlated(3)),
}
STATS = {path: {axes: jc.InputStats(48, gram)} for path, (axes, gram) in GRAMS.items()}


@pytest.mark.parametrize(
    "kinds", [("query", "conv"), pytest.param(("stack",), marks=pytest.mark.slow)]
)
def test_every_kind_of_kernel(kinds):
    kinds = {name: PARAMS[name] for name in kinds}
    stats = {f"{name}/kernel": STATS[f"{name}/kernel"] for name in kinds}
    small = jc.compress(kinds, {"**/kernel": SparseGPT(0.4)}, stats=stats)
    for name, part in kinds.items():
        layers = np.reshape(part["kernel"], (-1, 12, 12))
        leaf = small[name]["kernel"]
        assert isinstance(leaf, jc.SparseArray)
        assert leaf.kept == kept_count(144, 0.4)
        dense = np.asarray(leaf.materialize()).reshape(layers.shape)
        grams = np.reshape(GRAMS[f"{name}/kernel"][1], (-1, 12, 12))
        for layer, gram, got in zip(layers, grams, dense):
            want = sparsegpt(layer, gram, sparsity=0.4).weight
            # A stack runs in another program, and rounds differently.
            np.testing.assert_allclose(got, want, atol=1e-5)
            np.testing.assert_array_equal(np.asarray(got) == 0, np.asarray(want) == 0)


@pytest.mark.slow
def test_a_grouped_convolution_as_it_is_observed():
    """The error that the solver reports is that of the outputs of the convolution."""

    def forward(params, x):
        return lax.conv_general_dilated(
            x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        )  # fmt: skip

    params, x = {"kernel": normal(4, 2, 2, 3, 24)}, normal(5, 8, 4, 4, 6)
    ((axes, seen),) = jc.observe(forward, params, [x], ("gram",))["kernel"].items()
    assert seen.gram.shape == (2, 12, 12)
    stats = {"kernel": {axes: seen}}
    small = jc.compress(params, {"kernel": SparseGPT(0.7)}, stats=stats)
    assert small["kernel"].kept == kept_count(288, 0.7) == 86
    dense = small["kernel"].materialize()
    error = 0.0
    for group in range(2):  # 43 of 144 weights stay in each
        own = slice(12 * group, 12 * group + 12)
        w = params["kernel"][..., own].reshape(12, 12)
        found = sparsegpt(w, seen.gram[group], sparsity=101 / 144)
        np.testing.assert_allclose(dense[..., own].reshape(12, 12), found.weight, atol=1e-5)
        error += float(found.error)
    change = forward(params, x) - forward({"kernel": dense}, x)
    assert error == pytest.approx(float(jnp.sum(change**2)), rel=1e-4)


@pytest.mark.slow
def test_pattern_and_codes_lie_along_the_last_input_axis():
    """Of a convolution with three channels: no group of four goes beyond them."""
    params, only = PARAMS, {"conv": PARAMS["conv"]}
    own = {"conv/kernel": STATS["conv/kernel"]}
    spec = SparseGPT(0.5, pattern="2:4", quantize="int4", group_size=2)
    leaf = jc.compress(only, {"**": spec}, stats=own)["conv"]["kernel"]
    assert isinstance(leaf, jc.QuantizedArray)
    assert (leaf.axis, leaf.group_size, leaf.format) == (-2, 2, "int4")
    like = jc.Quantize("int4", group_size=2)(
        params["conv"]["kernel"], jc.LeafContext("", KernelAxes((-4, -3, -2), (-1,)))
    )
    assert leaf.scale.shape == like.scale.shape == (2, 2, 2, 12)
    assert leaf.nbytes == like.nbytes
    kept = np.asarray(leaf.materialize() != 0).sum(axis=2)
    assert (kept <= 2).all()
    sparse = jc.compress(only, {"**": SparseGPT(0.5, pattern="2:4")}, stats=own)["conv"]["kernel"]
    assert (np.asarray(sparse.mask()).sum(axis=2) == 2).all()


@pytest.mark.slow
def test_values_of_a_leaf_are_the_very_values_of_the_solver():
    w, own = PARAMS["plain"]["kernel"], {"plain/kernel": STATS["plain/kernel"]}
    gram = GRAMS["plain/kernel"][1]
    quantize = jc.Quantize("uint4", group_size=4, symmetric=False)
    leaf = jc.compress(
        {"plain": {"kernel": w}}, {"**": SparseGPT(0.5, quantize=quantize)}, stats=own
    )["plain"]["kernel"]
    found = sparsegpt(w, gram, sparsity=0.5, quantize=quantize)
    np.testing.assert_array_equal(leaf.materialize(), found.weight)
    assert not np.asarray(leaf.materialize())[~np.asarray(found.mask)].any()
    assert jax.tree.structure(leaf) == jax.tree.structure(quantize(w))  # what Quantize stores


def test_transposed_weights_and_traced_ones():
    w, gram = PARAMS["plain"]["kernel"], GRAMS["plain/kernel"][1]
    context = jc.LeafContext("w", KernelAxes((-1,), (-2,)), None, jc.InputStats(64, gram))
    leaf = SparseGPT(0.5)(w.T, context)
    want = sparsegpt(w, gram, sparsity=0.5).weight
    np.testing.assert_array_equal(leaf.materialize(), want.T)
    traced = jax.jit(lambda w: SparseGPT(0.5)(w, context))(w.T)
    np.testing.assert_array_equal(traced.materialize(), want.T)


def test_recipes_and_chains():
    spec = SparseGPT(0.5, pattern="2:4", quantize=jc.Quantize("int4", group_size=64))
    assert spec == SparseGPT(0.5, pattern="2:4", quantize="int4", group_size=64)
    recipe = jc.Recipe.of({"plain/kernel": spec})
    assert jc.Recipe.from_yaml(recipe.to_yaml()) == recipe
    (rule,) = jc.Recipe.from_yaml("rules: [{match: '**', sparsegpt: 0.5}]").rules
    assert rule.spec == SparseGPT(0.5)
    chained = jc.compress(
        PARAMS, {"plain/kernel": jc.chain(SparseGPT(0.6), jc.Quantize("int8"))}, stats=STATS
    )
    assert chained["plain"]["kernel"].describe() == "59.7% sparse bitmask of int8"


def at(gram):
    axes = KernelAxes((-2,), (-1,))
    return jc.LeafContext("a/kernel", axes, None, jc.InputStats(1, gram))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda w: SparseGPT(0.5)(w), r"leaf: .*write compress\(\.\.\., stats=jc\.observe"),
        (lambda w: SparseGPT(0.5)(w, at(None)), "a/kernel: SparseGPT needs the Gram matrix"),
        (lambda w: SparseGPT(0.5)(w, at(jnp.eye(3))), r"has shape \(3, 3\).*needs \(4, 4\)"),
        (lambda w: SparseGPT(0.5)(w, at(jnp.ones(4))), "only looked up"),
        (lambda w: SparseGPT(0.5)(jc.Prune(0.5)(w), at(jnp.eye(4))), "put it first"),
        (lambda w: SparseGPT(0.5)(w[0, 0], at(jnp.eye(4))), "a scalar has no inputs"),
        (lambda w: SparseGPT(0.5).plan(w, at(jnp.eye(4))).apply(w, None), "call the spec"),
        (lambda w: SparseGPT(0.5, quantize="int9"), "unknown format 'int9'"),
        (lambda w: SparseGPT(0.5, quantize=jc.Quantize("int4", axis=0)), "leave out axis"),
        (lambda w: SparseGPT(0.5, pattern="1:4"), "removes 0.75 of the weights"),
        (lambda w: SparseGPT(None), "sparsity=None: write the share"),
    ],
)
def test_what_is_refused(call, text):
    with pytest.raises(SpecError, match=text):
        call(jnp.ones((4, 3)))
