"""The contract of a compressed leaf, and the dispatch of primitives to it.

A leaf type is a frozen dataclass under `register_array`. It names its children (arrays, or other
compressed leaves) and its static fields, and defines `shape`, `dtype` and `materialize`. All the
rest has a default: without any rule a leaf is materialized wherever it is used, which is correct,
and each rule makes one primitive run on the small form instead.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxcompress import compat
from jaxcompress.arrays.deferred import deferred_primitive
from jaxcompress.arrays.layout import Layout
from jaxcompress.errors import CompressError

Rule = Callable[[int, list[Any], dict[str, Any]], Any]

_TYPES: dict[str, type[CompressedArray]] = {}
_RULES: dict[tuple[type, str], Rule] = {}

T = TypeVar("T", bound="CompressedArray")


class CompressedArray:
    """A pytree node that stands for a dense array and takes less room.

    Subclasses are registered with `register_array` and must define `shape`, `dtype` and
    `materialize`. Static fields describe only the trailing, logical axes of one weight: under
    `vmap` and `scan` the children gain and lose leading axes while the static fields stay, so
    `shape` is always derived from the children and axes are stored as negative numbers.
    """

    form: ClassVar[str] = ""
    children: ClassVar[tuple[str, ...]] = ()
    static: ClassVar[tuple[str, ...]] = ()
    trainable: ClassVar[tuple[str, ...]] = ()
    inner: ClassVar[tuple[str, ...]] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense array this leaf stands for."""
        raise NotImplementedError

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the dense array this leaf stands for."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """The number of axes of the dense array."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of values of the dense array."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """What the children really take, in bytes: codes, scales, masks, codebooks, factors."""
        return sum(int(x.size) * x.dtype.itemsize for x in jax.tree.leaves(self))

    @property
    def batch_ndim(self) -> int:
        """How many leading axes every child carries, so that `scan` may slice them off."""
        return 0

    def materialize(self, key: jax.Array | None = None) -> jax.Array:
        """The dense array. `key` is used by stochastic leaves only."""
        raise NotImplementedError

    def finalize(self) -> CompressedArray | jax.Array:
        """The storage form of a trainable leaf; of any other, the same with that of its leaves."""
        inner = {name: getattr(self, name) for name in self.children}
        changes = {n: x.finalize() for n, x in inner.items() if isinstance(x, CompressedArray)}
        changes = {name: x for name, x in changes.items() if x is not inner[name]}
        return self.replace(**changes) if changes else self

    def astype(self, dtype: Any) -> CompressedArray | None:
        """The leaf that computes in another dtype, or None where a cast must be done dense."""
        return None

    def describe(self) -> str:
        """A short name of the form for tables, such as `int4/64`."""
        return self.form

    def layouts(self) -> dict[str, Layout]:
        """What the bytes of children hold that an entropy coder would not see, by child."""
        return {}

    def shardings(self, sharding: NamedSharding) -> Any:
        """Where the children go when the dense array lies by `sharding`.

        A child with the axes of the dense array is split like it, along each axis that the
        device count divides; everything else is replicated.
        """

        def place(child: Any) -> Any:
            if child is None:
                return None
            if not isinstance(child, CompressedArray):
                return fit_sharding(sharding, self.shape, child.shape)
            whole = NamedSharding(sharding.mesh, PartitionSpec())
            return child.shardings(sharding if child.ndim == self.ndim else whole)

        return self.replace(**{name: place(getattr(self, name)) for name in self.children})

    def replace(self: T, **changes: Any) -> T:
        """The same leaf with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.materialize(), dtype=dtype)

    def __repr__(self) -> str:
        try:
            head = f"{np.dtype(self.dtype).name}{list(self.shape)}, {self.describe()}"
        except Exception:  # jax may hold placeholders in place of the children
            head = f"..., {self.form}"
        return f"{type(self).__name__}({head})"


@dataclass_transform(frozen_default=True)
def register_array(
    form: str,
    *,
    children: Sequence[str],
    static: Sequence[str] = (),
    trainable: Sequence[str] = (),
    inner: Sequence[str] = (),
) -> Callable[[type[T]], type[T]]:
    """Registers a leaf type: a class decorator.

    Args:
      form: the name under which files store the type; unique, `package.name` for third parties.
      children: the fields that hold arrays, other leaves or None.
      static: the fields that are pytree metadata: hashable, and plain JSON values, dtypes or
        tuples, so that they can be written to a file.
      trainable: the children that an optimizer should see.
      inner: the children that a later spec of a `chain` compresses further.

    Returns:
      A decorator that makes the class a frozen dataclass and a pytree node, which `jit`, `grad`,
      `vmap`, `scan`, `compressed`, `save` and `summary` then all understand.

    Raises:
      CompressError: when the form is taken by another class.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> @jc.register_array("example.repeated", children=("row",), static=("times",))
      ... class Repeated(jc.CompressedArray):
      ...     row: jnp.ndarray
      ...     times: int
      ...     @property
      ...     def shape(self):
      ...         return (*self.row.shape[:-1], self.times, self.row.shape[-1])
      ...     @property
      ...     def dtype(self):
      ...         return self.row.dtype
      ...     def materialize(self, key=None):
      ...         return jnp.broadcast_to(self.row[..., None, :], self.shape)
      >>> Repeated(jnp.ones(3), 100)
      Repeated(float32[100, 3], example.repeated)
    """

    def decorate(cls: type[T]) -> type[T]:
        taken = _TYPES.get(form)
        if taken is not None and taken.__qualname__ != cls.__qualname__:
            raise CompressError(f"form {form!r} is already registered by {taken.__qualname__}")
        fields = set(cls.__annotations__)
        listed = {*children, *static}
        names = {n for n in fields if not str(cls.__annotations__[n]).startswith("ClassVar")}
        if names != listed:
            raise CompressError(
                f"{cls.__name__}: every field must be listed once in `children` or `static`; "
                f"fields {sorted(names)}, listed {sorted(listed)}"
            )
        cls.form = form
        cls.children = tuple(children)
        cls.static = tuple(static)
        cls.trainable = tuple(trainable)
        cls.inner = tuple(inner)
        cls = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
        compat.register_node(cls, children, static)
        _TYPES[form] = cls
        return cls

    return decorate


def array_type(form: str) -> type[CompressedArray] | None:
    """The class registered under a form's name, or None."""
    return _TYPES.get(form)


def register_rule(cls: type[CompressedArray], primitive: str) -> Callable[[Rule], Rule]:
    """Registers how a leaf type runs one primitive: a function decorator.

    The rule is called as `rule(index, operands, params)`: `operands[index]` is the leaf, all other
    operands are dense, `params` are those of the jaxpr equation. It returns the one output, an
    array or a compressed leaf, or `NotImplemented`, upon which the leaf is materialized.

    Args:
      cls: the leaf type; subclasses inherit the rule.
      primitive: the primitive's name in a jaxpr, such as `dot_general`.

    Returns:
      The decorator.
    """

    def decorate(rule: Rule) -> Rule:
        _RULES[cls, primitive] = rule
        return rule

    return decorate


def find_rule(cls: type, primitive: str) -> Rule | None:
    """The rule of a type for a primitive, its own or an inherited one."""
    for base in cls.__mro__:
        rule = _RULES.get((base, primitive))
        if rule is not None:
            return rule
    return None


def is_compressed(x: Any) -> bool:
    """Whether `x` is a compressed leaf; made to be passed as `is_leaf`.

    Examples:
      >>> import jaxcompress as jc
      >>> jc.is_compressed(3.0)
      False
    """
    return isinstance(x, CompressedArray)


def materialize(x: Any) -> Any:
    """The dense array of a leaf; anything else unchanged."""
    return x.materialize() if isinstance(x, CompressedArray) else x


def try_rules(primitive: str, operands: Sequence[Any], params: dict[str, Any]) -> Any:
    """Runs a primitive through the rule of one of its compressed operands.

    Each compressed operand is asked in turn, with all others materialized. Returns
    `NotImplemented` when no rule applies.
    """
    for i, operand in enumerate(operands):
        if not isinstance(operand, CompressedArray):
            continue
        rule = find_rule(type(operand), primitive)
        if rule is None:
            continue
        others = [x if j == i else materialize(x) for j, x in enumerate(operands)]
        out = rule(i, others, params)
        if out is not NotImplemented:
            return out
    return NotImplemented


def dot_general(lhs: Any, rhs: Any, params: dict[str, Any]) -> Any:
    """`lax.dot_general` on arrays or leaves; for rules that run on nested leaves."""
    out = try_rules("dot_general", (lhs, rhs), params)
    if out is NotImplemented:
        out = jax.lax.dot_general(materialize(lhs), materialize(rhs), **params)
    return out


def conv_general_dilated(lhs: Any, rhs: Any, params: dict[str, Any]) -> Any:
    """`lax.conv_general_dilated` on arrays or leaves, with the parameters of the equation."""
    out = try_rules("conv_general_dilated", (lhs, rhs), params)
    if out is NotImplemented:
        out = jax.lax.conv_general_dilated_p.bind(materialize(lhs), materialize(rhs), **params)
    return out


def gather_rows(operand: Any, operands: Sequence[Any], params: dict[str, Any]) -> Any:
    """`lax.gather` of an array or a leaf, with the parameters of the equation."""
    out = try_rules("gather", (operand, *operands), params)
    if out is NotImplemented:
        out = jax.lax.gather_p.bind(materialize(operand), *operands, **params)
    return out


def cast(x: Any, dtype: Any) -> Any:
    """`x` in another dtype: a leaf stays compressed where its type can."""
    if not isinstance(x, CompressedArray):
        return x.astype(dtype)
    if x.dtype == np.dtype(dtype):
        return x
    out = x.astype(dtype)
    return x.materialize().astype(dtype) if out is None else out


def fit_sharding(
    sharding: NamedSharding, dense: tuple[int, ...], shape: tuple[int, ...]
) -> NamedSharding:
    """The sharding of a child whose axes are those of the dense array, where it divides."""
    if len(shape) != len(dense):
        return NamedSharding(sharding.mesh, PartitionSpec())
    spec = (*sharding.spec, *([None] * (len(dense) - len(sharding.spec))))
    return NamedSharding(
        sharding.mesh,
        PartitionSpec(
            *(s if shape[i] % _ways(sharding, s) == 0 else None for i, s in enumerate(spec))
        ),
    )


def _ways(sharding: NamedSharding, names: Any) -> int:
    if names is None or names is PartitionSpec.UNCONSTRAINED:
        return 1
    names = names if isinstance(names, tuple) else (names,)
    return math.prod(sharding.mesh.shape[n] for n in names)


def narrows(source: Any, target: Any) -> bool:
    """Whether a cast from `source` to `target` keeps or narrows a floating dtype.

    A leaf that computes in float32 and rounds once at the end may be cast down by rounding once
    to the narrower dtype; casting up again must first round, so that is done dense.
    """
    if not (jnp.issubdtype(source, jnp.floating) and jnp.issubdtype(target, jnp.floating)):
        return False
    if np.dtype(source) == np.dtype(target):
        return True
    return np.dtype(source) == np.float32 and np.dtype(target).itemsize < 4


@register_rule(CompressedArray, "convert_element_type")
def _convert(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    leaf = operands[i]
    out = leaf if leaf.dtype == params["new_dtype"] else leaf.astype(params["new_dtype"])
    return NotImplemented if out is None else out


@register_rule(CompressedArray, "dot_general")
def _dot_general(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    return deferred_primitive(lax.dot_general_p, i, operands[i], operands, params)


@register_rule(CompressedArray, "conv_general_dilated")
def _conv_general_dilated(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    return deferred_primitive(lax.conv_general_dilated_p, i, operands[i], operands, params)


@register_rule(CompressedArray, "copy")
@register_rule(CompressedArray, "copy_p")
@register_rule(CompressedArray, "sharding_constraint")
def _identity(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    return operands[i]  # a leaf keeps the placement it came with


@register_rule(CompressedArray, "stop_gradient")
def _stop_gradient(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    return jax.lax.stop_gradient(operands[i])
