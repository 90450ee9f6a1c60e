"""A trainable leaf that computes with the values its quantized form will have."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress import compat
from jaxcompress.arrays.base import CompressedArray, narrows, register_array, register_rule
from jaxcompress.arrays.deferred import deferred_primitive
from jaxcompress.arrays.quantized import QuantizedArray
from jaxcompress.arrays.scheme import Scheme


@register_array(
    "fake_quantized",
    children=("weight", "scale", "zero_point"),
    static=(
        "axes", "group_size", "format", "symmetric", "scale_dtype", "convention", "estimator",
        "scale_format", "scale_group_size", "float_dtype",
    ),
    trainable=("weight",),
)  # fmt: skip
class FakeQuantizedArray(CompressedArray):
    """A dense weight that is rounded to its codes and back wherever it is used.

    Forward, `w_hat = s (clip(round(w / s) + z, qmin, qmax) - z)`, by the very steps that
    `QuantizedArray` stores and restores, so that `finalize` changes no bit of it. Backward, the
    straight-through estimate, `dw = dw_hat`; s and z count as constants.

    Where `scale` is None, s and z are those of the present weight, and the range follows it. Where
    they are fixed, a weight may leave the range; it is clipped, and then `dw = 0`.

    Attributes:
      weight: the dense weight, the one child that is trained.
      scale: None, or a fixed scale as in `QuantizedArray`.
      zero_point: None, or fixed integer codes of the value zero.
      axes: the axes over which a scale is shared, negative.
      group_size: values per group along `axes[-1]`, or None; see `jaxcompress.Quantize` for this
        and all that follow.
      format: of the codes.
      symmetric: whether zero is the middle of the range.
      scale_dtype: the dtype of a scale.
      convention: of the symmetric scale.
      estimator: of the range.
      scale_format: of scales that are quantized themselves, or None.
      scale_group_size: scales that share one of theirs, or None.
      float_dtype: the dtype of the dense array.

    References:
      Bengio, Leonard and Courville, *Estimating or Propagating Gradients Through Stochastic
      Neurons for Conditional Computation*, 2013; Jacob et al., *Quantization and Training of
      Neural Networks for Efficient Integer-Arithmetic-Only Inference*, 2018.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> leaf = jc.FakeQuantize("int4")(jnp.array([[-7.0], [3.4]]))
      >>> leaf.materialize().tolist(), leaf.weight.tolist()
      ([[-7.0], [3.0]], [[-7.0], [3.4000000953674316]])
      >>> jax.grad(lambda leaf: jnp.sum(leaf.materialize() ** 2))(leaf).weight.tolist()
      [[-14.0], [6.0]]
      >>> leaf.finalize()
      QuantizedArray(float32[2, 1], int4)
    """

    weight: Any
    scale: Any
    zero_point: Any
    axes: tuple[int, ...]
    group_size: int | None
    format: str
    symmetric: bool
    scale_dtype: np.dtype
    convention: str
    estimator: str | None
    scale_format: str | None
    scale_group_size: int | None
    float_dtype: np.dtype

    @classmethod
    def of(cls, weight: Any, scheme: Scheme) -> FakeQuantizedArray:
        """The leaf of a dense weight, whose scales follow it."""
        settings = {f.name: getattr(scheme, f.name) for f in dataclasses.fields(scheme)}
        return cls(weight, None, None, **settings, float_dtype=np.dtype(weight.dtype))

    @property
    def scheme(self) -> Scheme:
        """How it is quantized."""
        return Scheme(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Scheme)})

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.float_dtype

    @property
    def batch_ndim(self) -> int:
        return max(0, self.weight.ndim + min(self.axes))

    def params(self) -> tuple[Any, Any]:
        """The scale and zero point, fixed or of the present weight."""
        if isinstance(self.scale, tuple):
            return self.scale[0], self.zero_point
        if self.scale is not None:
            return self.scale, self.zero_point
        return self.scheme.scales(self.weight)

    def measured(self) -> FakeQuantizedArray:
        """The leaf with its range taken, so that both passes of a step read the weight for it once.

        The scale goes into a tuple, by which `materialize` knows that nothing is clipped.
        """
        if self.scale is not None or compat.is_explicit(self.weight):
            return self
        scale, zero = self.scheme.scales(lax.stop_gradient(self.weight))
        return self.replace(scale=(scale,), zero_point=zero)

    def in_range(self) -> jax.Array:
        """Where the nearest code is one of the format's, so that nothing is clipped."""
        return self.scheme.in_range(self.weight, *self.params())

    def materialize(self, key: jax.Array | None = None) -> jax.Array:
        def expand(*children: Any) -> jax.Array:
            leaf = self.replace(**dict(zip(self.children, children)))
            scale, zero = leaf.params()
            codes = self.scheme.codes(leaf.weight, scale, zero)
            return self.scheme.values(codes, scale, zero, self.float_dtype)

        def value(*children: Any) -> jax.Array:
            # Under Explicit axes the range of a weight that is split along its inputs has no type.
            return compat.auto_like(expand, children, children[0])

        # All that is traced goes in as an argument, so that this batches and differentiates.
        rounded = jax.custom_jvp(value)

        @rounded.defjvp
        def straight_through(primals: Any, tangents: Any) -> Any:
            leaf, through = self.replace(**dict(zip(self.children, primals))), tangents[0]
            if leaf.scale is not None and not isinstance(leaf.scale, tuple):
                inside = compat.auto_like(
                    lambda *children: leaf.replace(**dict(zip(self.children, children))).in_range(),
                    primals,
                    primals[0],
                )
                through = jnp.where(inside, through, jnp.zeros((), through.dtype))
            return rounded(*primals), through.astype(self.float_dtype)

        return rounded(self.weight, self.scale, self.zero_point)

    def finalize(self) -> QuantizedArray:
        scale, zero = self.params()
        codes = self.scheme.codes(self.weight, scale, zero)
        return self.scheme.pack(codes, scale, zero, self.float_dtype)

    def astype(self, dtype: Any) -> CompressedArray | None:
        return self.replace(float_dtype=np.dtype(dtype)) if narrows(self.dtype, dtype) else None

    def describe(self) -> str:
        group = "" if self.scheme.group is None else f"/{self.scheme.group}"
        return f"fake {self.format}{group}{'' if self.symmetric else ' affine'}"


@register_rule(FakeQuantizedArray, "dot_general")
def _dot_general(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    return deferred_primitive(lax.dot_general_p, i, operands[i].measured(), operands, params)


@register_rule(FakeQuantizedArray, "conv_general_dilated")
def _conv(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    return deferred_primitive(
        lax.conv_general_dilated_p, i, operands[i].measured(), operands, params
    )
