"""Divergences against integrals and sampling, and noise against the moments it should have."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import integrate, stats

import jaxcompress as jc
from jaxcompress.pruning import gates
from jaxcompress.pruning.gates.horseshoe import kl_gamma, kl_inverse_gamma


def test_the_fit_of_variational_dropout_is_near_the_integral():
    # KL(N(theta, alpha theta^2) || log-uniform) is, up to its constant, E log|alpha^-1/2 + n|.
    at = np.array([-6.0, -3.0, -1.0, 0.0, 1.0, 2.0, 4.0])
    leaf = gates.VariationalDropout()(jnp.ones(len(at)))
    leaf = leaf.replace(log_sigma2=jnp.float32(at))
    each = jax.vmap(lambda w, s: leaf.replace(weight=w, log_sigma2=s).penalty())
    found = each(leaf.weight, leaf.log_sigma2)

    def mean_log(shift):
        f = lambda n: stats.norm.pdf(n - shift) * np.log(abs(n))
        halves = [(-12 + min(0, shift), 0), (0, 12 + shift)]
        return sum(integrate.quad(f, *half, limit=200, points=[0])[0] for half in halves)

    exact = [mean_log(np.exp(-a / 2)) - mean_log(0.0) for a in at]
    # The published constants fit the curve to within 0.01, which is what a figure there shows.
    np.testing.assert_allclose(found, exact, atol=0.01)


def test_the_divergences_of_the_horseshoe_by_sampling():
    rng = np.random.default_rng(0)
    for mean, log_var, scale in ((-0.7, -0.5, 1.0), (0.3, 0.4, 0.25), (-4.0, -2.0, 1e-2)):
        sd = np.exp(log_var / 2)
        x = np.exp(mean + sd * rng.normal(size=200_000))
        q = stats.lognorm.logpdf(x, sd, scale=np.exp(mean))
        for found, p in (
            (
                kl_gamma(jnp.float32(mean), jnp.float32(log_var), scale),
                stats.gamma(0.5, scale=scale),
            ),
            (kl_inverse_gamma(jnp.float32(mean), jnp.float32(log_var)), stats.invgamma(0.5)),
        ):
            terms = q - p.logpdf(x)
            error = terms.std() / np.sqrt(x.size)
            assert abs(float(found) - terms.mean()) < 5 * error + 1e-5 * abs(terms.mean())


def test_the_prior_of_a_scale_is_half_cauchy():
    rng = np.random.default_rng(1)
    for tau in (1.0, 0.02):
        a = stats.gamma(0.5, scale=tau**2).rvs(20_000, random_state=rng)
        b = stats.invgamma(0.5).rvs(20_000, random_state=rng)
        assert stats.kstest(np.sqrt(a * b), stats.halfcauchy(scale=tau).cdf).pvalue > 1e-3


def horseshoe(w, seed=0):
    """A leaf with noise of all its parts well above zero."""
    leaf = gates.Horseshoe(global_scale=0.5)(w)
    rng = np.random.default_rng(seed)
    draw = lambda x, low, high: jnp.asarray(rng.uniform(low, high, x.shape).astype(np.float32))
    return leaf.replace(
        log_var=draw(leaf.log_var, -4, -2),
        local_mean=draw(leaf.local_mean, -0.5, 0.5),
        local_log_var=draw(leaf.local_log_var, -3, -2),
        global_mean=draw(leaf.global_mean, -0.3, 0.3),
        global_log_var=draw(leaf.global_log_var, -4, -3),
    )


def test_penalty_of_the_horseshoe_sums_over_all_its_variables():
    leaf = horseshoe(jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)))
    p = {name: np.asarray(getattr(leaf, name), np.float64) for name in leaf.trainable}
    var = np.exp(p["log_var"])
    total = 0.5 * (var + p["weight"] ** 2 - 1 - p["log_var"]).sum()
    for where, tau in (("local", 1.0), ("global", 0.5)):
        m, lv = p[f"{where}_mean"], p[f"{where}_log_var"]
        (ma, mb), (la, lb) = np.moveaxis(m, -1, 0), np.moveaxis(lv, -1, 0)
        # Equations of the paper's appendix, with tau^2 the scale of the Gamma variable.
        total += (
            np.log(tau) + np.exp(ma + np.exp(la) / 2) / tau**2 - 0.5 * (ma + la + 1 + np.log(2))
        ).sum()
        total += (np.exp(np.exp(lb) / 2 - mb) - 0.5 * (-mb + lb + 1 + np.log(2))).sum()
    np.testing.assert_allclose(leaf.penalty(), total, rtol=2e-6)
    assert leaf.local_mean.shape == (4, 1, 2)
    # Its gradient by the smallest of the parts, once more by differences of the sum above.
    slope = jax.grad(lambda x: leaf.replace(global_mean=x).penalty())(leaf.global_mean)
    ma = float(p["global_mean"][0])
    la = float(p["global_log_var"][0])
    np.testing.assert_allclose(slope[0], np.exp(ma + np.exp(la) / 2) / 0.25 - 0.5, rtol=1e-5)


def test_draws_have_the_moments_that_the_posterior_says():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32))
    keys = jax.random.split(jax.random.key(0), 20_000)
    leaf = horseshoe(w)
    draws = np.asarray(jax.jit(jax.vmap(leaf.materialize))(keys), np.float64)
    mean, var = np.asarray(leaf.materialize()), np.asarray(leaf.variance())
    sd = draws.std(axis=0)
    assert np.all(abs(draws.mean(axis=0) - mean) < 5 * sd / np.sqrt(len(keys)))
    # The variance of a variance is (m4 - m2^2) / n, taken from the draws.
    centered = draws - draws.mean(axis=0)
    error = np.sqrt((centered**4).mean(axis=0) - (centered**2).mean(axis=0) ** 2)
    assert np.all(abs(draws.var(axis=0) - var) < 5 * error / np.sqrt(len(keys)))


def test_products_are_drawn_per_example_with_mean_and_variance_of_their_own():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(4, 3)).astype(np.float32))
    leaf = gates.VariationalDropout(-1.0)(w).drawn(jax.random.key(1))
    row = jnp.asarray(rng.normal(size=4).astype(np.float32))
    x = jnp.broadcast_to(row, (20_000, 4)).at[0].set(0.0)
    apply = jc.compressed(lambda w, x: x @ w)
    y = np.asarray(jax.jit(apply)(leaf, x), np.float64)
    assert not np.any(y[0])  # of nothing, nothing, and no NaN in its gradient below
    y, n = y[1:], len(y) - 1
    sd = np.sqrt(np.sum(np.asarray(row) ** 2) * np.exp(-1.0))
    assert np.all(abs(y.mean(axis=0) - np.asarray(row @ w)) < 5 * sd / np.sqrt(n))
    assert np.all(abs(y.var(axis=0) / sd**2 - 1) < 5 * np.sqrt(2 / n))
    # Of one draw of the weights, all rows would be alike, and columns would be correlated.
    assert np.all(abs(np.corrcoef(y.T)[np.triu_indices(3, 1)]) < 5 / np.sqrt(n))
    loss = lambda s: jnp.mean(apply(leaf.replace(log_sigma2=s), x[:64]) ** 2)
    grad = jax.jit(jax.grad(loss))(leaf.log_sigma2)
    assert np.all(np.isfinite(grad))
    assert np.any(grad)
    # Elsewhere the weights are drawn: one look-up of all rows is the leaf as it is drawn.
    rows = jax.jit(jc.compressed(lambda w: w[jnp.arange(4)]))(leaf)
    np.testing.assert_array_equal(rows, jax.jit(lambda leaf: leaf.materialize())(leaf))
    # A convolution draws its outcome too, of the same moments.
    kernel = jnp.asarray(rng.normal(size=(3, 1, 1, 2)).astype(np.float32))
    conv = gates.VariationalDropout(-1.0)(kernel).drawn(jax.random.key(2))
    image = jnp.ones((1, 20_000, 1, 1))
    convolve = lambda k, x: jax.lax.conv_general_dilated(
        x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    out = np.asarray(jax.jit(jc.compressed(convolve))(conv, image))[0, :, 0]
    sd = np.sqrt(3 * np.exp(-1.0))
    assert np.all(abs(out.mean(axis=0) - kernel.sum(axis=(0, 1, 2))) < 5 * sd / np.sqrt(len(out)))
    assert np.all(abs(out.var(axis=0) / sd**2 - 1) < 5 * np.sqrt(2 / len(out)))


def test_noise_of_float16_is_that_of_float32_rounded_once():
    rng = np.random.default_rng(0)
    w, c = rng.normal(size=(8, 3)).astype(np.float16), rng.normal(size=3).astype(np.float32)
    # Squares beyond what float16 holds, and squares below.
    x = np.float16([[300.0], [1e-4]]) * np.ones((2, 8), np.float16)

    def both(dtype):
        leaf = gates.VariationalDropout(-3.0)(jnp.asarray(w.astype(dtype)))
        leaf = leaf.drawn(jax.random.key(1))

        def loss(s):
            y = jc.compressed(jnp.matmul)(jnp.asarray(x.astype(dtype)), leaf.replace(log_sigma2=s))
            return jnp.sum(y[1].astype(jnp.float32) * c), y

        grad, y = jax.jit(jax.grad(loss, has_aux=True))(leaf.log_sigma2)
        return np.asarray(y), np.asarray(grad)

    (short, short_grad), (wide, grad) = both(np.float16), both(np.float32)
    assert short.dtype == np.float16
    np.testing.assert_array_equal(short, wide.astype(np.float16))
    np.testing.assert_allclose(wide[0], 300 * w.sum(axis=0), atol=5 * 300 * np.sqrt(8 * np.exp(-3)))
    # The same but for c, which is rounded to float16 on its way back.
    np.testing.assert_allclose(short_grad, grad, rtol=2.0**-11 + 1e-6)
    assert np.all(grad)


def test_posterior_bits_are_the_least_whose_half_step_is_below_the_deviation():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32))
    for log_sigma2 in (-4.0, -7.0, -9.0):
        leaf = gates.VariationalDropout(log_sigma2)(w)
        (bits,) = gates.posterior_bits({"w": leaf}).values()
        half = lambda b: float(jnp.max(jnp.abs(w))) / (2 ** (b - 1) - 1) / 2
        assert half(bits) <= np.exp(log_sigma2 / 2)
        assert bits == 2 or half(bits - 1) > np.exp(log_sigma2 / 2)
    # Where float32 has no such variance, more bits than those of the dtype say nothing more.
    still = {n: gates.VariationalDropout(-200.0)(w.astype(n)) for n in ("float32", "bfloat16")}
    assert gates.posterior_bits(still) == {"float32": 32, "bfloat16": 16}
