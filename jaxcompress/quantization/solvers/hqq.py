"""HQQ: zero points and scales that ignore outliers, found without data."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.arrays.affine import int_format, spread, stored
from jaxcompress.arrays.quantized import QuantizedArray
from jaxcompress.arrays.ranges import group_sums
from jaxcompress.arrays.scheme import Scheme
from jaxcompress.errors import SpecError
from jaxcompress.quantization.spec import Quantize
from jaxcompress.specs import LeafContext, Plan, is_count, is_number, register_spec


def hqq(
    w: jax.Array,
    scheme: Scheme,
    *,
    norm: float = 0.7,
    iterations: int = 20,
    beta: float = 10.0,
    kappa: float = 1.01,
) -> tuple[jax.Array, jax.Array | None]:
    """The scale and zero point of half-quadratic quantization.

    What is minimized is `sum |w - w_hat|**p`, p below 1, so that a few large errors count little.
    With e in the place of the error, each turn takes

        `e = shrink(w - w_hat)`, `shrink(x) = sign(x) max(|x| - |x|**(p-1) / beta, 0)`,

    then, for affine codes q, the zero point that fits `w - e` best, `z = mean(q - (w - e) / s)`,
    and the scale, `s = sum((q - z) (w - e)) / sum((q - z)**2)`; then beta grows by kappa. The paper
    moves z alone, which may be a fraction. Here zero stays exact: z is rounded to a whole code in
    every turn, and s makes up for that. Of all turns, the first of which is the plain range, that
    of the least `sum |w - w_hat|**p` of each group is taken.

    Weights and beta are in units of the mean magnitude of the weights, so that scaling the weights
    scales the outcome.

    Args:
      w: the weight.
      scheme: an integer format and what shares a scale, as `Quantize(...).scheme` has it.
      norm: p, above 0 and at most 1.
      iterations: turns.
      beta: see above.
      kappa: see above.

    Returns:
      `(scale, zero_point)` as of `Scheme.scales`.

    Raises:
      SpecError: for a number that cannot be, and a format that is not of integers.

    References:
      Badri and Shaji, *Half-Quadratic Quantization of Large Machine Learning Models*, 2023.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> w = jnp.array([[1.0], [2.0], [-1.0], [3.0], [0.0], [-3.4]])
      >>> scheme = jc.Quantize("int3", axis=(-2,)).scheme
      >>> [float(scale[0, 0]) for scale in (scheme.scales(w)[0], hqq(w, scheme)[0])]
      [1.1328125, 1.046875]
    """
    _check(norm, iterations, beta, kappa)
    int_format(scheme.format)
    if scheme.block is not None or scheme.scale_format is not None:
        raise SpecError("hqq: write a group_size along the inputs alone, and no scale_format")
    return _solve(w, scheme, norm, iterations, beta, kappa)


def _check(norm: Any, iterations: Any, beta: Any, kappa: Any) -> None:
    if not is_number(norm, 0, 1) or not norm:
        raise SpecError(f"norm={norm!r}: write an exponent above 0 and at most 1, such as 0.7")
    if not is_count(iterations, 0):
        raise SpecError(f"iterations={iterations!r}: write a whole number of at least 0")
    for name, x in (("beta", beta), ("kappa", kappa)):
        if not is_number(x, 0) or not x:
            raise SpecError(f"{name}={x!r}: write a number above 0")


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _solve(
    w: jax.Array, scheme: Scheme, norm: float, iterations: int, beta: float, kappa: float
) -> tuple[jax.Array, jax.Array | None]:
    fmt, start = int_format(scheme.format), scheme.scales(w)
    wide = w.astype(jnp.float32)
    unit = jnp.maximum(jnp.mean(jnp.abs(wide)), jnp.finfo(jnp.float32).tiny)

    total = functools.partial(group_sums, scheme=scheme)  # over what shares a scale
    limit = float(jnp.finfo(w.dtype).max) / fmt.extent

    def gap_of(params: Any) -> tuple[jax.Array, jax.Array]:
        codes = scheme.codes(w, *params)
        return wide - scheme.values(codes, params[0], params[1], jnp.float32), codes

    def fitted(codes: jax.Array, target: jax.Array, params: Any) -> Any:
        scale, zero = params
        wide_scale = spread(scale.astype(jnp.float32), w.shape, scheme.axes, scheme.group)
        q, n = codes.astype(jnp.float32), total(jnp.ones_like(target))
        if zero is not None:
            new = jnp.round(total(q - target / wide_scale) / n)
            zero = jnp.clip(new, fmt.qmin, fmt.qmax).astype(zero.dtype)
            q = q - spread(zero.astype(jnp.float32), w.shape, scheme.axes, scheme.group)
        square, best = total(q * q), total(q * target)
        usable = (square > 0) & (best > 0)
        fit = jnp.where(usable, best / jnp.where(usable, square, 1.0), scale.astype(jnp.float32))
        return stored(fit, scheme.scale_dtype, limit), zero

    def cost(gap: jax.Array) -> jax.Array:
        return total((jnp.abs(gap) / unit) ** norm)

    def step(i: Any, state: Any) -> Any:
        params, best, least = state
        gap, codes = gap_of(params)
        size = jnp.abs(gap) / unit
        pull = jnp.where(size > 0, size, 1.0) ** (norm - 1) / (beta * kappa**i)
        error = jnp.sign(gap) * jnp.maximum(size - pull, 0.0) * unit
        params = fitted(codes, wide - error, params)
        now = cost(gap_of(params)[0])
        better = now < least
        pick = lambda new, old: jnp.where(better, new, old)
        return params, jax.tree.map(pick, params, best), pick(now, least)

    state = (start, start, cost(gap_of(start)[0]))
    return lax.fori_loop(0, iterations, step, state)[1]


@register_spec("hqq")
@dataclasses.dataclass(frozen=True, repr=False)
class HQQ(Quantize):
    """`Quantize` with the scales and zero points of half-quadratic quantization; needs no data.

    See `jaxcompress.quantization.solvers.hqq`. Affine formats get better zero points, symmetric
    ones better scales; zero stays exact.

    Args:
      format: an integer format; as in `Quantize`, like all that follow up to `scale_group_size`.
      group_size: weights that share a scale along the last input axis.
      axis: the input axes over which a scale is shared.
      symmetric: whether zero is the middle of the range.
      scale_dtype: the dtype of scales.
      convention: how the first symmetric scale follows from the range.
      estimator: how the first range follows from the weights.
      rounding: `nearest` or `stochastic`.
      scale_format: must be None, like the next.
      scale_group_size: see `scale_format`.
      norm: the exponent of the error that is minimized.
      iterations: turns.

    Raises:
      SpecError: for values that cannot be.

    References:
      Badri and Shaji, *Half-Quadratic Quantization of Large Machine Learning Models*, 2023.

    Examples:
      >>> import jax, jaxcompress as jc
      >>> from jaxcompress.quantization.solvers import HQQ
      >>> w = jax.random.normal(jax.random.key(0), (64, 8))
      >>> HQQ("uint4", group_size=32, symmetric=False)(w)
      QuantizedArray(float32[64, 8], uint4/32 affine)
    """

    _: dataclasses.KW_ONLY
    norm: float = 0.7
    iterations: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        int_format(self.format)
        if isinstance(self.group_size, tuple) or self.scale_format is not None:
            raise SpecError(f"{self!r}: write a group_size of one number, and no scale_format")
        _check(self.norm, self.iterations, 1.0, 1.0)

    def plan(self, leaf: jax.Array, context: LeafContext) -> Plan:
        """Settles the axes and clamps the group size to their length."""
        super().plan(leaf, context)  # which checks
        return _HQQPlan(self.settled(leaf, context))


@dataclasses.dataclass(frozen=True)
class _HQQPlan(Plan):
    spec: HQQ

    def apply(self, leaf: jax.Array, key: jax.Array | None) -> QuantizedArray:
        scheme, noise = self.spec.scheme, self.spec.noise(leaf, key)
        scale, zero = hqq(leaf, scheme, norm=self.spec.norm, iterations=self.spec.iterations)
        return scheme.pack(scheme.codes(leaf, scale, zero, noise), scale, zero, leaf.dtype)
