"""Cross-layer equalization: channels of equal range on both sides of a ReLU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.errors import SpecError
from jaxcompress.quantization.transforms.leaves import Axes, Leaves, divided, multiplied


def equalize(
    params: Any,
    pairs: Sequence[tuple[str, str | None, str]],
    *,
    iterations: int = 1,
    axes: Axes | None = None,
) -> Any:
    """Moves scales between two layers with a positively homogeneous function in between.

    With `f(c x) = c f(x)` for c > 0, as of a ReLU, leaky ReLU or identity,
    `f(x w1 + b1) w2 = f(x w1 / s + b1 / s) (s w2)`. With `r1_i` the largest `|w1|` of output i
    and `r2_i` the largest `|w2|` of input i, `s_i = sqrt(r1_i r2_i) / r2_i` makes both ranges
    `sqrt(r1_i r2_i)`; where either is 0, s is 1. The function is unchanged up to rounding, if
    nothing else reads the first layer; it is not checked that f is homogeneous.

    Args:
      params: a tree of dense parameters.
      pairs: `(kernel1, bias1, kernel2)`, paths; None where there is no bias. The inputs of kernel2
        are the outputs of kernel1, or several of them after a flattening with channels last; a
        depthwise kernel2 has one input and as many outputs.
      iterations: how often all pairs are gone through; chains of pairs need several.
      axes: the axes of kernels by path; Flax's by default.

    Returns:
      The tree with other kernels and biases.

    Raises:
      RuleError: for a path that is no leaf.
      SpecError: for kernels that do not follow each other, or no iteration.

    References:
      Nagel et al., *Data-Free Quantization Through Weight Equalization and Bias Correction*, 2019.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"a": jnp.array([[16.0, 1.0]]), "b": jnp.array([[1.0], [4.0]])}
      >>> even = equalize(params, [("a", None, "b")])
      >>> even["a"].tolist(), even["b"].tolist()
      ([[4.0, 2.0]], [[4.0], [2.0]])
    """
    if iterations < 1:
        raise SpecError(f"iterations={iterations}: write at least 1")
    leaves = Leaves(params, axes)
    steps = [_Step.of(leaves, *pair) for pair in pairs]
    chosen = {path: leaves.dense(path) for pair in pairs for path in pair if path is not None}

    def once(_: Any, weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
        for step in steps:
            weights = step(weights)
        return weights

    for path, leaf in jax.lax.fori_loop(0, iterations, once, chosen).items():
        leaves[path] = leaf
    return leaves.tree()


@dataclasses.dataclass(frozen=True)
class _Step:
    """One pair: its paths, the axis of the channels in each kernel, and their number."""

    first: str
    bias: str | None
    second: str
    out: int
    where: int
    n: int

    @classmethod
    def of(cls, leaves: Leaves, first: str, bias: str | None, second: str) -> _Step:
        w1, w2 = leaves.dense(first), leaves.dense(second)
        out, where = max(leaves.axes(first).output, default=-1), max(leaves.axes(second).input)
        n = w1.shape[out]
        if w2.shape[where] == 1 and n > 1:  # depthwise
            where = max(leaves.axes(second).output)
        if not n or w2.shape[where] % n:
            raise SpecError(
                f"{second}: its {w2.shape[where]} inputs do not follow the {n} outputs of {first}"
            )
        return cls(first, bias, second, out, where, n)

    def __call__(self, weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
        w1, w2 = weights[self.first], weights[self.second]
        r1 = _ranges(w1, self.out)
        r2 = jnp.max(_ranges(w2, self.where).reshape(-1, self.n), axis=0)
        known = (r1 > 0) & (r2 > 0)
        s = jnp.where(known, jnp.sqrt(r1) / jnp.sqrt(jnp.where(known, r2, 1)), 1)
        repeated = jnp.tile(s, w2.shape[self.where] // self.n)
        new = {
            self.first: divided(w1, _along(s, self.out, w1.ndim)),
            self.second: multiplied(w2, _along(repeated, self.where, w2.ndim)),
        }
        if self.bias is not None:
            new[self.bias] = divided(weights[self.bias], s)
        return {**weights, **new}


def _ranges(w: jax.Array, axis: int) -> jax.Array:
    others = tuple(a for a in range(-w.ndim, 0) if a != axis)
    wide = jnp.promote_types(w.dtype, jnp.float32)
    return jnp.max(jnp.abs(w.astype(wide)), axis=others)


def _along(x: jax.Array, axis: int, ndim: int) -> jax.Array:
    shape = [1] * ndim
    shape[axis] = x.size
    return x.reshape(shape)
