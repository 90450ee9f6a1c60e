"""Scores in rounds: what is left is scored again before more goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcompress.errors import SpecError
from jaxcompress.gradients.batches import (
    gradient,
    hashable,
    mean_over_batches,
    replayed,
)
from jaxcompress.gradients.weights import Weights, float32
from jaxcompress.pruning.masks import apply_masks, make_masks
from jaxcompress.rules import KernelAxes
from jaxcompress.specs import is_count


class ScoredMasks(NamedTuple):
    """What scoring in rounds ends with.

    Attributes:
      scores: those of the last round, which were computed under the masks of the round before;
        minus infinity for what those removed for good.
      masks: those made from them, at the sparsity that was asked for.
    """

    scores: Any
    masks: Any


def rounds_of(
    score: Callable[[Any, Any], Any],
    params: Any,
    sparsity: float,
    rules: Mapping[str, str | None],
    rounds: int,
    scope: str,
    axes: Mapping[str, KernelAxes] | None,
    *,
    revive: bool = False,
) -> ScoredMasks:
    """Scores, masks and scores again, with `(1 - sparsity)**(k / rounds)` left after round k.

    Args:
      score: of params with zeros where the masks are false, and of the masks: None in the first
        round.
      params: a tree of dense arrays.
      sparsity: in the end.
      rules: as for `make_masks`.
      rounds: how many.
      scope: as for `make_masks`.
      axes: as for `make_masks`.
      revive: whether what was removed may come back when it is scored again.

    Raises:
      SpecError: as `shares`.
    """
    masked, masks = params, None
    for removed in shares(sparsity, rounds)[1:]:
        scores = score(masked, masks)
        if masks is not None and not revive:
            scores = below_all(scores, masks)
        masks = in_structure(make_masks(scores, removed, rules, scope=scope, axes=axes), params)
        masked = apply_masks(params, masks)
    return ScoredMasks(scores, masks)


def shares(sparsity: Any, rounds: Any) -> list[float]:
    """What is removed after each round from 0 on: `1 - (1 - sparsity)**(k / rounds)`.

    Raises:
      SpecError: for no rounds, or a sparsity that no way of shrinking by shares leads to.

    Examples:
      >>> shares(0.75, 2)
      [0.0, 0.5, 0.75]
    """
    if not is_count(rounds, 1):
        raise SpecError(f"rounds={rounds!r}: write a whole number from 1 on")
    try:
        last = math.nan if isinstance(sparsity, (str, bytes)) else float(sparsity)
    except (TypeError, ValueError):
        last = math.nan
    if not 0 <= last < 1:
        raise SpecError(f"sparsity={sparsity!r}: write the share to remove, from 0 to below 1")
    # The last one is not computed: (1 - s)**1 need not be 1 - s in floating point.
    return [*(1 - (1 - last) ** (k / int(rounds)) for k in range(int(rounds))), last]


def below_all(scores: Any, masks: Any) -> Any:
    """The scores with minus infinity where a mask is false: those come last, even among ties."""
    return jax.tree.map(
        lambda x, m: jnp.where(m, x, -jnp.inf) if isinstance(m, jax.Array) else x,
        scores, masks, is_leaf=lambda x: x is None,
    )  # fmt: skip


def in_structure(masks: Any, params: Any) -> Any:
    """Masks made from scores, in the structure of the params: leaves without scores have none."""
    structure: Any = jax.tree.structure(params)
    slots = [optax.MaskedNode() if m is None else m for m in structure.flatten_up_to(masks)]
    return jax.tree.unflatten(structure, slots)


def force(
    loss_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    sparsity: float,
    rules: Mapping[str, str | None],
    *,
    rounds: int = 20,
    revive: bool = True,
    scope: str = "global",
    axes: Mapping[str, KernelAxes] | None = None,
) -> ScoredMasks:
    """`|w g(w m)|` in rounds: the gradient where the weights removed so far are zero.

    `(1 - sparsity)**(k / rounds)` of the weights are left after round k: what the masks keep
    shrinks by the same share each time. All weights are scored anew, also those removed, so that
    they may come back (FORCE); with `revive=False` they may not (iterative SNIP), and their score
    is minus infinity. One round is SNIP.

    Args:
      loss_fn: as `snip`.
      params: a tree of dense arrays, before training.
      batches: as `snip`; gone through in every round, so an iterator is held in memory.
      sparsity: the share to remove in the end, from 0 to below 1.
      rules: `{glob: pattern or None}` as for `make_masks`.
      rounds: how many; one jitted step serves all.
      revive: whether a removed weight may come back.
      scope: `global` or `local`.
      axes: the input and output axes of leaves by path.

    Returns:
      The scores of the last round and the masks.

    Raises:
      SpecError: for no rounds, a sparsity out of range, and as `snip` and `make_masks`.
      RuleError: for a rule that matches nothing.

    References:
      de Jorge et al., *Progressive Skeletonization: Trimming More Fat from a Network at
      Initialization*, 2021.

    Examples:
      >>> import jax.numpy as jnp
      >>> loss_fn = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
      >>> params = {"w": jnp.array([1.0, 2.0, 3.0, 4.0])}
      >>> force(loss_fn, params, [jnp.eye(4)], 0.5, {"w": "unstructured"}, rounds=2).masks
      {'w': Array([False, False,  True,  True], dtype=bool)}
    """
    weights, batches, loss_fn = Weights.of(params), replayed(batches), hashable(loss_fn)

    def score(masked: Any, masks: Any) -> Any:
        here = Weights.of(masked)
        means = mean_over_batches(gradient, loss_fn, here, batches)
        return weights.scores([jnp.abs(float32(w) * g) for w, g in zip(weights.values, means)])

    return rounds_of(score, params, sparsity, rules, rounds, scope, axes, revive=revive)
