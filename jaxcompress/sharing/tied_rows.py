"""`TieRows`: rows that have become alike, as they do under GrOWL, are made one."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import is_compressed
from jaxcompress.arrays.packed import PackedArray
from jaxcompress.arrays.row_shared import RowSharedArray
from jaxcompress.errors import SpecError, ValuesNeededError
from jaxcompress.numerics import rounded
from jaxcompress.rules import default_axes
from jaxcompress.specs import (
    LeafContext,
    Plan,
    Spec,
    is_number,
    on_auto_axes,
    placed_like,
    register_spec,
)

LINKAGES = ("complete", "average", "single")


def row_similarity(w: Any) -> np.ndarray:
    """How alike the rows of a matrix are: `w_i . w_j / max(|w_i|^2, |w_j|^2)`, in float64.

    It is 1 for equal rows alone, less for rows that differ in direction or in norm, and at least
    -1; 0 with a row of zeros, and 1 between two of them.

    Args:
      w: `[m, n]`.

    References:
      Zhang, Wang, Figueiredo and Balzano, *Learning to Share*, 2018 (section 3).

    Examples:
      >>> row_similarity([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]).round(2).tolist()
      [[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    w = np.asarray(w).astype(np.float64)
    products = w @ w.T
    squares = np.diag(products)
    most = np.maximum(squares[:, None], squares[None, :])
    return np.where(most > 0, products / np.where(most > 0, most, 1), 1.0)


def cluster_rows(w: Any, similarity: float, *, linkage: str = "complete") -> np.ndarray:
    """Puts the rows of a matrix that are alike into clusters, by agglomeration on the host.

    Args:
      w: `[m, n]`, concrete.
      similarity: the least similarity within a cluster, up to 1: of any two rows for `complete`
        linkage, of two clusters on average for `average`, of nearest rows for `single`.
      linkage: which of these.

    Returns:
      int32 labels `[m]`: -1 for a row of zeros, else 0, 1, ... in the order of first occurrence.
      Memory and time are in m squared.

    Raises:
      SpecError: for an unknown linkage.

    References:
      Müllner, *fastcluster: Fast Hierarchical, Agglomerative Clustering Routines*, 2013 (scipy's
      algorithms); Zhang et al., *Learning to Share*, 2018, which uses affinity propagation on the
      same similarity: its labels do for `share_rows` as well.

    Examples:
      >>> cluster_rows([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0], [1.0, 0.1]], 0.9).tolist()
      [0, -1, 1, 0]
    """
    from scipy.cluster import hierarchy
    from scipy.spatial import distance

    if linkage not in LINKAGES:
        raise SpecError(f"linkage={linkage!r}: write one of {', '.join(LINKAGES)}")
    w = np.asarray(w).astype(np.float64)
    labels = np.full(len(w), -1, np.int32)
    (kept,) = np.nonzero(np.any(w != 0, axis=1))
    if len(kept) < 2:
        labels[kept] = 0
        return labels
    if similarity == 1:
        found = np.unique(w[kept], axis=0, return_inverse=True)[1].reshape(-1)
    else:
        apart = np.maximum(1 - row_similarity(w[kept]), 0)
        np.fill_diagonal(apart, 0)
        tree = hierarchy.linkage(distance.squareform(apart, checks=False), linkage)
        # Equal rows are 1 - eps alike.
        found = hierarchy.fcluster(tree, 1 - similarity + 1e-9, "distance")
    _, first, inverse = np.unique(found, return_index=True, return_inverse=True)
    labels[kept] = np.argsort(np.argsort(first))[inverse]
    return labels


def share_rows(w: Any, labels: Any, *, axis: int = -2) -> RowSharedArray:
    """The leaf of a weight whose rows of one label become their mean, those of label -1 zero.

    Args:
      w: one weight, or with labels `[*batch, m]` a stack of them.
      labels: whole numbers from -1 on, concrete.
      axis: the axis of the rows, negative.

    Returns:
      The means are taken in float32 and rounded to the dtype of `w`; the mean is what is nearest to
      its rows. In a stack there are as many rows as the weight with the most labels has.

    Raises:
      SpecError: for labels that do not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> leaf = share_rows(jnp.array([[1.0], [0.1], [3.0]]), [0, -1, 0])
      >>> leaf.materialize().tolist()
      [[2.0], [0.0], [2.0]]
    """
    labels = np.asarray(labels)
    batch = labels.ndim - 1
    fits = (
        batch >= 0
        and np.issubdtype(labels.dtype, np.integer)
        and -w.ndim <= axis < 0
        and w.ndim + axis >= batch
        and (*w.shape[:batch], w.shape[axis]) == labels.shape
        and (not labels.size or labels.min() >= -1)
    )
    if not fits:
        raise SpecError(
            f"labels {labels.dtype}{[*labels.shape]} do not fit axis {axis} of {tuple(w.shape)}; "
            "write one whole number from -1 on for each row"
        )
    k, zero = int(labels.max(initial=-1)) + 1, bool((labels < 0).any())
    rows = _means(jnp.asarray(w), jnp.asarray(labels, jnp.int32), k, axis)
    return RowSharedArray.of(rows, _packed(labels + zero, k + zero), axis=axis, zero=zero)


def _means(w: jax.Array, labels: jax.Array, k: int, axis: int) -> jax.Array:
    def one(w: jax.Array, labels: jax.Array) -> jax.Array:
        moved = jnp.moveaxis(w.astype(jnp.float32), axis, 0)
        place = jnp.where(labels < 0, k, labels)  # rows of zeros into a sum of their own
        counts = jnp.zeros(k + 1, jnp.float32).at[place].add(1.0)
        # Divided first: the sum of the largest floats overflows.
        parts = moved / counts[place].reshape(-1, *(1,) * (moved.ndim - 1))
        sums = jnp.zeros((k + 1, *moved.shape[1:]), jnp.float32).at[place].add(parts)
        return jnp.moveaxis(sums[:k], 0, axis)

    for _ in range(labels.ndim - 1):
        one = jax.vmap(one)
    return rounded(one(w, labels), w.dtype)


def _packed(index: np.ndarray, kinds: int) -> Any:
    """An index in as few bits as it needs, if these are less than 8."""
    bits = max(1, (max(1, kinds) - 1).bit_length())
    if bits < 8:
        return PackedArray.pack(jnp.asarray(index, jnp.uint8), bits)
    return jnp.asarray(index, jnp.uint8 if bits == 8 else jnp.uint16 if bits <= 16 else jnp.int32)


@register_spec("tie_rows")
@dataclasses.dataclass(frozen=True, repr=False)
class TieRows(Spec):
    """Makes rows of a kernel that are alike one row, and leaves out those of zeros.

    The last step of GrOWL: the penalty (`jaxcompress.pruning.growl`) drives the rows of correlated
    inputs to each other, this ties them, and training goes on with the rows that are left. Rows are
    slices along the last input axis: all outputs of an input, or of an input channel.

    Args:
      similarity: the least `w_i . w_j / max(|w_i|^2, |w_j|^2)` of two rows that are tied; 1 ties
        equal rows alone.
      linkage: as in `cluster_rows`.

    Raises:
      SpecError: for a similarity outside of (0, 1] or an unknown linkage; for a leaf without rows.
      ValuesNeededError: under `jit`, which hides the values.

    References:
      Zhang, Wang, Figueiredo and Balzano, *Learning to Share: Simultaneous Parameter Tying and
      Sparsification in Deep Learning*, 2018.

    Examples:
      >>> import jax.numpy as jnp
      >>> TieRows(0.9)(jnp.array([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0], [1.0, 0.1]]))
      RowSharedArray(float32[4, 2], 2 of 4 rows)
    """

    similarity: float = 0.9
    _: dataclasses.KW_ONLY
    linkage: str = "complete"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.similarity, 0, 1) or not self.similarity:
            raise SpecError(f"similarity={self.similarity!r}: write a number above 0 and up to 1")
        if self.linkage not in LINKAGES:
            raise SpecError(f"linkage={self.linkage!r}: write one of {', '.join(LINKAGES)}")

    def plan(self, leaf: jax.Array, context: LeafContext) -> Plan:
        """There is none: which rows are tied is a matter of the values."""
        raise ValuesNeededError(f"{context.path}: {self!r} has no plan without values; call it")

    def __call__(self, leaf: Any, context: LeafContext | None = None) -> Any:
        """Ties the rows of one array, or of the inner children of a leaf."""
        if is_compressed(leaf):
            return super().__call__(leaf, context)
        leaf = jnp.asarray(leaf)
        context = context or LeafContext("leaf", default_axes("leaf", leaf.ndim))
        if leaf.ndim < 2 or not leaf.size:
            raise SpecError(f"{context.path}: shape {leaf.shape} has no rows; leave it dense")
        if isinstance(leaf, jax.core.Tracer):
            raise ValuesNeededError(
                f"{context.path}: which rows are alike is read off the values, which jit hides; "
                "compress outside of jit"
            )
        w, mesh = on_auto_axes(leaf)
        batch, axis = context.axes.batch_ndim(w.ndim), max(context.axes.input)
        stack = np.moveaxis(np.asarray(w).astype(np.float32), axis, batch)
        stack = stack.reshape(-1, stack.shape[batch], int(np.prod(stack.shape[batch + 1 :])))
        labels = [cluster_rows(one, self.similarity, linkage=self.linkage) for one in stack]
        shape = (*w.shape[:batch], w.shape[axis])
        return placed_like(share_rows(w, np.reshape(labels, shape), axis=axis), w, mesh)
