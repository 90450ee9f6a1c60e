"""A matrix as a sum of Kronecker products."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcompress.decomposition.modes import check_array, check_rank
from jaxcompress.decomposition.svd import truncated_svd
from jaxcompress.errors import SpecError


def kronecker(w: jax.Array, block: tuple[int, int], terms: int = 1) -> tuple[jax.Array, jax.Array]:
    """The nearest sum of Kronecker products: `w ~ sum_t left[t] (x) right[t]`.

    `w[(i1, i2), (j1, j2)] = sum_t left[t, i1, j1] right[t, i2, j2]` is a matrix of rank `terms` in
    the axes `(i1, j1)` and `(i2, j2)`, so its truncated SVD is the optimum. The squared
    error is the sum of the squares of the singular values left out.

    Args:
      w: `[m, n]` of floats; `vmap` for a stack.
      block: `(m2, n2)`, the shape of the right factors; they divide `(m, n)`.
      terms: the number of products, at most `min(m1 n1, m2 n2)`.

    Returns:
      `left` `[terms, m / m2, n / n2]` and `right` `[terms, m2, n2]` in the dtype of w, of the same
      norm in each term.

    Raises:
      SpecError: for an integer array, a block that does not divide w, or too many terms.

    References:
      Van Loan and Pitsianis, *Approximation with Kronecker Products*, 1993.

    Examples:
      >>> import jax.numpy as jnp
      >>> w = jnp.kron(jnp.arange(6.0).reshape(2, 3), jnp.ones((4, 2)))
      >>> left, right = kronecker(w, (4, 2))
      >>> left.shape, right.shape, bool(jnp.allclose(jnp.kron(left[0], right[0]), w, atol=1e-5))
      ((1, 2, 3), (1, 4, 2), True)
    """
    check_array(w, "kronecker")
    terms = check_rank(terms, "kronecker")
    sizes = tuple(check_rank(b, "kronecker: block") for b in block)
    if w.ndim != 2 or len(sizes) != 2 or w.shape[0] % sizes[0] or w.shape[1] % sizes[1]:
        raise SpecError(
            f"kronecker: block {tuple(block)} does not divide shape {w.shape}; write two divisors"
        )
    m2, n2 = sizes
    m1, n1 = w.shape[0] // m2, w.shape[1] // n2
    most = min(m1 * n1, m2 * n2)
    if w.size and terms > most:
        raise SpecError(
            f"kronecker: {terms} terms of blocks {m1} x {n1} and {m2} x {n2}; write at most {most}"
        )
    x = w.reshape(m1, m2, n1, n2).transpose(0, 2, 1, 3).reshape(m1 * n1, m2 * n2)
    if not w.size:
        return jnp.zeros((terms, m1, n1), w.dtype), jnp.zeros((terms, m2, n2), w.dtype)
    left, right = truncated_svd(x, terms)
    return left.T.reshape(terms, m1, n1), right.reshape(terms, m2, n2)
