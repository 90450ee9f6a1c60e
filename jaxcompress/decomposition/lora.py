"""`LoRA`: train a low-rank change of a weight that stays as it is."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.arrays.adapted import AdaptedArray
from jaxcompress.arrays.base import CompressedArray, is_compressed
from jaxcompress.arrays.low_rank import LowRankArray
from jaxcompress.decomposition.ranks import check_possible
from jaxcompress.decomposition.sides import Sides
from jaxcompress.errors import SpecError
from jaxcompress.rules import default_axes
from jaxcompress.specs import (
    LeafContext,
    Plan,
    Spec,
    is_count,
    is_floating_dtype,
    is_number,
    mesh_sharding,
    on_all_devices,
    register_spec,
)


@register_spec("lora")
@dataclasses.dataclass(frozen=True, repr=False)
class LoRA(Spec):
    """A trainable change of low rank beside a weight, dense or compressed, that is not trained.

    `w = base + (alpha / r) a b`, where a, on the side of the inputs, starts from Gaussian values of
    variance 1 / in and b, on that of the outputs, from zeros: at first the function is what it was,
    exactly. The leaf is an `AdaptedArray`, whose docstring says what `finalize` does. It goes
    around any leaf, after what made that small, so that QLoRA is
    `chain(Quantize("nf4", group_size=64), LoRA(16))`, and on a tree that is compressed already.
    A base that is dense is held, not copied.

    `jaxcompress.partition` would have an optimizer train the dense leaves of the tree as well, its
    biases for instance; `jaxcompress.decomposition.partition_adapters` gives it the changes alone.

    Args:
      rank: the rank r, from 1 to `min(in, out)`; the axes on each side count together.
      alpha: the numerator of the scale. None: what makes the scale one.
      rank_stabilized: scale by `alpha / sqrt(r)` in place of `alpha / r`, so that changes of higher
        rank learn as fast.
      dtype: of the factors, such as `float32` beside a bfloat16 base; they are used in that of the
        base. None: the same.

    Raises:
      SpecError: for values that cannot be, a leaf that is no matrix or too small for the rank, or
        without a key.

    References:
      Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, 2022; Dettmers et al.,
      *QLoRA: Efficient Finetuning of Quantized LLMs*, 2023; Kalajdzievski, *A Rank Stabilization
      Scaling Factor for Fine-Tuning with LoRA*, 2023.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.decomposition.lora import LoRA
      >>> params = {"kernel": jnp.ones((128, 64))}
      >>> qlora = jc.chain(jc.Quantize("nf4", group_size=64), LoRA(16))
      >>> jc.compress(params, {"kernel": qlora}, key=jax.random.key(0))
      {'kernel': AdaptedArray(float32[128, 64], nf4/64 + rank 16)}
    """

    rank: int
    _: dataclasses.KW_ONLY
    alpha: float | None = None
    rank_stabilized: bool = False
    dtype: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_count(self.rank, 1):
            raise SpecError(f"rank={self.rank!r}: write a whole number of at least 1")
        if self.alpha is not None and not (is_number(self.alpha, 0) and self.alpha > 0):
            raise SpecError(f"alpha={self.alpha!r}: write a number above 0, such as 16")
        if not isinstance(self.rank_stabilized, bool):
            raise SpecError(f"rank_stabilized={self.rank_stabilized!r}: write True or False")
        if self.dtype is not None and not is_floating_dtype(self.dtype):
            raise SpecError(f"dtype={self.dtype!r}: write a floating dtype such as 'float32'")

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        if self.alpha is None:
            return 1.0
        return float(self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank))

    def plan(self, leaf: Any, context: LeafContext) -> Plan:
        """Settles the sides of the factors."""
        sides = Sides.of(leaf, context)
        check_possible(self.rank, *sides.sizes, context.path)
        if context.key is None:
            raise SpecError(
                f"{context.path}: LoRA draws its first factor and needs a key: write "
                "compress(..., key=jax.random.key(0))"
            )
        return _LoRAPlan(self, sides)

    def __call__(self, leaf: Any, context: LeafContext | None = None) -> Any:
        """Puts an array or a leaf beside a change that is zero."""
        if context is None:
            context = LeafContext("leaf", default_axes("leaf", leaf.ndim))
        leaf = leaf if is_compressed(leaf) else jnp.asarray(leaf)
        plan = self.plan(leaf, context)
        assert isinstance(plan, _LoRAPlan)
        delta = _zero_change(plan, jnp.dtype(self.dtype or leaf.dtype), context.key)
        return AdaptedArray.of(leaf, _placed(delta, leaf), scale=self.scale)


@dataclasses.dataclass(frozen=True)
class _LoRAPlan(Plan):
    spec: LoRA
    sides: Sides

    def apply(self, leaf: jax.Array, key: jax.Array | None) -> CompressedArray:
        dtype = jnp.dtype(self.spec.dtype or leaf.dtype)
        return AdaptedArray(leaf, _zero_change(self, dtype, key), self.spec.scale)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _zero_change(plan: _LoRAPlan, dtype: Any, key: jax.Array) -> LowRankArray:
    sides, rank = plan.sides, plan.spec.rank
    lead, (m, n) = sides.shape[: sides.batch], sides.sizes
    inputs = m if sides.inputs_first else n
    drawn = jax.random.normal(key, (*lead, inputs, rank)) * inputs**-0.5
    if sides.inputs_first:
        left, right = drawn, jnp.zeros((*lead, rank, n))
    else:
        left, right = jnp.zeros((*lead, m, rank)), jnp.swapaxes(drawn, -1, -2)
    return sides.factors(left.astype(dtype), right.astype(dtype))


def _placed(delta: LowRankArray, leaf: Any) -> Any:
    """The change where its weight lies: split like a dense one, whole on each device of another."""
    sharding = None if is_compressed(leaf) else mesh_sharding(leaf)
    if sharding is not None:
        return jax.device_put(delta, delta.shardings(sharding))
    like = jax.tree.leaves(leaf)[0]
    return jax.tree.map(lambda x: on_all_devices(x, like), delta)
