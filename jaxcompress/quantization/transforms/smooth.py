"""SmoothQuant: scales that move what is hard to quantize from the inputs to the weights."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import is_compressed
from jaxcompress.arrays.scaled import ScaledArray
from jaxcompress.compress import Stats
from jaxcompress.errors import SpecError
from jaxcompress.input_stats import InputStats
from jaxcompress.quantization.transforms.leaves import Axes, Leaves, divided, multiplied
from jaxcompress.rules import default_axes
from jaxcompress.specs import (
    LeafContext,
    Plan,
    Spec,
    on_all_devices,
    on_auto_axes,
    placed_like,
    register_spec,
)


def smoothing_scale(inputs: jax.Array, weights: jax.Array, alpha: float) -> jax.Array:
    """`s_j = max|x_j|**alpha / max|w_j|**(1 - alpha)`, and 1 where either of them is 0.

    Args:
      inputs: the largest `|x_j|` of each input.
      weights: the largest `|w_j|` of its weights.
      alpha: from 0 (the weights become even) to 1 (the inputs do).

    Returns:
      float32; x is divided by s and w multiplied by it.

    References:
      Xiao et al., *SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
      Language Models*, 2023.

    Examples:
      >>> import jax.numpy as jnp
      >>> smoothing_scale(jnp.array([16.0, 0.0]), jnp.array([4.0, 1.0]), 0.5).tolist()
      [2.0, 1.0]
    """
    x, w = inputs.astype(jnp.float32), weights.astype(jnp.float32)
    known = (x > 0) & (w > 0)
    scale = jnp.where(known, x, 1.0) ** alpha / jnp.where(known, w, 1.0) ** (1 - alpha)
    return jnp.clip(scale, 2.0**-40, 2.0**40)


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise SpecError(f"alpha={alpha!r}: write a number from 0 to 1")


def _scaled_axes(inputs: Sequence[int]) -> tuple[int, ...]:
    """The axes along which inputs have scales: the features of a convolution, else all."""
    return tuple(inputs[-1:]) if len(inputs) > 2 else tuple(inputs)


def _input_ranges(path: str, leaf: Any, inputs: Sequence[int], stats: Any) -> np.ndarray:
    """The largest inputs along the axes of the leaf, of size one where they have no own scale."""
    found = None if stats is None else stats.abs_max
    if found is None:
        raise SpecError(
            f"{path}: smoothing needs the largest inputs: give "
            "stats=observe(fn, params, batches, ('abs_max',))"
        )
    found = np.asarray(found, np.float32)
    sizes = [leaf.shape[a] for a in inputs]
    lead = found.shape[:-1]
    full = tuple(n if a - leaf.ndim in inputs else 1 for a, n in enumerate(leaf.shape))
    batch = leaf.shape[: len(lead)]
    if found.shape[-1] != math.prod(sizes):
        raise SpecError(
            f"{path}: statistics of {found.shape[-1]} inputs do not fit the axes {tuple(inputs)} "
            f"of shape {tuple(leaf.shape)}; observe the same tree, with the same axes"
        )
    if lead and lead != batch:  # groups of a convolution, which share a scale
        found, lead = found.reshape(-1, found.shape[-1]).max(axis=0), ()
    x = found.reshape(*lead, *full[len(lead) :])
    shared = tuple(a for a in inputs if a not in _scaled_axes(inputs))
    return x.max(axis=shared, keepdims=True) if shared else x


def _weight_ranges(w: jax.Array, like: Any) -> jax.Array:
    axes = tuple(a for a, n in enumerate(like.shape) if n == 1)
    return jnp.max(jnp.abs(w.astype(jnp.float32)), axis=axes, keepdims=True)


@register_spec("smooth_quant")
@dataclasses.dataclass(frozen=True, repr=False)
class SmoothQuant(Spec):
    """The weight with a scale for each of its inputs, chosen so that both are easy to quantize.

    `w = (1 / s) (s w)` and so `x w = (x / s) (s w)`, with `s_j = max|x_j|**alpha /
    max|w_j|**(1 - alpha)`, 1 where either is 0. The function is unchanged up to rounding. Comes
    first in a chain: `chain(SmoothQuant(), Quantize("int8"), QuantizeInput("int8"))`. It takes no
    change of the model; `smooth_into_norms` puts the factor of x into the norm before it instead.

    Args:
      alpha: from 0, where the weights become even, to 1, where the inputs do.

    Raises:
      SpecError: for another alpha, or statistics that are missing or do not fit.

    References:
      Xiao et al., *SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
      Language Models*, 2023.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> run = lambda params, x: x @ params["kernel"]
      >>> params, x = {"kernel": jnp.ones((2, 3))}, jnp.array([[64.0, 1.0]])
      >>> stats = jc.observe(run, params, [x], ("abs_max",))
      >>> leaf = jc.compress(params, {"kernel": SmoothQuant()}, stats=stats)["kernel"]
      >>> leaf.scale.tolist(), leaf.weight[:, 0].tolist()
      ([[0.125], [1.0]], [8.0, 1.0])
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_alpha(self.alpha)

    def plan(self, leaf: jax.Array, context: LeafContext) -> Plan:
        """Holds the largest inputs."""
        return _SmoothPlan(self, context)

    def __call__(self, leaf: Any, context: LeafContext | None = None) -> Any:
        """Scales one dense array by the statistics of the context."""
        if context is None:
            context = LeafContext("leaf", default_axes("leaf", leaf.ndim))
        if is_compressed(leaf):
            raise SpecError(f"{context.path}: {self!r} needs the dense weight; put it first")
        if leaf.ndim < 2:
            raise SpecError(f"{context.path}: shape {leaf.shape} has no inputs to scale")
        ranges = _input_ranges(context.path, leaf, tuple(context.axes.input), context.stats)
        leaf, mesh = on_auto_axes(leaf)
        x = on_all_devices(jnp.asarray(ranges), leaf)
        return placed_like(_smoothed(leaf, x, self.alpha), leaf, mesh)


@functools.partial(jax.jit, static_argnames="alpha")
def _smoothed(leaf: jax.Array, x: jax.Array, alpha: float) -> ScaledArray:
    scale = smoothing_scale(x, _weight_ranges(leaf, x), alpha)
    return ScaledArray(multiplied(leaf, scale), 1 / scale)


@dataclasses.dataclass(frozen=True, eq=False)
class _SmoothPlan(Plan):
    spec: SmoothQuant
    context: LeafContext

    def apply(self, leaf: jax.Array, key: jax.Array | None) -> ScaledArray:
        return self.spec(leaf, self.context)


def smooth_into_norms(
    params: Any,
    norms: Mapping[str, Sequence[str]],
    stats: Stats,
    *,
    alpha: float = 0.5,
    axes: Axes | None = None,
) -> Any:
    """SmoothQuant with the factors of the inputs in the norm that makes them: nothing at run time.

    With g and b the norm's scale and bias and w_1 .. w_n all kernels that read its output:
    `g / s`, `b / s` and `s w_i`, where `s_j = max|x_j|**alpha / max_i max|w_ij|**(1 - alpha)`.
    The function is unchanged up to rounding if these kernels are all that read the norm.

    Args:
      params: a tree of dense parameters.
      norms: for the path of a norm, the paths of the kernels that read it:
        `{"layer/norm": ["layer/query/kernel", "layer/key/kernel"]}`. Its `scale` and, where there
        is one, `bias` are below that path.
      stats: from `observe`, with `abs_max`.
      alpha: from 0 to 1.
      axes: the axes of kernels by path; Flax's by default.

    Returns:
      The tree with other norms and kernels.

    Raises:
      RuleError: for a path that is no leaf.
      SpecError: for another alpha, or statistics or kernels that do not fit.

    References:
      Xiao et al., *SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
      Language Models*, 2023.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> params = {"norm": {"scale": jnp.array([64.0, 1.0])}, "kernel": jnp.ones((2, 3))}
      >>> run = lambda params, x: (x * params["norm"]["scale"]) @ params["kernel"]
      >>> stats = jc.observe(run, params, [jnp.ones((1, 2))], ("abs_max",), leaves="kernel")
      >>> smooth = smooth_into_norms(params, {"norm": ["kernel"]}, stats)
      >>> smooth["norm"]["scale"].tolist(), smooth["kernel"][:, 0].tolist()
      ([8.0, 1.0], [8.0, 1.0])
    """
    _check_alpha(alpha)
    leaves = Leaves(params, axes)
    for norm, kernels in norms.items():
        x, largest = None, None
        for path in kernels:
            w, inputs = leaves.dense(path), tuple(leaves.axes(path).input)
            found: InputStats | None = stats.get(path, {}).get(inputs)
            ranges = _input_ranges(path, w, inputs, found)
            n = leaves.dense(f"{norm}/scale").size
            if ranges.size != n:
                raise SpecError(f"{path}: has {ranges.size} inputs, and {norm!r} makes {n}")
            mine = _weight_ranges(w, ranges).reshape(-1)
            x = ranges.reshape(-1) if x is None else np.maximum(x, ranges.reshape(-1))
            largest = mine if largest is None else jnp.maximum(largest, mine)
        if x is None or largest is None:
            raise SpecError(f"{norm!r}: name the kernels that read it")
        scale = smoothing_scale(jnp.asarray(x), largest, alpha)
        for name in ("scale", "bias"):
            if f"{norm}/{name}" in leaves:
                old = leaves.dense(f"{norm}/{name}")
                leaves[f"{norm}/{name}"] = divided(old, scale.reshape(old.shape))
        for path in kernels:
            w, inputs = leaves.dense(path), tuple(leaves.axes(path).input)
            where = _scaled_axes(inputs)
            shape = [n if a - w.ndim in where else 1 for a, n in enumerate(w.shape)]
            leaves[path] = multiplied(w, scale.reshape(shape))
    return leaves.tree()
