"""The specs of solvers on leaves: every kind of kernel is the solver on its matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcompress as jc
from jaxcompress import KernelAxes, SpecError
from jaxcompress.arrays.scaled import ScaledArray
from jaxcompress.arrays.summed import SumArray
from jaxcompress.quantization.solvers import (
    AWQ,
    GPTQ,
    HQQ,
    AdaRound,
    SignRound,
    SpQR,
    gptq,
)

FORMAT = {"group_size": 2, "scale_dtype": "float32"}
SPECS = {
    "gptq": GPTQ("int4", **FORMAT, act_order=True, tries=2),
    "awq": AWQ("int4", **FORMAT, steps=4, compensated=True),
    "spqr": SpQR("uint4", **FORMAT, symmetric=False, outliers=1 / 36),
    "adaround": AdaRound("int4", **FORMAT, steps=200),
    "signround": SignRound("int4", **FORMAT, steps=5),
}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def correlated(seed, *lead):
    x = np.random.default_rng(seed).normal(size=(*lead, 48, 12)) + 1
    return jnp.asarray(np.swapaxes(x, -1, -2) @ x, jnp.float32)


# All are matrices of 12 inputs and 12 outputs.
PARAMS = {
    "plain": {"kernel": normal(0, 12, 12), "bias": jnp.zeros(12)},
    "out": {"kernel": normal(1, 3, 4, 12)},
    "stack": {"kernel": normal(2, 2, 12, 12)},
    "conv": {"kernel": normal(3, 2, 2, 3, 12)},
}
STATS = {
    "plain/kernel": {(-2,): jc.InputStats(48, correlated(0))},
    "out/kernel": {(-3, -2): jc.InputStats(48, correlated(1))},
    "stack/kernel": {(-2,): jc.InputStats(48, correlated(2, 2))},
    "conv/kernel": {(-4, -3, -2): jc.InputStats(48, correlated(3))},
}
AXES = {"out/kernel": KernelAxes((-3, -2), (-1,))}


@pytest.mark.thin(4)
@pytest.mark.parametrize("name", ["plain", "out", "conv", "stack"])
def test_every_kind_of_kernel(name):
    part, path = {name: PARAMS[name]}, f"{name}/kernel"
    axes = {path: AXES[path]} if path in AXES else {}
    spec = GPTQ("int4", **FORMAT)
    leaf = jc.compress(part, {path: spec}, stats={path: STATS[path]}, axes=axes)[name]["kernel"]
    plain = jc.compress(part, {path: spec.plain()}, axes=axes)[name]["kernel"]
    assert jax.tree.structure(leaf) == jax.tree.structure(plain)  # the very form of Quantize
    assert leaf.nbytes == plain.nbytes
    ((_, seen),) = STATS[path].items()
    layers, grams = (np.reshape(x, (-1, 12, 12)) for x in (PARAMS[name]["kernel"], seen.gram))
    if name in ("conv", "out"):
        return  # groups end with a run: their codes are those of the next test
    for w, gram, got in zip(layers, grams, np.reshape(leaf.materialize(), (-1, 12, 12))):
        np.testing.assert_array_equal(got, gptq(w, gram, spec.plain()).weight)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in ("gptq", "awq") else pytest.mark.slow) for n in SPECS],
)
@pytest.mark.parametrize("path", ["out", pytest.param("conv", marks=pytest.mark.slow)])
def test_outputs_change_less_than_by_rounding(name, path):
    """As it is seen from outside: three channels at four places, or heads."""
    w, x = PARAMS[path]["kernel"], normal(9, 40, 4, 4, 3) + 1

    def forward(params, x):
        if path == "out":
            return jnp.einsum("bhd,hdn->bn", x[:, :3, :, 0], params["kernel"])
        return lax.conv_general_dilated(
            x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    params = {"kernel": w}
    stats = jc.observe(forward, params, [x], ("gram", "abs_mean"))
    axes = jc.kernel_axes(forward, params, x)
    spec = SPECS[name]
    plain = jc.Quantize(spec.format, **FORMAT, symmetric=spec.symmetric)
    change = {}
    for one in (spec, plain):
        small = jc.compress(params, {"kernel": one}, stats=stats, axes=axes)
        dense = forward(jc.decompress(small), x)
        np.testing.assert_allclose(jc.compressed(forward)(small, x), dense, rtol=1e-4, atol=1e-4)
        change[one] = float(jnp.sum((dense - forward(params, x)) ** 2))
    assert change[spec] < change[plain]
    kind = {"awq": ScaledArray, "spqr": SumArray}.get(name, jc.QuantizedArray)
    assert isinstance(small_leaf(params, spec, stats, axes), kind)


def small_leaf(params, spec, stats, axes):
    return jc.compress(params, {"kernel": spec}, stats=stats, axes=axes)["kernel"]


@pytest.mark.slow
def test_grouped_convolutions():
    def forward(params, x):
        return lax.conv_general_dilated(
            x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        )  # fmt: skip

    params, x = {"kernel": normal(4, 2, 2, 3, 24)}, normal(5, 8, 4, 4, 6) + 1
    stats = jc.observe(forward, params, [x], ("gram",))
    for spec in (GPTQ("int4"), SpQR("int4", outliers=0.02), AdaRound("int4", steps=50)):
        change = [
            float(jnp.sum((forward(jc.decompress(small), x) - forward(params, x)) ** 2))
            for small in (
                jc.compress(params, {"kernel": one}, stats=stats)
                for one in (spec, jc.Quantize("int4"))
            )
        ]
        assert change[0] < change[1]
    with pytest.raises(SpecError, match="kernel: AWQ has one factor for each input, and the 2"):
        jc.compress(params, {"kernel": AWQ("int4")}, stats=stats)


def test_what_awq_stores_is_what_it_measured():
    from jaxcompress.quantization.solvers import awq

    w, seen = PARAMS["plain"]["kernel"], STATS["plain/kernel"]
    leaf = jc.compress({"plain": {"kernel": w}}, {"**": AWQ("int4", **FORMAT)},
                       stats={"plain/kernel": seen})["plain"]["kernel"]  # fmt: skip
    found, inverse = awq(w, seen[(-2,)].gram, AWQ("int4", **FORMAT).plain())
    np.testing.assert_array_equal(leaf.materialize(), found.weight)
    np.testing.assert_array_equal(leaf.scale[:, 0], inverse)


def test_recipes_chains_and_jit():
    for spec in (*SPECS.values(), HQQ("uint4", group_size=4, symmetric=False, norm=0.5)):
        recipe = jc.Recipe.of({"plain/kernel": spec})
        assert jc.Recipe.from_yaml(recipe.to_yaml()) == recipe
    (rule,) = jc.Recipe.from_yaml("rules: [{match: '**', gptq: int4}]").rules
    assert rule.spec == GPTQ("int4")
    context = jc.LeafContext("w", KernelAxes((-2,), (-1,)), None, STATS["plain/kernel"][(-2,)])
    spec, w = GPTQ("int4", **FORMAT), PARAMS["plain"]["kernel"]
    traced = jax.jit(lambda w: spec(w, context))(w)
    np.testing.assert_array_equal(traced.materialize(), spec(w, context).materialize())


def at(stats):
    return jc.LeafContext("a/kernel", KernelAxes((-2,), (-1,)), None, stats)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda w: GPTQ("int4")(w), "leaf: GPTQ needs the Gram matrix"),
        (lambda w: AdaRound("int4")(w, at(None)), "a/kernel: AdaRound needs the Gram matrix"),
        (
            lambda w: GPTQ("int4")(w, at(jc.InputStats(4, jnp.ones(4)))),
            "a/kernel: it is only looked up, so that .* write Quantize instead",
        ),
        (lambda w: AWQ("int4")(w, at(jc.InputStats(4, jnp.eye(3)))), r"has shape \(3, 3\)"),
        (lambda w: GPTQ("int4")(jc.Quantize("int8")(w)), "needs the dense weight"),
        (lambda w: GPTQ("int4").plan(w, at(jc.InputStats(4, jnp.eye(4)))).apply(w, None), "call"),
        (lambda w: GPTQ("int4", axis=0), "leave out axis"),
        (lambda w: GPTQ("int4", rounding="stochastic"), "leave out rounding"),
        (lambda w: GPTQ("int4", damping=None), "share of the mean diagonal"),
        (lambda w: AdaRound("nf4"), "nf4"),
        (lambda w: SpQR("int4", outliers=-1), "share of weights to keep"),
        (lambda w: SignRound("int4", steps=0), "steps=0"),
        (lambda w: HQQ("int4", group_size=(2, 2)), "group_size of one number"),
        (lambda w: HQQ("int4", norm=2), "norm=2"),
    ],
)
def test_what_is_refused(call, text):
    with pytest.raises(SpecError, match=text):
        call(jnp.ones((4, 2)))
