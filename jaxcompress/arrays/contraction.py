"""The two contractions of a weight with its input, as one interface: on values and on integers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.arrays.base import conv_general_dilated, dot_general
from jaxcompress.arrays.wrapped import at_features, at_operand


@dataclasses.dataclass(frozen=True)
class Dot:
    """A `dot_general` whose operand `i` is the weight.

    Attributes:
      i: 0 or 1.
      params: the parameters of the equation.
    """

    i: int
    params: dict[str, Any]

    @property
    def _axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        contract, batch = self.params["dimension_numbers"]
        return tuple(contract[1 - self.i]), tuple(batch[1 - self.i])

    def reduced(self, x: Any, per: str) -> tuple[int, ...]:
        """The axes of the input that share a scale, negative: contracted, or all of one weight."""
        contract, batch = self._axes
        every = contract if per == "token" else [a for a in range(x.ndim) if a not in batch]
        return tuple(sorted(a - x.ndim for a in every))

    def terms(self, x: Any, weight: Any) -> int:
        """How many products are summed to one output."""
        return self.features(x)

    def features(self, x: Any) -> int:
        """How many inputs one token has."""
        return math.prod(x.shape[a] for a in self._axes[0])

    def run(self, x: Any, weight: Any) -> Any:
        """The contraction of an input with a weight or leaf."""
        lhs, rhs = (weight, x) if self.i == 0 else (x, weight)
        return dot_general(lhs, rhs, self.params)

    def integers(self, x: jax.Array, codes: jax.Array) -> jax.Array:
        """The int32 sums of products of int8 codes."""
        params = dict(self.params, precision=None, preferred_element_type=jnp.dtype(jnp.int32))
        lhs, rhs = (codes, x) if self.i == 0 else (x, codes)
        return lax.dot_general_p.bind(lhs, rhs, **params)

    def sums(self, x: jax.Array, codes: jax.Array) -> jax.Array:
        """`integers` of an input of ones, up to broadcasting."""
        axes = tuple(self.params["dimension_numbers"][0][self.i])
        return self.of_weight(jnp.sum(codes, axis=axes, keepdims=True, dtype=jnp.int32), x.ndim)

    def on_input(self, factor: jax.Array, x: Any) -> jax.Array | None:
        """A factor of the weight along the axes of the input, where it can be."""
        operands = [x, x]
        operands[self.i] = None
        return at_operand(factor, self.i, operands, self.params)

    def of_input(self, factor: jax.Array, weight_ndim: int) -> jax.Array:
        """A factor of the input, of size one where contracted, along the axes of the output."""
        return self._on_output(factor, 1 - self.i, weight_ndim)

    def of_weight(self, factor: jax.Array, input_ndim: int) -> jax.Array:
        """A factor of the weight, of size one where contracted, along the axes of the output."""
        return self._on_output(factor, self.i, input_ndim)

    def _on_output(self, factor: jax.Array, place: int, other_ndim: int) -> jax.Array:
        contract, batch = (tuple(axes[place]) for axes in self.params["dimension_numbers"])
        free = [a for a in range(factor.ndim) if a not in (*contract, *batch)]
        moved = lax.transpose(factor, (*batch, *free, *contract))
        ones = (1,) * (other_ndim - len(contract) - len(batch))
        lead, mine = moved.shape[: len(batch)], moved.shape[len(batch) : len(batch) + len(free)]
        return moved.reshape((*lead, *mine, *ones) if place == 0 else (*lead, *ones, *mine))

    def splits(self, scale: jax.Array) -> bool:
        """Whether a scale of the weight is a factor of the output."""
        return all(scale.shape[a] == 1 for a in self.params["dimension_numbers"][0][self.i])


@dataclasses.dataclass(frozen=True)
class Conv:
    """A `conv_general_dilated` whose kernel is the weight.

    Attributes:
      params: the parameters of the equation.
    """

    params: dict[str, Any]

    def reduced(self, x: Any, per: str) -> tuple[int, ...]:
        """The axes of the input that share a scale: all of one example, or all."""
        example = self.params["dimension_numbers"].lhs_spec[0]
        return tuple(a - x.ndim for a in range(x.ndim) if a != example or per != "token")

    def terms(self, x: Any, weight: Any) -> int:
        """How many products are summed to one output."""
        return weight.size // max(1, weight.shape[self.params["dimension_numbers"].rhs_spec[0]])

    def features(self, x: Any) -> int:
        """How many inputs one example has."""
        return int(x.size // x.shape[self.params["dimension_numbers"].lhs_spec[0]])

    def run(self, x: Any, weight: Any) -> Any:
        """The convolution of an input with a kernel or leaf."""
        return conv_general_dilated(x, weight, self.params)

    def integers(self, x: jax.Array, codes: jax.Array) -> jax.Array:
        """The int32 sums of products of int8 codes."""
        params = dict(self.params, precision=None, preferred_element_type=jnp.dtype(jnp.int32))
        return lax.conv_general_dilated_p.bind(x, codes, **params)

    def sums(self, x: jax.Array, codes: jax.Array) -> jax.Array:
        """`integers` of one example of ones: what is padded counts as zero."""
        example = self.params["dimension_numbers"].lhs_spec[0]
        shape = tuple(1 if a == example else n for a, n in enumerate(x.shape))
        return self.integers(jnp.ones(shape, jnp.int8), codes)

    def on_input(self, factor: jax.Array, x: Any) -> jax.Array | None:
        """A factor of the kernel along the features of the input, where it can be."""
        return at_features(factor, 1, [x, None], self.params)

    def of_input(self, factor: jax.Array, weight_ndim: int) -> jax.Array:
        """A factor for each example, along the axes of the output."""
        numbers = self.params["dimension_numbers"]
        shape = [1] * factor.ndim
        shape[numbers.out_spec[0]] = factor.shape[numbers.lhs_spec[0]]
        return factor.reshape(shape)

    def of_weight(self, factor: jax.Array, input_ndim: int) -> jax.Array:
        """A factor for each output feature, along the axes of the output."""
        numbers = self.params["dimension_numbers"]
        shape = [1] * factor.ndim
        shape[numbers.out_spec[1]] = factor.shape[numbers.rhs_spec[0]]
        return factor.reshape(shape)

    def splits(self, scale: jax.Array) -> bool:
        """Whether a scale of the kernel is a factor of the output."""
        if self.params["batch_group_count"] != 1:
            return False
        features = self.params["dimension_numbers"].rhs_spec[0]
        return all(n == 1 for a, n in enumerate(scale.shape) if a != features)
