"""What removed channels emitted, put into what is added where they were read."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.errors import CompressError
from jaxcompress.input_stats import InputStats
from jaxcompress.layerwise.folding import folding
from jaxcompress.observe import observe
from jaxcompress.pruning.structure.plans import LeafPlan, Plan
from jaxcompress.pruning.structure.readers import Consumer, consumers
from jaxcompress.pruning.structure.shrinking import mask_channels
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

    `mask_channels` and `shrink` take a removed channel away altogether. In the model as it was it
    held something all the same: a constant where its filter is zero (what follows makes of the bias
    or of the shift of a batch norm), or else its mean, which is the best constant for it. For each
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
    gone = w - mask_channels([w], Plan((LeafPlan("0", leaf.shape, kept),)))[0]
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
