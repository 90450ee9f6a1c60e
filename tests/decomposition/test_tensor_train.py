"""Tensor trains against tensorly, the bound of Oseledets and planted ranks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly import tt_to_tensor
from tensorly.decomposition import tensor_train as reference

from jaxcompress.decomposition.tensor_train import tensor_train, tensor_train_matrix
from jaxcompress.errors import SpecError, ValuesNeededError

EPS = np.finfo(np.float32).eps
CASES = [
    ((5, 4), (2,)),
    ((4, 1, 5), (1, 1)),
    ((3, 4, 5), (3, 5)),
    ((2, 3, 4, 5), (2, 4, 3)),
    ((2, 3, 2, 1, 3), (2, 4, 2, 2)),
]


def expand(cores):
    return tt_to_tensor([np.asarray(c, np.float64) for c in cores])


def error(x, cores):
    x = np.asarray(x, np.float64)
    return np.linalg.norm(x - expand(cores)) / np.linalg.norm(x)


def noise(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tails(x, ranks):
    x = np.asarray(x, np.float64)
    out = []
    for k, r in enumerate(ranks, 1):
        s = np.linalg.svd(x.reshape(int(np.prod(x.shape[:k])), -1), compute_uv=False)
        out.append(np.sum(s[r:] ** 2) / np.sum(s**2))
    return np.array(out)


@settings(max_examples=12, deadline=None)
@given(case=st.sampled_from(CASES), seed=st.integers(0, 999))
def test_error_lies_between_the_bounds(case, seed):
    shape, ranks = case
    x = noise(shape, seed)
    cores = tensor_train(jnp.asarray(x), ranks)
    edges = (1, *ranks, 1)
    assert [c.shape for c in cores] == list(zip(edges[:-1], shape, edges[1:]))
    left_out, squared = tails(x, ranks), error(x, cores) ** 2
    slack = (50 * EPS) ** 2 + 20 * EPS * np.sum(left_out)
    assert np.max(left_out) - slack <= squared <= np.sum(left_out) + slack
    for c in cores[:-1]:
        q = np.asarray(c).reshape(-1, c.shape[-1])
        np.testing.assert_allclose(q.T @ q, np.eye(q.shape[1]), atol=30 * EPS)


@pytest.mark.parametrize(("shape", "ranks"), CASES[2:])
def test_error_is_tensorlys(shape, ranks):
    x = noise(shape)
    theirs = expand(reference(x.astype(np.float64), [1, *ranks, 1]))
    ours = error(x, tensor_train(jnp.asarray(x), ranks))
    limit = np.linalg.norm(x - theirs) / np.linalg.norm(x)
    assert ours <= limit * (1 + 1e-4) + 50 * EPS


def test_planted_ranks_are_exact_and_found():
    rng = np.random.default_rng(0)
    shapes = [(1, 6, 3), (3, 7, 4), (4, 5, 2), (2, 6, 1)]
    x = expand([rng.normal(size=s) for s in shapes]).astype(np.float32)
    assert error(x, tensor_train(jnp.asarray(x), (3, 4, 2))) < 20 * EPS
    found = tensor_train(jnp.asarray(x), error=1e-5)
    assert [c.shape for c in found] == shapes


@pytest.mark.parametrize("wanted", [0.0, 1e-3, 0.1, 0.5, 0.9])
def test_error_is_kept(wanted):
    x = noise((4, 5, 6, 3)) * np.float32(1e20)
    x = x * (0.5 ** np.arange(6, dtype=np.float32))[:, None]
    cores = tensor_train(jnp.asarray(x), error=wanted)
    assert error(x, cores) <= wanted + 20 * EPS
    if wanted in (0.1, 0.5):
        assert sum(c.size for c in cores) < sum(c.size for c in tensor_train(jnp.asarray(x), 99))


def test_one_rank_is_cut_to_what_is_possible():
    cores = tensor_train(jnp.ones((2, 3, 4)), 99)
    assert [c.shape for c in cores] == [(1, 2, 2), (2, 3, 4), (4, 4, 1)]


def test_matrices():
    w = noise((24, 30))
    cores = tensor_train_matrix(jnp.asarray(w), (2, 3, 4), (5, 3, 2), 99)
    dense = np.einsum("aiob,bjpc,ckqd->ijkopq", *(np.asarray(c) for c in cores))
    np.testing.assert_allclose(dense.reshape(24, 30), w, atol=1e-5)
    (only,) = tensor_train_matrix(jnp.asarray(w), (24,), (30,), 1)
    np.testing.assert_array_equal(only[0, ..., 0], w)
    cores = tensor_train_matrix(jnp.asarray(w), (4, 6), (5, 6), error=0.3)
    dense = np.einsum("aiob,bjpc->ijop", *(np.asarray(c) for c in cores)).reshape(24, 30)
    assert np.linalg.norm(w - dense) <= 0.3 * np.linalg.norm(w)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    x = jnp.asarray(noise((3, 4, 5)), dtype)
    cores = tensor_train(x, 99)
    assert {c.dtype for c in cores} == {jnp.dtype(dtype)}
    # Three cores, each rounded to half an eps.
    assert error(x, cores) < 2 * float(jnp.finfo(dtype).eps)


def test_zeros_empty_and_stacks():
    cores = tensor_train(jnp.zeros((3, 4, 5)), 2)
    assert all(bool(jnp.all(jnp.isfinite(c))) for c in cores)
    np.testing.assert_array_equal(expand(cores), np.zeros((3, 4, 5)))
    assert [c.shape for c in tensor_train(jnp.zeros((3, 0, 5)), 2)][1] == (1, 0, 1)
    assert [c.shape for c in tensor_train(jnp.zeros((3, 4)), error=0.1)] == [(1, 3, 1), (1, 4, 1)]
    assert [c.shape for c in tensor_train(jnp.zeros((3, 0)), error=0.1)] == [(1, 3, 1), (1, 0, 1)]
    x = jnp.asarray(noise((2, 3, 4, 5)))
    stacked = jax.vmap(lambda x: tensor_train(x, (3, 4)))(x)
    for i in range(2):
        alone = expand(tensor_train(x[i], (3, 4)))
        np.testing.assert_allclose(expand([c[i] for c in stacked]), alone, atol=1e-5)


def test_bad_input_is_refused():
    x = jnp.ones((3, 4, 5))
    for call in (
        lambda: tensor_train(x),
        lambda: tensor_train(x, 2, error=0.1),
        lambda: tensor_train(x, (4, 1)),
        lambda: tensor_train(x, (1, 5)),
        lambda: tensor_train(x, (2, 2, 2)),
        lambda: tensor_train(x, error=1.0),
        lambda: tensor_train(jnp.ones(3), 1),
        lambda: tensor_train_matrix(jnp.ones((4, 6)), (2, 2), (6,), 1),
        lambda: tensor_train_matrix(jnp.ones((4, 6)), (2, 3), (2, 3), 1),
    ):
        with pytest.raises(SpecError, match="write"):
            call()
    with pytest.raises(ValuesNeededError, match="jit"):
        jax.jit(functools.partial(tensor_train, error=0.1))(x)
