"""The network of factors against float64 einsums, dense convolutions and their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jaxcompress as jc
from jaxcompress.arrays.base import try_rules

# Expression and the sizes of its letters.
MATRICES = {
    "tucker": ("ir,rs,os->i,o", {"i": 12, "o": 10, "r": 3, "s": 4}),
    "cp": ("ir,or->i,o", {"i": 12, "o": 10, "r": 3}),
    "train": (
        "air,rbjs,sck->abc,ijk",
        {"a": 2, "b": 3, "c": 2, "i": 5, "j": 2, "k": 1, "r": 3, "s": 2},
    ),
    "ring": ("tair,rbjt->ab,ij", {"a": 3, "b": 4, "i": 2, "j": 5, "r": 2, "t": 2}),
    "kronecker": ("tai,tbj->ab,ij", {"a": 3, "b": 4, "i": 2, "j": 5, "t": 2}),
    "monarch": ("kic,ckd->ki,cd", {"k": 3, "i": 4, "c": 2, "d": 5}),
    "blocks": ("nrs,nir,nos->i,o", {"n": 2, "i": 12, "o": 10, "r": 2, "s": 3}),
}
KERNELS = {
    "tucker2": ("ir,hwrs,os->h,w,i,o", {"h": 3, "w": 3, "i": 8, "o": 6, "r": 3, "s": 4}),
    "cp": ("hr,wr,ir,or->h,w,i,o", {"h": 3, "w": 3, "i": 8, "o": 6, "r": 4}),
    "separable": ("hir,wro->h,w,i,o", {"h": 3, "w": 3, "i": 8, "o": 6, "r": 2}),
    "train": ("ia,ahb,bwc,co->h,w,i,o", {"h": 3, "w": 3, "i": 8, "o": 6, "a": 2, "b": 3, "c": 2}),
    "alone": ("iz,hwrs,os->h,w,i,o", {"h": 3, "w": 3, "i": 8, "o": 6, "z": 2, "r": 2, "s": 2}),
    "parts": (
        "air,hwrs,bos->h,w,ai,bo",
        {"h": 3, "w": 3, "a": 2, "i": 4, "b": 3, "o": 2, "r": 2, "s": 2},
    ),
}


def leaf_of(case, seed=0, dtype=jnp.float32, lead=()):
    expression, sizes = case
    terms = expression.split("->")[0].split(",")
    rng = np.random.default_rng(seed)
    factors = [rng.normal(size=(*lead, *(sizes[c] for c in t))) for t in terms]
    return jc.FactoredArray.of([jnp.asarray(f, dtype) for f in factors], expression)


def exact(leaf, of=lambda x: x):
    """The dense array in float64."""
    out = "".join(leaf.axes)
    terms = ",".join("..." + t for t in leaf.terms)
    factors = [of(np.asarray(f, np.float64)) for f in leaf.factors]
    return np.einsum(f"{terms}->...{out}", *factors).reshape(leaf.shape)


def near(found, leaf, run):
    """Whether `found` is `run` of the weight up to rounding.

    A sum of n products is off by at most (n + factors) eps times the sum of their magnitudes.
    """
    want = run(exact(leaf))
    most = run(exact(leaf, np.abs), absolute=True)
    terms = leaf.size + np.prod(leaf.ranks) + len(leaf.factors)
    eps = np.finfo(np.float32).eps
    assert found.shape == want.shape
    np.testing.assert_array_less(
        np.abs(np.asarray(found, np.float64) - want), terms * eps * most + 1e-30
    )


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.thin(4)
def test_products_with_a_matrix(name):
    leaf = leaf_of(MATRICES[name])
    near(leaf.materialize(), leaf, lambda w, absolute=False: w)
    x = np.random.default_rng(1).normal(size=(2, 3, 12)).astype(np.float32)
    y = x[..., :10]
    size = lambda v, absolute: np.abs(v) if absolute else v
    run = jax.jit(jc.compressed(lambda x, w: x @ w))
    near(run(x, leaf), leaf, lambda w, absolute=False: size(np.float64(x), absolute) @ w)
    back = jax.jit(jc.compressed(lambda y, w: jnp.einsum("abo,io->abi", y, w)))
    near(back(y, leaf), leaf, lambda w, absolute=False: size(np.float64(y), absolute) @ w.T)
    left = jax.jit(jc.compressed(lambda x, w: w.T @ x[0].T))
    near(left(x, leaf), leaf, lambda w, absolute=False: w.T @ size(np.float64(x[0]), absolute).T)


def test_what_runs_is_the_factors():
    """No array of the dense size comes up in a contraction of a few rows."""
    leaf = leaf_of(("ir,rs,os->i,o", {"i": 64, "o": 64, "r": 4, "s": 4}))
    jaxpr = jax.make_jaxpr(jc.compressed(jnp.matmul))(jnp.ones((2, 64)), leaf)
    sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
    assert max(sizes) < 64 * 64 / 4
    # Of ranks that do not pay the dense weight is made, in a deferred product.
    full = leaf_of(("ir,rs,os->i,o", {"i": 16, "o": 16, "r": 16, "s": 16}))
    jaxpr = jax.make_jaxpr(jc.compressed(jnp.matmul))(jnp.ones((512, 16)), full)
    assert [eqn.primitive.name for eqn in jaxpr.eqns] == ["deferred"]


CONV = functools.partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))
WINDOWS = {
    "same": {"window_strides": (1, 1), "padding": "SAME"},
    "strides": {"window_strides": (2, 1), "padding": "VALID"},
    "dilated": {"window_strides": (1, 2), "padding": ((2, 1), (0, 3)), "rhs_dilation": (2, 1)},
    "transposed": {"window_strides": (1, 1), "padding": ((2, 2), (1, 1)), "lhs_dilation": (2, 1)},
}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.thin(6)
def test_convolutions(name, window):
    leaf = leaf_of(KERNELS[name])
    x = np.random.default_rng(1).normal(size=(2, 9, 8, 8)).astype(np.float32)
    conv = lambda x, w: CONV(x, w, **WINDOWS[window])
    run = jax.jit(jc.compressed(conv))

    def reference(w, absolute=False):
        with jax.enable_x64(True):
            return np.asarray(
                conv(jnp.asarray(np.abs(x) if absolute else x, jnp.float64), jnp.asarray(w))
            )

    near(run(x, leaf), leaf, reference)
    names = [e.primitive.name for e in jax.make_jaxpr(jc.compressed(conv))(x, leaf).eqns]
    assert "deferred" not in names


@pytest.mark.parametrize("numbers", [("NCHW", "OIHW", "NCHW"), ("NHWC", "OHWI", "NCHW")])
def test_other_orders_of_the_axes(numbers):
    expression = {"OIHW": "ir,hwrs,os->o,i,h,w", "OHWI": "ir,hwrs,os->o,h,w,i"}[numbers[1]]
    leaf = leaf_of((expression, KERNELS["tucker2"][1]))
    x = np.random.default_rng(1).normal(size=(2, 8, 9, 8)).astype(np.float32)
    if numbers[0] == "NHWC":
        x = np.moveaxis(x, 1, 3)
    conv = lambda x, w: lax.conv_general_dilated(x, w, (1, 2), "SAME", dimension_numbers=numbers)

    def reference(w, absolute=False):
        with jax.enable_x64(True):
            return np.asarray(
                conv(jnp.asarray(np.abs(x) if absolute else x, jnp.float64), jnp.asarray(w))
            )

    near(jc.compressed(conv)(x, leaf), leaf, reference)


@pytest.mark.parametrize(
    "case",
    [
        (
            "ir,hwrs,os->h,w,i,o",
            {"h": 3, "w": 3, "i": 4, "o": 6, "r": 2, "s": 3},
        ),  # two groups of four
        ("hr,wr,ir,or->h,w,i,o", {"h": 3, "w": 3, "i": 1, "o": 8, "r": 2}),  # depthwise
    ],
)
def test_groups(case):
    leaf = leaf_of(case)
    groups = 8 // case[1]["i"]
    x = np.random.default_rng(1).normal(size=(2, 12, 12, 8)).astype(np.float32)
    conv = lambda x, w: CONV(x, w, (1, 1), "SAME", feature_group_count=groups)

    def reference(w, absolute=False):
        with jax.enable_x64(True):
            return np.asarray(
                conv(jnp.asarray(np.abs(x) if absolute else x, jnp.float64), jnp.asarray(w))
            )

    near(jc.compressed(conv)(x, leaf), leaf, reference)


def test_groups_run_factored():
    leaf = leaf_of(("ir,hwrs,os->h,w,i,o", {"h": 3, "w": 3, "i": 16, "o": 32, "r": 2, "s": 2}))
    conv = lambda x, w: CONV(x, w, (1, 1), "SAME", feature_group_count=2)
    jaxpr = jax.make_jaxpr(jc.compressed(conv))(jnp.ones((1, 8, 8, 32)), leaf)
    assert "deferred" not in [e.primitive.name for e in jaxpr.eqns]


@pytest.mark.parametrize("name", ["tucker2", "cp"])
def test_gradients_are_those_of_the_dense_kernel(name):
    leaf = leaf_of(KERNELS[name])
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 6, 6, 8)), jnp.float32)
    conv = lambda x, w: jnp.sum(jnp.sin(CONV(x, w, (1, 1), "SAME")))
    got = jax.jit(jax.grad(jc.compressed(conv), argnums=(0, 1)))(x, leaf)
    want = jax.jit(jax.grad(lambda x, leaf: conv(x, leaf.materialize()), argnums=(0, 1)))(x, leaf)
    # Sines of values up to some 50, off by 50 times 300 terms of eps, and as much once more.
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3 * float(jnp.max(jnp.abs(b))))


@pytest.mark.parametrize("name", ["train", "kronecker", "tucker"])
def test_rows_of_a_table(name):
    leaf = leaf_of(MATRICES[name])
    ids = jnp.array([[0, 11, 3], [7, 7, -1]])
    look_up = lambda w, ids: w[ids]
    near(
        jax.jit(jc.compressed(look_up))(leaf, ids), leaf,
        lambda w, absolute=False: w[np.asarray(ids)],
    )  # fmt: skip
    far = jc.compressed(lambda w, ids: w.at[ids].get(mode="fill"))(leaf, jnp.array([3, 12]))
    assert bool(jnp.isnan(far[1]).all())
    assert bool(jnp.isfinite(far[0]).all())
    jaxpr = jax.make_jaxpr(jc.compressed(look_up))(leaf, ids)
    assert all(v.aval.shape != leaf.shape for eqn in jaxpr.eqns for v in eqn.outvars)


def test_stays_factored_through_moves():
    leaf = leaf_of(KERNELS["parts"])
    moved = try_rules("transpose", (leaf,), {"permutation": (3, 2, 0, 1)})
    assert moved.axes == ("bo", "ai", "h", "w")
    np.testing.assert_array_equal(moved.materialize(), leaf.materialize().transpose(3, 2, 0, 1))
    reshape = lambda *shape: try_rules("reshape", (leaf,), {"new_sizes": shape, "dimensions": None})
    joined = reshape(9, 2, 4, 6)
    assert joined.axes == ("hw", "a", "i", "bo")
    np.testing.assert_array_equal(joined.materialize(), leaf.materialize().reshape(9, 2, 4, 6))
    assert reshape(3, 3, 12, 4) is NotImplemented
    assert reshape(3, 3, 8, 6, 1) is NotImplemented
    # A flattened kernel still runs as the factors do.
    x = jnp.ones((2, 72))
    jaxpr = jax.make_jaxpr(jc.compressed(lambda x, w: x @ w.reshape(72, 6)))(x, leaf)
    assert all(v.aval.size < leaf.size for eqn in jaxpr.eqns for v in eqn.outvars)


def test_stacks_and_scan():
    leaf = leaf_of(MATRICES["tucker"], lead=(3,))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 5, 12)), jnp.float32)
    assert leaf.shape == (3, 12, 10)
    near(
        jc.compressed(lambda x, w: jnp.einsum("lbi,lio->lbo", x, w))(x, leaf), leaf,
        lambda w, absolute=False: (np.abs(np.float64(x)) if absolute else np.float64(x)) @ w,
    )  # fmt: skip
    body = lambda c, xw: (c, xw[0] @ xw[1])
    scanned = jax.jit(jc.compressed(lambda x, w: lax.scan(body, 0.0, (x, w))[1]))(x, leaf)
    each = [x[k] @ jax.tree.map(lambda f: f[k], leaf).materialize() for k in range(3)]  # noqa: B023
    np.testing.assert_allclose(scanned, jnp.stack(each), rtol=1e-4, atol=1e-4)
    mapped = jax.vmap(jc.compressed(jnp.matmul))(x, leaf)
    np.testing.assert_allclose(mapped, jnp.stack(each), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_factors(dtype):
    leaf = leaf_of(MATRICES["train"], dtype=dtype)
    assert leaf.dtype == dtype
    # Summed in float32 and rounded once.
    want = exact(leaf)
    err = np.abs(np.asarray(leaf.materialize(), np.float64) - want)
    assert np.all(err <= float(jnp.finfo(dtype).eps) * np.abs(want) + 1e-4)
    out = jc.compressed(jnp.matmul)(jnp.ones((2, 12), dtype), leaf)
    assert out.dtype == dtype
    wide = leaf.astype(jnp.float32)
    assert wide.dtype == np.float32


def test_chain_save_and_load(tmp_path):
    leaf = leaf_of(("ir,rs,os->i,o", {"i": 64, "o": 64, "r": 8, "s": 8}))
    small = jc.Quantize("int8")(leaf)
    assert all(isinstance(f, jc.QuantizedArray) for f in small.factors)
    assert small.nbytes < leaf.nbytes / 3
    tree = {"a": leaf, "b": small, "same": leaf}
    for coded in (False, True):
        jc.save(tmp_path / "x.safetensors", tree, coded=coded)
        back = jc.load(tmp_path / "x.safetensors")
        assert jax.tree.structure(back) == jax.tree.structure(tree)
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(back), strict=True):
            np.testing.assert_array_equal(a, b)
    lazy = jc.load(tmp_path / "x.safetensors", lazy=True)
    assert lazy["b"].nbytes == small.nbytes
    assert "factored 8x8 of int8" in str(jc.contents(tmp_path / "x.safetensors"))
    x = jnp.ones((2, 64))
    np.testing.assert_array_equal(
        jc.compressed(jnp.matmul)(x, small), jc.compressed(jnp.matmul)(x, back["b"])
    )
    trained, rest = jc.partition({"w": leaf})
    assert len(jax.tree.leaves(trained)) == 3
    assert not jax.tree.leaves(rest)
    assert not jax.tree.leaves(jc.partition(small)[0])


@pytest.mark.parametrize(
    ("expression", "shapes", "word"),
    [
        ("ir,ro", [(2, 3), (3, 4)], "write the letters"),
        ("ir,ro->i,o", [(2, 3)], "write the letters"),
        ("ir,ro->i,o", [(2, 3), (4, 4)], "is both"),
        ("ir,ro->i,o", [(2, 3), (3,)], "one axis to a letter"),
        ("ir,ro->i,o", [(5, 2, 3), (4, 3, 4)], "same leading axes"),
        ("ii,io->i,o", [(2, 2), (2, 4)], "comes once"),
        ("ir,ro->i,p", [(2, 3), (3, 4)], "no factor has"),
    ],
)
def test_bad_expressions(expression, shapes, word):
    with pytest.raises(jc.SpecError, match=word):
        jc.FactoredArray.of([jnp.ones(s) for s in shapes], expression)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_network(data):
    """Random expressions of a matrix, and the order of its operands, against numpy."""
    letters = "abcdrst"
    sizes = {c: data.draw(st.integers(1, 3)) for c in letters}
    parts = data.draw(st.permutations("abcd"))
    cut = data.draw(st.integers(1, 3))
    axes = ("".join(parts[:cut]), "".join(parts[cut:]))
    terms = [data.draw(st.permutations(letters)) for _ in range(3)]
    terms = ["".join(t[: data.draw(st.integers(1, 4))]) for t in terms]
    terms.append("".join(c for c in "abcd" if all(c not in t for t in terms)) or "a")
    leaf = leaf_of((f"{','.join(terms)}->{','.join(axes)}", sizes), seed=3)
    x = np.random.default_rng(4).normal(size=(2, leaf.shape[0])).astype(np.float32)
    run = jc.compressed(lambda x, w: x @ w)
    near(run(x, leaf), leaf, lambda w, absolute=False: (np.abs(x) if absolute else x) @ w)
