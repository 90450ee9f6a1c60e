"""AWQ: inputs that matter get finer steps, by a factor for each that the inputs are divided by."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress.errors import SpecError
from jaxcompress.layerwise.hessian import (
    Normal,
    Solution,
    check_finite,
    check_shapes,
    normalized,
    output_error,
    over_stack,
)
from jaxcompress.layerwise.rounding import Rounding
from jaxcompress.numerics import rounded
from jaxcompress.quantization.solvers.gptq import Options, check_format, nearest, nothing
from jaxcompress.quantization.solvers.gptq import solve as compensate
from jaxcompress.quantization.spec import Quantize
from jaxcompress.specs import is_count


def awq(
    w: jax.Array,
    gram: jax.Array,
    quantize: Quantize,
    magnitude: jax.Array | None = None,
    *,
    steps: int = 20,
    tries: int = 0,
) -> tuple[Solution, jax.Array]:
    """Searches for factors of the inputs such that rounding `diag(s) w` changes the outputs least.

    With m the mean magnitude of each input,

        `s = m**a / sqrt(max(m**a) min(m**a))`, `w_hat = diag(1 / s) Q(diag(s) w)`,

    and a of `0, 1/steps, .. (steps - 1)/steps` that of the least `tr((w - w_hat)' gram
    (w - w_hat))`, of equal ones the first: a = 0 is plain rounding. `1 / s` is rounded to the dtype
    of the scales, and s is its inverse. An input that is always zero has s = 1.

    Args:
      w: `[..., K, N]`, inputs before outputs.
      gram: `[..., K, K]`, `sum x x'`.
      quantize: the format, a `Quantize` without `axis`.
      magnitude: `[..., K]`, the mean of `|x|`; None: the root of the diagonal of `gram`.
      steps: how many exponents are tried.
      tries: how many narrower ranges are tried for each group, weighed by the diagonal of the Gram
        matrix of the divided inputs.

    Returns:
      The solution, whose codes and scales are those of `diag(s) w` and whose `weight` is `w_hat`;
      and `1 / s`, `[..., K]`.

    Raises:
      SpecError: for shapes that do not fit, an option that is none, and a Gram matrix that is
        concrete and not finite.

    References:
      Lin et al., *AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and
      Acceleration*, 2024.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> w = jnp.array([[7.0], [0.4]])  # the second weight would become zero,
      >>> gram = jnp.diag(jnp.array([1.0, 1e4]))  # though its input is large
      >>> found, inverse = awq(w, gram, jc.Quantize("int4"))
      >>> found.codes.tolist(), bool(inverse[1] < inverse[0])
      ([[7], [2]], True)
    """
    check_shapes(w, gram, "awq")
    check_format(quantize, "awq")
    check_finite(gram, "awq")
    magnitude = of_gram(gram) if magnitude is None else jnp.asarray(magnitude)
    if tuple(magnitude.shape) != tuple(w.shape[:-1]):
        raise SpecError(
            f"awq: the magnitude of inputs has shape {tuple(magnitude.shape)}, and weights "
            f"{tuple(w.shape)} need {tuple(w.shape[:-1])}"
        )
    search = Search(Options(quantize, tries=tries), steps)
    return solve(w, gram, magnitude, search, w.shape[-2])


def of_gram(gram: jax.Array) -> jax.Array:
    """The magnitude of inputs where it was not observed, up to a factor: their root mean square."""
    return jnp.sqrt(jnp.maximum(jnp.diagonal(gram, axis1=-2, axis2=-1), 0.0))


@dataclasses.dataclass(frozen=True)
class Search:
    """What `awq` is asked for.

    Attributes:
      options: of the rounding.
      steps: how many exponents are tried.
      compensated: whether the outcome is rounded by `gptq`, and not to nearest.
    """

    options: Options
    steps: int
    compensated: bool = False

    def __post_init__(self) -> None:
        if not is_count(self.steps, 1, 1000):
            raise SpecError(f"steps={self.steps!r}: write how many exponents to try, such as 20")


def solve(
    w: jax.Array, gram: jax.Array, magnitude: jax.Array, search: Search, run: int
) -> tuple[Solution, jax.Array]:
    """`awq` on what was checked; `run` as in `frame`."""
    options = search.options
    if not w.size:
        empty = nothing(w, options.quantize, options.group(run))
        return empty, jnp.ones(w.shape[:-1], options.quantize.scale_dtype)
    found, inverse = _solve(w, gram, magnitude[..., None], search, run)
    inverse = inverse[..., 0]
    if not search.compensated:
        return found, inverse
    wide = inverse.astype(jnp.float32)
    scaled = _scaled(w, inverse[..., None])
    better = compensate(scaled, gram * wide[..., None] * wide[..., None, :], options, run)
    return better._replace(weight=_unscaled(better.weight, inverse[..., None])), inverse


@functools.partial(jax.jit, static_argnums=(3, 4))
def _solve(w: jax.Array, gram: jax.Array, magnitude: jax.Array, search: Search, run: int) -> Any:
    def one(w: jax.Array, gram: jax.Array, magnitude: jax.Array) -> Any:
        h = normalized(gram)
        rounded_by = functools.partial(_rounded, w, h, search.options, run)

        def step(j: Any, best: Any) -> Any:
            inverse = _inverse(magnitude, j / search.steps, search.options.quantize.scale_dtype)
            error = rounded_by(inverse).error
            better = error < best[0]  # false for NaN
            return jnp.where(better, error, best[0]), jnp.where(better, inverse, best[1])

        plain = jnp.ones_like(magnitude, search.options.quantize.scale_dtype)
        start = (rounded_by(plain).error, plain)
        _, inverse = lax.fori_loop(1, search.steps, step, start)
        return rounded_by(inverse), inverse

    return over_stack(one, w, gram, magnitude)


def _inverse(magnitude: jax.Array, exponent: Any, dtype: Any) -> jax.Array:
    """`1 / s` of magnitudes `[K, 1]`, in the dtype of scales."""
    live = magnitude > 0
    log = jnp.log(jnp.where(live, magnitude, 1.0).astype(jnp.float32))
    most = jnp.max(jnp.where(live, log, -jnp.inf))
    least = jnp.min(jnp.where(live, log, jnp.inf))
    # Kept within powers of two of 60, that neither they nor the weights times them overflow.
    power = jnp.clip(exponent * (log - (most + least) / 2), -40.0, 40.0)
    return rounded(jnp.where(live, jnp.exp(-power), 1.0), dtype)


def _scaled(w: jax.Array, inverse: jax.Array) -> jax.Array:
    """`diag(s) w` in the dtype of the weights."""
    largest = float(jnp.finfo(w.dtype).max)
    wide = w.astype(jnp.float32) / inverse.astype(jnp.float32)
    return rounded(jnp.clip(wide, -largest, largest), w.dtype)


def _unscaled(w: jax.Array, inverse: jax.Array) -> jax.Array:
    """`diag(1 / s) w`: a float32 product that is rounded once, as the leaf restores it."""
    return rounded(w.astype(jnp.float32) * inverse.astype(jnp.float32), w.dtype)


def _rounded(w: jax.Array, h: Normal, options: Options, run: int, inverse: jax.Array) -> Solution:
    """Plain rounding of `diag(s) w`."""
    rounding = Rounding(np.dtype(w.dtype), options.quantize, options.group(run), options.tries)
    scaled = _scaled(w, inverse)
    weights = jnp.diagonal(h.gram) * jnp.square(inverse.astype(jnp.float32))[:, 0]
    codes, values, scales = nearest(scaled, weights, rounding, run)
    weight = _unscaled(values.astype(w.dtype), inverse)
    return Solution(weight, None, jnp.float32(0.0), output_error(h, w, weight), codes, *scales)
