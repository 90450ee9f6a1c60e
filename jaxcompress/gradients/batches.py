"""Sums over batches of something that a loss gives: one jitted step for each shape of batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxcompress import compat
from jaxcompress.arguments import join_batch, split_batch
from jaxcompress.errors import SpecError
from jaxcompress.gradients.weights import Weights, float32

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
      SpecError: for no batches, a loss that is no scalar, and sums that are not finite (which is
        not looked at where they are traced, as under `jit` and `vmap`).
    """
    loss_fn = hashable(loss_fn)
    # Placed like the weights, so that each step can write its sums over those before.
    place = lambda x: None if isinstance(x, Tracer) or not x.committed else x.sharding
    sums = [jax.device_put(np.zeros(x.shape, np.float32), place(x)) for x in weights.values]
    count, traced = 0, False
    for batch in batches:
        arrays, static = split_batch(batch)
        traced = traced or _is_traced((weights, arrays, extra))
        add, finish = _STEPS[traced]
        sums = add(term, loss_fn, sums, weights, arrays, static, extra, count)
        count += 1
    if not count:
        raise SpecError("batches is empty: give at least one batch")
    means, finite = finish(sums, count)
    for path, fine in zip(weights.paths, finite):
        if not isinstance(fine, Tracer) and not fine:
            raise SpecError(
                f"{path}: its gradients are NaN or infinite; look for what makes them so in the "
                "batches, the params or the loss"
            )
    return means


def _is_traced(tree: Any) -> bool:
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))


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

    An example is handed to the loss as a batch of one, so that its mean is over that one. What has
    no axes, such as a temperature, goes to each as it is.

    Raises:
      SpecError: for arrays that do not have the same number of examples, or none.
    """
    leaves, tree = jax.tree.flatten(args)
    where = [i for i, x in enumerate(leaves) if compat.is_traceable(x) and x.ndim]
    shapes = [leaves[i].shape for i in where]
    if len({shape[0] for shape in shapes}) != 1:
        raise SpecError(
            f"a batch has arrays of shapes {shapes}; the examples are taken one by one, so give "
            "each array the same number of them along its first axis"
        )

    def one(example: list[jax.Array]) -> list[jax.Array]:
        here = list(leaves)
        for i, x in zip(where, example):
            here[i] = x[None]
        return jax.grad(loss)(weights.values, *jax.tree.unflatten(tree, here))

    return [float32(g) for g in jax.vmap(one)([leaves[i] for i in where])]


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


def _finish(sums: list[jax.Array], count: int) -> tuple[list[jax.Array], list[jax.Array]]:
    """The means, and whether each is finite."""
    means = [x / count for x in sums]
    return means, [jnp.all(jnp.isfinite(x)) for x in means]


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
    args = join_batch(arrays, static)
    found = term(loss_of(loss_fn, weights), weights, args, (extra, count))
    return [a + b for a, b in zip(sums, found)]


# The sums of a trace are no buffers to write over: of a `vmap`, they may have another shape.
_STEPS = {
    traced: (
        jax.jit(_add, static_argnums=(0, 1, 5), donate_argnums=() if traced else 2),
        jax.jit(_finish, donate_argnums=() if traced else 0),
    )
    for traced in (False, True)
}


def hashable(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function that may be a static argument.

    What is made of one without a hash is compiled for itself, since it may have changed meanwhile:
    make it once for all steps of a call.
    """
    try:
        hash(fn)
    except TypeError:  # a method of a module with a list among its fields
        return lambda *args: fn(*args)
    return fn
