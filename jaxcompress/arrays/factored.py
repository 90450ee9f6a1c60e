"""A weight as a network of small factors: Tucker, CP, tensor trains, Kronecker products."""

from __future__ import annotations

import functools
import math
import string
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxcompress.arrays.base import (
    CompressedArray,
    cast,
    fit_sharding,
    gather_rows,
    is_compressed,
    materialize,
    register_array,
    register_rule,
)
from jaxcompress.arrays.deferred import deferred, deferred_primitive
from jaxcompress.errors import SpecError


@register_array(
    "factored",
    children=("factors",),
    static=("terms", "axes", "kind"),
    trainable=("factors",),
    inner=("factors",),
)
class FactoredArray(CompressedArray):
    """`w = einsum(terms -> axes, *factors)`, each axis of w the product of its letters.

    Every term has a letter for each trailing axis of its factor. A letter of `axes` is an axis of
    w, or a part of one, the first letter of an axis counting slowest; every other letter is a rank
    and is summed over, in however many factors it occurs:

        Tucker-2 of a convolution       ir, hwrs, so    -> h, w, i, o
        CP                              hr, wr, ir, or  -> h, w, i, o
        tensor train of a matrix        air, rbjs, sck  -> abc, ijk
        sum of Kronecker products       tai, tbj        -> ab, ij
        Monarch                         kic, ckd        -> ki, cd

    A contraction runs factor by factor in the order that multiplies least, which opt_einsum finds
    for the shapes at hand, and a convolution as small ones along the axes that each factor has, of
    one feature each for letters that stay. Where that would multiply more than the dense weight
    does, the dense weight is made. Rows are looked up in the factors. Results are those of the
    dense weight to rounding.

    Attributes:
      factors: a tuple of arrays or leaves, `[*batch, *one axis to a letter]`.
      terms: the letters of each factor.
      axes: the letters of each axis of w.
      kind: the name of the decomposition, for tables.

    References:
      Novikov et al., *Tensorizing Neural Networks*, 2015; Kim et al., *Compression of Deep
      Convolutional Neural Networks for Fast and Low Power Mobile Applications*, 2016; Lebedev et
      al., *Speeding-up Convolutional Neural Networks Using Fine-tuned CP-Decomposition*, 2015.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> eye, row = jnp.eye(2), jnp.array([[1.0, 10.0]])
      >>> leaf = jc.FactoredArray.of((eye, row), "ai,bj->ab,ij", kind="kronecker")
      >>> leaf.materialize().tolist()
      [[1.0, 10.0, 0.0, 0.0], [0.0, 0.0, 1.0, 10.0]]
      >>> jc.compressed(jnp.matmul)(jnp.ones((1, 2)), leaf).tolist()
      [[1.0, 10.0, 1.0, 10.0]]
    """

    factors: tuple[Any, ...]
    terms: tuple[str, ...]
    axes: tuple[str, ...]
    kind: str

    @classmethod
    def of(
        cls, factors: Sequence[Any], expression: str, *, kind: str = "factored"
    ) -> FactoredArray:
        """The leaf of factors by an expression such as `"ir,hwrs,so->h,w,i,o"`.

        Raises:
          SpecError: where the expression does not fit the factors.
        """
        left, arrow, right = expression.replace(" ", "").partition("->")
        terms, axes = tuple(left.split(",")), tuple(right.split(","))
        _check(factors, terms, axes, expression, bool(arrow))
        return cls(tuple(factors), terms, axes, kind)

    @property
    def batch_ndim(self) -> int:
        return min((f.ndim - len(t) for f, t in zip(self.factors, self.terms)), default=0)

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each letter."""
        found: dict[str, int] = {}
        for factor, term in zip(self.factors, self.terms):
            found.update(zip(term, factor.shape[factor.ndim - len(term) :]))
        return found

    @property
    def ranks(self) -> tuple[int, ...]:
        """The sizes of the letters that are summed over, in the order of the terms."""
        inner = [c for c in dict.fromkeys("".join(self.terms)) if c not in "".join(self.axes)]
        return tuple(self.sizes[c] for c in inner)

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = self.sizes
        trailing = (math.prod(sizes[c] for c in axis) for axis in self.axes)
        return (*self.factors[0].shape[: self.batch_ndim], *trailing)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(functools.reduce(jnp.promote_types, (f.dtype for f in self.factors)))

    def materialize(self, key: jax.Array | None = None) -> jax.Array:
        # In float32, rounded once: an intermediate of few bits would be rounded at each factor.
        wide = jnp.promote_types(self.dtype, jnp.float32)
        dense = jnp.einsum(
            f"{','.join('...' + term for term in self.terms)}->...{''.join(self.axes)}",
            *(materialize(f).astype(wide) for f in self.factors),
            optimize="auto",
            precision=lax.Precision.HIGHEST,
        )
        return dense.astype(self.dtype).reshape(self.shape)

    def finalize(self) -> CompressedArray:
        return self.replace(
            factors=tuple(f.finalize() if is_compressed(f) else f for f in self.factors)
        )

    def astype(self, dtype: Any) -> CompressedArray | None:
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        return self.replace(factors=tuple(cast(f, dtype) for f in self.factors))

    def shardings(self, sharding: NamedSharding) -> Any:
        spec = (*sharding.spec, *([None] * (self.ndim - len(sharding.spec))))
        batch = self.batch_ndim
        # A letter that is a whole axis lies like it; parts of axes and ranks are on each device.
        lies = {axis: spec[batch + i] for i, axis in enumerate(self.axes) if len(axis) == 1}

        def place(factor: Any, term: str) -> Any:
            wanted = (*spec[:batch], *(lies.get(c) for c in term))
            used: list[Any] = []
            for entry in wanted:  # a mesh axis may split one axis of an array only
                used.append(entry if entry is None or entry not in used else None)
            split = NamedSharding(sharding.mesh, PartitionSpec(*used))
            if is_compressed(factor):
                return factor.shardings(split)
            return fit_sharding(split, factor.shape, factor.shape)

        return self.replace(
            factors=tuple(place(f, t) for f, t in zip(self.factors, self.terms, strict=True))
        )

    def describe(self) -> str:
        ranks = "x".join(map(str, self.ranks))
        kinds = {f.describe() for f in self.factors if is_compressed(f)}
        return f"{self.kind}{f' {ranks}' if ranks else ''}" + (
            f" of {' and '.join(sorted(kinds))}" if kinds else ""
        )


def _check(
    factors: Sequence[Any],
    terms: Sequence[str],
    axes: Sequence[str],
    expression: str,
    arrow: bool,
) -> None:
    letters = "".join(axes)
    plain = all(set(t) <= set(string.ascii_letters) for t in (*terms, *axes))
    if not arrow or not plain or not factors or len(terms) != len(factors):
        raise SpecError(
            f"expression {expression!r} for {len(factors)} factors: write the letters of each "
            "factor and of each axis, such as 'ir,hwrs,so->h,w,i,o'"
        )
    if any(len(set(t)) != len(t) for t in (*terms, letters)):
        raise SpecError(
            f"expression {expression!r}: a letter comes once in a factor or in the axes"
        )
    missing = set(letters) - set("".join(terms))
    if missing:
        raise SpecError(f"expression {expression!r}: no factor has {sorted(missing)}")
    sizes: dict[str, int] = {}
    batches = {tuple(f.shape[: f.ndim - len(t)]) for f, t in zip(factors, terms)}
    if len(batches) != 1 or any(f.ndim < len(t) for f, t in zip(factors, terms)):
        raise SpecError(
            f"factors {[tuple(f.shape) for f in factors]} do not fit {expression!r}: one axis to "
            "a letter, and the same leading axes, if any, before them"
        )
    for factor, term in zip(factors, terms):
        for letter, n in zip(term, factor.shape[factor.ndim - len(term) :]):
            if sizes.setdefault(letter, n) != n:
                raise SpecError(
                    f"factors {[tuple(f.shape) for f in factors]}: letter {letter!r} of "
                    f"{expression!r} is both {sizes[letter]} and {n}"
                )


def free_letters(leaf: FactoredArray) -> list[str]:
    """Letters that stand for nothing in a leaf."""
    used = set("".join((*leaf.terms, *leaf.axes)))
    return [c for c in string.ascii_letters if c not in used]


@register_rule(FactoredArray, "dot_general")
def _dot_general(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    """One einsum of the other operand and all factors, or with the dense weight."""
    leaf, x = operands[i], operands[1 - i]
    contract, batch = params["dimension_numbers"]
    free, lead = free_letters(leaf), leaf.batch_ndim
    dense = functools.partial(deferred_primitive, lax.dot_general_p, i, leaf, operands, params)
    if params.get("out_sharding") is not None or len(free) < lead + x.ndim:
        return dense()
    stack, free = "".join(free[:lead]), free[lead:]
    mine = (*stack, *leaf.axes)  # the letters of each axis of the leaf
    theirs = list(free[: x.ndim])
    for a, there in zip((*contract[i], *batch[i]), (*contract[1 - i], *batch[1 - i])):
        theirs[there] = mine[a]
    sizes = leaf.sizes | dict(zip(stack, leaf.shape))

    def kept(names: Sequence[str], side: int) -> list[str]:
        gone = (*contract[side], *batch[side])
        return [name for a, name in enumerate(names) if a not in gone]

    sides = {i: mine, 1 - i: theirs}
    out = [mine[a] for a in batch[i]] + [c for side in (0, 1) for c in kept(sides[side], side)]
    sizes |= {name: x.shape[a] for a, name in enumerate(theirs) if len(name) == 1}
    split = x.reshape([sizes[c] for name in theirs for c in name])
    terms = ["".join(theirs), *(stack + term for term in leaf.terms)]
    path = _path(tuple(terms), "".join(out), known(sizes), leaf.size)
    if path is None:
        return dense()
    wanted = params["preferred_element_type"]
    wide = jnp.promote_types(jnp.promote_types(x.dtype, leaf.dtype), wanted or leaf.dtype)

    def contracted(leaf: FactoredArray, x: jax.Array) -> jax.Array:
        found = jnp.einsum(
            f"{','.join(terms)}->{''.join(out)}",
            x,
            *map(materialize, leaf.factors),
            optimize=list(path),
            precision=params["precision"],
            preferred_element_type=wide,
        )
        return found.reshape([math.prod(sizes[c] for c in name) for name in out])

    # Codes of a factor are expanded for the product only, as those of a whole weight are.
    nested = any(is_compressed(f) for f in leaf.factors)
    result = deferred(contracted, leaf, split) if nested else contracted(leaf, split)
    return result.astype(wanted or jnp.promote_types(x.dtype, leaf.dtype))


def known(sizes: dict[str, Any]) -> tuple[tuple[str, int], ...]:
    """Sizes as a key; one that is a symbol counts as 8, for the order of products alone."""
    return tuple((c, n if isinstance(n, int) else 8) for c, n in sizes.items())


@functools.lru_cache(maxsize=4096)
def _path(
    terms: tuple[str, ...], out: str, sizes: tuple[tuple[str, int], ...], dense: int
) -> tuple[tuple[int, ...], ...] | None:
    """The order of contractions that multiplies least; None where the dense weight is on its way.

    The first term is what meets the weight.
    """
    size = dict(sizes)
    shapes: list[Any] = [
        jax.ShapeDtypeStruct([size[c] for c in term], np.float32) for term in terms
    ]
    path, _ = jnp.einsum_path(f"{','.join(terms)}->{out}", *shapes, optimize="auto")
    left = [(term, n == 0) for n, term in enumerate(terms)]
    found = []
    for step in path:
        if not isinstance(step, tuple):
            continue
        found.append(step)
        taken = [left[k] for k in sorted(step, reverse=True)]
        left = [x for k, x in enumerate(left) if k not in step]
        later = set(out).union(*(term for term, _ in left))
        letters = dict.fromkeys("".join(term for term, _ in taken))
        term = "".join(c for c in letters if c in later)
        meets = any(m for _, m in taken)
        if not meets and math.prod(size[c] for c in term) >= dense:
            return None
        left.append((term, meets))
    return tuple(found)


@register_rule(FactoredArray, "transpose")
def _transpose(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    """Kept where the leading axes stay."""
    leaf, order = operands[i], params["permutation"]
    lead = leaf.batch_ndim
    if tuple(order[:lead]) != tuple(range(lead)):
        return NotImplemented
    return leaf.replace(axes=tuple(leaf.axes[a - lead] for a in order[lead:]))


@register_rule(FactoredArray, "reshape")
def _reshape(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    """Kept where axes are joined, or split where their letters part."""
    leaf, shape = operands[i], tuple(params["new_sizes"])
    lead, sizes = leaf.batch_ndim, leaf.sizes
    plain = params.get("dimensions") is None and shape[:lead] == leaf.shape[:lead]
    if not plain or 0 in leaf.shape or any(sizes[c] == 1 for c in "".join(leaf.axes)):
        return NotImplemented
    letters, axes = list("".join(leaf.axes)), []
    for n in shape[lead:]:
        name, got = "", 1
        while got < n and letters:
            got *= sizes[letters[0]]
            name += letters.pop(0)
        if got != n or n == 1:
            return NotImplemented
        axes.append(name)
    return leaf.replace(axes=tuple(axes))


@register_rule(FactoredArray, "gather")
def _gather(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    """Rows of a table: rows of the factors that have a part of its first axis, then the product."""
    leaf, indices = operands[0], operands[1]
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    batch = indices.ndim - 1
    plain = (
        i == 0
        and leaf.batch_ndim == 0
        and leaf.ndim > 1
        and not numbers.operand_batching_dims
        and tuple(numbers.start_index_map) == tuple(numbers.collapsed_slice_dims) == (0,)
        and tuple(sizes[1:]) == leaf.shape[1:]
        and tuple(numbers.offset_dims) == tuple(range(batch, batch + leaf.ndim - 1))
        and params["fill_value"] is None
        and leaf.size
        and free_letters(leaf)
    )
    if not plain:
        return NotImplemented
    rows, size = indices[..., 0], leaf.sizes
    inside = (rows >= 0) & (rows < leaf.shape[0])
    rows = jnp.clip(rows, 0, leaf.shape[0] - 1).reshape(-1)
    digits = dict(zip(leaf.axes[0], jnp.unravel_index(rows, [size[c] for c in leaf.axes[0]])))
    token = free_letters(leaf)[0]
    terms, factors = [], []
    for factor, term in zip(leaf.factors, leaf.terms):
        mine = [c for c in term if c in digits]
        terms.append((token if mine else "") + "".join(c for c in term if c not in digits))
        factors.append(_rows(factor, term, mine, digits) if mine else materialize(factor))
    out = jnp.einsum(
        f"{','.join(terms)}->{token}{''.join(leaf.axes[1:])}",
        *(f.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for f in factors),
        optimize="auto",
        precision=lax.Precision.HIGHEST,
    )
    out = out.astype(leaf.dtype).reshape(*indices.shape[:-1], *leaf.shape[1:])
    if params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        return out
    return jnp.where(inside.reshape(*inside.shape, *[1] * (leaf.ndim - 1)), out, jnp.nan)


def _rows(factor: Any, term: str, mine: Sequence[str], digits: dict[str, jax.Array]) -> jax.Array:
    """A factor `[rows, *its other letters]` at one digit for each of `mine`."""
    if is_compressed(factor) and len(mine) == 1 and term[0] == mine[0]:
        start = digits[mine[0]][:, None]
        numbers = lax.GatherDimensionNumbers(tuple(range(1, factor.ndim)), (0,), (0,))
        params = {
            "dimension_numbers": numbers,
            "slice_sizes": (1, *factor.shape[1:]),
            "indices_are_sorted": False,
            "unique_indices": False,
            "mode": lax.GatherScatterMode.PROMISE_IN_BOUNDS,
            "fill_value": None,
        }
        return gather_rows(factor, (start,), params)
    moved = jnp.moveaxis(materialize(factor), [term.index(c) for c in mine], range(len(mine)))
    return moved[tuple(digits[c] for c in mine)]
