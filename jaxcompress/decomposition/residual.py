"""A matrix as a low-rank part and something small: codes, or a few large values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.arrays.base import materialize
from jaxcompress.decomposition.svd import truncated_svd
from jaxcompress.errors import SpecError
from jaxcompress.numerics import rounded
from jaxcompress.specs import is_count

Factorize = Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]


class Parts(NamedTuple):
    """`w ~ rest + left @ right`.

    Attributes:
      rest: what the low-rank part leaves, compressed: a leaf or an array.
      left: `[..., m, r]`, in the dtype of w.
      right: `[..., r, n]`, likewise.
      errors: float32, `|w - rest - left @ right|**2` after each iteration, summed over a stack.
    """

    rest: Any
    left: jax.Array
    right: jax.Array
    errors: jax.Array


def alternate(
    w: jax.Array,
    rank: int,
    compress: Callable[[jax.Array], Any],
    *,
    iterations: int = 1,
    low_rank_first: bool = False,
    factorize: Factorize = truncated_svd,
) -> Parts:
    """What is left of a low-rank part compressed, and the low-rank part of what that leaves.

    `S_t = compress(w - L_{t-1})` and `L_t = svd_r(w - S_t)`, where L_0 is 0 or `svd_r(w)`. This is
    LoftQ with a quantizer and L_0 = 0; SVDQuant, but for the last step, with a quantizer, L_0 =
    `svd_r(w)` and one iteration; and GoDec with `compress` that keeps the largest values.

    The best of all iterations is returned. So the error is never greater than with fewer
    iterations, nor, with L_0 = 0, than that of `compress(w)` alone: the last step is the best
    possible one (Eckart and Young). Each step by itself is no worse than the one before where
    `compress` gives the nearest of a fixed set, such as a number of values; scales that follow the
    range are no such set, and errors may rise again. Both hold up to rounding, that of the factors
    to the dtype of w included.

    Args:
      w: `[..., m, n]`, floating.
      rank: from 1 to `min(m, n)`; static.
      compress: makes an array or a leaf of a matrix like w, in the dtype of w, with as many values
        in the same order, of whatever shape; inside of jit, of the same structure each time.
      iterations: at least 1; static.
      low_rank_first: whether L_0 is `svd_r(w)`.
      factorize: the low-rank approximation, such as one in the metric of the inputs; with another
        than the truncated SVD, errors in the plain norm may grow.

    Returns:
      The parts.

    Raises:
      SpecError: for no iterations, a rank that w cannot have, or inside of jit a `compress` whose
        outcome is another structure each time.

    References:
      Li et al., *LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models*, 2024; Li
      et al., *SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models*,
      2025; Zhou and Tao, *GoDec: Randomized Low-rank & Sparse Matrix Decomposition in Noisy Case*,
      2011.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> w = jax.random.normal(jax.random.key(0), (32, 16))
      >>> parts = alternate(w, 4, jc.Quantize("int4"), iterations=3)
      >>> parts.rest, parts.left.shape, parts.right.shape
      (QuantizedArray(float32[32, 16], int4), (32, 4), (4, 16))
      >>> alone = jnp.sum((w - jc.Quantize("int4")(w).materialize()) ** 2)
      >>> bool(parts.errors.min() < alone)
      True
    """
    if not is_count(iterations, 1):
        raise SpecError(f"iterations={iterations!r}: write a whole number of at least 1")
    if w.ndim < 2 or not is_count(rank, 1, min(w.shape[-2:])):
        raise SpecError(f"rank={rank!r} is impossible for shape {w.shape}: write 1 to min(m, n)")
    wide = w.astype(jnp.float32)
    low = jnp.zeros_like(wide)
    if low_rank_first:
        low = _product(*factorize(wide, rank))
    best: Any = None
    errors: list[jax.Array] = []
    for _ in range(iterations):
        rest = compress(rounded(wide - low, w.dtype))
        values = materialize(rest).reshape(w.shape)
        left, right, low, error = _fitted(factorize, rank, w, values)
        found = (error, rest, left, right)
        best = found if best is None else _better(best, found)
        errors.append(error)
    _, rest, left, right = best
    return Parts(rest, left, right, jnp.stack(errors))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fitted(factorize: Factorize, rank: int, w: jax.Array, values: jax.Array) -> Any:
    """The factors of what the values leave, their product, and the squared error then."""
    lost = w.astype(jnp.float32) - values.astype(jnp.float32)
    left, right = (rounded(x, w.dtype) for x in factorize(lost, rank))
    low = _product(left, right)
    return left, right, low, jnp.sum((lost - low) ** 2)


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    wide = left.astype(jnp.float32), right.astype(jnp.float32)
    return jnp.matmul(*wide, precision=lax.Precision.HIGHEST)


def _better(old: Any, new: Any) -> Any:
    """The one of less error, as a whole."""
    less = new[0] < old[0]
    if not isinstance(less, jax.core.Tracer):  # indices of a sparse rest may differ in size
        return new if less else old
    structures: list[Any] = [jax.tree.structure(x) for x in (old, new)]
    if structures[0] != structures[1]:
        raise SpecError(
            "inside of jit, what compresses the rest must give leaves of one structure: write "
            "fixed ranks and counts rather than such as follow the values"
        )
    return jax.tree.map(lambda a, b: jnp.where(less, b, a), old, new)


def low_rank_correction(
    w: jax.Array,
    compressed: Any,
    rank: int,
    *,
    scale: jax.Array | None = None,
    factorize: Factorize = truncated_svd,
) -> tuple[jax.Array, jax.Array]:
    """Factors of what compression lost, weighted by how large the inputs are: LQER.

    `left @ right ~ E = w - compressed` with the least `|diag(s) (E - left @ right)|` in the
    Frobenius norm: `diag(s) E ~ U V` by the truncated SVD, `left = diag(1 / s) U` and `right = V`.
    With s the root mean square of the inputs, which are taken to be uncorrelated, this is the
    expected squared error of the outputs; for correlated ones give a `factorize` in the metric of
    their Gram matrix, and no scale.

    Args:
      w: `[..., m, n]`, inputs before outputs.
      compressed: a leaf or an array of the same shape.
      rank: from 1 to `min(m, n)`.
      scale: s, `[..., m]`, not negative; an input that is zero counts as a thousandth of the
        largest, so that its row has values at all. None: all alike.
      factorize: the low-rank approximation.

    Returns:
      `left` `[..., m, r]` and `right` `[..., r, n]` in the dtype of w.

    Raises:
      SpecError: for shapes that do not fit.

    References:
      Zhang et al., *LQER: Low-Rank Quantization Error Reconstruction for LLMs*, 2024.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> w = jax.random.normal(jax.random.key(0), (32, 16))
      >>> codes, s = jc.Quantize("int3")(w), jnp.where(jnp.arange(32) < 4, 10.0, 1.0)
      >>> left, right = low_rank_correction(w, codes, 4, scale=s)
      >>> lost = w - codes.materialize()
      >>> weighted = lambda e: float(jnp.sum((s[:, None] * e) ** 2))
      >>> weighted(lost - left @ right) < 0.2 * weighted(lost)
      True
    """
    if tuple(compressed.shape) != tuple(w.shape) or w.ndim < 2:
        raise SpecError(f"{compressed.shape} is no approximation of a matrix of shape {w.shape}")
    if not is_count(rank, 1, min(w.shape[-2:])):
        raise SpecError(f"rank={rank!r} is impossible for shape {w.shape}: write 1 to min(m, n)")
    lost = w.astype(jnp.float32) - materialize(compressed).astype(jnp.float32)
    if scale is None:
        left, right = factorize(lost, rank)
        return rounded(left, w.dtype), rounded(right, w.dtype)
    if scale.shape != w.shape[:-1]:
        raise SpecError(f"a scale of shape {scale.shape}: write one of shape {w.shape[:-1]}")
    s = scale.astype(jnp.float32)
    largest = jnp.max(s, axis=-1, keepdims=True)
    s = jnp.maximum(s, jnp.where(largest > 0, 1e-3 * largest, 1.0))[..., None]
    left, right = factorize(s * lost, rank)
    return rounded(left / s, w.dtype), rounded(right, w.dtype)
