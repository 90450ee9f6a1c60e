"""Each gate against its published formulas, its gradients against finite differences or torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

import jaxcompress as jc
from jaxcompress.pruning import gates

W = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
COEFFICIENTS = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)


def differences(fn, x, h=1e-5):
    """Central differences in float64; their error is of order h^2."""
    x = np.asarray(x, np.float64)
    out = np.zeros_like(x)
    for i in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[i] = h
        out[i] = (fn(x + step) - fn(x - step)) / (2 * h)
    return out


def check(leaf, formula, price):
    """Value, penalty and gradients by all trained children, against float64 functions of them."""
    trained = {name: np.asarray(getattr(leaf, name), np.float64) for name in leaf.trainable}
    loss = lambda leaf: jnp.sum(COEFFICIENTS * leaf.materialize())
    # Float32 sums of about a dozen terms of about 1: a few units of 6e-8 each.
    np.testing.assert_allclose(leaf.materialize(), formula(**trained), rtol=3e-6, atol=1e-6)
    np.testing.assert_allclose(leaf.penalty(), price(**trained), rtol=3e-6)
    value = jax.grad(loss, allow_int=True)(leaf)
    cost = jax.grad(lambda leaf: leaf.penalty(), allow_int=True)(leaf)
    for name, x in trained.items():
        for grads, fn in (
            (value, lambda **kw: (COEFFICIENTS * formula(**kw)).sum()),
            (cost, price),
        ):
            expected = differences(lambda x, name=name, fn=fn: fn(**{**trained, name: x}), x)
            scale = max(1.0, float(np.abs(expected).max()))
            np.testing.assert_allclose(getattr(grads, name), expected, atol=2e-5 * scale)


@pytest.mark.parametrize("drawn", [pytest.param(False, marks=pytest.mark.slow), True])
def test_hard_concrete(drawn):
    leaf = gates.L0HardConcrete("channel")(jnp.asarray(W))
    leaf = leaf.replace(log_alpha=jnp.array([[-4.0], [-0.3], [0.4], [5.0]]))
    leaf = leaf.drawn(jax.random.key(3)) if drawn else leaf
    noise = np.asarray(leaf.noise, np.float64) if drawn else None

    def formula(weight, log_alpha):
        at = log_alpha if noise is None else (noise + log_alpha) / (2 / 3)
        return weight * np.clip(special.expit(at) * 1.2 - 0.1, 0, 1)

    price = lambda weight, log_alpha: 3 * special.expit(log_alpha - 2 / 3 * np.log(0.1 / 1.1)).sum()
    check(leaf, formula, price)
    assert leaf.quiet().keep().ravel().tolist() == [False, True, True, True]


def test_hard_concrete_is_finalized_to_the_same_bits_uncompiled():
    keys = jax.random.split(jax.random.key(0))
    leaf = gates.L0HardConcrete()(jax.random.normal(keys[0], (64, 64)))
    leaf = leaf.replace(log_alpha=2 * jax.random.normal(keys[1], (64, 64)))
    # `finalize` stores what the compiled program has.
    np.testing.assert_array_equal(leaf.materialize(), jax.jit(lambda x: x.pruned())(leaf))


def test_hard_concrete_gates_are_zero_and_one_as_often_as_the_distribution_says():
    leaf = gates.L0HardConcrete()(jnp.ones((3, 40_000)))
    log_alpha = jnp.broadcast_to(jnp.array([[-1.5], [0.2], [2.0]]), leaf.shape)
    z = np.asarray(leaf.replace(log_alpha=log_alpha).drawn(jax.random.key(0)).gates())
    for row, at in zip(z, (-1.5, 0.2, 2.0)):
        closed = special.expit(2 / 3 * np.log(0.1 / 1.1) - at)
        opened = special.expit(at - 2 / 3 * np.log(1.1 / 0.1))  # beyond (1 - gamma) / (zeta - 1)
        for found, p in ((np.mean(row == 0), closed), (np.mean(row == 1), opened)):
            assert abs(found - p) < 5 * np.sqrt(p * (1 - p) / row.size)
    expected = float(leaf.replace(log_alpha=log_alpha).expected()) / z.size
    assert abs(np.mean(z > 0) - expected) < 5 * np.sqrt(0.25 / z.size)


def test_bottleneck():
    leaf = gates.InformationBottleneck()(jnp.asarray(W))
    leaf = leaf.replace(
        mean=jnp.array([[1.0, -0.4, 0.02]]), log_var=jnp.array([[-2.0, -3.0, -1.0]])
    )
    leaf = leaf.drawn(jax.random.key(3))
    eps = np.asarray(leaf.noise, np.float64)
    check(
        leaf,
        lambda weight, mean, log_var: weight * (mean + np.exp(log_var / 2) * eps),
        lambda weight, mean, log_var: np.log(1 + mean**2 / np.exp(log_var)).sum(),
    )
    assert leaf.keep().tolist() == [[True, True, False]]
    # What is left of a group is its posterior mean, and the rest are zeros.
    expected = W * np.float32([[1.0, -0.4, 0.0]])
    np.testing.assert_allclose(leaf.pruned(), expected, rtol=2e-7)


def test_variational_dropout():
    leaf = gates.VariationalDropout()(jnp.asarray(W))
    log_sigma2 = jnp.asarray(np.random.default_rng(2).uniform(-6, 6, W.shape).astype(np.float32))
    leaf = leaf.replace(log_sigma2=log_sigma2)

    def price(weight, log_sigma2):
        at = log_sigma2 - np.log(weight**2 + 1e-12)
        fit = 0.63576 * special.expit(1.87320 + 1.48695 * at) - 0.5 * np.log1p(np.exp(-at))
        return -(fit - 0.63576).sum()

    check(leaf, lambda weight, log_sigma2: weight, price)
    kept = np.asarray(log_sigma2) - np.log(W.astype(np.float64) ** 2) <= 3
    assert 0 < kept.sum() < kept.size
    np.testing.assert_array_equal(leaf.pruned(), np.where(kept, W, 0))


def test_hard_gates_against_torch():
    torch = pytest.importorskip("torch")
    scores = np.random.default_rng(3).normal(size=W.shape).astype(np.float32)
    weight, coefficients = torch.tensor(W), torch.tensor(COEFFICIENTS)

    class Subnet(torch.autograd.Function):  # as its authors have it
        @staticmethod
        def forward(ctx, scores, k):
            out = scores.clone()
            _, idx = scores.flatten().sort()
            j = int((1 - k) * scores.numel())
            out.flatten()[idx[:j]], out.flatten()[idx[j:]] = 0, 1
            return out

        @staticmethod
        def backward(ctx, g):
            return g, None

    class Binarizer(torch.autograd.Function):  # likewise
        @staticmethod
        def forward(ctx, scores):
            return (scores >= 0.1).to(scores.dtype)

        @staticmethod
        def backward(ctx, g):
            return g

    def compare(leaf, out, trained):
        (out * coefficients).sum().backward()
        np.testing.assert_allclose(leaf.materialize(), out.detach().numpy(), rtol=1e-6)
        loss = lambda leaf: jnp.sum(COEFFICIENTS * leaf.materialize())
        grads = jax.grad(loss)(leaf)
        for name, tensor in trained.items():
            np.testing.assert_allclose(
                getattr(grads, name), tensor.grad.numpy(), rtol=1e-5, atol=1e-7
            )
        return grads

    s = torch.tensor(scores, requires_grad=True)
    popup = gates.EdgePopup(0.75)(jnp.asarray(W)).replace(scores=jnp.asarray(scores))
    grads = compare(popup, weight * Subnet.apply(s.abs(), 0.25), {"scores": s})
    assert not np.any(grads.weight)  # frozen
    assert int(jnp.sum(popup.mask())) == 3
    at_zero = jax.grad(lambda s: jnp.sum(popup.replace(scores=s).materialize()))(jnp.zeros((4, 3)))
    assert not np.any(at_zero)  # as torch has it for abs
    s = torch.tensor(scores, requires_grad=True)
    piggyback = gates.Piggyback(threshold=0.1)(jnp.asarray(W)).replace(scores=jnp.asarray(scores))
    grads = compare(piggyback, weight * Binarizer.apply(s), {"scores": s})
    assert not np.any(grads.weight)
    s, w = torch.full((1, 3), -0.4, requires_grad=True), torch.tensor(W, requires_grad=True)
    soft = gates.SoftThreshold(0.5, group="filter")(jnp.asarray(W))
    soft = soft.replace(scores=jnp.full((1, 3), -0.4))
    moved = torch.sign(w) * torch.relu(torch.abs(w) - torch.sigmoid(s))
    compare(soft, moved, {"scores": s, "weight": w})


@pytest.mark.slow
def test_edge_popup_keeps_exactly_as_many_at_each_step_and_ties_go_by_index():
    w = jax.random.normal(jax.random.key(0), (3, 5, 7))
    leaf = gates.EdgePopup(0.6)(w)
    assert leaf.batch_ndim == 1
    assert leaf.kept == 14
    target = jax.random.normal(jax.random.key(1), w.shape)

    def loss(leaf):
        w = leaf.materialize()
        return jnp.mean((w - target) ** 2), jnp.sum(w != 0, axis=(1, 2))

    def step(scores, _):
        grads, count = jax.grad(loss, has_aux=True)(leaf.replace(scores=scores))
        return scores - 3.0 * grads.scores, count

    _, counts = jax.jit(lambda s: jax.lax.scan(step, s, length=20))(leaf.scores)
    np.testing.assert_array_equal(counts, np.full((20, 3), 14))
    tied = leaf.replace(scores=jnp.ones_like(w))
    expected = np.broadcast_to(np.arange(35).reshape(5, 7) < 14, w.shape)
    np.testing.assert_array_equal(tied.mask(), expected)


def test_errors_say_what_to_write():
    for bad in (
        lambda: gates.L0HardConcrete(keep=1.0), lambda: gates.L0HardConcrete(gamma=0.1),
        lambda: gates.L0HardConcrete(beta=0.0), lambda: gates.EdgePopup(1.5),
        lambda: gates.EdgePopup(0.5, scores="gradient"), lambda: gates.SoftThreshold(0.0),
        lambda: gates.Horseshoe(global_scale=0.0), lambda: gates.VariationalDropout(float("nan")),
        lambda: gates.InformationBottleneck(threshold="high"), lambda: gates.Piggyback(start=None),
        lambda: gates.Piggyback(start=True), lambda: gates.EdgePopup(True),
    ):  # fmt: skip
        with pytest.raises(jc.SpecError, match="write"):
            bad()
    params = {"kernel": jnp.ones((4, 4))}
    for spec, words in (
        (gates.L0HardConcrete("2:4"), "kernel.*no groups"),
        (gates.Horseshoe("rows"), "kernel.*pattern='rows'"),
        (gates.EdgePopup(0.5, scores="random"), "kernel.*need a key"),
    ):
        with pytest.raises(jc.SpecError, match=words):
            jc.compress(params, {"kernel": spec})
    for spec in (gates.L0HardConcrete("channel"), gates.Horseshoe()):
        with pytest.raises(jc.SpecError, match=r"a/gain: group='channel'.*input axis"):
            jc.compress({"a": {"gain": jnp.float32(1.0)}}, {"**": spec})
    assert gates.Piggyback(start=np.float32(0.5)) == gates.Piggyback(start=0.5)
    with pytest.raises(jc.CompressError, match="no gates"):
        gates.gate_report(params)
    leaf = jc.compress(params, {"kernel": gates.L0HardConcrete()})
    with pytest.raises(jc.RuleError, match="matches no leaf"):
        gates.gate_penalty(leaf, {"bias": 1.0})
    with pytest.raises(jc.SpecError, match="outside of jit"):
        jax.jit(jc.finalize)(leaf)
