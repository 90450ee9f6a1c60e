"""Which axes of a kernel are inputs: read off the contractions that a function does with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxcompress import compat
from jaxcompress.arrays.base import CompressedArray, register_array, register_rule
from jaxcompress.interpret import compressed
from jaxcompress.rules import KernelAxes, flatten

# The original axes of which an axis of an intermediate value is made.
Labels = tuple[tuple[int, ...], ...]


class _Record:
    """What was seen of each leaf; compared by identity, so it can be static metadata."""

    def __init__(self) -> None:
        self.contracted: dict[str, tuple[set[int], set[int]]] = {}
        self.looked_up: dict[str, tuple[set[int], set[int]]] = {}


@register_array("probe", children=("value",), static=("labels", "path", "record"))
class _Probe(CompressedArray):
    """A dense array that remembers which axis is which on its way to a contraction."""

    value: jax.Array
    labels: Labels
    path: str
    record: _Record

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
    def axes(self) -> Labels:
        """The labels of the present axes; a `scan` has dropped leading ones."""
        return self.labels[len(self.labels) - self.value.ndim :]

    def materialize(self, key: jax.Array | None = None) -> jax.Array:
        return self.value

    def moved(self, value: jax.Array, labels: Sequence[tuple[int, ...]]) -> _Probe:
        return self.replace(value=value, labels=tuple(labels))

    def astype(self, dtype: Any) -> _Probe:
        return self.replace(value=self.value.astype(dtype))


def _joined(labels: Sequence[tuple[int, ...]]) -> set[int]:
    return {axis for label in labels for axis in label}


@register_rule(_Probe, "transpose")
def _transpose(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    probe, order = operands[i], params["permutation"]
    return probe.moved(jax.lax.transpose(probe.value, order), [probe.axes[a] for a in order])


@register_rule(_Probe, "squeeze")
def _squeeze(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    probe, gone = operands[i], params["dimensions"]
    labels = [label for a, label in enumerate(probe.axes) if a not in gone]
    return probe.moved(jax.lax.squeeze(probe.value, gone), labels)


@register_rule(_Probe, "broadcast_in_dim")
def _broadcast_in_dim(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    probe, shape, where = operands[i], params["shape"], params["broadcast_dimensions"]
    labels: list[tuple[int, ...]] = [()] * len(shape)
    for old, new in enumerate(where):
        labels[new] = probe.axes[old]
    return probe.moved(jax.lax.broadcast_in_dim(probe.value, shape, where), labels)


@register_rule(_Probe, "reshape")
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
        out += [tuple(sorted(_joined(labels[a:i])))] * (j - b)
    return tuple(out)


@register_rule(_Probe, "slice")
@register_rule(_Probe, "rev")
def _same_axes_unary(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    probe = operands[i]
    primitive = "slice_p" if "limit_indices" in params else "rev_p"
    return probe.moved(getattr(jax.lax, primitive).bind(probe.value, **params), probe.axes)


@register_rule(_Probe, "dynamic_slice")
def _dynamic_slice(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    probe = operands[0]
    return probe.moved(
        jax.lax.dynamic_slice(probe.value, operands[1:], params["slice_sizes"]), probe.axes
    )


@register_rule(_Probe, "dot_general")
def _dot_general(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    probe = operands[i]
    contract, batch = params["dimension_numbers"]
    inputs = [probe.axes[a] for a in contract[i]]
    outputs = [
        label for a, label in enumerate(probe.axes) if a not in contract[i] and a not in batch[i]
    ]
    probe.record.contracted.setdefault(probe.path, (_joined(inputs), _joined(outputs)))
    return NotImplemented


@register_rule(_Probe, "conv_general_dilated")
def _conv(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    probe = operands[i]
    if i == 1:
        features = params["dimension_numbers"].rhs_spec[0]
        inputs = [label for a, label in enumerate(probe.axes) if a != features]
        probe.record.contracted.setdefault(probe.path, (_joined(inputs), set(probe.axes[features])))
    return NotImplemented


@register_rule(_Probe, "gather")
def _gather(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    probe = operands[0]
    rows = params["dimension_numbers"].start_index_map
    features = [label for a, label in enumerate(probe.axes) if a not in rows]
    looked_up = [probe.axes[a] for a in rows]
    probe.record.looked_up.setdefault(probe.path, (_joined(features), _joined(looked_up)))
    return NotImplemented


def kernel_axes(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Any:
    """Finds the input and output axes of each leaf from what a function does with it.

    The function is traced, never run. An axis that a matmul or convolution sums over is an input,
    the kernel's other axes there are outputs, and leading axes that a scan or a batched product
    runs over are neither. A table that is only looked up has its features as inputs, as a
    table tied to the output has. Where a leaf is contracted twice, the first contraction counts.

    Args:
      fn: a function of `params` and the other arguments, such as a Linen module's `apply`.
      params: its first argument: arrays or shapes (`jax.ShapeDtypeStruct`).
      *args: the other arguments, arrays, shapes, or static values.
      **kwargs: keyword arguments, likewise.

    Returns:
      `{path: KernelAxes}` for the leaves that meet a contraction or a look-up; pass it to
      `compress(..., axes=...)`.

    Example:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> apply = lambda p, x: jnp.einsum("bi,oi->bo", x, p["kernel"])
      >>> jc.kernel_axes(apply, {"kernel": jnp.ones((8, 4))}, jnp.ones((2, 4)))
      {'kernel': KernelAxes(input=(-1,), output=(-2,))}
    """
    record = _Record()
    leaves, structure = jax.tree.flatten((args, kwargs))
    traced = [compat.is_traceable(x) or isinstance(x, jax.ShapeDtypeStruct) for x in leaves]
    paths = [path for path, _ in flatten(params)[0]]

    def run(params: Any, arrays: list[Any]) -> Any:
        it = iter(arrays)
        full = [next(it) if t else x for t, x in zip(traced, leaves)]
        args, kwargs = jax.tree.unflatten(structure, full)
        values, tree = jax.tree.flatten(params)
        probes = [
            _Probe(v, tuple((a,) for a in range(-v.ndim, 0)), path, record)
            for path, v in zip(paths, values)
        ]
        return compressed(fn)(jax.tree.unflatten(tree, probes), *args, **kwargs)

    jax.eval_shape(run, params, [x for t, x in zip(traced, leaves) if t])
    out = {}
    for path in paths:
        found = record.contracted.get(path) or record.looked_up.get(path)
        if found is not None:
            inputs, outputs = found
            if inputs and outputs and max(outputs) > max(inputs):
                # Free axes on both sides of the inputs: those in front are a stack's, over which
                # one input is shared, as by an `nn.vmap` of layers with `in_axes=None`.
                outputs = {a for a in outputs if a > min(inputs)}
            if inputs and inputs | outputs == set(range(-len(inputs | outputs), 0)):
                out[path] = KernelAxes(tuple(sorted(inputs)), tuple(sorted(outputs)))
    return out
