"""Weights that are mixtures of templates from a bank."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress.arrays.base import (
    CompressedArray,
    is_compressed,
    materialize,
    narrows,
    register_array,
)
from jaxcompress.errors import SpecError
from jaxcompress.numerics import rounded


@register_array(
    "template",
    children=("bank", "alpha"),
    static=("weight_ndim", "float_dtype"),
    trainable=("bank", "alpha"),
    inner=("bank",),
)
class TemplateArray(CompressedArray):
    """`w = sum_k alpha_k T_k`: a weight as a mixture of templates, added in float32, rounded once.

    Several layers share a bank and have coefficients of their own: the bank is then one object at
    several places, which `save` stores once and `jaxcompress.sharing.tying.tie` trains as one.

    A contraction runs on the dense mixture in one deferred product, for that costs one product and
    not K. Both parts are trainable; the leaf is its own storage form.

    Attributes:
      bank: `[K, *weight]`, or `[*batch, K, *weight]` where each weight of a stack has its own; an
        array or a leaf.
      alpha: `[*batch, K]`.
      weight_ndim: the number of axes of one weight.
      float_dtype: the dtype of the dense array.

    References:
      Savarese and Maire, *Learning Implicitly Recurrent CNNs Through Parameter Sharing*, 2019;
      Plummer et al., *Neural Parameter Allocation Search*, 2022.

    Examples:
      >>> import jax.numpy as jnp
      >>> bank = jnp.array([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
      >>> leaf = TemplateArray.of(bank, jnp.array([2.0, -1.0]))
      >>> leaf, leaf.materialize().tolist()
      (TemplateArray(float32[2, 2], 2 templates), [[2.0, -1.0], [-1.0, 2.0]])
    """

    bank: Any
    alpha: Any
    weight_ndim: int
    float_dtype: np.dtype

    @classmethod
    def of(cls, bank: Any, alpha: Any) -> TemplateArray:
        """The leaf of a bank that all weights of a stack share; checks that both agree.

        Raises:
          SpecError: for a bank and coefficients of different numbers of templates.
        """
        if bank.ndim < 1 or alpha.ndim < 1 or bank.shape[0] != alpha.shape[-1]:
            raise SpecError(
                f"a bank {tuple(bank.shape)} and coefficients {tuple(alpha.shape)} do not meet: "
                "write the bank as [K, *weight] and the coefficients as [*batch, K]"
            )
        return cls(bank, alpha, bank.ndim - 1, np.dtype(bank.dtype))

    @property
    def batch_ndim(self) -> int:
        # With a bank in common, a stack cannot be sliced along all children.
        own = self.bank.ndim == self.alpha.ndim + self.weight_ndim
        return self.alpha.ndim - 1 if own else 0

    @property
    def shape(self) -> tuple[int, ...]:
        weight = self.bank.shape[self.bank.ndim - self.weight_ndim :]
        return (*self.alpha.shape[:-1], *weight)

    @property
    def dtype(self) -> np.dtype:
        return self.float_dtype

    def materialize(self, key: jax.Array | None = None) -> jax.Array:
        alpha, bank = materialize(self.alpha), materialize(self.bank)
        batch = tuple(range(self.batch_ndim))
        axis = self.bank.ndim - self.weight_ndim - 1
        mixed = lax.dot_general(
            alpha.astype(jnp.float32),
            bank.astype(jnp.float32),
            (((alpha.ndim - 1,), (axis,)), (batch, batch)),
            precision=lax.Precision.HIGHEST,
        )
        return rounded(mixed, self.dtype)

    def astype(self, dtype: Any) -> CompressedArray | None:
        return self.replace(float_dtype=np.dtype(dtype)) if narrows(self.dtype, dtype) else None

    def describe(self) -> str:
        inner = f" of {self.bank.describe()}" if is_compressed(self.bank) else ""
        return f"{self.alpha.shape[-1]} templates{inner}"
