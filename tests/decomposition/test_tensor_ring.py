"""Tensor rings and block terms against tensorly, planted terms and the SVD."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorly import tr_to_tensor
from tensorly.decomposition import tensor_ring as reference

from jaxcompress.decomposition.block_term import block_term
from jaxcompress.decomposition.tensor_ring import tensor_ring
from jaxcompress.decomposition.tucker import tucker
from jaxcompress.errors import SpecError

EPS = np.finfo(np.float32).eps


def ring(cores):
    return tr_to_tensor([np.asarray(c, np.float64) for c in cores])


def terms_of(core, factors):
    core, (a, b, c) = np.asarray(core, np.float64), (np.asarray(f, np.float64) for f in factors)
    return np.einsum("tabc,tia,tjb,tkc->ijk", core, a, b, c)


def error(x, y):
    x = np.asarray(x, np.float64)
    return np.linalg.norm(x - y) / np.linalg.norm(x)


def noise(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_ring_is_no_worse_than_tensorlys():
    x = noise((6, 4, 5, 3))
    theirs = error(x, tr_to_tensor(reference(x.astype(np.float64), [2, 3, 4, 2, 2])))
    # TR-SVD alone; the next cuts do not depend on how the first basis is rotated or signed.
    # Which of its columns close the ring does, so that ours may differ either way a little.
    assert error(x, ring(tensor_ring(jnp.asarray(x), (2, 3, 4, 2), iterations=0))) <= theirs * 1.02
    cores = tensor_ring(jnp.asarray(x), (2, 3, 4, 2))
    assert [c.shape for c in cores] == [(2, 6, 3), (3, 4, 4), (4, 5, 2), (2, 3, 2)]
    assert error(x, ring(cores)) <= theirs * (1 + 1e-4)
    norms = [np.linalg.norm(c) for c in cores]
    np.testing.assert_allclose(norms, norms[0], rtol=1e-4)
    steps = [
        error(x, ring(tensor_ring(jnp.asarray(x), (2, 3, 4, 2), iterations=i, tolerance=0.0)))
        for i in range(6)
    ]
    assert np.all(np.diff(steps) <= 20 * EPS)


def test_planted_ring_is_found():
    rng = np.random.default_rng(3)
    x = ring([rng.normal(size=(2, n, 2)) for n in (7, 6, 5)]).astype(np.float32)
    found = ring(tensor_ring(jnp.asarray(x), 2, iterations=1000, tolerance=0.0))
    # Linear convergence, slow at its end; no ring of these ranks but the planted one is near.
    assert error(x, found) < 1e-2


def test_ranks_beyond_the_unfoldings():
    x = noise((2, 3, 2))
    cores = tensor_ring(jnp.asarray(x), 4, iterations=100)
    assert [c.shape for c in cores] == [(4, 2, 4), (4, 3, 4), (4, 2, 4)]
    assert error(x, ring(cores)) < 1e-3


def test_block_terms_of_one_term_are_tucker():
    x = noise((6, 7, 8))
    one = error(x, terms_of(*block_term(jnp.asarray(x), 1, (2, 3, 2), iterations=200)))
    core, factors = tucker(jnp.asarray(x), (2, 3, 2), iterations=200)
    assert one <= error(x, terms_of(core[None], [f[None] for f in factors])) * (1 + 1e-3)


def test_block_terms_lower_the_error_with_sweeps_and_terms():
    x = jnp.asarray(noise((6, 7, 8)))
    steps = [
        error(x, terms_of(*block_term(x, 2, (2, 3, 2), iterations=i, tolerance=0.0)))
        for i in range(6)
    ]
    assert np.all(np.diff(steps) <= 20 * EPS)
    assert error(x, terms_of(*block_term(x, 3, (2, 3, 2)))) < steps[-1] < steps[0]


def test_planted_block_terms_are_found():
    rng = np.random.default_rng(1)
    core = rng.normal(size=(2, 2, 2, 2))
    factors = [rng.normal(size=(2, n, 2)) for n in (8, 9, 7)]
    x = terms_of(core, factors).astype(np.float32)
    core, factors = block_term(jnp.asarray(x), 2, 2, iterations=500, tolerance=0.0)
    assert error(x, terms_of(core, factors)) < 1e-2
    for f in factors:
        gram = np.einsum("tia,tib->tab", np.asarray(f), np.asarray(f))
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(2), gram.shape), atol=30 * EPS)


@pytest.mark.parametrize("method", ["ring", "terms"])
def test_dtypes_zeros_empty_and_stacks(method):
    def solve(x):
        if method == "ring":
            return tensor_ring(x, 2, iterations=3)
        core, factors = block_term(x, 2, 2, (1, 2), iterations=3)
        return (core, *factors)

    assert all(bool(jnp.all(jnp.isfinite(f))) for f in solve(jnp.zeros((3, 4, 5))))
    assert any(f.size == 0 or not jnp.any(f) for f in solve(jnp.zeros((0, 4, 5))))
    x = jnp.asarray(noise((2, 3, 4, 5)))
    assert {f.dtype for f in solve(x[0].astype(jnp.bfloat16))} == {jnp.dtype(jnp.bfloat16)}
    stacked = jax.vmap(solve)(x)
    for i in range(2):
        for a, b in zip(stacked, solve(x[i])):
            np.testing.assert_allclose(np.linalg.norm(a[i]), np.linalg.norm(b), rtol=1e-2)


def test_bad_input_is_refused():
    x = jnp.ones((3, 4, 5))
    for call in (
        lambda: tensor_ring(x, (1, 2)),
        lambda: tensor_ring(x, 0),
        lambda: tensor_ring(jnp.ones(3), 1),
        lambda: block_term(x, 0, 1),
        lambda: block_term(x, 2, (4, 1, 1)),
        lambda: block_term(x, 2, 1, (0, 0)),
    ):
        with pytest.raises(SpecError, match="write"):
            call()
