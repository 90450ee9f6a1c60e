"""Which leaf gets what: paths, glob rules, and the axes of a kernel."""

from __future__ import annotations

import collections
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from jaxcompress.arrays.base import is_compressed
from jaxcompress.errors import RuleError

# Names under which Flax keeps the array of an NNX variable or of a partitioning box.
_WRAPPERS = ("value", "raw_value")


def path_str(path: Sequence[Any]) -> str:
    """A key path as a user would type it: its keys joined by `/`.

    Examples:
      >>> import jax
      >>> tree = {"encoder": {"layers": [{"kernel": 1.0}]}}
      >>> [path_str(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
      ['encoder/layers/0/kernel']
    """
    names = []
    for key in path:
        match key:
            case DictKey() | FlattenedIndexKey():
                names.append(str(key.key))
            case SequenceKey():
                names.append(str(key.idx))
            case GetAttrKey():
                names.append(key.name)
            case _:
                names.append(str(key))
    return "/".join(names)


def is_wrapper_key(key: Any) -> bool:
    """Whether a key may lead into a wrapper of one value; it does if it has no sibling."""
    return isinstance(key, GetAttrKey) and key.name in _WRAPPERS


def flatten(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    """The leaves of a tree with their paths, compressed leaves whole, and its structure.

    The `.value` of an NNX variable or of a partitioning box is no part of a path; a field of that
    name beside others is.

    Examples:
      >>> import flax.linen as nn
      >>> flatten({"kernel": nn.Partitioned(1.0, (None,)), "pair": [2.0, 3.0]})[0]
      [('kernel', 1.0), ('pair/0', 2.0), ('pair/1', 3.0)]
    """
    try:
        leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_compressed)
    except ValueError as error:
        raise RuleError(
            f"the tree is no pytree: {error} Keys of one dict are all texts, or all integers."
        ) from error
    children: dict[Any, set[Any]] = collections.defaultdict(set)
    for path, _ in leaves:
        for i, key in enumerate(path):
            children[path[:i]].add(key)

    def wrapper(path: Sequence[Any], i: int) -> bool:
        return is_wrapper_key(path[i]) and len(children[path[:i]]) == 1

    names = [
        path_str([key for i, key in enumerate(path) if not wrapper(path, i)]) for path, _ in leaves
    ]
    return [(name, leaf) for name, (_, leaf) in zip(names, leaves)], structure


def glob(pattern: str) -> re.Pattern[str]:
    """A path pattern as a regular expression.

    `*` and `?` stay within one key, `**` spans any number of keys (none as well), and `[abc]`
    is a set of characters, `[!abc]` all others but `/`.

    Raises:
      RuleError: for a set that is none, such as `[z-a]`.

    Examples:
      >>> [bool(glob(g).fullmatch("a/b/kernel")) for g in ("**/kernel", "*/kernel", "a/**")]
      [True, False, True]
    """
    out, i = "", 0
    while i < len(pattern):
        if pattern.startswith("**/", i):
            out, i = out + "(?:[^/]+/)*", i + 3
        elif pattern.startswith("**", i):
            out, i = out + ".*", i + 2
        elif pattern[i] == "*":
            out, i = out + "[^/]*", i + 1
        elif pattern[i] == "?":
            out, i = out + "[^/]", i + 1
        elif pattern[i] == "[" and "]" in pattern[i + 2 :]:
            end = pattern.index("]", i + 2)
            body = pattern[i + 1 : end]
            start, body = ("[^/", body[1:]) if body.startswith("!") else ("[", body)
            out += start + re.sub(r"[\\\[\]^&~|]", r"\\\g<0>", body) + "]"
            i = end + 1
        else:
            out, i = out + re.escape(pattern[i]), i + 1
    try:
        return re.compile(out, re.DOTALL)
    except re.error as error:
        raise RuleError(f"rule {pattern!r} is no pattern: {error}") from None


def escape(path: str) -> str:
    """The pattern that matches this path alone.

    Examples:
      >>> escape("a/*/[0]"), glob(escape("a/*/[0]")).fullmatch("a/*/[0]") is not None
      ('a/[*]/[[]0]', True)
    """
    return re.sub(r"[*?\[]", r"[\g<0>]", path)


def match(rules: Mapping[str, Any], paths: Sequence[str]) -> list[tuple[str, Any] | None]:
    """For each path the first rule that matches it, as (pattern, spec), or None.

    Raises:
      RuleError: when a rule's pattern matches no path at all.
    """
    if not isinstance(rules, Mapping):
        raise RuleError(f"rules are a dict such as {{'**/kernel': spec}}, not {rules!r}")
    compiled = [(pattern, glob(pattern), spec) for pattern, spec in rules.items()]
    for pattern, expression, _ in compiled:
        if not any(expression.fullmatch(path) for path in paths):
            near = difflib.get_close_matches(pattern.replace("*", ""), paths, n=3, cutoff=0.0)
            listed = ", ".join(repr(p) for p in near)
            raise RuleError(
                f"rule {pattern!r} matches no leaf; "
                + (f"the nearest paths are {listed}" if near else "the tree has no leaves")
            )
    out: list[tuple[str, Any] | None] = []
    for path in paths:
        hits = ((p, spec) for p, expression, spec in compiled if expression.fullmatch(path))
        out.append(next(hits, None))
    return out


@runtime_checkable
class RuleSet(Protocol):
    """Rules that look at more of a leaf than its path, such as a `Recipe`."""

    def match(self, leaves: Sequence[tuple[str, Any]]) -> list[tuple[str, Any] | None]:
        """For each `(path, leaf)` the rule that matches it, as (pattern, spec), or None."""
        ...

    def key(self) -> jax.Array | None:
        """The random key for specs that draw, unless the caller has one."""
        ...


class KernelAxes(NamedTuple):
    """Which axes of one weight are inputs (contracted) and which outputs, as negative numbers.

    Leading axes in neither are those of a stack of weights.

    Examples:
      >>> KernelAxes(input=(-2,), output=(-1,)).batch_ndim(3)
      1
    """

    input: tuple[int, ...]
    output: tuple[int, ...]

    def batch_ndim(self, ndim: int) -> int:
        """The number of leading axes that are neither inputs nor outputs."""
        return ndim - len(self.input) - len(self.output)


def default_axes(path: str, ndim: int) -> KernelAxes:
    """The axes of a kernel by Flax's conventions, where no function tells.

    The last axis is the output and the one before it the input; further leading axes are a stack,
    except that a kernel of four or more axes is a convolution (the three axes before the last are
    inputs), that attention's `query`, `key` and `value` kernels are `[..., in, heads, depth]`
    and its `out` kernels `[..., heads, depth, out]`, and that an `embedding` is
    `[..., rows, features]`, whose features are contracted when it is tied to the output.

    A `weight`, as PyTorch and Equinox name it, has its output first and its inputs after: a linear
    layer `[out, in]`, a convolution `[out, in, height, width]`, a table `[rows, features]`.
    """
    if ndim < 2:
        return KernelAxes((-1,) * min(ndim, 1), ())
    owner, _, name = path.rpartition("/")
    owner = owner.rpartition("/")[2]
    if re.fullmatch(r"(.+_)?weight(_.+)?", name):
        return KernelAxes(tuple(range(1 - ndim, 0)), (-ndim,))
    if name == "embedding":
        return KernelAxes((-1,), (-2,))
    if ndim >= 3 and owner in ("query", "key", "value"):
        return KernelAxes((-3,), (-2, -1))
    if ndim >= 3 and owner == "out":
        return KernelAxes((-3, -2), (-1,))
    if ndim >= 4:
        return KernelAxes((-4, -3, -2), (-1,))
    return KernelAxes((-2,), (-1,))


def check_axes(axes: Mapping[str, KernelAxes], leaves: Sequence[tuple[str, Any]]) -> None:
    """Refuses axes for leaves that are not there, and those that do not fit their leaf.

    Raises:
      RuleError: naming the path.
    """
    ndims = {path: len(getattr(leaf, "shape", ())) for path, leaf in leaves}
    for path, found in axes.items():
        if path not in ndims:
            raise RuleError(f"axes names {path!r}, which is no leaf of the tree")
        both = (*found.input, *found.output)
        if len(both) > ndims[path] or sorted(both) != list(range(-len(both), 0)):
            raise RuleError(
                f"axes of {path!r} are {found}; write its last axes as negative numbers, each "
                f"once: it has {ndims[path]}"
            )


def map_with_path(fn: Callable[[str, Any], Any], tree: Any) -> Any:
    """Maps `fn(path, leaf)` over a tree, compressed leaves whole."""
    leaves, structure = flatten(tree)
    return jax.tree.unflatten(structure, [fn(path, leaf) for path, leaf in leaves])
