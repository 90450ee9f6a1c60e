"""The structure of a mask: which weights stay or go together, whatever their scores."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.errors import SpecError
from jaxcompress.rules import KernelAxes

KINDS = ("unstructured", "n:m", "block:RxC", "vector", "channel", "filter", "head", "layer")


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A pattern laid on one weight.

    Its units are boxes of `unit` values along each axis; what is left at the end of an axis is a
    smaller box. A mask keeps or removes whole units. An `n:m` pattern keeps n of each m consecutive
    weights along `axis` instead.

    Attributes:
      kind: its name as it was written.
      unit: the size of a box along each axis of the weight; all ones: weights go one by one.
      n: of an `n:m` pattern, else 0.
      m: likewise.
      axis: the axis of an `n:m` pattern, negative.
    """

    kind: str
    unit: tuple[int, ...]
    n: int = 0
    m: int = 0
    axis: int = -1

    @property
    def single(self) -> bool:
        """Whether weights go one by one."""
        return all(size == 1 for size in self.unit)

    def units(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """How many units there are along each axis of a weight."""
        return tuple(-(-size // box) if size else 0 for size, box in zip(shape, self.unit))

    def pooled(self, scores: jax.Array, signed: bool = False) -> jax.Array:
        """The mean score of each unit, or its mean magnitude, float32, leading axes kept.

        Means rather than sums, so that a smaller box at an end is not weak by its size.
        """
        if self.single:
            return scores
        x = scores.astype(jnp.float32)
        x = x if signed else jnp.abs(x)
        return self._sums(x) / self._sums(jnp.ones(x.shape[x.ndim - len(self.unit) :]))

    def _sums(self, x: jax.Array) -> jax.Array:
        lead = x.ndim - len(self.unit)
        for axis, box in enumerate(self.unit, lead):
            if box == 1:
                continue
            x = jnp.pad(x, [(0, -x.shape[a] % box if a == axis else 0) for a in range(x.ndim)])
            whole = x.shape[axis] // box
            x = x.reshape(*x.shape[:axis], whole, box, *x.shape[axis + 1 :]).sum(axis + 1)
        return x

    def spread(self, mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The mask of the weights from that of the units; `shape` is that of one weight."""
        lead = mask.ndim - len(self.unit)
        for axis, (box, size) in enumerate(zip(self.unit, shape), lead):
            if box != 1:
                mask = jnp.repeat(mask, box, axis)
                mask = jax.lax.slice_in_dim(mask, 0, size, axis=axis)
        return mask


def parse_pattern(pattern: str) -> tuple[int, int]:
    """The numbers of an `n:m` pattern.

    Examples:
      >>> parse_pattern("2:4")
      (2, 4)
    """
    found = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    if found is None or not 0 < int(found[1]) <= int(found[2]) <= 64:
        raise SpecError(
            f"pattern={pattern!r}: write 'n:m' with 0 < n <= m <= 64, such as '2:4' "
            "(in quotes, for YAML reads 2:4 as a number)"
        )
    return int(found[1]), int(found[2])


def is_n_of_m(pattern: str) -> bool:
    """Whether this is written like an `n:m` pattern."""
    return isinstance(pattern, str) and re.match(r"\d+:\d+", pattern) is not None


def check_pattern(pattern: Any) -> None:
    """Refuses what is no pattern of any weight.

    Raises:
      SpecError: saying what to write.
    """
    if not isinstance(pattern, str):
        raise SpecError(
            f"pattern={pattern!r}: write one of {', '.join(KINDS)} (in quotes, for YAML reads 2:4 "
            "as a number)"
        )
    if is_n_of_m(pattern):
        parse_pattern(pattern.partition("@")[0])
    elif pattern not in KINDS and not re.fullmatch(r"block:[1-9]\d*x[1-9]\d*", pattern):
        raise SpecError(f"pattern={pattern!r}: write one of {', '.join(KINDS)}")


def lay(pattern: str, shape: tuple[int, ...], axes: KernelAxes) -> Pattern:
    """Lays a pattern on a weight.

    `unstructured`: weights one by one. `n:m` along the last input axis, or `n:m@axis` along another
    (negative). `block:RxC`: boxes of R inputs by C outputs, on the last input and the last
    output axis. `vector`: all outputs of one input (for a convolution: at one place of the kernel).
    `channel`: all that meets one input channel, the last input axis. `filter`: all that makes
    one output, the last output axis. `head`: all that makes or meets one attention head, in a
    kernel `[in, heads, depth]` or `[heads, depth, out]`. `layer`: all or nothing.

    Args:
      pattern: as written above.
      shape: of one weight, without the axes of a stack.
      axes: its input and output axes.

    Raises:
      SpecError: for another pattern, or one that does not fit the weight.

    Examples:
      >>> lay("filter", (3, 3, 16, 32), KernelAxes((-4, -3, -2), (-1,))).unit
      (3, 3, 16, 1)
    """
    ndim = len(shape)
    if not axes.input and pattern not in ("unstructured", "filter", "layer"):
        raise SpecError(f"{pattern!r} needs an input axis, and there is none: write 'filter'")
    ones = (1,) * ndim
    inside = lambda axis: ndim + axis

    def whole(*but: int) -> tuple[int, ...]:
        """A box over every axis but some."""
        return tuple(1 if a - ndim in but else max(1, n) for a, n in enumerate(shape))

    check_pattern(pattern)
    if pattern == "unstructured":
        return Pattern(pattern, ones)
    if is_n_of_m(pattern):
        numbers, _, axis = pattern.partition("@")
        n, m = parse_pattern(numbers)
        return Pattern(pattern, ones, n, m, _axis(pattern, axis, ndim) if axis else max(axes.input))
    if found := re.fullmatch(r"block:(\d+)x(\d+)", pattern):
        box = list(ones)
        box[inside(max(axes.input))] = int(found[1])
        if axes.output:
            box[inside(max(axes.output))] = int(found[2])
        if not axes.output and int(found[2]) != 1:
            raise SpecError(f"{pattern!r} does not fit shape {shape}: write 'block:{found[1]}x1'")
        return Pattern(pattern, tuple(box))
    if pattern == "layer":
        return Pattern(pattern, whole())
    if pattern == "vector":
        unit = tuple(max(1, n) if a - ndim in axes.output else 1 for a, n in enumerate(shape))
        return Pattern(pattern, unit)
    if pattern == "channel":
        return Pattern(pattern, whole(max(axes.input)))
    if pattern == "filter":
        return Pattern(pattern, whole(max(axes.output, default=-1)))
    return Pattern(pattern, whole(_head_axis(pattern, shape, axes)))


def _axis(pattern: str, text: str, ndim: int) -> int:
    if not re.fullmatch(r"-\d+", text) or not -ndim <= int(text) < 0:
        raise SpecError(
            f"{pattern!r}: write a negative axis of the weight behind the @, from -{ndim} to -1"
        )
    return int(text)


def _head_axis(pattern: str, shape: tuple[int, ...], axes: KernelAxes) -> int:
    for side in (axes.output, axes.input):
        if len(shape) == 3 and len(side) == 2:
            return min(side)
    raise SpecError(
        f"{pattern!r} needs a kernel [in, heads, depth] or [heads, depth, out], not one of shape "
        f"{shape}; write 'block:1xD' for heads of D features beside each other, or give the axes"
    )


def count(pattern: Pattern, shape: tuple[int, ...]) -> int:
    """How many units a weight has."""
    return math.prod(pattern.units(shape))
