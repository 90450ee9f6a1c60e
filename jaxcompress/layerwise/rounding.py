"""What a weight is stored as: rounded to its dtype, or to the codes of a quantization."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.layerwise.ranges import Scales, codes_of, searched_scales, values_of
from jaxcompress.numerics import rounded

if TYPE_CHECKING:
    from jaxcompress.quantization.spec import Quantize


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How rows of weights are rounded as they are stored.

    Attributes:
      dtype: of the weights.
      spec: a quantization, or None.
      group: rows that share scales, or None: all do.
      tries: how many narrower ranges are tried for a group, see `searched_scales`.
    """

    dtype: np.dtype
    spec: Quantize | None = None
    group: int | None = None
    tries: int = 0

    def scales(self, rows: jax.Array, pivots: jax.Array) -> Scales:
        """Those of a group of rows `[g, N]`, as they are in their dtype.

        A row whose pivot `U_cc` is p adds `(w_c - q_c)**2 / p**2` to the error, once all later rows
        have made up for it; so much a narrower range is weighed by.
        """
        if self.spec is None:
            return Scales()
        weights = 1 / jnp.square(pivots)[:, None]
        return searched_scales(
            self.cast(rows).astype(self.dtype), weights, self.spec, None, self.tries
        )

    def store(self, row: jax.Array, kept: jax.Array, scales: Scales) -> tuple[jax.Array, Any]:
        """The values `[N]` that a row is restored as, float32, and its codes or None.

        What is not kept is exactly zero: its code is the zero point.
        """
        if self.spec is None:
            return jnp.where(kept, self.cast(row), 0.0), None
        wanted = jnp.where(kept, self.cast(row), 0.0)[None]
        codes = codes_of(wanted, scales, self.spec, None)
        # In float32, and rounded by an explicit step: a cast to bfloat16 and back may be dropped.
        values = values_of(codes, scales, self.spec, None)
        return rounded(values, self.dtype).astype(jnp.float32)[0], codes[0]

    def cast(self, x: jax.Array) -> jax.Array:
        """The nearest finite values of the dtype, float32."""
        largest = float(jnp.finfo(self.dtype).max)
        return rounded(jnp.clip(x, -largest, largest), self.dtype).astype(jnp.float32)


def group_along(spec: Quantize, run: int) -> int | None:
    """Rows that share scales, within runs of rows of that length; None: all do."""
    size = spec.group_size
    return max(1, min(size, run)) if isinstance(size, int) else None
