"""iPQ: rounds, what is told, going on after a kill, and digits."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress.drivers import layer_by_layer
from jaxcompress.errors import FileError, SpecError
from jaxcompress.sharing.product import ProductQuantize

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import _digits

WIDTHS = (64, 48, 32, 10)


def network(params, x):
    for name in ("first", "second"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["third"]["kernel"] + params["third"]["bias"]


def start():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        name: {
            "kernel": jax.random.normal(k, (a, b)) * np.sqrt(2 / a).astype(np.float32),
            "bias": jnp.zeros(b),
        }
        for name, k, a, b in zip(("first", "second", "third"), keys, WIDTHS, WIDTHS[1:])
    }


def trained(params, epochs, rate, seed=0):
    images, labels, *_ = _digits.load()
    trainable, rest = jc.partition(params)
    tx = optax.adam(rate)

    def loss(t, x, y):
        logits = jc.compressed(network)(jc.combine(t, rest), x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(carry, batch):
        t, state = carry
        updates, state = tx.update(jax.grad(loss)(t, *batch), state, t)
        return (optax.apply_updates(t, updates), state), None

    order = np.concatenate(
        [np.random.default_rng(seed + e).permutation(1400) for e in range(epochs)]
    ).reshape(-1, 100)
    run = jax.jit(lambda t: jax.lax.scan(step, (t, tx.init(t)), (images[order], labels[order])))
    return jc.combine(run(trainable)[0][0], rest)


def accuracy(params):
    *_, images, labels = _digits.load()
    logits = jc.compressed(network)(params, images)
    return float(jnp.mean(jnp.argmax(logits, axis=-1) == labels))


SPEC = ProductQuantize(block=8, bits=4)
RULES = [{f"{name}/kernel": SPEC} for name in ("first", "second", "third")]


@pytest.mark.slow
def test_digits_are_better_than_in_one_shot_and_a_run_goes_on(tmp_path):
    dense = trained(start(), 15, 3e-3)
    once = jc.compress(dense, {"**/kernel": SPEC})
    fine = lambda params, round: trained(params, 5, 3e-3, seed=100 * round.number)
    *_, last = layer_by_layer(fine, dense, rules=RULES, folder=tmp_path)
    print(accuracy(dense), accuracy(once), accuracy(last.params))
    # 397 images: of differences below 0.05 one in a hundred would be chance.
    assert accuracy(last.params) > accuracy(once) + 0.05
    assert accuracy(last.params) > accuracy(dense) - 0.05
    (tmp_path / "round-03.safetensors").unlink()
    *_, again = layer_by_layer(fine, dense, rules=RULES, folder=tmp_path)
    same(again.params, last.params)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_array_equal(x, y)


def nudge(params, round):
    trainable, rest = jc.partition(params)
    return jc.combine(jax.tree.map(lambda x: x + 0.5, trainable), rest)


def test_rounds_compress_in_turn_and_a_run_goes_on_with_the_same_bits(tmp_path):
    params = {"a": jnp.arange(16.0).reshape(4, 4), "b": jnp.arange(8.0).reshape(2, 4)}
    rules = [{"a": jc.Codebook(1)}, {"b": jc.Codebook(2)}]
    told = []
    train = lambda params, round: told.append(round) or nudge(params, round)
    first, second = layer_by_layer(train, params, rules=rules, folder=tmp_path)
    assert [(r.number, r.paths, r.last) for r in told] == [(1, ("a",), False), (2, ("b",), True)]
    assert isinstance(first.params["a"], jc.CodebookArray)
    np.testing.assert_array_equal(first.params["b"], params["b"] + 0.5)
    assert isinstance(second.params["b"], jc.CodebookArray)
    assert second.params["a"].centroids.tolist() == (first.params["a"].centroids + 0.5).tolist()
    (tmp_path / "round-02.safetensors").unlink()
    once, again = layer_by_layer(train, params, rules=rules, folder=tmp_path)
    assert len(told) == 3  # the first round was read
    same(once.params, first.params)
    same(again.params, second.params)
    with pytest.raises(FileError, match="other params"):
        [*layer_by_layer(train, {**params, "a": params["a"] + 1}, rules=rules, folder=tmp_path)]
    with pytest.raises(FileError, match="rules"):
        [*layer_by_layer(train, params, rules=rules[::-1], folder=tmp_path)]


def test_inputs_are_those_of_the_layers_as_they_are_by_then():
    params = {"first": jnp.eye(4), "second": jnp.ones((4, 3)) * jnp.arange(3.0)}
    fn = lambda p, x: (x @ p["first"]) @ p["second"]
    x = jnp.ones((5, 4))
    seen = []

    def observe(params):
        stats = jc.observe(jc.compressed(fn), params, [x], ("second_moment",), leaves=("second",))
        seen.append(float(stats["second"][(-2,)].second_moment[0]))
        return stats

    rules = [{"first": jc.Codebook(1)}, {"second": jc.Codebook(2, weighting="second_moment")}]
    [*layer_by_layer(nudge, params, rules=rules, observe=observe)]
    # The rows of the identity sum to one, and each of 16 weights has risen by a half since.
    assert seen == [1.0, 9.0]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([], "each round"),
        ([{"a": None}], "compresses no leaf"),
        ([{"a": jc.Codebook(1)}, {"*": jc.Codebook(1)}], "rounds 1 and 2"),
    ],
)
def test_bad_rules(rules, message):
    with pytest.raises(SpecError, match=message):
        [*layer_by_layer(nudge, {"a": jnp.ones((2, 2)), "b": jnp.ones(2)}, rules=rules)]


def test_another_tree_is_refused():
    with pytest.raises(SpecError, match="another tree in round 1"):
        [*layer_by_layer(lambda p, r: {}, {"a": jnp.ones((2, 2))}, rules=[{"a": jc.Codebook(1)}])]
