"""A leaf that remembers which axis is which on its way to a contraction, and tells a listener.

Walks that only want to know what a function does with a weight put such a leaf in its place:
`kernel_axes` asks which axes are contracted, `observe` what they are contracted with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxcompress.arrays.base import CompressedArray, register_array, register_rule

# The original axes of which an axis of an intermediate value is made.
Labels = tuple[tuple[int, ...], ...]


class Listener:
    """What hears of the contractions that probes meet; compared by identity, so it can be static.

    Each method is given the probe, its place among the operands, all operands and the parameters
    of the equation.
    """

    def contracted(self, probe: Probe, i: int, operands: list[Any], params: dict[str, Any]) -> None:
        """A `dot_general`."""

    def convolved(self, probe: Probe, i: int, operands: list[Any], params: dict[str, Any]) -> None:
        """A `conv_general_dilated`."""

    def looked_up(self, probe: Probe, i: int, operands: list[Any], params: dict[str, Any]) -> None:
        """A `gather`."""


@register_array("probe", children=("value",), static=("labels", "path", "listener"))
class Probe(CompressedArray):
    """A dense array that remembers which axis is which on its way to a contraction."""

    value: jax.Array
    labels: Labels
    path: str
    listener: Listener

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.value.dtype

    @property
    def batch_ndim(self) -> int:
        return self.value.ndim

    @property
    def sliced(self) -> int:
        """How many leading axes a `scan` has sliced off."""
        return len(self.labels) - self.value.ndim

    @property
    def axes(self) -> Labels:
        """The labels of the present axes; a `scan` has dropped leading ones."""
        return self.labels[self.sliced :]

    def materialize(self, key: jax.Array | None = None) -> jax.Array:
        return self.value

    @classmethod
    def of(cls, value: jax.Array, path: str, listener: Listener) -> Probe:
        """A probe in the place of a leaf."""
        return cls(value, tuple((a,) for a in range(-value.ndim, 0)), path, listener)

    def moved(self, value: jax.Array, labels: Sequence[tuple[int, ...]]) -> Probe:
        return self.replace(value=value, labels=tuple(labels))

    def astype(self, dtype: Any) -> Probe:
        return self.replace(value=self.value.astype(dtype))


def joined(labels: Sequence[tuple[int, ...]]) -> set[int]:
    """The original axes of several axes."""
    return {axis for label in labels for axis in label}


@register_rule(Probe, "transpose")
def _transpose(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    probe, order = operands[i], params["permutation"]
    return probe.moved(jax.lax.transpose(probe.value, order), [probe.axes[a] for a in order])


@register_rule(Probe, "squeeze")
def _squeeze(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    probe, gone = operands[i], params["dimensions"]
    labels = [label for a, label in enumerate(probe.axes) if a not in gone]
    return probe.moved(jax.lax.squeeze(probe.value, gone), labels)


@register_rule(Probe, "broadcast_in_dim")
def _broadcast_in_dim(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    probe, shape, where = operands[i], params["shape"], params["broadcast_dimensions"]
    labels: list[tuple[int, ...]] = [()] * len(shape)
    for old, new in enumerate(where):
        labels[new] = probe.axes[old]
    return probe.moved(jax.lax.broadcast_in_dim(probe.value, shape, where), labels)


@register_rule(Probe, "reshape")
def _reshape(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    probe, sizes = operands[i], params["new_sizes"]
    if params.get("dimensions") is not None:
        return NotImplemented
    return probe.moved(probe.value.reshape(sizes), _reshaped_labels(probe.shape, sizes, probe.axes))


def _reshaped_labels(old: Sequence[int], new: Sequence[int], labels: Labels) -> Labels:
    """Labels after a reshape: each run of axes of equal product shares its labels."""
    out: list[tuple[int, ...]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        a, b = i, j
        left, right = 1, 1
        if i < len(old):
            left, i = old[i], i + 1
        if j < len(new):
            right, j = new[j], j + 1
        while left != right:
            if left < right and i < len(old):
                left, i = left * old[i], i + 1
            elif j < len(new):
                right, j = right * new[j], j + 1
            else:
                i, j = len(old), len(new)
                break
        out += [tuple(sorted(joined(labels[a:i])))] * (j - b)
    return tuple(out)


@register_rule(Probe, "slice")
@register_rule(Probe, "rev")
def _same_axes_unary(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    probe = operands[i]
    primitive = "slice_p" if "limit_indices" in params else "rev_p"
    return probe.moved(getattr(jax.lax, primitive).bind(probe.value, **params), probe.axes)


@register_rule(Probe, "dynamic_slice")
def _dynamic_slice(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    probe = operands[0]
    if i != 0:
        return NotImplemented
    return probe.moved(
        jax.lax.dynamic_slice(probe.value, operands[1:], params["slice_sizes"]), probe.axes
    )


@register_rule(Probe, "dot_general")
def _dot_general(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    operands[i].listener.contracted(operands[i], i, operands, params)
    return NotImplemented


@register_rule(Probe, "conv_general_dilated")
def _conv(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    operands[i].listener.convolved(operands[i], i, operands, params)
    return NotImplemented


@register_rule(Probe, "gather")
def _gather(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    if i == 0:
        operands[0].listener.looked_up(operands[0], i, operands, params)
    return NotImplemented
