"""Removal as the first stage of `compress`: what a recipe says of it, and the smaller leaves."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import is_compressed
from jaxcompress.errors import CompressError, SpecError
from jaxcompress.lazy import LazyArray
from jaxcompress.pruning.checks import check_share
from jaxcompress.pruning.structure.find import Groups
from jaxcompress.pruning.structure.planning import BUDGETS, plan
from jaxcompress.pruning.structure.plans import LeafPlan, Plan
from jaxcompress.pruning.structure.shrinking import taken
from jaxcompress.rules import flatten

_SCORES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"magnitude": np.abs, "squares": np.square}


@dataclasses.dataclass(frozen=True)
class Shrink:
    """How channels are chosen, as a recipe keeps it.

    The stage before the rules of a recipe: they see what it leaves. Which channels go together is
    a matter of the function, which a recipe does not have; so it is `plan` that is given the
    groups, and `compress` that is given the plan:

        recipe = jc.Recipe.read("half.yaml")
        plan = recipe.shrink.plan(jc.pruning.groups(apply, params, x), params)
        small = jc.compress(params, recipe, plan=plan)

    Attributes:
      keep: the share of the budget that stays; or `{glob: share of the channels}`.
      budget: `channels`, `parameters`, `bytes` or `multiplications`.
      allocation: `uniform` or `global`.
      round_to: of each axis that becomes smaller, a multiple of so many places stays.
      score: of the channels, where no others are given: `magnitude` or `squares`, summed over the
        leaves of two axes or more. What has one (biases, scales of norms, running statistics)
        does not count.

    Raises:
      SpecError: for an option that is none.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.pruning.structure import groups
      >>> params = {"up": jnp.ones((64, 16)), "down": jnp.ones((16, 2))}
      >>> apply = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
      >>> plan = Shrink(0.5).plan(groups(apply, params, jnp.ones((1, 64))), params)
      >>> jc.compress(params, {"up": jc.Quantize("int8")}, plan=plan)["up"]
      QuantizedArray(float32[64, 8], int8)
    """

    keep: float | tuple[tuple[str, float], ...] = 0.5
    budget: str = "channels"
    allocation: str = "uniform"
    round_to: int = 8
    score: str = "magnitude"

    def __post_init__(self) -> None:
        """Makes pairs of a dict, so that the stage is hashable, and refuses what is no option."""
        if isinstance(self.keep, Mapping):
            object.__setattr__(self, "keep", tuple(self.keep.items()))
        if isinstance(self.keep, tuple):
            for pattern, share in self.keep:
                check_share(f"keep[{pattern!r}]", share, "the share of channels that stays")
        else:
            check_share("keep", self.keep, "the share that stays")
        options = {
            "budget": ("channels", *BUDGETS),
            "allocation": ("uniform", "global"),
            "score": tuple(_SCORES),
        }
        for name, known in options.items():
            if getattr(self, name) not in known:
                raise SpecError(f"{name}={getattr(self, name)!r}: write one of {', '.join(known)}")
        whole = isinstance(self.round_to, int) and not isinstance(self.round_to, bool)
        if not whole or self.round_to < 1:
            raise SpecError(f"round_to={self.round_to!r}: write a whole number of at least 1")

    def plan(self, groups: Groups, params: Any, scores: Any = None) -> Plan:
        """The plan of this stage for some params: the same each time.

        Args:
          groups: of the function.
          params: what is compressed; lazy leaves are read one by one.
          scores: a tree of the structure of the params, instead of the score by name.

        Raises:
          SpecError: for a budget that cannot be met.
          RuleError: for a glob that matches no group from which anything can be removed.
          CompressError: for params or scores that the groups are not of.
        """
        if scores is None:
            scores = kernel_scores(params, self.score)
        keep = dict(self.keep) if isinstance(self.keep, tuple) else self.keep
        return plan(
            groups, scores, keep, budget=self.budget, allocation=self.allocation,
            round_to=self.round_to,
        )  # fmt: skip


def kernel_scores(params: Any, name: str = "magnitude") -> Any:
    """Scores by name of the leaves of two axes or more, in float32; zeros for all others.

    Args:
      params: dense; lazy leaves are read one by one.
      name: `magnitude` or `squares`.

    Raises:
      CompressError: for a compressed leaf.
    """

    def scored(path: str, leaf: Any) -> np.ndarray:
        if is_compressed(leaf):
            raise CompressError(f"{path} is a {type(leaf).__name__}: plan with the dense params")
        x = leaf.load() if isinstance(leaf, LazyArray) else leaf
        if np.ndim(x) < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
            return np.zeros(np.shape(x), np.float32)
        return _SCORES[name](np.asarray(x).astype(np.float32))

    leaves, structure = flatten(params)
    return jax.tree.unflatten(structure, [scored(*each) for each in leaves])


def smaller_leaves(
    leaves: Sequence[tuple[str, Any]], plan: Plan, donate: bool = False
) -> list[tuple[str, Any]]:
    """The leaves of a tree without what a plan removes, each made when it is asked for.

    Args:
      leaves: with their paths; dense or lazy ones.
      plan: of the whole tree.
      donate: delete a dense array once what stays of it is there, unless it occurs twice.

    Returns:
      The leaves; a `LazyArray` in the place of each that becomes smaller, and one for all places
      of an array that occurs at several.

    Raises:
      CompressError: for leaves that the plan was not made for, or compressed ones.
    """
    plan.check([(path, np.shape(leaf)) for path, leaf in leaves], whole=True)
    uses = collections.Counter(id(leaf) for _, leaf in leaves)
    made: dict[Any, LazyArray] = {}
    out = []
    for (path, leaf), own in zip(leaves, plan.leaves):
        if own.small == own.shape:
            out.append((path, leaf))
            continue
        if is_compressed(leaf):
            raise CompressError(
                f"{path} is a {type(leaf).__name__}: remove channels from the dense params first, "
                "and compress what is left"
            )
        tie, shared = (id(leaf), own.kept), uses[id(leaf)] > 1
        if tie not in made:
            made[tie] = _lazily(leaf, own, donate and not shared, shared)
        out.append((path, made[tie]))
    return out


def _lazily(leaf: Any, own: LeafPlan, donate: bool, shared: bool) -> LazyArray:
    def read() -> Any:
        small = taken(leaf.load() if isinstance(leaf, LazyArray) else leaf, own)
        if donate and isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
            jax.block_until_ready(small)
            leaf.delete()
        return small

    dtype = np.dtype(leaf.dtype)
    nbytes = math.prod(own.small) * dtype.itemsize
    return LazyArray(own.small, dtype, nbytes, functools.cache(read) if shared else read)
