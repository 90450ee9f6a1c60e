"""Sums over batches of something that a loss gives: one jitted step for each shape of batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import compat
from jaxcompress.errors import SpecError
from jaxcompress.pruning.scores.weights import Weights, float32

# What is summed: of (loss of a list of values and the arguments of a batch), the weights, the
# arguments, and what else the step is given, one float32 array for each value.
Term = Callable[[Callable[..., jax.Array], Weights, tuple[Any, ...], Any], list[jax.Array]]


def mean_over_batches(
    term: Term,
    loss_fn: Callable[..., Any],
    weights: Weights,
    batches: Iterable[Any],
    extra: Any = None,
) -> list[jax.Array]:
    """The mean over batches of a term, float32, each batch counted once.

    Args:
      term: a function at the top of a module, so that the step is compiled once for all calls.
      loss_fn: of the params and a batch: `loss_fn(params, *batch)` for a tuple.
      weights: where it is evaluated.
      batches: any iterable.
      extra: a pytree that the term is given, with the number of the batch.

    Raises:
      SpecError: for no batches, a loss that is no scalar, and sums that are not finite.
    """
    loss_fn = hashable(loss_fn)
    sums = [jax.device_put(np.zeros(x.shape, np.float32)) for x in weights.values]
    count = 0
    for batch in batches:
        arrays, static = _split(batch if isinstance(batch, tuple) else (batch,))
        sums = _add(term, loss_fn, sums, weights, arrays, static, extra, count)
        count += 1
    if not count:
        raise SpecError("batches is empty: give at least one batch")
    means, finite = _finish(sums, count)
    for path, fine in zip(weights.paths, finite):
        if not fine:
            raise SpecError(
                f"{path}: its gradients are NaN or infinite; look for what makes them so in the "
                "batches, the params or the loss"
            )
    return means


def replayed(batches: Iterable[Any]) -> Iterable[Any]:
    """Batches that can be gone through several times; an iterator is held in memory."""
    return list(batches) if isinstance(batches, Iterator) else batches


def gradient(
    loss: Callable[..., jax.Array], weights: Weights, args: tuple[Any, ...], extra: Any
) -> list[jax.Array]:
    """The gradient of the loss of a batch."""
    return [float32(g) for g in jax.grad(loss)(weights.values, *args)]


def each_example(
    loss: Callable[..., jax.Array], weights: Weights, args: tuple[Any, ...]
) -> list[jax.Array]:
    """The gradients of the losses of the examples, with a leading axis of examples.

    An example is handed to the loss as a batch of one, so that its mean is over that one.
    """
    one = lambda *example: jax.grad(loss)(weights.values, *jax.tree.map(lambda x: x[None], example))
    return [float32(g) for g in jax.vmap(one)(*args)]


def loss_of(loss_fn: Callable[..., Any], weights: Weights) -> Callable[..., jax.Array]:
    """The loss as a function of the values."""

    def loss(values: list[jax.Array], *args: Any) -> jax.Array:
        out = loss_fn(weights.params(values), *args)
        if jnp.shape(out) != ():
            raise SpecError(
                f"the loss has shape {jnp.shape(out)}; return one number, such as its jnp.mean"
            )
        return out

    return loss


@functools.partial(jax.jit, donate_argnums=0)
def _finish(sums: list[jax.Array], count: int) -> tuple[list[jax.Array], list[jax.Array]]:
    """The means, and whether each is finite."""
    means = [x / count for x in sums]
    return means, [jnp.all(jnp.isfinite(x)) for x in means]


@functools.partial(jax.jit, static_argnums=(0, 1, 5), donate_argnums=2)
def _add(
    term: Term,
    loss_fn: Callable[..., Any],
    sums: list[jax.Array],
    weights: Weights,
    arrays: list[Any],
    static: Any,
    extra: Any,
    count: Any,
) -> list[jax.Array]:
    tree, fixed = static
    it = iter(arrays)
    args = jax.tree.unflatten(tree, [next(it) if x is None else x[0] for x in fixed])
    found = term(loss_of(loss_fn, weights), weights, args, (extra, count))
    return [a + b for a, b in zip(sums, found)]


def _split(args: tuple[Any, ...]) -> tuple[list[Any], Any]:
    """The arrays of a batch, and what is static."""
    leaves, tree = jax.tree.flatten(args)
    traced = [compat.is_traceable(x) for x in leaves]
    arrays = [x for x, t in zip(leaves, traced) if t]
    return arrays, (tree, tuple(None if t else (x,) for x, t in zip(leaves, traced)))


def hashable(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function that may be a static argument."""
    try:
        hash(fn)
    except TypeError:  # a method of a module with a list among its fields
        return lambda *args: fn(*args)
    return fn
