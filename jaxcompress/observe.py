"""`observe`: statistics of the inputs that meet each weight, as further outputs of the walk.

The function is walked as by `compressed`, with a probe in the place of each weight. Where a probe
meets a contraction, the statistics of the other operand are computed there and then, forward, and
carried out through the control flow around it: stacked by a `scan` over the weight, summed by a
loop that uses it at every turn, zero from the branch of a `cond` that is not taken.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress import compat, input_stats
from jaxcompress.arrays.base import is_compressed, materialize
from jaxcompress.errors import SpecError
from jaxcompress.input_stats import InputStats, merge
from jaxcompress.interpret import Control, walked
from jaxcompress.probe import Listener, Probe, joined
from jaxcompress.progress import progress_bar
from jaxcompress.rules import flatten, match

Sums = dict[str, jax.Array]


def observe(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    stats: Sequence[str] = ("gram",),
    *,
    leaves: str | Sequence[str] | None = None,
    progress: bool = False,
) -> dict[str, dict[tuple[int, ...], InputStats]]:
    """Statistics of the inputs that meet each weight while a function runs on some batches.

    They are what calibrated methods need, and come without hooks in any model: a matmul, a
    convolution or a look-up is seen wherever it is, in a `scan`, `while`, `cond` or `remat` as
    well. One jitted step runs each batch and adds to the sums, in float32 whatever the model
    computes in; on a mesh, sums are over all devices, except inside `shard_map`, where the caller
    adds them up.

    Memory: besides what `fn` needs, the sums and those of one batch; a Gram matrix takes `4 K**2`
    bytes for K inputs. `leaves` chooses one group of leaves at a time where they do not all fit.

    Args:
      fn: a function of `params` and a batch, such as a Linen module's `apply`. What it returns is
        not used.
      params: its first argument, dense or compressed.
      batches: what to run it on: `fn(params, *batch)` for a tuple, `fn(params, batch)` for
        anything else. Batches of other shapes are traced anew.
      stats: of `gram`, `second_moment`, `abs_mean`, `abs_max`, `histogram`; see `InputStats`.
      leaves: globs of the leaves to observe, each of which must meet a contraction; None: all
        leaves that do.
      progress: show a progress bar on standard error.

    Returns:
      `{path: {axes: InputStats}}`, where axes are the contracted axes of the weight, negative. A
      weight used several times in the same way has one entry; a table that is looked up and also
      tied to the output has two.

    Raises:
      SpecError: for an unknown statistic, no batches, a leaf that met no input, inputs that are
        NaN or infinite, or a weight contracted in a way whose inputs cannot be told apart.
      RuleError: for a glob that matches nothing.

    Example:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> apply = lambda params, x: jnp.tanh(x @ params["kernel"])
      >>> batches = [jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 0.0]])]
      >>> stats = jc.observe(apply, {"kernel": jnp.ones((2, 4))}, batches)
      >>> found = stats["kernel"][(-2,)]
      >>> found.gram.tolist(), int(found.count)
      ([[10.0, 2.0], [2.0, 4.0]], 2)
    """
    names = (stats,) if isinstance(stats, str) else tuple(stats)
    unknown = [name for name in names if name not in input_stats.NAMES]
    if unknown or not names:
        raise SpecError(f"stats={stats!r}: write some of {', '.join(input_stats.NAMES)}")
    chosen = _chosen(params, leaves)
    step = _Step(fn, names, chosen)
    total = len(batches) if isinstance(batches, Sized) else None
    sums: dict[_Key, Sums] | None = None
    tallies: dict[_Key, dict[str, np.ndarray]] = {}
    last: dict[_Key, Sums] = {}
    with progress_bar(progress, "observing", total) as advance:
        for batch in batches:
            args = batch if isinstance(batch, tuple) else (batch,)
            sums, found = step(sums, params, args)
            _tally(tallies, last)  # a batch late, so that the device is never waited for
            last = found
            advance("")
    _tally(tallies, last)
    if sums is None:
        raise SpecError("batches is empty: give at least one batch to observe")
    return _results(sums, tallies, None if leaves is None else chosen)


class _Key(NamedTuple):
    """One contraction of one leaf. `pending` scans have sliced the leaf and are yet to be left."""

    path: str
    axes: tuple[int, ...]
    pending: int


def _chosen(params: Any, leaves: str | Sequence[str] | None) -> list[str]:
    found = [
        path
        for path, leaf in flatten(params)[0]
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    if leaves is None:
        return found
    rules = dict.fromkeys([leaves] if isinstance(leaves, str) else leaves, True)
    return [path for path, hit in zip(found, match(rules, found)) if hit is not None]


# Counted in integers, which a long run could overflow in 32 bits: added up on the host.
_TALLIES = ("count", "histogram")


def _tally(tallies: dict[_Key, dict[str, np.ndarray]], found: dict[_Key, Sums]) -> None:
    for key, counts in found.items():
        mine = tallies.setdefault(key, {})
        for name, value in counts.items():
            mine[name] = mine.get(name, 0) + np.asarray(value, np.int64)


def _results(
    sums: dict[_Key, Sums], tallies: dict[_Key, dict[str, np.ndarray]], asked: list[str] | None
) -> dict[str, dict[tuple[int, ...], InputStats]]:
    unmet = [path for path in asked or () if not any(key.path == path for key in tallies)]
    if unmet or not tallies:
        which = unmet[0] if unmet else "no leaf"
        raise SpecError(
            f"{which}{'' if unmet else ' of the params'} meets a matmul, a convolution or a "
            "look-up that can be seen; leave it out of `leaves`, or see that it reaches one as "
            "it is (not joined to others, reversed, or inside shard_map)"
        )
    out: dict[str, dict[tuple[int, ...], InputStats]] = {}
    for key, counts in tallies.items():
        if not np.all(counts["count"]):
            raise SpecError(
                f"{key.path}: met no input on axes {key.axes}; give batches that take the branch "
                "where it is used, or leave it out of `leaves`"
            )
        found = {**sums[key], **counts}
        bad = [n for n, x in sums[key].items() if not bool(jnp.all(jnp.isfinite(x)))]
        if bad:
            raise SpecError(
                f"{key.path}: its inputs are NaN or infinite, so that {bad[0]} is; look for what "
                "makes them so in the batches or the params"
            )
        out.setdefault(key.path, {})[key.axes] = input_stats.finished(found)
    return out


class _Step:
    """One batch: runs the function and adds to the sums; compiled once per shapes."""

    def __init__(self, fn: Callable[..., Any], names: tuple[str, ...], chosen: list[str]):
        self.fn, self.names, self.chosen = fn, names, frozenset(chosen)
        self._run = jax.jit(self._traced, static_argnums=3, donate_argnums=0)

    def __call__(self, sums: Any, params: Any, args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        traced = [compat.is_traceable(x) for x in leaves]
        arrays = [x for x, t in zip(leaves, traced) if t]
        static = (tree, tuple(None if t else (x,) for x, t in zip(leaves, traced)))
        if sums is None:
            shapes = jax.eval_shape(functools.partial(self._observed, static), params, arrays)
            sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), _split(shapes)[0])
        return self._run(sums, params, arrays, static)

    def _traced(self, sums: Any, params: Any, arrays: Any, static: Any) -> Any:
        found, tallies = _split(self._observed(static, params, arrays))
        return {key: merge(sums[key], found[key]) for key in sums}, tallies

    def _observed(self, static: Any, params: Any, arrays: Any) -> dict[_Key, Sums]:
        tree, fixed = static
        it = iter(arrays)
        args = jax.tree.unflatten(tree, [next(it) if x is None else x[0] for x in fixed])
        leaves, structure = flatten(params)
        recorder = _Recorder(
            self.names, {path: tuple(leaf.shape) for path, leaf in leaves if path in self.chosen}
        )
        probes = [
            Probe.of(materialize(leaf), path, recorder) if path in self.chosen else leaf
            for path, leaf in leaves
        ]
        with recorder.frame() as frame:
            walked(self.fn, recorder)(jax.tree.unflatten(structure, probes), *args)
        return frame


def _split(found: dict[_Key, Sums]) -> tuple[dict[_Key, Sums], dict[_Key, Sums]]:
    """Sums that stay on the device, and tallies that go to the host."""
    pick = lambda host: {
        key: {n: x for n, x in sums.items() if (n in _TALLIES) == host}
        for key, sums in found.items()
    }
    return pick(False), pick(True)


class _Recorder(Listener, Control):
    """Collects statistics while the walk runs, and takes them out of its control flow."""

    forward_only = True

    def __init__(self, names: tuple[str, ...], shapes: dict[str, tuple[int, ...]]):
        self.names, self.shapes = names, shapes
        self.frames: list[dict[_Key, Sums]] = []

    @contextlib.contextmanager
    def frame(self) -> Iterator[dict[_Key, Sums]]:
        """What is recorded within, apart from what was before."""
        self.frames.append({})
        try:
            yield self.frames[-1]
        finally:
            self.frames.pop()

    def add(self, found: dict[_Key, Sums]) -> None:
        """Records what was found, adding to what there is."""
        mine = self.frames[-1]
        for key, sums in found.items():
            mine[key] = merge(mine[key], sums) if key in mine else sums

    # What the probes meet.

    def contracted(self, probe: Probe, i: int, operands: list[Any], params: dict[str, Any]) -> None:
        contract, batch = params["dimension_numbers"]
        x = operands[1 - i]
        # A batch axis that comes from no axis of the weight is one more axis of rows.
        pairs = sorted((probe.axes[w], b) for w, b in zip(batch[i], batch[1 - i]))
        stack = [b for label, b in pairs if label]
        inputs = sorted((probe.axes[w], c) for w, c in zip(contract[i], contract[1 - i]))
        taken = [*stack, *(c for _, c in inputs)]
        free = [a for a in range(x.ndim) if a not in taken]
        self._check(probe, [w for w, _ in inputs], set(contract[i]))

        def rows(x: jax.Array) -> jax.Array:
            """As `[*stack, rows, K]`."""
            size = lambda axes: math.prod(x.shape[a] for a in axes)
            moved = jnp.transpose(x, [*stack, *free, *taken[len(stack) :]])
            return moved.reshape(*(x.shape[a] for a in stack), size(free), -1)

        found = compat.auto(lambda x: input_stats.of_rows(rows(x), self.names), x)
        self._record(probe, joined([label for label, _ in inputs]), found)

    def convolved(self, probe: Probe, i: int, operands: list[Any], params: dict[str, Any]) -> None:
        if i != 1:
            return
        if params["batch_group_count"] != 1:
            raise SpecError(f"{probe.path}: a convolution with batch groups cannot be observed")
        kernel = params["dimension_numbers"].rhs_spec
        order = sorted(
            (a for a in range(probe.ndim) if a != kernel[0]), key=lambda a: probe.axes[a]
        )
        inputs = [probe.axes[a] for a in order]
        self._check(probe, inputs, set(order))
        sizes = {a: probe.shape[a] for a in order}
        patches = functools.partial(_patches, params=params, order=order, sizes=sizes)
        found = compat.auto(lambda x: input_stats.of_rows(patches(x), self.names), operands[0])
        self._record(probe, joined(inputs), found)

    def looked_up(self, probe: Probe, i: int, operands: list[Any], params: dict[str, Any]) -> None:
        numbers = params["dimension_numbers"]
        if len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
            return
        (axis,) = numbers.start_index_map
        whole = [n == probe.shape[a] for a, n in enumerate(params["slice_sizes"]) if a != axis]
        if params["slice_sizes"][axis] != 1 or not all(whole):
            return
        self._check(probe, [probe.axes[axis]], {axis})
        found = compat.auto(
            lambda rows: input_stats.of_look_ups(rows, probe.shape[axis], self.names), operands[1]
        )
        self._record(probe, joined([probe.axes[axis]]), found)

    def _check(self, probe: Probe, inputs: Sequence[tuple[int, ...]], where: set[int]) -> None:
        """Refuses what would be put down to the wrong inputs of the weight."""
        shape, axes = self.shapes[probe.path], joined(inputs)
        seen = math.prod(probe.shape[a] for a in where)
        if seen != math.prod(shape[a] for a in axes):
            raise SpecError(
                f"{probe.path}: of its inputs on axes {sorted(axes)}, {seen} are cut out of "
                f"{math.prod(shape[a] for a in axes)} before they are contracted; split the weight "
                "into leaves, or leave it out of `leaves`"
            )
        there = joined(probe.labels)
        lost = [a for a in range(-len(shape), 0) if a not in there and shape[a] != 1]
        if lost:
            raise SpecError(
                f"{probe.path}: one entry of its axis {lost[0]} was taken by an index; run over "
                "the stack with jax.lax.scan, or split it into leaves, or leave it out of `leaves`"
            )

    def _record(self, probe: Probe, axes: set[int], found: Sums) -> None:
        self.add({_Key(probe.path, tuple(sorted(axes)), probe.sliced): found})

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
        found: dict[_Key, Any] = {}
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


def _patches(
    x: jax.Array, params: dict[str, Any], order: Sequence[int], sizes: dict[int, int]
) -> jax.Array:
    """What each position of a convolution's kernel meets, `[groups, rows, K]`.

    K runs over the kernel's axes but for its output, in the order of `order`; `groups` is there
    only in a grouped convolution.
    """
    lhs, rhs, _ = params["dimension_numbers"]
    groups = params["feature_group_count"]
    x = jnp.transpose(x, lhs)  # batch, features, space
    low_high = zip(params["padding"], params["lhs_dilation"])
    pads = [(low, high, by - 1) for (low, high), by in low_high]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *pads])
    size = [sizes[a] for a in rhs[2:]]
    step = params["rhs_dilation"]
    reach = [(n - 1) * by for n, by in zip(size, step)]
    out = [(n - r - 1) // by + 1 for n, r, by in zip(x.shape[2:], reach, params["window_strides"])]
    shifted = []
    for place in np.ndindex(*size):
        start = [p * by for p, by in zip(place, step)]
        limit = [s + (n - 1) * by + 1 for s, n, by in zip(start, out, params["window_strides"])]
        part = lax.slice(
            x, [0, 0, *start], [*x.shape[:2], *limit], [1, 1, *params["window_strides"]]
        )
        shifted.append(part)
    whole = jnp.stack(shifted, -1)  # batch, features, space, places
    batch, features = whole.shape[:2]
    whole = whole.reshape(batch, groups, features // groups, math.prod(out), *size)
    # Axes now: batch, group, feature, position, one for each of the kernel's spatial axes.
    where = {rhs[1]: 2, **{a: 4 + n for n, a in enumerate(rhs[2:])}}
    whole = jnp.transpose(whole, [1, 0, 3, *(where[a] for a in order)])
    whole = whole.reshape(groups, batch * math.prod(out), -1)
    return whole if groups > 1 else whole[0]
