"""Soft weight-sharing: a mixture as the prior of weights, then each weight its component's mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import is_compressed, materialize
from jaxcompress.arrays.codebook import CodebookArray
from jaxcompress.arrays.packed import PackedArray, block_for
from jaxcompress.arrays.sparse import SparseArray
from jaxcompress.compress import nbytes
from jaxcompress.errors import SpecError
from jaxcompress.numerics import rounded
from jaxcompress.rules import flatten, match
from jaxcompress.sharing.mixture import Mixture, gamma_penalty, log_likelihood

KERNELS = ("**/kernel",)


def soft_sharing(
    mixture: Mixture,
    params: Any,
    patterns: Sequence[str] = KERNELS,
    *,
    zero: tuple[float, float] | None = None,
    others: tuple[float, float] | None = None,
) -> jax.Array:
    """The complexity loss of soft weight-sharing, to be added to a loss times some strength.

    `-sum_i log sum_j pi_j N(w_i; mu_j, s_j^2)` over the weights of all leaves that the patterns
    match, under one mixture, and the hyperpriors of its precisions. Trained together with the
    mixture, weights gather around few means and most of them around zero:

        def loss(both, batch):
            mixture, params = both
            return task(params, batch) + 0.005 * soft_sharing(mixture, params) / len(images)

    Args:
      mixture: see `init_mixture`.
      params: any pytree.
      patterns: globs over paths; by default all kernels.
      zero: `(alpha, beta)` of the Gamma prior of the precision of the component at zero, or None.
      others: those of all others, or None. Without a prior a component may collapse on a few
        weights: its density, and so the likelihood, has no bound.

    Returns:
      A float32 scalar.

    Raises:
      RuleError: for a pattern that matches nothing.
      SpecError: for a leaf that is no dense floating array.

    References:
      Nowlan and Hinton, *Simplifying Neural Networks by Soft Weight-Sharing*, 1992; Ullrich, Meeds
      and Welling, *Soft Weight-Sharing for Neural Network Compression*, 2017.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxcompress.sharing.mixture import init_mixture
      >>> params = {"kernel": jnp.linspace(-1.0, 1.0, 50)}
      >>> bool(jnp.isfinite(soft_sharing(init_mixture(params), params)))
      True
    """
    leaves = flatten(params)[0]
    weights = [leaves[i][1] for i in _chosen(leaves, patterns)]
    return gamma_penalty(mixture, zero=zero, others=others) - log_likelihood(mixture, weights)


def share_by_mixture(params: Any, mixture: Mixture, patterns: Sequence[str] = KERNELS) -> Any:
    """Gives each weight the mean of the component that is most responsible for it.

    Call `merge` on the mixture before. What belongs to the component at zero becomes exactly 0. A
    leaf becomes a `SparseArray` of a codebook where that takes less than a codebook of all weights
    with 0 among its centroids, as it does at the usual shares of zeros; its zeros are never trained
    again, while in the latter 0 is a centroid like others. The values are not those that were
    trained with: `sharing_gap` tells by how much.

    Args:
      params: any pytree, concrete.
      mixture: the trained one, of at most 255 components besides zero.
      patterns: as in `soft_sharing`.

    Returns:
      The tree with `SparseArray` and `CodebookArray` leaves, each with its own codebook of the
      centroids that it uses.

    Raises:
      RuleError: for a pattern that matches nothing.
      SpecError: for a leaf that is no dense floating array.

    Examples:
      >>> import jax.numpy as jnp
      >>> scales = jnp.log(jnp.array([0.1, 0.01, 0.01]))
      >>> mixture = Mixture(jnp.zeros(2), jnp.array([-1.0, 1.0]), scales, 0.9)
      >>> params = {"kernel": jnp.array([[0.01, 0.99], [-1.0, -0.02]])}
      >>> share_by_mixture(params, mixture, ["kernel"])["kernel"].materialize().tolist()
      [[0.0, 1.0], [-1.0, 0.0]]
    """
    if mixture.means.shape[0] > 255:
        raise SpecError(f"{mixture!r}: a codebook has at most 256 values; merge components first")
    leaves, structure = flatten(params)
    out = [leaf for _, leaf in leaves]
    for i in _chosen(leaves, patterns):
        out[i] = _shared(jnp.asarray(out[i]), mixture)
    return jax.tree.unflatten(structure, out)


def _chosen(leaves: Sequence[tuple[str, Any]], patterns: Sequence[str]) -> list[int]:
    rules = dict.fromkeys(patterns)
    hits = match(rules, [path for path, _ in leaves])
    chosen = [i for i, hit in enumerate(hits) if hit is not None]
    for i in chosen:
        path, leaf = leaves[i]
        if is_compressed(leaf) or not leaf.ndim or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise SpecError(f"{path}: {leaf!r} is no dense floating array of weights")
    return chosen


_assign = jax.jit(Mixture.assign)


def _shared(w: jax.Array, mixture: Mixture) -> Any:
    """The smaller of the two forms of one leaf."""
    index = _assign(mixture, w)
    values = rounded(mixture.all_means(), w.dtype)
    found: list[Any] = [_codebook(np.asarray(index), values)]
    kept = np.asarray(index != 0)
    if w.ndim and w.size < 2**31 and not kept.all():
        sparse = SparseArray.from_mask(w, jnp.asarray(kept))
        inner = _codebook(np.asarray(index)[kept], values)
        found.append(sparse.replace(values=inner))
    return min(found, key=nbytes)


def _codebook(index: Any, values: jax.Array) -> CodebookArray:
    """A codebook of the values that are used, in the order of the components."""
    shape = index.shape
    used, index = np.unique(index, return_inverse=True)
    used = used if used.size else np.zeros(1, np.int64)
    bits = max(1, (used.size - 1).bit_length())
    codes: Any = jnp.asarray(index.reshape(shape), jnp.uint8)
    if bits < 8:
        block = block_for(shape[-1], bits, -1, None)
        codes = PackedArray.pack(codes, bits, axis=-1, block=block)
    return CodebookArray(codes, values[used], -1)


def sharing_gap(before: Any, after: Any) -> dict[str, dict[str, float]]:
    """How far the weights that are stored are from those that were trained, leaf by leaf.

    Args:
      before: the tree that was trained.
      after: the same tree with some leaves in another form.

    Returns:
      For the path of each compressed leaf of `after`: `max`, the largest difference; `rms`, the
      root of the mean squared one; `relative`, `rms` over that of the weights.

    Raises:
      SpecError: for trees of different leaves.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> w = {"w": jnp.array([[0.0, 1.0, 3.0]])}
      >>> gap = sharing_gap(w, {"w": jc.Codebook(1)(w["w"])})["w"]
      >>> gap["max"], round(gap["rms"], 4)
      (0.5, 0.4082)
    """
    old, new = dict(flatten(before)[0]), dict(flatten(after)[0])
    if old.keys() != new.keys():
        raise SpecError(f"the trees differ at {sorted(old.keys() ^ new.keys())[:3]}")
    out = {}
    for path, leaf in new.items():
        if is_compressed(leaf):
            w = np.asarray(materialize(old[path])).astype(np.float64)
            apart = w - np.asarray(leaf.materialize()).astype(np.float64)
            rms, size = (float(np.sqrt(np.mean(x**2))) if x.size else 0.0 for x in (apart, w))
            most = float(np.max(np.abs(apart), initial=0))
            out[path] = {"max": most, "rms": rms, "relative": rms / size if size else 0.0}
    return out
