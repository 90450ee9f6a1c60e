"""What gates have in common: a trained leaf whose storage form has zeros."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import CompressedArray, narrows
from jaxcompress.arrays.noisy import NoisyArray
from jaxcompress.errors import SpecError
from jaxcompress.pruning.patterns import Pattern, lay
from jaxcompress.pruning.penalties import unit_sizes
from jaxcompress.pruning.spec import Prune
from jaxcompress.rules import KernelAxes
from jaxcompress.specs import LeafContext


class GateArray(NoisyArray):
    """A weight behind gates: dense while it is trained, sparse when it is finalized.

    A subclass registers its children with `register_array`, `weight` among them, and the static
    fields `unit`, the size of a group of weights along each axis of one weight (all ones: each
    weight has a gate of its own), and `float_dtype`. It defines `value` and `keep`; `penalty` and
    `expected` if its gates are drawn or priced, and then `draw` and a child `noise`.

    The children of gates have an axis for each of the weight's, as long as there are groups along
    it, so that stacks of weights have gates of their own.
    """

    weight: Any
    unit: Any
    float_dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.float_dtype

    @property
    def batch_ndim(self) -> int:
        return max(0, self.weight.ndim - len(self.unit))

    @property
    def compute_dtype(self) -> Any:
        """Gates are computed in float32, or in float64 where the weight has it."""
        return jnp.promote_types(self.weight.dtype, jnp.float32)

    def value(self) -> jax.Array:
        """The gated weight, in `compute_dtype`: with the noise where there is some, else without.

        What is drawn is deterministic given the children.
        """
        raise NotImplementedError

    def keep(self) -> jax.Array:
        """Which gates stay when the leaf is finalized, one boolean per gate."""
        raise NotImplementedError

    def penalty(self) -> jax.Array:
        """What the gates cost, a scalar to add to the loss; 0 for gates without a price."""
        return jnp.zeros(())

    def expected(self) -> jax.Array:
        """How many weights are expected to be nonzero, a scalar; of hard gates, how many are."""
        return jnp.sum(self.mask())

    def draw(self, key: jax.Array) -> Any:
        """The noise of one training step, or None for gates that have none."""
        return None

    def drawn(self, key: jax.Array) -> GateArray:
        """The leaf with noise in it; itself if it has none."""
        noise = self.draw(key)
        return self if noise is None else self.replace(noise=noise)

    def quiet(self) -> GateArray:
        """The leaf without noise."""
        return self.replace(noise=None) if "noise" in self.children else self

    def materialize(self, key: jax.Array | None = None) -> jax.Array:
        leaf = self if key is None else self.drawn(key)
        return leaf.value().astype(self.float_dtype)

    def mask(self) -> jax.Array:
        """Which weights stay when the leaf is finalized, booleans in its shape."""
        return jnp.broadcast_to(self.spread(self.keep()), self.shape)

    def pruned(self) -> jax.Array:
        """The dense array that `finalize` stores: the value without noise, with exact zeros."""
        value = self.quiet().materialize()
        return jnp.where(self.mask(), value, jnp.zeros((), value.dtype))

    def finalize(self) -> CompressedArray | jax.Array:
        """The nonzero values as a `SparseArray`, or the dense array where that is smaller."""
        # Compiled like the forward pass, whose values these shall be.
        return stored(_pruned(self), self.batch_ndim)

    def spread(self, gates: jax.Array) -> jax.Array:
        """Gates as an array that broadcasts with the weight."""
        lead = gates.ndim - len(self.unit)
        for axis, (box, size) in enumerate(zip(self.unit, self.shape[self.batch_ndim :]), lead):
            if box > 1 and gates.shape[axis] > 1:
                gates = jnp.repeat(gates, box, axis)
                gates = jax.lax.slice_in_dim(gates, 0, size, axis=axis)
        return gates

    def sizes(self) -> jax.Array:
        """How many weights each gate has, in the shape of the gates of one weight."""
        pattern = Pattern("gates", tuple(self.unit))
        return jnp.asarray(unit_sizes(pattern, self.shape[self.batch_ndim :]), jnp.float32)

    def astype(self, dtype: Any) -> CompressedArray | None:
        return self.replace(float_dtype=np.dtype(dtype)) if narrows(self.dtype, dtype) else None

    def describe(self) -> str:
        each = "" if math.prod(self.unit) == 1 else f"/{'x'.join(map(str, self.unit))}"
        return f"{self.form.replace('_', ' ')}{each}"


@jax.jit
def _pruned(leaf: GateArray) -> jax.Array:
    return leaf.pruned()


def stored(w: jax.Array, batch_ndim: int) -> CompressedArray | jax.Array:
    """The smaller of the sparse and the dense form of an array with zeros."""
    if not w.size:
        return w
    axes = KernelAxes(tuple(range(batch_ndim - w.ndim, 0)), ())
    sparse: CompressedArray
    if w.ndim == batch_ndim:  # scalars
        return w
    sparse = Prune()(w, LeafContext("a gated leaf", axes))
    return sparse if sparse.nbytes < w.size * w.dtype.itemsize else w


def lay_gates(group: str, leaf: Any, context: LeafContext) -> Pattern:
    """The groups of a leaf's weights that share a gate, as `lay` has them.

    Raises:
      SpecError: for what is no pattern or does not fit; names the leaf.
    """
    batch = context.axes.batch_ndim(leaf.ndim)
    try:
        pattern = lay(group, tuple(leaf.shape[batch:]), context.axes)
    except SpecError as error:
        raise SpecError(f"{context.path}: group={group!r}: {error}") from None
    if pattern.m:
        raise SpecError(
            f"{context.path}: group={group!r} has no groups; write 'unstructured', 'vector', "
            "'channel', 'filter', 'head', 'layer' or 'block:RxC'"
        )
    return pattern


def gate_shape(pattern: Pattern, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the gates of a stack of weights of one shape."""
    batch = len(shape) - len(pattern.unit)
    return (*shape[:batch], *pattern.units(shape[batch:]))


def logit(p: float) -> float:
    """`log(p / (1 - p))` on the host."""
    return math.log(p) - math.log1p(-p)


@jax.custom_jvp
def masked(weight: jax.Array, hard: jax.Array, soft: jax.Array) -> jax.Array:
    """The weight where `hard`, else exact zeros; the gradient goes to `soft` as if it multiplied.

    Straight-through: `dsoft = dout * weight`; the weight is frozen.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> loss = lambda s: jnp.sum(masked(jnp.array([2.0, -3.0]), s > 0.5, s))
      >>> jax.grad(loss)(jnp.array([0.7, 0.1])).tolist()
      [2.0, -3.0]
    """
    del soft
    return jnp.where(hard, weight, jnp.zeros((), weight.dtype))


@masked.defjvp
def _masked_jvp(primals: Any, tangents: Any) -> Any:
    weight = primals[0]
    return masked(*primals), weight * tangents[2].astype(weight.dtype)
