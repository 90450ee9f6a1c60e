"""What removed channels emitted, put into what is added where they were read."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.errors import CompressError
from jaxcompress.input_stats import InputStats
from jaxcompress.interpret import Control, walked
from jaxcompress.layerwise.folding import folding
from jaxcompress.observe import observe
from jaxcompress.probe import Labels, Listener, Probe, original
from jaxcompress.pruning.structure.consumers import Consumer, consumers
from jaxcompress.pruning.structure.find import Groups, groups
from jaxcompress.pruning.structure.function import is_array, leaves_of
from jaxcompress.pruning.structure.members import Group
from jaxcompress.pruning.structure.plans import LeafPlan, Plan, keep_channels
from jaxcompress.pruning.structure.shrinking import mask
from jaxcompress.rules import KernelAxes, flatten

# By how much of itself a mean in float32 may miss the constant that it is the mean of: a sum of
# n values one after the other by n 2^-24, and 2^11 of them in a row are more than compilers take.
_CONSTANT = 2**-13


def fold_removed(
    fn: Callable[..., Any],
    params: Any,
    plan: Plan,
    batches: Iterable[Any],
    *,
    exact: bool = False,
    strict: bool = True,
) -> Any:
    """Adds to the biases of what reads removed channels what these emitted on average.

    `mask` and `shrink` take a removed channel away altogether. In the model as it was it held
    something all the same: a constant where its filter is zero (what follows makes of the bias or
    of the shift of a batch norm), or else its mean, which is the best constant for it. For each
    kernel W that reads removed channels c, `sum of W[c] E[x[c]]` goes into the leaf that is added
    to its outcome, or is taken off the running mean of the batch norm after it; see
    `consumers`. Do this before `shrink`.

    A channel that is constant is thus removed exactly, to rounding. Where a convolution pads with
    zeros, its border sees less of the constant than the rest: there it is exact but for the border,
    and what is folded is the mean over all places.

    Args:
      fn: the function whose groups the plan is of.
      params: the whole params.
      plan: which channels are removed.
      batches: for the means, as `observe` takes them: `fn(params, *batch)` for a tuple,
        `fn(params, batch)` for anything else.
      exact: refuse removed channels that are not constant on the batches, which those before a
        convolution that pads are not.
      strict: refuse sums that miss something and have no such leaf; False: leave those as they are.

    Returns:
      The whole params with other biases, to be shrunk.

    Raises:
      CompressError: for params that the plan was not made for, no batches, and as above.
      SpecError: where the inputs of a kernel cannot be observed.

    References:
      Polyak and Wolf, *Channel-Level Acceleration of Deep Face Representations*, 2015; Ye et al.,
      *Rethinking the Smaller-Norm-Less-Informative Assumption in Channel Pruning of Convolution
      Layers*, 2018.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxcompress.pruning.structure import groups, keep_channels, shrink
      >>> params = {"up": jnp.array([[1.0, 0.0]]), "shift": jnp.array([0.0, 3.0]),
      ...           "down": jnp.array([[1.0], [2.0]]), "bias": jnp.zeros(1)}
      >>> apply = lambda p, x: (x @ p["up"] + p["shift"]) @ p["down"] + p["bias"]
      >>> x = jnp.array([[5.0]])
      >>> found = groups(apply, params, x)
      >>> plan = keep_channels(found, {found.removable[0]: [0]})
      >>> small, fewer = shrink(apply, fold_removed(apply, params, plan, [x]), plan)
      >>> float(apply(params, x)[0, 0]), float(small(fewer, x)[0, 0])
      (11.0, 11.0)
    """
    rest = iter(batches)
    first = next(rest, None)
    if first is None:
        raise CompressError("batches is empty: give at least one batch, for the means of channels")
    found = consumers(fn, params, plan, *(first if isinstance(first, tuple) else (first,)))
    if strict:
        for reader in found:
            if reader.kernel is None:
                raise CompressError(_refused(reader))
    readers = {reader.kernel: reader for reader in found if reader.kernel is not None}
    if not readers:
        return params
    names = ("mean", "minimum", "maximum") if exact else ("mean",)
    stats = observe(fn, params, itertools.chain([first], rest), names, leaves=list(readers))
    leaves, structure = flatten(params)
    arrays, plans = dict(leaves), {leaf.path: leaf for leaf in plan.leaves}
    for path, reader in readers.items():
        missing = _missing(arrays[path], plans[path], stats[path], reader, exact)
        if reader.into is None:
            if strict and bool(jnp.any(missing)):
                raise CompressError(_refused(reader))
            continue
        x = jnp.asarray(arrays[reader.into])
        sum_ = x.astype(jnp.float32) + reader.sign * missing.reshape(x.shape)
        arrays[reader.into] = sum_.astype(x.dtype)
    return jax.tree.unflatten(structure, [arrays[path] for path, _ in leaves])


def _refused(reader: Consumer) -> str:
    what = f"{reader.kernel}, {reader.place}," if reader.kernel else f"the sum {reader.place}"
    return (
        f"{what} reads removed channels, and what they emitted can be put nowhere: {reader.why}; "
        "plan without these channels, or write strict=False to leave this as it is"
    )


def _missing(
    kernel: Any,
    leaf: LeafPlan,
    stats: Mapping[tuple[int, ...], InputStats],
    reader: Consumer,
    exact: bool,
) -> jax.Array:
    """What the outcome of a kernel misses: `[*stack, *outputs]`."""
    less = [axes for axes in stats if any(leaf.kept[a] is not None for a in axes)]
    if len(less) != 1:
        raise CompressError(f"{leaf.path} reads removed channels in several ways")
    (inputs,) = less
    outputs = [a for a in range(reader.stack - kernel.ndim, 0) if a not in inputs]
    axes = tuple(a + kernel.ndim for a in inputs)
    kept = tuple(k if a in axes else None for a, k in enumerate(leaf.kept))
    w = jnp.asarray(kernel, jnp.float32)
    gone = w - mask([w], Plan((LeafPlan("0", leaf.shape, kept),)))[0]
    own = stats[inputs]
    how = folding(w, KernelAxes(inputs, tuple(outputs)))
    groups = own.mean.shape[reader.stack] if own.mean.ndim > reader.stack + 1 else 1
    gone = how._replace(groups=groups).fold(gone)
    values = _constants(own, gone, leaf.path) if exact else own.mean
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("...k,...kn->...n", values, gone, precision=highest)


def _constants(stats: InputStats, gone: jax.Array, path: str) -> jax.Array:
    """The one value of each input that is removed."""
    value = jnp.where(stats.mean > 0, stats.maximum, stats.minimum)
    moves = jnp.abs(value - stats.mean) > _CONSTANT * jnp.abs(value)
    moves |= (stats.maximum > 0) & (stats.minimum < 0)
    if bool(jnp.any(moves & jnp.any(gone != 0, axis=-1))):
        raise CompressError(
            f"channels that {path} reads and that are removed are not constant on the batches, or "
            "not at the border of a convolution that pads; write exact=False to fold their means"
        )
    return value


def zero_channels(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Plan:
    """The plan that removes the channels whose filters are all zero.

    They are what structured sparsity leaves behind (`Prune` with a pattern of whole channels,
    `group_lasso`). A filter is zero where all that makes the channel is: the outputs of kernels and
    the features of tables, of all leaves of the group that make something of other channels. Its
    bias and its norms may be anything, so that it may still emit a constant: `fold_removed` puts
    that into what reads it, and with `exact=True` refuses what is no constant, as where a value of
    each row scales the channels.

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
    alive, makers = np.zeros(group.size, bool), 0
    kernels = {path for path, _ in read}
    for member in group.members:
        shape = found.shapes[member.path]
        beside = any(n > 1 for a, n in enumerate(shape) if a != member.axis)
        if (member.path, member.axis) in read or not (beside or member.path in kernels):
            continue  # it reads the channel, or shifts and scales it
        makers += 1
        others = tuple(a for a in range(len(shape)) if a != member.axis)
        filled = (arrays[member.path] != 0).any(axis=others)
        alive |= filled[member.places(np.arange(group.size))].any(axis=1)
    return alive if makers else np.ones(group.size, bool)


def _read_axes(
    fn: Callable[..., Any], params: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> set[tuple[str, int]]:
    """The axes of leaves that some contraction sums over."""
    reads = _Reads()
    others, rest = jax.tree.flatten((args, kwargs))
    traced = [is_array(x) for x in others]

    def run(params: Any, arrays: list[Any]) -> Any:
        it = iter(arrays)
        full = [next(it) if t else x for t, x in zip(traced, others)]
        args, kwargs = jax.tree.unflatten(rest, full)
        found, tree = flatten(params)
        probes = [Probe.of(leaf, path, reads) for path, leaf in found]
        return walked(fn, reads)(jax.tree.unflatten(tree, probes), *args, **kwargs)

    jax.eval_shape(run, params, [x for t, x in zip(traced, others) if t])
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
