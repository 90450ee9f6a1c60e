"""`Codebook`: all weights of a leaf share a few values."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.arrays.codebook import CodebookArray, ZeroCodebookArray
from jaxcompress.arrays.packed import PackedArray, block_for
from jaxcompress.errors import SpecError
from jaxcompress.numerics import rounded
from jaxcompress.sharing.kmeans import INITS, assign, kmeans_1d
from jaxcompress.sharing.weighting import WeighedPlan, WeighedSpec
from jaxcompress.specs import LeafContext, Plan, is_count, register_spec


@register_spec("codebook")
@dataclasses.dataclass(frozen=True, repr=False)
class Codebook(WeighedSpec):
    """Replaces each weight by the nearest of `2**bits` centroids, found by k-means.

    Minimizes `sum_i (w_i - c[a_i])**2` over the centroids c and the assignment a by Lloyd's
    iteration. Each weight of a stack has its own codebook. The indices take `bits` bits each.
    With importances, `sum_i h_i (w_i - c[a_i])**2`: `weighting` takes them from the inputs, and
    `Codebook(4).fit(w, h)` those of any kind, such as the Fisher information.

    Args:
      bits: bits per index, 1 to 8.
      init: where the centroids start: `linear` between the least and the greatest weight (Han et
        al. found it best, for it keeps the large weights), `density` at quantiles, `random` at
        weights drawn with the key, `k-means++` at drawn weights that are far from each other.
      iterations: at most so many iterations; it stops earlier once nothing moves.
      zero: whether one centroid is 0 and stays, so that a pruned zero does.
      weighting: `"second_moment"`: each weight counts as the mean square of the input that it
        meets, from `compress(..., stats=)`; None: all alike.

    Raises:
      SpecError: for another number of bits or an unknown init.

    References:
      Han, Mao and Dally, *Deep Compression*, 2016; Lloyd, *Least squares quantization in PCM*,
      1982; Choi, El-Khamy and Lee, *Towards the Limit of Network Quantization*, 2017 (importances).

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> jc.Codebook(bits=1)(jnp.array([[0.0, 0.5, 2.0, 3.0]])).centroids.tolist()
      [0.25, 2.5]
    """

    bits: int
    _: dataclasses.KW_ONLY
    init: str = "linear"
    iterations: int = 50
    zero: bool = False
    weighting: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_count(self.bits, 1, 8):
            raise SpecError(f"Codebook(bits={self.bits!r}): write a whole number from 1 to 8")
        if self.init not in INITS:
            raise SpecError(f"init={self.init!r}: write one of {', '.join(INITS)}")
        if not is_count(self.iterations, 0):
            raise SpecError(f"iterations={self.iterations}: write a whole number of at least 0")
        if not isinstance(self.zero, bool):
            raise SpecError(f"zero={self.zero!r}: write True or False")
        if self.weighting not in (None, "second_moment"):
            raise SpecError(f"weighting={self.weighting!r}: write 'second_moment' or None")

    def plan(self, leaf: Any, context: LeafContext) -> Plan:
        """Settles the axes; a scalar is refused."""
        if leaf.ndim == 0:
            raise SpecError(f"{context.path}: a scalar needs no codebook; leave it dense")
        if self.init in ("random", "k-means++") and context.key is None:
            raise SpecError(
                f"{context.path}: Codebook(init={self.init!r}) needs a key: compress(..., key=...)"
            )
        return _CodebookPlan(self, max(context.axes.input), context.axes.batch_ndim(leaf.ndim))


@dataclasses.dataclass(frozen=True)
class _CodebookPlan(WeighedPlan):
    spec: Codebook
    axis: int
    batch_ndim: int

    def solve(self, leaf: jax.Array, key: Any, weights: Any, metric: Any) -> CodebookArray:
        spec = self.spec
        k = 2**spec.bits

        def one(w: jax.Array, h: jax.Array | None) -> tuple[jax.Array, jax.Array]:
            if not w.size:  # everything was pruned
                return jnp.zeros(w.shape, jnp.uint8), jnp.zeros(k, w.dtype)
            centroids = kmeans_1d(
                w, k, weights=h, init=spec.init, zero=spec.zero, iterations=spec.iterations, key=key
            )
            # Codes are found for the centroids as stored, in the dtype of the weights.
            centroids = rounded(centroids, w.dtype)
            return assign(w, centroids), centroids

        for _ in range(self.batch_ndim):
            one = jax.vmap(one)
        indices, centroids = one(leaf, weights)
        if spec.zero:
            indices, centroids = _zero_first(indices, centroids)
        packed: Any = indices
        if spec.bits < 8:
            block = block_for(leaf.shape[self.axis], spec.bits, self.axis, None)
            packed = PackedArray.pack(indices, spec.bits, axis=self.axis, block=block)
        return (ZeroCodebookArray if spec.zero else CodebookArray)(packed, centroids, self.axis)


def _zero_first(indices: jax.Array, centroids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Indices with zero's first, and the centroids `[..., k - 1]` without it."""
    zero = jnp.argmin(jnp.abs(centroids), axis=-1)
    rank = zero.reshape(*zero.shape, *[1] * (indices.ndim - zero.ndim)).astype(indices.dtype)
    # Those below move up by one.
    moved = jnp.where(indices == rank, 0, indices + (indices < rank).astype(indices.dtype))
    others = jnp.arange(centroids.shape[-1] - 1)
    others = others + (others >= zero[..., None])
    return moved.astype(indices.dtype), jnp.take_along_axis(centroids, others, axis=-1)
