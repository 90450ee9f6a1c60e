"""Weights that are fixed on their grid a part at a time, while the others are trained."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays import affine
from jaxcompress.arrays.base import CompressedArray, is_compressed
from jaxcompress.errors import CompressError
from jaxcompress.pruning.select import top_mask
from jaxcompress.quantization.learned.base import LearnedArray
from jaxcompress.quantization.learned.straight import straight_through
from jaxcompress.specs import is_number


class IncrementalArray(LearnedArray):
    """A weight of which a part is fixed at values of a grid, and the rest is trained.

    A fixed weight is what its code says, whatever an optimizer does to `weight` in its place, and
    has no gradient.

    Attributes:
      weight: the dense weight.
      mask: which weights are fixed, booleans.
      codes: the codes of the fixed ones.
      scale: the scale of the codes, settled when the leaf is made.
    """

    mask: Any
    codes: Any
    scale: Any

    @property
    def code_format(self) -> str:
        """The format of the codes."""
        raise NotImplementedError

    def scores(self, gradient: jax.Array | None) -> jax.Array:
        """Which weights are fixed first, the largest score before others."""
        del gradient
        return jnp.abs(self.wide())

    def grid(self) -> Any:
        """All weights on the grid: the fixed ones as they are, the others as they would be."""
        codes = affine.quantize(
            self.weight, self.scale, None, self.code_format,
            axes=self.axes, group_size=self.group_size,
        )  # fmt: skip
        return self.coded(jnp.where(self.mask, self.codes, codes), self.scale, self.code_format)

    def proxy(self) -> jax.Array:
        return jnp.where(self.mask, 0.0, self.wide())

    def materialize(self, key: jax.Array | None = None) -> jax.Array:
        fixed = jax.tree.map(jax.lax.stop_gradient, self)
        free = fixed.weight.astype(self.float_dtype)
        hard = jnp.where(self.mask, fixed.grid().materialize(), free)
        return straight_through(hard, self.proxy().astype(self.float_dtype))

    def on_grid(self) -> jax.Array:
        """All weights on the grid, with the gradient straight through to those not fixed."""
        return super().materialize()

    def more(self, share: Any, gradient: jax.Array | None = None) -> Any:
        """The leaf with that share of its weights fixed."""
        batch = self.batch_ndim
        size = self.size // max(1, int(np.prod(self.shape[:batch], dtype=np.int64)))
        count = jnp.round(jnp.asarray(share, jnp.float32) * size).astype(jnp.uint32)
        choose = lambda scores: top_mask(scores, count, signed=True)
        for _ in range(batch):
            choose = jax.vmap(choose)
        mask = choose(jnp.where(self.mask, jnp.inf, self.scores(gradient))) | self.mask
        grid = self.grid()
        weight = jnp.where(mask, grid.materialize().astype(self.weight.dtype), self.weight)
        return self.replace(weight=weight, mask=mask, codes=grid.codes)


def quantize_more(tree: Any, share: float | jax.Array, grads: Any = None) -> Any:
    """Fixes weights of `INQ` and `ELQ` leaves until a share of each leaf is fixed.

    The largest come first; with gradients, in an `ELQ` leaf, the largest that do little harm. Pure
    and jittable. What is fixed stays fixed; a share below that of the last call does nothing.

    Args:
      tree: any tree, with such leaves.
      share: from 0 to 1; the number is `round(share n)` for each weight of a stack.
      grads: None, or gradients of the loss in the structure of the tree, as `jax.grad` gives
        them; the mean of several batches is best.

    Returns:
      The same tree with more weights fixed.

    Raises:
      CompressError: for another share, when there is no such leaf, or when `grads` does not match
        the tree.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxcompress.quantization import INQ
      >>> quantize_more(INQ()(jnp.array([1.0, 3.0])), 0.5).mask.tolist()
      [False, True]
    """
    if not isinstance(share, jax.Array) and not is_number(share, 0, 1):
        raise CompressError(f"share={share!r}: write a number from 0 to 1")
    found = False

    def fix(leaf: Any, slopes: Any = None) -> Any:
        nonlocal found
        if isinstance(leaf, IncrementalArray):
            found = True
            return leaf.more(share, _of_weight(leaf, slopes) if grads is not None else None)
        if not isinstance(leaf, CompressedArray):
            return leaf
        inner = {name: getattr(leaf, name) for name in leaf.children}
        return leaf.replace(
            **{name: fix(child, getattr(slopes, name, None)) for name, child in inner.items()}
        )

    if grads is None:
        out = jax.tree.map(fix, tree, is_leaf=is_compressed)
    else:
        none = lambda x: x is None or is_compressed(x)
        out = jax.tree.map(fix, tree, grads, is_leaf=none)
    if not found:
        raise CompressError("no leaf is quantized by and by; put in INQ() with compress")
    return out


def _of_weight(leaf: IncrementalArray, slopes: Any) -> jax.Array:
    gradient = getattr(slopes, "weight", None)
    if getattr(gradient, "shape", None) != leaf.shape:
        raise CompressError("grads has no gradient of a weight; give it those of the params")
    return gradient  # type: ignore[return-value]
