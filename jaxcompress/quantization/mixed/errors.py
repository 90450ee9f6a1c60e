"""What it costs in quality to round one leaf: by its outputs, the loss's curvature, or a run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arguments import join_batch, split_batch
from jaxcompress.compress import Stats
from jaxcompress.errors import SpecError
from jaxcompress.gradients.batches import hashable, mean_over_batches
from jaxcompress.gradients.curvature import hessian_diagonal, squared_gradients
from jaxcompress.gradients.weights import Weights
from jaxcompress.input_stats import InputStats
from jaxcompress.layerwise.folding import Folding, folding
from jaxcompress.rules import KernelAxes, flatten
from jaxcompress.specs import is_count, on_all_devices, on_auto_axes

# The error of a leaf at a path: what it was, and what it would be.
Error = Callable[[str, jax.Array, jax.Array], Any]

# The same of a leaf at all the paths where it is tied.
ErrorOfAll = Callable[[tuple[str, ...], jax.Array, jax.Array], Any]

KINDS = ("output", "end_to_end", "hessian", "fisher", "weight")


def summed(error: Error) -> ErrorOfAll:
    """The sum over the places of a tied leaf."""
    return lambda paths, leaf, rounded: sum(float(error(p, leaf, rounded)) for p in paths)


def weight_error(path: str, leaf: jax.Array, rounded: jax.Array) -> jax.Array:
    """`|d|**2 / |w|**2` with `d` what rounding changes; needs no data."""
    return _relative(leaf, rounded)


@jax.jit
def _relative(w: jax.Array, rounded: jax.Array) -> jax.Array:
    w, d = w.astype(jnp.float32), rounded.astype(jnp.float32) - w.astype(jnp.float32)
    return _share(jnp.sum(jnp.square(d)), jnp.sum(jnp.square(w)))


def _share(part: jax.Array, whole: jax.Array) -> jax.Array:
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 0.0)


def output_error(stats: Stats) -> Error:
    """`tr(d' G d) / tr(w' G w)`, G the Gram matrix of the inputs that meet the leaf.

    The squared error of the leaf's outputs over their square, both summed over all that was
    observed, and over all contractions of the leaf.
    """

    def error(path: str, leaf: jax.Array, rounded: jax.Array) -> Any:
        if path not in stats:
            raise SpecError(f"{path}: has no statistics; observe a function that uses it")
        part = whole = jnp.zeros((), jnp.float32)
        leaf, _ = on_auto_axes(leaf)
        rounded, _ = on_auto_axes(rounded)
        for axes, found in stats[path].items():
            if found.gram is None:
                raise SpecError(f"{path}: has no Gram matrix; observe with ('gram',)")
            how = _folding(leaf, axes, found)
            gram = on_all_devices(jnp.asarray(found.gram), leaf)
            a, b = _squares(how, leaf, rounded, gram)
            part, whole = part + a, whole + b
        return _share(part, whole)

    return error


def _folding(leaf: Any, axes: tuple[int, ...], found: InputStats) -> Folding:
    """The leaf's matrices as its Gram matrix counts them: a stack, groups, or neither."""
    lead = np.shape(found.count)
    first = leaf.ndim + min(axes)
    batch = 0
    while batch < min(len(lead), first) and lead[batch] == leaf.shape[batch]:
        batch += 1
    outputs = tuple(a for a in range(batch - leaf.ndim, 0) if a not in axes)
    return folding(leaf, KernelAxes(axes, outputs), int(np.prod(lead[batch:], dtype=np.int64)))


@functools.partial(jax.jit, static_argnums=0)
def _squares(
    how: Folding, w: jax.Array, rounded: jax.Array, gram: jax.Array
) -> tuple[jax.Array, jax.Array]:
    w, rounded = (how.fold(x.astype(jnp.float32)) for x in (w, rounded))

    def square(x: jax.Array) -> jax.Array:
        if gram.ndim < x.ndim:  # of a look-up, the diagonal
            return jnp.sum(gram[..., None] * jnp.square(x))
        return jnp.sum(x * jnp.matmul(gram, x, precision=jax.lax.Precision.HIGHEST))

    # Rounding of the sums may leave a zero slightly negative.
    return jnp.maximum(square(rounded - w), 0), jnp.maximum(square(w), 0)


def hessian_error(
    loss_fn: Callable[..., Any], params: Any, batches: Iterable[Any], key: Any, probes: int
) -> Error:
    """`t |d|**2 / 2`, t the mean of the diagonal of the leaf's block of the loss's Hessian.

    A mean below zero counts as zero: rounding is not thought to lower the loss.
    """
    if key is None:
        raise SpecError("sensitivity='hessian' draws probes: write key=jax.random.key(0)")
    if not is_count(probes, 1):
        raise SpecError(f"probes={probes!r}: write a whole number from 1 on")
    weights = Weights.of(params)
    keys = jax.random.split(key, probes)
    found = mean_over_batches(hessian_diagonal, loss_fn, weights, batches, keys)
    traces = {p: jnp.maximum(jnp.mean(x), 0) for p, x in zip(weights.paths, found) if x.size}
    return lambda path, leaf, rounded: _curved(traces[path], leaf, rounded)


def fisher_error(loss_fn: Callable[..., Any], params: Any, batches: Iterable[Any]) -> Error:
    """`sum_k f_k d_k**2 / 2`, f the mean over examples of the squared gradients of the loss."""
    weights = Weights.of(params)
    found = mean_over_batches(squared_gradients, loss_fn, weights, batches)
    squares = dict(zip(weights.paths, found))
    return lambda path, leaf, rounded: _curved(squares[path], leaf, rounded)


@jax.jit
def _curved(curvature: jax.Array, w: jax.Array, rounded: jax.Array) -> jax.Array:
    d = rounded.astype(jnp.float32) - w.astype(jnp.float32)
    return jnp.sum(curvature * jnp.square(d)) / 2


def end_to_end_error(fn: Callable[..., Any], params: Any, batches: Sequence[Any]) -> ErrorOfAll:
    """`sum |y' - y|**2 / sum |y|**2` of what `fn` returns, with this leaf rounded and no other."""
    if not batches:
        raise SpecError("batches is empty: give at least one batch")
    fn = hashable(fn)
    leaves, structure = flatten(params)
    split = [split_batch(batch) for batch in batches]

    @functools.partial(jax.jit, static_argnums=2)
    def outputs(params: Any, arrays: Any, static: Any) -> list[jax.Array]:
        out = jax.tree.leaves(fn(params, *join_batch(arrays, static)))
        kept = [jnp.asarray(x) for x in out if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
        if not kept:
            raise SpecError("fn returns nothing that is floating, so no distance can be taken")
        return [x.astype(jnp.float32) for x in kept]

    @jax.jit
    def square(a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
        return sum((jnp.sum(jnp.square(x - y)) for x, y in zip(a, b)), jnp.zeros(()))

    exact = [outputs(params, *batch) for batch in split]
    whole = sum(float(square(y, [jnp.zeros_like(x) for x in y])) for y in exact)

    def error(paths: tuple[str, ...], leaf: jax.Array, rounded: jax.Array) -> float:
        values = [rounded if path in paths else x for path, x in leaves]
        new = jax.tree.unflatten(structure, values)
        part = sum(float(square(outputs(new, *b), y)) for b, y in zip(split, exact))
        return part / whole if whole > 0 else part

    return error
