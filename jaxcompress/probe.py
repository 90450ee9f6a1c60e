"""A leaf that remembers which axis is which on its way to a contraction, and tells a listener.

Walks that only want to know what a function does with a weight put such a leaf in its place:
`kernel_axes` asks which axes are contracted, `observe` what they are contracted with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcompress.arrays.base import CompressedArray, register_array, register_rule


class Part(NamedTuple):
    """A factor of an axis of the weight: places `stride * i` for i below `size`, along `axis`.

    A reshape splits an axis into parts and merges the parts of several into one. `flipped` runs
    backwards; `cut` means that the places are not all that there were.
    """

    axis: int
    size: int
    stride: int = 1
    flipped: bool = False
    cut: bool = False


# For each axis of an intermediate value the parts it is made of, the slowest first.
Labels = tuple[tuple[Part, ...], ...]


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

    @classmethod
    def of(cls, value: jax.Array, path: str, listener: Listener) -> Probe:
        """A probe in the place of a leaf."""
        ndim = len(value.shape)
        labels = tuple((Part(a - ndim, n),) for a, n in enumerate(value.shape))
        return cls(value, labels, path, listener)

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

    def moved(self, value: jax.Array, labels: Iterable[tuple[Part, ...]]) -> Probe:
        """Another value whose axes have these labels; what scans have sliced off stays."""
        return self.replace(value=value, labels=(*self.labels[: self.sliced], *labels))

    def astype(self, dtype: Any) -> Probe:
        return self.replace(value=self.value.astype(dtype))


def original(labels: Iterable[tuple[Part, ...]]) -> set[int]:
    """The axes of the weight that several axes are made of."""
    return {part.axis for label in labels for part in label}


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
    labels: list[tuple[Part, ...]] = [()] * len(shape)
    for old, new in enumerate(where):
        if probe.shape[old] == shape[new]:
            labels[new] = probe.axes[old]
    return probe.moved(jax.lax.broadcast_in_dim(probe.value, shape, where), labels)


@register_rule(Probe, "reshape")
def _reshape(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    probe, sizes = operands[i], params["new_sizes"]
    if params.get("dimensions") is not None:
        return NotImplemented
    labels = _reshaped(probe.shape, probe.axes, sizes)
    return NotImplemented if labels is None else probe.moved(probe.value.reshape(sizes), labels)


def _reshaped(old: Sequence[int], labels: Labels, new: Sequence[int]) -> Labels | None:
    """Labels after a reshape, or None where a part would be split unevenly."""
    if 0 in old:
        return None
    # A broadcast axis has no parts; for the moment it gets one of no axis.
    parts = [p for n, label in zip(old, labels) for p in (label or (Part(0, n),))]
    out: list[tuple[Part, ...]] = []
    for n in new:
        label: list[Part] = []
        while parts and (parts[0].size == 1 or math.prod(p.size for p in label) < n):
            if n == 1 and (label or parts[0].size > 1):
                break
            part, missing = parts.pop(0), n // math.prod(p.size for p in label)
            if part.size > missing:
                if missing == 0 or part.size % missing:
                    return None
                rest = part.size // missing
                parts.insert(0, part._replace(size=rest))
                part = part._replace(size=missing, stride=part.stride * rest)
            label.append(part)
        if math.prod(p.size for p in label) != n:
            return None
        out.append(tuple(label))
    broadcast = [any(p.axis == 0 and p.size > 1 for p in label) for label in out]
    if any(b and any(p.axis for p in label) for b, label in zip(broadcast, out)):
        return None  # an axis that is partly the weight's and partly repeats it
    return tuple(tuple(p for p in label if p.axis) for label in out)


@register_rule(Probe, "rev")
def _rev(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    probe, axes = operands[i], params["dimensions"]
    labels = [
        tuple(part._replace(flipped=not part.flipped) for part in label) if a in axes else label
        for a, label in enumerate(probe.axes)
    ]
    return probe.moved(jax.lax.rev(probe.value, axes), labels)


def _cut(probe: Probe, value: jax.Array) -> Probe:
    """A probe from which some places were taken along the axes that are now shorter."""
    labels = [
        label if n == m else tuple(part._replace(size=n, cut=True) for part in label[:1])
        for n, m, label in zip(value.shape, probe.shape, probe.axes)
    ]
    return probe.moved(value, labels)


@register_rule(Probe, "slice")
def _slice(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    return _cut(operands[i], jax.lax.slice_p.bind(operands[i].value, **params))


@register_rule(Probe, "dynamic_slice")
def _dynamic_slice(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    if i != 0:
        return NotImplemented
    probe = operands[0]
    return _cut(probe, jax.lax.dynamic_slice(probe.value, operands[1:], params["slice_sizes"]))


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
