"""What a weight is stored as: rounded to its dtype, or to the codes of a quantization."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays import affine
from jaxcompress.errors import SpecError
from jaxcompress.numerics import rounded
from jaxcompress.quantization.spec import FakeQuantize, Quantize


class Scales(NamedTuple):
    """The scale and zero point of each column, `[1, N]`; without quantization None."""

    scale: Any = None
    zero_point: Any = None


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How rows of weights are rounded as they are stored.

    Attributes:
      dtype: of the weights.
      spec: a quantization, or None.
      group: rows that share scales, or None: all do.
    """

    dtype: np.dtype
    spec: Quantize | None = None
    group: int | None = None

    def scales(self, rows: jax.Array) -> Scales:
        """Those that `Quantize` takes for these rows `[g, N]` in their dtype."""
        if self.spec is None:
            return Scales()
        scale, zero = affine.affine_params(
            self._cast(rows).astype(self.dtype),
            self.spec.format,
            axes=-2,
            symmetric=self.spec.symmetric,
            scale_dtype=np.dtype(jnp.dtype(self.spec.scale_dtype)),
            convention=self.spec.convention,
        )
        return Scales(scale, zero)

    def store(self, row: jax.Array, kept: jax.Array, scales: Scales) -> tuple[jax.Array, Any]:
        """The values `[N]` that a row is restored as, float32, and its codes or None.

        What is not kept is exactly zero: its code is the zero point.
        """
        if self.spec is None:
            return jnp.where(kept, self._cast(row), 0.0), None
        spec = self.spec
        wanted = jnp.where(kept, self._cast(row), 0.0)[None]
        codes = affine.quantize(
            wanted,
            scales.scale,
            scales.zero_point,
            spec.format,
            axes=-2,
            narrow=spec.symmetric and spec.convention == "absmax",
        )
        # In float32, and rounded by an explicit step: a cast to bfloat16 and back may be dropped.
        values = affine.dequantize(codes, scales.scale, scales.zero_point, axes=-2)
        return rounded(values, self.dtype).astype(jnp.float32)[0], codes[0]

    def _cast(self, x: jax.Array) -> jax.Array:
        """The nearest finite values of the dtype, float32."""
        largest = float(jnp.finfo(self.dtype).max)
        return rounded(jnp.clip(x, -largest, largest), self.dtype).astype(jnp.float32)


def check_quantize(quantize: Any, name: str) -> None:
    """Refuses what is no quantization along the inputs.

    Raises:
      SpecError: says what to write.
    """
    if quantize is None:
        return
    if not isinstance(quantize, Quantize) or isinstance(quantize, FakeQuantize):
        raise SpecError(f"{name}: quantize={quantize!r}: write such as jc.Quantize('int4')")
    if quantize.axis is not None:
        raise SpecError(
            f"{name}: quantize={quantize!r}: the solver shares scales along the inputs; leave out "
            "axis"
        )
