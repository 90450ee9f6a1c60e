"""Weights fixed by magnitude and by what it does to the loss, against the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.quantization import learned

RNG = np.random.default_rng(0)
values = jax.jit(lambda leaf: leaf.materialize())


def weight(*shape):
    return RNG.normal(size=shape).astype(np.float32)


@pytest.mark.thin(4)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("ternary", jnp.float32), ("ternary", jnp.bfloat16), ("pow2_4", jnp.float32)],
)
def test_trained_and_stored_values_are_the_same_bits(name, dtype):
    w = jnp.asarray(weight(3, 16, 4), dtype).at[:, 3].set(0)
    params = jc.compress({"w": w}, {"w": learned.ELQ(name)})
    np.testing.assert_array_equal(values(params["w"]), w)
    half = jax.jit(learned.quantize_more)(params, 0.5)["w"]
    np.testing.assert_array_equal(half.mask.sum((1, 2)), [32] * 3)
    moved = half.replace(weight=half.weight * 0.9)  # whatever an optimizer does
    whole = np.asarray(values(half.finalize()))
    np.testing.assert_array_equal(values(moved), jnp.where(half.mask, whole, moved.weight))
    assert half.finalize().format == name
    assert not np.asarray(whole)[:, 3].any()
    full = half.more(1.0)
    np.testing.assert_array_equal(values(full), values(full.finalize()))
    grad = jax.grad(lambda leaf: jnp.sum(leaf.materialize().astype(jnp.float32)), allow_int=True)
    np.testing.assert_array_equal(grad(half).weight, np.where(half.mask, 0, 1))


def test_the_scale_is_the_one_of_least_error():
    w = weight(12, 3)
    leaf = learned.ELQ("ternary", scale_dtype="float32")(jnp.asarray(w))
    x = np.sort(np.abs(w).ravel().astype(np.float64))[::-1]
    best = min(np.sum(x**2) - np.sum(x[:k]) ** 2 / k for k in range(1, x.size + 1))
    found = np.sum((w.astype(np.float64) - np.asarray(values(leaf.finalize()))) ** 2)
    assert found == pytest.approx(best, rel=1e-5)  # sums of 36 squares in float32
    each = learned.ELQ("ternary", granularity="channel")(jnp.asarray(w))
    assert each.scale.shape == (1, 3)


def test_the_order_is_that_of_magnitude_less_harm():
    w, g = weight(2, 40), weight(2, 40)
    params = jc.compress({"w": jnp.asarray(w)}, {"w": learned.ELQ("ternary", harm=0.5)})
    leaf = params["w"]
    gap = np.abs(g * (np.asarray(values(leaf.finalize())) - w)).astype(np.float64)
    score = np.abs(w) / np.abs(w).mean() - 0.5 * gap / gap.mean()
    grads = {"w": leaf.replace(weight=jnp.asarray(g))}
    fixed = np.asarray(learned.quantize_more(params, 0.25, grads)["w"].mask)
    order = np.sort(score.ravel())
    np.testing.assert_array_equal(fixed, score >= order[60])
    plain = np.asarray(learned.quantize_more(params, 0.25)["w"].mask)
    np.testing.assert_array_equal(plain, np.abs(w) >= np.sort(np.abs(w).ravel())[60])
    assert (plain != fixed).any()
    # What is fixed stays so, whatever the gradients are then.
    first = learned.quantize_more(params, 0.25)
    more = np.asarray(learned.quantize_more(first, 0.5, grads)["w"].mask)
    assert (more | ~plain).all()
    assert more.sum() == 40


def test_the_loss_and_its_gradient_are_those_of_the_formula():
    w, x, y = weight(10, 3), weight(20, 10), weight(20, 3)
    leaf = learned.ELQ("ternary", scale_dtype="float32")(jnp.asarray(w)).more(0.3)
    params, mask = {"w": leaf}, np.asarray(leaf.mask)
    run = jc.compressed(lambda p: jnp.mean((x @ p["w"] - y) ** 2))
    total = lambda p: learned.perturbed_loss(run, p, 0.7, 0.01)
    found, grads = jax.jit(jax.value_and_grad(total, allow_int=True))(params)
    now, hat = (np.asarray(values(v), np.float64) for v in (leaf, leaf.finalize()))
    loss = lambda w: np.mean((x @ w - y) ** 2)
    slope = lambda w: 2 * x.T @ (x @ w - y) / y.size
    change = loss(hat) - loss(now)
    expected = loss(now) + 0.7 * abs(change) + 0.01 * np.sum((now - hat) ** 2)
    # Sums of 60 squares of float32 products of 10 terms.
    assert float(found) == pytest.approx(expected, rel=1e-5)
    through = slope(now) + 0.7 * np.sign(change) * (slope(hat) - slope(now)) + 0.02 * (now - hat)
    np.testing.assert_allclose(grads["w"].weight, np.where(mask, 0, through), rtol=1e-4, atol=1e-5)


def test_bad_input():
    for make, text in (
        (lambda: learned.ELQ("int4"), "write ternary, binary, or such as pow2_4"),
        (lambda: learned.ELQ("pow2_9"), "unknown format"),
        (lambda: learned.ELQ("pow2_4", granularity="channel"), "write granularity='tensor'"),
        (lambda: learned.ELQ(harm=-1.0), "at least 0"),
    ):
        with pytest.raises(jc.SpecError, match=text):
            make()
    params = {"w": learned.ELQ()(jnp.ones((2, 2)))}
    with pytest.raises(jc.CompressError, match="no gradient of a weight"):
        learned.quantize_more(params, 0.5, {"w": jnp.ones(3)})
    with pytest.raises(jc.CompressError, match="put in ELQ"):
        learned.perturbed_loss(jnp.sum, jnp.ones(3))
