"""Tensor trains: an array as a chain of small cores."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.decomposition.modes import (
    check_array,
    check_rank,
    check_ranks,
    left_basis,
    matmul,
    scaled,
)
from jaxcompress.errors import SpecError, ValuesNeededError


def tensor_train(
    x: jax.Array, ranks: int | Sequence[int] | None = None, *, error: float | None = None
) -> tuple[jax.Array, ...]:
    """The tensor train by successive SVDs: `x[i1, .., id] ~ G1[i1] @ .. @ Gd[id]`.

    From the left, what remains is read as a matrix `[r n_k, others]`, its leading left singular
    vectors are the core, and what they project it to goes on. The squared error is at most the
    sum over the d-1 cuts of the squares of the singular values left out of the unfolding
    `[n_1 .. n_k, n_k+1 .. n_d]`, so the error is at most `sqrt(d-1)` times the least possible.

    Args:
      x: an array of floats with at least two axes.
      ranks: the d-1 ranks between the cores, each at most what the axes on either side of its
        cut allow; or one number, cut down to what is possible at each; static.
      error: in place of ranks, the largest `|x - approximation| / |x|`, in [0, 1): each cut leaves
        out at most `error**2 / (d - 1)` of the energy. Below about 1e-6 the rounding of float32
        comes on top.

    Returns:
      d cores `[r_{k-1}, n_k, r_k]` in the dtype of x, with `r_0 = r_d = 1`; all but the last have
      orthonormal columns `[r_{k-1} n_k, r_k]`.

    Raises:
      SpecError: unless exactly one of `ranks` and `error` is given and possible for the shape.
      ValuesNeededError: for `error` inside of jit.

    References:
      Oseledets, *Tensor-Train Decomposition*, 2011.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> x = jax.random.normal(jax.random.key(0), (3, 4, 5))
      >>> a, b, c = tensor_train(x, (3, 5))
      >>> a.shape, b.shape, c.shape
      ((1, 3, 3), (3, 4, 5), (5, 5, 1))
      >>> bool(jnp.allclose(jnp.einsum("aib,bjc,ckd->ijk", a, b, c), x, atol=1e-5))
      True
    """
    check_array(x, "tensor_train")
    if (ranks is None) == (error is None):
        raise SpecError("tensor_train: write one of ranks and error")
    if error is not None:
        return by_ranks(x, _ranks_by_error(x, error))
    return by_ranks(x, _possible(x.shape, ranks))


def tensor_train_matrix(
    w: jax.Array,
    in_dims: Sequence[int],
    out_dims: Sequence[int],
    ranks: int | Sequence[int] | None = None,
    *,
    error: float | None = None,
) -> tuple[jax.Array, ...]:
    """The tensor train of a matrix: a core holds one part of the inputs and one of the outputs.

    `w[(i1..id), (o1..od)] ~ G1[i1, o1] @ .. @ Gd[id, od]`: the tensor train of w read as
    `[i1 o1, .., id od]`, with its bound of the error.

    Args:
      w: `[in, out]` of floats.
      in_dims: d sizes whose product is `in`.
      out_dims: d sizes whose product is `out`.
      ranks: as in `tensor_train`.
      error: as in `tensor_train`.

    Returns:
      d cores `[r_{k-1}, i_k, o_k, r_k]` in the dtype of w, with `r_0 = r_d = 1`.

    Raises:
      SpecError: where the sizes do not make up the matrix, or as `tensor_train`.
      ValuesNeededError: for `error` inside of jit.

    References:
      Novikov et al., *Tensorizing Neural Networks*, 2015.

    Examples:
      >>> import jax
      >>> w = jax.random.normal(jax.random.key(0), (12, 10))
      >>> [core.shape for core in tensor_train_matrix(w, (3, 4), (2, 5), 4)]
      [(1, 3, 2, 4), (4, 4, 5, 1)]
    """
    ins, outs = tuple(map(int, in_dims)), tuple(map(int, out_dims))
    if w.ndim != 2 or (math.prod(ins), math.prod(outs)) != w.shape or len(ins) != len(outs):
        raise SpecError(
            f"tensor_train_matrix: {ins} and {outs} do not make up shape {w.shape}; write equally "
            "many sizes whose products are its two axes"
        )
    d = len(ins)
    pairs = tuple(axis for k in range(d) for axis in (k, d + k))
    x = w.reshape(ins + outs).transpose(pairs).reshape(tuple(i * o for i, o in zip(ins, outs)))
    if d == 1:
        return (x.reshape(1, ins[0], outs[0], 1),)
    cores = tensor_train(x, ranks, error=error)
    return tuple(g.reshape(g.shape[0], i, o, g.shape[2]) for g, i, o in zip(cores, ins, outs))


def _bounds(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The rank that each cut allows."""
    cuts = range(1, len(shape))
    return tuple(max(1, min(math.prod(shape[:k]), math.prod(shape[k:]))) for k in cuts)


def _possible(shape: tuple[int, ...], ranks: int | Sequence[int] | None) -> tuple[int, ...]:
    """Ranks that every core can have."""
    bounds = _bounds(shape)
    if not isinstance(ranks, Sequence):
        most = check_rank(ranks, "tensor_train")
        return tuple(min(most, b) for b in bounds)
    out = check_ranks(ranks, len(bounds), "tensor_train")
    around = (1, *out, 1)
    for k, (rank, bound) in enumerate(zip(out, bounds, strict=True)):
        most = min(bound, around[k] * max(1, shape[k]), around[k + 2] * max(1, shape[k + 1]))
        if rank > most:
            raise SpecError(
                f"tensor_train: rank {rank} between axes {k} and {k + 1} of shape {shape} with "
                f"ranks {out}; write at most {most}"
            )
    return out


def _ranks_by_error(x: jax.Array, error: float) -> tuple[int, ...]:
    """The least ranks within the error, by the same cuts in float64 on the host."""
    if not 0 <= error < 1:
        raise SpecError(f"tensor_train: error={error}; write a relative error in [0, 1)")
    if isinstance(x, jax.core.Tracer):
        raise ValuesNeededError(
            "tensor_train: ranks by error read the values, which jit hides; call it outside of "
            "jit or write ranks"
        )
    rest = np.asarray(x, np.float64)
    largest = np.max(np.abs(rest), initial=0.0)
    rest = rest / largest if largest > 0 else rest
    allowed = error**2 * np.sum(rest**2) / (x.ndim - 1)
    ranks: list[int] = []
    for n in x.shape[:-1]:
        a = rest.reshape((ranks[-1] if ranks else 1) * n, -1) if rest.size else np.zeros((1, 1))
        _, s, v = np.linalg.svd(a, full_matrices=False)
        left_out = np.cumsum((s**2)[::-1])[::-1]
        # Rounding noise of the float64 SVD itself is no rank.
        floor = allowed + (np.finfo(np.float64).eps * len(s)) ** 2 * left_out[0]
        ranks.append(max(1, int(np.sum(left_out > floor))))
        rest = s[: ranks[-1], None] * v[: ranks[-1]]
    return tuple(ranks)


@functools.partial(jax.jit, static_argnums=1)
def by_ranks(x: jax.Array, ranks: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """The train of given ranks, which are not checked."""
    edges = (1, *ranks, 1)
    if x.size == 0:
        shapes = [(edges[k], n, edges[k + 1]) for k, n in enumerate(x.shape)]
        return tuple(jnp.zeros(shape, x.dtype) for shape in shapes)
    rest, scale = scaled(x)
    cores = []
    for k, n in enumerate(x.shape[:-1]):
        rest = rest.reshape(edges[k] * n, math.prod(x.shape[k + 1 :]))
        u = left_basis(rest, edges[k + 1])
        cores.append(u.reshape(edges[k], n, edges[k + 1]))
        rest = matmul(u.T, rest)
    cores.append((rest * scale).reshape(edges[-2], x.shape[-1], 1))
    return tuple(core.astype(x.dtype) for core in cores)
