"""CP against planted terms, tensorly from the same start, and the SVD."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly import cp_to_tensor
from tensorly.cp_tensor import CPTensor
from tensorly.decomposition import parafac

from jaxcompress.decomposition.cp import _initial, cp
from jaxcompress.errors import SpecError

EPS = np.finfo(np.float32).eps
LETTERS = "abcde"


def expand(factors):
    terms = ",".join(f"{c}r" for c in LETTERS[: len(factors)])
    out = LETTERS[: len(factors)]
    return np.einsum(f"{terms}->{out}", *(np.asarray(f, np.float64) for f in factors))


def error(x, factors):
    x = np.asarray(x, np.float64)
    return np.linalg.norm(x - expand(factors)) / np.linalg.norm(x)


def planted(shape, rank, seed=0, noise=0.0):
    rng = np.random.default_rng(seed)
    x = expand([rng.normal(size=(n, rank)) for n in shape])
    e = rng.normal(size=shape)
    return (x + noise * np.linalg.norm(x) / np.linalg.norm(e) * e).astype(np.float32)


@pytest.mark.parametrize(
    ("shape", "rank"), [((7, 9), 4), ((6, 7, 8), 3), ((3, 4, 12, 10), 5), ((2, 3, 4, 3, 5), 2)]
)
def test_planted_terms_are_found(shape, rank):
    x = planted(shape, rank)
    factors = cp(jnp.asarray(x), rank, iterations=400, tolerance=0.0)
    assert [f.shape for f in factors] == [(n, rank) for n in shape]
    # Sweeps converge linearly down to the rounding of a few hundred float32 sums.
    assert error(x, factors) < 1000 * EPS


def test_two_axes_reach_the_best_rank():
    x = np.random.default_rng(1).normal(size=(12, 9)).astype(np.float32)
    s = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    best = np.sqrt(np.sum(s[4:] ** 2) / np.sum(s**2))
    got = error(x, cp(jnp.asarray(x), 4, iterations=300, tolerance=0.0))
    assert best * (1 - 1e-6) <= got <= best * (1 + 1e-5)


@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_no_worse_than_tensorly_from_the_same_start(noise):
    for seed in range(3):
        x = planted((3, 4, 14, 12), 10, seed, noise)
        start = _initial(jnp.asarray(x), 6, "svd", jax.random.key(seed))
        start = CPTensor((np.ones(6), [np.asarray(f, np.float64) for f in start]))
        reference = parafac(x.astype(np.float64), 6, n_iter_max=20, tol=0, init=start)
        ours = cp(jnp.asarray(x), 6, iterations=20, tolerance=0.0, key=jax.random.key(seed))
        theirs = x - cp_to_tensor(reference)
        # Both in a swamp of slow progress: the paths part, the errors do not.
        assert error(x, ours) <= np.linalg.norm(theirs) / np.linalg.norm(x) * (1 + 1e-2)


def test_sweeps_never_raise_the_error():
    x = planted((5, 6, 7), 8, noise=0.5)
    errors = [error(x, cp(jnp.asarray(x), 4, iterations=i, tolerance=0.0)) for i in range(1, 12)]
    assert np.all(np.diff(errors) <= 20 * EPS)


def test_tolerance_ends_the_sweeps():
    x = jnp.asarray(planted((5, 6, 7), 2))
    a = cp(x, 2, iterations=500, tolerance=1e-3)
    b = cp(x, 2, iterations=500, tolerance=1e-9)
    assert error(x, b) <= error(x, a) < 1e-2


def test_lengths_are_spread_evenly():
    factors = cp(jnp.asarray(planted((4, 5, 6), 3)), 3)
    lengths = np.stack([np.linalg.norm(f, axis=0) for f in factors])
    np.testing.assert_allclose(lengths, np.broadcast_to(lengths[:1], lengths.shape), rtol=1e-4)


@settings(max_examples=12, deadline=None)
@given(
    case=st.sampled_from([((1, 3), 2), ((4, 1, 3), 5), ((2, 3, 2, 1), 1), ((2, 1, 3, 2, 2), 3)]),
    init=st.sampled_from(["svd", "random"]),
    seed=st.integers(0, 999),
)
def test_any_shape_and_rank(case, init, seed):
    shape, rank = case
    x = planted(shape, 2, seed, noise=0.3)
    factors = cp(jnp.asarray(x), rank, init=init, iterations=3)
    assert [f.shape for f in factors] == [(n, rank) for n in shape]
    # The best multiple of any start beats zero, and sweeps only lower that.
    assert error(x, factors) <= 1 + 20 * EPS


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    x = jnp.asarray(planted((5, 6, 7), 2), dtype)
    factors = cp(x, 2, iterations=200)
    assert all(f.dtype == dtype for f in factors)
    # Three factors and x itself, each rounded to half an eps.
    assert error(x, factors) < 3 * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_changes_nothing(scale):
    x = planted((5, 6, 7), 2)
    factors = cp(jnp.asarray(x * np.float32(scale)), 2, iterations=200)
    assert error(x * scale, factors) < 1e-3


def test_zeros_empty_and_stacks():
    zero = cp(jnp.zeros((3, 4, 5)), 2)
    assert all(bool(jnp.all(jnp.isfinite(f))) for f in zero)
    np.testing.assert_array_equal(expand(zero), np.zeros((3, 4, 5)))
    assert [f.shape for f in cp(jnp.zeros((3, 0, 5)), 2)] == [(3, 2), (0, 2), (5, 2)]
    x = jnp.stack([jnp.asarray(planted((4, 5, 6), 2, seed)) for seed in range(2)])
    stacked = jax.vmap(lambda x: cp(x, 2))(x)
    for i in range(2):
        alone = cp(x[i], 2)
        np.testing.assert_allclose(expand([f[i] for f in stacked]), expand(alone), atol=1e-3)


def test_bad_input_is_refused():
    x = jnp.ones((2, 3))
    for call in (
        lambda: cp(x, 0),
        lambda: cp(x, 1, init="hosvd"),
        lambda: cp(jnp.ones(3), 1),
        lambda: cp(jnp.ones((2, 3), jnp.int32), 1),
    ):
        with pytest.raises(SpecError, match=r"write|cast"):
            call()
