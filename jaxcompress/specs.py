"""What a spec is: a frozen description of one compression, with a host half and a jitted half."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxcompress.arrays.base import CompressedArray, is_compressed
from jaxcompress.errors import CompressError, SpecError
from jaxcompress.input_stats import InputStats
from jaxcompress.rules import KernelAxes, default_axes


@dataclasses.dataclass(frozen=True)
class LeafContext:
    """What a spec may know about the leaf it is given.

    Attributes:
      path: the leaf's path, for messages.
      axes: its input and output axes.
      key: a random key, or None.
      stats: statistics of the inputs that meet the leaf on its input axes, or None.
    """

    path: str
    axes: KernelAxes
    key: jax.Array | None = None
    stats: InputStats | None = None


class Plan:
    """Everything static that a spec decided about one leaf; hashable, so that it is compiled once.

    A subclass is a frozen dataclass with an `apply`.
    """

    def apply(self, leaf: jax.Array, key: jax.Array | None) -> CompressedArray:
        """The compressed leaf; pure and jittable."""
        raise NotImplementedError


class Spec:
    """A compression of one leaf: `plan` on the host, `apply` jitted, together a call.

    Subclasses are frozen dataclasses of plain values, and define `plan`.
    """

    def __post_init__(self) -> None:
        """Turns numpy numbers into plain ones; a subclass that checks its fields calls it first."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, np.generic):
                object.__setattr__(self, field.name, value.item())

    def __repr__(self) -> str:
        """The call that makes it, without what is default."""
        words = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value != field.default:
                words.append(f"{field.name}={value!r}" if field.kw_only else repr(value))
        return f"{type(self).__name__}({', '.join(words)})"

    def plan(self, leaf: jax.Array, context: LeafContext) -> Plan:
        """Decides all static facts: ranks, counts, axes. May read concrete values.

        Raises:
          SpecError: when the spec does not fit the leaf; names the leaf.
        """
        raise NotImplementedError

    def __call__(self, leaf: Any, context: LeafContext | None = None) -> Any:
        """Compresses one array, or the inner children of a leaf that is already compressed."""
        if context is None:
            context = LeafContext("leaf", default_axes("leaf", leaf.ndim))
        if is_compressed(leaf):
            return self._inner(leaf, context)
        leaf, mesh = on_auto_axes(leaf)
        plan = self.plan(leaf, context)
        out = _apply(plan, leaf, context.key, _placement(plan, leaf, context.key))
        return out if mesh is None else on_mesh(out, mesh)

    def _inner(self, leaf: CompressedArray, context: LeafContext) -> CompressedArray:
        if not leaf.inner:
            raise SpecError(
                f"{context.path}: {self!r} cannot follow in a chain on {leaf!r}; put it first"
            )
        changes = {}
        for name in leaf.inner:
            child, path = getattr(leaf, name), f"{context.path}.{name}"
            if isinstance(child, tuple):
                parts = enumerate(child)
                changes[name] = tuple(
                    self._child(leaf, name, x, f"{path}.{i}", context) for i, x in parts
                )
            else:
                changes[name] = self._child(leaf, name, child, path, context)
        return leaf.replace(**changes)

    def _child(
        self, leaf: CompressedArray, name: str, child: Any, path: str, context: LeafContext
    ) -> Any:
        same = name in getattr(leaf, "grids", ())
        axes = context.axes if same else child_axes(leaf, name, child)
        return self(child, LeafContext(path, axes, context.key))


_SPECS: dict[str, type[Spec]] = {}

S = TypeVar("S", bound=Spec)


def register_spec(name: str) -> Callable[[type[S]], type[S]]:
    """Gives a spec its name in recipes: a class decorator.

    Args:
      name: the key in YAML, such as `quantize`; unique, `package.name` for third parties.

    Raises:
      CompressError: when the name is taken by another class.

    Examples:
      >>> import dataclasses, jaxcompress as jc
      >>> @jc.register_spec("example.int8")
      ... @dataclasses.dataclass(frozen=True, repr=False)
      ... class Int8(jc.Spec):
      ...     group_size: int = 64
      ...     def plan(self, leaf, context):
      ...         return jc.Quantize("int8", group_size=self.group_size).plan(leaf, context)
      >>> jc.Recipe.from_yaml("rules: [{match: '**', example.int8: 32}]").rules[0].spec
      Int8(32)
    """

    def decorate(cls: type[S]) -> type[S]:
        taken = _SPECS.get(name)
        if taken is not None and taken.__qualname__ != cls.__qualname__:
            raise CompressError(f"spec {name!r} is already registered by {taken.__qualname__}")
        _SPECS[name] = cls
        return cls

    return decorate


def spec_names() -> dict[str, type[Spec]]:
    """The registered specs by name."""
    return dict(_SPECS)


def is_count(x: Any, least: int, most: float = math.inf) -> bool:
    """Whether `x` is a whole number within bounds; what specs ask of ranks, bits and sizes."""
    whole = isinstance(x, (int, np.integer)) and not isinstance(x, bool)
    return whole and bool(least <= x <= most)


def is_number(x: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    """Whether `x` is a finite real number, of Python or of numpy, within bounds; a bool is none.

    Examples:
      >>> import numpy as np
      >>> is_number(np.float32(0.5), 0, 1), is_number(True), is_number(float("nan"))
      (True, False, False)
    """
    if not isinstance(x, numbers.Real) or isinstance(x, bool):
        return False
    value: Any = x.item() if isinstance(x, np.generic) else x
    return bool(abs(value) <= sys.float_info.max and least <= value <= most)  # false for NaN


def is_floating_dtype(x: Any) -> bool:
    """Whether `x` is or names a floating dtype.

    Examples:
      >>> is_floating_dtype("bfloat16"), is_floating_dtype("int8"), is_floating_dtype("half-float")
      (True, False, False)
    """
    try:
        return bool(jnp.issubdtype(jnp.dtype(x), jnp.floating))
    except TypeError:
        return False


def child_axes(leaf: CompressedArray, name: str, child: Any) -> KernelAxes:
    """The axes of a leaf's inner child: a factor's inputs are what it contracts first."""
    batch = leaf.batch_ndim
    trailing = child.ndim - batch
    if trailing == 1:
        return KernelAxes((-1,), ())
    own = getattr(leaf, "inner_inputs", {}).get(name)
    if own is not None:
        return KernelAxes(own, tuple(range(max(own) + 1, 0)))
    # The left factor maps its first axes to the rank, the right one the rank to its last axes. Of a
    # network of factors each maps all its axes but the last.
    inputs = 1 if name == "right" else trailing - 1
    return KernelAxes(
        tuple(range(-trailing, -trailing + inputs)), tuple(range(-trailing + inputs, 0))
    )


def on_auto_axes(leaf: Any) -> tuple[Any, Mesh | None]:
    """A leaf on a mesh with Explicit axes as it lies on the same mesh with Auto ones, and the mesh.

    A sort or a running sum has no type under Explicit axes; where the outcome lies is settled by
    its `shardings` in any case, and `on_mesh` brings it back.

    Args:
      leaf: any array, traced or not.

    Returns:
      The leaf, and the mesh it was on; the leaf as it is and None where there is nothing to do.
    """
    sharding = mesh_sharding(leaf)
    if sharding is None or not isinstance(sharding.mesh, Mesh):
        return leaf, None
    mesh = sharding.mesh
    if all(kind == AxisType.Auto for kind in mesh.axis_types):
        return leaf, None
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)
    return jax.device_put(leaf, NamedSharding(auto, sharding.spec)), mesh


def on_mesh(leaf: CompressedArray, mesh: Mesh) -> CompressedArray:
    """A compressed leaf as it lies on another mesh of the same axes; undoes `on_auto_axes`."""
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, x.sharding.spec)), leaf)


def mesh_sharding(leaf: Any) -> NamedSharding | None:
    """Where a concrete leaf lies that is spread over several devices of a mesh, else None."""
    sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    spread = isinstance(sharding, NamedSharding) and sharding.num_devices > 1
    return sharding if spread else None


def placed_like(out: CompressedArray, leaf: Any, mesh: Mesh | None) -> CompressedArray:
    """A compressed leaf where it belongs, made outside of a plan from what `on_auto_axes` gave."""
    sharding = mesh_sharding(leaf)
    if sharding is not None:
        out = jax.device_put(out, out.shardings(sharding))
    return out if mesh is None else on_mesh(out, mesh)


def on_all_devices(x: Any, leaf: Any) -> Any:
    """An array as a whole on each device that a leaf lies on."""
    sharding = mesh_sharding(leaf)
    if sharding is None:
        return x
    return jax.device_put(x, NamedSharding(sharding.mesh, PartitionSpec()))


@functools.partial(jax.jit, static_argnums=(0,))
def _apply_anywhere(plan: Plan, leaf: jax.Array, key: jax.Array | None) -> CompressedArray:
    return plan.apply(leaf, key)


@functools.lru_cache(maxsize=256)
def _apply_placed(plan: Plan, structure: Any, shardings: tuple[Any, ...]) -> Any:
    out = jax.tree.unflatten(structure, shardings)
    return jax.jit(plan.apply, out_shardings=out)


def _apply(plan: Plan, leaf: jax.Array, key: jax.Array | None, placement: Any) -> Any:
    if placement is None:
        return _apply_anywhere(plan, leaf, key)
    shardings, structure = jax.tree.flatten(placement)
    return _apply_placed(plan, structure, tuple(shardings))(leaf, key)


def _placement(plan: Plan, leaf: Any, key: jax.Array | None) -> Any:
    """Shardings of the outcome for a leaf that lies over several devices, else None."""
    sharding = mesh_sharding(leaf)
    if sharding is None:
        return None
    return jax.eval_shape(plan.apply, leaf, key).shardings(sharding)


@dataclasses.dataclass(frozen=True, repr=False)
class Chain(Spec):
    """Specs one after the other; see `chain`."""

    specs: tuple[Spec, ...]

    def __call__(self, leaf: Any, context: LeafContext | None = None) -> Any:
        for spec in self.specs:
            leaf = spec(leaf, context)
        return leaf

    def plan(self, leaf: jax.Array, context: LeafContext) -> Plan:
        """A chain plans each spec when its turn comes."""
        raise CompressError("a chain has no single plan; call it, or plan its specs in turn")

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.specs))})"


def chain(*specs: Spec) -> Spec:
    """Specs one after the other: each compresses what the one before it left.

    A spec that follows `Prune` acts on the kept values, one that follows `LowRank` on both factors,
    one that follows `Codebook` on the centroids. A pruned zero stays zero.

    Args:
      *specs: at least one spec.

    Returns:
      The spec that does them all.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> w = jnp.arange(16.0).reshape(4, 4)
      >>> jc.chain(jc.Prune(0.5), jc.Quantize("int8"))(w)
      SparseArray(float32[4, 4], 50% sparse bitmask of int8)
    """
    if not specs:
        raise SpecError("chain() needs at least one spec, such as chain(Prune(0.5))")
    flat: Sequence[Spec] = [
        s for spec in specs for s in (spec.specs if isinstance(spec, Chain) else (spec,))
    ]
    for spec in flat:
        if not isinstance(spec, Spec):
            raise SpecError(f"chain() takes specs such as Quantize('int8'), not {spec!r}")
    return flat[0] if len(flat) == 1 else Chain(tuple(flat))
