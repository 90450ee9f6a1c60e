"""SynFlow and FORCE: conservation, no layer that collapses, and rounds written out."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.pruning import scores
from jaxcompress.pruning.masks import apply_masks, make_masks

RULES = {"*/kernel": "unstructured"}


def relu_net(params, x):
    for name in sorted(params):
        x = jax.nn.relu(x @ params[name]["kernel"])
    return x


def net(*sizes, scale=1.0, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(sizes))
    return {
        f"layer_{i}": {"kernel": scale * jax.random.normal(k, (m, n))}
        for i, (k, m, n) in enumerate(zip(keys, sizes, sizes[1:]))
    }


def kernels(tree):
    return [np.asarray(layer["kernel"], np.float64) for _, layer in sorted(tree.items())]


def test_synaptic_flow_is_conserved_by_layers_and_by_units():
    params = net(5, 8, 6, 3)
    found = kernels(scores.synaptic_flow(relu_net, params, jnp.zeros((1, 5))))
    weights = [np.abs(w) for w in kernels(params)]
    total = np.linalg.multi_dot([np.ones((1, 5)), *weights, np.ones((3, 1))]).item()
    for s in found:  # sums of positive products, some 30 roundings of 6e-8 each
        assert s.sum() == pytest.approx(total, rel=1e-5)
    for before, after in itertools.pairwise(found):
        np.testing.assert_allclose(before.sum(axis=0), after.sum(axis=1), rtol=1e-5)
    # And each score is its weight's share, written out.
    left = np.ones(5) @ weights[0]
    right = weights[2] @ np.ones(3)
    np.testing.assert_allclose(found[1], left[:, None] * weights[1] * right, rtol=1e-5)


@pytest.mark.parametrize("rounds", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_at_maximal_critical_compression_each_layer_keeps_one_weight(rounds):
    params = net(6, 30, 4, 20, 3)
    size = sum(w.size for w in kernels(params))
    found = scores.synflow(
        relu_net, params, jnp.zeros((1, 6)), sparsity=1 - 4 / size, rules=RULES, rounds=rounds
    )
    assert [int(m.sum()) for m in kernels(found.masks)] == [1, 1, 1, 1]
    # They are one path: the network still has an output.
    left = jax.tree.map(jnp.abs, apply_masks(params, found.masks))
    assert float(relu_net(left, jnp.ones((1, 6))).sum()) > 0
    # In one shot, by the same scores, it has none.
    once = make_masks(
        scores.synaptic_flow(relu_net, params, jnp.zeros((1, 6))), 1 - 4 / size, RULES,
        scope="global",
    )  # fmt: skip
    assert 0 in [int(m.sum()) for m in kernels(once)]


def test_rescaling_divides_all_scores_by_one_power_of_two():
    params, x = net(4, 7, 5, 2), jax.ShapeDtypeStruct((1, 4), jnp.float32)
    plain = kernels(scores.synaptic_flow(relu_net, params, x))
    scaled = kernels(scores.synaptic_flow(relu_net, params, x, rescale=True))
    ratios = np.concatenate([np.ravel(a / b) for a, b in zip(plain, scaled)])
    assert np.log2(ratios[0]) % 1 == 0
    np.testing.assert_array_equal(ratios, ratios[0])  # powers of two round nothing
    deep = jax.tree.map(lambda w: w * 2.0**60, params)
    again = kernels(scores.synaptic_flow(relu_net, deep, x, rescale=True))
    for a, b in zip(scaled, again):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(jc.SpecError, match=r"the synaptic flow is inf.*write rescale=True"):
        scores.synaptic_flow(relu_net, deep, x)
    with pytest.raises(jc.SpecError, match="look for a layer of zeros"):
        scores.synaptic_flow(relu_net, jax.tree.map(jnp.zeros_like, params), x)


def test_masks_of_synflow_are_nested():
    params = net(4, 7, 5, 2)
    run = lambda sparsity: scores.synflow(
        relu_net, params, jnp.zeros((1, 4)), sparsity=sparsity, rules=RULES, rounds=7
    )
    found = run(0.8)
    # What is kept has a flow; what was removed before the last round is marked.
    for s, m in zip(kernels(found.scores), kernels(found.masks)):
        assert np.all(s[m > 0] >= 0)
        assert np.all(s[m == 0] <= s[m > 0].min()) if m.any() else True
    kept = sum(int(m.sum()) for m in kernels(found.masks))
    size = sum(w.size for w in kernels(params))
    assert kept == jc.pruning.kept_count(size, 0.8)


def rounds_written_out(a, w, sparsity, rounds, revive):
    """FORCE on the quadratic `w'Aw / 2`, whose gradient is `A w`."""
    mask = np.ones(w.size, bool)
    path = []
    for k in range(1, rounds + 1):
        gradient = a @ (w * mask)
        score = np.abs((w if revive else w * mask) * gradient)
        keep = jc.pruning.kept_count(w.size, 1 - (1 - sparsity) ** (k / rounds))
        mask = np.zeros(w.size, bool)
        mask[np.argsort(-score, kind="stable")[:keep]] = True
        path.append(mask)
    return path


@pytest.mark.parametrize("revive", [True, False])
def test_force_on_a_quadratic_in_rounds_written_out(revive):
    rng = np.random.default_rng(3)
    a = rng.normal(size=(40, 40))
    a, w = (a @ a.T).astype(np.float32), rng.normal(size=40).astype(np.float32)
    loss = lambda params, a: params["kernel"] @ (a @ params["kernel"]) / 2
    found = scores.force(
        loss, {"kernel": jnp.asarray(w)}, iter([jnp.asarray(a)]), 0.8, {"*": "unstructured"},
        rounds=5, revive=revive,
    )  # fmt: skip
    path = rounds_written_out(a.astype(np.float64), w.astype(np.float64), 0.8, 5, revive)
    np.testing.assert_array_equal(found.masks["kernel"], path[-1])
    came_back = any(np.any(later & ~earlier) for earlier, later in itertools.pairwise(path))
    assert came_back == revive  # the case shows what it is to show


def test_a_removed_weight_does_not_win_a_tie_at_zero():
    def loss(params, _):
        w = params["w"]
        gate = jnp.where(w[0] > 0, 1, 0)  # the last three have a gradient while the first is there
        return gate * (w[3] + w[4] + w[5]) + 1e-6 * w[0] + w[1] + w[2]

    run = lambda sparsity, rounds: scores.force(
        loss, {"w": jnp.ones(6)}, [0.0], sparsity, {"w": "unstructured"},
        rounds=rounds, revive=False,
    )  # fmt: skip
    first = run(1 - (2 / 3) ** 0.5, 1).masks["w"].tolist()
    assert first == [False, True, True, True, True, True]
    found = run(1 / 3, 2)
    assert found.masks["w"].tolist() == [False, True, True, True, True, False]
    assert found.scores["w"].tolist() == [-np.inf, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("hidden", "kept", "rounds", "message"),
    [
        (2, 2, 20, "2 weights that a round leaves of 3 layers: less than one weight a layer"),
        (20, 6, 2, "of 3 layers: write more rounds"),
    ],
)
def test_a_round_that_cuts_every_path(hidden, kept, rounds, message):
    params = net(2, hidden, hidden, 2)
    sparsity = 1 - kept / sum(w.size for w in kernels(params))
    with pytest.raises(jc.SpecError, match=message):
        scores.synflow(
            relu_net, params, jnp.zeros((1, 2)), sparsity=sparsity, rules=RULES, rounds=rounds
        )


def test_one_round_of_force_is_snip():
    params = net(4, 6, 2)
    loss = lambda params, x: jnp.mean(jnp.tanh(relu_net(params, x)))
    batches = [jax.random.normal(jax.random.key(1), (5, 4))]
    found = scores.force(loss, params, batches, 0.5, RULES, rounds=1)
    snip = scores.snip(loss, params, batches)
    for a, b in zip(kernels(found.scores), kernels(snip)):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(kernels(found.masks), kernels(make_masks(snip, 0.5, RULES, scope="global"))):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0, "sparsity": 0.5}, "rounds=0: write a whole number"),
        ({"rounds": 2, "sparsity": 1.0}, "sparsity=1.0: write the share"),
        ({"rounds": 2, "sparsity": "0.5"}, "sparsity='0.5': write the share"),
    ],
)
def test_rounds_that_lead_nowhere(options, message):
    with pytest.raises(jc.SpecError, match=message):
        scores.synflow(relu_net, net(2, 2), jnp.ones((1, 2)), rules=RULES, **options)
