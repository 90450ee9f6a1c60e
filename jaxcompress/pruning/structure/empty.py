"""Channels of which nothing is made any more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxcompress.arguments import apart
from jaxcompress.interpret import Control, walked
from jaxcompress.probe import Labels, Listener, Probe, original
from jaxcompress.pruning.structure.find import Groups, groups
from jaxcompress.pruning.structure.function import leaves_of
from jaxcompress.pruning.structure.members import Group, Member
from jaxcompress.pruning.structure.plans import Plan, keep_channels
from jaxcompress.rules import flatten


def zero_channels(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Plan:
    """The plan that removes the channels whose filters are all zero.

    They are what structured sparsity leaves behind (`Prune` with a pattern of whole channels,
    `group_lasso`). A filter is zero where all that makes the channel is: the outputs of kernels and
    the features of tables, of all leaves of the group. Its bias and its norms may be anything (but
    those of layers that a loop runs over, which count as what makes it), so that it may still emit
    a constant: `fold_removed` puts that into what reads it, and with `exact=True` refuses what is
    no constant, as where a value of each row scales the channels.

    Args:
      fn: a function of `params` and the other arguments.
      params: its first argument.
      *args: the other arguments: arrays, shapes, or static values.
      **kwargs: likewise.

    Returns:
      A `Plan`; of a group in which all are zero the first channel stays.

    Raises:
      CompressError: for params that hold compressed leaves or no arrays.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"up": jnp.array([[1.0, 0.0, 2.0]]), "down": jnp.ones((3, 2))}
      >>> apply = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
      >>> zero_channels(apply, params, jnp.ones((1, 1))).shapes
      {'down': (2, 2), 'up': (1, 2)}
    """
    found = groups(fn, params, *args, **kwargs)
    read = _read_axes(fn, params, args, kwargs)
    arrays = {path: np.asarray(x) for path, x in leaves_of(params)}
    kept = {}
    for group in found.removable:
        alive = _alive(found, group, arrays, read)
        kept[group] = np.flatnonzero(alive).tolist() if alive.any() else [0]
    return keep_channels(found, kept)


def _alive(
    found: Groups, group: Group, arrays: Mapping[str, np.ndarray], read: set[tuple[str, int]]
) -> np.ndarray:
    """Which channels are made of something; all, where nothing tells."""
    makers = [m for m in group.members if (m.path, m.axis) not in read]
    makers = [m for m in makers if not _only_shifts(found, m, read)]
    alive = np.full(group.size, not makers)
    for member in makers:
        x = arrays[member.path]
        filled = (x != 0).any(axis=tuple(a for a in range(x.ndim) if a != member.axis))
        alive |= filled[member.places(np.arange(group.size))].any(axis=1)
    return alive


def _only_shifts(found: Groups, member: Member, read: set[tuple[str, int]]) -> bool:
    """Whether a leaf is of channels alone, which it shifts or scales: its axes are of outputs."""
    kernels = {path for path, _ in read}
    out = lambda m: m.path in kernels and (m.path, m.axis) not in read
    beside = (a for a, n in enumerate(found.shapes[member.path]) if n > 1 and a != member.axis)
    return member.path not in kernels and all(
        any(map(out, other.members)) for a in beside for other in found.of(member.path, a)
    )


def _read_axes(
    fn: Callable[..., Any], params: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> set[tuple[str, int]]:
    """The axes of leaves that some contraction sums over."""
    reads = _Reads()
    arrays, full = apart((args, kwargs))

    def run(params: Any, arrays: list[Any]) -> Any:
        args, kwargs = full(arrays)
        found, tree = flatten(params)
        probes = [Probe.of(leaf, path, reads) for path, leaf in found]
        return walked(fn, reads)(jax.tree.unflatten(tree, probes), *args, **kwargs)

    jax.eval_shape(run, params, arrays)
    return reads.axes


class _Reads(Listener, Control):
    """Collects the axes of leaves over which contractions sum."""

    forward_only = True

    def __init__(self) -> None:
        self.axes: set[tuple[str, int]] = set()

    def contracted(self, probe: Probe, i: int, operands: list[Any], params: dict[str, Any]) -> None:
        self._add(probe, tuple(probe.axes[a] for a in params["dimension_numbers"][0][i]))

    def convolved(self, probe: Probe, i: int, operands: list[Any], params: dict[str, Any]) -> None:
        features = params["dimension_numbers"].rhs_spec[0]
        if i == 1:
            self._add(probe, tuple(x for a, x in enumerate(probe.axes) if a != features))

    def _add(self, probe: Probe, labels: Labels) -> None:
        ndim = len(probe.labels)
        self.axes |= {(probe.path, axis + ndim) for axis in original(labels)}
