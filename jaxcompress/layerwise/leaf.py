"""From a leaf to the matrices that a solver works on, and back to a leaf."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxcompress.arrays.quantized import QuantizedArray
from jaxcompress.arrays.sparse import SparseArray, best_layout, encode
from jaxcompress.errors import SpecError
from jaxcompress.layerwise.folding import Folding, folding
from jaxcompress.layerwise.hessian import Solution, check_finite
from jaxcompress.layerwise.rounding import group_along
from jaxcompress.specs import LeafContext, on_all_devices, on_auto_axes, placed_like

if TYPE_CHECKING:
    from jaxcompress.quantization.spec import Quantize


def fitted_folding(leaf: Any, context: LeafContext, name: str, looked_up: str) -> Folding:
    """The folding of a leaf that its Gram matrix fits.

    Args:
      leaf: an array.
      context: with the leaf's axes and the statistics of its inputs.
      name: of the spec, for messages.
      looked_up: what follows for a leaf whose rows stand alone, and what to write.

    Raises:
      SpecError: when there are none, or they are of something else.
    """
    if leaf.ndim == 0:
        raise SpecError(f"{context.path}: a scalar has no inputs; leave it dense")
    gram = None if context.stats is None else context.stats.gram
    if gram is None:
        raise SpecError(
            f"{context.path}: {name} needs the Gram matrix of the inputs on axes "
            f"{tuple(context.axes.input)}: write compress(..., stats=jc.observe(fn, params, "
            "batches, ('gram',))), and axes=jc.kernel_axes(fn, ...) where the leaf's axes are "
            "not by Flax's conventions"
        )
    how = folding(leaf, context.axes)
    rows, columns = math.prod(how.inputs), math.prod(how.outputs)
    shape = tuple(gram.shape)
    if shape == (*how.batch, rows, rows):
        return how
    lead = len(how.batch)
    grouped = len(shape) == lead + 3 and shape == (*how.batch, shape[lead], rows, rows)
    if grouped and columns % shape[lead] == 0:
        return how._replace(groups=shape[lead])
    if shape == (*how.batch, rows):
        raise SpecError(
            f"{context.path}: it is only looked up, so that each row stands alone and {looked_up}"
        )
    raise SpecError(
        f"{context.path}: the Gram matrix has shape {shape}, and a leaf {tuple(leaf.shape)} with "
        f"inputs {tuple(context.axes.input)} needs {(*how.batch, rows, rows)}: write "
        "compress(..., stats=jc.observe(fn, params, batches, ('gram',))) with these very params"
    )


def on_matrices(
    solve: Callable[[jax.Array, jax.Array], Any], how: Folding, leaf: Any, gram: Any, path: str
) -> Any:
    """The leaf that a solver makes of the matrices of another, placed like that one.

    The solver is compiled for its matrices: leaves whose matrices are of one shape share it.
    """
    check_finite(gram, path)
    leaf, mesh = on_auto_axes(leaf)
    gram = on_all_devices(gram, leaf)
    return placed_like(solve(_folded(how, leaf), jnp.asarray(gram)), leaf, mesh)


@functools.partial(jax.jit, static_argnums=0)
def _folded(how: Folding, leaf: jax.Array) -> jax.Array:
    return how.fold(leaf)


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantized_leaf(found: Solution, how: Folding, quantize: Quantize) -> QuantizedArray:
    """The leaf of the codes of a solution, as `quantize` stores it."""
    group, inputs = group_along(quantize, how.inputs[-1]), (1,) * len(how.inputs)
    if group is not None:
        inputs = (*how.inputs[:-1], -(-how.inputs[-1] // group))
    last = how.order[len(how.batch) + len(how.inputs) - 1]
    return QuantizedArray.from_codes(
        how.unfold(found.codes),
        how.unfold(found.scale, inputs),
        None if found.zero_point is None else how.unfold(found.zero_point, inputs),
        quantize.format,
        last - len(how.order),
        group,
        found.weight.dtype,
    )


def sparse_leaf(weight: jax.Array, mask: jax.Array, how: Folding, kept: int) -> SparseArray:
    """The leaf of the values of matrices where a mask is true, `kept` of each weight of a stack."""
    weight, mask = _unfolded(how, weight, mask)
    batch = len(how.batch)
    size = math.prod(mask.shape[batch:])
    layout = ("bitmask", 1, size)
    # A bit mask is smaller than gaps of 2 bits and up unless fewer than half the weights stay.
    if 2 * kept < size and not isinstance(mask, jax.core.Tracer):
        layout = best_layout(mask, kept, batch)
    return _encode(weight, mask, kept, layout, batch)


@functools.partial(jax.jit, static_argnums=0)
def _unfolded(how: Folding, weight: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    return how.unfold(weight), how.unfold(mask)


_encode = jax.jit(encode, static_argnums=(2, 3, 4))
