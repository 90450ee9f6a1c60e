"""Ties: one array for several places, its gradient their sum, its bytes stored once."""

import os

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress.arrays.template import TemplateArray
from jaxcompress.errors import FileError, RuleError, SpecError
from jaxcompress.sharing.templates import share_templates, template_bank
from jaxcompress.sharing.tying import Ties, Transposed, layers, tie


def network(dtype=jnp.float32):
    keys = iter(jax.random.split(jax.random.key(0), 20))
    draw = lambda *shape: jax.random.normal(next(keys), shape).astype(dtype)
    layer = lambda: {"kernel": draw(8, 8), "bias": draw(8)}
    return {
        "embedding": draw(20, 8),
        "layers": {f"layer_{i}": layer() for i in range(3)},
        "head": {"kernel": draw(8, 20), "bias": None},
    }


def apply(p, ids):
    x = p["embedding"][ids]
    for layer in p["layers"].values():
        x = x + jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x @ p["head"]["kernel"]


GROUPS = [("embedding", Transposed("head/kernel")), ("layers/*/kernel",), ("layers/*/bias",)]
IDS = jnp.array([[1, 2, 5], [19, 0, 3]])


def test_values_are_means_and_gradients_sums():
    params = network()
    shared, ties = tie(params, GROUPS)
    full = ties.expand(shared)
    mean = lambda name: np.mean([x[name] for x in params["layers"].values()], axis=0)
    # A mean of three in float32, rounded after each of three steps.
    np.testing.assert_allclose(full["layers"]["layer_2"]["kernel"], mean("kernel"), atol=1e-6)
    both = (params["embedding"] + params["head"]["kernel"].T) / 2
    np.testing.assert_allclose(full["embedding"], both, atol=1e-6)
    np.testing.assert_array_equal(full["head"]["kernel"], full["embedding"].T)
    assert jax.tree.structure(full) == jax.tree.structure(params)
    assert full["layers"]["layer_0"]["kernel"] is full["layers"]["layer_2"]["kernel"]
    assert len(jax.tree.leaves(shared)) == 3

    loss = lambda p: jnp.sum(apply(p, IDS) ** 2)
    ours = jax.jit(jax.grad(lambda s: loss(ties.expand(s))))(shared)
    apart = jax.jit(jax.grad(loss))(full)
    each = [x["kernel"] for x in apart["layers"].values()]
    # The same few hundred products, summed in another order.
    np.testing.assert_allclose(ours["layers"]["layer_0"]["kernel"], sum(each), rtol=1e-4, atol=1e-2)
    summed = apart["embedding"] + apart["head"]["kernel"].T
    np.testing.assert_allclose(ours["embedding"], summed, rtol=1e-4, atol=1e-2)
    assert hash(ties) == hash(Ties(ties.links))


def test_training_keeps_what_is_tied_equal():
    shared, ties = tie(network(), GROUPS, value="first")
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(shared, state):
        loss = lambda s: jnp.mean((apply(ties.expand(s), IDS) - 1) ** 2)
        value, grads = jax.value_and_grad(loss)(shared)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(shared, updates), state, value

    state, values = optimizer.init(shared), []
    for _ in range(10):
        shared, state, value = step(shared, state)
        values.append(float(value))
    assert values[-1] < 0.8 * values[0]
    assert step._cache_size() == 1
    full = ties.expand(shared)
    np.testing.assert_array_equal(full["head"]["kernel"], full["embedding"].T)
    again = ties.shrink(full)
    assert jax.tree.structure(again) == jax.tree.structure(shared)


def test_a_shared_tree_is_compressed_and_saved_once(tmp_path):
    shared, ties = tie(network(), GROUPS)
    rules = {"embedding": jc.Quantize("int8"), "**/kernel": jc.LowRank(2)}
    small = jc.compress(shared, rules)
    full = ties.expand(small)
    # A low-rank kernel is transposed by its factors; the same leaf lies at all other places.
    assert full["layers"]["layer_1"]["kernel"] is full["layers"]["layer_0"]["kernel"]
    assert full["head"]["kernel"].describe() == "int8"
    ours = jax.jit(lambda s: jc.compressed(apply)(ties.expand(s), IDS))(small)
    dense = jax.jit(apply)(jc.decompress(full), IDS)
    np.testing.assert_allclose(ours, dense, rtol=1e-4, atol=1e-3)

    jc.save(tmp_path / "shared", small, metadata={"ties": ties.to_json()})
    again = Ties.from_json(jc.read_metadata(tmp_path / "shared")["ties"])
    assert again == ties
    loaded = again.expand(jc.load(tmp_path / "shared"))
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(full)):
        np.testing.assert_array_equal(ours, theirs)


def test_ties_are_found_again_in_a_file(tmp_path):
    groups = layers(network(), "layers/layer_*")
    assert groups[0] == tuple(f"layers/layer_{i}/bias" for i in range(3))
    shared, ties = tie(network(), groups)
    jc.save(tmp_path / "tied", ties.expand(shared))
    jc.save(tmp_path / "apart", network())
    once = os.path.getsize(tmp_path / "apart") - os.path.getsize(tmp_path / "tied")
    # Two of three layers of 72 floats each, less some names in the header.
    assert once > 2 * 72 * 4
    again, found = tie(jc.load(tmp_path / "tied"))
    assert set(found.links) == set(ties.links)
    assert jc.nbytes(again) == jc.nbytes(shared)
    untouched, none = tie(network())
    assert none.links == ()
    assert jax.tree.structure(untouched) == jax.tree.structure(network())


def test_nnx_state_and_lists_are_tied():
    class Net(nnx.Module):
        def __init__(self):
            self.a = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
            self.b = nnx.Linear(4, 4, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.b(self.a(x))

    graph, state = nnx.split(Net())
    shared, ties = tie(state, [("a/kernel", "b/kernel"), ("?/bias",)])
    assert len(jax.tree.leaves(shared)) == 2
    y = nnx.merge(graph, ties.expand(shared))(jnp.ones((1, 4)))
    kernel = jax.tree.leaves(shared)[1]
    np.testing.assert_allclose(y, jnp.ones((1, 4)) @ kernel @ kernel, rtol=1e-5)
    shared, ties = tie([jnp.ones(2), jnp.zeros(2)], [("0", "1")])
    assert [x.tolist() for x in ties.expand(shared)] == [[0.5, 0.5]] * 2


def test_means_neither_overflow_nor_round_twice():
    shared, _ = tie({"a": jnp.float32([3e38]), "b": jnp.float32([3.2e38])}, [("a", "b")])
    np.testing.assert_allclose(shared["a"], [3.1e38], rtol=1e-6)
    few = {n: jnp.full((), x, jnp.bfloat16) for n, x in zip("abc", (256.0, 2.0, 2.0))}
    shared, _ = tie(few, [("*",)])
    assert float(shared["a"]) == float(jnp.bfloat16(260 / 3))


def test_orders_of_more_than_two_axes():
    a = jnp.arange(24.0).reshape(2, 3, 4)
    shared, ties = tie({"a": a, "b": a.transpose(2, 0, 1)}, [("a", Transposed("b", (2, 0, 1)))])
    full = ties.expand(shared)
    np.testing.assert_array_equal(full["a"], a)
    np.testing.assert_array_equal(full["b"], a.transpose(2, 0, 1))


def test_a_bank_is_the_best_of_its_size():
    rng = np.random.default_rng(0)
    kernels = rng.normal(size=(5, 6, 7)).astype(np.float32)
    values = np.linalg.svd(kernels.reshape(5, -1).astype(np.float64), compute_uv=False)
    for k in (1, 3, 5):
        bank, alpha = template_bank(kernels, k)
        error = np.sum((np.einsum("lk,kij->lij", alpha, bank) - kernels) ** 2)
        # Eckart and Young: the squares of the singular values left out, but for eps |w|^2 or so.
        best = np.sum(values[k:] ** 2)
        assert error >= best - 1e-5 * np.sum(values**2)
        assert error <= best + 1e-5 * np.sum(values**2)


def test_templates_run_train_and_are_stored_once(tmp_path):
    params = network()
    tree = share_templates(params, {"layers/*/kernel": 2})
    shared, ties = tie(tree)
    assert [link.path for link in ties.links] == [f"layers/layer_{i}/kernel.bank" for i in (1, 2)]
    # 2 templates and 3 x 2 coefficients in place of 3 kernels.
    saved = jc.nbytes(params) - jc.nbytes(shared)
    assert saved == 64 * 4 - 6 * 4
    dense = jax.jit(apply)(jc.decompress(tree), IDS)
    ours = jax.jit(lambda s: jc.compressed(apply)(ties.expand(s), IDS))(shared)
    np.testing.assert_array_equal(ours, dense)

    trainable, rest = jc.partition(shared)
    loss = lambda t: jnp.sum(jc.compressed(apply)(ties.expand(jc.combine(t, rest)), IDS) ** 2)
    grads = jax.jit(jax.grad(loss))(trainable)
    assert grads["layers"]["layer_1"]["kernel"].bank is None
    loose = jax.jit(jax.grad(lambda t: jnp.sum(jc.compressed(apply)(t, IDS) ** 2)))(tree)
    summed = sum(x["kernel"].bank for x in loose["layers"].values())
    one = grads["layers"]["layer_0"]["kernel"].bank
    np.testing.assert_allclose(one, summed, rtol=1e-4, atol=1e-2)

    jc.save(tmp_path / "tree", tree)
    loaded, found = tie(jc.load(tmp_path / "tree"))
    assert found == ties
    for a, b in zip(jax.tree.leaves(found.expand(loaded)), jax.tree.leaves(tree)):
        np.testing.assert_array_equal(a, b)


def test_a_stack_shares_its_bank():
    rng = np.random.default_rng(0)
    bank, alpha = jnp.float32(rng.normal(size=(2, 3, 5))), jnp.float32(rng.normal(size=(4, 2)))
    leaf = TemplateArray.of(bank, alpha)
    assert (leaf.shape, leaf.batch_ndim) == ((4, 3, 5), 0)
    np.testing.assert_allclose(leaf, np.einsum("lk,kij->lij", alpha, bank), atol=1e-5)
    own = jax.vmap(TemplateArray.of)(jnp.stack([bank, 2 * bank]), alpha[:2])
    assert (own.shape, own.batch_ndim) == ((2, 3, 5), 1)
    np.testing.assert_array_equal(own.materialize(), jax.vmap(lambda x: x.materialize())(own))
    narrow = TemplateArray.of(bank.astype(jnp.bfloat16), alpha).materialize()
    exact = np.einsum("lk,kij->lij", alpha, np.float32(bank.astype(jnp.bfloat16)))
    np.testing.assert_allclose(np.float32(narrow), exact, rtol=2**-8, atol=1e-6)  # rounded once
    with pytest.raises(SpecError, match="do not meet"):
        TemplateArray.of(bank, alpha[:, :1])


A, B = jnp.ones((2, 3)), jnp.ones((3, 2))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: tie({"a": A, "b": B}, [("a", "b")]), SpecError, "cannot be tied to a"),
        (lambda: tie({"a": A, "b": A.astype(jnp.bfloat16)}, [("*",)]), SpecError, "bfloat16"),
        (lambda: tie({"a": A}, [("a", "c")]), RuleError, "matches no leaf"),
        (lambda: tie({"a": A}, [("a",)]), RuleError, "one member"),
        (lambda: tie({"a": A}, ["a"]), RuleError, "one member"),
        (lambda: tie({"a": A, "b": A, "c": A}, [("a", "b"), ("b", "c")]), RuleError, "twice"),
        (lambda: tie({"a": A, "b": B}, [(Transposed("b"), "a")]), RuleError, "comes first"),
        (lambda: tie({"a": A, "b": A}, [("*",)], value="sum"), SpecError, "mean or first"),
        (
            lambda: tie({"a": jc.Quantize("int8")(A), "b": jc.Quantize("int8")(A)}, [("?",)]),
            SpecError,
            "value='first'",
        ),
        (lambda: tie({"a": A, "b": A}, [("a", "b")])[1].expand({"a": A, "b": A}), RuleError, "not the shared"),
        (lambda: tie({"a": A, "b": A}, [("a", "b")])[1].expand({"a": A}), RuleError, "no place"),
        (lambda: Ties.from_json('[["a", "b", [1, 1]]]'), FileError, "damaged"),
        (lambda: layers({"a": {"x": A}, "b": {"y": A}}, "*"), RuleError, "differ in"),
        (lambda: layers({"a": {"x": A}}, "*"), RuleError, "matches 1 layers"),
        (lambda: share_templates({"a": A, "b": B}, {"*": 1}), SpecError, "one shape and dtype"),
        (lambda: share_templates({"a": A, "b": A}, {"*": 3}), SpecError, "from 1 to 2"),
    ],
)  # fmt: skip
def test_bad_ties_are_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()
