"""Monarch matrices: two block-diagonal ones with a permutation between."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcompress.decomposition.modes import check_array, check_rank, check_ranks
from jaxcompress.decomposition.svd import truncated_svd
from jaxcompress.errors import SpecError


def monarch(
    w: jax.Array, blocks: int | tuple[int, int], rank: int = 1
) -> tuple[jax.Array, jax.Array]:
    """The nearest Monarch matrix: `w[(k, i), (j, l)] ~ sum_r first[k, i, j, r] second[j, k, r, l]`.

    The inputs are read as b1 blocks, each goes through its own matrix to b2 groups of r values, the
    groups are gathered over the blocks, and each goes through its own matrix to its part of the
    outputs. For each k and j the matrix `[i, l]` is then any of rank r, independent of all
    others, so its truncated SVD is the exact projection.

    Args:
      w: `[in, out]` of floats; `vmap` for a stack.
      blocks: `(b1, b2)`, divisors of `in` and `out`; or one number for both. The square root of
        the width gives the fewest values.
      rank: r, at most `min(in / b1, out / b2)`; 1 is the paper's.

    Returns:
      `first` `[b1, in / b1, b2, r]`, block-diagonal as `[b1, in / b1, b2 r]`, and `second`
      `[b2, b1, r, out / b2]`, block-diagonal as `[b2, b1 r, out / b2]`, in the dtype of w.

    Raises:
      SpecError: for an integer array, blocks that do not divide w, or a rank that is impossible.

    References:
      Dao et al., *Monarch: Expressive Structured Matrices for Efficient and Accurate Training*,
      2022.

    Examples:
      >>> import jax
      >>> first, second = monarch(jax.random.normal(jax.random.key(0), (16, 8)), (4, 2))
      >>> first.shape, second.shape
      ((4, 4, 2, 1), (2, 4, 1, 4))
    """
    check_array(w, "monarch")
    rank = check_rank(rank, "monarch")
    b1, b2 = check_ranks(blocks, 2, "monarch: blocks")
    if w.ndim != 2 or w.shape[0] % b1 or w.shape[1] % b2:
        raise SpecError(
            f"monarch: blocks {(b1, b2)} do not divide shape {w.shape}; write two divisors"
        )
    p, q = w.shape[0] // b1, w.shape[1] // b2
    if w.size and rank > min(p, q):
        raise SpecError(f"monarch: rank {rank} of blocks {p} x {q}; write at most {min(p, q)}")
    if not w.size:
        return jnp.zeros((b1, p, b2, rank), w.dtype), jnp.zeros((b2, b1, rank, q), w.dtype)
    slices = w.reshape(b1, p, b2, q).transpose(0, 2, 1, 3)  # [k, j, i, l]
    left, right = truncated_svd(slices, rank)
    return left.transpose(0, 2, 1, 3), right.transpose(1, 0, 2, 3)
