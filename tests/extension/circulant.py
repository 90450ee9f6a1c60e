"""A leaf type as another package would bring it: it uses public names of `jaxcompress` alone.

A circulant matrix (Cheng et al., *An Exploration of Parameter Redundancy in Deep Networks with
Circulant Projections*, 2015) is given by one vector c: `W[i, j] = c[(j - i) mod n]`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc

CALLS: list[str] = []  # which rules ran


@jc.register_array("tests.circulant", children=("row",), static=("n",), trainable=("row",))
class CirculantArray(jc.CompressedArray):
    """An n x n circulant matrix of n values."""

    row: jax.Array
    n: int

    @property
    def shape(self):
        return (*self.row.shape[:-1], self.n, self.n)

    @property
    def dtype(self):
        return np.dtype(self.row.dtype)

    @property
    def batch_ndim(self):
        return self.row.ndim - 1

    def materialize(self, key=None):
        i = jnp.arange(self.n)
        return self.row[..., (i[None, :] - i[:, None]) % self.n]

    def astype(self, dtype):
        return self.replace(row=self.row.astype(dtype))


@jc.register_rule(CirculantArray, "dot_general")
def _dot(index, operands, params):
    """`x @ W` as a circular convolution, when x is on the left and nothing is batched."""
    leaf, x = operands[index], operands[1 - index]
    (contract, batch) = params["dimension_numbers"]
    if index != 1 or leaf.ndim != 2 or any(batch) or tuple(contract[1]) != (0,):
        return NotImplemented
    CALLS.append("dot_general")
    x = jnp.moveaxis(x, contract[0][0], -1)
    product = jnp.fft.fft(x) * jnp.fft.fft(leaf.row)
    return jnp.fft.ifft(product).real.astype(params["preferred_element_type"] or leaf.dtype)


@dataclasses.dataclass(frozen=True)
class _Plan(jc.Plan):
    n: int

    def apply(self, leaf, key):
        i = jnp.arange(self.n)
        # The nearest circulant matrix: the mean of each wrapped diagonal.
        diagonals = leaf[..., i[:, None], (i[:, None] + i[None, :]) % self.n]
        return CirculantArray(diagonals.mean(-2), self.n)


@dataclasses.dataclass(frozen=True, repr=False)
class Circulant(jc.Spec):
    """The nearest circulant matrix to a square kernel."""

    def plan(self, leaf, context):
        if leaf.shape[-1] != leaf.shape[-2]:
            raise jc.SpecError(f"{context.path}: shape {leaf.shape} is not square")
        return _Plan(leaf.shape[-1])
