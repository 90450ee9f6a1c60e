"""A plan: which channels stay. It is chosen from groups and scores."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxcompress.errors import CompressError, FileError, RuleError, SpecError
from jaxcompress.pruning.checks import check_share
from jaxcompress.pruning.structure.find import Groups
from jaxcompress.pruning.structure.function import leaves_of
from jaxcompress.pruning.structure.members import Group
from jaxcompress.rules import glob, match


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """What stays of one leaf.

    Attributes:
      path: its path.
      shape: its shape before anything is removed.
      kept: for each axis the places that stay, in order, or None where all do.
    """

    path: str
    shape: tuple[int, ...]
    kept: tuple[tuple[int, ...] | None, ...]

    @property
    def small(self) -> tuple[int, ...]:
        """Its shape afterwards."""
        return tuple(n if k is None else len(k) for n, k in zip(self.shape, self.kept))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which places of which leaves stay; hashable.

    Attributes:
      leaves: of the params, in their order.
    """

    leaves: tuple[LeafPlan, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The new shape of each leaf by path: the widths of a module that is made by hand."""
        return {leaf.path: leaf.small for leaf in self.leaves}

    def check(self, leaves: Sequence[tuple[str, tuple[int, ...]]], whole: bool) -> None:
        """Refuses params that the plan was not made for.

        Args:
          leaves: paths and shapes.
          whole: whether they are the params before anything is removed, or those after it.

        Raises:
          CompressError: naming the first that differs.
        """
        own = [(leaf.path, leaf.shape if whole else leaf.small) for leaf in self.leaves]
        for there, mine in zip(leaves, own):
            if there != mine:
                raise CompressError(
                    f"the plan is for {mine[0]} of shape {mine[1]}, and the params have "
                    f"{there[0]} of shape {there[1]} in its place"
                )
        if len(leaves) != len(own):
            raise CompressError(f"the plan is for {len(own)} leaves, and there are {len(leaves)}")

    def to_json(self) -> str:
        """The plan as a text, for instance for the metadata of a file.

        Examples:
          >>> plan = Plan((LeafPlan("w", (4, 3), (None, (0, 2))),))
          >>> plan.to_json()
          '[["w", [4, 3], [null, [0, 2]]]]'
          >>> Plan.from_json(plan.to_json()) == plan
          True
        """
        return json.dumps([[leaf.path, leaf.shape, leaf.kept] for leaf in self.leaves])

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
          FileError: for a text that is none.
        """
        try:
            leaves = tuple(
                LeafPlan(
                    str(path),
                    tuple(int(n) for n in shape),
                    tuple(None if k is None else tuple(int(i) for i in k) for k in kept),
                )
                for path, shape, kept in json.loads(text)
            )
        except (TypeError, ValueError) as error:
            raise FileError(f"this is no plan: {error}") from None
        for leaf in leaves:
            _check_leaf(leaf)
        return cls(leaves)

    def __repr__(self) -> str:
        before = sum(math.prod(leaf.shape) for leaf in self.leaves)
        after = sum(math.prod(leaf.small) for leaf in self.leaves)
        return f"Plan({len(self.leaves)} leaves, {after} of {before} parameters stay)"


def _check_leaf(leaf: LeafPlan) -> None:
    for n, kept in zip(leaf.shape, leaf.kept):
        rising = kept is None or all(a < b for a, b in itertools.pairwise(kept))
        inside = not kept or (kept[0] >= 0 and kept[-1] < n)
        if not (rising and inside):
            raise FileError(f"this is no plan: places of {leaf.path} are not in order")
    if len(leaf.kept) != len(leaf.shape):
        raise FileError(f"this is no plan: {leaf.path} has {len(leaf.shape)} axes")


def keep_channels(groups: Groups, kept: Mapping[Group, Sequence[int]]) -> Plan:
    """The plan in which these channels of some groups stay, and all of the others.

    Args:
      groups: of the function.
      kept: the channels that stay of each group, at least one.

    Raises:
      CompressError: for a group that is pinned or none of these, or channels that it has not.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxcompress.pruning.structure.find import groups
      >>> params = {"up": jnp.ones((4, 6)), "down": jnp.ones((6, 2))}
      >>> found = groups(lambda p, x: x @ p["up"] @ p["down"], params, jnp.ones((1, 4)))
      >>> keep_channels(found, {found.removable[0]: [0, 2]}).shapes
      {'down': (2, 2), 'up': (4, 2)}
    """
    stays = {path: [np.ones(n, bool) for n in shape] for path, shape in groups.shapes.items()}
    for group, channels in kept.items():
        gone = np.ones(group.size, bool)
        gone[_checked(groups, group, channels)] = False
        for member in group.members:
            places = member.places(np.flatnonzero(gone))
            stays[member.path][member.axis][places.reshape(-1)] = False
    leaves = []
    for path, axes in stays.items():
        kept_axes = tuple(
            None if there.all() else tuple(int(i) for i in np.flatnonzero(there)) for there in axes
        )
        leaves.append(LeafPlan(path, groups.shapes[path], kept_axes))
    return Plan(tuple(leaves))


def _checked(groups: Groups, group: Group, channels: Sequence[int]) -> np.ndarray:
    if group not in groups.groups:
        raise CompressError(f"{group.name} is no group of these")
    found = np.unique(np.asarray(channels, np.int64))
    if not found.size or found[0] < 0 or found[-1] >= group.size:
        raise CompressError(f"{group.name} has channels 0 to {group.size - 1}: keep some of them")
    if group.pinned is not None and found.size < group.size:
        raise CompressError(f"nothing can be removed from {group.name}: {group.pinned}")
    return found


_BUDGETS: dict[str, Callable[..., int]] = {
    "parameters": Groups.parameters,
    "bytes": Groups.nbytes,
    "multiplications": Groups.multiplications,
}


def plan(
    groups: Groups,
    scores: Any,
    keep: float | Mapping[str, float] = 0.5,
    *,
    budget: str = "channels",
    allocation: str = "uniform",
    round_to: int = 8,
    signed: bool = False,
    only: Callable[[Group], bool] | None = None,
) -> Plan:
    """Chooses the channels that stay: those of the largest score, summed over all of the group.

    Args:
      groups: of the function.
      scores: a tree of the structure of the params, from any of `jaxcompress.pruning.scores`.
      keep: the share of the budget that stays; or `{glob: share of the channels}`, where a group
        takes the first that matches the path of any of its members, and stays whole without one.
      budget: what the share is of: `channels` (of each group, or of all), `parameters`, `bytes` or
        `multiplications`, in which what cannot be removed counts too.
      allocation: `uniform`: each group keeps the same share; `global`: all channels compete, by
        their score over the mean score of their group.
      round_to: of each axis that becomes smaller, a multiple of so many places stays.
      signed: sum scores as they are, and not their magnitudes.
      only: from which groups anything is removed, of those that can be; None: from all.

    Returns:
      A `Plan`.

    Raises:
      SpecError: for a budget that cannot be met, or an option that is none.
      RuleError: for a glob that matches no group from which anything can be removed.
      CompressError: for scores of another structure.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxcompress.pruning.structure.find import groups
      >>> params = {"up": jnp.ones((4, 16)), "down": jnp.ones((16, 2))}
      >>> apply = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
      >>> found = groups(apply, params, jnp.ones((1, 4)))
      >>> plan(found, params, 0.5).shapes
      {'down': (8, 2), 'up': (4, 8)}
    """
    if not isinstance(round_to, int) or round_to < 1:
        raise SpecError(f"round_to={round_to!r}: write a whole number of at least 1")
    chosen = [group for group in groups.removable if only is None or only(group)]
    ranked = _channel_scores(groups, chosen, scores, signed)
    steps = [_step(group, round_to) for group in chosen]
    if isinstance(keep, Mapping):
        if (budget, allocation) != ("channels", "uniform"):
            raise SpecError("shares by path are of channels, and uniform")
        shares = _by_rule(groups, chosen, keep)
        counts = [_rounded(s * g.size, g, step) for s, g, step in zip(shares, chosen, steps)]
    else:
        share = check_share("keep", keep, "the share that stays")
        counts = _counts(groups, chosen, ranked, steps, share, budget, allocation)
    kept = {}
    for group, own, count in zip(chosen, ranked, counts):
        best = np.argsort(-own, kind="stable")[:count]  # of equal ones the first
        kept[group] = np.sort(best).tolist()
    return keep_channels(groups, kept)


def _channel_scores(
    groups: Groups, chosen: Sequence[Group], scores: Any, signed: bool
) -> list[np.ndarray]:
    found = dict(leaves_of(scores))
    for path, shape in groups.shapes.items():
        if path not in found or tuple(found[path].shape) != shape:
            there = f"of shape {tuple(found[path].shape)}" if path in found else "not there"
            raise CompressError(f"the score of {path} of shape {shape} is {there}")
    sums: dict[tuple[str, int], np.ndarray] = {}
    out = []
    for group in chosen:
        total = np.zeros(group.size)
        for member in group.members:
            key = (member.path, member.axis)
            if key not in sums:
                x = np.asarray(found[member.path]).astype(np.float64)
                others = tuple(a for a in range(x.ndim) if a != member.axis)
                sums[key] = (x if signed else np.abs(x)).sum(axis=others)
            total += sums[key][member.places(np.arange(group.size))].sum(axis=1)
        if np.isnan(total).any():
            raise CompressError(f"scores of {group.name} are NaN")
        out.append(total)
    return out


def _step(group: Group, round_to: int) -> int:
    """Of how many channels a multiple must stay."""
    each = [m.block * math.prod(times for times, _ in m.repeats) for m in group.members]
    return math.lcm(*(round_to // math.gcd(round_to, n) for n in each))


def _rounded(count: float, group: Group, step: int) -> int:
    near = step * math.floor(count / step + 0.5)
    return min(max(near, step, 1), group.size)


def _by_rule(groups: Groups, chosen: Sequence[Group], rules: Mapping[str, float]) -> list[float]:
    for pattern, share in rules.items():
        check_share(f"keep[{pattern!r}]", share, "the share of channels that stays")
    match(rules, list(groups.shapes))
    compiled = [(pattern, glob(pattern), share) for pattern, share in rules.items()]
    out, used = [], set()
    for group in chosen:
        share = 1.0
        for pattern, expression, value in compiled:
            if any(expression.fullmatch(member.path) for member in group.members):
                share = value
                used.add(pattern)
                break
        out.append(share)
    for pattern in rules:
        if pattern not in used:
            raise RuleError(
                f"rule {pattern!r} matches no group from which channels can be removed, or only "
                "those that rules before it match; print the groups to see them"
            )
    return out


def _counts(
    groups: Groups,
    chosen: Sequence[Group],
    ranked: Sequence[np.ndarray],
    steps: Sequence[int],
    share: float,
    budget: str,
    allocation: str,
) -> list[int]:
    """How many channels of each group stay."""
    total = sum(group.size for group in chosen)
    if allocation == "uniform":
        raw = lambda n: [n / max(total, 1) * group.size for group in chosen]
    elif allocation == "global":
        relative = [own / (own.mean() or 1.0) for own in ranked]
        order = np.argsort(-np.concatenate([*relative, np.zeros(0)]), kind="stable")
        whose = np.repeat(np.arange(len(chosen)), [group.size for group in chosen])[order]
        raw = lambda n: np.bincount(whose[:n], minlength=len(chosen)).tolist()
    else:
        raise SpecError(f"allocation={allocation!r}: write 'uniform' or 'global'")
    rounded = lambda n: [_rounded(c, g, step) for c, g, step in zip(raw(n), chosen, steps)]
    if budget == "channels":
        return rounded(round(share * total))
    if budget not in _BUDGETS:
        raise SpecError(f"budget={budget!r}: write one of channels, {', '.join(_BUDGETS)}")
    cost = lambda n: _BUDGETS[budget](groups, dict(zip(chosen, rounded(n))))
    limit = share * _BUDGETS[budget](groups)
    if cost(0) > limit:
        least = cost(0) / max(_BUDGETS[budget](groups), 1)
        raise SpecError(
            f"keep={share:g} of the {budget} cannot be met: with the fewest channels, {least:.3g} "
            "of them stay"
        )
    low, high = 0, total + 1  # what fits, and what does not or is more than all
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= limit else (low, middle)
    return rounded(low)
