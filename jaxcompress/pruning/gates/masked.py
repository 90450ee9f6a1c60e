"""Frozen weights under trained masks: edge-popup and piggyback."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import register_array
from jaxcompress.errors import SpecError
from jaxcompress.pruning.checks import check_number, check_share
from jaxcompress.pruning.gates.base import GateArray, masked
from jaxcompress.pruning.penalties import magnitude
from jaxcompress.pruning.select import kept_count, top_mask
from jaxcompress.specs import LeafContext, Plan, Spec, register_spec


class _Masked(GateArray):
    """A frozen weight times a hard mask, which learns by a straight-through gradient."""

    scores: Any

    def soft(self) -> jax.Array:
        """What the gradient of the mask goes to."""
        raise NotImplementedError

    def value(self) -> jax.Array:
        return masked(self.weight.astype(self.compute_dtype), self.keep(), self.soft())


@register_array(
    "edge_popup",
    children=("weight", "scores"),
    static=("unit", "kept", "float_dtype"),
    trainable=("scores",),
)
class EdgePopupArray(_Masked):
    """A frozen weight of which the `kept` of largest `|score|` are used.

    Forward, `w h` with h 1 at the k largest `|s|`, exactly k, ties by the lowest index. Backward,
    the gradient passes h as if it were `|s|`: `ds = dw w sign(s)`, 0 at 0; w has none.

    Attributes:
      weight: the dense weight, frozen.
      scores: the scores in its shape, float32.
      unit: ones; the count is of weights.
      kept: how many stay of each weight of a stack.
      float_dtype: the dtype of the dense array.

    References:
      Ramanujan et al., *What's Hidden in a Randomly Weighted Neural Network?*, 2020.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> leaf = EdgePopup(0.5)(jnp.array([1.0, -4.0, 2.0, 3.0]))
      >>> leaf.materialize().tolist()
      [0.0, -4.0, 0.0, 3.0]
    """

    weight: Any
    scores: Any
    unit: tuple[int, ...]
    kept: int
    float_dtype: np.dtype

    def soft(self) -> jax.Array:
        return magnitude(self.scores)

    def keep(self) -> jax.Array:
        select = functools.partial(top_mask, k=self.kept)
        for _ in range(self.batch_ndim):
            select = jax.vmap(select)
        return select(jax.lax.stop_gradient(self.scores))


@register_spec("edge_popup")
@dataclasses.dataclass(frozen=True, repr=False)
class EdgePopup(Spec):
    """Frozen weights, trained scores: what is learned is which weights to use.

    Of n weights `round(n * (1 - sparsity))` stay, exactly, at every step. `finalize` stores them as
    a `SparseArray` of the same values, so the logits are the same bits.

    Args:
      sparsity: the share of weights that are not used, from 0 to 1.
      scores: at the beginning: `magnitude`, `|w|`, which starts from the largest weights; or
        `random`, He's uniform `+-sqrt(6 / n)` over the n inputs (the paper's), which needs
        `compress(..., key=...)`.

    Raises:
      SpecError: for another sparsity or other scores, or `random` without a key.

    References:
      Ramanujan et al., *What's Hidden in a Randomly Weighted Neural Network?*, 2020.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.pruning import gates
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 8))}
      >>> spec = gates.EdgePopup(0.5, scores="random")
      >>> params = jc.compress(params, {"kernel": spec}, key=jax.random.key(1))
      >>> jc.finalize(params)["kernel"].kept
      32
    """

    sparsity: float
    _: dataclasses.KW_ONLY
    scores: str = "magnitude"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("sparsity", self.sparsity, "the share of unused weights")
        if self.scores not in ("magnitude", "random"):
            raise SpecError(f"scores={self.scores!r}: write 'magnitude' or 'random'")

    def plan(self, leaf: Any, context: LeafContext) -> Plan:
        """Counts what stays."""
        if self.scores == "random" and context.key is None:
            raise SpecError(
                f"{context.path}: random scores need a key: write compress(..., "
                "key=jax.random.key(0)), or scores='magnitude'"
            )
        batch = context.axes.batch_ndim(leaf.ndim)
        kept = kept_count(math.prod(leaf.shape[batch:]), self.sparsity)
        inputs = math.prod(leaf.shape[axis] for axis in context.axes.input)
        return _PopupPlan(self, batch, kept, max(1, inputs))


@dataclasses.dataclass(frozen=True)
class _PopupPlan(Plan):
    spec: EdgePopup
    batch_ndim: int
    kept: int
    inputs: int

    def apply(self, leaf: jax.Array, key: jax.Array | None) -> EdgePopupArray:
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        scores = jnp.abs(leaf).astype(dtype)
        if self.spec.scores == "random" and key is not None:
            bound = math.sqrt(6 / self.inputs)
            scores = jax.random.uniform(key, leaf.shape, dtype, -bound, bound)
        return EdgePopupArray(
            leaf,
            scores,
            unit=(1,) * (leaf.ndim - self.batch_ndim),
            kept=self.kept,
            float_dtype=np.dtype(leaf.dtype),
        )


@register_array(
    "piggyback",
    children=("weight", "scores"),
    static=("unit", "threshold", "float_dtype"),
    trainable=("scores",),
)
class PiggybackArray(_Masked):
    """A frozen weight under a mask of its own for each task.

    Forward, `w [s >= threshold]`; backward, `ds = dw w`; w has no gradient.

    Attributes:
      weight: the dense weight, frozen.
      scores: s in its shape, float32.
      unit: ones.
      threshold: see above.
      float_dtype: the dtype of the dense array.

    References:
      Mallya, Davis and Lazebnik, *Piggyback: Adapting a Single Network to Multiple Tasks by
      Learning to Mask Weights*, 2018.

    Examples:
      >>> import jax.numpy as jnp
      >>> leaf = Piggyback()(jnp.array([1.0, -4.0]))
      >>> leaf.replace(scores=jnp.array([0.02, 0.001])).materialize().tolist()
      [1.0, 0.0]
    """

    weight: Any
    scores: Any
    unit: tuple[int, ...]
    threshold: float
    float_dtype: np.dtype

    def soft(self) -> jax.Array:
        return self.scores

    def keep(self) -> jax.Array:
        return self.scores >= self.threshold


@register_spec("piggyback")
@dataclasses.dataclass(frozen=True, repr=False)
class Piggyback(Spec):
    """One frozen backbone, and for each task a mask of one bit per weight.

    At the beginning all weights are used. `finalize` stores what the mask leaves, bit for bit. For
    several tasks keep the backbone once, and of each task `leaf.mask()`, which packs to n/8 bytes:
    `jc.PackedArray.pack(leaf.mask().astype("uint8"), 1)`. `apply_masks(backbone, masks)` is the
    network of a task.

    Args:
      threshold: scores of at least this use their weight.
      start: the scores at the beginning.

    Raises:
      SpecError: for numbers that are not finite.

    References:
      Mallya, Davis and Lazebnik, *Piggyback: Adapting a Single Network to Multiple Tasks by
      Learning to Mask Weights*, 2018.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.pruning import gates
      >>> params = jc.compress({"kernel": jnp.ones((4, 2))}, {"kernel": gates.Piggyback()})
      >>> trainable, frozen = jc.partition(params)
      >>> trainable["kernel"].weight is None, frozen["kernel"].scores is None
      (True, True)
    """

    _: dataclasses.KW_ONLY
    threshold: float = 5e-3
    start: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("threshold", self.threshold, 5e-3)
        check_number("start", self.start, 1e-2)

    def plan(self, leaf: Any, context: LeafContext) -> Plan:
        """Knows the axes of one weight."""
        return _PiggybackPlan(self, context.axes.batch_ndim(leaf.ndim))


@dataclasses.dataclass(frozen=True)
class _PiggybackPlan(Plan):
    spec: Piggyback
    batch_ndim: int

    def apply(self, leaf: jax.Array, key: jax.Array | None) -> PiggybackArray:
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        return PiggybackArray(
            leaf,
            jnp.full(leaf.shape, self.spec.start, dtype),
            unit=(1,) * (leaf.ndim - self.batch_ndim),
            threshold=float(self.spec.threshold),
            float_dtype=np.dtype(leaf.dtype),
        )
