"""Gaussian weights: their noise, drawn for the weights or for the products they are in."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress import compat
from jaxcompress.arrays.base import find_rule, register_rule
from jaxcompress.pruning.gates.base import GateArray


class GaussianArray(GateArray):
    """A leaf whose weights are independent Gaussians, once what groups share is drawn.

    A subclass defines `moments`. The child `noise` is None or two words of a key, `[*batch, 2]`
    uint32. With it, a product or a convolution draws its outcome rather than the weights: of
    `y = x w` it draws `y ~ N(x mean, x^2 var)`, the local reparametrization. Each example then has
    noise of its own, and the variance of the gradient falls with the size of the batch, where one
    draw of the weights would be shared by all examples. Anywhere else the weights are drawn:
    in a look-up, behind a transpose, in a batched product over a stack.

    Noise depends on the key and the shape alone: a leaf that meets two products of one shape, as in
    a recurrence, has the same noise in both, and so do the rows of a `vmap` over examples unless
    keys are mapped with them.

    References:
      Kingma, Salimans and Welling, *Variational Dropout and the Local Reparameterization Trick*,
      2015.
    """

    noise: Any

    def moments(self) -> tuple[jax.Array, jax.Array]:
        """Mean and variance of the weights, given what groups share, in `compute_dtype`."""
        raise NotImplementedError

    def variance(self) -> jax.Array:
        """The posterior variance of each weight, with what groups share."""
        return self.quiet().moments()[1]  # type: ignore[attr-defined]

    def key(self, use: int) -> jax.Array:
        """The key of one use: 0 for weights and products, others for what groups share.

        One for each weight of a stack, `[*batch]`.
        """
        words = jax.random.wrap_key_data(self.noise, impl="threefry2x32")
        fold = jax.random.fold_in
        for _ in range(words.ndim):
            fold = jax.vmap(fold, (0, None))
        return fold(words, use)

    def normal(self, use: int, shape: tuple[int, ...]) -> jax.Array:
        """Standard normal noise of a shape for each weight of the stack."""
        draw = lambda key: jax.random.normal(key, shape, self.compute_dtype)
        keys = self.key(use)
        for _ in range(keys.ndim):
            draw = jax.vmap(draw)
        return draw(keys)

    def value(self) -> jax.Array:
        mean, var = self.moments()
        if self.noise is None:
            return mean
        return mean + deviation(var) * self.normal(0, self.shape[self.batch_ndim :])

    def draw(self, key: jax.Array) -> jax.Array:
        return jax.random.bits(key, (*self.shape[: self.batch_ndim], 2), jnp.uint32)


def deviation(var: jax.Array) -> jax.Array:
    """The square root of a variance, its gradient 0 where that is 0."""
    some = var > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, var, 1)), 0)


def _local(primitive: compat.Primitive, i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    """The outcome of a contraction, drawn from its own mean and variance."""
    leaf = operands[i]
    if leaf.noise is None:
        rule = find_rule(GateArray, primitive.name)
        return NotImplemented if rule is None else rule(i, operands, params)
    if leaf.batch_ndim or not math.prod(leaf.shape):
        return NotImplemented
    # In float32 until the sum is there: squares of float16 soon overflow or vanish.
    mean, var = leaf.moments()
    wide = [x if j == i else x.astype(mean.dtype) for j, x in enumerate(operands)]
    bind = functools.partial(primitive.bind, **_widened(params, mean.dtype))
    out = bind(*(mean if j == i else x for j, x in enumerate(wide)))
    sd = deviation(bind(*(var if j == i else x * x for j, x in enumerate(wide))))
    out = out + sd * jax.random.normal(leaf.key(0), out.shape, out.dtype)
    narrow = params["preferred_element_type"] or jnp.result_type(*(x.dtype for x in operands))
    return out.astype(narrow)


def _widened(params: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """The parameters of a contraction for operands of another dtype."""
    precision = params["precision"]
    if isinstance(precision, (lax.DotAlgorithm, lax.DotAlgorithmPreset)):
        precision = None  # it names the dtypes that the operands had
    return {**params, "preferred_element_type": np.dtype(dtype), "precision": precision}


@register_rule(GaussianArray, "dot_general")
def _dot_general(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    return _local(lax.dot_general_p, i, operands, params)


@register_rule(GaussianArray, "conv_general_dilated")
def _conv_general_dilated(i: int, operands: list[Any], params: dict[str, Any]) -> Any:
    return _local(lax.conv_general_dilated_p, i, operands, params)
