"""Optimal Brain Surgeon: remove a weight, and let the others make up for it exactly."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.errors import SpecError
from jaxcompress.layerwise.hessian import (
    Hessian,
    Solution,
    check_damping,
    check_finite,
    check_shapes,
    hessian,
    output_error,
    over_stack,
    unchanged,
)
from jaxcompress.pruning.select import top_mask
from jaxcompress.specs import is_count

_HIGHEST = lax.Precision.HIGHEST


def obs(w: jax.Array, gram: jax.Array, kept: int, *, damping: float = 1e-4) -> Solution:
    """Exact Optimal Brain Surgeon: removes one weight at a time, the cheapest of the whole layer.

    With `H` the damped Gram matrix, each column w of the weights (one output) has an inverse of its
    own over the weights that it still has. In each step the weight of least loss

        `w_q**2 / (2 [H^-1]_qq)`

    among all columns goes, of several the one of the highest index, and its column becomes

        `w - (w_q / [H^-1]_qq) H^-1 e_q`, `H^-1 - H^-1 e_q e_q' H^-1 / [H^-1]_qq`,

    which is the least-squares fit on what is left. For small layers: it holds N inverses of K x K,
    and takes `K N - kept` steps of `K N + K**2` operations.

    Args:
      w: `[..., K, N]`, inputs before outputs; float32, bfloat16 or float16.
      gram: `[..., K, K]`, `sum x x'`, as `observe` has it. An input that is always zero (a zero on
        the diagonal) gets weights of zero.
      kept: how many of the K N weights stay, exactly.
      damping: the share of the mean diagonal that is added to the diagonal; more, where
        that is too little for a factor that rounding does not spoil.

    Returns:
      The weights, mask, damping and error.

    Raises:
      SpecError: for shapes that do not fit, a count or damping that is none, and a Gram matrix that
        is concrete and not finite.

    References:
      Hassibi and Stork, *Second Order Derivatives for Network Pruning: Optimal Brain Surgeon*,
      1993; Frantar, Singh and Alistarh, *Optimal Brain Compression*, 2022 (by columns).

    Examples:
      >>> import jax.numpy as jnp
      >>> gram = jnp.array([[1.0, 0.9], [0.9, 1.0]])  # the inputs are nearly the same,
      >>> found = obs(jnp.array([[1.0], [2.0]]), gram, 1, damping=0.0)
      >>> tuple(round(float(x), 3) for x in found.weight.ravel())  # one does the work of both
      (0.0, 2.9)
    """
    _check(w, gram, kept, damping, "obs")
    if not w.size:
        return unchanged(w)
    return _obs(w, gram, kept, damping)


def layerwise_obs(w: jax.Array, gram: jax.Array, kept: int, *, damping: float = 1e-4) -> Solution:
    """Layer-wise Optimal Brain Surgeon: all weights are ranked at once, by one inverse.

    The sensitivities `w_q**2 / (2 [H^-1]_qq)` of all weights come from one inverse of the damped
    Gram matrix, the same for all columns. The `kept` largest stay, ties by the lowest index.
    Then each column makes up for the set S of what it lost, exactly:

        `w - H^-1[:, S] (H^-1[S, S])^-1 w_S`,

    which is the step of Optimal Brain Surgeon for several weights at once and the least-squares fit
    on what is left (see `reconstruct`). The steps of the paper, weight by weight with the inverse
    of the whole, would give weights back to places that are empty already.

    Args:
      w: `[..., K, N]`; see `obs`, like all that follow.
      gram: `[..., K, K]`.
      kept: how many of the K N weights stay, exactly.
      damping: the share of the mean diagonal that is added.

    Returns:
      The weights, mask, damping and error.

    Raises:
      SpecError: as `obs`.

    References:
      Dong, Chen and Pan, *Learning to Prune Deep Neural Networks via Layer-wise Optimal Brain
      Surgeon*, 2017.

    Examples:
      >>> import jax.numpy as jnp
      >>> gram = jnp.array([[1.0, 0.9], [0.9, 1.0]])
      >>> found = layerwise_obs(jnp.array([[1.0], [2.0]]), gram, 1, damping=0.0)
      >>> tuple(round(float(x), 3) for x in found.weight.ravel())
      (0.0, 2.9)
    """
    _check(w, gram, kept, damping, "layerwise_obs")
    if not w.size:
        return unchanged(w)
    return _layerwise(w, gram, kept, damping)


def reconstruct(
    w: jax.Array, gram: jax.Array, mask: jax.Array, *, damping: float = 1e-4
) -> Solution:
    """The weights of a given mask that change the outputs least, exactly.

    For each column, with M the places that stay, S those that go and `H` the damped Gram matrix,

        `w'_M = w_M + H_MM^-1 H_MS w_S`,

    which minimizes `(w - w')' H (w - w')` among all w' that are zero on S. One K x K system a
    column, one after the other.

    Args:
      w: `[..., K, N]`; see `obs`.
      gram: `[..., K, K]`.
      mask: bool `[..., K, N]`, which weights stay.
      damping: the share of the mean diagonal that is added.

    Returns:
      The weights, mask, damping and error. No other weights of this mask have a smaller error
      but for the damping.

    Raises:
      SpecError: for shapes that do not fit, and as `obs`.

    Examples:
      >>> import jax.numpy as jnp
      >>> gram = jnp.array([[1.0, 0.5], [0.5, 1.0]])
      >>> w, mask = jnp.array([[1.0], [2.0]]), jnp.array([[True], [False]])
      >>> reconstruct(w, gram, mask, damping=0.0).weight.tolist()
      [[2.0], [0.0]]
    """
    _check(w, gram, 0, damping, "reconstruct")
    if tuple(mask.shape) != tuple(w.shape):
        raise SpecError(f"reconstruct: write a mask of shape {tuple(w.shape)}, not {mask.shape}")
    if not w.size:
        return unchanged(w)
    return _reconstruct(w, gram, mask.astype(bool), damping)


def _check(w: Any, gram: Any, kept: Any, damping: Any, name: str) -> None:
    check_shapes(w, gram, name)
    check_damping(damping)
    check_finite(gram, name)
    size = w.shape[-2] * w.shape[-1]
    if not is_count(kept, 0, size):
        raise SpecError(f"kept={kept!r}: write how many of the {size} weights stay")


@jax.jit
def _obs(w: jax.Array, gram: jax.Array, kept: Any, damping: Any) -> Solution:
    return over_stack(lambda w, gram: _obs_one(w, hessian(gram, damping), kept), w, gram)


def _obs_one(w: jax.Array, h: Hessian, kept: Any) -> Solution:
    rows, columns = w.shape
    inverse = jnp.matmul(h.factor.T, h.factor, precision=_HIGHEST)
    start = jnp.where(h.dead[:, None], 0.0, w.astype(jnp.float32))
    inverses = jnp.broadcast_to(inverse, (columns, rows, rows))
    diagonals = jnp.broadcast_to(jnp.diagonal(inverse)[:, None], w.shape)

    def step(_: Any, state: Any) -> Any:
        x, inverses, diagonals, mask = state
        # By |w_q| / sqrt([H^-1]_qq), which is in the order of the losses and does not overflow.
        loss = jnp.where(mask, jnp.abs(x) * lax.rsqrt(diagonals), jnp.inf)
        last = jnp.argmin(loss.reshape(-1)[::-1])  # of equal ones that of the highest index
        place = x.size - 1 - last
        q, n = place // columns, place % columns
        inverse = lax.dynamic_index_in_dim(inverses, n, keepdims=False)
        column = lax.dynamic_index_in_dim(inverse, q, axis=1, keepdims=False)
        slope = column / column[q]
        # Whatever is gone stays exactly zero: its row and column of the inverse are zeroed.
        gone = jnp.arange(rows) == q
        updated = x[:, n] - x[q, n] * slope
        x = x.at[:, n].set(jnp.where(gone, 0.0, updated))
        inverse = inverse - slope[:, None] * column[None, :]
        inverse = jnp.where(gone[:, None] | gone[None, :], 0.0, inverse)
        # Never below 0 but for rounding: conditioning makes a variance smaller, down to 1 / H_qq.
        least = 1 / jnp.diagonal(h.matrix)
        diagonals = diagonals.at[:, n].set(jnp.maximum(jnp.diagonal(inverse), least))
        return x, inverses.at[n].set(inverse), diagonals, mask.at[q, n].set(False)

    state = (start, inverses, diagonals, jnp.ones(w.shape, bool))
    x, _, _, mask = lax.fori_loop(0, w.size - kept, step, state)
    return _finished(w, x, mask, h)


@jax.jit
def _layerwise(w: jax.Array, gram: jax.Array, kept: Any, damping: Any) -> Solution:
    def one(w: jax.Array, gram: jax.Array) -> Solution:
        h = hessian(gram, damping)
        x = jnp.where(h.dead[:, None], 0.0, w.astype(jnp.float32))
        # The diagonal of U' U, the inverse: sums of squares down the columns.
        scores = jnp.abs(x) * lax.rsqrt(jnp.sum(h.factor**2, axis=0))[:, None]
        return _fit(w, top_mask(scores, kept), h)

    return over_stack(one, w, gram)


@jax.jit
def _reconstruct(w: jax.Array, gram: jax.Array, mask: jax.Array, damping: Any) -> Solution:
    return over_stack(lambda w, gram, m: _fit(w, m, hessian(gram, damping)), w, gram, mask)


def _fit(w: jax.Array, mask: jax.Array, h: Hessian) -> Solution:
    start = jnp.where(h.dead[:, None], 0.0, w.astype(jnp.float32))

    def one(column: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, kept = column
        # What goes has an equation of its own, x = 0, so that all columns are of one shape.
        system = jnp.where(kept[:, None] & kept[None, :], h.matrix, 0.0)
        system = system + jnp.diag(jnp.where(kept, 0.0, 1.0))
        lost = jnp.matmul(h.matrix, jnp.where(kept, 0.0, x), precision=_HIGHEST)
        root = lax.linalg.cholesky(system)
        right = jnp.where(kept, lost, 0.0)[:, None]
        right = lax.linalg.triangular_solve(root, right, left_side=True, lower=True)
        more = lax.linalg.triangular_solve(
            root, right, left_side=True, lower=True, transpose_a=True
        )
        return x + more[:, 0]

    x = lax.map(one, (start.T, mask.T)).T
    return _finished(w, x, mask, h)


def _finished(w: jax.Array, x: jax.Array, mask: jax.Array, h: Hessian) -> Solution:
    largest = float(jnp.finfo(w.dtype).max)
    weight = jnp.where(mask, jnp.clip(x, -largest, largest), 0.0).astype(w.dtype)
    return Solution(weight, mask, h.damping, output_error(h, w, weight))
