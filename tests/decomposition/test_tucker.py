"""Tucker decompositions against tensorly, the bound of the HOSVD and planted ranks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly import tucker_to_tensor
from tensorly.decomposition import partial_tucker
from tensorly.tenalg import multi_mode_dot

from jaxcompress.decomposition.tucker import hosvd, tucker, tucker2
from jaxcompress.errors import SpecError

EPS = np.finfo(np.float32).eps


CASES = [
    ((5,), (1,)),
    ((5, 3), (2, 2)),
    ((4, 1, 5), (4, 1, 2)),
    ((2, 3, 4, 5), (1, 3, 2, 4)),
    ((2, 3, 2, 1, 3), (2, 1, 2, 1, 3)),
]


def expand(core, factors, modes=None):
    core = np.asarray(core, np.float64)
    return multi_mode_dot(core, [np.asarray(f, np.float64) for f in factors], modes)


def error(x, core, factors, modes=None):
    x = np.asarray(x, np.float64)
    return np.linalg.norm(x - expand(core, factors, modes)) / np.linalg.norm(x)


def noise(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def planted(shape, ranks, seed=0):
    rng = np.random.default_rng(seed)
    core = rng.normal(size=ranks)
    return tucker_to_tensor((core, [rng.normal(size=(n, r)) for n, r in zip(shape, ranks)])).astype(
        np.float32
    )


def tails(x, ranks, modes):
    """The relative squared norm that each unfolding's cut leaves out."""
    x = np.asarray(x, np.float64)
    out = []
    for r, mode in zip(ranks, modes):
        s = np.linalg.svd(np.moveaxis(x, mode, 0).reshape(x.shape[mode], -1), compute_uv=False)
        out.append(np.sum(s[r:] ** 2) / np.sum(s**2))
    return np.array(out)


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_error_lies_between_the_bounds(data):
    shape, ranks = data.draw(st.sampled_from(CASES))
    x = noise(shape, data.draw(st.integers(0, 999)))
    core, factors = hosvd(jnp.asarray(x), ranks)
    assert core.shape == tuple(ranks)
    left_out = tails(x, ranks, range(len(shape)))
    squared = error(x, core, factors) ** 2
    slack = (50 * EPS) ** 2 + 20 * EPS * np.sum(left_out)
    assert np.max(left_out) - slack <= squared <= np.sum(left_out) + slack
    for f, r in zip(factors, ranks):
        np.testing.assert_allclose(np.asarray(f).T @ np.asarray(f), np.eye(r), atol=30 * EPS)


@pytest.mark.parametrize(
    ("shape", "ranks"), [((9, 8, 7), (3, 2, 4)), ((3, 4, 12, 10), (2, 3, 5, 4))]
)
def test_planted_ranks_are_exact(shape, ranks):
    x = planted(shape, ranks)
    for core, factors in (hosvd(jnp.asarray(x), ranks), tucker(jnp.asarray(x), ranks)):
        assert error(x, core, factors) < 20 * EPS
    # One less in a mode leaves out what that unfolding's last singular value says, at least.
    less = (ranks[0] - 1, *ranks[1:])
    core, factors = tucker(jnp.asarray(x), less)
    assert error(x, core, factors) ** 2 >= tails(x, less, range(len(shape)))[0] * (1 - 1e-5)


@pytest.mark.parametrize("modes", [(0, 1, 2), (1, 3)])
def test_no_worse_than_tensorly(modes):
    x = noise((3, 6, 20, 18)) + planted((3, 6, 20, 18), (2, 3, 5, 5))
    ranks = [max(2, x.shape[m] // 3) for m in modes]
    ours = tucker(jnp.asarray(x), ranks, modes, iterations=30, tolerance=0.0)
    (core, factors), _ = partial_tucker(
        x.astype(np.float64), ranks, modes=list(modes), n_iter_max=30, tol=0, init="svd"
    )
    assert error(x, *ours, modes) <= error(x, core, factors, modes) * (1 + 1e-4)
    start = hosvd(jnp.asarray(x), ranks, modes)
    assert error(x, *ours, modes) <= error(x, *start, modes) * (1 + 4 * EPS)


def test_full_ranks_are_exact():
    x = noise((4, 5, 6))
    assert error(x, *tucker(jnp.asarray(x), (4, 5, 6))) < 20 * EPS


def test_energy_of_the_core_tells_the_error():
    x = noise((6, 7, 8))
    core, factors = tucker(jnp.asarray(x), (3, 4, 2))
    left = 1 - np.sum(np.asarray(core, np.float64) ** 2) / np.sum(x.astype(np.float64) ** 2)
    np.testing.assert_allclose(error(x, core, factors) ** 2, left, rtol=1e-5)


def test_tucker2_is_tucker_of_the_last_two_axes():
    x = jnp.asarray(noise((3, 2, 9, 8)))
    core, (a, b) = tucker2(x, (4, 5))
    assert (core.shape, a.shape, b.shape) == ((3, 2, 4, 5), (9, 4), (8, 5))
    dense = jnp.einsum("xyij,ai,bj->xyab", core, a, b)
    np.testing.assert_allclose(dense, expand(*tucker(x, (4, 5), (2, 3)), (2, 3)), atol=1e-5)
    matrix = jnp.asarray(noise((9, 8)))
    s = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    core, (a, b) = tucker2(matrix, (4, 4))
    np.testing.assert_allclose(
        np.linalg.norm(matrix - a @ core @ b.T), np.sqrt(np.sum(s[4:] ** 2)), rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    x = jnp.asarray(planted((7, 8, 9), (2, 3, 2)), dtype)
    core, factors = tucker(x, (2, 3, 2))
    assert {core.dtype, *(f.dtype for f in factors)} == {jnp.dtype(dtype)}
    # x, the core and three factors, each rounded to half an eps.
    assert error(x, core, factors) < 3 * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_changes_nothing(scale):
    x = planted((7, 8, 9), (2, 3, 2))
    core, factors = tucker(jnp.asarray(x * np.float32(scale)), (2, 3, 2))
    assert error(x, np.asarray(core, np.float64) / scale, factors) < 50 * EPS


def test_zeros_empty_and_stacks():
    core, factors = tucker(jnp.zeros((3, 4, 5)), (2, 2, 2))
    assert all(bool(jnp.all(jnp.isfinite(f))) for f in factors)
    np.testing.assert_array_equal(core, np.zeros((2, 2, 2)))
    core, (f,) = hosvd(jnp.zeros((3, 0, 5)), 2, (0,))
    assert (core.shape, f.shape) == ((2, 0, 5), (3, 2))
    x = jnp.asarray(noise((2, 5, 6, 7)))
    cores, factors = jax.vmap(lambda x: tucker(x, (2, 3, 2)))(x)
    for i in range(2):
        alone = tucker(x[i], (2, 3, 2))
        stacked = expand(cores[i], [f[i] for f in factors])
        np.testing.assert_allclose(stacked, expand(*alone), atol=2e-2)
        np.testing.assert_allclose(
            np.linalg.norm(x[i] - stacked), np.linalg.norm(x[i] - expand(*alone)), rtol=1e-4
        )


def test_bad_input_is_refused():
    x = jnp.ones((3, 4, 5))
    for call in (
        lambda: tucker(x, (4, 1, 1)),
        lambda: tucker(x, (1, 1)),
        lambda: tucker(x, (1, 1), (0, 0)),
        lambda: tucker(x, 1, (3,)),
        lambda: tucker(x, 0),
        lambda: tucker2(jnp.ones(3), (1, 1)),
        lambda: tucker(x.astype(int), 1),
    ):
        with pytest.raises(SpecError, match=r"write|cast"):
            call()
