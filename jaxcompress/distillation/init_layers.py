"""A student that begins as some of its teacher's layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.arrays.base import is_compressed
from jaxcompress.errors import RuleError
from jaxcompress.rules import flatten, glob


def init_from_layers(
    teacher_params: Any, student_params: Any, layers: Sequence[int], *, pattern: str
) -> Any:
    """The student's params, with those of chosen layers of the teacher in the place of its own.

    Layer i of the student becomes layer `layers[i]` of the teacher. Leaves outside of the layers,
    such as embeddings, are taken where the teacher has one of the same path and shape; others, such
    as a head of other classes, stay as they are.

    Args:
      teacher_params: a tree of params; leaves may be compressed.
      student_params: a tree of the student's params; only the values of leaves that stay count, so
        leaves that are replaced may be `jax.ShapeDtypeStruct`.
      layers: the teacher's layer for each of the student's, counted from 0, as from `layer_map`.
      pattern: the path of a layer, with `{}` for its number: `"encoder/layer_{}"`, or globs before
        it, `"**/layer_{}"`. Without `{}`, the path of layers that are stacked along the first axis
        of each leaf, as `scan` has them.

    Returns:
      The student's params, with copies of the teacher's arrays, cast to the student's dtypes: so
      the student may be donated to its steps.

    Raises:
      RuleError: for a pattern that matches nothing, numbers that do not fit, or a leaf of a layer
        that the teacher does not have in that shape.

    References:
      Sanh et al., *DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter*,
      2019 (one layer out of two).

    Examples:
      >>> import jax.numpy as jnp
      >>> teacher = {f"layer_{i}": {"bias": jnp.full(2, float(i))} for i in range(4)}
      >>> student = {f"layer_{i}": {"bias": jnp.zeros(2)} for i in range(2)}
      >>> init_from_layers(teacher, student, (1, 3), pattern="layer_{}")["layer_1"]["bias"].tolist()
      [3.0, 3.0]
    """
    layers = tuple(int(n) for n in layers)
    theirs = dict(flatten(teacher_params)[0])
    mine, structure = flatten(student_params)
    numbered = _expression(pattern)
    out, met = [], set()
    for path, leaf in mine:
        found = numbered.fullmatch(path)
        if found is None:
            out.append(_outside(path, leaf, theirs.get(path)))
        elif "{}" in pattern:
            number = int(found.group(1))
            met.add(number)
            if number >= len(layers):
                raise RuleError(
                    f"{path} is of layer {number}, and layers={layers} has no place for it; write "
                    "one for each layer of the student"
                )
            start, stop = found.span(1)
            there = f"{path[:start]}{layers[number]}{path[stop:]}"
            out.append(_fitting(path, leaf, there, theirs.get(there)))
        else:
            met.update(range(len(layers)))
            out.append(_fitting(path, leaf, path, _taken(path, theirs.get(path), layers)))
    missing = sorted(set(range(len(layers))) - met)
    if missing or not layers:
        paths = ", ".join(repr(path) for path, _ in mine[:8])
        raise RuleError(
            f"pattern={pattern!r} matches no leaf of layer {missing[0] if missing else 0} of the "
            f"student, whose paths are {paths}, ..."
        )
    return jax.tree.unflatten(structure, out)


def _expression(pattern: str) -> re.Pattern[str]:
    """Paths within a layer, its number the first group."""
    before, hole, after = pattern.partition("{}")
    number = "([0-9]+)" if hole else ""
    return re.compile(f"{glob(before).pattern}{number}{glob(after).pattern}(?:/.*)?", re.DOTALL)


def _outside(path: str, leaf: Any, theirs: Any) -> Any:
    if theirs is None or getattr(theirs, "shape", None) != getattr(leaf, "shape", None):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise RuleError(f"{path}: has only a shape, and the teacher has none such; give values")
        return leaf
    return _cast(theirs, leaf)


def _fitting(path: str, leaf: Any, there: str, theirs: Any) -> Any:
    if theirs is None:
        raise RuleError(f"{path}: the teacher has no leaf {there!r} to take its place")
    if theirs.shape != leaf.shape:
        raise RuleError(
            f"{path} is {tuple(leaf.shape)}, and the teacher's {there!r} is {tuple(theirs.shape)}: "
            "layers are taken whole, so both must be of one width"
        )
    return _cast(theirs, leaf)


def _cast(theirs: Any, leaf: Any) -> Any:
    kinds = [getattr(x, "dtype", None) for x in (theirs, leaf)]
    if is_compressed(theirs) or None in kinds or kinds[0] == kinds[1]:
        return jax.tree.map(lambda x: jnp.copy(x) if isinstance(x, jax.Array) else x, theirs)
    return jnp.asarray(theirs).astype(leaf.dtype)


def _taken(path: str, stack: Any, layers: tuple[int, ...]) -> Any:
    """Some layers of a stack."""
    if stack is None:
        return None
    if is_compressed(stack) and not stack.batch_ndim:
        stack = stack.materialize()
    depth = stack.shape[0] if stack.shape else 0
    if not all(0 <= n < depth for n in layers):
        raise RuleError(f"{path}: the teacher has {depth} layers, and layers={layers}")
    index = jnp.array(layers, jnp.int32)
    return jax.tree.map(lambda x: jnp.asarray(x)[index], stack)
