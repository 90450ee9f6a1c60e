"""Learned maps of channels, other sizes, and the layers of factor transfer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from loss_checks import draw

import jaxcompress as jc
from jaxcompress.distillation.factor import (
    factor_transfer,
    paraphrase,
    paraphraser_init,
    paraphraser_loss,
    translate,
    translator_init,
)
from jaxcompress.distillation.hints import hint
from jaxcompress.distillation.regressors import regressor, regressor_init, resize

KEY = jax.random.key(0)


def test_a_kernel_of_one_is_a_matrix():
    params = regressor_init(KEY, 6, 3)
    params["bias"] = jnp.arange(3.0)
    for shape in ((2, 6), (2, 5, 6), (2, 4, 5, 6)):
        x = draw(1, shape)
        expected = x.astype(np.float64) @ np.asarray(params["kernel"], np.float64) + np.arange(3)
        found = jax.jit(regressor)(params, x)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    spread = regressor_init(KEY, 400, 100)["kernel"]
    np.testing.assert_allclose(jnp.std(spread), 0.05, rtol=0.02)  # 40,000 draws: to 0.4%
    assert regressor(params, jnp.ones((2, 6), jnp.bfloat16)).dtype == jnp.float32


def test_convolutions_against_torch():
    torch = pytest.importorskip("torch")
    for kernel, shape in ((3, (2, 5, 4, 6)), ((3,), (2, 7, 6))):
        params = regressor_init(KEY, 6, 3, kernel)
        params["bias"] = jnp.arange(3.0)
        x = draw(1, shape)
        weight = torch.tensor(np.moveaxis(np.asarray(params["kernel"]), (-1, -2), (0, 1)))
        conv = torch.nn.functional.conv2d if len(shape) == 4 else torch.nn.functional.conv1d
        expected = conv(torch.tensor(np.moveaxis(x, -1, 1)), weight, torch.arange(3.0), padding=1)
        found = jax.jit(regressor)(params, x)
        np.testing.assert_allclose(found, np.moveaxis(expected.numpy(), 1, -1), atol=1e-5)


def test_sizes_against_torch():
    torch = pytest.importorskip("torch")
    f = torch.nn.functional
    x = draw(1, (2, 8, 6, 3))
    first = torch.tensor(np.moveaxis(x, -1, 1))
    last = lambda y: np.moveaxis(y.numpy(), 1, -1)
    np.testing.assert_allclose(
        resize(x, (4, 2)), last(f.adaptive_avg_pool2d(first, (4, 2))), atol=1e-6
    )
    np.testing.assert_allclose(
        resize(x, (11, 24)), last(f.interpolate(first, (11, 24), mode="bilinear")), atol=1e-5
    )
    np.testing.assert_array_equal(resize(x, (8, 6)), x)


def test_sizes_that_do_not_divide_and_narrow_ones():
    x = draw(1, (2, 7, 3))
    # Each position three times, then averages of seven: the parts that each new one covers.
    expected = np.repeat(x, 3, axis=1).reshape(2, 3, 7, 3).mean(2)
    np.testing.assert_allclose(resize(x, (3,)), expected, atol=1e-6)
    np.testing.assert_allclose(resize(x, (1,))[:, 0], x.mean(1), atol=1e-6)
    assert resize(x.astype(jnp.bfloat16), (3,)).dtype == jnp.bfloat16
    assert resize(x[:0], (3,)).shape == (0, 3, 3)
    np.testing.assert_array_equal(resize(x[:, 0], ()), x[:, 0])


def test_a_regressor_learns_what_the_student_knows():
    x, mix = draw(1, (64, 4)), draw(2, (4, 6))
    teacher = x @ mix + 1
    params, tx = regressor_init(KEY, 4, 6), optax.adam(0.05)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(
            lambda p: jnp.mean(hint(regressor(p, jnp.asarray(x)), teacher))
        )(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    state = tx.init(params)
    for _ in range(300):
        params, state, loss = step(params, state)
    assert loss < 1e-4
    np.testing.assert_allclose(params["kernel"], mix, atol=0.02)


def leaky(x):
    return np.where(x > 0, x, 0.1 * x)


def test_paraphrasers_and_translators():
    params = paraphraser_init(KEY, 4, 2, kernel=1)
    x = draw(1, (3, 5, 4))
    layers = [np.asarray(p["kernel"], np.float64) for p in params["encoder"] + params["decoder"]]
    assert [w.shape for w in layers] == [(4, 4), (4, 2), (2, 2), (2, 2), (2, 4), (4, 4)]
    where = np.arange(5) < 3

    @jax.jit
    def run(params, x):
        masked = paraphraser_loss(params, x, where=where)
        return paraphrase(params, x), paraphraser_loss(params, x), masked

    factor, loss, masked = run(params, x)
    h = x.astype(np.float64)
    for n, w in enumerate(layers):
        h = h @ w
        h = leaky(h) if n < 5 else h
        if n == 2:
            np.testing.assert_allclose(factor, h, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss, np.mean((h - x) ** 2, (1, 2)), rtol=1e-4)
    np.testing.assert_allclose(masked, np.mean((h - x)[:, :3] ** 2, (1, 2)), rtol=1e-4)
    translator = jax.jit(lambda k: translator_init(k, 64, 2, kernel=(3,)))(KEY)
    ours = jax.jit(translate)(translator, draw(2, (3, 5, 64)))
    assert factor_transfer(ours, factor).shape == (3,)
    # About as large at the end as at the beginning: He's scale, for rectifiers.
    assert 0.3 < float(np.sqrt(np.mean(np.square(ours)))) < 1.5


def test_a_paraphraser_learns_to_give_back():
    # Four features that two numbers make.
    x = draw(1, (128, 2)) @ draw(2, (2, 4))
    params, tx = paraphraser_init(KEY, 4, 2, kernel=1), optax.adam(0.01)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean(paraphraser_loss(p, x)))(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    state, first = tx.init(params), None
    for _ in range(400):
        params, state, loss = step(params, state)
        first = loss if first is None else first
    assert loss < 0.1 * np.mean(x**2) < first


def test_bad_input():
    with pytest.raises(jc.CompressError, match="kernel=1 from 0 to 3"):
        regressor_init(KEY, 0, 3)
    with pytest.raises(jc.CompressError, match="at most three axes"):
        regressor_init(KEY, 2, 3, (1, 1, 1, 1))
    params = regressor_init(KEY, 6, 3, 3)
    with pytest.raises(jc.CompressError, match=r"features \(2, 5, 6\).*2 axes of positions"):
        regressor(params, jnp.ones((2, 5, 6)))
    with pytest.raises(jc.CompressError, match="asks for 6 channels last"):
        regressor(params, jnp.ones((2, 5, 5, 7)))
    for sizes in ((2, 2), (0,)):
        with pytest.raises(jc.CompressError, match="write a positive size"):
            resize(jnp.ones((2, 5, 6)), sizes)
