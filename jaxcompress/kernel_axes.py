"""Which axes of a kernel are inputs: read off the contractions that a function does with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxcompress.arguments import apart
from jaxcompress.arrays.base import materialize
from jaxcompress.interpret import compressed
from jaxcompress.probe import Listener, Probe, original
from jaxcompress.rules import KernelAxes, flatten


class _Record(Listener):
    """Which axes of each leaf were inputs and outputs, at its first contraction."""

    def __init__(self) -> None:
        self.contractions: dict[str, tuple[set[int], set[int]]] = {}
        self.lookups: dict[str, tuple[set[int], set[int]]] = {}

    def contracted(self, probe: Probe, i: int, operands: list[Any], params: dict[str, Any]) -> None:
        contract, batch = params["dimension_numbers"]
        inputs = [probe.axes[a] for a in contract[i]]
        outputs = [
            label
            for a, label in enumerate(probe.axes)
            if a not in contract[i] and a not in batch[i]
        ]
        self.contractions.setdefault(probe.path, (original(inputs), original(outputs)))

    def convolved(self, probe: Probe, i: int, operands: list[Any], params: dict[str, Any]) -> None:
        if i == 1:
            features = params["dimension_numbers"].rhs_spec[0]
            inputs = [label for a, label in enumerate(probe.axes) if a != features]
            self.contractions.setdefault(
                probe.path, (original(inputs), original([probe.axes[features]]))
            )

    def looked_up(self, probe: Probe, i: int, operands: list[Any], params: dict[str, Any]) -> None:
        rows = params["dimension_numbers"].start_index_map
        features = [label for a, label in enumerate(probe.axes) if a not in rows]
        looked_up = [probe.axes[a] for a in rows]
        self.lookups.setdefault(probe.path, (original(features), original(looked_up)))


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

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> apply = lambda p, x: jnp.einsum("bi,oi->bo", x, p["kernel"])
      >>> jc.kernel_axes(apply, {"kernel": jnp.ones((8, 4))}, jnp.ones((2, 4)))
      {'kernel': KernelAxes(input=(-1,), output=(-2,))}
    """
    record = _Record()
    arrays, full = apart((args, kwargs))
    paths = [path for path, _ in flatten(params)[0]]

    def run(params: Any, arrays: list[Any]) -> Any:
        args, kwargs = full(arrays)
        found, tree = flatten(params)
        probes = [Probe.of(materialize(leaf), path, record) for path, leaf in found]
        return compressed(fn)(jax.tree.unflatten(tree, probes), *args, **kwargs)

    jax.eval_shape(run, params, arrays)
    out = {}
    for path in paths:
        found = record.contractions.get(path) or record.lookups.get(path)
        if found is not None:
            inputs, outputs = found
            if inputs and outputs and max(outputs) > max(inputs):
                # Free axes on both sides of the inputs: those in front are a stack's, over which
                # one input is shared, as by an `nn.vmap` of layers with `in_axes=None`.
                outputs = {a for a in outputs if a > min(inputs)}
            if inputs and inputs | outputs == set(range(-len(inputs | outputs), 0)):
                out[path] = KernelAxes(tuple(sorted(inputs)), tuple(sorted(outputs)))
    return out
