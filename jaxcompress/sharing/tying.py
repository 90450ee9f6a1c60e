"""One stored array for several places of a tree."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress.arrays.base import CompressedArray, is_compressed, materialize, try_rules
from jaxcompress.errors import FileError, RuleError, SpecError
from jaxcompress.numerics import rounded
from jaxcompress.rules import escape, flatten, glob

Order = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transposed:
    """A member of a group of ties that is the transpose of the stored array.

    Attributes:
      path: its path, or a pattern.
      order: which axis of the stored array each of its axes is; None: reversed.

    Examples:
      >>> Transposed("head/kernel")
      Transposed(path='head/kernel', order=None)
    """

    path: str
    order: Order | None = None


class Link(NamedTuple):
    """One place that is filled from another.

    Attributes:
      path: the place.
      source: the path of what is stored.
      order: None, or which axis of the source each axis here is.
    """

    path: str
    source: str
    order: Order | None


@dataclasses.dataclass(frozen=True)
class Ties:
    """Which places of a tree are filled from which; hashable, and nothing but names.

    Attributes:
      links: one for each place that is not stored.
    """

    links: tuple[Link, ...]

    def expand(self, shared: Any) -> Any:
        """The full tree of a shared one, the same object at all places that are tied.

        Pure: within `jit` and `grad` the gradient of what is stored is the sum over its places. A
        transpose of a leaf stays compressed where its type can.

        Raises:
          RuleError: when the tree has not the places, or they are filled already.
        """
        tree = _Tree(shared)
        for link in self.links:
            value = tree.get(link.source)
            if value is None or tree.get(link.path) is not None:
                raise RuleError(
                    f"{link.path!r} cannot be filled from {link.source!r}: this is not the shared "
                    "tree of these ties"
                )
            tree.put(link.path, value if link.order is None else _transposed(value, link.order))
        return tree.build()

    def shrink(self, tree: Any) -> Any:
        """The shared tree of a full one: each tied place is None, and the stored ones stay.

        Undoes `expand`, also after what was expanded has been saved, loaded or compressed.
        """
        out = _Tree(tree)
        for link in self.links:
            out.get(link.path)
            out.put(link.path, None)
        return out.build()

    def to_json(self) -> str:
        """The ties as a text, for the metadata of a file."""
        return json.dumps([list(link) for link in self.links])

    @classmethod
    def from_json(cls, text: str) -> Ties:
        """Undoes `to_json`.

        Raises:
          FileError: for a text that is none of ties.

        Examples:
          >>> ties = Ties((Link("b", "a", (1, 0)),))
          >>> Ties.from_json(ties.to_json()) == ties
          True
        """
        try:
            links = []
            for path, source, order in json.loads(text):
                ok = isinstance(path, str) and isinstance(source, str)
                if not ok or not (order is None or sorted(order) == list(range(len(order)))):
                    raise ValueError(f"{path!r}, {source!r}, {order!r}")
                links.append(Link(path, source, None if order is None else tuple(order)))
        except (ValueError, TypeError) as error:
            raise FileError(f"a text of ties is damaged: {error}") from error
        return cls(tuple(links))


def tie(
    params: Any,
    groups: Sequence[Sequence[str | Transposed]] | None = None,
    *,
    value: str = "mean",
) -> tuple[Any, Ties]:
    """Makes places of a tree share one array, which is stored once and trained as one.

    The first member of each group is where the array is stored; all others are None in the shared
    tree, so that an optimizer, `compress` and `nbytes` see each array once, under its first path.
    `ties.expand(shared)` is the full tree:

        shared, ties = tie(params, [("embedding", Transposed("head/kernel"))])
        loss = lambda shared, x: jc.compressed(apply)(ties.expand(shared), x)

    Gradients of what is shared are sums over its places, for that is the derivative. A file has it
    once as well: save the shared tree with `metadata={"ties": ties.to_json()}`, or, where no member
    is transposed, the expanded one; `tie(load(path))` then finds the ties again.

    Args:
      params: any pytree of arrays and leaves.
      groups: of paths or patterns (all that match are members, in the order of the tree), each
        perhaps `Transposed`. The array of a leaf's child is named `path.child`, as in a file. None:
        what is one object at several places is tied, and nothing else.
      value: `mean` of the members, in float32 and rounded once, or the `first`, as it is; members
        that are compressed leaves are tied by `first`.

    Returns:
      The shared tree and its `Ties`.

    Raises:
      RuleError: for a pattern that matches nothing, a path in two groups, or a group of one.
      SpecError: for members of different shapes or dtypes, and the mean of compressed leaves.

    References:
      Press and Wolf, *Using the Output Embedding to Improve Language Models*, 2017; Lan et al.,
      *ALBERT: A Lite BERT for Self-supervised Learning of Language Representations*, 2020;
      Dehghani et al., *Universal Transformers*, 2019.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> params = {"a": jnp.array([1.0, 3.0]), "b": jnp.array([3.0, 5.0]), "c": jnp.ones(2)}
      >>> shared, ties = tie(params, [("a", "b")])
      >>> shared["a"].tolist(), shared["b"]
      ([2.0, 4.0], None)
      >>> jax.grad(lambda s: sum(x.sum() for x in ties.expand(s).values()))(shared)["a"].tolist()
      [2.0, 2.0]
    """
    if value not in ("mean", "first"):
        raise SpecError(f"value={value!r}: write mean or first")
    tree = _Tree(params)
    found = _same(tree) if groups is None else [_members(tree, group) for group in groups]
    _check_apart(found)
    links = []
    for (first, _), *others in found:
        mean = value == "mean" and groups is not None
        tree.put(first, _value(tree, ((first, None), *others), mean))
        links += [Link(path, first, order) for path, order in others]
    for link in links:
        tree.put(link.path, None)
    return tree.build(), Ties(tuple(links))


def layers(params: Any, pattern: str) -> list[tuple[str, ...]]:
    """The groups that tie layers of equal structure to each other, leaf by leaf.

    Args:
      params: any pytree.
      pattern: a glob that matches the path of each layer, such as `encoder/layer_*`.

    Returns:
      For each leaf of a layer the paths of that leaf in all layers, for `tie`.

    Raises:
      RuleError: when fewer than two layers match, or they have different leaves.

    Examples:
      >>> layer = {"bias": 0.0, "kernel": 1.0}
      >>> layers({"net": {"layer_0": layer, "layer_1": layer}}, "net/layer_*")[1]
      ('net/layer_0/kernel', 'net/layer_1/kernel')
    """
    expression = glob(pattern)
    found: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for path, _ in flatten(params)[0]:
        keys = path.split("/")
        for i in range(1, len(keys)):
            if expression.fullmatch("/".join(keys[:i])):
                found["/".join(keys[:i])]["/".join(keys[i:])] = path
                break
    if len(found) < 2:
        raise RuleError(f"{pattern!r} matches {len(found)} layers; two or more can be tied")
    (first, wanted), *rest = found.items()
    for name, leaves in rest:
        if leaves.keys() != wanted.keys():
            raise RuleError(
                f"{first!r} and {name!r} differ in {sorted(leaves.keys() ^ wanted.keys())[:3]}, so "
                "they cannot be tied"
            )
    return [tuple(escape(leaves[leaf]) for leaves in found.values()) for leaf in wanted]


class _Gone:
    """Holds the place of a None while a tree is flattened."""


_GONE = _Gone()
Member = tuple[str, Order | None]


class _Tree:
    """A tree whose leaves, and the children of whose leaves, are read and put by name."""

    def __init__(self, tree: Any) -> None:
        empty = lambda x: x is None or is_compressed(x)
        marked = jax.tree.map(lambda x: _GONE if x is None else x, tree, is_leaf=empty)
        leaves, self._structure = flatten(marked)
        self._leaves = [None if leaf is _GONE else leaf for _, leaf in leaves]
        # The number of the leaf, and the way down to a child of it.
        self.places: dict[str, tuple[int, tuple[str, ...]]] = {}
        for i, (path, _) in enumerate(leaves):
            for name, way in _ways(path, self._leaves[i]):
                self.places.setdefault(name, (i, way))

    def get(self, name: str) -> Any:
        """What is at a place."""
        if name not in self.places:
            raise RuleError(f"{name!r} is no place of this tree")
        i, way = self.places[name]
        value = self._leaves[i]
        for child in way:
            value = None if value is None else getattr(value, child)
        return value

    def put(self, name: str, value: Any) -> None:
        """Puts something there."""
        i, way = self.places[name]
        self._leaves[i] = _put(self._leaves[i], way, value)

    def build(self) -> Any:
        """The tree as it is now."""
        return jax.tree.unflatten(self._structure, self._leaves)


def _ways(path: str, leaf: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield path, ()
    if isinstance(leaf, CompressedArray):
        for child in leaf.children:
            for name, way in _ways(f"{path}.{child}", getattr(leaf, child)):
                yield name, (child, *way)


def _put(leaf: Any, way: tuple[str, ...], value: Any) -> Any:
    if not way:
        return value
    return leaf.replace(**{way[0]: _put(getattr(leaf, way[0]), way[1:], value)})


def _transposed(x: Any, order: Order) -> Any:
    if is_compressed(x):
        out = try_rules("transpose", (x,), {"permutation": order})
        if out is not NotImplemented:
            return out
    return lax.transpose(jnp.asarray(materialize(x)), order)


def _same(tree: _Tree) -> list[list[Member]]:
    """The places that hold one object."""
    found: dict[int, list[Member]] = collections.defaultdict(list)
    inside: set[int] = set()  # what a tied leaf holds is tied with it
    seen: dict[int, set[int]] = collections.defaultdict(set)
    for name, (i, way) in tree.places.items():
        value = tree.get(name)
        if not hasattr(value, "dtype"):
            continue
        if not way:
            found[id(value)].append((name, None))
            if len(found[id(value)]) > 1:
                inside.update(id(x) for x in jax.tree.leaves(value) if x is not value)
        elif i not in seen[id(value)]:
            seen[id(value)].add(i)
            found[id(value)].append((name, None))
    return [group for key, group in found.items() if len(group) > 1 and key not in inside]


def _members(tree: _Tree, group: Sequence[str | Transposed]) -> list[Member]:
    """The places of a group; orders are those of their axes in the first one."""
    out: list[Member] = []
    if isinstance(group, (str, Transposed)):
        raise RuleError(f"the group {group!r} is one member; write [({group!r}, ...)]")
    for member in group:
        transposed = isinstance(member, Transposed)
        pattern = member.path if isinstance(member, Transposed) else member
        names = [pattern] if pattern in tree.places else []
        names = names or [name for name in tree.places if glob(pattern).fullmatch(name)]
        if not names:
            raise RuleError(f"{pattern!r} matches no leaf and no child of one")
        if transposed and not out:
            raise RuleError(f"{member!r} comes first: what is stored is not transposed")
        for name in names:
            order = member.order if isinstance(member, Transposed) else None
            if transposed and order is None:
                order = tuple(range(len(tree.get(name).shape)))[::-1]
            out.append((name, None if order is None else tuple(order)))
    if len(out) < 2:
        raise RuleError(f"the group {tuple(group)!r} has one member; two or more can be tied")
    return out


def _check_apart(groups: list[list[Member]]) -> None:
    """Refuses a place in two groups, and one that lies within another."""
    taken: set[str] = set()
    for group in groups:
        for name, _ in group:
            if name in taken:
                raise RuleError(f"{name!r} is tied twice")
            taken.add(name)
    for name in taken:
        for i, letter in enumerate(name):
            if letter == "." and name[:i] in taken:
                raise RuleError(f"{name!r} is tied and {name[:i]!r}, which it is part of, as well")


def _value(tree: _Tree, members: Sequence[Member], mean: bool) -> Any:
    """What a group shares."""
    (first, _), *others = members
    stored = tree.get(first)
    for name, order in others:
        other = tree.get(name)
        for path, x in ((first, stored), (name, other)):
            if not hasattr(x, "shape") or not hasattr(x, "dtype"):
                raise SpecError(f"{path} is {x!r} and no array; it cannot be tied")
        fits = order is None or sorted(order) == list(range(len(stored.shape)))
        shape = tuple(stored.shape[a] for a in order) if order and fits else tuple(stored.shape)
        if not fits or shape != tuple(other.shape) or stored.dtype != other.dtype:
            raise SpecError(
                f"{name} is {np.dtype(other.dtype).name}{list(other.shape)} and cannot be tied to "
                f"{first}, {np.dtype(stored.dtype).name}{list(stored.shape)}"
                + ("" if order is None else f", by axes {order}")
            )
    if not mean:
        return stored
    terms = []
    for name, order in members:
        x = tree.get(name)
        if is_compressed(x) or not jnp.issubdtype(x.dtype, jnp.floating):
            raise SpecError(f"{name} is {x!r}, which has no mean; write tie(..., value='first')")
        terms.append(x if order is None else lax.transpose(x, tuple(np.argsort(order).tolist())))
    wide = jnp.promote_types(stored.dtype, jnp.float32)
    # Divided first: the sum of the largest floats overflows.
    total = sum(jnp.asarray(x).astype(wide) / len(terms) for x in terms)
    return rounded(jnp.asarray(total), stored.dtype)
