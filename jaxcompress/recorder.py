"""What a walk with probes records, and how it leaves the control flow around them.

Where a probe meets a contraction, the statistics of the other operand are computed there and then,
and put into the frame of the function being traced. `scan`, `while_loop` and `switch` make a frame
for their body and hand on what it recorded.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress import compat, input_stats
from jaxcompress.arrays.base import is_compressed
from jaxcompress.errors import SpecError
from jaxcompress.input_stats import merge
from jaxcompress.interpret import Control
from jaxcompress.probe import Listener, Part, Probe, original

Sums = dict[str, jax.Array]
Label = tuple[Part, ...]


class Key(NamedTuple):
    """One contraction of one leaf. `pending` scans have sliced the leaf and are yet to be left."""

    path: str
    axes: tuple[int, ...]
    pending: int


class Recorder(Listener, Control):
    """Collects statistics while the walk runs, and takes them out of its control flow."""

    forward_only = True

    def __init__(self, names: tuple[str, ...], shapes: dict[str, tuple[int, ...]]):
        self.names, self.shapes = names, shapes
        self.frames: list[dict[Key, Sums]] = []

    @contextlib.contextmanager
    def frame(self) -> Iterator[dict[Key, Sums]]:
        """What is recorded within, apart from what was before."""
        self.frames.append({})
        try:
            yield self.frames[-1]
        finally:
            self.frames.pop()

    def add(self, found: dict[Key, Sums]) -> None:
        """Records what was found, adding to what there is."""
        mine = self.frames[-1]
        for key, sums in found.items():
            shapes = jax.tree.map(jnp.shape, sums)
            if key in mine and jax.tree.map(jnp.shape, mine[key]) != shapes:
                raise SpecError(
                    f"{key.path}: meets inputs as one weight and as a stack of weights, on the "
                    f"same axes {key.axes}; leave it out of `leaves`"
                )
            mine[key] = merge(mine[key], sums) if key in mine else sums

    # What the probes meet.

    def contracted(self, probe: Probe, i: int, operands: list[Any], params: dict[str, Any]) -> None:
        contract, batch = params["dimension_numbers"]
        x = operands[1 - i]
        # A batch axis that comes from no axis of the weight is one more axis of rows.
        pairs = [(probe.axes[w], b) for w, b in zip(batch[i], batch[1 - i]) if probe.axes[w]]
        stack, leading = [label for label, _ in pairs], [b for _, b in pairs]
        sums = zip(contract[i], contract[1 - i])
        pairs = [(probe.axes[w], c) for w, c in sums if probe.axes[w] or probe.shape[w] > 1]
        inputs, trailing = [label for label, _ in pairs], [c for _, c in pairs]
        self._check(probe, inputs, stack)
        free = [a for a in range(x.ndim) if a not in (*leading, *trailing)]
        layers = [self.shapes[probe.path][a] for a in sorted(original(stack))]
        sizes = math.prod(x.shape[a] for a in free), math.prod(x.shape[a] for a in trailing)

        def rows(x: jax.Array) -> jax.Array:
            """As `[*stack, rows, K]`."""
            x = jnp.transpose(x, [*leading, *free, *trailing])
            x = _in_order(x, inputs, x.ndim - len(inputs))
            return _in_order(x, stack, 0).reshape(*layers, *sizes)

        found = compat.auto(lambda x: self._of_rows(probe, rows(x)), x)
        self._record(probe, inputs, found)

    def convolved(self, probe: Probe, i: int, operands: list[Any], params: dict[str, Any]) -> None:
        if i != 1:
            return
        if params["batch_group_count"] != 1:
            raise SpecError(f"{probe.path}: a convolution with batch groups cannot be observed")
        features = params["dimension_numbers"].rhs_spec[0]
        places = [a for a in range(probe.ndim) if a != features]
        inputs = [probe.axes[a] for a in places]
        self._check(
            probe, [probe.axes[a] for a in places if probe.axes[a] or probe.shape[a] > 1], []
        )

        def rows(x: jax.Array) -> jax.Array:
            """As `[*groups, rows, K]`."""
            x = _patches(x, params, places, [probe.shape[a] for a in places])
            first = x.ndim - len(places)
            return _in_order(x, inputs, first).reshape(*x.shape[:first], math.prod(x.shape[first:]))

        found = compat.auto(lambda x: self._of_rows(probe, rows(x)), operands[0])
        self._record(probe, inputs, found)

    def looked_up(self, probe: Probe, i: int, operands: list[Any], params: dict[str, Any]) -> None:
        numbers = params["dimension_numbers"]
        if len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
            return
        (axis,) = numbers.start_index_map
        whole = [n == probe.shape[a] for a, n in enumerate(params["slice_sizes"]) if a != axis]
        if params["slice_sizes"][axis] != 1 or not all(whole):
            return
        inputs, size = [probe.axes[axis]], probe.shape[axis]
        self._check(probe, inputs, [])
        if len(inputs[0]) != 1 or inputs[0][0].flipped:
            raise SpecError(f"{probe.path}: is looked up in another order than its own")
        clips = lax.GatherScatterMode.from_any(params["mode"]) == lax.GatherScatterMode.CLIP

        def found(rows: jax.Array) -> Sums:
            rows = jnp.clip(rows, 0, size - 1) if clips else rows
            return input_stats.of_look_ups(rows, size, self.names)

        self._record(probe, inputs, compat.auto(found, operands[1]))

    def _of_rows(self, probe: Probe, rows: jax.Array) -> Sums:
        if jnp.iscomplexobj(rows):
            raise SpecError(
                f"{probe.path}: its inputs are complex, and only real ones are observed"
            )
        return input_stats.of_rows(rows, self.names)

    def _check(self, probe: Probe, inputs: Sequence[Label], stack: Sequence[Label]) -> None:
        """Refuses what would be put down to the wrong inputs, or the wrong weight of a stack."""
        shape, path = self.shapes[probe.path], probe.path
        hint = "; split the weight into leaves, or leave it out of `leaves`"
        if not all(inputs):
            raise SpecError(f"{path}: is repeated along an axis over which it is contracted{hint}")
        for label in probe.labels[: probe.sliced]:
            if len(label) != 1 or label[0] != Part(label[0].axis, shape[label[0].axis]):
                raise SpecError(
                    f"{path}: a scan runs over part of its stack, or in another order{hint}"
                )
        used = [part for label in (*inputs, *stack) for part in label]
        for axis in original((*inputs, *stack)):
            there = math.prod(part.size for part in used if part.axis == axis)
            if there != shape[axis] or any(part.cut for part in used if part.axis == axis):
                raise SpecError(
                    f"{path}: {there} of the {shape[axis]} places of its axis {axis} are taken out "
                    f"before they meet an input{hint}"
                )
        there_at_all = original(probe.labels)
        for axis in range(-len(shape), 0):
            if axis not in there_at_all and shape[axis] != 1:
                raise SpecError(
                    f"{path}: one entry of its axis {axis} was taken by an index; run over the "
                    "stack with jax.lax.scan, or split it into leaves, or leave it out of `leaves`"
                )

    def _record(self, probe: Probe, inputs: Sequence[Label], found: Sums) -> None:
        key = Key(probe.path, tuple(sorted(original(inputs))), probe.sliced)
        self.add({key: found})

    # The control flow around them.

    def scan(self, step: Any, init: Any, xs: Any, **options: Any) -> Any:
        def once(carry: Any, x: Any) -> Any:
            with self.frame() as frame:
                carry, _ = step(carry, x)
            return carry, frame

        found = jax.eval_shape(lambda: lax.scan(once, init, xs, **options)[1])
        if not found:
            return lax.scan(step, init, xs, **options)
        probes = [x for x in jax.tree.leaves(xs, is_leaf=is_compressed) if isinstance(x, Probe)]
        depth = {probe.path: probe.sliced for probe in probes}
        stacked = {key for key in found if key.pending > depth.get(key.path, key.pending)}
        start = {
            key: {name: jnp.zeros(x.shape[1:], x.dtype) for name, x in sums.items()}
            for key, sums in found.items()
            if key not in stacked
        }

        def recorded(state: Any, x: Any) -> Any:
            carry, sums = state
            with self.frame() as frame:
                carry, ys = step(carry, x)
            sums = {key: merge(sums[key], frame[key]) for key in sums}
            return (carry, sums), (ys, {key: frame[key] for key in stacked})

        (carry, sums), (ys, layers) = lax.scan(recorded, (init, start), xs, **options)
        self.add(sums)
        self.add({key._replace(pending=key.pending - 1): x for key, x in layers.items()})
        return carry, ys

    def while_loop(self, test: Any, step: Any, init: Any) -> Any:
        def once(carry: Any) -> Any:
            with self.frame() as frame:
                carry = step(carry)
            return carry, frame

        _, found = jax.eval_shape(once, init)
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), found)

        def tested(state: Any) -> Any:
            with self.frame():  # a test cannot hand anything on
                return test(state[0])

        def recorded(state: Any) -> Any:
            carry, frame = once(state[0])
            return carry, {key: merge(sums, frame[key]) for key, sums in state[1].items()}

        carry, sums = lax.while_loop(tested, recorded, (init, start))
        self.add(sums)
        return carry

    def switch(self, index: Any, branches: Sequence[Any], *operands: Any) -> Any:
        def recorded(branch: Any) -> Any:
            def run(*operands: Any) -> Any:
                with self.frame() as frame:
                    out = branch(*operands)
                return out, frame

            return run

        runs = [recorded(branch) for branch in branches]
        found: dict[Key, Any] = {}
        for run in runs:
            found |= jax.eval_shape(run, *operands)[1]

        def complete(run: Any) -> Any:
            def whole(*operands: Any) -> Any:
                out, frame = run(*operands)
                zeros = lambda x: jnp.zeros(x.shape, x.dtype)
                return out, {k: frame.get(k) or jax.tree.map(zeros, x) for k, x in found.items()}

            return whole

        out, sums = lax.switch(index, [complete(run) for run in runs], *operands)
        self.add(sums)
        return out

    def checkpoint(self, body: Any, **options: Any) -> Any:
        return body  # nothing is differentiated


def _in_order(x: jax.Array, labels: Sequence[Label], first: int) -> jax.Array:
    """`x` with the axes from `first` on split into parts and sorted as the weight has them."""
    parts = [part for label in labels for part in label]
    after = x.shape[first + len(labels) :]
    x = x.reshape(*x.shape[:first], *(part.size for part in parts), *after)
    x = jnp.flip(x, [first + n for n, part in enumerate(parts) if part.flipped])
    order = sorted(range(len(parts)), key=lambda n: (parts[n].axis, -parts[n].stride))
    rest = range(first + len(parts), x.ndim)
    return jnp.transpose(x, [*range(first), *(first + n for n in order), *rest])


def _patches(
    x: jax.Array, params: dict[str, Any], places: Sequence[int], sizes: Sequence[int]
) -> jax.Array:
    """What each position of a convolution's kernel meets, `[*groups, rows, *places]`.

    `places` are the kernel's axes but for its output, of these sizes; there are groups only in a
    grouped convolution.
    """
    lhs, rhs, _ = params["dimension_numbers"]
    groups, strides = params["feature_group_count"], params["window_strides"]
    size = [sizes[places.index(a)] for a in rhs[2:]]
    x = jnp.transpose(x, lhs)  # batch, features, space
    pads = [
        (low, high, by - 1) for (low, high), by in zip(params["padding"], params["lhs_dilation"])
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *pads])
    reach = [(n - 1) * by for n, by in zip(size, params["rhs_dilation"])]
    out = [max(0, (n - r - 1) // by + 1) for n, r, by in zip(x.shape[2:], reach, strides)]
    shifted = []
    for place in np.ndindex(*size):
        start = [p * by for p, by in zip(place, params["rhs_dilation"])]
        limit = [s + max(0, (n - 1) * by + 1) for s, n, by in zip(start, out, strides)]
        shifted.append(lax.slice(x, [0, 0, *start], [*x.shape[:2], *limit], [1, 1, *strides]))
    whole = jnp.stack(shifted, -1)  # batch, features, space, places
    batch, features = whole.shape[:2]
    whole = whole.reshape(batch, groups, features // groups, math.prod(out), *size)
    # Axes now: batch, group, feature, position, one for each of the kernel's spatial axes.
    where = {rhs[1]: 2, **{a: 4 + n for n, a in enumerate(rhs[2:])}}
    whole = jnp.transpose(whole, [1, 0, 3, *(where[a] for a in places)])
    whole = whole.reshape(groups, batch * math.prod(out), *sizes)
    return whole if groups > 1 else whole[0]
