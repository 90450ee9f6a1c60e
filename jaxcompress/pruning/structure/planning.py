"""Which channels stay, by scores and a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxcompress.errors import CompressError, RuleError, SpecError
from jaxcompress.pruning.checks import check_share
from jaxcompress.pruning.structure.find import Groups
from jaxcompress.pruning.structure.function import leaves_of
from jaxcompress.pruning.structure.members import Group
from jaxcompress.pruning.structure.plans import Plan, keep_channels
from jaxcompress.rules import glob, match

BUDGETS: dict[str, Callable[..., int]] = {
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
      scores: a tree of the structure of the params, from any of `jaxcompress.pruning.scores`. A
        leaf without a score (None or not there) counts for nothing: so leave out those that should
        not count, such as batch statistics.
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
      CompressError: for scores of other shapes, of leaves that are none of the params, and for a
        group none of whose leaves has a score.

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
    for path, x in found.items():
        if path not in groups.shapes:
            raise CompressError(f"there is a score of {path}, and no such leaf in the params")
        if tuple(x.shape) != groups.shapes[path]:
            raise CompressError(
                f"the score of {path} of shape {groups.shapes[path]} is of shape {tuple(x.shape)}"
            )
    sums: dict[tuple[str, int], np.ndarray] = {}
    out = []
    for group in chosen:
        total = np.zeros(group.size)
        if not any(member.path in found for member in group.members):
            raise CompressError(f"there is no score of any leaf of the group of {group.name}")
        for member in group.members:
            if member.path not in found:
                continue
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
    if budget not in BUDGETS:
        raise SpecError(f"budget={budget!r}: write one of channels, {', '.join(BUDGETS)}")
    cost = lambda n: BUDGETS[budget](groups, dict(zip(chosen, rounded(n))))
    limit = share * BUDGETS[budget](groups)
    if cost(0) > limit:
        least = cost(0) / max(BUDGETS[budget](groups), 1)
        raise SpecError(
            f"keep={share:g} of the {budget} cannot be met: with the fewest channels, {least:.3g} "
            "of them stay"
        )
    low, high = 0, total + 1  # what fits, and what does not or is more than all
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= limit else (low, middle)
    return rounded(low)
