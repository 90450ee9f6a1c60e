"""Gates as leaves of a model: training, mapping, stacks, dtypes, files, and what finalize leaves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress.pruning import gates

SPECS = {
    "l0": gates.L0HardConcrete("channel"),
    "variational": gates.VariationalDropout(-6.0, threshold=1.0),
    "horseshoe": gates.Horseshoe(threshold=0.05),
    "bottleneck": gates.InformationBottleneck(threshold=8.8),
    "edge popup": gates.EdgePopup(0.7),
    "piggyback": gates.Piggyback(threshold=9.9e-3),
    "soft threshold": gates.SoftThreshold(0.3, group="filter"),
}
STOCHASTIC = ("l0", "variational", "horseshoe", "bottleneck")
# Where the deterministic pass has no weights that finalize cuts off.
EXACT = ("l0", "edge popup", "piggyback", "soft threshold")


def network(params, x):
    """A convolution, a scanned stack of layers, and a head whose kernel is used transposed too."""
    x = jax.lax.conv_general_dilated(
        x, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = jnp.mean(jnp.tanh(x), axis=(1, 2))
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"]["kernel"])
    y = x @ params["head"]["kernel"]
    return y, y @ params["head"]["kernel"].T


def dense(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"conv": (2, 2, 1, 6), "stack": (3, 6, 6), "head": (6, 5)}
    return {
        name: {"kernel": jax.random.normal(key, shape).astype(dtype)}
        for key, (name, shape) in zip(keys, shapes.items())
    }


X = jax.random.normal(jax.random.key(9), (4, 3, 3, 1))


@functools.cache
def trained(name):
    """A model after some sampled steps on a random target, and the losses on the way."""
    params = jc.compress(dense(), {"**/kernel": SPECS[name]})
    trainable, rest = jc.partition(params)
    tx = optax.adam(0.02)

    def loss(trainable, key):
        drawn = gates.sample(jc.combine(trainable, rest), key)
        y, _ = jc.compressed(network)(drawn, X)
        cost = gates.gate_penalty(jc.combine(trainable, rest))
        return jnp.mean((y - 0.3) ** 2) + 1e-4 * cost

    def step(carry, key):
        trainable, state = carry
        value, grads = jax.value_and_grad(loss)(trainable, key)
        updates, state = tx.update(grads, state, trainable)
        return (optax.apply_updates(trainable, updates), state), (value, grads)

    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    keys = jax.random.split(jax.random.key(1), 25)
    (trainable, _), (losses, grads) = run((trainable, tx.init(trainable)), keys)
    return jc.combine(trainable, rest), losses, grads


@pytest.mark.slow
def test_hard_gates_in_short_final_logits_are_the_same_bits_also_from_a_file(tmp_path):
    w = jax.random.normal(jax.random.key(0), (9, 5)).astype(jnp.bfloat16)
    specs = {"a": SPECS["edge popup"], "c": SPECS["soft threshold"]}
    params = jc.compress(dict.fromkeys(specs, w), specs)
    apply = jax.jit(jc.compressed(lambda p, x: [x @ p[name] for name in specs]))
    x = jax.random.normal(jax.random.key(2), (4, 9)).astype(jnp.bfloat16)
    before = apply(params, x)
    final = jc.finalize(params)
    jc.save(tmp_path / "gates.safetensors", params)
    back = jc.load(tmp_path / "gates.safetensors")
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for other in (final, back):
        for one, two in zip(before, apply(other, x)):
            assert one.dtype == jnp.bfloat16
            np.testing.assert_array_equal(one, two)
    for leaf in final.values():
        assert 0 < np.count_nonzero(np.asarray(leaf, np.float32)) < w.size
    trainable, rest = jc.partition(params)
    assert trainable["a"].weight is None
    assert trainable["c"].weight is not None
    assert jax.tree.structure(jc.combine(trainable, rest)) == jax.tree.structure(params)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_training_finalizing_saving(name, tmp_path):
    params, losses, grads = trained(name)
    assert np.all(np.isfinite(losses))
    assert losses[-1] < losses[0]
    # Everything that is trained has a gradient, and nothing else is in the tree of gradients.
    for leaf in jax.tree.leaves(grads, is_leaf=jc.is_compressed):
        for child in type(leaf).children:
            found = getattr(leaf, child)
            assert (found is not None) == (child in type(leaf).trainable)
            assert found is None or np.any(np.asarray(found))
    final = jc.finalize(params)
    apply = jax.jit(jc.compressed(network))
    before, after = apply(params, X), apply(final, X)
    report = gates.gate_report(params)
    assert len(report.rows) == 3
    assert report.kept == jc.pruning.sparsity_report(final).kept
    assert 0 <= report.sparsity < 1
    assert "conv/kernel" in str(report)
    for row, leaf in zip(report.rows, jax.tree.leaves(final, is_leaf=jc.is_compressed)):
        full = params[row["path"].split("/")[0]]["kernel"]
        gap = np.abs(
            np.asarray(jax.jit(lambda x: x.materialize())(full)) - np.asarray(leaf, np.float32)
        )
        np.testing.assert_allclose(row["largest"], gap.max(), rtol=1e-5, atol=1e-7)
        # Nothing is stored that was not in the forward pass.
        some = np.asarray(leaf) != 0
        np.testing.assert_allclose(gap[some], 0, atol=1e-6)
    if name in EXACT:
        for a, b in zip(before, after):
            np.testing.assert_array_equal(a, b)
        assert all(row["largest"] == 0 for row in report.rows)
    else:
        assert report.sparsity > 0
        assert any(row["largest"] > 0 for row in report.rows)
    # Training goes on from a file as if it had never stopped, noise included.
    jc.save(tmp_path / "gates.safetensors", params)
    back = jc.load(tmp_path / "gates.safetensors")
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for a, b in zip(apply(back, X), before):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_hard_gates_remove_what_they_say():
    kept = {name: gates.gate_report(trained(name)[0]) for name in EXACT[1:]}
    for row in kept["edge popup"].rows:
        each = 3 if row["path"].startswith("stack") else 1
        assert row["kept"] == each * jc.pruning.kept_count(row["size"] // each, 0.7)
    assert 0.1 < kept["piggyback"].sparsity < 0.9
    assert 0.1 < kept["soft threshold"].sparsity < 0.9
    for name in EXACT[1:]:
        stack = jc.finalize(trained(name)[0])["stack"]["kernel"]
        assert stack.shape == (3, 6, 6)
        assert stack.batch_ndim == 1 if jc.is_compressed(stack) else True


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.slow
def test_draws_differ_by_key_and_leaf_and_layer_and_nothing_is_hidden(name):
    params = jc.compress(dense(), {"**/kernel": SPECS[name]})
    loud = jax.tree.map(  # noise that float32 sees well
        lambda x: x.replace(**{n: getattr(x, n) + 6.0 for n in x.trainable if "log_" in n and n != "log_alpha"}),
        params, is_leaf=jc.is_compressed,
    )  # fmt: skip
    run = jax.jit(lambda key: jc.compressed(network)(gates.sample(loud, key), X)[0])
    keys = jax.random.split(jax.random.key(0), 2)
    one, two = run(keys[0]), run(keys[1])
    np.testing.assert_array_equal(one, run(keys[0]))
    if name != "l0":  # at its start most gates are open
        assert not np.array_equal(one, two)
        stack = gates.sample(loud, keys[0])["stack"]["kernel"]
        ratio = np.asarray(stack.materialize() / loud["stack"]["kernel"].weight)
        assert not np.allclose(ratio[0], ratio[1])
    mapped = jax.vmap(run)(keys)
    # A batched product may sum in another order.
    np.testing.assert_allclose(mapped, np.stack([one, two]), rtol=1e-4, atol=1e-5)
    assert all(leaf.noise is None for leaf in jax.tree.leaves(params, is_leaf=jc.is_compressed))
    assert jax.tree.structure(gates.quiet(gates.sample(params, keys[0]))) == jax.tree.structure(
        params
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_half_precision_and_odd_shapes(name):
    spec = SPECS[name]
    for shape in ((5,), (1, 1), (2, 7, 3)):
        w = jax.random.normal(jax.random.key(0), shape).astype(jnp.bfloat16)
        leaf = spec(w)
        assert leaf.dtype == jnp.bfloat16
        assert leaf.shape == shape
        assert leaf.batch_ndim == (1 if len(shape) == 3 else 0)
        assert leaf.finalize().dtype == jnp.bfloat16
        assert leaf.drawn(jax.random.key(0)).materialize().dtype == jnp.bfloat16
        # The gates are finer than the weight, and computed finer: one rounding at the end.
        wide = leaf.replace(weight=w.astype(jnp.float32), float_dtype=np.dtype(jnp.float32))
        np.testing.assert_array_equal(leaf.materialize(), wide.materialize().astype(jnp.bfloat16))
        np.testing.assert_array_equal(leaf.astype(jnp.bfloat16), leaf.materialize())
    empty = leaf.replace(**{n: getattr(leaf, n)[:0] for n in leaf.trainable})
    empty = empty.replace(weight=w[:0])
    assert empty.materialize().shape == (0, 7, 3)
    assert empty.finalize().shape == (0, 7, 3)


def test_gates_inside_other_leaves_and_factors_of_the_price():
    params = {"a": {"kernel": jax.random.normal(jax.random.key(0), (8, 6))}, "b": jnp.ones(3)}
    small = jc.compress(params, {"a/kernel": jc.chain(jc.LowRank(3), gates.L0HardConcrete())})
    assert isinstance(small["a"]["kernel"].left, gates.HardConcreteArray)
    drawn = gates.sample(small, jax.random.key(0))
    left, right = drawn["a"]["kernel"].left, drawn["a"]["kernel"].right
    assert left.noise.shape == (8, 3)
    assert right.noise.shape == (3, 6)
    assert not np.any(np.isin(left.noise, right.noise))
    price = small["a"]["kernel"].left.penalty()
    np.testing.assert_allclose(
        gates.gate_penalty(small, {"**.left": 2.0, "**": 0.0}), 2 * price, rtol=1e-6
    )
    assert gates.quiet(drawn)["a"]["kernel"].left.noise is None


def test_groups_of_several_weights_share_a_gate():
    w = jax.random.normal(jax.random.key(0), (5, 7))
    leaf = gates.L0HardConcrete("block:2x3")(w)
    assert leaf.log_alpha.shape == (3, 3)
    leaf = leaf.replace(log_alpha=jnp.full((3, 3), -9.0).at[1, 2].set(9.0).at[2, 0].set(9.0))
    expected = np.zeros((5, 7), bool)
    expected[2:4, 6:], expected[4:, :3] = True, True  # smaller boxes at the ends
    np.testing.assert_array_equal(leaf.mask(), expected)
    np.testing.assert_array_equal(leaf.materialize(), np.where(expected, w, 0))
    np.testing.assert_allclose(
        leaf.expected(),
        np.sum(np.asarray(leaf.open()) * [[6, 6, 2], [6, 6, 2], [3, 3, 1]]),
        rtol=1e-6,
    )
