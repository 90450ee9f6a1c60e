"""Low rank of responses: each step against brute force, and on a network that was trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jaxcompress as jc
from jaxcompress import SpecError
from jaxcompress.decomposition.responses import asymmetric, nearest_targets, reduce_responses
from jaxcompress.decomposition.weighted import activation_svd
from jaxcompress.rules import map_with_path

EPS = float(np.finfo(np.float32).eps)


def responses(seed, n=300, d=10):
    rng = np.random.default_rng(seed)
    y = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) * np.linspace(0.2, 2, d) + rng.normal(
        size=d
    )
    return jnp.asarray(y, jnp.float32)


@pytest.mark.parametrize("penalty", [0.01, 1.0, 30.0])
def test_targets_are_the_best_on_a_grid(penalty):
    rng = np.random.default_rng(0)
    target, t = np.maximum(rng.normal(size=400), 0), 2 * rng.normal(size=400)
    cost = lambda z: (target - np.maximum(z, 0)) ** 2 + penalty * (z - t) ** 2
    found = np.asarray(nearest_targets(jnp.asarray(target), jnp.asarray(t), penalty), np.float64)
    grid = np.linspace(-10, 10, 40_001)[:, None]
    best = np.min((target - np.maximum(grid, 0)) ** 2 + penalty * (grid - t) ** 2, axis=0)
    # The grid's own step of 5e-4 leaves it above; rounding in float32 is relative to t**2.
    assert np.all(cost(found) <= best + 1e-5)
    np.testing.assert_allclose(cost(found), best, atol=1e-4)


def test_without_nonlinearity_it_is_the_principal_components():
    y = responses(1)
    wide = np.asarray(y, np.float64)
    centered = wide - wide.mean(0)
    s = np.linalg.svd(centered, compute_uv=False)
    for rank in (1, 4):
        found = asymmetric(y, None, rank, nonlinearity=None)
        out = wide @ np.asarray(found.left, np.float64) @ np.asarray(found.right, np.float64)
        error = np.sum((wide - out - np.asarray(found.bias, np.float64)) ** 2)
        assert error <= np.sum(s[rank:] ** 2) + 1e-5 * np.sum(wide**2) * EPS**0.5
        np.testing.assert_allclose(found.errors[-1] * y.size, error, rtol=1e-3, atol=1e-3)
        # The same as low rank of the identity in the metric of the centered responses.
        gram = jnp.asarray(centered.T @ centered, jnp.float32)
        left, right = activation_svd(jnp.eye(10), gram, rank, damping=0.0)
        np.testing.assert_allclose(found.left @ found.right, left @ right, atol=2e-3)


def test_the_regression_of_reduced_rank_is_the_closed_form():
    y, off = responses(2), responses(2) + 0.3 * responses(3)
    found = asymmetric(y, off, 3, nonlinearity=None)
    x, z = (np.asarray(v, np.float64) - np.asarray(v, np.float64).mean(0) for v in (off, y))
    full = np.linalg.lstsq(x, z, rcond=None)[0]
    v = np.linalg.svd(x @ full)[2][:3]
    np.testing.assert_allclose(found.left @ found.right, full @ v.T @ v, atol=2e-3)
    best = np.mean((z - x @ full @ v.T @ v) ** 2)
    np.testing.assert_allclose(found.errors[-1], best, rtol=1e-4)
    origin = asymmetric(y, off, 3, nonlinearity=None, fit_bias=False)
    assert np.all(origin.bias == 0)
    assert origin.errors[-1] > found.errors[-1]


@pytest.mark.parametrize("penalties", [(0.01, 1.0), (0.3,), (1.0, 0.01)])
def test_the_objective_never_rises_and_the_end_is_no_worse_than_the_start(penalties):
    y, off = responses(4), responses(4) + 0.2 * responses(5)
    found = asymmetric(y, off, 4, penalties=penalties, steps=15)
    assert found.objectives.shape == (len(penalties), 15)
    for row in np.asarray(found.objectives, np.float64):
        # Two sums of 3000 squares in float32 and a regression with a condition of its own.
        assert np.all(np.diff(row) <= 2e-5 * row[:-1])
    out = jax.nn.relu(off @ found.left @ found.right + found.bias)
    np.testing.assert_allclose(jnp.mean((jax.nn.relu(y) - out) ** 2), found.errors[-1], rtol=1e-3)
    assert found.errors[-1] < 0.95 * found.errors[0]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes_and_responses_that_do_not_vary(dtype):
    y = responses(6).astype(dtype)
    found = asymmetric(y, None, 4)
    assert found.left.dtype == found.right.dtype == found.bias.dtype == dtype
    flat = asymmetric(jnp.ones((5, 4)), None, 2)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in flat)
    np.testing.assert_allclose(flat.bias + jnp.ones(4) @ flat.left @ flat.right, 1, atol=1e-5)


def test_a_dense_layer_without_a_bias():
    params = {"kernel": responses(7, 8, 6)}
    x = responses(8, 100, 8)
    run = lambda params, x: x @ params["kernel"]
    changed, found = reduce_responses(run, params, "kernel", [x[:50], x[50:]], 3)
    assert list(changed) == ["kernel"]
    out = jc.compressed(run)(changed, x)
    error = jnp.mean((jax.nn.relu(run(params, x)) - jax.nn.relu(out)) ** 2)
    np.testing.assert_allclose(error, found.errors[-1], rtol=1e-3)


def test_groups_are_refused():
    def run(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, params["w"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=2
        )

    params, x = {"w": responses(10, 54, 8).reshape(3, 3, 6, 8)}, responses(11, 300, 12)
    with pytest.raises(SpecError, match="layers of groups"):
        reduce_responses(run, params, "w", [x.reshape(3, 10, 10, 12)], 3)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda y: asymmetric(y, y[:3], 2), "write both as"),
        (lambda y: asymmetric(y, None, 11), "from 1 to 10"),
        (lambda y: asymmetric(y, None, 2, nonlinearity="gelu"), "'relu' or None"),
        (lambda y: asymmetric(y, None, 2, penalties=(0.0,)), "above 0"),
        (lambda y: asymmetric(y, None, 2, steps=0), "steps=0"),
        (lambda y: reduce_responses(lambda p, x: x, {"w": y}, "v", [y], 2), "no dense leaf"),
        (lambda y: reduce_responses(lambda p, x: x @ p["w"].T, {"w": y}, "w", [y], 2), "features"),
        (lambda y: reduce_responses(lambda p, x: x, {"w": y}, "w", [], 2), "batches is empty"),
        (lambda y: reduce_responses(lambda p, x: x, {"w": y}, "w", [y], 2, samples=3), "key="),
    ],
)
def test_what_cannot_be_says_what_to_write(make, text):
    with pytest.raises(SpecError, match=text):
        make(responses(9))


def conv(x, layer):
    numbers = ("NHWC", "HWIO", "NHWC")
    return (
        lax.conv_general_dilated(x, layer["kernel"], (1, 1), "SAME", dimension_numbers=numbers)
        + layer["bias"]
    )


def first(params, x):
    return conv(x, params["first"])


def second(params, x):
    return conv(jax.nn.relu(first(params, x))[:, ::2, ::2], params["second"])


def logits(params, x):
    x = jax.nn.relu(second(params, x)).mean((1, 2))
    return x @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.slow
def test_layers_of_a_network_trained_on_digits():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = jnp.asarray(images.reshape(-1, 8, 8, 1) / 8 - 1, jnp.float32)
    keys = jax.random.split(jax.random.key(0), 3)
    make = lambda key, *shape: jax.nn.initializers.he_normal()(key, shape)
    params = {
        "first": {"kernel": make(keys[0], 3, 3, 1, 16), "bias": jnp.zeros(16)},
        "second": {"kernel": make(keys[1], 3, 3, 16, 32), "bias": jnp.zeros(32)},
        "head": {"kernel": make(keys[2], 32, 10), "bias": jnp.zeros(10)},
    }
    tx = optax.adam(5e-3)
    loss = lambda params, x, y: optax.softmax_cross_entropy_with_integer_labels(
        logits(params, x), y
    ).mean()

    @jax.jit
    def train(params, state, x, y):
        updates, state = tx.update(jax.grad(loss)(params, x, y), state)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(300):
        rows = jax.random.randint(jax.random.fold_in(keys[0], i), (128,), 0, 1400)
        params, state = train(params, state, images[rows], labels[rows])
    fit, test = images[:1000], images[1400:]

    def changed(fn, path, rank, reduced, **options):
        leaves, _ = reduce_responses(
            fn, params, f"{path}/kernel", [fit[:500], fit[500:]], rank, bias=f"{path}/bias",
            reduced=reduced, samples=4000, key=keys[1], **options,
        )  # fmt: skip
        return map_with_path(lambda p, x: leaves.get(p, x), reduced)

    def off(small):
        after = jax.nn.relu(jc.compressed(second)(small, test)) - jax.nn.relu(second(params, test))
        return float(jnp.mean(after**2))

    once = changed(first, "first", 4, params)
    found = {}
    for name, options in {"relu": {}, "linear": {"nonlinearity": None}}.items():
        found[name] = off(changed(second, "second", 8, once, **options))
    # Plain principal components: fitted to the responses to exact inputs, not to those that it gets.
    leaves, _ = reduce_responses(
        second, params, "second/kernel", [fit], 8, bias="second/bias", nonlinearity=None
    )
    found["components"] = off(map_with_path(lambda p, x: leaves.get(p, x), once))
    assert found["relu"] < 0.97 * found["linear"]
    assert found["linear"] < found["components"]
    small = changed(second, "second", 16, params)
    assert small["second"]["kernel"].left.shape == (3, 3, 16, 16)
    accuracy = lambda p: float(jnp.mean(jc.compressed(logits)(p, test).argmax(-1) == labels[1400:]))
    assert accuracy(params) > 0.85
    assert accuracy(small) > accuracy(params) - 0.05
