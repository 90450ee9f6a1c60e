"""The verbs on whole trees: what they refuse, what they keep, what they give back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc

INT8 = jc.Quantize("int8")


def params():
    keys = jax.random.split(jax.random.key(0), 4)
    return {
        "embed": {"embedding": jax.random.normal(keys[0], (20, 8))},
        "mlp": {"kernel": jax.random.normal(keys[1], (8, 6)), "bias": jnp.arange(6.0)},
        "steps": jnp.arange(3),
        "out": [jax.random.normal(keys[2], (6, 4))],
    }


@pytest.mark.parametrize(
    ("leaf", "error", "text"),
    [
        (jnp.array([1.0, jnp.nan, jnp.inf]), jc.SpecError, "a/w: 2 of 3 values are NaN or infinite"),
        (jnp.zeros((0, 4)), jc.SpecError, r"a/w: shape \(0, 4\) holds no values.*'a/w': None"),
        (jnp.arange(4), jc.RuleError, "'a/w' of dtype int32.*put 'a/w': None"),
        (jax.random.key(0), jc.RuleError, r"'a/w' of dtype key.*put 'a/w': None"),
        ("text", jc.RuleError, "'a/w', which is str and no array"),
        (3.5, jc.RuleError, "'a/w', which is float and no array"),
        (jax.ShapeDtypeStruct((2, 2), jnp.float32), jc.RuleError, r"'a/w', which is a shape.*eval_"),
    ],
    ids=["nan", "empty", "integers", "key", "text", "number", "shape"],
)  # fmt: skip
def test_a_leaf_that_cannot_be_compressed_is_named(leaf, error, text):
    tree = {"a": {"w": leaf, "ok": jnp.ones((2, 2))}}
    with pytest.raises(error, match=text):
        jc.compress(tree, {"**": INT8})
    kept = jc.compress(tree, {"a/w": None, "**": INT8})
    assert kept["a"]["w"] is leaf
    assert isinstance(kept["a"]["ok"], jc.QuantizedArray)


def test_nothing_is_lost_when_a_later_leaf_is_refused():
    tree = {"a": jnp.ones((4, 4)), "b": jnp.arange(4)}
    with pytest.raises(jc.RuleError):
        jc.compress(tree, {"**": INT8}, donate=True)
    assert not tree["a"].is_deleted()  # what can be told before the first leaf is


def test_a_rule_that_matches_nothing_suggests_paths():
    with pytest.raises(jc.RuleError, match=r"'\*\*/kernal' matches no leaf.*'mlp/kernel'"):
        jc.compress(params(), {"**/kernal": INT8})
    with pytest.raises(jc.RuleError, match="write one such as"):
        jc.compress(params(), {"**/kernel": "int8"})
    with pytest.raises(jc.RuleError, match="no leaf of the tree"):
        jc.compress(params(), {"**/kernel": INT8}, axes={"mlp/kernal": jc.KernelAxes((-2,), (-1,))})


@pytest.mark.parametrize("value", [1.0, -2.0, 0.0])
@pytest.mark.parametrize(
    "spec",
    [
        INT8,
        jc.Quantize("uint2", symmetric=False),
        jc.Prune(0.0),
        jc.Codebook(1),
        jc.LowRank(1, allow_larger=True),
    ],
    ids=repr,
)
def test_one_element_leaves(spec, value):
    leaf = jc.compress({"w": jnp.full((1, 1), value)}, {"w": spec})["w"]
    # A bfloat16 scale is within 2**-9, and code 127 (or 3) of it is that far from the value.
    np.testing.assert_allclose(leaf.materialize(), value, rtol=2**-8)


BIG = {"float16": 65504.0, "bfloat16": 3.3895e38, "float32": 3.4e38}


@pytest.mark.parametrize("dtype", BIG)
@pytest.mark.parametrize("top", [1.0, 0.999, 0.996])
@pytest.mark.parametrize(
    "spec",
    [
        *(jc.Quantize(f"int{b}", convention=c)
          for b in (2, 4, 8) for c in ("absmax", "full", "no_clip")),
        *(jc.Quantize(f"uint{b}", symmetric=False) for b in (2, 4, 8)),
        jc.Codebook(2), jc.Prune(0.5),
    ],
    ids=repr,
)  # fmt: skip
def test_the_largest_finite_weights_stay_finite(spec, dtype, top):
    big = BIG[dtype] * top
    w = jnp.array([[-big, big], [big, big / 2], [-big / 3, big], [big, -big]], dtype)
    out = np.asarray(jc.compress({"w": w}, {"w": spec})["w"].materialize().astype(jnp.float32))
    assert np.isfinite(out).all()
    step = 1.0  # a step of two bits is most of the range
    if isinstance(spec, jc.Quantize):
        # Half a step, and a scale that two units in the last place may lower.
        step = {2: 1.05, 4: 0.16, 8: 0.02}[int(spec.format[-1])]
    if not isinstance(spec, jc.Prune):
        assert np.max(np.abs(out / big - np.asarray(w.astype(jnp.float32)) / big)) < step


@pytest.mark.parametrize("dtype", BIG)
@pytest.mark.parametrize("size", [1 / 3, 1e-20])
def test_a_low_rank_of_very_large_and_small_weights(dtype, size):
    # A third, for the terms of the product may each exceed their sum; above a quarter the inverse
    # of the largest float32 magnitude is subnormal.
    unit = jax.random.uniform(jax.random.key(0), (16, 12), minval=-1, maxval=1)
    big = BIG[dtype] * (size if dtype != "float16" else max(size, 1e-6))
    w = (unit * big).astype(dtype)
    out = np.asarray(jc.LowRank(12, allow_larger=True)(w).materialize().astype(jnp.float32)) / big
    # Of full rank: twelve products of factors that were rounded once.
    bound = 12 * max(float(jnp.finfo(dtype).eps), 1.2e-7 * 4)
    np.testing.assert_allclose(out, np.asarray(w.astype(jnp.float32)) / big, atol=bound)


def test_unmatched_leaves_are_the_very_same():
    tree = params()
    small = jc.compress(tree, {"**/kernel": INT8})
    assert small["mlp"]["bias"] is tree["mlp"]["bias"]
    assert small["steps"] is tree["steps"]
    assert jax.tree.structure(jc.decompress(small)) == jax.tree.structure(tree)


def test_donated_leaves_are_gone_and_tied_ones_stay():
    tree = params()
    table = tree["embed"]["embedding"]
    tree["tied"] = table
    kernel = tree["mlp"]["kernel"]
    wanted = INT8(kernel).materialize()
    small = jc.compress(tree, {"**/kernel": INT8, "**/embedding": INT8, "tied": INT8}, donate=True)
    assert kernel.is_deleted()
    assert not table.is_deleted()
    np.testing.assert_array_equal(small["mlp"]["kernel"].materialize(), wanted)
    same = jc.compress(params(), {"**/kernel": INT8})
    np.testing.assert_array_equal(same["mlp"]["kernel"].materialize(), wanted)


def test_a_compressed_leaf_is_compressed_further():
    small = jc.compress(params(), {"**/kernel": jc.Prune(0.5)})
    smaller = jc.compress(small, {"mlp/kernel": INT8})
    at_once = jc.compress(params(), {"**/kernel": jc.chain(jc.Prune(0.5), INT8)})
    np.testing.assert_array_equal(
        smaller["mlp"]["kernel"].materialize(), at_once["mlp"]["kernel"].materialize()
    )


def test_numpy_leaves_and_compressing_under_jit():
    tree = {"w": np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)}
    here = jc.compress(tree, {"w": INT8})
    there = jax.jit(lambda t: jc.compress(t, {"w": INT8}))(tree)
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_key_is_drawn_from_for_each_leaf():
    tree = {"a": jax.random.normal(jax.random.key(0), (40, 5))}
    tree["b"] = tree["a"] + 0
    rules = {"*": jc.Codebook(2, init="random", iterations=0)}
    one = jc.compress(tree, rules, key=jax.random.key(1))
    again = jc.compress(tree, rules, key=jax.random.key(1))
    assert not np.array_equal(one["a"].centroids, one["b"].centroids)
    np.testing.assert_array_equal(one["a"].centroids, again["a"].centroids)


def test_progress_is_shown_on_standard_error(capsys):
    jc.compress(params(), {"**/kernel": INT8, "**/embedding": INT8}, progress=True)
    shown = capsys.readouterr()
    assert "2/2" in shown.err
    assert not shown.out


RULES = {
    "embed/embedding": jc.Codebook(3),
    "mlp/kernel": jc.LowRank(2),
    "out/0": jc.chain(jc.LowRank(2), INT8),
}


def test_the_trainable_half_is_floating_and_both_make_the_whole():
    small = jc.compress(params(), RULES)
    trainable, rest = jc.partition(small)
    shapes = sorted(x.shape for x in jax.tree.leaves(trainable))
    assert shapes == [(2, 6), (6,), (8,), (8, 2)]
    whole = jc.combine(trainable, rest)
    assert jax.tree.structure(whole) == jax.tree.structure(small)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(small), strict=True):
        assert a is b


def forward(p, ids):
    x = p["embed"]["embedding"][ids]
    return jnp.tanh(x @ p["mlp"]["kernel"] + p["mlp"]["bias"]) @ p["out"][0]


def test_an_optax_loop_trains_what_is_small():
    small, ids = jc.compress(params(), RULES), jnp.arange(20)
    target = forward(params(), ids)
    trainable, rest = jc.partition(small)
    tx = optax.adam(1e-2)

    @jax.jit
    def step(trainable, state):
        def loss(t):
            out = jc.compressed(forward)(jc.combine(t, rest), ids)
            return jnp.mean((out - target) ** 2)

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    state, losses = tx.init(trainable), []
    for _ in range(30):
        trainable, state, value = step(trainable, state)
        losses.append(float(value))
    # Rank 2 of 6 bounds what training can reach; every form has a gradient that goes down.
    assert losses[-1] < 0.7 * losses[0]
    for name, (before, after) in {
        "centroids": (
            small["embed"]["embedding"].centroids,
            trainable["embed"]["embedding"].centroids,
        ),
        "factor": (small["mlp"]["kernel"].left, trainable["mlp"]["kernel"].left),
    }.items():
        assert not np.array_equal(before, after), name
    trained = jc.combine(trainable, rest)
    assert jc.nbytes(trained) == jc.nbytes(small)
    np.testing.assert_array_equal(trained["out"][0].left.codes, small["out"][0].left.codes)


def test_labels_and_masks_of_optax_are_trees_like_the_trainable_half():
    trainable, rest = jc.partition(jc.compress(params(), RULES))
    labels = jax.tree_util.tree_map_with_path(
        lambda path, _: "table" if "centroids" in jax.tree_util.keystr(path) else "rest", trainable
    )
    tx = optax.partition({"table": optax.set_to_zero(), "rest": optax.sgd(0.1)}, labels)
    grads = jax.grad(lambda t: jc.compressed(forward)(jc.combine(t, rest), jnp.arange(3)).sum())(
        trainable
    )
    updates, _ = tx.update(grads, tx.init(trainable), trainable)
    moved = optax.apply_updates(trainable, updates)
    left = trainable["mlp"]["kernel"].left
    np.testing.assert_allclose(
        moved["mlp"]["kernel"].left, left - 0.1 * grads["mlp"]["kernel"].left, rtol=1e-6
    )
    np.testing.assert_array_equal(
        moved["embed"]["embedding"].centroids, trainable["embed"]["embedding"].centroids
    )


def test_bytes_are_counted_for_arrays_shapes_keys_and_numbers():
    tree = {"a": jnp.ones((3, 5), jnp.bfloat16), "b": np.ones(2), "c": 1.5, "k": jax.random.key(0)}
    key_bytes = jax.random.key_data(tree["k"]).nbytes
    assert jc.nbytes(tree) == 30 + 16 + 8 + key_bytes
    shapes = jax.eval_shape(lambda: {"w": INT8(jnp.ones((4, 4)))})
    assert jc.nbytes(shapes) == 16 + 8


def test_finalize_goes_into_nested_leaves():
    params = {"w": jax.random.normal(jax.random.key(0), (16, 12))}
    for first in (jc.LowRank(4), jc.Prune(0.5), jc.Codebook(3)):
        fake = jc.compress(params, {"w": jc.chain(first, jc.FakeQuantize("int8"))})
        stored = jc.compress(params, {"w": jc.chain(first, jc.Quantize("int8"))})
        final = jc.finalize(fake)
        assert jax.tree.structure(final) == jax.tree.structure(stored)
        assert jc.nbytes(final) == jc.nbytes(stored) < jc.nbytes(fake)
        np.testing.assert_array_equal(final["w"].materialize(), fake["w"].materialize())
    same = jc.compress(params, {"w": jc.Quantize("int8")})
    assert jc.finalize(same)["w"] is same["w"]


def test_axes_that_do_not_fit_are_refused():
    params = {"w": jnp.ones((8, 6))}
    for wrong in (jc.KernelAxes((-3, -2), (-1,)), jc.KernelAxes((0,), (1,))):
        with pytest.raises(jc.RuleError, match=r"axes of 'w' are .* it has 2"):
            jc.compress(params, {"w": jc.Quantize("int8")}, axes={"w": wrong})


def test_a_tied_leaf_is_compressed_once():
    w, other = jnp.ones((16, 16)), jnp.ones((16, 16))
    params = {"a": w, "b": w, "c": other, "d": w}
    rules = {"d": jc.Quantize("int4"), "**": jc.Quantize("int8")}
    for lazy in (False, True):
        small = jc.compress(params, rules, lazy=lazy)
        assert small["a"] is small["b"]
        assert small["a"] is not small["c"]
        assert small["a"] is not small["d"]
    assert jc.compress(params, {"**": jc.Quantize("int8")}, donate=True)["a"] is not None
    assert not w.is_deleted()


def test_lazy_leaves_are_compressed_when_they_are_loaded():
    w = jax.random.normal(jax.random.key(0), (16, 16))
    rules = {"a": jc.Codebook(2, init="random")}
    lazy = jc.compress({"a": w, "b": w}, rules, key=jax.random.key(1), lazy=True)
    eager = jc.compress({"a": w, "b": w}, rules, key=jax.random.key(1))
    assert isinstance(lazy["a"], jc.LazyArray)
    assert lazy["b"] is w
    np.testing.assert_array_equal(lazy["a"].load().centroids, eager["a"].centroids)
    np.testing.assert_array_equal(jc.decompress(lazy)["a"], eager["a"].materialize())
    bad = jc.compress({"a": w.at[0, 0].set(jnp.nan)}, {"a": jc.Quantize("int8")}, lazy=True)
    with pytest.raises(jc.SpecError, match="a: 1 of 256 values are NaN"):
        bad["a"].load()
