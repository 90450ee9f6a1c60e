"""Sums of a few binary weights."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import register_array
from jaxcompress.arrays.codebook import CodebookArray
from jaxcompress.errors import SpecError
from jaxcompress.numerics import rounded
from jaxcompress.quantization.learned.base import LearnedArray
from jaxcompress.quantization.learned.spec import Layout, LearnedSpec
from jaxcompress.quantization.learned.sums import exact_mean
from jaxcompress.specs import is_count, register_spec


@register_array(
    "multi_bit",
    children=("weight",),
    static=("axes", "group_size", "bits", "rounds", "scale_dtype", "float_dtype"),
    trainable=("weight",),
)
class MultiBitArray(LearnedArray):
    """`w_hat = sum_k alpha_k b_k`, b of -1 and 1; the gradient passes straight through.

    Attributes:
      weight: the dense weight.
      axes: all axes of one weight.
      group_size: None.
      bits: how many terms the sum has.
      rounds: how often alpha and b are refined in turn.
      scale_dtype: of no use: the sums are stored in the weight's dtype.
      float_dtype: the dtype of the dense array.

    References:
      Lin, Zhao and Pan, *Towards Accurate Binary Convolutional Neural Network*, 2017; Xu et al.,
      *Alternating Multi-bit Quantization for Recurrent Neural Networks*, 2018.

    Examples:
      >>> import jax.numpy as jnp
      >>> MultiBit(2, rounds=0)(jnp.array([3.0, -3.0, 1.0, -1.0])).materialize().tolist()
      [3.0, -3.0, 1.0, -1.0]
    """

    weight: Any
    axes: tuple[int, ...]
    group_size: None
    bits: int
    rounds: int
    scale_dtype: np.dtype
    float_dtype: np.dtype

    def greedy(self) -> tuple[list[jax.Array], list[jax.Array]]:
        """Each term fitted to what the ones before it left: `alpha = mean|r|`, `b = sign(r)`."""
        rest, alphas, signs = self.wide(), [], []
        for _ in range(self.bits):
            alpha, sign = exact_mean(jnp.abs(rest), self.axes), jnp.where(rest >= 0, 1.0, -1.0)
            rest = rest - alpha * sign
            alphas.append(alpha)
            signs.append(sign)
        return alphas, signs

    def refined(self, signs: list[jax.Array]) -> list[jax.Array]:
        """The alphas of least squares for given signs, `(B'B) alpha = B'w`."""
        w, k = self.wide(), self.bits
        mean = lambda x: exact_mean(x, self.axes)[..., None]
        gram = jnp.concatenate([mean(signs[i] * signs[j]) for i in range(k) for j in range(k)], -1)
        target = jnp.concatenate([mean(sign * w) for sign in signs], -1)
        # Two terms of the same signs share one alpha.
        gram = gram.reshape(*target.shape[:-1], k, k) + 1e-6 * jnp.eye(k)
        alphas = jnp.linalg.solve(gram, target[..., None])[..., 0]
        return [alphas[..., i] for i in range(k)]

    def table(self, alphas: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        """All sums, rising along a last axis, and the signs of each as bits."""
        sums = []
        for choice in itertools.product((-1.0, 1.0), repeat=self.bits):
            total: Any = 0.0
            for sign, alpha in zip(choice, alphas):
                total = total + sign * alpha
            sums.append(total)
        values = jnp.stack(sums, -1)
        order = jnp.argsort(values, -1)
        return jnp.take_along_axis(values, order, -1), order

    def nearest(self, values: jax.Array) -> jax.Array:
        """The place in the table of the sum next to each weight, of two the lower."""
        middle = (values[..., 1:] + values[..., :-1]) / 2
        code = jnp.zeros(self.shape, jnp.int32)
        for i in range(2**self.bits - 1):
            code = code + (self.wide() > middle[..., i])
        return code

    def grid(self) -> Any:
        alphas, signs = self.greedy()
        for _ in range(self.rounds):
            alphas = self.refined(signs)
            values, order = self.table(alphas)
            code, chosen = self.nearest(values), jnp.zeros(self.shape, jnp.int32)
            for i in range(2**self.bits):
                chosen = jnp.where(code == i, order[..., i], chosen)
            shifts = range(self.bits - 1, -1, -1)
            signs = [jnp.where((chosen >> shift) & 1 == 1, 1.0, -1.0) for shift in shifts]
        values, _ = self.table(alphas)
        values = rounded(values, self.float_dtype)
        codes = self.nearest(values.astype(jnp.float32)).astype(jnp.uint8)
        batch = self.shape[: self.batch_ndim]
        return CodebookArray(codes, values.reshape(*batch, 2**self.bits), self.axes[-1])

    def proxy(self) -> jax.Array:
        return self.wide()

    def describe(self) -> str:
        return f"{self.bits} binary terms"


@register_spec("multi_bit")
@dataclasses.dataclass(frozen=True, repr=False)
class MultiBit(LearnedSpec):
    """Multi-bit binary weights: a sum of a few binary ones, with a scale each.

    `w_hat = sum_k alpha_k b_k` for k up to `bits`, fitted to the weights in least squares: first
    greedily, `alpha_k = mean|r|`, `b_k = sign(r)` for the rest r of the terms before, then `rounds`
    times `alpha = (B'B)^-1 B'w` and the nearest of the `2**bits` sums in turn. `dw = dw_hat`.

    Stored as a codebook of the `2**bits` sums, which takes as much as the terms would. There need
    be no zero among them, so this is not for pruned weights.

    Args:
      bits: terms, 1 to 4.
      rounds: of refinement.

    Raises:
      SpecError: for other bits or rounds.

    References:
      Guo et al., *Network Sketching: Exploiting Binary Structure in Deep CNNs*, 2017; Lin, Zhao and
      Pan, *Towards Accurate Binary Convolutional Neural Network*, 2017; Xu et al., *Alternating
      Multi-bit Quantization for Recurrent Neural Networks*, 2018.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> jc.finalize(jc.compress({"w": jnp.eye(4)}, {"w": MultiBit(2)}))
      {'w': CodebookArray(float32[4, 4], codebook 4)}
    """

    bits: int = 2
    _: dataclasses.KW_ONLY
    rounds: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_count(self.bits, 1, 4):
            raise SpecError(f"bits={self.bits!r}: write a whole number from 1 to 4")
        if not is_count(self.rounds, 0):
            raise SpecError(f"rounds={self.rounds!r}: write a whole number of at least 0")

    def make(self, weight: jax.Array, layout: Layout, key: jax.Array | None) -> MultiBitArray:
        return MultiBitArray(weight, bits=self.bits, rounds=self.rounds, **layout.fields())
