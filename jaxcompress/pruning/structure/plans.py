"""A plan: which places of which leaves stay."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence

import numpy as np

from jaxcompress.errors import CompressError, FileError
from jaxcompress.pruning.structure.find import Groups
from jaxcompress.pruning.structure.members import Group


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

    def under(self, prefix: str) -> Plan:
        """The plan of a part of the tree, such as Linen's `params` without its batch statistics.

        Raises:
          CompressError: for a prefix of no leaf.

        Examples:
          >>> plan = Plan((LeafPlan("params/w", (3,), ((0, 2),)), LeafPlan("state/n", (), ())))
          >>> plan.under("params").shapes
          {'w': (2,)}
        """
        start = f"{prefix.rstrip('/')}/"
        found = tuple(
            dataclasses.replace(leaf, path=leaf.path.removeprefix(start))
            for leaf in self.leaves
            if leaf.path.startswith(start)
        )
        if not found:
            raise CompressError(f"no leaf of the plan lies under {prefix!r}")
        return Plan(found)

    def then(self, other: Plan) -> Plan:
        """One plan of the whole for this one and then another, made for what this one leaves.

        So channels can be removed little by little, and one plan is saved.

        Raises:
          CompressError: for a plan that was not made for what this one leaves.

        Examples:
          >>> first = Plan((LeafPlan("w", (4,), ((0, 2, 3),)),))
          >>> first.then(Plan((LeafPlan("w", (3,), ((1, 2),)),))).leaves[0].kept
          ((2, 3),)
        """
        other.check(list(self.shapes.items()), whole=True)
        leaves = []
        for a, b in zip(self.leaves, other.leaves):
            kept = tuple(
                x if y is None else y if x is None else tuple(x[i] for i in y)
                for x, y in zip(a.kept, b.kept)
            )
            leaves.append(LeafPlan(a.path, a.shape, kept))
        return Plan(tuple(leaves))

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
        """The plan as a text: the places that stay, each once, and for each axis which of these.

        `jaxcompress.save` with `plan=` keeps it in a file.

        Examples:
          >>> plan = Plan((LeafPlan("w", (4, 3), (None, (0, 2))),))
          >>> plan.to_json()
          '{"kept":[[0,2]],"leaves":[["w",[4,3],[null,0]]]}'
          >>> Plan.from_json(plan.to_json()) == plan
          True
        """
        kept: dict[tuple[int, ...], int] = {}
        leaves = []
        for leaf in self.leaves:
            which = [None if k is None else kept.setdefault(k, len(kept)) for k in leaf.kept]
            leaves.append([leaf.path, leaf.shape, which])
        return json.dumps({"kept": list(kept), "leaves": leaves}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
          FileError: for a text that is none.
        """
        try:
            found = json.loads(text)
            kept = {n: tuple(map(int, places)) for n, places in enumerate(found["kept"])}
            leaves = tuple(
                LeafPlan(
                    str(path),
                    tuple(map(int, shape)),
                    tuple(None if n is None else kept[n] for n in which),
                )
                for path, shape, which in found["leaves"]
            )
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise FileError(f"this is no plan: {error!r}") from None
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
