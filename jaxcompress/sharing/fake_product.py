"""`FakeProductQuantize`: weights that are trained as the vectors they will be stored as."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.arrays.base import CompressedArray, is_compressed
from jaxcompress.arrays.fake_product import FakeProductArray
from jaxcompress.arrays.product import blocks_of
from jaxcompress.errors import SpecError
from jaxcompress.numerics import rounded
from jaxcompress.sharing.product import BlockSpec
from jaxcompress.sharing.vectors import kmeans
from jaxcompress.specs import LeafContext, Plan, Spec, is_count, register_spec


@register_spec("fake_product_quantize")
@dataclasses.dataclass(frozen=True, repr=False)
class FakeProductQuantize(Spec):
    """A dense weight that computes as the leaf of `ProductQuantize` would, and is trained.

    `QuantNoise(FakeProductQuantize(ProductQuantize(block=4)), 0.1, block_size=4)` rounds a random
    tenth of the blocks in each step, as Quant-Noise does before iPQ.

    Args:
      spec: `ProductQuantize` or `ResidualQuantize`, without weighting.

    Raises:
      SpecError: for another spec.

    References:
      Fan et al., *Training with Quantization Noise for Extreme Model Compression*, 2021.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxcompress.sharing.product import ProductQuantize
      >>> w = jax.random.normal(jax.random.key(0), (8, 6))
      >>> leaf = FakeProductQuantize(ProductQuantize(block=2, bits=3))(w)
      >>> leaf
      FakeProductArray(float32[8, 6], fake product 8 x 2)
      >>> leaf.finalize()
      ProductArray(float32[8, 6], product 8 x 2)
    """

    spec: BlockSpec

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.spec, BlockSpec) or self.spec.weighting is not None:
            raise SpecError(
                f"spec={self.spec!r}: write ProductQuantize or ResidualQuantize, without weighting"
            )

    def plan(self, leaf: Any, context: LeafContext) -> Plan:
        """Plans the codebooks."""
        return _FakePlan(self.spec.plan(leaf, context))


@dataclasses.dataclass(frozen=True)
class _FakePlan(Plan):
    inner: Plan

    def apply(self, leaf: jax.Array, key: jax.Array | None) -> FakeProductArray:
        stored: Any = self.inner.apply(leaf, key)
        return FakeProductArray(leaf, stored.codebooks, stored.axis, stored.float_dtype)


def refresh_codebooks(tree: Any, iterations: int = 5) -> Any:
    """Fits the codebooks of all `FakeProductArray`s of a tree to the present weights.

    k-means goes on from the codebooks as they are, one stage after the other. Once an epoch is
    often enough.

    Args:
      tree: any tree; all else stays as it is.
      iterations: of k-means.

    Returns:
      The tree.

    Raises:
      SpecError: for iterations below 1.

    References:
      Fan et al., *Training with Quantization Noise for Extreme Model Compression*, 2021.

    Examples:
      >>> import jax.numpy as jnp
      >>> books = jnp.array([[[[0.0], [1.0]]]])
      >>> leaf = FakeProductArray(jnp.array([1.0, 3.0, 8.0]), books, -1, jnp.dtype("float32"))
      >>> refresh_codebooks({"w": leaf})["w"].codebooks.ravel().tolist()
      [8.0, 2.0]
    """
    if not is_count(iterations, 1):
        raise SpecError(f"iterations={iterations!r}: write a whole number of at least 1")

    def refresh(x: Any) -> Any:
        if isinstance(x, FakeProductArray):
            return _refreshed(x, int(iterations))
        if not isinstance(x, CompressedArray):
            return x
        return x.replace(**{name: refresh(getattr(x, name)) for name in x.children})

    return jax.tree.map(refresh, tree, is_leaf=is_compressed)


def _refreshed(leaf: FakeProductArray, iterations: int) -> FakeProductArray:
    lead = leaf.batch_ndim
    flat = lambda x: x.reshape(-1, *x.shape[lead:])
    refit = lambda xs: _refit(xs[0], xs[1], leaf.axis, iterations)
    books = jax.lax.map(refit, (flat(leaf.weight), flat(leaf.codebooks)))
    return leaf.replace(codebooks=books.reshape(leaf.codebooks.shape))


def _refit(w: jax.Array, books: jax.Array, axis: int, iterations: int) -> jax.Array:
    stages, m, k, d = books.shape
    rest = blocks_of(w, axis, d).reshape(m, -1, d)
    counts = blocks_of(jnp.ones_like(w), axis, d).reshape(rest.shape)  # not what fills a block up
    found = []
    for s in range(stages):
        fit = lambda xs: kmeans(xs[0], k, weights=xs[1], init=xs[2], iterations=iterations)
        start = books[s].astype(jnp.float32)
        better = rounded(jax.lax.map(fit, (rest, counts, start)).centroids, books.dtype)
        found.append(better)
        wide = better.astype(jnp.float32)
        at = jax.lax.map(
            lambda xs: kmeans(xs[0], k, weights=xs[1], init=xs[2], iterations=0).indices,
            (rest, counts, wide),
        )
        rest = rest - jax.vmap(lambda table, i: table[i])(wide, at)
    return jnp.stack(found)
