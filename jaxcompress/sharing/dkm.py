"""Codebooks that are trained through soft assignments: DKM, and soft-to-hard quantization."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import CompressedArray, is_compressed, register_array
from jaxcompress.arrays.codebook import CodebookArray
from jaxcompress.arrays.packed import PackedArray, block_for
from jaxcompress.compress import finalize
from jaxcompress.errors import SpecError
from jaxcompress.numerics import rounded
from jaxcompress.quantization.learned.straight import straight_through
from jaxcompress.sharing.kmeans import assign, kmeans_1d
from jaxcompress.sharing.soft import sharing_gap
from jaxcompress.sharing.soft_kmeans import soft_histogram, soft_kmeans, soft_values
from jaxcompress.specs import LeafContext, Plan, Spec, is_count, is_number, register_spec


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
      >>> SoftToHard(1)(jnp.array([[0.0, 0.5, 2.0, 3.0]]))
      SoftToHardArray(float32[1, 4], soft to hard 2)
    """

    weight: Any
    centroids: Any
    tau: Any
    hard: bool
    axis: int
    float_dtype: np.dtype


@dataclasses.dataclass(frozen=True, repr=False)
class _SoftCodebook(Spec):
    bits: int
    _: dataclasses.KW_ONLY
    temperature: float = 5e-3
    hard: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if not is_count(self.bits, 1, 8):
            raise SpecError(f"{name}(bits={self.bits!r}): write a whole number from 1 to 8")
        if not is_number(self.temperature, 0) or not self.temperature:
            raise SpecError(f"temperature={self.temperature!r}: write a positive number")
        if not isinstance(self.hard, bool):
            raise SpecError(f"hard={self.hard!r}: write True or False")

    def plan(self, leaf: Any, context: LeafContext) -> Plan:
        """Settles the axes; a scalar is refused."""
        if leaf.ndim == 0:
            raise SpecError(f"{context.path}: a scalar needs no codebook; leave it dense")
        return _SoftPlan(self, max(context.axes.input), context.axes.batch_ndim(leaf.ndim))

    def leaf(self, w: jax.Array, centroids: jax.Array, tau: jax.Array, axis: int) -> Any:
        """The leaf of its parts."""
        raise NotImplementedError


@register_spec("dkm")
@dataclasses.dataclass(frozen=True, repr=False)
class DKM(_SoftCodebook):
    """Trains a weight through a differentiable clustering; see `DKMArray`.

    The centroids start at those of k-means.

    Args:
      bits: bits per index, 1 to 8.
      temperature: tau in units of the variance of the weight.
      hard: whether the forward pass has the values that will be stored.
      iterations: of soft k-means in each forward pass.

    Raises:
      SpecError: for values that cannot be.

    References:
      Cho, Alizadeh-Vahid, Adya and Rastegari, *DKM: Differentiable K-Means Clustering Layer for
      Neural Network Compression*, 2022.

    Examples:
      >>> import jax.numpy as jnp
      >>> DKM(2)(jnp.linspace(0.0, 1.0, 64).reshape(8, 8))
      DKMArray(float32[8, 8], dkm 4)
    """

    _: dataclasses.KW_ONLY
    iterations: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_count(self.iterations, 0):
            raise SpecError(f"iterations={self.iterations!r}: write a whole number of at least 0")

    def leaf(self, w: jax.Array, centroids: jax.Array, tau: jax.Array, axis: int) -> Any:
        """The leaf of its parts."""
        return DKMArray(w, centroids, tau, self.iterations, self.hard, axis, np.dtype(w.dtype))


@register_spec("soft_to_hard")
@dataclasses.dataclass(frozen=True, repr=False)
class SoftToHard(_SoftCodebook):
    """Trains a weight and its codebook through soft assignments; see `SoftToHardArray`.

    The centroids start at those of k-means.

    Args:
      bits: bits per index, 1 to 8.
      temperature: tau in units of the variance of the weight.
      hard: whether the forward pass has the values that will be stored.

    Raises:
      SpecError: for values that cannot be.

    References:
      Agustsson et al., *Soft-to-Hard Vector Quantization for End-to-End Learning Compressible
      Representations*, 2017.

    Examples:
      >>> import jax.numpy as jnp
      >>> SoftToHard(2, hard=True)(jnp.linspace(0.0, 1.0, 64).reshape(8, 8))
      SoftToHardArray(float32[8, 8], soft to hard 4 hard)
    """

    def leaf(self, w: jax.Array, centroids: jax.Array, tau: jax.Array, axis: int) -> Any:
        """The leaf of its parts."""
        return SoftToHardArray(w, centroids, tau, self.hard, axis, np.dtype(w.dtype))


@dataclasses.dataclass(frozen=True)
class _SoftPlan(Plan):
    spec: _SoftCodebook
    axis: int
    batch_ndim: int

    def apply(self, leaf: jax.Array, key: jax.Array | None) -> CompressedArray:
        def one(w: jax.Array) -> tuple[jax.Array, jax.Array]:
            if not w.size:
                return jnp.zeros(2**self.spec.bits, jnp.float32), jnp.ones((), jnp.float32)
            wide = w.astype(jnp.float32)
            tau = self.spec.temperature * jnp.var(wide)
            # Of equal weights, any temperature will do but 0.
            tau = jnp.where(tau > jnp.finfo(jnp.float32).tiny, tau, 1.0)
            return kmeans_1d(wide, 2**self.spec.bits), tau

        for _ in range(self.batch_ndim):
            one = jax.vmap(one)
        return self.spec.leaf(leaf, *one(leaf), self.axis)


def _on_soft(fn: Any, tree: Any) -> Any:
    one = lambda x: fn(x) if isinstance(x, SoftCodebookArray) else x
    return jax.tree.map(one, tree, is_leaf=is_compressed)


def refresh(tree: Any) -> Any:
    """The tree with the centroids of each `DKMArray` where its iterations end; pure.

    Examples:
      >>> import jax.numpy as jnp
      >>> leaf = DKM(1, hard=True)(jnp.array([[0.0, 1.0, 9.0]]))
      >>> moved = leaf.replace(weight=leaf.weight + 1)
      >>> refresh({"w": moved})["w"].centroids.tolist()
      [1.5, 10.0]
    """
    fixed = lambda x: jax.lax.stop_gradient(x.converged())
    return _on_soft(lambda x: x.replace(centroids=fixed(x)) if isinstance(x, DKMArray) else x, tree)


def annealed(tree: Any, factor: Any) -> Any:
    """The tree with the temperature of each soft codebook times a factor; pure, no retrace.

    Examples:
      >>> import jax.numpy as jnp
      >>> leaf = SoftToHard(1)(jnp.array([[0.0, 2.0]]))
      >>> float(annealed(leaf, 0.5).tau / leaf.tau)
      0.5
    """
    return _on_soft(lambda x: x.replace(tau=x.tau * jnp.asarray(factor, jnp.float32)), tree)


def soft_to_hard_gap(tree: Any) -> dict[str, dict[str, float]]:
    """How far the values of each soft codebook are from those that `finalize` stores.

    Returns:
      As `sharing_gap`, by path; 0 for leaves that are `hard`.

    Examples:
      >>> import jax.numpy as jnp
      >>> soft_to_hard_gap({"w": DKM(1, hard=True)(jnp.array([[0.0, 1.0, 9.0]]))})["w"]["max"]
      0.0
    """
    return sharing_gap(tree, finalize(tree))


def soft_entropy(tree: Any) -> jax.Array:
    """The bits that the indices of all soft codebooks of a tree would take, coded; a loss term.

    `sum_leaves n H(q)`, with `H(q) = -sum_j q_j log2 q_j` of the soft histogram q. As tau falls it
    becomes the entropy of the indices that are stored.

    Returns:
      A float32 scalar, differentiable in weights and centroids.

    References:
      Agustsson et al., *Soft-to-Hard Vector Quantization for End-to-End Learning Compressible
      Representations*, 2017 (section 3.3).

    Examples:
      >>> import jax.numpy as jnp
      >>> leaf = SoftToHard(1, temperature=1e-4)(jnp.array([[0.0, 0.1, 2.0, 2.1]]))
      >>> float(soft_entropy({"w": leaf}))
      4.0
    """
    total = jnp.zeros((), jnp.float32)
    for leaf in jax.tree.leaves(tree, is_leaf=is_compressed):
        if isinstance(leaf, SoftCodebookArray) and leaf.size:
            q = leaf.histogram()
            some = q > 0
            bits = -jnp.sum(jnp.where(some, q * jnp.log2(jnp.where(some, q, 1)), 0), axis=-1)
            each = leaf.size // max(1, int(np.prod(bits.shape)))
            total = total + each * jnp.sum(bits)
    return total
