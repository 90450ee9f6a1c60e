"""Codebooks that are trained through soft assignments: DKM, and soft-to-hard quantization."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import CompressedArray
from jaxcompress.compress import finalize
from jaxcompress.errors import SpecError
from jaxcompress.sharing.kmeans import kmeans_1d
from jaxcompress.sharing.soft import sharing_gap
from jaxcompress.sharing.soft_codebook import DKMArray, SoftCodebookArray, SoftToHardArray
from jaxcompress.specs import LeafContext, Plan, Spec, is_count, is_number, register_spec


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


def _is_soft(x: Any) -> bool:
    return isinstance(x, SoftCodebookArray)


def _on_soft(fn: Any, tree: Any) -> Any:
    """A function of each soft codebook, also of those within other leaves."""
    return jax.tree.map(lambda x: fn(x) if _is_soft(x) else x, tree, is_leaf=_is_soft)


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
    """How far the values of each compressed leaf are from those that `finalize` stores.

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
    for leaf in jax.tree.leaves(tree, is_leaf=_is_soft):
        if _is_soft(leaf) and leaf.size:
            q = leaf.histogram()
            some = q > 0
            bits = -jnp.sum(jnp.where(some, q * jnp.log2(jnp.where(some, q, 1)), 0), axis=-1)
            each = leaf.size // max(1, int(np.prod(bits.shape)))
            total = total + each * jnp.sum(bits)
    return total
