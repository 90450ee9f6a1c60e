"""`Codebook`: all weights of a leaf share a few values."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.arrays.codebook import CodebookArray
from jaxcompress.arrays.packed import PackedArray, block_for
from jaxcompress.errors import SpecError
from jaxcompress.numerics import rounded
from jaxcompress.sharing.kmeans import assign, kmeans_1d
from jaxcompress.specs import LeafContext, Plan, Spec, is_count, register_spec

INITS = ("linear", "density", "random")


@register_spec("codebook")
@dataclasses.dataclass(frozen=True, repr=False)
class Codebook(Spec):
    """Replaces each weight by the nearest of `2**bits` centroids, found by k-means.

    Minimizes `sum_i (w_i - c[a_i])**2` over the centroids c and the assignment a by Lloyd's
    iteration. Each weight of a stack has its own codebook. The indices take `bits` bits each.

    Args:
      bits: bits per index, 1 to 8.
      init: where the centroids start: `linear` between the least and the greatest weight (Han et
        al. found it best, for it keeps the large weights), `density` at quantiles, `random` at
        weights drawn with the key.
      iterations: at most so many iterations; it stops earlier once nothing moves.

    Raises:
      SpecError: for another number of bits or an unknown init.

    References:
      Han, Mao and Dally, *Deep Compression*, 2016; Lloyd, *Least squares quantization in PCM*,
      1982.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> jc.Codebook(bits=1)(jnp.array([[0.0, 0.5, 2.0, 3.0]])).centroids.tolist()
      [0.25, 2.5]
    """

    bits: int
    _: dataclasses.KW_ONLY
    init: str = "linear"
    iterations: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_count(self.bits, 1, 8):
            raise SpecError(f"Codebook(bits={self.bits!r}): write a whole number from 1 to 8")
        if self.init not in INITS:
            raise SpecError(f"init={self.init!r}: write one of {', '.join(INITS)}")
        if not is_count(self.iterations, 0):
            raise SpecError(f"iterations={self.iterations}: write a whole number of at least 0")

    def plan(self, leaf: Any, context: LeafContext) -> Plan:
        """Settles the axes; a scalar is refused."""
        if leaf.ndim == 0:
            raise SpecError(f"{context.path}: a scalar needs no codebook; leave it dense")
        if self.init == "random" and context.key is None:
            raise SpecError(
                f"{context.path}: Codebook(init='random') needs a key: compress(..., key=...)"
            )
        return _CodebookPlan(self, max(context.axes.input), context.axes.batch_ndim(leaf.ndim))


@dataclasses.dataclass(frozen=True)
class _CodebookPlan(Plan):
    spec: Codebook
    axis: int
    batch_ndim: int

    def apply(self, leaf: jax.Array, key: jax.Array | None) -> CodebookArray:
        spec = self.spec

        def one(w: jax.Array) -> tuple[jax.Array, jax.Array]:
            if not w.size:  # everything was pruned
                return jnp.zeros(w.shape, jnp.uint8), jnp.zeros(2**spec.bits, w.dtype)
            centroids = kmeans_1d(
                w, 2**spec.bits, init=spec.init, iterations=spec.iterations, key=key
            )
            # Codes are found for the centroids as stored, in the dtype of the weights.
            centroids = rounded(centroids, w.dtype)
            return assign(w, centroids), centroids

        for _ in range(self.batch_ndim):
            one = jax.vmap(one)
        indices, centroids = one(leaf)
        packed: Any = indices
        if spec.bits < 8:
            block = block_for(leaf.shape[self.axis], spec.bits, self.axis, None)
            packed = PackedArray.pack(indices, spec.bits, axis=self.axis, block=block)
        return CodebookArray(packed, centroids, self.axis)
