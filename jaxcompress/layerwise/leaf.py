"""From a leaf to the matrices that a solver works on, and back to a leaf; specs that do so."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp

from jaxcompress.arrays.base import is_compressed
from jaxcompress.arrays.quantized import QuantizedArray
from jaxcompress.arrays.sparse import SparseArray, best_layout, encode
from jaxcompress.errors import SpecError
from jaxcompress.layerwise.folding import Folding, folding
from jaxcompress.layerwise.hessian import Solution, check_finite
from jaxcompress.layerwise.rounding import group_along
from jaxcompress.rules import default_axes
from jaxcompress.specs import LeafContext, Plan, Spec, on_all_devices, on_auto_axes, placed_like

if TYPE_CHECKING:
    from jaxcompress.quantization.spec import Quantize


class SolverSpec(Spec):
    """What specs share that choose weights by the Gram matrix of the inputs that meet the leaf.

    A subclass defines `solved`.
    """

    # What a user writes for a leaf that is only looked up, after "each row stands alone and".
    looked_up: ClassVar[str]

    def solved(self, w: jax.Array, gram: jax.Array, how: Folding, context: LeafContext) -> Any:
        """The leaf for weights `[..., K, N]` and their Gram matrix."""
        raise NotImplementedError

    def plan(self, leaf: Any, context: LeafContext) -> Plan:
        """Settles the shapes from the leaf and the statistics; `apply` refuses."""
        return _SolverPlan(self, self._folding(leaf, context), context.path)

    def _folding(self, leaf: Any, context: LeafContext) -> Folding:
        return fitted_folding(leaf, context, type(self).__name__, self.looked_up)

    def __call__(self, leaf: Any, context: LeafContext | None = None) -> Any:
        """Compresses one array by the statistics of the context."""
        if context is None:
            context = LeafContext("leaf", default_axes("leaf", leaf.ndim))
        if is_compressed(leaf):
            raise SpecError(f"{context.path}: {self!r} needs the dense weight; put it first")
        how = self._folding(leaf, context)
        solve: Callable[..., Any] = lambda w, gram: self.solved(w, gram, how, context)
        return on_matrices(solve, how, leaf, context.stats.gram, context.path)  # type: ignore[union-attr]


@dataclasses.dataclass(frozen=True)
class _SolverPlan(Plan):
    spec: Spec
    folding: Folding
    path: str

    def apply(self, leaf: jax.Array, key: jax.Array | None) -> Any:
        """Refuses: a plan is static, and the statistics are arrays."""
        name = type(self.spec).__name__
        raise SpecError(f"{self.path}: {name} needs statistics; call the spec, not its plan")


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
