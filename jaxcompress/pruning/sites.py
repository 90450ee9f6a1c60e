"""Which leaves the rules prune, and what the masks of each are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.arrays.base import CompressedArray, is_compressed
from jaxcompress.errors import RuleError, SpecError
from jaxcompress.pruning.patterns import Pattern, lay
from jaxcompress.pruning.schedules import Schedule
from jaxcompress.pruning.select import kept_count
from jaxcompress.rules import KernelAxes, check_axes, default_axes, flatten, match


@dataclasses.dataclass(frozen=True)
class Site:
    """One pruned leaf.

    Attributes:
      place: its place among the flat leaves of the params.
      path: its path.
      key: the path of its array as jax writes it, which leads into a compressed leaf.
      shape: its shape; `batch_ndim` leading axes are a stack.
      batch_ndim: see above.
      pattern: what is kept or removed together.
    """

    place: int
    path: str
    key: str
    shape: tuple[int, ...]
    batch_ndim: int
    pattern: Pattern

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of one weight of the stack."""
        return self.shape[self.batch_ndim :]

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """How many units one weight has along each axis."""
        return self.pattern.units(self.weight_shape)


def find_sites(
    params: Any, rules: Mapping[str, str | None], axes: Mapping[str, KernelAxes]
) -> list[Site]:
    """The leaves that the rules name, from their paths and shapes alone."""
    leaves, _ = flatten(params)
    if not leaves:  # optax asks for the state of a tree without leaves, to see its structure
        return []
    check_axes(axes, leaves)
    keys = [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]
    ]
    sites, place = [], 0
    for (path, leaf), hit in zip(leaves, match(rules, [path for path, _ in leaves])):
        size = len(jax.tree.leaves(leaf))
        if hit is not None and hit[1] is not None:
            array, offset = _dense_weight(path, leaf, hit[0])
            at = place + offset
            sites.append(_site(at, path, keys[at], array, hit, axes))
        place += size
    return sites


def _dense_weight(path: str, leaf: Any, pattern: str) -> tuple[Any, int]:
    """The array to prune, and its place among the arrays of the leaf."""
    array, offset = leaf, 0
    if is_compressed(leaf):
        named = [getattr(leaf, name) for name in leaf.trainable]
        whole = [x for x in named if not isinstance(x, CompressedArray) and x is not None]
        whole = [x for x in whole if x.shape == leaf.shape]
        if len(whole) != 1:
            raise RuleError(
                f"rule {pattern!r} matches {path!r}, a {type(leaf).__name__} that holds no dense "
                f"weight to prune; put {path!r}: None before it"
            )
        array = whole[0]
        offset = next(i for i, x in enumerate(jax.tree.leaves(leaf)) if x is array)
    if not hasattr(array, "dtype") or not jnp.issubdtype(array.dtype, jnp.floating):
        kind = getattr(array, "dtype", type(array).__name__)
        raise RuleError(
            f"rule {pattern!r} matches {path!r} of {kind}, and only floating arrays can be "
            f"pruned; put {path!r}: None before it"
        )
    return array, offset


def _site(
    place: int,
    path: str,
    key: str,
    array: Any,
    hit: tuple[str, Any],
    axes: Mapping[str, KernelAxes],
) -> Site:
    pattern, kind = hit
    if array.ndim == 0:
        raise RuleError(
            f"rule {pattern!r} matches {path!r}, a scalar, which cannot be pruned; put {path!r}: "
            "None before it"
        )
    where = axes.get(path, default_axes(path, array.ndim))
    shape, batch = tuple(array.shape), where.batch_ndim(array.ndim)
    try:
        laid = lay(kind, shape[batch:], where)
    except SpecError as error:
        raise RuleError(f"rule {pattern!r}: {path!r}: {error}") from None
    return Site(place, path, key, shape, batch, laid)


def check_ends(sites: Sequence[Site], schedule: Schedule) -> None:
    """Refuses a schedule that ends before an `n:m` pattern is reached."""
    for site in sites:
        n, m = site.pattern.n, site.pattern.m
        if not m:
            continue
        if kept_count(m, schedule.final) > n:
            raise SpecError(
                f"{site.path}: {n}:{m} removes {1 - n / m:g} of the weights, and the schedule ends "
                f"at {schedule.final:g}: write a final sparsity of at least {1 - n / m:g}"
            )


def check_finite(sites: Sequence[Site], leaves: Sequence[Any]) -> None:
    """Refuses weights that are NaN or infinite, where they are concrete."""
    for site in sites:
        array = leaves[site.place]
        if isinstance(array, (jax.core.Tracer, jax.ShapeDtypeStruct)):
            continue
        with jax.ensure_compile_time_eval():  # also where a trace is under way
            bad = int(jnp.sum(~jnp.isfinite(array)))
        if bad:
            raise SpecError(
                f"{site.path}: {bad} of {array.size} weights are NaN or infinite; mend them, for "
                "instance with jnp.nan_to_num, before pruning"
            )
