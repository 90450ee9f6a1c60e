"""Kronecker and Monarch projections against brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.decomposition.kronecker import kronecker
from jaxcompress.decomposition.monarch import monarch
from jaxcompress.errors import SpecError

EPS = np.finfo(np.float32).eps


def noise(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def kron_sum(left, right):
    return sum(np.kron(a, b) for a, b in zip(np.asarray(left), np.asarray(right)))


def expand(first, second):
    out = np.einsum("kijr,jkrl->kijl", np.asarray(first), np.asarray(second))
    return out.reshape(out.shape[0] * out.shape[1], -1)


def alternating(w, subscripts, shapes, seed, sweeps=150):
    """The squared error of alternating least squares on dense design matrices, in float64."""
    rng = np.random.default_rng(seed)
    a, b = (rng.normal(size=s) for s in shapes)
    basis = [np.eye(x.size).reshape(x.size, *x.shape) for x in (a, b)]
    one, two, out = subscripts
    for _ in range(sweeps):
        design = np.einsum(f"z{one},{two}->z{out}", basis[0], b).reshape(a.size, -1)
        a = np.linalg.lstsq(design.T, w.ravel(), rcond=None)[0].reshape(a.shape)
        design = np.einsum(f"{one},z{two}->z{out}", a, basis[1]).reshape(b.size, -1)
        b = np.linalg.lstsq(design.T, w.ravel(), rcond=None)[0].reshape(b.shape)
    return np.sum((np.einsum(f"{one},{two}->{out}", a, b).ravel() - w.ravel()) ** 2)


@pytest.mark.parametrize("terms", [1, 2])
def test_no_other_kronecker_products_are_nearer(terms):
    w = noise((6, 8))
    left, right = kronecker(jnp.asarray(w), (3, 2), terms)
    assert (left.shape, right.shape) == ((terms, 2, 4), (terms, 3, 2))
    ours = np.sum((kron_sum(left, right) - w) ** 2)
    shapes = [(terms, 2, 4), (terms, 3, 2)]
    x = w.astype(np.float64)
    others = [alternating(x, ("tij", "tkl", "ikjl"), shapes, seed) for seed in range(6)]
    assert ours <= min(others) * (1 + 1e-5)
    # From some start the alternation finds the optimum, so it is a fair witness.
    assert min(others) <= ours * (1 + 1e-3)


def test_error_is_what_the_rearranged_svd_leaves_out():
    w = noise((8, 6))
    x = w.astype(np.float64).reshape(2, 4, 3, 2).transpose(0, 2, 1, 3).reshape(6, 8)
    s = np.linalg.svd(x, compute_uv=False)
    for terms in range(1, 7):
        left, right = kronecker(jnp.asarray(w), (4, 2), terms)
        squared = np.sum((kron_sum(left, right).astype(np.float64) - w) ** 2)
        np.testing.assert_allclose(squared, np.sum(s[terms:] ** 2), rtol=1e-4, atol=1e-8)
        norms = [np.sqrt(np.sum(np.asarray(f) ** 2, (1, 2))) for f in (left, right)]
        np.testing.assert_allclose(*norms, rtol=1e-4)


def test_planted_products_are_found():
    w = sum(np.kron(noise((3, 2), i), noise((2, 5), i + 9)) for i in range(3)).astype(np.float32)
    np.testing.assert_allclose(kron_sum(*kronecker(jnp.asarray(w), (2, 5), 3)), w, atol=1e-5)


def test_no_other_monarch_matrix_is_nearer():
    w = noise((6, 8))
    first, second = monarch(jnp.asarray(w), (3, 2))
    ours = np.sum((expand(first, second) - w) ** 2)
    x = w.astype(np.float64).reshape(3, 2, 2, 4)
    shapes = [(3, 2, 2, 1), (2, 3, 1, 4)]
    others = [alternating(x, ("kijr", "jkrl", "kijl"), shapes, seed) for seed in range(4)]
    assert ours <= min(others) * (1 + 1e-5)
    assert min(others) <= ours * (1 + 1e-3)


def test_monarch_factors_are_two_block_diagonal_ones():
    rng = np.random.default_rng(0)
    b1, p, b2, r, q = 3, 4, 2, 2, 5
    one, two = rng.normal(size=(b1, p, b2 * r)), rng.normal(size=(b2, b1 * r, q))
    permutation = np.arange(b1 * b2 * r).reshape(b1, b2, r).transpose(1, 0, 2).ravel()
    blocks = [np.zeros((b1 * p, b1 * b2 * r)), np.zeros((b2 * b1 * r, b2 * q))]
    for dense, parts in zip(blocks, (one, two)):
        for i, part in enumerate(parts):
            m, n = part.shape
            dense[i * m : (i + 1) * m, i * n : (i + 1) * n] = part
    w = (blocks[0][:, permutation] @ blocks[1]).astype(np.float32)
    first, second = monarch(jnp.asarray(w), (b1, b2), r)
    assert (first.shape, second.shape) == ((b1, p, b2, r), (b2, b1, r, q))
    np.testing.assert_allclose(expand(first, second), w, atol=1e-4)
    assert np.linalg.norm(expand(*monarch(jnp.asarray(w), (b1, b2))) - w) > 0.1


@pytest.mark.parametrize("method", [lambda w: kronecker(w, (2, 3)), lambda w: monarch(w, (2, 3))])
def test_dtypes_stacks_zeros_and_empty(method):
    w = jnp.asarray(noise((2, 4, 6)))
    stacked = jax.vmap(method)(w)
    for i in range(2):
        for a, b in zip(stacked, method(w[i])):
            np.testing.assert_allclose(a[i], b, atol=1e-5)
    assert {f.dtype for f in method(w[0].astype(jnp.bfloat16))} == {jnp.dtype(jnp.bfloat16)}
    assert all(bool(jnp.all(jnp.isfinite(f))) for f in method(jnp.zeros((4, 6))))
    assert all(f.size == 0 or not jnp.any(f) for f in method(jnp.zeros((0, 6))))


def test_bad_input_is_refused():
    w = jnp.ones((4, 6))
    for call in (
        lambda: kronecker(w, (3, 2)),
        lambda: kronecker(w, (2, 2), 5),
        lambda: kronecker(w, (2, 2), 0),
        lambda: kronecker(w.astype(int), (2, 2)),
        lambda: kronecker(w[None], (2, 2)),
        lambda: monarch(w, 4),
        lambda: monarch(w, 2, rank=3),
        lambda: monarch(w, (2, 3, 1)),
    ):
        with pytest.raises(SpecError, match=r"write|cast"):
            call()
