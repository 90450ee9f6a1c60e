"""Scores of whole filters from the weights alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.errors import SpecError
from jaxcompress.gradients.weights import Weights, float32, per_weight, placed_like, whole
from jaxcompress.numerics import unit_scale
from jaxcompress.pruning.scores.inputs import broadcast_outputs
from jaxcompress.rules import KernelAxes


def filter_norm(params: Any, *, p: int = 1, axes: Mapping[str, KernelAxes] | None = None) -> Any:
    """`sum |w|` or `sqrt(sum w**2)` over the weights that make one output.

    Args:
      params: a tree of dense arrays.
      p: 1 or 2.
      axes: the input and output axes of leaves by path; Flax's conventions for all others.

    Returns:
      A score of each weight in the structure of `params`, float32, that of its filter; None for
      leaves without outputs, such as biases.

    Raises:
      SpecError: for another p, or a compressed leaf.

    References:
      Li et al., *Pruning Filters for Efficient ConvNets*, 2017; He et al., *Soft Filter Pruning for
      Accelerating Deep Convolutional Neural Networks*, 2018 (p = 2).

    Examples:
      >>> import jax.numpy as jnp
      >>> filter_norm({"kernel": jnp.array([[1.0, 0.0], [-2.0, 1.0]])})["kernel"].tolist()
      [[3.0, 1.0], [3.0, 1.0]]
    """
    if p not in (1, 2):
        raise SpecError(f"p={p!r}: write 1 or 2")
    weights = Weights.of(params)

    def norm(filters: jax.Array) -> jax.Array:
        if p == 1:
            return jnp.sum(jnp.abs(filters), axis=1)
        return _row_norms(filters)

    return weights.scores(
        [_of_filters(norm, x, at) for x, at in zip(weights.values, weights.axes(axes))]
    )


def geometric_median(params: Any, *, axes: Mapping[str, KernelAxes] | None = None) -> Any:
    """`sum_j |W_i - W_j|`: the distances of a filter to the others of its kernel.

    The sum is least near the geometric median of the filters: those are the ones that the others
    can stand in for, however large. Distances are of differences, not of products, so that filters
    close to each other are told apart.

    Args:
      params: a tree of dense arrays.
      axes: the input and output axes of leaves by path; Flax's conventions for all others.

    Returns:
      As `filter_norm`.

    Raises:
      SpecError: for a compressed leaf.

    References:
      He et al., *Filter Pruning via Geometric Median for Deep Convolutional Neural Networks
      Acceleration*, 2019.

    Examples:
      >>> import jax.numpy as jnp
      >>> geometric_median({"kernel": jnp.array([[0.0, 1.0, 5.0]])})["kernel"].tolist()
      [[6.0, 5.0, 9.0]]
    """
    weights = Weights.of(params)

    def distances(filters: jax.Array) -> jax.Array:
        return jax.lax.map(lambda x: jnp.sum(_row_norms(filters - x)), filters)

    return weights.scores(
        [_of_filters(distances, x, at) for x, at in zip(weights.values, weights.axes(axes))]
    )


def _row_norms(x: jax.Array) -> jax.Array:
    """The Euclidean norm of each row, also where its square is out of range."""
    scale, inverse = unit_scale(jnp.max(jnp.abs(x), axis=1, initial=0))
    return scale * jnp.sqrt(jnp.sum(jnp.square(x * inverse[:, None]), axis=1))


def _of_filters(fn: Any, x: jax.Array, axes: KernelAxes) -> jax.Array | None:
    """`fn` of the filters `[outputs, weights]` of a kernel, broadcast to its shape."""
    if not axes.output:
        return None
    batch = axes.batch_ndim(x.ndim)
    order = [*range(batch), *(x.ndim + a for a in (*sorted(axes.output), *sorted(axes.input)))]
    outputs = math.prod(x.shape[a] for a in axes.output)
    inputs = math.prod(x.shape[a] for a in axes.input)
    filters = whole(float32(x)).transpose(order).reshape(*x.shape[:batch], outputs, inputs)
    if not x.size:
        return jnp.zeros(x.shape, jnp.float32)
    found = per_weight(fn, batch)(filters)
    return placed_like(x, broadcast_outputs(found, x.shape, axes))


def batch_norm_slimming(
    params: Any,
    pairs: Mapping[str, str],
    *,
    axes: Mapping[str, KernelAxes] | None = None,
) -> Any:
    """`|gamma|`: the scale of the batch normalization behind each output of a kernel.

    Training with an L1 penalty on the scales drives those of dispensable channels to zero.

    Args:
      params: a tree of dense arrays.
      pairs: the scale behind each kernel, by path, such as `{"conv/kernel": "bn/scale"}`.
      axes: the input and output axes of leaves by path; Flax's conventions for all others.

    Returns:
      A score of each weight of the kernels and of their scales, float32; None for all other leaves.

    Raises:
      SpecError: for a path of no leaf, a scale that does not fit its kernel, or a compressed leaf.

    References:
      Liu et al., *Learning Efficient Convolutional Networks Through Network Slimming*, 2017.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> params = {"conv": {"kernel": jnp.ones((1, 2))}, "bn": {"scale": jnp.array([0.5, -2.0])}}
      >>> scores = batch_norm_slimming(params, {"conv/kernel": "bn/scale"})
      >>> print(scores["conv"]["kernel"])
      [[0.5 2. ]]
    """
    weights = Weights.of(params)
    weights.check_paths([*pairs, *pairs.values()], "pairs:")
    values = dict(zip(weights.paths, weights.values))
    where = dict(zip(weights.paths, weights.axes(axes)))
    found: dict[str, jax.Array] = {}
    for kernel, scale in pairs.items():
        gamma, shape = jnp.abs(float32(values[scale])), values[kernel].shape
        outputs = _sizes(shape, where[kernel].output)
        batch = shape[: where[kernel].batch_ndim(len(shape))]
        if not outputs or gamma.shape not in (outputs, (*batch, *outputs)):
            raise SpecError(
                f"pairs: {scale!r} of shape {gamma.shape} does not fit the outputs {outputs} of "
                f"{kernel!r}; write the scale that is behind it, or give the kernel's axes"
            )
        found[scale] = gamma
        flat = gamma.reshape(-1) if gamma.shape == outputs else gamma
        found[kernel] = broadcast_outputs(flat, shape, where[kernel])
    return weights.scores([found.get(path) for path in weights.paths])


def nisp(
    params: Any,
    order: Sequence[str],
    *,
    importance: jax.Array | None = None,
    axes: Mapping[str, KernelAxes] | None = None,
) -> Any:
    """`s_{l-1} = |W_l| s_l`: the importance of the final responses, carried back to each filter.

    A filter has the importance of the unit that it makes: `s_L`, of the outputs of the last kernel,
    is given, and that of the unit i before a kernel is the sum over its outputs j (and, in a
    convolution, over its places) of `|W_ij| s_j`. Where a convolution is flattened, channels last,
    before a dense kernel, the importance of a channel is summed over its places.

    Args:
      params: a tree of dense arrays.
      order: the paths of the kernels of a chain, first to last; between them activations,
        pooling and normalization.
      importance: of the final responses; ones unless given (the paper ranks them by infinite
        feature selection).
      axes: the input and output axes of leaves by path; Flax's conventions for all others, which
        are those of images: a convolution of one or three spatial axes wants them here.

    Returns:
      A score of each weight of the kernels, float32; None for all other leaves. Each kernel's are
      divided by a power of two, so that a deep chain stays finite: compare within a kernel.

    Raises:
      SpecError: for a path of no leaf, or kernels that do not follow each other.

    References:
      Yu et al., *NISP: Pruning Networks Using Neuron Importance Score Propagation*, 2018.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"a": jnp.ones((1, 2)), "b": jnp.array([[0.5], [-2.0]])}
      >>> nisp(params, ["a", "b"])["a"].tolist()
      [[0.25, 1.0]]
    """
    weights = Weights.of(params)
    weights.check_paths(order, "order:")
    values = dict(zip(weights.paths, weights.values))
    where = dict(zip(weights.paths, weights.axes(axes)))
    found: dict[str, jax.Array] = {}
    after = None if importance is None else float32(jnp.asarray(importance)).reshape(-1)
    for path in reversed(order):
        w, at = jnp.abs(float32(values[path])), where[path]
        outputs = math.prod(_sizes(w.shape, at.output))
        if at.batch_ndim(w.ndim) or not at.output:
            told = (
                f", or for a convolution of {w.ndim - 2} spatial axes write axes={{{path!r}: "
                f"KernelAxes({tuple(range(-w.ndim, -1))}, (-1,))}}"
            )
            raise SpecError(
                f"order: {path!r} of shape {w.shape} is no single kernel; leave it out"
                + (told if w.ndim in (3, 5) else "")
            )
        after = jnp.ones(outputs) if after is None else after
        if not outputs or after.size % outputs:
            raise SpecError(
                f"order: {path!r} has {outputs} outputs, and what follows {after.size} inputs; "
                "write the kernels one after the other, and an importance for each final response"
            )
        after = after.reshape(-1, outputs).sum(axis=0)  # the places of a channel, flattened
        after = after * unit_scale(jnp.max(jnp.abs(after)))[1]
        found[path] = broadcast_outputs(after, w.shape, at)
        spatial = at.input[:-1] if len(at.input) == 3 else ()
        after = jnp.sum(w * found[path], axis=(*spatial, *at.output)).reshape(-1)
    return weights.scores([found.get(path) for path in weights.paths])


def _sizes(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[a] for a in sorted(axes))
