"""Bias correction: the mean of what quantization adds to the outputs, taken off the bias."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm

from jaxcompress.arrays.base import materialize
from jaxcompress.errors import SpecError
from jaxcompress.layerwise.folding import folding
from jaxcompress.quantization.transforms.leaves import Axes, Leaves
from jaxcompress.rules import KernelAxes


def correct_biases(
    params: Any,
    small: Any,
    means: Mapping[str, Any],
    *,
    biases: Mapping[str, str] | None = None,
    axes: Axes | None = None,
) -> Any:
    """Takes the mean error of a compressed kernel off the bias: `b - E[x] (w_hat - w)`.

    The mean output of each layer is then what it was, for the inputs of which E[x] is the mean.

    Args:
      params: the dense tree.
      small: the compressed tree.
      means: E[x] for the paths of kernels: `mean` of `observe` as it comes
        (`{path: {axes: InputStats}}`, empirical), or arrays of as many values as the kernel has
        inputs, in the order of its input axes (analytic, see `relu_mean`); of a grouped
        convolution, so many for each group.
      biases: the path of a kernel's bias, where that is not `bias` beside it.
      axes: the axes of kernels by path; Flax's by default.

    Returns:
      `small` with other biases.

    Raises:
      RuleError: for a path that is no leaf.
      SpecError: for means that are missing or do not fit, or a bias that is compressed.

    References:
      Nagel et al., *Data-Free Quantization Through Weight Equalization and Bias Correction*, 2019;
      Banner et al., *Post Training 4-bit Quantization of Convolutional Networks*, 2019.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> params = {"kernel": jnp.array([[7.0], [3.4]]), "bias": jnp.zeros(1)}
      >>> small = jc.compress(params, {"kernel": jc.Quantize("int4")})  # 3.4 becomes 3
      >>> correct_biases(params, small, {"kernel": jnp.array([5.0, 10.0])})["bias"].round(3)
      Array([4.], dtype=float32)
    """
    dense, leaves = Leaves(params, axes), Leaves(small, axes)
    for path, given in means.items():
        where = dense.axes(path)
        w, w_hat = dense.dense(path), materialize(leaves.any(path))
        mean = _mean(path, given, tuple(where.input))
        if w.ndim != len(where.input) + len(where.output):
            raise SpecError(f"{path}: is a stack of weights; split it into leaves")
        shift = _mean_error(path, mean, w, w_hat, where)
        beside = f"{path.rpartition('/')[0]}/bias".lstrip("/")
        bias_path = (biases or {}).get(path, beside)
        bias = leaves.dense(bias_path)
        leaves[bias_path] = (bias.astype(jnp.float32) - shift.reshape(bias.shape)).astype(
            bias.dtype
        )
    return leaves.tree()


def _mean_error(path: str, mean: jax.Array, w: Any, w_hat: Any, axes: KernelAxes) -> jax.Array:
    """`E[x] (w_hat - w)`, a value for each output."""
    how = folding(w, axes)
    rows, columns = math.prod(how.inputs), math.prod(how.outputs)
    groups = 1 if mean.size == rows else mean.shape[0]
    if groups > 1 and (mean.shape != (groups, rows) or columns % groups):
        raise SpecError(f"{path}: {mean.size} means for inputs of shape {how.inputs}")
    how = how._replace(groups=groups)
    error = how.fold(w_hat.astype(jnp.float32) - w.astype(jnp.float32))
    error = error.reshape(groups, rows, columns // groups)
    means = mean.reshape(groups, rows)
    return jnp.einsum("gk,gkn->gn", means, error, precision=jax.lax.Precision.HIGHEST)


def _mean(path: str, given: Any, inputs: tuple[int, ...]) -> jax.Array:
    if isinstance(given, Mapping):
        found = given.get(inputs)
        if found is None or found.mean is None:
            raise SpecError(
                f"{path}: give the means of its inputs on axes {inputs}, "
                "observe(fn, params, batches, ('mean',))"
            )
        given = found.mean
    return jnp.asarray(given, jnp.float32)


def relu_mean(mean: Any, deviation: Any) -> jax.Array:
    """The mean of `max(0, z)` for normal z: `sigma phi(mu / sigma) + mu Phi(mu / sigma)`.

    After a batch norm, mu is its bias and sigma the magnitude of its scale, which makes the bias
    correction of the layer after it analytic: no data is needed.

    Args:
      mean: mu, any shape.
      deviation: sigma, at least 0, of the same shape.

    Returns:
      float32.

    References:
      Nagel et al., *Data-Free Quantization Through Weight Equalization and Bias Correction*, 2019.

    Examples:
      >>> import jax.numpy as jnp
      >>> [round(float(x), 3) for x in relu_mean(jnp.array([0.0, 2.0]), jnp.array([1.0, 0.0]))]
      [0.399, 2.0]
    """
    mu, sigma = jnp.asarray(mean, jnp.float32), jnp.abs(jnp.asarray(deviation, jnp.float32))
    z = mu / jnp.where(sigma > 0, sigma, 1)
    return jnp.where(sigma > 0, sigma * norm.pdf(z) + mu * norm.cdf(z), jnp.maximum(mu, 0))
