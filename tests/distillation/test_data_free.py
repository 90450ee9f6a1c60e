"""Stored statistics, priors of images, and inputs made from a model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxcompress as jc
from jaxcompress.distillation.batch_norms import (
    Moments,
    batch_norm_loss,
    moments,
    stored_moments,
    with_norm_moments,
)
from jaxcompress.distillation.inversion import competition, invert, jitter, total_variation
from jaxcompress.distillation.taps import tap


def normal(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_moments_of_each_channel():
    x = normal(0, (6, 5, 4, 3)) * 2 + 100
    wide = np.asarray(x, np.float64)
    found = moments(x)
    np.testing.assert_allclose(found.mean, wide.mean((0, 1, 2)), rtol=1e-6)
    # The mean is known to eps * 100, which the variance sees squared; its terms to about eps * 200.
    np.testing.assert_allclose(found.variance, wide.var((0, 1, 2)), rtol=1e-4)
    first = moments(x, axis=1)
    np.testing.assert_allclose(first.mean, wide.mean((0, 2, 3)), rtol=1e-6)
    assert moments(x.astype(jnp.bfloat16)).mean.dtype == jnp.float32
    with pytest.raises(jc.CompressError, match="no axis=4"):
        moments(x, axis=4)
    for bad in (jnp.ones(3), jnp.ones((0, 3))):
        with pytest.raises(jc.CompressError, match=r"write \[batch, ..., channels\]"):
            moments(bad)


def test_batch_norm_loss_against_torch():
    torch = pytest.importorskip("torch")
    x = normal(1, (8, 3, 3, 4))
    kept = Moments(normal(2, (4,)), jnp.abs(normal(3, (4,))))
    loss = jax.jit(
        lambda x: batch_norm_loss(
            {"a": moments(x), "b": moments(2 * x)}, {"a": kept, "b": kept}, weights={"b": 0.5}
        )
    )
    value, grad = jax.value_and_grad(loss)(x)
    t = torch.tensor(np.asarray(x), requires_grad=True)
    mean, variance = (torch.tensor(np.asarray(k)) for k in kept)
    one = lambda y: (
        torch.norm(y.mean((0, 1, 2)) - mean, 2)
        + torch.norm(y.var((0, 1, 2), unbiased=False) - variance, 2)
    )
    wanted = one(t) + 0.5 * one(2 * t)
    wanted.backward()
    np.testing.assert_allclose(value, wanted.detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(grad, t.grad.numpy(), rtol=1e-4, atol=1e-7)
    # Where nothing differs there is nothing to do, and no NaN.
    same = lambda x: batch_norm_loss({"a": moments(x)}, {"a": moments(x)})
    value, grad = jax.value_and_grad(same)(x)
    assert (float(value), np.count_nonzero(grad)) == (0.0, 0)


class Net(nn.Module):
    """One norm runs twice; one has its channels in front."""

    @nn.compact
    def __call__(self, x, train=False):
        shared = nn.BatchNorm(use_running_average=not train, name="shared", momentum=0.0)
        x = shared(nn.Conv(3, (3, 3), name="conv")(x))
        x = shared(nn.relu(x))
        x = nn.BatchNorm(use_running_average=not train, axis=1, name="rows")(x)
        return nn.Dense(5, name="head")(x.mean((1, 2)))


def test_what_goes_into_the_norms_of_a_linen_model():
    model, x = Net(), normal(4, (6, 4, 4, 2)) + 1
    variables = model.init(jax.random.key(0), x)
    tapped = jax.jit(with_norm_moments(model.apply))
    out, seen = tapped(variables, x)
    np.testing.assert_allclose(out, model.apply(variables, x), rtol=1e-5, atol=1e-6)
    # By hand; the norms do nothing but divide by sqrt(1 + 1e-5).
    conv = nn.Conv(3, (3, 3)).apply({"params": variables["params"]["conv"]}, x)
    once = conv / np.sqrt(1 + 1e-5)
    twice = jnp.maximum(once, 0) / np.sqrt(1 + 1e-5)
    wanted = {
        "shared": moments(jnp.concatenate([conv, jnp.maximum(once, 0)])),
        "rows": moments(twice, axis=1),
    }
    assert seen.keys() == wanted.keys() == stored_moments(variables["batch_stats"]).keys()
    for name in wanted:
        for a, b in zip(seen[name], wanted[name]):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)

    # What a norm stores in training, with no momentum, is what is measured: of its last call.
    class One(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False, momentum=0.0, name="norm")(x)

    variables = One().init(jax.random.key(0), x)
    apply = with_norm_moments(lambda v, x: One().apply(v, x, mutable=["batch_stats"]))
    (_, updated), seen = apply(variables, x)
    stored = stored_moments(updated["batch_stats"])
    assert float(batch_norm_loss(seen, stored)) < 1e-5


class Pair(nnx.Module):
    """A norm within a module, and one in a list; one has its channels in front."""

    def __init__(self, rngs):
        self.first = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs))
        self.norms = nnx.List([nnx.BatchNorm(4, axis=1, rngs=rngs)])

    def __call__(self, x):
        return self.norms[0](nnx.relu(self.first(x)))


def test_what_goes_into_the_norms_of_an_nnx_model():
    model, x = Pair(nnx.Rngs(0)), normal(9, (6, 4, 2)) + 1
    method = nnx.BatchNorm.__call__
    model.eval()
    graph, state = nnx.split(model)
    hidden = x @ model.first.layers[0].kernel[...] + model.first.layers[0].bias[...]
    after = jnp.maximum(hidden / np.sqrt(1 + 1e-5), 0)
    wanted = {"first/layers/1": moments(hidden), "norms/0": moments(after, axis=1)}
    merged = jax.jit(with_norm_moments(lambda state, x: nnx.merge(graph, state)(x)))
    for out, seen in (with_norm_moments(model)(x), merged(state, x)):
        np.testing.assert_allclose(out, model(x), rtol=1e-5, atol=1e-6)
        assert seen.keys() == wanted.keys() == stored_moments(state).keys()
        for name in wanted:
            for a, b in zip(seen[name], wanted[name]):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    # It may be tapped as well, and leaves the class as it was.
    (_, seen), found = tap(with_norm_moments(model), "first")(x)
    assert seen.keys() == wanted.keys()
    np.testing.assert_allclose(found["first"], hidden / np.sqrt(1 + 1e-5), rtol=1e-5, atol=1e-6)
    assert nnx.BatchNorm.__call__ is method

    # What it stores in training, where all the momentum is the new batch's.
    norm = nnx.BatchNorm(2, momentum=0.0, rngs=nnx.Rngs(0))
    _, seen = with_norm_moments(norm)(x)
    stored = stored_moments(nnx.state(norm, nnx.BatchStat))
    assert all(isinstance(x, jax.Array) for x in stored[""])
    assert float(batch_norm_loss(seen, stored)) < 1e-5


def test_norms_of_a_compressed_model_and_gradients_in_the_inputs():
    model, x = Net(), normal(5, (6, 4, 4, 2))
    variables = model.init(jax.random.key(0), x)
    stored = stored_moments(variables["batch_stats"])
    small = jc.compress(variables, {"params/head/kernel": jc.Quantize("int8")})
    run = jc.compressed(with_norm_moments(model.apply))
    loss = lambda x: batch_norm_loss(run(small, x)[1], stored)
    dense = lambda x: batch_norm_loss(with_norm_moments(model.apply)(variables, x)[1], stored)
    # The head comes after all norms.
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), jax.jit(jax.grad(dense))(x), rtol=1e-4, atol=1e-7)  # fmt: skip


def test_statistics_that_observe_has_recorded():
    params = {"a": normal(6, (4, 8)), "b": normal(7, (8, 3))}

    def network(params, x):
        hidden = jax.nn.relu(x @ params["a"])
        return hidden @ params["b"]

    x = normal(8, (32, 4))
    (found,) = jc.observe(network, params, [x], ("mean", "second_moment"), leaves="b")["b"].values()
    kept = Moments(found.mean, found.second_moment - found.mean**2)
    measured = moments(jax.nn.relu(x @ params["a"]))
    assert float(batch_norm_loss({"b": measured}, {"b": kept})) < 1e-5
    assert float(batch_norm_loss({"b": moments(jax.nn.relu(2 * x @ params["a"]))}, {"b": kept})) > 1


def test_total_variation_by_its_definition():
    x = normal(9, (2, 4, 5, 3))
    wide = np.asarray(x, np.float64)
    for power in (1, 2):
        total = np.zeros(2)
        for i in range(4):
            for j in range(5):
                if i < 3:
                    total += np.sum(np.abs(wide[:, i + 1, j] - wide[:, i, j]) ** power, -1)
                if j < 4:
                    total += np.sum(np.abs(wide[:, i, j + 1] - wide[:, i, j]) ** power, -1)
        np.testing.assert_allclose(total_variation(x, power=power), total, rtol=1e-5)
        flat = jax.grad(lambda x: total_variation(x, power=power).sum())(jnp.ones((1, 3, 3, 1)))  # noqa: B023
        assert not np.any(flat)
    assert total_variation(jnp.ones((2, 1, 1, 3))).tolist() == [0, 0]


def test_competition_by_its_definition():
    def reference(a, b, t):
        p, q = (np.exp(np.asarray(x, np.float64) / t) for x in (a, b))
        p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
        m = (p + q) / 2
        kl = lambda x: np.sum(np.where(x > 0, x * np.log(np.where(x > 0, x, 1) / m), 0), -1)
        return 1 - (kl(p) + kl(q)) / 2

    a, b = normal(10, (4, 5)) * 3, normal(11, (4, 5)) * 3
    compete = jax.jit(competition)
    found = compete(a, b, temperature=2.0)
    np.testing.assert_allclose(found, reference(a, b, 2.0), rtol=1e-5)
    np.testing.assert_allclose(found, compete(b, a, temperature=2.0), rtol=1e-6)
    sure = jnp.array([[0.0, -jnp.inf]])
    value, grads = jax.value_and_grad(lambda a, b: compete(a, b).sum(), (0, 1))(sure, sure[:, ::-1])
    assert float(value) == pytest.approx(1 - np.log(2), rel=1e-6)
    assert np.all(np.isfinite(grads))
    # A class that neither can give, such as one that is masked, has no share in anything.
    masked = [jnp.concatenate([x, jnp.full((4, 1), -jnp.inf)], 1) for x in (a, b)]
    both = lambda a, b: jax.grad(lambda a, b: compete(a, b).sum(), (0, 1))(a, b)
    for grad, wanted in zip(both(*masked), both(a, b)):
        np.testing.assert_allclose(grad[:, :-1], wanted, rtol=1e-5, atol=1e-7)
        assert not np.any(grad[:, -1])
    assert all(np.any(g) for g in both(a, b))
    # The input's gradient by finite differences, through both.
    x, d = normal(12, (4, 5)), normal(13, (4, 5))
    f = lambda x: reference(x, np.asarray(x) ** 2, 3.0).sum()
    slope = (f(x + 1e-3 * d) - f(x - 1e-3 * d)) / 2e-3
    grad = jax.grad(lambda x: compete(x, x**2).sum())(x)
    np.testing.assert_allclose(jnp.sum(grad * d), slope, rtol=1e-3)


def test_jitter_moves_and_mirrors():
    x = jnp.arange(2.0 * 5 * 5).reshape(2, 5, 5, 1)
    moved = jax.jit(lambda key: jitter(key, x, 1, flip=True))
    seen = {moved(jax.random.key(n)).tobytes() for n in range(200)}
    every = {
        np.asarray(jnp.roll(x, (i, j), (1, 2))[:, :, ::s]).tobytes()
        for i in (-1, 0, 1) for j in (-1, 0, 1) for s in (1, -1)
    }  # fmt: skip
    assert seen == every
    np.testing.assert_array_equal(jitter(jax.random.key(0), x, 0), x)


def test_inversion_is_the_optimizer_in_a_loop():
    target, keys = normal(14, (2, 3)), []

    def loss(x, key):
        return jnp.sum((x - target) ** 2) + 0.1 * jnp.sum(x * jax.random.normal(key, x.shape))

    tx = optax.adam(0.1)
    run = jax.jit(lambda key: invert(key, loss, (2, 3), tx, 7, low=-1.0, high=0.5))
    found = run(jax.random.key(3))
    begin, each = jax.random.split(jax.random.key(3))
    x = jnp.clip(jax.random.normal(begin, (2, 3)), -1.0, 0.5)
    state, losses = tx.init(x), []
    for key in jax.random.split(each, 7):
        value, grad = jax.value_and_grad(loss)(x, key)
        updates, state = tx.update(grad, state, x)
        x = jnp.clip(x + updates, -1.0, 0.5)
        losses.append(value)
        keys.append(key)
    np.testing.assert_allclose(found.inputs, x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.losses, losses, rtol=1e-4)
    start = invert(jax.random.key(0), loss, (2, 3), tx, 0, start=target.astype(jnp.bfloat16))
    np.testing.assert_allclose(start.inputs, target, rtol=1e-2)
    assert start.losses.shape == (0,)
    several = jax.vmap(run)(jax.random.split(jax.random.key(0), 2))
    assert several.inputs.shape == (2, 2, 3)


def test_bad_input():
    kept = {"a": Moments(jnp.zeros(2), jnp.ones(2))}
    with pytest.raises(jc.CompressError, match=r"statistics of \['b'\], stored ones of \['a'\]"):
        batch_norm_loss({"b": kept["a"]}, kept)
    with pytest.raises(jc.CompressError, match=r"weights of \['b'\]"):
        batch_norm_loss(kept, kept, weights={"b": 1.0})
    with pytest.raises(jc.CompressError, match=r"a: mean \(3,\), stored \(2,\)"):
        batch_norm_loss({"a": Moments(jnp.zeros(3), jnp.ones(3))}, kept)
    with pytest.raises(jc.CompressError, match="batch_stats"):
        stored_moments({"norm": {"scale": jnp.ones(2)}})
    with pytest.raises(jc.CompressError, match=r"images \(3, 3\)"):
        total_variation(jnp.ones((3, 3)))
    with pytest.raises(jc.CompressError, match="power=3"):
        total_variation(jnp.ones((3, 3, 1)), power=3)
    with pytest.raises(jc.CompressError, match=r"student logits \(2,\)"):
        competition(jnp.ones(2), jnp.ones(3))
    with pytest.raises(jc.CompressError, match="a whole number of pixels"):
        jitter(jax.random.key(0), jnp.ones((3, 3, 1)), -1)
    run = lambda loss, **options: invert(
        jax.random.key(0), loss, (2, 3), optax.sgd(0.1), **({"steps": 1} | options)
    )
    with pytest.raises(jc.CompressError, match=r"the loss has shape \(2,\)"):
        run(lambda x, key: x.sum(1))
    with pytest.raises(jc.CompressError, match=r"a start \(3,\) for inputs of shape \(2, 3\)"):
        run(lambda x, key: x.sum(), start=jnp.ones(3))
    with pytest.raises(jc.CompressError, match="steps=-1"):
        run(lambda x, key: x.sum(), steps=-1)
