"""Truncated decompositions against numpy's SVD in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.decomposition.svd import squared_singular_values, truncated_svd

EPS = np.finfo(np.float32).eps
RNG = np.random.default_rng(0)


def spectrum(m, n, singular, rng=RNG):
    """A matrix of given singular values and random directions."""
    k = min(m, n)
    u = np.linalg.qr(rng.normal(size=(m, k)))[0]
    v = np.linalg.qr(rng.normal(size=(n, k)))[0]
    return ((u * singular) @ v.T).astype(np.float32)


SHAPES = {"square": (48, 48), "tall": (96, 32), "wide": (24, 80), "row": (1, 40), "column": (40, 1)}
SPECTRA = {
    "random": lambda k: np.sqrt(1.03 + np.arange(k)[::-1]),
    "graded": lambda k: 10.0 ** -np.linspace(0, 12, k),
    "low_rank": lambda k: np.where(np.arange(k) < 5, 3.0 - 0.1 * np.arange(k), 0.0),
    "flat": lambda k: np.ones(k),
    "one_large": lambda k: np.where(np.arange(k) == 0, 1e4, 1.0),
}


def errors(w, left, right, rank):
    """The squared error in float64 and the least possible one, over the squared norm."""
    w, left, right = (np.asarray(x, np.float64) for x in (w, left, right))
    s = np.linalg.svd(w, compute_uv=False)
    norm = np.sum(s**2)
    return np.sum((w - left @ right) ** 2) / norm, np.sum(s[rank:] ** 2) / norm


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.thin(8)
def test_error_is_the_least_possible_up_to_rounding(shape, kind):
    m, n = SHAPES[shape]
    k = min(m, n)
    w = spectrum(m, n, SPECTRA[kind](k))
    for rank in sorted({1, max(1, k // 4), max(1, k - 1), k}):
        left, right = truncated_svd(jnp.asarray(w), rank)
        assert left.shape == (m, rank)
        assert right.shape == (rank, n)
        error, least = errors(w, left, right, rank)
        # Rounding enters linearly where the optimum does not vanish and squared where it does.
        assert error <= least * (1 + 1e-4) + 16 * EPS * least**0.5 + (40 * EPS) ** 2


@pytest.mark.parametrize("scale", [1e-36, 1e-8, 1e30, 1e36])
def test_scale_changes_nothing(scale):
    w = spectrum(40, 30, SPECTRA["random"](30)) * np.float32(scale)
    left, right = truncated_svd(jnp.asarray(w), 8)
    # Subnormal products are flushed to zero, and numpy must not overflow: both in units of w.
    left, right = (np.asarray(x, np.float64) / np.sqrt(scale) for x in (left, right))
    error, least = errors(np.asarray(w, np.float64) / scale, left, right, 8)
    assert error <= least * (1 + 1e-4)
    assert jc.LowRank(energy=0.87)(jnp.asarray(w)).rank == energy_rank(w, 0.87)


def test_factors_are_balanced_and_orthogonal():
    w = spectrum(60, 40, SPECTRA["random"](40))
    left, right = (np.asarray(x, np.float64) for x in truncated_svd(jnp.asarray(w), 10))
    s = np.linalg.svd(w.astype(np.float64), compute_uv=False)[:10]
    np.testing.assert_allclose(left.T @ left, np.diag(s), atol=1e-3 * s[0])
    np.testing.assert_allclose(right @ right.T, np.diag(s), atol=1e-3 * s[0])


def test_a_zero_matrix_gives_finite_factors():
    left, right = truncated_svd(jnp.zeros((6, 4)), 3)
    assert bool(jnp.all(jnp.isfinite(left)) and jnp.all(jnp.isfinite(right)))
    np.testing.assert_array_equal(left @ right, np.zeros((6, 4)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(dtype):
    w = jnp.asarray(spectrum(64, 48, SPECTRA["low_rank"](48)), dtype)
    left, right = truncated_svd(w, 5)
    assert left.dtype == right.dtype == dtype
    error, least = errors(w, left, right, 5)
    assert error <= least + 4 * float(jnp.finfo(dtype).eps) ** 2


def test_a_stack_equals_its_matrices():
    w = jnp.asarray(np.stack([spectrum(20, 12, SPECTRA[k](12)) for k in ("random", "low_rank")]))
    left, right = truncated_svd(w, 4)
    for i in range(2):
        a, b = truncated_svd(w[i], 4)
        np.testing.assert_allclose(left[i] @ right[i], a @ b, atol=1e-5)


def test_squared_singular_values_are_numpys():
    for shape in ((30, 20), (20, 30), (3, 8, 8)):
        w = RNG.normal(size=shape).astype(np.float32)
        expected = np.linalg.svd(w.astype(np.float64), compute_uv=False) ** 2
        out = squared_singular_values(jnp.asarray(w))
        np.testing.assert_allclose(out, expected, atol=20 * EPS * expected.max())


def energy_rank(w, energy):
    s = np.linalg.svd(np.asarray(w, np.float64) / np.abs(w).max(), compute_uv=False)
    share = np.cumsum(s**2)
    return int(np.argmax(share >= energy * share[-1])) + 1


@pytest.mark.parametrize("energy", [0.01, 0.53, 0.987])
@pytest.mark.parametrize("kind", ["random", "graded", "one_large"])
@pytest.mark.parametrize("shape", ["square", "tall", "wide"])
@pytest.mark.thin(8)
def test_rank_by_energy_is_numpys(shape, kind, energy):
    m, n = SHAPES[shape]
    w = spectrum(m, n, SPECTRA[kind](min(m, n)))
    assert jc.LowRank(energy=energy)(jnp.asarray(w)).rank == energy_rank(w, energy)


def test_rank_by_energy_of_a_stack_serves_every_matrix():
    w = np.stack([spectrum(30, 20, SPECTRA[k](20)) for k in ("one_large", "random")])
    w[0] *= 1e6  # the share is of each matrix, not of the stack
    expected = max(energy_rank(x, 0.87) for x in w)
    assert jc.LowRank(energy=0.87)(jnp.asarray(w)).rank == expected


def test_rank_by_energy_of_zeros_is_one():
    assert jc.LowRank(energy=1.0)(jnp.zeros((4, 3))).rank == 1


@pytest.mark.parametrize(
    ("path", "shape", "left", "right"),
    [
        ("kernel", (8, 6), (8, 3), (3, 6)),
        ("embedding", (8, 6), (8, 3), (3, 6)),
        ("conv/kernel", (3, 3, 4, 6), (3, 3, 4, 3), (3, 6)),
        ("query/kernel", (8, 2, 5), (8, 3), (3, 2, 5)),
        ("out/kernel", (2, 5, 8), (2, 5, 3), (3, 8)),
        ("stack/kernel", (7, 8, 6), (7, 8, 3), (7, 3, 6)),
    ],
)
def test_factors_of_kernels_with_several_axes(path, shape, left, right):
    w = jax.random.normal(jax.random.key(1), shape)
    tree = jax.tree.map(lambda x: x, {path: w})
    leaf = jc.compress(tree, {"**": jc.LowRank(3)})[path]
    assert (leaf.left.shape, leaf.right.shape, leaf.shape) == (left, right, shape)
    batch = 1 if path.startswith("stack") else 0
    rows = int(np.prod(left[batch:-1]))
    matrix = np.asarray(w, np.float64).reshape(*shape[:batch], rows, -1)
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    best = (u[..., :3] * s[..., None, :3]) @ v[..., :3, :]
    np.testing.assert_allclose(leaf.materialize(), best.reshape(shape), atol=2e-5)
