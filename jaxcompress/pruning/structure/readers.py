"""What reads the channels that a plan removes, and where it could take what they emitted."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxcompress import compat
from jaxcompress.pruning.structure.function import Labelled, label, leaves_of
from jaxcompress.pruning.structure.labels import Axis, length
from jaxcompress.pruning.structure.plans import Plan
from jaxcompress.pruning.structure.shrinking import settle
from jaxcompress.pruning.structure.walk import Follower, Value, Walk


@dataclasses.dataclass(frozen=True)
class Consumer:
    """A sum over channels of which a plan removes some.

    Attributes:
      place: the equation.
      kernel: the path of the leaf that weighs the channels, or None where there is none, as in the
        mean of a norm or a product of activations.
      into: the path of the leaf that could take what is missing from the sum, or None.
      sign: 1 where that leaf is added, -1 where it is subtracted, as the mean of a batch norm.
      stack: how many leading axes of the kernel and of that leaf a loop runs over.
      why: why there is no such leaf.
    """

    place: str
    kernel: str | None
    into: str | None
    sign: int = 1
    stack: int = 0
    why: str = ""


def consumers(
    fn: Callable[..., Any], params: Any, plan: Plan, *args: Any, **kwargs: Any
) -> tuple[Consumer, ...]:
    """What sums over channels that a plan removes, and which leaf is added to it right after.

    The function is traced, never run. Between the sum and that leaf there may be reshapes, casts
    and further addends, as long as nothing else reads the values in between: a bias, or the running
    mean of a batch norm.

    Args:
      fn: a function of `params` and the other arguments.
      params: its first argument, arrays or shapes.
      plan: of groups of the function.
      *args: the other arguments: arrays, shapes, or static values.
      **kwargs: likewise.

    Returns:
      One `Consumer` for each sum.

    Raises:
      CompressError: for params that the plan was not made for.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxcompress.pruning.structure import groups, keep_channels
      >>> params = {"up": jnp.ones((4, 6)), "down": jnp.ones((6, 2)), "bias": jnp.ones(2)}
      >>> apply = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"] + p["bias"]
      >>> found = groups(apply, params, jnp.ones((1, 4)))
      >>> plan = keep_channels(found, {found.removable[0]: [0, 2]})
      >>> [(c.kernel, c.into) for c in consumers(apply, params, plan, jnp.ones((1, 4)))]
      [('down', 'bias')]
    """
    leaves = leaves_of(params)
    plan.check([(path, tuple(x.shape)) for path, x in leaves], whole=True)
    follower = _Adders()
    tags = [_Leaf(path) for path, _ in leaves]
    shapes = [x.shape for _, x in leaves]
    found = label(fn, params, shapes, args, kwargs, follower, tags)
    settle(found, plan)
    return tuple(dict.fromkeys(_consumer(found, follower, s) for s in _lossy(found, follower)))


class _Leaf(NamedTuple):
    """The tag of a leaf, as it is or moved."""

    path: str
    stack: int = 0


class _Sums(NamedTuple):
    """The tag of a value to which some sums were added."""

    keys: frozenset[Any]


@dataclasses.dataclass
class _Sum:
    """A sum over axes, weighed by a leaf."""

    place: str
    axes: list[Axis]
    kernel: _Leaf | None
    why: str = ""
    inputs: int = 1  # how many values of the leaf make one of the outcome
    into: _Leaf | None = None
    sign: int = 1


# The same values in other places, or of another type.
_MOVES = frozenset({
    "broadcast_in_dim", "convert_element_type", "copy", "expand_dims", "name", "reduce_precision",
    "reshape", "squeeze", "transpose",
})  # fmt: skip


class _Adders(Follower):
    """Finds all sums of a function, and the leaves that are added to them."""

    def __init__(self) -> None:
        self.sums: dict[Any, _Sum] = {}
        self.reads: collections.Counter[Any] = collections.Counter()  # of a variable
        self.readers: dict[str, set[int]] = collections.defaultdict(set)  # of a leaf
        self.taken: dict[str, set[frozenset[Any]]] = collections.defaultdict(set)
        self.held: dict[int, Any] = {}  # of the numbers, so that they stay theirs

    def entered(self, jaxpr: compat.Jaxpr) -> None:
        if id(jaxpr) in self.held:
            return
        self.held[id(jaxpr)] = jaxpr
        read = [v for eqn in jaxpr.eqns for v in eqn.invars]
        self.reads.update(v for v in (*read, *jaxpr.outvars) if not isinstance(v, compat.Literal))

    def sliced(self, tag: Any) -> Any:
        return tag._replace(stack=tag.stack + 1) if isinstance(tag, _Leaf) else None

    def tag(self, walk: Walk, eqn: compat.JaxprEqn, ins: Sequence[Value]) -> Any:
        name = eqn.primitive.name
        if name in _MOVES:
            return self._read(eqn.invars[0], ins[0])
        for value in ins:
            if isinstance(value.tag, _Leaf):
                self.held[id(eqn)] = eqn
                self.readers[value.tag.path].add(id(eqn))
        if name in ("add", "sub", "add_any"):
            return self._added(eqn, ins)
        if name in ("dot_general", "conv_general_dilated", "reduce_sum"):
            made = _dot if name == "dot_general" else _conv if name[0] == "c" else _reduce
            found = made(walk, eqn, ins)
            key = (id(eqn), found.kernel)
            self.held[id(eqn)] = eqn
            self.sums[key] = found
            return _Sums(frozenset([key]))
        return None

    def _read(self, v: Any, value: Value) -> Any:
        """The tag of an operand; what is also read elsewhere can take nothing up."""
        shared = isinstance(value.tag, _Sums) and self.reads[v] > 1
        return None if shared else value.tag

    def _added(self, eqn: compat.JaxprEqn, ins: Sequence[Value]) -> Any:
        a, b = (self._read(v, value) for v, value in zip(eqn.invars, ins))
        negative = eqn.primitive.name == "sub"
        if isinstance(b, _Sums) and (negative or not isinstance(a, _Sums)):
            if negative:
                return a if isinstance(a, _Sums) else None
            a, b = b, a
        if not isinstance(a, _Sums):
            return None
        if isinstance(b, _Sums):
            return _Sums(a.keys | b.keys)
        if not isinstance(b, _Leaf):
            return a
        self.taken[b.path].add(a.keys)
        for key in a.keys:
            self.sums[key].into = b
            self.sums[key].sign = -1 if negative else 1
        return None


def _dot(walk: Walk, eqn: compat.JaxprEqn, ins: Sequence[Value]) -> _Sum:
    contract, batch = eqn.params["dimension_numbers"]
    kernels = [i for i in (0, 1) if isinstance(ins[i].tag, _Leaf)]
    one = 1 if ins[0].whole else 0  # of which the axes are known
    axes = [ins[one].axes[a] for a in contract[one]]
    if len(kernels) != 1 or ins[1 - kernels[0]].whole:
        return _Sum(walk.table.place, axes, None, "no leaf as it is weighs what it sums")
    if batch[0]:
        return _Sum(walk.table.place, axes, None, "it is of a stack of weights at once")
    return _Sum(walk.table.place, axes, ins[kernels[0]].tag, inputs=math.prod(map(length, axes)))


def _conv(walk: Walk, eqn: compat.JaxprEqn, ins: Sequence[Value]) -> _Sum:
    x, kernel, _ = eqn.params["dimension_numbers"]
    axes = [ins[0].axes[x[1]]] if ins[1].whole else [ins[1].axes[kernel[1]]]
    if ins[0].whole or not isinstance(ins[1].tag, _Leaf):
        return _Sum(walk.table.place, axes, None, "no leaf as it is weighs what it sums")
    inputs = math.prod(length(axis) for a, axis in enumerate(ins[1].axes) if a != kernel[0])
    return _Sum(walk.table.place, axes, ins[1].tag, inputs=inputs)


def _reduce(walk: Walk, eqn: compat.JaxprEqn, ins: Sequence[Value]) -> _Sum:
    axes = [ins[0].axes[a] for a in eqn.params["axes"]]
    return _Sum(walk.table.place, axes, None, "no leaf weighs what it sums")


def _lossy(found: Labelled, follower: _Adders) -> list[_Sum]:
    """The sums from which something is missing when channels are removed."""
    size = found.walk.kept.size
    return [s for s in follower.sums.values() if any(size(a) < length(a) for a in s.axes)]


def _consumer(found: Labelled, follower: _Adders, s: _Sum) -> Consumer:
    if s.kernel is None:
        return Consumer(s.place, None, None, why=s.why)
    path = s.kernel.path
    own = [x for x in follower.sums.values() if x.kernel is not None and x.kernel.path == path]
    why = ""
    if s.into is None:
        why = "nothing is added to it alone"
    elif any((x.into, x.sign) != (s.into, s.sign) for x in own):
        why = "it is used several times, with different leaves added"
    elif len(follower.readers[s.into.path]) > 1 or len(follower.taken[s.into.path]) > 1:
        why = f"{s.into.path} is read elsewhere too"
    elif s.into.stack != s.kernel.stack:
        why = f"{s.into.path} is one for several layers"
    elif not _aligned(found, s):
        why = f"{s.into.path} does not have its shape"
    if why:
        return Consumer(s.place, path, None, stack=s.kernel.stack, why=why)
    return Consumer(s.place, path, s.into.path, s.sign, s.kernel.stack)  # type: ignore[union-attr]


def _aligned(found: Labelled, s: _Sum) -> bool:
    """Whether a leaf has the outputs of the kernel, in their order."""
    kernel, into = (_groups(found, leaf) for leaf in (s.kernel, s.into) if leaf is not None)
    size = lambda factors: math.prod(n for n, _ in factors)
    it = iter(kernel)
    return size(kernel) == s.inputs * size(into) and all(group in it for group in into)


def _groups(found: Labelled, leaf: _Leaf) -> list[tuple[int, int]]:
    axes = found.axes[found.paths.index(leaf.path)][leaf.stack :]
    return [
        (factor.size, factor.group)
        for axis in axes
        for segment in found.walk.table.resolve(axis)
        for factor in segment
    ]
