"""Dataset distillation against a loop, torch's gradients of gradients, and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.distillation.distilled_data import dataset_distillation, train_on_distilled

KEYS = jax.random.split(jax.random.key(0), 6)
PARAMS = {"w": jax.random.normal(KEYS[0], (4, 3)) * 0.5, "b": jnp.zeros(3)}
X = jax.random.normal(KEYS[1], (2, 5, 4))  # two steps of five examples
Y = jax.nn.softmax(2 * jax.random.normal(KEYS[2], (2, 5, 3)))
REAL = (jax.random.normal(KEYS[3], (8, 4)), jax.nn.softmax(jax.random.normal(KEYS[4], (8, 3))))


def loss(params, batch):
    x, y = batch
    z = jnp.tanh(x) @ params["w"] + params["b"]
    return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(z), -1))


def test_training_is_gradient_descent():
    rates = np.array([[0.5, 0.3], [0.2, 0.1]])
    found = jax.jit(lambda r: train_on_distilled(loss, PARAMS, (X, Y), r, epochs=2))(rates)
    params = PARAMS
    for epoch in range(2):
        for k in range(2):
            grads = jax.grad(loss)(params, (X[k], Y[k]))
            params = jax.tree.map(lambda p, g: p - rates[epoch, k] * g, params, grads)  # noqa: B023
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, params)


def test_the_gradient_through_the_training_against_torch():
    torch = pytest.importorskip("torch")
    rates = jnp.array([0.5, 0.3])
    meta = lambda x, rates, remat: dataset_distillation(
        loss, PARAMS, (x, Y), rates, REAL, epochs=2, remat=remat
    )
    gradients = jax.jit(jax.value_and_grad(meta, (0, 1)), static_argnums=2)
    value, (of_x, of_rates) = gradients(X, rates, False)

    t = lambda x: torch.tensor(np.asarray(x), requires_grad=True)
    x, r, w, b = t(X), t(rates), t(PARAMS["w"]), t(PARAMS["b"])

    def torch_loss(w, b, x, y):
        return -(y * torch.log_softmax(torch.tanh(x) @ w + b, -1)).sum(-1).mean()

    for _ in range(2):
        for k in range(2):
            y = torch.tensor(np.asarray(Y[k]))
            grads = torch.autograd.grad(torch_loss(w, b, x[k], y), (w, b), create_graph=True)
            w, b = w - r[k] * grads[0], b - r[k] * grads[1]
    wanted = torch_loss(w, b, *(torch.tensor(np.asarray(a)) for a in REAL))
    wanted.backward()
    np.testing.assert_allclose(value, wanted.detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(of_x, x.grad.numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(of_rates, r.grad.numpy(), rtol=1e-4, atol=1e-6)
    again = gradients(X, rates, True)
    np.testing.assert_allclose(again[1][0], of_x, rtol=1e-5, atol=1e-7)


def test_a_few_examples_teach_what_a_step_of_them_needs():
    """From a fixed start, one step on synthetic examples comes to do what real data ask for."""
    real_y = jax.nn.one_hot(jnp.argmax(REAL[0][:, :3], -1), 3)
    meta = lambda x, rate: dataset_distillation(loss, PARAMS, (x, Y[:1]), rate, (REAL[0], real_y))
    step = jax.jit(jax.value_and_grad(meta, (0, 1)))
    x, rate = X[:1], jnp.float32(0.5)
    first, _ = step(x, rate)
    for _ in range(200):
        value, (g, h) = step(x, rate)
        x, rate = x - 2.0 * g, rate - 2.0 * h
    assert value < first / 2


def test_a_compressed_student_and_bfloat16():
    params = jc.compress(PARAMS, {"w": jc.FakeQuantize("int8")})
    trainable, rest = jc.partition(params)
    run = jc.compressed(loss)
    of = lambda t, batch: run(jc.combine(t, rest), batch)
    grad = jax.jit(jax.grad(lambda x: dataset_distillation(of, trainable, (x, Y), 0.5, REAL)))(X)
    assert np.all(np.isfinite(grad))
    assert np.any(grad)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    found = train_on_distilled(loss, narrow, (X, Y), 0.5)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}


def test_bad_input():
    for synthetic in ((X, Y[:1]), (X, jnp.float32(1.0)), ()):
        with pytest.raises(jc.CompressError, match="one leading axis of steps"):
            train_on_distilled(loss, PARAMS, synthetic, 0.1)
    with pytest.raises(jc.CompressError, match=r"rates \(3,\): write a number, \(2,\) or \(1, 2\)"):
        train_on_distilled(loss, PARAMS, (X, Y), jnp.ones(3))
    with pytest.raises(jc.CompressError, match="epochs=0"):
        train_on_distilled(loss, PARAMS, (X, Y), 0.1, epochs=0)
