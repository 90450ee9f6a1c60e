"""Leaves whose values are soft mixtures of centroids while they are trained."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import CompressedArray, register_array
from jaxcompress.arrays.codebook import CodebookArray
from jaxcompress.arrays.packed import PackedArray, block_for
from jaxcompress.numerics import rounded
from jaxcompress.quantization.learned.straight import straight_through
from jaxcompress.sharing.kmeans import assign
from jaxcompress.sharing.soft_kmeans import soft_histogram, soft_kmeans, soft_values


class SoftCodebookArray(CompressedArray):
    """A dense weight whose values are soft mixtures of a few centroids; what both methods share.

    Attributes:
      weight: the dense weight, trained.
      centroids: `[*batch, k]`, float32.
      tau: the temperature, `[*batch]`, float32, in squared units of the weight.
      hard: whether forward each weight is its nearest centroid, as it will be stored, and only the
        gradient is the soft one.
      axis: along which indices will be packed, negative.
      float_dtype: the dtype of the dense array.
    """

    weight: Any
    centroids: Any
    tau: Any
    hard: Any
    axis: Any
    float_dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.float_dtype

    @property
    def batch_ndim(self) -> int:
        return self.centroids.ndim - 1

    def converged(self) -> jax.Array:
        """The centroids of the soft values, `[*batch, k]`; differentiable."""
        return self.centroids

    def soft(self) -> jax.Array:
        """The soft values, float32."""

        def one(w: jax.Array, c: jax.Array, tau: jax.Array) -> jax.Array:
            return soft_values(w.reshape(-1, 1), c[:, None], tau).reshape(w.shape)

        return self._mapped(one)(self.weight, self.converged(), self.tau)

    def histogram(self) -> jax.Array:
        """The soft share of each centroid, `[*batch, k]`; differentiable."""
        one = lambda w, c, tau: soft_histogram(w.reshape(-1, 1), c[:, None], tau)
        return self._mapped(one)(self.weight, self.converged(), self.tau)

    def grid(self, centroids: jax.Array) -> CodebookArray:
        """The stored leaf of some centroids, with indices that are not packed."""
        ordered = rounded(jnp.sort(centroids, axis=-1), self.float_dtype)
        return CodebookArray(self._mapped(assign)(self.weight, ordered), ordered, self.axis)

    def materialize(self, key: jax.Array | None = None) -> jax.Array:
        soft = rounded(self.soft(), self.float_dtype)
        if not self.hard:
            return soft
        fixed = jax.tree.map(jax.lax.stop_gradient, self)
        return straight_through(fixed.grid(fixed.centroids).materialize(), soft)

    def finalize(self) -> CompressedArray:
        """The `CodebookArray` of the nearest centroids, those of `hard` as they are."""
        return _finalized(self)

    def describe(self) -> str:
        kind = " hard" if self.hard else ""
        return f"{self.form.replace('_', ' ')} {self.centroids.shape[-1]}{kind}"

    def _mapped(self, fn: Any) -> Any:
        for _ in range(self.batch_ndim):
            fn = jax.vmap(fn)
        return fn


@jax.jit
def _finalized(leaf: SoftCodebookArray) -> CodebookArray:
    found = leaf.grid(leaf.centroids if leaf.hard else leaf.converged())
    bits = max(1, (found.centroids.shape[-1] - 1).bit_length())
    if bits >= 8:
        return found
    block = block_for(leaf.shape[leaf.axis], bits, leaf.axis, None)
    packed = PackedArray.pack(found.indices, bits, axis=leaf.axis, block=block)
    return found.replace(indices=packed)


@register_array(
    "dkm",
    children=("weight", "centroids", "tau"),
    static=("iterations", "hard", "axis", "float_dtype"),
    trainable=("weight",),
)
class DKMArray(SoftCodebookArray):
    """A weight that is clustered anew in each forward pass, differentiably.

    From the centroids that it holds, `iterations` steps of `soft_kmeans`; then
    `w~_i = sum_j softmax_j(-(w_i - c_j)^2 / tau) c_j`. The gradient goes through all steps, so that
    weights move to where they cluster well. Published is this soft value; what is stored after
    `finalize` is the nearest centroid, and `soft_to_hard_gap` tells the difference, which falls
    with tau.

    With `hard`, each weight is forward its nearest centroid of those that the leaf holds, bit for
    bit as `finalize` stores it, and only the gradient is that of the soft value. These centroids
    follow the weights when `refresh` is called, after each step of the optimizer. Without `hard`,
    `refresh` makes that fewer iterations are needed.

    Attributes:
      weight: the dense weight, trained.
      centroids: `[*batch, k]`, float32, where the iterations start; no gradient.
      tau: the temperature, `[*batch]`, float32, in squared units of the weight.
      iterations: steps of soft k-means.
      hard: see above.
      axis: along which indices will be packed, negative.
      float_dtype: the dtype of the dense array.

    References:
      Cho, Alizadeh-Vahid, Adya and Rastegari, *DKM: Differentiable K-Means Clustering Layer for
      Neural Network Compression*, 2022.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxcompress.sharing.dkm import DKM
      >>> leaf = DKM(1, hard=True)(jnp.array([[0.0, 0.5, 2.0, 3.0]]))
      >>> leaf, leaf.materialize().tolist()
      (DKMArray(float32[1, 4], dkm 2 hard), [[0.25, 0.25, 2.5, 2.5]])
      >>> leaf.finalize()
      CodebookArray(float32[1, 4], codebook 2)
    """

    weight: Any
    centroids: Any
    tau: Any
    iterations: int
    hard: bool
    axis: int
    float_dtype: np.dtype

    def converged(self) -> jax.Array:
        def one(w: jax.Array, c: jax.Array, tau: jax.Array) -> jax.Array:
            return soft_kmeans(w.reshape(-1, 1), c[:, None], tau, self.iterations)[:, 0]

        start = jax.lax.stop_gradient(self.centroids)
        return self._mapped(one)(self.weight, start, self.tau)


@register_array(
    "soft_to_hard",
    children=("weight", "centroids", "tau"),
    static=("hard", "axis", "float_dtype"),
    trainable=("weight", "centroids"),
)
class SoftToHardArray(SoftCodebookArray):
    """A weight as a soft mixture of centroids that are trained, hardened by annealing.

    `w~_i = sum_j softmax_j(-sigma (w_i - c_j)^2) c_j` with `tau = 1 / sigma`: multiply tau by less
    than one now and then (`annealed`), and the values become those that `finalize` stores;
    `soft_to_hard_gap` tells how near they are. `soft_entropy` is the loss that makes indices cheap
    to code.

    Attributes:
      weight: the dense weight, trained.
      centroids: `[*batch, k]`, float32, trained.
      tau: the temperature, `[*batch]`, float32, in squared units of the weight.
      hard: whether the forward pass has the stored values already, bit for bit.
      axis: along which indices will be packed, negative.
      float_dtype: the dtype of the dense array.

    References:
      Agustsson et al., *Soft-to-Hard Vector Quantization for End-to-End Learning Compressible
      Representations*, 2017.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxcompress.sharing.dkm import SoftToHard
      >>> SoftToHard(1)(jnp.array([[0.0, 0.5, 2.0, 3.0]]))
      SoftToHardArray(float32[1, 4], soft to hard 2)
    """

    weight: Any
    centroids: Any
    tau: Any
    hard: bool
    axis: int
    float_dtype: np.dtype
