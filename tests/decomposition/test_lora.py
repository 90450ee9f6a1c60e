"""LoRA and QLoRA: unchanged at first, trained by optax, and what merging loses."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress import SpecError
from jaxcompress.arrays.adapted import AdaptedArray
from jaxcompress.decomposition.adapters import merge, merge_gaps, partition_adapters
from jaxcompress.decomposition.lora import LoRA
from jaxcompress.rules import KernelAxes
from jaxcompress.specs import LeafContext

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import _digits

KEY = jax.random.key(0)
NF4 = jc.Quantize("nf4", group_size=64)
QLORA = jc.chain(NF4, LoRA(4))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def mlp(params, x):
    x = jax.nn.relu(x @ params["first"]["kernel"] + params["first"]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def weights():
    return {
        "first": {"kernel": normal(0, 64, 48) / 8, "bias": normal(1, 48) / 8},
        "head": {"kernel": normal(2, 48, 10) / 7, "bias": jnp.zeros(10)},
    }


RULES = {"**/kernel": QLORA}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("before", [None, NF4, jc.Prune(0.5), jc.LowRank(2)])
@pytest.mark.thin(8)
def test_at_first_the_function_is_what_it_was_exactly(dtype, before):
    """The change is zero, and what is added of it is zero, whatever the base and the dtype."""
    w, x = normal(0, 16, 12).astype(dtype), normal(1, 5, 16).astype(dtype)
    base = w if before is None else before(w)
    leaf = LoRA(4, alpha=8)(base, LeafContext("w", KernelAxes((-2,), (-1,)), KEY))
    assert leaf.scale == 2
    assert leaf.delta.dtype == dtype
    run = jax.jit(jc.compressed(lambda w, x: (x @ w, w[jnp.array([2, 0])], w.T @ x.T)))
    plain = jax.jit(lambda w, x: (x @ w, w[jnp.array([2, 0])], w.T @ x.T))
    want = plain(base, x) if before is None else run(base, x)
    for a, b in zip(run(leaf, x), want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("axes", "shape", "drawn", "inputs"),
    [
        (KernelAxes((-2,), (-1,)), (400, 90), "left", 400),
        (KernelAxes((-1,), (-2,)), (90, 400), "right", 400),  # a table, or PyTorch's linear layer
        (KernelAxes((-4, -3, -2), (-1,)), (3, 3, 40, 30), "left", 360),
        (KernelAxes((-3,), (-2, -1)), (5, 400, 6, 15), "left", 400),  # a stack of heads
    ],
)
def test_the_factor_of_the_inputs_is_drawn(axes, shape, drawn, inputs):
    leaf = LoRA(8)(jnp.zeros(shape), LeafContext("w", axes, KEY))
    assert leaf.shape == shape
    some, none = leaf.delta.left, leaf.delta.right
    if drawn == "right":
        some, none = none, some
    assert not np.any(none)
    # Thousands of values: their standard deviation is off by 1 / sqrt(2 n), a share of 2% at most.
    assert abs(float(jnp.std(some)) * inputs**0.5 - 1) < 0.06
    if len(shape) == 4 and drawn == "left" and shape[0] == 5:
        assert not np.array_equal(leaf.delta.left[0], leaf.delta.left[1])


def test_scales():
    assert LoRA(16).scale == 1
    assert LoRA(16, rank_stabilized=True).scale == 1
    assert LoRA(16, alpha=8).scale == 0.5
    assert LoRA(16, alpha=8, rank_stabilized=True).scale == 2  # 8 / sqrt(16)


def test_a_compressed_tree_is_adapted_by_rules_and_recipes():
    small = jc.compress(weights(), {"**/kernel": NF4})
    ours = jc.compress(small, {"**/kernel": LoRA(4)}, key=KEY)
    assert ours["first"]["kernel"].base is small["first"]["kernel"]
    recipe = jc.Recipe.from_yaml(
        "seed: 0\nrules:\n- match: '**/kernel'\n  chain:\n"
        "  - quantize: {format: nf4, group_size: 64}\n  - lora: {rank: 4, dtype: float32}"
    )
    other = jc.compress(weights(), recipe)
    assert jax.tree.structure(other) == jax.tree.structure(ours)
    # Each leaf is drawn from a key of its own; the order of the two in a chain does not matter.
    swapped = jc.compress(weights(), {"**/kernel": jc.chain(LoRA(4), NF4)}, key=KEY)
    for a, b in zip(jax.tree.leaves(swapped), jax.tree.leaves(ours), strict=True):
        np.testing.assert_array_equal(a, b)
    two = [tree["kernel"].delta.left for tree in (ours["first"], ours["head"])]
    assert not np.array_equal(two[0][:48], two[1])


def test_a_dense_base_is_held_and_donation_spares_it():
    w = weights()
    out = jc.compress(w, {"**/kernel": LoRA(2)}, key=KEY, donate=True)
    assert out["first"]["kernel"].base is w["first"]["kernel"]
    assert np.all(np.isfinite(mlp(jc.decompress(out), jnp.ones((1, 64)))))
    w = normal(0, 8, 8)
    jc.compress({"w": w}, {"w": NF4}, donate=True)
    assert w.is_deleted()


@pytest.mark.slow
def test_qlora_trains_its_factors_alone_on_real_digits():
    """From noise in the kernels to digits, though every code stays."""
    images, labels, test_images, test_labels = _digits.load()
    params = jc.compress(weights(), RULES, key=KEY)
    adapters, rest = partition_adapters(params)
    assert [x.shape for x in jax.tree.leaves(adapters)] == [(64, 4), (4, 48), (48, 4), (4, 10)]
    tx, run = optax.adam(1e-2), jc.compressed(mlp)

    def loss(adapters, x, y):
        logits = run(jc.combine(adapters, rest), x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(adapters, state, x, y):
        updates, state = tx.update(jax.grad(loss)(adapters, x, y), state)
        return optax.apply_updates(adapters, updates), state

    state = tx.init(adapters)
    for i in range(200):
        at = slice(100 * (i % 14), 100 * (i % 14) + 100)
        adapters, state = step(adapters, state, images[at], labels[at])
    assert step._cache_size() == 1
    trained = jc.combine(adapters, rest)
    for name in ("first", "head"):
        before, after = params[name]["kernel"].base, trained[name]["kernel"].base
        jax.tree.map(np.testing.assert_array_equal, before, after)
        np.testing.assert_array_equal(trained[name]["bias"], params[name]["bias"])
    logits = jax.jit(run)(trained, test_images)
    accuracy = lambda params: np.mean(
        np.argmax(jax.jit(run)(params, test_images), -1) == test_labels
    )
    assert accuracy(params) < 0.3
    assert accuracy(trained) > 0.85
    np.testing.assert_array_equal(jax.jit(run)(jc.finalize(trained), test_images), logits)

    gaps = merge_gaps(trained, merge(trained, NF4))
    kernel = trained["first"]["kernel"]
    wide = np.asarray(kernel.base.materialize(), np.float64) + np.asarray(
        kernel.delta.left, np.float64
    ) @ np.asarray(kernel.delta.right, np.float64)
    lost = np.linalg.norm(np.asarray(NF4(jnp.asarray(wide, jnp.float32)).materialize()) - wide)
    np.testing.assert_allclose(gaps["first/kernel"].weight, lost / np.linalg.norm(wide), rtol=1e-3)
    assert gaps["first/kernel"].change > gaps["first/kernel"].weight
    dense = merge(trained)
    assert all(not jc.is_compressed(x) for x in jax.tree.leaves(dense, is_leaf=jc.is_compressed))
    assert max(gap.weight for gap in merge_gaps(trained, dense).values()) < 1e-6
    np.testing.assert_allclose(mlp(dense, test_images), logits, rtol=1e-3, atol=1e-3)


def test_an_adapter_under_a_quantized_input_and_around_one():
    w, x = normal(0, 16, 8), normal(1, 5, 16)
    from jaxcompress.quantization import QuantizeInput

    context = LeafContext("w", KernelAxes((-2,), (-1,)), KEY)
    w8a8 = jc.chain(jc.Quantize("int8"), QuantizeInput("int8"))
    around = jc.chain(w8a8, LoRA(2))(w, context)
    assert isinstance(around, AdaptedArray)
    run = jax.jit(jc.compressed(lambda w, x: x @ w))
    np.testing.assert_array_equal(run(around, x), run(w8a8(w), x))
    inside = jc.chain(jc.Quantize("int8"), LoRA(2), QuantizeInput("int8"))(w, context)
    assert np.allclose(run(inside, x), x @ w, atol=0.2)


def test_it_jits_with_the_key_traced():
    context = LeafContext("w", KernelAxes((-2,), (-1,)))

    @jax.jit
    def make(w, key):
        return LoRA(2)(w, LeafContext("w", context.axes, key))

    made = make(jnp.ones((4, 4)), KEY)
    np.testing.assert_array_equal(made.base, jnp.ones((4, 4)))


def test_what_lora_refuses():
    for bad in (0, 1.5, True, None):
        with pytest.raises(SpecError, match="whole number of at least 1"):
            LoRA(bad)
    with pytest.raises(SpecError, match="alpha=0: write a number above 0"):
        LoRA(4, alpha=0)
    with pytest.raises(SpecError, match="dtype='int8': write a floating dtype"):
        LoRA(4, dtype="int8")
    with pytest.raises(SpecError, match="needs a key: write compress"):
        jc.compress(weights(), RULES)
    with pytest.raises(SpecError, match=r"first/bias: shape \(48,\) is no matrix"):
        jc.compress(weights(), {"first/bias": LoRA(1)}, key=KEY)
    with pytest.raises(SpecError, match="head/kernel: rank 11 is impossible for a 48 x 10"):
        jc.compress(weights(), {"head/kernel": LoRA(11)}, key=KEY)
    with pytest.raises(SpecError, match="no leaf is adapted"):
        partition_adapters(weights())
