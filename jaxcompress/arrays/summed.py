"""A weight that is the sum of two leaves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import (
    CompressedArray,
    gather_rows,
    is_compressed,
    materialize,
    narrows,
    register_array,
    register_rule,
)
from jaxcompress.errors import SpecError
from jaxcompress.numerics import rounded


@register_array(
    "sum",
    children=("first", "second"),
    static=("float_dtype",),
    trainable=("first", "second"),
)
class SumArray(CompressedArray):
    """`w = first + second`, added in float32 and rounded once to the dtype.

    Of codes and what is kept beside them: outliers, a low-rank part, the codes of what is left. A
    sum of sums is one sum: it is rounded once as well.

    A contraction runs on the dense sum, in one deferred product, and not as a sum of products: so
    it agrees bit for bit with the dense array, and costs one product rather than one for each term.
    Rows that are looked up are added after the look-up.

    Attributes:
      first: a leaf, or a dense array.
      second: another of the same shape.
      float_dtype: the dtype of the dense array.

    References:
      Dettmers et al., *SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight
      Compression*, 2023.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.arrays.summed import SumArray
      >>> w = jnp.array([[7.0, 100.0], [3.0, 7.0]])
      >>> outlier = w > 50
      >>> codes = jc.Quantize("int4")(jnp.where(outlier, 0.0, w))
      >>> leaf = SumArray.of(codes, jc.SparseArray.from_mask(w, outlier))
      >>> leaf, leaf.materialize().tolist()
      (SumArray(float32[2, 2], int4 + 75% sparse bitmask), [[7.0, 100.0], [3.0, 7.0]])
    """

    first: Any
    second: Any
    float_dtype: np.dtype

    @classmethod
    def of(cls, first: Any, second: Any, *more: Any) -> SumArray:
        """The sum of two leaves or arrays, or of more; checks that their shapes agree.

        Raises:
          SpecError: for shapes that do not, and for what is not floating.
        """
        shapes = [tuple(x.shape) for x in (first, second)]
        if shapes[0] != shapes[1]:
            raise SpecError(f"terms of shapes {shapes[0]} and {shapes[1]} do not add up")
        dtype = jnp.promote_types(first.dtype, second.dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise SpecError(f"terms of dtype {dtype}: write floating ones")
        both = cls(first, second, np.dtype(dtype))
        return cls.of(both, *more) if more else both

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.first.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.float_dtype

    @property
    def batch_ndim(self) -> int:
        return min(x.batch_ndim if is_compressed(x) else x.ndim for x in self.terms)

    @property
    def terms(self) -> tuple[Any, Any]:
        """Both."""
        return self.first, self.second

    def materialize(self, key: jax.Array | None = None) -> jax.Array:
        return rounded(_total(self), self.float_dtype)

    def astype(self, dtype: Any) -> CompressedArray | None:
        return self.replace(float_dtype=np.dtype(dtype)) if narrows(self.dtype, dtype) else None

    def describe(self) -> str:
        names = (x.describe() if is_compressed(x) else np.dtype(x.dtype).name for x in self.terms)
        return " + ".join(names)


def _total(x: Any) -> jax.Array:
    """The values in float32; a sum within is not rounded."""
    if isinstance(x, SumArray):
        return _total(x.first) + _total(x.second)
    return materialize(x).astype(jnp.float32)


@register_rule(SumArray, "gather")
def _gather(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    """Rows of all terms, added: the same bits as rows of the sum."""
    if i != 0 or params["fill_value"] is not None:
        return NotImplemented

    def rows(x: Any) -> jax.Array:
        if isinstance(x, SumArray):
            return rows(x.first) + rows(x.second)
        return gather_rows(x, operands[1:], params).astype(jnp.float32)

    return rounded(rows(operands[0]), operands[0].dtype)
