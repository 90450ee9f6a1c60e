"""The gradients of trained quantized weights, against torch and the published formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress.quantization import learned

RNG = np.random.default_rng(0)

values = jax.jit(lambda leaf: leaf.materialize())


def gradient(leaf, weights):
    """Of `sum(weights * w_hat)`, children by name."""
    fn = lambda leaf: jnp.sum(weights * leaf.materialize())
    return jax.jit(jax.grad(fn, allow_int=True))(leaf)


def close(a, b, n=1):
    """Float32 with sums of n terms of size 1: each operation is off by 2**-24 at most."""
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=n * 2.0**-22)


def test_lsq_against_its_formula():
    w = RNG.normal(size=(40, 3)).astype(np.float32)
    up = RNG.normal(size=(40, 3)).astype(np.float32)
    leaf = learned.LSQ("int3", scale_dtype="float32")(jnp.asarray(w))
    close(leaf.scale[0], 2 * np.abs(w).mean(0) / np.sqrt(3))
    leaf = leaf.replace(scale=jnp.asarray([[0.4, 0.2, 0.05]], jnp.float32))
    s = np.asarray(leaf.scale)
    v = w / s
    inside = (v > -4) & (v < 3)
    grads = gradient(leaf, up)
    np.testing.assert_array_equal(grads.weight, np.where(inside, up, 0))
    slope = np.where(inside, np.round(v) - v, np.where(v <= -4, -4, 3))
    close(grads.scale[0], (up * slope).sum(0) / np.sqrt(40 * 3), 40 * 4)
    close(values(leaf), s * np.clip(np.round(v), -4, 3))


@pytest.mark.parametrize("per_channel", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_lsq_plus_against_torch(per_channel):
    torch = pytest.importorskip("torch")
    w = RNG.normal(size=(50, 4)).astype(np.float32)
    up = RNG.normal(size=(50, 4)).astype(np.float32)
    kind = "channel" if per_channel else "tensor"
    spec = learned.LSQPlus("uint4", granularity=kind, scale_dtype="float32")
    leaf = spec(jnp.asarray(w))
    shape = leaf.scale.shape
    scale = np.float32([0.1, 0.2, 0.15, 0.3])[: shape[-1]]
    zero = np.float32([3, 8, 5, 0])[: shape[-1]]
    leaf = leaf.replace(scale=jnp.asarray(scale[None]), offset=jnp.asarray(-(zero * scale)[None]))
    # What lies within half a step beyond the last code counts as clipped here, as it is printed,
    # and as inside there; and torch multiplies by the inverse of the scale. Both are left out.
    v = w / scale + zero
    odd = ((v < 0) & (v > -0.5)) | ((v > 15) & (v < 15.5)) | (np.abs(v % 1 - 0.5) < 1e-4)
    up[odd] = 0
    x, s, z = (torch.tensor(a, requires_grad=True) for a in (w, scale, zero))
    n = 50 if per_channel else 200
    factor = 1 / np.sqrt(n * 15)
    if per_channel:
        out = torch._fake_quantize_learnable_per_channel_affine(x, s, z, 1, 0, 15, factor)
    else:
        out = torch._fake_quantize_learnable_per_tensor_affine(x, s, z, 0, 15, factor)
    (out * torch.tensor(up)).sum().backward()
    ours = np.asarray(values(leaf))
    close(ours[~odd], out.detach().numpy()[~odd], 4)
    grads = gradient(leaf, up)
    np.testing.assert_array_equal(grads.weight, x.grad.numpy())
    assert 0 < (x.grad.numpy()[~odd] == 0).mean() < 1
    # There the zero point is trained, z = -beta / s, and the scale with z held fixed: outside,
    # dz = -s dw_hat and ds = (q - z) dw_hat, where by offset it is dbeta = dw_hat, ds = q dw_hat.
    close(-grads.offset[0] * scale, z.grad.numpy(), n)
    clipped = np.where(odd, 0, up) * ((v <= 0) | (v >= 15))
    moved = (clipped * zero).sum(None if not per_channel else 0) * factor
    close(grads.scale[0] - moved, s.grad.numpy(), n * 16)


def test_dorefa_and_wrpn_against_their_formulas():
    w = RNG.normal(size=(30, 4)).astype(np.float32)
    up = RNG.normal(size=(30, 4)).astype(np.float32)
    leaf = learned.DoReFa(3)(jnp.asarray(w))
    t = np.tanh(w.astype(np.float64))
    most = np.abs(t).max()
    close(values(leaf), 2 * np.round(7 * (t / (2 * most) + 0.5)) / 7 - 1, 4)
    at = np.unravel_index(np.abs(t).argmax(), t.shape)
    expected = up * (1 - t**2) / most
    expected[at] -= (up * t).sum() / most**2 * np.sign(t[at]) * (1 - t[at] ** 2)
    close(gradient(leaf, up).weight, expected, 30)
    leaf = learned.WRPN(3)(jnp.asarray(w))
    close(values(leaf), np.round(3 * np.clip(w, -1, 1)) / 3, 4)
    np.testing.assert_array_equal(gradient(leaf, up).weight, np.where(np.abs(w) <= 1, up, 0))


def test_dsq_against_finite_differences_of_the_soft_function():
    w = np.sort(RNG.uniform(-1.4, 2.2, size=60)).astype(np.float32)
    up = RNG.normal(size=60).astype(np.float32)
    low, high, alpha = -1.0, 2.0, 0.2  # a step of 1: the grid is that of the bounds

    def soft(w, low, high, alpha, part):
        step = (high - low) / 3
        slope = np.log(2 / alpha - 1) / step
        bend = np.tanh(slope * (w - low - (part + 0.5) * step)) / (1 - alpha)
        inner = low + step * (part + (bend + 1) / 2)
        return np.where(w < -1, low, np.where(w > 2, high, inner))

    part = np.clip(np.floor(w + 1.0), 0, 2).astype(np.float64)
    leaf = learned.DSQ(2, alpha=alpha)(jnp.asarray(w))
    one = jnp.ones(1)
    leaf = leaf.replace(lower=low * one, upper=high * one, alpha=alpha * one)
    close(values(leaf), np.clip(np.round(w), -1, 2))
    grads = gradient(leaf, up)
    args = [w.astype(np.float64), low, high, alpha]

    def slope(i):
        h = 1e-6
        ahead, behind = list(args), list(args)
        ahead[i], behind[i] = args[i] + h, args[i] - h
        return up * (soft(*ahead, part) - soft(*behind, part)) / (2 * h)

    # The central difference is off by h**2 and float64 rounding over h, 1e-10; float32 is more.
    close(grads.weight, slope(0), 60)
    for name, i in (("lower", 1), ("upper", 2), ("alpha", 3)):
        close(getattr(grads, name)[0], slope(i).sum(), 60 * 8)


def test_qil_against_finite_differences_of_the_transformer():
    w = RNG.uniform(-2, 2, size=60).astype(np.float32)
    up = RNG.normal(size=60).astype(np.float32)
    args = [w.astype(np.float64), 0.9, 0.6, 1.3]

    def mapped(w, c, d, gamma):
        return np.sign(w) * np.clip(0.5 * (np.abs(w) - c) / d + 0.5, 0, 1) ** gamma

    one = jnp.ones(1)
    leaf = learned.QIL(3)(jnp.asarray(w))
    leaf = leaf.replace(center=0.9 * one, distance=0.6 * one, gamma=1.3 * one)
    close(values(leaf), np.round(3 * mapped(*args)) / 3, 4)
    grads = gradient(leaf, up)

    def slope(i):
        ahead, behind = list(args), list(args)
        ahead[i], behind[i] = args[i] + 1e-6, args[i] - 1e-6
        return up * (mapped(*ahead) - mapped(*behind)) / 2e-6

    close(grads.weight, slope(0), 60)
    for name, i in (("center", 1), ("distance", 2), ("gamma", 3)):
        close(getattr(grads, name)[0], slope(i).sum(), 60 * 4)


def test_binary_weights_against_their_formulas():
    w = RNG.normal(size=(30, 4)).astype(np.float32)
    up = RNG.normal(size=(30, 4)).astype(np.float32)
    sign = np.where(w >= 0, 1, -1).astype(np.float32)
    leaf = learned.BinaryConnect()(jnp.asarray(w))
    np.testing.assert_array_equal(values(leaf), sign)
    np.testing.assert_array_equal(gradient(leaf, up).weight, np.where(np.abs(w) <= 1, up, 0))

    leaf = learned.XNOR(scale_dtype="float32")(jnp.asarray(w))
    alpha = np.abs(w).mean(0)
    close(values(leaf), alpha * sign)
    through = alpha * np.where(np.abs(w) <= 1, up, 0)
    close(gradient(leaf, up).weight, through + sign * (up * sign).sum(0) / 30, 30)

    leaf = learned.LossAwareBinary(scale_dtype="float32")(jnp.asarray(w))
    nu = RNG.uniform(0, 4, size=w.shape).astype(np.float32)
    params = learned.set_curvature({"w": leaf}, {"w": leaf.replace(weight=jnp.asarray(nu))})
    d = np.sqrt(nu)
    best = (d * np.abs(w)).sum() / d.sum()
    close(values(params["w"]), best * sign, 4)
    # It is the least of the weighted squares.
    error = lambda a: (d * (w - a * sign) ** 2).sum()
    assert error(best) < min(error(best * 1.01), error(best * 0.99))
    np.testing.assert_array_equal(gradient(params["w"], up).weight, up)


@pytest.mark.slow
def test_curvature_comes_from_the_optimizer():
    params = jc.compress(
        {"w": jnp.ones((4, 2)), "b": jnp.ones(2)}, {"w": learned.LossAwareBinary()}
    )
    trainable, rest = jc.partition(params)
    tx = optax.adam(0.1, b2=0.5)
    grads = jax.tree.map(lambda x: jnp.arange(1.0, x.size + 1).reshape(x.shape), trainable)
    _, state = tx.update(grads, tx.init(trainable), trainable)
    new = learned.set_curvature(jc.combine(trainable, rest), optax.tree_utils.tree_get(state, "nu"))
    # The second moments of one step are (1 - b2) g**2.
    close(new["w"].curvature, np.sqrt(0.5) * np.arange(1.0, 9).reshape(4, 2))
    with pytest.raises(jc.CompressError, match="put in LossAwareBinary"):
        learned.set_curvature({"b": jnp.ones(2)}, {"b": jnp.ones(2)})
    with pytest.raises(jc.CompressError, match="give it those of the params"):
        learned.set_curvature({"w": params["w"]}, {"w": jnp.ones(3)})


@pytest.mark.slow
def test_multi_bit_weights_against_brute_force():
    w = RNG.normal(size=8).astype(np.float32)
    one = values(learned.MultiBit(1)(jnp.asarray(w)).finalize())
    close(one, np.where(w >= 0, 1, -1) * np.abs(w).mean(), 4)
    # Two greedy terms are its definition; refined ones are a fixed point of both steps.
    greedy = learned.MultiBit(2, rounds=0)(jnp.asarray(w)).finalize()
    first = np.abs(w).mean()
    second = np.abs(w - first * np.sign(w)).mean()
    table = np.sort([a * first + b * second for a in (-1, 1) for b in (-1, 1)])
    close(greedy.centroids, table, 4)
    nearest = table[np.abs(w[:, None] - table).argmin(-1)]
    close(values(greedy), nearest, 4)
    fitted = np.asarray(values(learned.MultiBit(2, rounds=8)(jnp.asarray(w)).finalize()))
    error = np.sum((fitted - w) ** 2)
    assert error <= np.sum((nearest - w) ** 2)
    # Among all signs with their best scales, the error of alternation is close to the least.
    signs = 1.0 - 2 * ((np.arange(2**8)[:, None] >> np.arange(8)) & 1)
    least = min(
        np.sum((b @ np.linalg.lstsq(b, w, rcond=None)[0] - w) ** 2)
        for b in (np.stack([x, y], -1) for x in signs[::2] for y in signs[::2])
    )
    assert least * (1 - 1e-4) <= error <= 1.5 * least


def test_ternary_weights_against_their_formulas():
    w = RNG.normal(size=(30, 4)).astype(np.float32)
    up = RNG.normal(size=(30, 4)).astype(np.float32)
    leaf = learned.TWN(scale_dtype="float32")(jnp.asarray(w))
    kept = np.abs(w) > 0.7 * np.abs(w).mean()
    close(values(leaf), np.sign(w) * kept * np.abs(w)[kept].mean(), 4)
    np.testing.assert_array_equal(gradient(leaf, up).weight, up)

    leaf = learned.BitNet(scale_dtype="float32")(jnp.asarray(w))
    mean = np.abs(w).mean()
    close(values(leaf), mean * np.clip(np.round(w / mean), -1, 1), 4)
    np.testing.assert_array_equal(gradient(leaf, up).weight, up)

    leaf = learned.TTQ(0.3)(jnp.asarray(w))
    above, below = w > 0.3 * np.abs(w).max(), w < -0.3 * np.abs(w).max()
    p, n = w[above].mean(), -w[below].mean()
    close([leaf.positive[0, 0], leaf.negative[0, 0]], [p, n])
    close(values(leaf), np.where(above, p, np.where(below, -n, 0)))
    grads = gradient(leaf, up)
    close(grads.positive[0, 0], up[above].sum(), 120)
    close(grads.negative[0, 0], -up[below].sum(), 120)
    close(grads.weight, up * np.where(above, p, np.where(below, n, 1)))


def test_a_scale_that_shrinks_below_zero_counts_as_tiny_and_comes_back():
    leaf = learned.LSQ("int4")(jnp.ones((4, 1))).replace(scale=jnp.full((1, 1), -1.0))
    assert np.isfinite(values(leaf)).all()
    grads = gradient(leaf, -jnp.ones((4, 1)))
    assert float(grads.scale[0, 0]) == pytest.approx(-4 * 7 / np.sqrt(4 * 7))


def test_inq_fixes_the_largest_and_never_moves_them():
    w = RNG.normal(size=(3, 16, 4)).astype(np.float32)
    params = jc.compress({"w": jnp.asarray(w)}, {"w": learned.INQ(4)})
    leaf = params["w"]
    np.testing.assert_array_equal(values(leaf), w)
    # The nearest of zero and the powers of two, down from the one that holds the largest.
    top = np.floor(np.log2(4 * np.abs(w).max((1, 2), keepdims=True) / 3))
    powers = 2.0 ** (top[..., None] - np.arange(7))
    levels = np.concatenate([-powers, np.zeros_like(powers[..., :1]), powers], -1)
    nearest = np.take_along_axis(
        np.broadcast_to(levels, (*w.shape, 15)),
        np.abs(w[..., None] - levels).argmin(-1)[..., None], -1,
    )[..., 0]  # fmt: skip
    np.testing.assert_array_equal(values(leaf.finalize()), nearest)
    fix = jax.jit(learned.quantize_more)
    half = fix(params, 0.5)["w"]
    np.testing.assert_array_equal(half.mask.sum((1, 2)), [32] * 3)
    order = np.sort(np.abs(w).reshape(3, -1), -1)
    np.testing.assert_array_equal(half.mask, np.abs(w) >= order[:, 32, None, None])
    np.testing.assert_array_equal(values(half), np.where(half.mask, nearest, w))
    up = RNG.normal(size=w.shape).astype(np.float32)
    np.testing.assert_array_equal(gradient(half, up).weight, np.where(half.mask, 0, up))
    # Whatever an optimizer does, momentum and decay included.
    moved = half.replace(weight=half.weight * 0.9 + 0.01)
    np.testing.assert_array_equal(
        np.asarray(values(moved))[np.asarray(half.mask)], nearest[np.asarray(half.mask)]
    )
    more = fix({"w": moved}, 0.75)["w"]
    np.testing.assert_array_equal(more.mask.sum((1, 2)), [48] * 3)
    assert (np.asarray(more.mask) | ~np.asarray(half.mask)).all()
    np.testing.assert_array_equal(fix({"w": more}, 0.1)["w"].mask, more.mask)
    full = fix({"w": more}, 1.0)["w"]
    np.testing.assert_array_equal(values(full), values(full.finalize()))
    assert full.finalize().format == "pow2_4"
    with pytest.raises(jc.CompressError, match="write a number from 0 to 1"):
        learned.quantize_more(more, 2.0)
    with pytest.raises(jc.CompressError, match="put in INQ"):
        learned.quantize_more({"w": jnp.ones(2)}, 0.5)
