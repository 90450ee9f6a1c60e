"""Low rank in the metric of data, against closed forms in float64 and brute-force optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jaxcompress as jc
from jaxcompress import KernelAxes, SpecError
from jaxcompress.decomposition.data_aware import ASVD, ActivationSVD, FisherSVD, fisher_stats
from jaxcompress.decomposition.elementwise import weighted_low_rank
from jaxcompress.decomposition.weighted import (
    activation_svd,
    asvd,
    fisher_svd,
    weighted_spectrum,
)
from jaxcompress.specs import LeafContext

EPS = float(np.finfo(np.float32).eps)


def case(seed, rows, columns, examples=200):
    """Weights, and the Gram matrix of correlated inputs of unequal size."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(rows, columns))
    x = rng.normal(size=(examples, rows)) @ rng.normal(size=(rows, rows))
    x = x * np.exp(rng.normal(size=rows))
    return w.astype(np.float32), (x.T @ x).astype(np.float32)


def error(w, gram, left, right):
    d = np.asarray(w, np.float64) - np.asarray(left, np.float64) @ np.asarray(right, np.float64)
    return np.trace(d.T @ np.asarray(gram, np.float64) @ d)


def squares(w, gram):
    root = np.linalg.cholesky(np.asarray(gram, np.float64))
    return np.linalg.svd(root.T @ np.asarray(w, np.float64), compute_uv=False) ** 2


@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (12, 12)])
def test_the_error_is_the_least_there_is(shape):
    w, gram = case(0, *shape)
    s = squares(w, gram)
    # Products of float32 sums: each of the squares is within a small multiple of eps of their sum.
    np.testing.assert_allclose(weighted_spectrum(w, gram), s, atol=20 * EPS * s.sum())
    for rank in (1, 4, 9):
        left, right = activation_svd(jnp.asarray(w), jnp.asarray(gram), rank, damping=0.0)
        assert (left.shape, right.shape) == ((shape[0], rank), (rank, shape[1]))
        assert error(w, gram, left, right) <= s[rank:].sum() + 20 * EPS * s.sum()


def test_no_optimizer_finds_better_factors():
    w, gram = case(1, 6, 5)
    rank = 2
    found = error(w, gram, *activation_svd(jnp.asarray(w), jnp.asarray(gram), rank, damping=0.0))
    wide, metric = w.astype(np.float64), gram.astype(np.float64)

    def loss(flat):
        left, right = flat[: 6 * rank].reshape(6, rank), flat[6 * rank :].reshape(rank, 5)
        d = left @ right - wide
        g = 2 * metric @ d
        return np.sum(d * g) / 2, np.concatenate([(g @ right.T).ravel(), (left.T @ g).ravel()])

    rng = np.random.default_rng(2)
    best = min(
        scipy.optimize.minimize(
            loss, rng.normal(size=11 * rank), jac=True, options={"gtol": 1e-9}
        ).fun
        for _ in range(12)
    )
    plain = error(w, gram, *map(np.asarray, jc.decomposition.truncated_svd(w, rank)))
    assert abs(found - best) < 1e-4 * best
    assert plain > 1.1 * best  # so that plain SVD would not have passed


def test_directions_without_data_are_settled_as_by_plain_svd():
    rng = np.random.default_rng(3)
    w = rng.normal(size=(12, 9)).astype(np.float32)
    x = np.zeros((20, 12), np.float32)
    x[:, :3] = rng.normal(size=(20, 3))  # only three inputs are ever met
    gram = x.T @ x
    left, right = activation_svd(jnp.asarray(w), jnp.asarray(gram), 5)
    assert np.all(np.isfinite(left))
    assert np.all(np.isfinite(right))
    total = squares(w, gram + 1e-9 * np.eye(12, dtype=np.float32)).sum()
    assert error(w, gram, left, right) <= (12 * 1e-5 + 20 * EPS) * total
    # Three dimensions for what is met, and two for the rest: the best are those of what is left.
    base = np.linalg.svd(w[:3], full_matrices=False)[2]
    rest = w - w @ base.T @ base
    least = np.sum(np.linalg.svd(rest, compute_uv=False)[2:] ** 2)
    assert np.sum((w - np.asarray(left @ right)) ** 2) <= 1.001 * least


@pytest.mark.parametrize("gram", ["zero", "one"])
def test_a_singular_metric_gives_finite_factors(gram):
    w = case(4, 8, 6)[0]
    metric = jnp.zeros((8, 8)).at[0, 0].set(gram == "one")
    for damping in (0.0, 1e-5):
        left, right = activation_svd(jnp.asarray(w), metric, 4, damping=damping)
        assert np.all(np.isfinite(left @ right))
    if gram == "zero":
        best = np.sum(np.linalg.svd(w, compute_uv=False)[4:] ** 2)
        np.testing.assert_allclose(np.sum((w - np.asarray(left @ right)) ** 2), best, rtol=1e-4)


@settings(max_examples=8, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from([1e-12, 1.0, 1e12]), st.sampled_from([1e-12, 1e12]))
def test_scales_of_weights_and_inputs_change_nothing(seed, a, b):
    w, gram = case(seed, 8, 6)
    plain = np.asarray(jnp.matmul(*activation_svd(jnp.asarray(w), jnp.asarray(gram), 3)))
    left, right = activation_svd(jnp.asarray(w * a, jnp.float32), jnp.asarray(gram * b), 3)
    out = np.asarray(left, np.float64) @ np.asarray(right, np.float64) / a
    # A gap between singular values is not bounded below, so it is the error that is compared.
    one, other = (error(w, gram, x, np.eye(6)) for x in (plain, out))
    assert abs(one - other) <= 40 * EPS * squares(w, gram).sum()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_keeps_its_dtype_and_is_computed_in_float32(dtype):
    w, gram = case(5, 16, 12)
    w = jnp.asarray(w, dtype)
    left, right = activation_svd(w, jnp.asarray(gram), 4, damping=0.0)
    assert left.dtype == right.dtype == dtype
    s = squares(np.asarray(w, np.float32), gram)
    # Each factor is rounded once: relative to itself by eps / 2 an entry.
    noise = 4 * float(jnp.finfo(dtype).eps) ** 2 * s.sum()
    found = error(np.asarray(w, np.float32), gram, *(x.astype(jnp.float32) for x in (left, right)))
    assert found <= s[4:].sum() + noise + 2 * (noise * s[4:].sum()) ** 0.5


def test_a_stack_equals_its_matrices_and_factors_are_balanced():
    cases = [case(i, 10, 7) for i in (6, 7)]
    w, gram = (jnp.asarray(np.stack(x)) for x in zip(*cases))
    left, right = activation_svd(w, gram, 3)
    for i in range(2):
        a, b = activation_svd(w[i], gram[i], 3)
        np.testing.assert_allclose(left[i] @ right[i], a @ b, atol=2e-4)
        # U S^(1/2) and S^(1/2) V' have the same squares.
        np.testing.assert_allclose(left[i].T @ left[i], right[i] @ right[i].T, atol=1e-4)


def test_diagonal_metrics_are_the_published_scalings():
    w = case(8, 9, 7)[0].astype(np.float64)
    rng = np.random.default_rng(8)
    fisher = rng.exponential(size=(9, 7))
    for found, root in (
        (fisher_svd(jnp.asarray(w), jnp.asarray(fisher), 3, damping=0.0), fisher.sum(1) ** 0.5),
        (asvd(jnp.asarray(w), jnp.asarray(fisher[:, 0]), 3, alpha=0.7), fisher[:, 0] ** 0.7),
    ):
        u, s, v = np.linalg.svd(root[:, None] * w, full_matrices=False)
        best = (u[:, :3] * s[:3]) @ v[:3] / root[:, None]
        np.testing.assert_allclose(jnp.matmul(*found), best, atol=2e-3)


def test_it_jits_differentiates_and_vmaps():
    w, gram = (jnp.asarray(x) for x in case(9, 8, 6))
    product = lambda w: jnp.sum(jnp.matmul(*activation_svd(w, gram, 3)) ** 2)
    direction = w + 0.3 * jax.random.normal(jax.random.key(0), w.shape)
    slope = jnp.vdot(jax.grad(product)(w), direction)
    h = 1e-2  # errors of h**2 and of some 10 eps / h, relative: 1e-4 each
    numeric = (product(w + h * direction) - product(w - h * direction)) / (2 * h)
    np.testing.assert_allclose(slope, numeric, rtol=2e-3)
    stacked = jax.vmap(lambda w: jnp.matmul(*activation_svd(w, gram, 3)))(jnp.stack([w, 2 * w]))
    np.testing.assert_allclose(stacked[1], 2 * stacked[0], atol=1e-4)


def test_elementwise_weights_reach_a_stationary_point():
    rng = np.random.default_rng(10)
    w, f = rng.normal(size=(9, 7)), rng.exponential(size=(9, 7)) ** 2
    found = weighted_low_rank(jnp.asarray(w), jnp.asarray(f), 2, steps=400)
    errors = np.asarray(found.errors, np.float64)
    assert np.all(np.diff(errors) <= 40 * EPS * errors[0])  # rounding of the sum alone
    left, right = (np.asarray(x, np.float64) for x in found[:2])
    gap = f * (left @ right - w)
    np.testing.assert_allclose(errors[-1], np.sum(f * (left @ right - w) ** 2), rtol=1e-5)
    size = np.sqrt(np.sum(f * w**2) * f.max())
    assert np.abs(gap @ right.T).max() < 1e-3 * size  # the normal equations of both factors
    assert np.abs(left.T @ gap).max() < 1e-3 * size
    assert errors[-1] < 0.9 * errors[0]  # that of row sums is no such point
    # No start of a general optimizer ends much lower.
    loss = lambda z: np.sum(f * (z[:18].reshape(9, 2) @ z[18:].reshape(2, 7) - w) ** 2)
    best = min(scipy.optimize.minimize(loss, rng.normal(size=32)).fun for _ in range(6))
    assert errors[-1] < 1.25 * best  # there are local minima


def test_with_row_weights_elementwise_is_the_closed_form():
    rng = np.random.default_rng(11)
    w, rows = rng.normal(size=(9, 7)), rng.exponential(size=9)
    f = np.broadcast_to(rows[:, None], w.shape)
    found = weighted_low_rank(jnp.asarray(w), jnp.asarray(f), 3, steps=3)
    s = np.linalg.svd(rows[:, None] ** 0.5 * w, compute_uv=False)
    np.testing.assert_allclose(found.errors[-1], np.sum(s[3:] ** 2), rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda w, g: activation_svd(w, g[:3], 2), "do not fit"),
        (lambda w, g: activation_svd(w, g, 7), "from 1 to 6"),
        (lambda w, g: activation_svd(w, g, 2, damping=-1.0), "damping=-1.0"),
        (lambda w, g: activation_svd(w, g * jnp.nan, 2), "NaN"),
        (lambda w, g: weighted_low_rank(w, g, 2), "one number for each weight"),
        (lambda w, g: weighted_low_rank(w, w**2, 2, steps=0), "steps=0"),
        (lambda w, g: ActivationSVD(), "one of rank and energy"),
        (lambda w, g: ActivationSVD(2, energy=0.5), "one of rank and energy"),
        (lambda w, g: ASVD(2, alpha=-1), "alpha=-1"),
        (lambda w, g: ActivationSVD(2)(w), "needs the Gram matrix.*jc.observe"),
        (lambda w, g: ASVD(2)(w), "needs abs_mean"),
        (lambda w, g: FisherSVD(2)(w), "fisher_stats"),
        (lambda w, g: with_gram(ActivationSVD(4), w, g), "write a rank of at most 3"),
        (lambda w, g: with_gram(ActivationSVD(9), w, g), "at most 6"),
        (lambda w, g: jax.jit(lambda w: with_gram(ActivationSVD(energy=0.5), w, g))(w), "jit"),
    ],
)
def test_what_cannot_be_says_what_to_write(make, text):
    w, gram = (jnp.asarray(x) for x in case(12, 8, 6))
    with pytest.raises(SpecError, match=text):
        make(w, gram)


def with_gram(spec, w, gram):
    stats = jc.InputStats(np.asarray(1), gram)
    return spec(w, LeafContext("layer/kernel", KernelAxes((-2,), (-1,)), None, stats))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# How each kernel is used; inputs, outputs and, for the check, the kernel as a matrix.
LAYERS = {
    "dense": ((8, 6), lambda w, x: x @ w, (5, 8)),
    "attention": ((8, 2, 3), lambda w, x: jnp.einsum("bi,ihd->bhd", x, w), (5, 8)),
    "out": ((2, 4, 6), lambda w, x: jnp.einsum("bhd,hdo->bo", x, w), (5, 2, 4)),
    "torch": ((6, 8), lambda w, x: x @ w.T, (5, 8)),
    "conv": (
        (2, 2, 2, 6),
        lambda w, x: lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        (3, 5, 5, 2),
    ),
    "stack": (
        (3, 8, 6),
        lambda w, x: lax.scan(lambda c, w: (c, jnp.tanh(x) @ w), 0.0, w)[1],
        (5, 8),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.thin(6)
def test_every_kind_of_kernel_loses_least_on_what_was_observed(name):
    shape, fn, inputs = LAYERS[name]
    params = {"w": normal(0, *shape)}
    x = normal(1, *inputs) @ normal(2, inputs[-1], inputs[-1]) + normal(3, inputs[-1])
    run = lambda params, x: fn(params["w"], x)
    axes = jc.kernel_axes(run, params, x)
    stats = jc.observe(run, params, [x])
    # Damped, or what few examples leave open would be noise.
    small = jc.compress(params, {"w": ActivationSVD(3)}, stats=stats, axes=axes)
    assert small["w"].shape == shape
    assert small["w"].rank == 3
    y, out = run(params, x), jax.jit(jc.compressed(run))(small, x)
    np.testing.assert_allclose(out, run(jc.decompress(small), x), atol=1e-4)
    lost = float(jnp.sum((y - out) ** 2))
    # Of a linear map: the outputs of rank 3 that are nearest to those there are.
    if name == "stack":
        rows = [np.asarray(z, np.float64) for z in y]
    else:
        rows = [np.asarray(y, np.float64).reshape(-1, 6)]
    least = sum(np.sum(np.linalg.svd(z, compute_uv=False)[3:] ** 2) for z in rows)
    total = float(jnp.sum(y**2))
    assert lost <= least + (1e-4 + 40 * EPS) * total
    plain = jc.compress(params, {"w": jc.LowRank(3)}, axes=axes)
    assert lost < float(jnp.sum((y - run(jc.decompress(plain), x)) ** 2))


def test_energy_is_of_the_outputs():
    w, gram = (jnp.asarray(x) for x in case(13, 20, 16))
    share = np.cumsum(squares(w, gram)) / squares(w, gram).sum()
    for energy in (0.3, 0.9, 0.99):
        leaf = with_gram(ActivationSVD(energy=energy), w, gram)
        assert leaf.rank == int(np.argmax(share >= energy)) + 1
    plain = jc.LowRank(energy=0.9)(w).rank
    assert with_gram(ActivationSVD(energy=0.9), w, gram).rank < plain


def test_a_grouped_convolution_and_a_vector_are_refused():
    fn = lambda params, x: lax.conv_general_dilated(
        x, params["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=2,
    )  # fmt: skip
    params, x = {"w": normal(0, 3, 2, 8)}, normal(1, 2, 6, 4)
    axes = {"w": KernelAxes((-3, -2), (-1,))}
    stats = jc.observe(fn, params, [x], ("gram", "abs_mean"))
    for spec in (ActivationSVD(2), ASVD(2)):
        with pytest.raises(SpecError, match="grouped convolution"):
            jc.compress(params, {"w": spec}, stats=stats, axes=axes)
    with pytest.raises(SpecError, match="no matrix"):
        ActivationSVD(2)(jnp.ones(8))


def test_fisher_stats_are_squared_gradients_example_by_example():
    params = {"a": normal(0, 2, 3, 5), "b": normal(1, 5), "steps": jnp.zeros((), int)}
    x, y = normal(2, 7, 2, 3), normal(3, 7, 5)

    def loss_fn(params, x, y):
        out = jnp.tanh(jnp.einsum("nhd,hdo->no", x, params["a"]) + params["b"])
        return jnp.mean(jnp.sum((out - y) ** 2, axis=-1))

    axes = {"a": KernelAxes((-3, -2), (-1,))}
    stats = fisher_stats(loss_fn, params, [(x, y)], axes=axes)
    assert list(stats) == ["a"]
    one = lambda w, i: loss_fn({**params, "a": w}, x[i : i + 1], y[i : i + 1])
    by_hand = sum(jax.grad(one)(params["a"], i) ** 2 for i in range(7)) / 7
    found = stats["a"][(-3, -2)].fisher
    np.testing.assert_allclose(found, by_hand.sum(-1).reshape(-1), rtol=1e-5)
    leaf = jc.compress(params, {"a": FisherSVD(2)}, stats=stats, axes=axes)["a"]
    left, right = fisher_svd(params["a"].reshape(6, 5), found, 2)
    np.testing.assert_allclose(leaf.materialize().reshape(6, 5), left @ right, atol=1e-5)


def test_it_chains_saves_and_is_written_in_recipes(tmp_path):
    params, x = {"w": normal(0, 16, 12)}, normal(1, 40, 16)
    stats = jc.observe(lambda p, x: x @ p["w"], params, [x])
    spec = jc.chain(ActivationSVD(4), jc.Quantize("int8"))
    small = jc.compress(params, {"w": spec}, stats=stats)
    assert small["w"].describe() == "rank 4 of int8"
    jc.save(tmp_path / "small.safetensors", small)
    back = jc.load(tmp_path / "small.safetensors")
    np.testing.assert_array_equal(back["w"].materialize(), small["w"].materialize())
    recipe = jc.Recipe.from_yaml("rules: [{match: '**', activation_svd: {energy: 0.9}}]")
    assert recipe.rules[0].spec == ActivationSVD(energy=0.9)
