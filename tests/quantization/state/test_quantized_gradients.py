"""Gradients of few bits: unbiased, bounded, on the levels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxcompress import SpecError
from jaxcompress.quantization.state import quantize_gradients

EPS = float(np.finfo(np.float32).eps)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("per", ["tensor", "block"])
def test_the_mean_is_the_gradient(bits, per):
    rng = np.random.default_rng(0)
    g = rng.normal(size=(4, 24)).astype(np.float32)
    tx = quantize_gradients(bits, per=per, block_size=8)
    n = 3000

    def one(key):
        state = tx.init(None)._replace(key=key)
        return tx.update(jnp.asarray(g), state)[0]

    q = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), n)), np.float64)
    levels = 2 ** (bits - 1) - 1
    if per == "tensor":
        scale = np.full_like(g, np.abs(g).max())
    else:
        scale = np.repeat(np.abs(g.reshape(4, 3, 8)).max(-1), 8, axis=1)
    step = scale / levels
    # A draw between two levels has a deviation of half a step at most; six of the mean's.
    assert np.all(np.abs(q.mean(0) - g) <= 6 * step / 2 / np.sqrt(n))
    assert np.all(q.var(0) <= step**2 / 4 * 1.001)
    np.testing.assert_allclose(q / step, np.round(q / step), atol=8 * EPS * levels)
    assert np.all(np.abs(q - g) <= step * (1 + 8 * EPS * levels))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _rounded(g, bits, per):
    tx = quantize_gradients(bits, per=per, block_size=3)
    return tx.update([g], tx.init(None))[0][0]


@settings(max_examples=40)
@given(
    hnp.arrays(
        np.float32,
        st.sampled_from([(), (0, 3), (7,), (2, 5), (4, 1, 3)]),  # a few, for each is compiled
        elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False),
    ),
    st.sampled_from([2, 8]),
    st.sampled_from(["tensor", "block"]),
)
# A product with the inverse of 127 is one unit in the last place off.
@example(np.array([950861, 0, 0, 0, 0, 0, 0], np.float32), 8, "tensor")
@example(np.array([950861, 0, 0, 0, 0, 0, 0], np.float32), 8, "block")
def test_zero_and_the_largest_stay(g, bits, per):
    q = np.asarray(_rounded(jnp.asarray(g), bits, per))
    assert q.shape == g.shape
    assert q.dtype == g.dtype
    assert np.all(q[g == 0] == 0)
    if g.size:
        assert np.abs(q).max() == np.abs(g).max()
    assert np.all(q * g >= 0)


def test_keys_and_steps():
    grads = {"a": jnp.linspace(-1, 1, 50), "b": jnp.linspace(-1, 1, 50), "n": None}
    tx = quantize_gradients(2, key=5)
    state = tx.init(grads)
    first, state = jax.jit(tx.update)(grads, state)
    second, after = tx.update(grads, state)
    assert (int(state.step), int(after.step)) == (1, 2)
    assert np.any(np.asarray(first["a"]) != np.asarray(second["a"]))
    assert np.any(np.asarray(first["a"]) != np.asarray(first["b"]))
    again = quantize_gradients(2, jax.random.key(5))
    np.testing.assert_array_equal(again.update(grads, again.init(grads))[0]["a"], first["a"])


def test_bfloat16_and_integers_and_training():
    tx = quantize_gradients(8)
    grads = {"w": jnp.linspace(-1, 1, 9, dtype=jnp.bfloat16), "n": jnp.arange(3)}
    out, _ = tx.update(grads, tx.init(grads))
    assert out["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(out["n"], grads["n"])

    tx = optax.chain(quantize_gradients(2), optax.sgd(0.1))
    w = jnp.zeros(20)
    target = jnp.linspace(-1, 1, 20)

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(w - target, state)
        return (w + updates, state), None

    (w, _), _ = jax.lax.scan(step, (w, tx.init(w)), None, 300)
    # The step of the grid is the largest error, which falls with the rest: to rounding, zero.
    assert float(jnp.max(jnp.abs(w - target))) < 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [({"bits": 1}, "bits=1"), ({"per": "row"}, "per='row'"), ({"block_size": 0}, "block_size=0")],
)
def test_refused(options, message):
    with pytest.raises(SpecError, match=message):
        quantize_gradients(**options)
