"""Signs and scales: BinaryConnect, XNOR and loss-aware binarization."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import is_compressed, register_array
from jaxcompress.errors import CompressError
from jaxcompress.numerics import divide
from jaxcompress.quantization.learned.base import LearnedArray
from jaxcompress.quantization.learned.spec import Layout, LearnedSpec
from jaxcompress.quantization.learned.sums import exact_mean, exact_sum
from jaxcompress.specs import register_spec


@register_array(
    "binary",
    children=("weight", "curvature"),
    static=("axes", "group_size", "scale", "scale_dtype", "float_dtype"),
    trainable=("weight",),
)
class BinaryArray(LearnedArray):
    """A weight of which the sign is used, times a scale: `w_hat = alpha sign(w)`, `sign(0) = 1`.

    Attributes:
      weight: the dense weight.
      curvature: d, positive, of the same shape, or None for ones.
      axes: the axes over which a scale is shared.
      group_size: values per group, or None.
      scale: `one`: `alpha = 1`; `mean`: `alpha = sum d |w| / sum d`.
      scale_dtype: the dtype of alpha.
      float_dtype: the dtype of the dense array.

    References:
      Courbariaux, Bengio and David, *BinaryConnect: Training Deep Neural Networks with Binary
      Weights during Propagations*, 2015; Rastegari et al., *XNOR-Net: ImageNet Classification
      Using Binary Convolutional Neural Networks*, 2016.

    Examples:
      >>> import jax.numpy as jnp
      >>> XNOR()(jnp.array([0.5, -1.5])).materialize().tolist()
      [1.0, -1.0]
    """

    weight: Any
    curvature: Any
    axes: tuple[int, ...]
    group_size: int | None
    scale: str
    scale_dtype: np.dtype
    float_dtype: np.dtype

    def alpha(self) -> jax.Array:
        """The scale that is stored."""
        size = jnp.abs(self.wide())
        if self.scale == "one":
            shape = jnp.shape(exact_sum(size, self.axes, self.group_size))
            alpha = jnp.ones(shape, jnp.float32)
        elif self.curvature is None:
            alpha = exact_mean(size, self.axes, self.group_size)
        else:
            d = self.curvature.astype(jnp.float32)
            total = exact_sum(d, self.axes, self.group_size)
            alpha = divide(exact_sum(d * size, self.axes, self.group_size), total)
        return self.storable(alpha, 1.0)

    def grid(self) -> Any:
        return self.coded((self.wide() >= 0).astype(jnp.uint8), self.alpha(), "binary")

    def proxy(self) -> jax.Array:
        w, alpha = self.wide(), self.spread(self.alpha())
        if self.curvature is not None:
            return w
        sign = jnp.where(jax.lax.stop_gradient(w) >= 0, 1.0, -1.0)
        inside = jnp.where(jnp.abs(w) <= 1, w, 0.0)
        return alpha * sign + jax.lax.stop_gradient(alpha) * inside

    def describe(self) -> str:
        if self.scale == "one":
            return "sign"
        group = "" if self.group_size is None else f"/{self.group_size}"
        return f"{'' if self.curvature is None else 'loss-aware '}scaled sign{group}"


@register_spec("binary_connect")
@dataclasses.dataclass(frozen=True, repr=False)
class BinaryConnect(LearnedSpec):
    """BinaryConnect: weights -1 and 1.

    `w_hat = sign(w)`, `sign(0) = 1`; `dw = dw_hat` where `|w| <= 1`, else 0. The published method
    also clips the trained weights to [-1, 1] after each step, as `optax.projections.projection_box`
    does, and its scale is left to a normalization.

    References:
      Courbariaux, Bengio and David, *BinaryConnect: Training Deep Neural Networks with Binary
      Weights during Propagations*, 2015.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> params = jc.compress({"w": jnp.eye(4) - 0.5}, {"w": BinaryConnect()})
      >>> params["w"].materialize()[0].tolist()
      [1.0, -1.0, -1.0, -1.0]
      >>> jc.finalize(params)["w"].codes.nbytes
      4
    """

    def make(self, weight: jax.Array, layout: Layout, key: jax.Array | None) -> BinaryArray:
        return BinaryArray(weight, None, scale="one", **layout.fields())


@register_spec("xnor")
@dataclasses.dataclass(frozen=True, repr=False)
class XNOR(LearnedSpec):
    """Binary weights with the scale that fits best: XNOR-Net's weights, Binary-Weight-Networks.

    `w_hat = alpha sign(w)`, `alpha = mean|w|` over the n weights that share it. The gradient is
    `dw = alpha dw_hat [|w| <= 1] + sign(w) / n sum dw_hat sign(w)`: through the sign, and through
    alpha. The paper prints `dw_hat (1 / n + alpha [|w| <= 1])`, the second term without its sum,
    which is what the chain rule gives for one weight.

    Args:
      granularity: `channel`: a scale for each output, or `tensor`: one for all, as DoReFa-Net has
        it for one bit.
      group_size: weights that share a scale along the last input axis, or None.
      scale_dtype: the dtype of scales.

    Raises:
      SpecError: for an unknown granularity or dtype, or a group size below 1.

    References:
      Rastegari et al., *XNOR-Net: ImageNet Classification Using Binary Convolutional Neural
      Networks*, 2016.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> jc.finalize(jc.compress({"w": jnp.eye(4)}, {"w": XNOR()}))
      {'w': QuantizedArray(float32[4, 4], binary)}
    """

    _: dataclasses.KW_ONLY
    granularity: str = "channel"
    group_size: int | None = None
    scale_dtype: str = "bfloat16"

    def make(self, weight: jax.Array, layout: Layout, key: jax.Array | None) -> BinaryArray:
        return BinaryArray(weight, None, scale="mean", **layout.fields())


@register_spec("loss_aware_binary")
@dataclasses.dataclass(frozen=True, repr=False)
class LossAwareBinary(XNOR):
    """Loss-aware binarization: the scale fits best where the loss is curved.

    `w_hat = alpha sign(w)`, `alpha = sum d |w| / sum d`, which minimizes `sum d (w - w_hat)**2` for
    the curvature d of the loss, diagonal. d is the root of Adam's second moments, put in by
    `set_curvature` after each step, and 1 until then. `dw = dw_hat`.

    Args:
      granularity: `channel`: a scale for each output, or `tensor`: one for all, as published.
      group_size: weights that share a scale along the last input axis, or None.
      scale_dtype: the dtype of scales.

    Raises:
      SpecError: as `XNOR`.

    References:
      Hou, Yao and Kwok, *Loss-aware Binarization of Deep Networks*, 2017.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc, optax
      >>> params = jc.compress({"w": jnp.array([1.0, -4.0])}, {"w": LossAwareBinary()})
      >>> trainable, rest = jc.partition(params)
      >>> state = optax.adam(1e-3).init(trainable)
      >>> nu = {"w": trainable["w"].replace(weight=jnp.array([4.0, 0.0]))}  # of a later state
      >>> set_curvature(params, nu)["w"].materialize().tolist()
      [1.0, -1.0]
    """

    granularity: str = "tensor"

    def make(self, weight: jax.Array, layout: Layout, key: jax.Array | None) -> BinaryArray:
        ones = jnp.ones(weight.shape, jnp.float32)
        return BinaryArray(weight, ones, scale="mean", **layout.fields())


def set_curvature(params: Any, nu: Any, epsilon: float = 1e-8) -> Any:
    """Puts the curvature of the loss into the leaves that look at it, `d = sqrt(nu) + epsilon`.

    Pure, and to be called inside of the training step, after the update. A common factor of d,
    such as Adam's correction of its bias, is of no effect.

    Args:
      params: any tree, with `LossAwareBinary` leaves.
      nu: second moments in the structure of what is trained, such as
        `optax.tree_utils.tree_get(state, "nu")`.
      epsilon: added, so that d is positive.

    Returns:
      The same tree with new curvatures.

    Raises:
      CompressError: when there is no such leaf, or `nu` does not match the tree.

    Examples:
      >>> import jax.numpy as jnp
      >>> leaf = LossAwareBinary()(jnp.array([1.0, -3.0]))
      >>> set_curvature(leaf, leaf.replace(weight=jnp.array([4.0, 16.0]))).curvature.tolist()
      [2.0, 4.0]
    """
    found = False

    def put(leaf: Any, moments: Any) -> Any:
        nonlocal found
        if not isinstance(leaf, BinaryArray) or leaf.curvature is None:
            return leaf
        second = getattr(moments, "weight", None)
        if getattr(second, "shape", None) != leaf.shape:
            raise CompressError("nu has no moments of a binary weight; give it those of the params")
        found = True
        d = jnp.sqrt(second.astype(jnp.float32)) + epsilon  # type: ignore[union-attr]
        return leaf.replace(curvature=d)

    none = lambda x: x is None or is_compressed(x)
    out = jax.tree.map(put, params, nu, is_leaf=none)
    if not found:
        raise CompressError("no leaf looks at a curvature; put in LossAwareBinary() with compress")
    return out
