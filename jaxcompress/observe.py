"""`observe`: statistics of the inputs that meet each weight, as further outputs of the walk.

The function is walked as by `compressed`, with a probe in the place of each weight, which records
what it meets (`recorder.py`): stacked by a `scan` over the weight, summed by a loop that uses it at
every turn, zero from the branch of a `cond` that is not taken.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence, Sized
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import input_stats
from jaxcompress.arguments import join_batch, split_batch
from jaxcompress.arrays.base import materialize
from jaxcompress.errors import SpecError
from jaxcompress.input_stats import InputStats, merge
from jaxcompress.interpret import walked
from jaxcompress.probe import Probe
from jaxcompress.progress import progress_bar
from jaxcompress.recorder import Key, Recorder, Sums
from jaxcompress.rules import flatten, match


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
      stats: of `gram`, `second_moment`, `abs_mean`, `abs_max`, `histogram`, `minimum`, `maximum`,
        `mean`; see `InputStats`.
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

    Examples:
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
    sums: dict[Key, Sums] | None = None
    tallies: dict[Key, dict[str, np.ndarray]] = {}
    last: dict[Key, Sums] = {}
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
    shapes = {path: leaf.shape for path, leaf in flatten(params)[0] if path in chosen}
    return _results(sums, tallies, shapes, None if leaves is None else chosen)


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


def _tally(tallies: dict[Key, dict[str, np.ndarray]], found: dict[Key, Sums]) -> None:
    for key, counts in found.items():
        mine = tallies.setdefault(key, {})
        for name, value in counts.items():
            mine[name] = mine.get(name, 0) + np.asarray(value, np.int64)


def _results(
    sums: dict[Key, Sums],
    tallies: dict[Key, dict[str, np.ndarray]],
    shapes: dict[str, tuple[int, ...]],
    asked: list[str] | None,
) -> dict[str, dict[tuple[int, ...], InputStats]]:
    unmet = [path for path in asked or () if not any(key.path == path for key in tallies)]
    if unmet or not tallies:
        which = unmet[0] if unmet else "no leaf"
        raise SpecError(
            f"{which}{' meets no' if unmet else ' of the params meets a'} matmul, convolution or "
            "look-up that can be seen; leave it out of `leaves`, or see that it reaches one as "
            "it is (not scaled, joined to others, or inside shard_map)"
        )
    out: dict[str, dict[tuple[int, ...], InputStats]] = {}
    for key, counts in tallies.items():
        if not np.all(counts["count"]):
            raise SpecError(
                f"{key.path}: met no input on axes {key.axes}; give batches that take the branch "
                "where it is used, or leave it out of `leaves`"
            )
        size = math.prod(shapes[key.path][a] for a in key.axes)
        found = input_stats.finished({**sums[key], **counts}, size)
        if not input_stats.all_finite(found):
            raise SpecError(
                f"{key.path}: its inputs are NaN or infinite; look for what makes them so in the "
                "batches or the params"
            )
        out.setdefault(key.path, {})[key.axes] = found
    return out


class _Step:
    """One batch: runs the function and adds to the sums; compiled once per shapes."""

    def __init__(self, fn: Callable[..., Any], names: tuple[str, ...], chosen: list[str]):
        self.fn, self.names, self.chosen = fn, names, frozenset(chosen)
        self.known: set[Any] = set()
        self._run = jax.jit(self._traced, static_argnums=3, donate_argnums=0)

    def __call__(self, sums: Any, params: Any, args: Any) -> Any:
        arrays, static = split_batch(args)
        signature = (static, tuple((x.shape, x.dtype) for x in arrays))
        if signature not in self.known:  # another trace, which may meet other weights
            self.known.add(signature)
            shapes = jax.eval_shape(functools.partial(self._observed, static), params, arrays)
            start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), _split(shapes)[0])
            sums = {**start, **(sums or {})}
        return self._run(sums, params, arrays, static)

    def _traced(self, sums: Any, params: Any, arrays: Any, static: Any) -> Any:
        found, tallies = _split(self._observed(static, params, arrays))
        return {k: merge(x, found[k]) if k in found else x for k, x in sums.items()}, tallies

    def _observed(self, static: Any, params: Any, arrays: Any) -> dict[Key, Sums]:
        args = join_batch(arrays, static)
        leaves, structure = flatten(params)
        recorder = Recorder(
            self.names, {path: tuple(leaf.shape) for path, leaf in leaves if path in self.chosen}
        )
        probes = [
            Probe.of(materialize(leaf), path, recorder) if path in self.chosen else leaf
            for path, leaf in leaves
        ]
        with recorder.frame() as frame:
            walked(self.fn, recorder)(jax.tree.unflatten(structure, probes), *args)
        return frame


def _split(found: dict[Key, Sums]) -> tuple[dict[Key, Sums], dict[Key, Sums]]:
    """Sums that stay on the device, and tallies that go to the host."""
    pick = lambda host: {
        key: {n: x for n, x in sums.items() if (n in _TALLIES) == host}
        for key, sums in found.items()
    }
    return pick(False), pick(True)
