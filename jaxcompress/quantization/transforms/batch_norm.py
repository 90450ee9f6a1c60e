"""Batch norms folded into the layer before them, exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.errors import SpecError
from jaxcompress.quantization.transforms.leaves import Axes, Leaves, multiplied


def fold_batch_norms(
    variables: Any,
    norms: Mapping[str, str],
    *,
    epsilon: float = 1e-5,
    params: str = "params",
    batch_stats: str = "batch_stats",
    axes: Axes | None = None,
) -> Any:
    """Folds batch norms that use their running statistics into the kernels before them.

    With `g = gamma / sqrt(var + epsilon)`: `w g`, `(b - mean) g + beta`. The norm stays in the
    model as the identity (gamma 1, mean 0, variance `1 - epsilon`), so that the same function runs
    on the outcome, and is unchanged up to rounding; its beta is 0, or the new bias where the layer
    has none of its own.

    Args:
      variables: Flax's variables, of both collections.
      norms: for the module with the kernel, the module of the norm that reads it, as paths
        below the collections: `{"block/conv": "block/norm"}`.
      epsilon: the norm's.
      params: the collection of `kernel`, `bias` and `scale`.
      batch_stats: the collection of `mean` and `var`.
      axes: the axes of kernels by path; Flax's by default.

    Returns:
      The variables with other kernels, biases and norms.

    Raises:
      RuleError: for a path that is no leaf.
      SpecError: where the sizes do not fit, or epsilon is not between 0 and 1.

    References:
      Jacob et al., *Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference*, 2018.

    Examples:
      >>> import jax.numpy as jnp
      >>> variables = {
      ...     "params": {"dense": {"kernel": jnp.ones((2, 1))},
      ...                "norm": {"scale": jnp.array([6.0]), "bias": jnp.array([1.0])}},
      ...     "batch_stats": {"norm": {"mean": jnp.array([3.0]), "var": jnp.array([8.99999])}}}
      >>> folded = fold_batch_norms(variables, {"dense": "norm"})
      >>> folded["params"]["dense"]["kernel"][:, 0].tolist(), folded["params"]["norm"]["bias"]
      ([2.0, 2.0], Array([-5.], dtype=float32))
    """
    if not 0 <= epsilon < 1:
        raise SpecError(f"epsilon={epsilon!r}: write a number from 0 up to 1")
    leaves = Leaves(variables, axes)
    for layer, norm in norms.items():
        path, bias = f"{params}/{layer}/kernel", f"{params}/{layer}/bias"
        gamma, beta = f"{params}/{norm}/scale", f"{params}/{norm}/bias"
        mean, var = f"{batch_stats}/{norm}/mean", f"{batch_stats}/{norm}/var"
        old_mean, old_var, w = (leaves.dense(name) for name in (mean, var, path))
        out = max(leaves.axes(path).output, default=-1)
        if w.shape[out] != old_var.size:
            raise SpecError(f"{path}: {w.shape[out]} outputs, and {norm!r} has {old_var.size}")
        one, zero = jnp.ones_like(old_var), jnp.zeros_like(old_var)
        g = (leaves.dense(gamma) if gamma in leaves else one) / jnp.sqrt(old_var + epsilon)
        b = leaves.dense(bias) if bias in leaves else zero
        shift = (b - old_mean) * g + (leaves.dense(beta) if beta in leaves else zero)
        target = bias if bias in leaves else beta
        if target not in leaves:
            raise SpecError(f"{path}: neither it nor {norm!r} has a bias to put the mean into")
        leaves[path] = multiplied(w, _along(g, out, w.ndim))
        for name, value in ((gamma, one), (beta, zero), (mean, zero), (var, one - epsilon)):
            if name in leaves:
                leaves[name] = value.astype(leaves.dense(name).dtype)
        leaves[target] = shift.astype(leaves.dense(target).dtype)
    return leaves.tree()


def _along(x: jax.Array, axis: int, ndim: int) -> jax.Array:
    shape = [1] * ndim
    shape[axis] = x.size
    return x.reshape(shape)
