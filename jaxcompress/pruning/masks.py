"""Masks of a whole tree from scores, and their use: what is done once, outside of training."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcompress import compat
from jaxcompress.errors import SpecError
from jaxcompress.input_stats import InputStats
from jaxcompress.pruning.choice import Choice, Counts, check_choice, check_units
from jaxcompress.pruning.sites import find_sites
from jaxcompress.rules import KernelAxes, default_axes, flatten


def make_masks(
    scores: Any,
    sparsity: float,
    rules: Mapping[str, str | None],
    *,
    scope: str = "local",
    allocation: str = "uniform",
    axes: Mapping[str, KernelAxes] | None = None,
) -> Any:
    """Masks that keep the weights, or units of weights, of largest score.

    Of n units `round(n (1 - sparsity))` stay, exactly, ties by the lowest index. A unit that has
    several weights (see `patterns`) has the mean of their scores. Where the patterns say `n:m`,
    of each m weights `max(n, round(m (1 - sparsity)))` stay.

    Args:
      scores: a tree in the structure of the params; a larger value is kept longer. Those of
        `jaxcompress.pruning.scores`, or any.
      sparsity: the share of units to remove, from 0 to 1.
      rules: `{glob: pattern or None}` as in `sparsify`.
      scope: `local` compares within each weight, `global` among all that the rules name.
      allocation: of a local budget: `uniform`, `erk`, or `lamp`.
      axes: the input and output axes of leaves by path, from `kernel_axes`.

    Returns:
      The tree with a mask, bool, for each leaf that the rules name, and `optax.MaskedNode()`
      elsewhere.

    Raises:
      RuleError: for a rule that matches nothing or what has no such scores.
      SpecError: for a sparsity outside of 0 to 1, an unknown scope or allocation, or patterns of
        several kinds under one threshold.

    Examples:
      >>> import jax.numpy as jnp
      >>> scores = {"kernel": jnp.array([[1.0, 2.0], [4.0, 3.0]]), "bias": jnp.zeros(2)}
      >>> make_masks(scores, 0.5, {"kernel": "unstructured"})["kernel"].tolist()
      [[False, False], [True, True]]
    """
    if not 0 <= sparsity <= 1:
        raise SpecError(f"sparsity={sparsity!r}: write the share to remove, from 0 to 1")
    check_choice(scope, allocation)
    sites = find_sites(scores, rules, axes or {})
    choice = Choice(tuple(sites), scope, allocation)
    check_units(choice)
    leaves, structure = jax.tree.flatten(scores)
    out: list[Any] = [optax.MaskedNode()] * len(leaves)
    # Traced, so that another sparsity is no other program.
    counts = choice.counts([sparsity], lambda count: np.uint32(count))
    for site, mask in zip(sites, _chosen(choice, [leaves[s.place] for s in sites], counts)):
        out[site.place] = mask
    return jax.tree.unflatten(structure, out)


@functools.partial(jax.jit, static_argnums=0)
def _chosen(choice: Choice, scores: list[jax.Array], counts: Counts) -> list[jax.Array]:
    def run(scores: list[jax.Array], counts: Counts) -> list[jax.Array]:
        units = choice.pooled(scores, signed=True)
        return choice.spread(choice.take(units, counts, signed=True))

    return compat.auto_like(run, (scores, counts), scores)


def apply_masks(params: Any, masks: Any) -> Any:
    """The params with exact zeros where a mask is false.

    Args:
      params: a tree.
      masks: masks in its structure; None or `optax.MaskedNode()` leaves a leaf as it is.

    Examples:
      >>> import jax.numpy as jnp
      >>> apply_masks({"w": jnp.array([1.0, -jnp.inf])}, {"w": jnp.array([True, False])})
      {'w': Array([1., 0.], dtype=float32)}
    """
    flat: tuple[list[Any], Any] = jax.tree.flatten(params)
    leaves, structure = flat
    slots = structure.flatten_up_to(masks)
    return jax.tree.unflatten(structure, [_masked(x, m) for x, m in zip(leaves, slots)])


def _masked(x: Any, mask: Any) -> Any:
    if mask is None or isinstance(mask, optax.MaskedNode):
        return x
    return jnp.where(mask, x, jnp.zeros_like(x))


def fit_masks(
    masks_at: Callable[[float], Any],
    cost: Callable[[Any], float],
    budget: float,
    *,
    steps: int = 24,
) -> Any:
    """The least sparse masks that cost no more than a budget, by bisection on the sparsity.

    Args:
      masks_at: masks of a sparsity, such as `lambda s: make_masks(scores, s, rules)`; those of a
        higher one must not cost more.
      cost: what masks cost: `count_kept`, `sparse_bytes`, `multiplications`, or any.
      budget: what they may cost.
      steps: bisections; the sparsity is met to `2**-steps`.

    Raises:
      SpecError: when nothing is left and it still costs more.

    Examples:
      >>> import jax.numpy as jnp
      >>> scores = {"kernel": jnp.arange(100.0)}
      >>> masks = fit_masks(
      ...     lambda s: make_masks(scores, s, {"kernel": "unstructured"}), count_kept, budget=33
      ... )
      >>> count_kept(masks)
      33
    """
    masks = masks_at(1.0)
    if (least := cost(masks)) > budget:
        raise SpecError(
            f"budget={budget}: {least} is left when all is removed that the rules name; write "
            "more, or rules for more leaves"
        )
    full = masks_at(0.0)
    if cost(full) <= budget:
        return full
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        trial = masks_at(middle)
        if cost(trial) <= budget:
            high, masks = middle, trial
        else:
            low = middle
    return masks


def count_kept(masks: Any) -> int:
    """How many weights masks keep."""
    return sum(int(np.count_nonzero(np.asarray(m))) for m in jax.tree.leaves(masks))


def sparse_bytes(params: Any, masks: Any, *, axes: Mapping[str, KernelAxes] | None = None) -> int:
    """What the masked leaves take once `Prune()` has stored them, indices included.

    Args:
      params: the tree, whose dtypes count.
      masks: masks in its structure. In a stack each weight is stored with as many values as the
        fullest has.
      axes: the input and output axes of leaves by path, from `kernel_axes`.

    Examples:
      >>> import jax.numpy as jnp
      >>> sparse_bytes({"w": jnp.ones(64)}, {"w": jnp.arange(64) < 16})
      72
    """
    total = 0
    for path, x, mask in _masked_leaves(params, masks):
        batch = (axes or {}).get(path, default_axes(path, mask.ndim)).batch_ndim(mask.ndim)
        size = math.prod(mask.shape[batch:])
        layers = [np.flatnonzero(m) for m in np.asarray(mask).reshape(-1, size)] if size else []
        kept = max(map(len, layers), default=0)
        layers = [_filled_up(where, kept, size) for where in layers]
        each = kept * x.dtype.itemsize + max((_index_bytes(w, size) for w in layers), default=0)
        total += len(layers) * each
    return total


def _filled_up(where: np.ndarray, kept: int, size: int) -> np.ndarray:
    """The places of a weight of a stack with the first zeros up to as many as the fullest has."""
    if len(where) == kept:
        return where
    free = np.setdiff1d(np.arange(size), where)
    return np.sort(np.concatenate([where, free[: kept - len(where)]]))


def _index_bytes(where: np.ndarray, size: int) -> int:
    """The smaller of a bit mask and gaps with escapes, as `arrays.sparse.best_layout` has it."""
    gaps = np.diff(where, prepend=-1) - 1
    sizes = [size]
    for bits in range(2, 9) if len(where) else ():
        entries = len(where) + int(np.sum(gaps // (2**bits - 1)))
        sizes.append(-(-entries // 64) * 64 * bits)
    return -(-min(sizes) // 8)


def multiplications(
    masks: Any, stats: Mapping[str, Mapping[tuple[int, ...], InputStats]], examples: int
) -> float:
    """How many multiplications by kept weights one example takes.

    Args:
      masks: masks of a tree.
      stats: any statistics of the inputs that its weights meet, from `observe`: a weight is
        multiplied by as many inputs as were counted.
      examples: how many examples the batches of `observe` held.

    Raises:
      SpecError: for a mask of a leaf that the statistics do not have.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> fn = lambda params, x: x @ params["w"]
      >>> stats = jc.observe(fn, {"w": jnp.ones((3, 4))}, [jnp.ones((10, 5, 3))], ("abs_max",))
      >>> multiplications({"w": jnp.ones((3, 4), bool)}, stats, examples=10)
      60.0
    """
    total = 0.0
    for path, mask in flatten(masks)[0]:
        if not hasattr(mask, "shape"):
            continue
        if path not in stats:
            raise SpecError(
                f"{path}: has a mask and no statistics; observe a function that uses it"
            )
        for seen in stats[path].values():
            counts = np.asarray(seen.count, np.float64)
            lead = counts.ndim if counts.shape == mask.shape[: counts.ndim] else 0
            kept = np.asarray(mask).sum(axis=tuple(range(lead, mask.ndim)), dtype=np.float64)
            # Of groups, each meets its share of the weights.
            total += float(np.sum(kept * (counts if lead else counts.mean())))
    return total / examples


def _masked_leaves(params: Any, masks: Any) -> list[tuple[str, Any, Any]]:
    """The path, array and mask of each leaf that has one."""
    leaves = dict(flatten(params)[0])
    return [(path, leaves[path], m) for path, m in flatten(masks)[0] if hasattr(m, "shape")]
