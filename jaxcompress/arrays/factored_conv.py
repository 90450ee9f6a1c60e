"""How a factored kernel is convolved: one small convolution or product for each factor.

The input of a convolution is a tensor with letters for its features. A factor without spatial
letters is a product along features; one with them a convolution along just those axes. Letters that
a later factor or the output needs are kept, as groups; those that come up last here are summed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.arrays.base import materialize, register_rule
from jaxcompress.arrays.convolution import ordered
from jaxcompress.arrays.deferred import deferred_primitive
from jaxcompress.arrays.factored import FactoredArray, free_letters

__all__ = ["FactoredArray"]

# With more factors than this the given order is taken.
_MOST_ORDERS = 6


@register_rule(FactoredArray, "conv_general_dilated")
def _conv(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    leaf, x = operands[i], operands[0]
    dense = functools.partial(deferred_primitive, lax.conv_general_dilated_p, i, leaf, operands)
    if i != 1 or leaf.batch_ndim or not leaf.size or not x.size:
        return dense(params)
    network = _network(leaf, params)
    if network is None:
        return dense(params)
    numbers = params["dimension_numbers"]
    examples, lengths = x.shape[numbers.lhs_spec[0]], [x.shape[a] for a in numbers.lhs_spec[2:]]
    order = _order(network, (examples, *lengths))
    if order is None:
        return dense(params)
    wanted = params["preferred_element_type"]
    narrow = jnp.promote_types(x.dtype, leaf.dtype)
    wide = jnp.promote_types(narrow, wanted or leaf.dtype)
    # [example, *space, *features], the groups one of the features.
    t = lax.transpose(x, (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1]))
    t = t.reshape(*t.shape[:-1], *(network.size[c] for c in network.group + network.inputs))
    state = _State(t.astype(wide), network.group + network.inputs)
    parts = [materialize(f).astype(wide) for f in leaf.factors]
    factors = [network.split(f, n, leaf.terms[n]) for n, f in enumerate(parts)]
    for step, n in enumerate(order):
        later = {c for m in order[step + 1 :] for c in network.terms[m]}
        keep = later | set(network.outputs) | set(network.group)
        state = _applied(state, factors[n], network.terms[n], keep, network, params)
    axes = [state.letters.index(c) for c in network.group + network.outputs]
    space = len(network.space)
    out = lax.transpose(state.values, (*range(1 + space), *(1 + space + a for a in axes)))
    out = out.reshape(*out.shape[: 1 + space], -1)
    place = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
    inverse = [place.index(a) for a in range(len(place))]
    return lax.transpose(out, inverse).astype(wanted or narrow)


@dataclasses.dataclass(frozen=True)
class _Network:
    """A factored kernel as a convolution sees it.

    Attributes:
      terms: the letters of each factor, those of grouped outputs with the group's before them.
      size: of each letter.
      space: the letter of each spatial axis.
      inputs: the letters of a group's input features.
      outputs: the letters of a group's output features.
      group: the letter of the groups; empty for one group.
      strides, padding, lhs_dilation, rhs_dilation: of each spatial axis.
    """

    terms: tuple[str, ...]
    sizes: tuple[tuple[str, int], ...]
    space: str
    inputs: str
    outputs: str
    group: str
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]

    @property
    def size(self) -> dict[str, int]:
        return dict(self.sizes)

    def split(self, factor: jax.Array, n: int, term: str) -> jax.Array:
        """A factor with the groups' letter as an axis of its own, summed over what only it has."""
        alone = [a for a, c in enumerate(term) if c not in self.terms[n]]
        factor = jnp.sum(factor, axis=alone)
        return factor.reshape([self.size[c] for c in self.terms[n]])

    def window(self, axis: int, length: int) -> int:
        """The length of a spatial axis after the convolution along it."""
        n, k = length, self.size[self.space[axis]]
        n = 0 if n == 0 else 1 + (n - 1) * self.lhs_dilation[axis]
        n += sum(self.padding[axis]) - (k - 1) * self.rhs_dilation[axis] - 1
        return max(0, n // self.strides[axis] + 1)


def _network(leaf: FactoredArray, params: dict[str, Any]) -> _Network | None:
    """The kernel as a network; None where it is none, as where a spatial axis has parts."""
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    out, inputs, *space = (leaf.axes[a] for a in numbers.rhs_spec)
    count = "".join(leaf.terms).count
    if params["batch_group_count"] != 1 or any(len(s) != 1 or count(s) != 1 for s in space):
        return None
    sizes, terms, group = leaf.sizes, leaf.terms, ""
    if groups > 1:
        # The group is the slow part of the outputs, and so of their first letter.
        free, first = free_letters(leaf), out[0]
        if not free or sizes[first] % groups:
            return None
        group = free[0]
        sizes |= {group: groups, first: sizes[first] // groups}
        terms = tuple(t.replace(first, group + first) for t in terms)
    whole = "".join((*terms, out, inputs, *space, group))
    terms = tuple("".join(c for c in t if whole.count(c) > 1) for t in terms)
    return _Network(
        terms, tuple(sizes.items()), "".join(space), inputs, out, group,
        tuple(params["window_strides"]), tuple(map(tuple, params["padding"])),
        tuple(params["lhs_dilation"]), tuple(params["rhs_dilation"]),
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _order(network: _Network, x: tuple[int, ...]) -> tuple[int, ...] | None:
    """The order of factors that multiplies least; None where the dense kernel does not more."""
    count = len(network.terms)
    orders: Any = itertools.permutations(range(count))
    if count > _MOST_ORDERS:
        orders = [tuple(range(count))]
    least = min(orders, key=lambda order: (_multiplications(network, order, x), order))
    dense = _multiplications(network, None, x)
    return tuple(least) if _multiplications(network, least, x) < dense else None


def _multiplications(network: _Network, order: Sequence[int] | None, x: tuple[int, ...]) -> int:
    """Of one factor after the other, or of the dense kernel; x has `[example, *space]`."""
    size = network.size
    lengths = list(x[1:])
    state = set(network.group + network.inputs)
    if order is None:
        out = math.prod(network.window(a, n) for a, n in enumerate(lengths))
        letters = {*state, *network.outputs, *network.space}
        return x[0] * out * math.prod(size[c] for c in letters)
    total = 0
    for step, n in enumerate(order):
        term = network.terms[n]
        for axis, letter in enumerate(network.space):
            if letter in term:
                lengths[axis] = network.window(axis, lengths[axis])
        total += x[0] * math.prod(lengths) * math.prod(size[c] for c in {*state, *term})
        later = {c for m in order[step + 1 :] for c in network.terms[m]}
        keep = later | set(network.outputs) | set(network.group)
        state = {c for c in (*state, *term) if c in keep and c not in network.space}
    return total


@dataclasses.dataclass(frozen=True)
class _State:
    """What has become of the input: `[example, *space, *letters]`."""

    values: jax.Array
    letters: str


def _applied(
    state: _State,
    factor: jax.Array,
    term: str,
    keep: set[str],
    network: _Network,
    params: dict[str, Any],
) -> _State:
    """The state after one factor."""
    size, space = network.size, [c for c in network.space if c in term]
    shared = "".join(c for c in state.letters if c in term and c in keep)
    summed = "".join(c for c in state.letters if c in term and c not in keep)
    rest = "".join(c for c in state.letters if c not in term)
    new = "".join(c for c in term if c not in state.letters and c not in space)
    if not space:
        return _product(state, factor, term, shared + rest + new, network, params)
    n = 1 + len(network.space)
    x = lax.transpose(
        state.values,
        (0, *(n + state.letters.index(c) for c in rest), *range(1, n),
         *(n + state.letters.index(c) for c in shared + summed)),
    )  # fmt: skip
    lead, lengths = x.shape[: 1 + len(rest)], x.shape[1 + len(rest) : 1 + len(rest) + n - 1]
    x = x.reshape(math.prod(lead), *lengths, -1)
    kernel = lax.transpose(factor, [term.index(c) for c in (*space, *summed, *shared, *new)])
    kernel = kernel.reshape(
        *(size[c] if c in space else 1 for c in network.space),
        math.prod(size[c] for c in summed),
        -1,
    )
    out = _convolved(x, kernel, math.prod(size[c] for c in shared), space, network, params)
    found = [size[c] for c in shared + new]
    out = out.reshape(*lead, *out.shape[1:-1], *found)
    r = 1 + len(rest)
    back = (0, *range(r, r + n - 1), *range(r + n - 1, out.ndim), *range(1, r))
    return _State(lax.transpose(out, back), shared + new + rest)


def _product(
    state: _State,
    factor: jax.Array,
    term: str,
    out: str,
    network: _Network,
    params: dict[str, Any],
) -> _State:
    # Ints name the axes, since example and space have no letters of their own.
    space = list(range(1 + len(network.space)))
    names = {c: len(space) + n for n, c in enumerate(dict.fromkeys(state.letters + term))}
    values = jnp.einsum(
        state.values, [*space, *(names[c] for c in state.letters)],
        factor, [names[c] for c in term],
        [*space, *(names[c] for c in out)],
        precision=params["precision"],
        preferred_element_type=state.values.dtype,
    )  # fmt: skip
    return _State(values, out)


def _convolved(
    x: jax.Array,
    kernel: jax.Array,
    groups: int,
    along: Sequence[str],
    network: _Network,
    params: dict[str, Any],
) -> jax.Array:
    """A convolution `[example, *space, features]` along some of the spatial axes only."""
    n = len(network.space)
    pick = lambda values, other: tuple(
        v if c in along else other for c, v in zip(network.space, values, strict=True)
    )
    last = n + 1
    numbers = lax.ConvDimensionNumbers(
        (0, last, *range(1, last)), (last, last - 1, *range(n)), (0, last, *range(1, last))
    )
    changes = {
        "window_strides": pick(network.strides, 1),
        "padding": pick(network.padding, (0, 0)),
        "lhs_dilation": pick(network.lhs_dilation, 1),
        "rhs_dilation": pick(network.rhs_dilation, 1),
        "dimension_numbers": numbers,
        "feature_group_count": groups,
        "preferred_element_type": x.dtype,
    }
    return ordered(x, kernel, {**params, **changes})
