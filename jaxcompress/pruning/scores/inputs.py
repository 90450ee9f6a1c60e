"""Scores by what a weight meets: the inputs and the feature maps of a run."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.arguments import join_batch, split_batch
from jaxcompress.errors import SpecError
from jaxcompress.gradients.batches import hashable
from jaxcompress.gradients.weights import Weights, float32
from jaxcompress.observe import observe
from jaxcompress.pruning.norms import input_norms
from jaxcompress.rules import KernelAxes


def wanda(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    axes: Mapping[str, KernelAxes] | None = None,
    progress: bool = False,
) -> Any:
    """`|w_ij| |x_i|`: magnitude times the norm of the input over all that a run meets.

    `|x_i|` is the Euclidean norm over all rows of all batches, by `observe`. The paper compares the
    weights of one output with each other, which for a kernel of one output is `make_masks`.

    Args:
      fn: a function of `params` and a batch, such as a Linen module's `apply`; its value is not
        used.
      params: a tree of dense arrays.
      batches: `fn(params, *batch)` for tuples, `fn(params, batch)` for others.
      axes: the input and output axes of leaves by path, for weights that are contracted in several
        ways (a table that is looked up and tied to the output).
      progress: show a progress bar on standard error.

    Returns:
      A score of each weight in the structure of `params`, float32; None for leaves that met no
      input, such as biases.

    Raises:
      SpecError: for a compressed leaf, and as `observe`.

    References:
      Sun et al., *A Simple and Effective Pruning Approach for Large Language Models*, 2024.

    Examples:
      >>> import jax.numpy as jnp
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> params = {"kernel": jnp.array([[1.0, -2.0], [3.0, 4.0]])}
      >>> wanda(fn, params, [jnp.array([[3.0, 0.0], [4.0, 1.0]])])["kernel"].tolist()
      [[5.0, 10.0], [3.0, 4.0]]
    """
    weights = Weights.of(params)
    seen = observe(fn, params, batches, ("second_moment",), progress=progress)
    out: list[Any] = []
    for path, w, at in zip(weights.paths, weights.values, weights.axes(axes)):
        entries = seen.get(path, {})
        if not entries:
            out.append(None)
            continue
        contracted = tuple(at.input) if tuple(at.input) in entries else next(iter(entries))
        if len(entries) > 1 and contracted != tuple(at.input):
            raise SpecError(
                f"{path}: is contracted on each of {sorted(entries)}; give its axes, such as "
                f"axes={{{path!r}: KernelAxes(...)}} of one of them"
            )
        norms = input_norms(path, w.shape, contracted, entries[contracted])
        out.append(jnp.abs(float32(w)) * norms)
    return weights.scores(out)


def hrank(
    feature_fn: Callable[..., Mapping[str, jax.Array]],
    params: Any,
    batches: Iterable[Any],
    *,
    axes: Mapping[str, KernelAxes] | None = None,
) -> Any:
    """The mean rank of the feature map that each filter makes.

    The rank of a map `[h, w]` is the number of its singular values above `max(h, w) eps s_max`, as
    in numpy and torch, with float32's eps; the mean is over all images of all batches.

    Args:
      feature_fn: of the params and a batch, the feature maps by the path of the kernel that makes
        them, `{path: [n, h, w, c]}`; after the activation, as in the paper.
      params: a tree of dense arrays, trained.
      batches: `feature_fn(params, *batch)` for tuples, `feature_fn(params, batch)` for others.
      axes: the input and output axes of leaves by path.

    Returns:
      A score of each weight of the kernels that were named, broadcast from its filter, float32;
      None for all other leaves.

    Raises:
      SpecError: for no batches, a path of no leaf, or maps that do not fit its outputs.

    References:
      Lin et al., *HRank: Filter Pruning Using High-Rank Feature Map*, 2020.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((1, 1, 1, 2))}
      >>> maps = lambda params, x: {"kernel": jnp.stack([x, jnp.ones_like(x)], axis=-1)}
      >>> hrank(maps, params, [jnp.eye(3)[None]])["kernel"].ravel().tolist()
      [3.0, 1.0]
    """
    weights = Weights.of(params)
    where = tuple(weights.axes(axes))
    feature_fn = hashable(feature_fn)
    sums: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    for batch in batches:
        arrays, static = split_batch(batch)
        for path, (found, n) in _ranks(feature_fn, where, static, weights, arrays).items():
            sums[path] = sums.get(path, 0) + found
            counts[path] = counts.get(path, 0) + n
    if not sums:
        raise SpecError("batches is empty: give at least one batch")
    out = []
    for path, x, at in zip(weights.paths, weights.values, where):
        mean = None if path not in sums else float32(sums[path]) / float32(counts[path])
        out.append(None if mean is None else broadcast_outputs(mean, x.shape, at))
    return weights.scores(out)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _ranks(
    feature_fn: Callable[..., Mapping[str, jax.Array]],
    where: tuple[KernelAxes, ...],
    static: Any,
    weights: Weights,
    arrays: list[Any],
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The sums over the images of a batch of the ranks of their maps, and how many images."""
    maps = feature_fn(weights.params(weights.values), *join_batch(arrays, static))
    weights.check_paths(list(maps), "feature_fn's")
    for path, x in maps.items():
        at = weights.paths.index(path)
        outputs = [weights.values[at].shape[a] for a in where[at].output]
        if x.ndim != 4 or x.shape[-1] != math.prod(outputs):
            raise SpecError(
                f"{path}: feature maps of shape {x.shape} do not fit its outputs {outputs}; "
                f"return [n, h, w, {math.prod(outputs)}]"
            )
    # Images and filters first, for the SVD of many small matrices.
    of = lambda x: jnp.linalg.matrix_rank(jnp.moveaxis(float32(x), -1, 1))
    return {
        p: (jnp.sum(of(x), axis=0, dtype=jnp.int32), jnp.int32(x.shape[0])) for p, x in maps.items()
    }


def broadcast_outputs(x: jax.Array, shape: tuple[int, ...], axes: KernelAxes) -> jax.Array:
    """A value for each output of a kernel, after those of a stack, in the kernel's shape."""
    batch = axes.batch_ndim(len(shape))
    sizes = [n if i < batch or i - len(shape) in axes.output else 1 for i, n in enumerate(shape)]
    if x.ndim == 1 and batch:  # the same for each weight of the stack
        sizes[:batch] = [1] * batch
    return jnp.broadcast_to(float32(x).reshape(sizes), shape)
