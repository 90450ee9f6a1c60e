"""AdaRound and SignRound: learns for each weight whether it is rounded up or down."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxcompress.arrays.affine import int_format
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
from jaxcompress.layerwise.ranges import Scales, codes_of, values_of
from jaxcompress.layerwise.rounding import Rounding
from jaxcompress.numerics import rounded
from jaxcompress.quantization.solvers.gptq import Options, check_format, nothing, run_scales
from jaxcompress.quantization.spec import Quantize
from jaxcompress.specs import is_count, is_number

# The ends of the stretched sigmoid, and the exponents that its regularizer is annealed between.
_LOW, _HIGH = -0.1, 1.1
_BETA_FIRST, _BETA_LAST, _WARM = 20.0, 2.0, 0.2


def adaround(
    w: jax.Array,
    gram: jax.Array,
    quantize: Quantize,
    *,
    steps: int = 1000,
    learning_rate: float = 0.03,
    strength: float = 3.0,
    tries: int = 0,
) -> Solution:
    """Learns to round up or down, in the metric of the outputs.

    With the stretched sigmoid `h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)` a weight is

        `w_hat = s (clip(floor(w / s) + h(V) + z, qmin, qmax) - z)`,

    and V, which starts where `w_hat = w`, is trained by Adam on

        `tr((w - w_hat)' gram (w - w_hat)) / E + strength mean(1 - |2 h(V) - 1|**beta)`,

    E being the error of rounding to nearest. The second term is left out of the first fifth of the
    steps; then beta falls from 20 to 2 by a cosine, which drives h(V) to 0 or 1. In the end the
    weight is rounded up where h(V) is at least 1/2. A column that rounding to nearest does better
    is rounded to nearest, so that no output is worse off. Scales are those of the weights that were
    given; a weight that is exactly zero stays so.

    The Gram matrix says all that the inputs say about the error of a linear layer: no pass over
    data is needed, and each step costs `K**2 N`.

    Args:
      w: `[..., K, N]`, inputs before outputs; float32, bfloat16 or float16.
      gram: `[..., K, K]`, `sum x x'`.
      quantize: an integer format, a `Quantize` without `axis`.
      steps: of Adam.
      learning_rate: of Adam.
      strength: of the regularizer.
      tries: how many narrower ranges are tried for each group, weighed by the diagonal of `gram`.

    Returns:
      As `gptq`; the damping is 0.

    Raises:
      SpecError: for shapes that do not fit, an option that is none, and a Gram matrix that is
        concrete and not finite.

    References:
      Nagel et al., *Up or Down? Adaptive Rounding for Post-Training Quantization*, 2020.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> gram = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.9], [0.0, 0.9, 1.0]])
      >>> w = jnp.array([[7.0], [2.4], [0.45]])  # two inputs are nearly the same, so that
      >>> adaround(w, gram, jc.Quantize("int4")).codes.tolist()  # one weight is rounded up
      [[7], [2], [1]]
    """
    options = _options(w, gram, quantize, steps, learning_rate, tries, "adaround")
    if not is_number(strength, 0):
        raise SpecError(f"strength={strength!r}: write a number of at least 0, such as 3.0")
    how = Learning("adaround", steps, float(learning_rate), float(strength))
    return solve(w, gram, options, how, w.shape[-2])


def signround(
    w: jax.Array,
    gram: jax.Array,
    quantize: Quantize,
    *,
    steps: int = 200,
    learning_rate: float | None = None,
    tries: int = 0,
) -> Solution:
    """Learns an offset of each weight before it is rounded, by signs of gradients.

        `w_hat = s (clip(round(w / s + V) + z, qmin, qmax) - z)`, V within +-1/2,

    V starts at 0 and follows `V <- V - r sign(dL/dV)`, with L the squared error of the outputs, the
    gradient passed through the rounding, and a rate r that falls linearly to 0. The codes of the
    least error of a column on the way are kept, the first of which are those of rounding to
    nearest. Scales are those of the weights that were given; a weight that is exactly zero stays
    so.

    Args:
      w: `[..., K, N]`; see `adaround`, like all that follow.
      gram: `[..., K, K]`.
      quantize: the format.
      steps: how many.
      learning_rate: the first rate; None: `1 / steps`, by which V comes just about to its bounds.
      tries: how many narrower ranges are tried.

    Returns:
      As `adaround`.

    Raises:
      SpecError: as `adaround`.

    References:
      Cheng et al., *Optimize Weight Rounding via Signed Gradient Descent for the Quantization of
      LLMs*, 2023.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> gram = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.9], [0.0, 0.9, 1.0]])
      >>> w = jnp.array([[7.0], [2.4], [0.45]])
      >>> signround(w, gram, jc.Quantize("int4")).codes.tolist()
      [[7], [2], [1]]
    """
    rate = 1 / max(1, steps) if learning_rate is None else learning_rate
    options = _options(w, gram, quantize, steps, rate, tries, "signround")
    how = Learning("signround", steps, float(rate), 0.0)
    return solve(w, gram, options, how, w.shape[-2])


@dataclasses.dataclass(frozen=True)
class Learning:
    """How rounding is learned: `adaround` or `signround`, and their numbers."""

    method: str
    steps: int
    rate: float
    strength: float

    def __post_init__(self) -> None:
        if not is_count(self.steps, 1):
            raise SpecError(f"steps={self.steps!r}: write a whole number of at least 1")
        if not is_number(self.rate, 0) or not self.rate:
            raise SpecError(f"learning_rate={self.rate!r}: write a number above 0, such as 0.01")


def _options(w: Any, gram: Any, quantize: Any, steps: Any, rate: Any, tries: Any, name: str) -> Any:
    check_shapes(w, gram, name)
    check_format(quantize, name)
    Learning(name, steps, rate, 0.0)
    int_format(quantize.format)
    check_finite(gram, name)
    return Options(quantize, tries=tries)


def solve(w: jax.Array, gram: jax.Array, options: Options, how: Learning, run: int) -> Solution:
    """`adaround` or `signround` on what was checked; `run` as in `frame`."""
    if not w.size:
        return nothing(w, options.quantize, options.group(run))
    return _solve(w, gram, options, how, run)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _solve(w: jax.Array, gram: jax.Array, options: Options, how: Learning, run: int) -> Solution:
    learn = _adaround if how.method == "adaround" else _signround
    return over_stack(
        lambda w, gram: learn(_Layer.of(w, gram, options, run), how, w.dtype), w, gram
    )


@dataclasses.dataclass(frozen=True)
class _Layer:
    """Weights in steps of their grid, `[K, N]` each, and how an error counts."""

    w: jax.Array
    grid: jax.Array
    step: jax.Array
    live: jax.Array
    h: Normal
    scales: Scales
    codes: Callable[[jax.Array], jax.Array]
    values: Callable[[jax.Array], jax.Array]

    @classmethod
    def of(cls, w: jax.Array, gram: jax.Array, options: Options, run: int) -> _Layer:
        h, spec, group = normalized(gram), options.quantize, options.group(run)
        rounding = Rounding(np.dtype(w.dtype), spec, group, options.tries)
        scales = run_scales(w, jnp.diagonal(h.gram), rounding, run)
        runs = lambda x: x.reshape(-1, run, w.shape[1]) if group is not None else x
        groups = lambda y: y if group is None else y.reshape(-1, -(-run // group), w.shape[1])
        mine = jax.tree.map(groups, scales)
        codes = lambda x: codes_of(runs(x), mine, spec, group).reshape(w.shape)
        raw = lambda codes: values_of(runs(codes), mine, spec, group).reshape(w.shape)
        values = lambda codes: rounded(raw(codes), w.dtype).astype(jnp.float32)
        # The width of a step is what one code more is worth.
        zero = codes(jnp.zeros_like(w))
        step = raw(zero.astype(jnp.float32) + 1)
        wide = w.astype(jnp.float32)
        return cls(wide, wide / step, step, w != 0, h, scales, codes, values)

    def error(self, values: jax.Array) -> jax.Array:
        """The squared error of each output, `[N]`, up to the scale of the Gram matrix."""
        gap = self.w - values
        return jnp.sum(gap * jnp.matmul(self.h.gram, gap, precision=lax.Precision.HIGHEST), axis=0)

    def at(self, grid: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The nearest codes of weights in steps, and their values; zeros stay so."""
        codes = self.codes(jnp.where(self.live, grid, 0.0) * self.step)
        return codes, self.values(codes)

    def bounds(self) -> tuple[jax.Array, jax.Array]:
        """The least and the greatest code less the zero point."""
        end = lambda sign: self.values(self.codes(jnp.full(self.w.shape, sign * 1e30))) / self.step
        return jnp.round(end(-1)), jnp.round(end(1))

    def solution(self, codes: jax.Array, dtype: Any) -> Solution:
        weight = self.values(codes).astype(dtype)
        error = output_error(self.h, self.w, weight)
        return Solution(weight, None, jnp.float32(0.0), error, codes, *self.scales)


def _better(layer: _Layer, codes: jax.Array, others: jax.Array) -> jax.Array:
    """Of each column the codes of less error, of equal ones the first."""
    worse = layer.error(layer.values(others)) < layer.error(layer.values(codes))
    return jnp.where(worse, others, codes)


def _adaround(layer: _Layer, how: Learning, dtype: Any) -> Solution:
    nearest, values = layer.at(layer.grid)
    unit = jnp.maximum(jnp.sum(layer.error(values)), jnp.finfo(jnp.float32).tiny)
    low, high = layer.bounds()
    floor = jnp.floor(layer.grid)
    up = lambda v: jnp.clip(jax.nn.sigmoid(v) * (_HIGH - _LOW) + _LOW, 0.0, 1.0)

    def loss(v: jax.Array, beta: jax.Array, strength: jax.Array) -> jax.Array:
        soft = jnp.where(layer.live, jnp.clip(floor + up(v), low, high), 0.0) * layer.step
        open_ = 1 - jnp.abs(2 * up(v) - 1) ** beta
        return jnp.sum(layer.error(soft)) / unit + strength * jnp.mean(open_)

    optimizer = optax.adam(how.rate)

    def step(i: Any, state: Any) -> Any:
        v, moments = state
        done = jnp.clip((i / how.steps - _WARM) / (1 - _WARM), 0.0, 1.0)
        beta = _BETA_LAST + (_BETA_FIRST - _BETA_LAST) * (1 + jnp.cos(jnp.pi * done)) / 2
        strength = jnp.where(i < _WARM * how.steps, 0.0, how.strength)
        updates, moments = optimizer.update(jax.grad(loss)(v, beta, strength), moments)
        return optax.apply_updates(v, updates), moments

    rest = jnp.clip((layer.grid - floor - _LOW) / (_HIGH - _LOW), 1e-4, 1 - 1e-4)
    start = jnp.log(rest / (1 - rest))
    v, _ = lax.fori_loop(0, how.steps, step, (start, optimizer.init(start)))
    codes, _ = layer.at(floor + (up(v) >= 0.5))
    return layer.solution(_better(layer, nearest, codes), dtype)


def _signround(layer: _Layer, how: Learning, dtype: Any) -> Solution:
    low, high = layer.bounds()
    nearest, values = layer.at(layer.grid)

    def step(i: Any, state: Any) -> Any:
        v, values, best, least = state
        # Through the rounding; what is clipped does not move.
        slope = -jnp.matmul(layer.h.gram, layer.w - values, precision=lax.Precision.HIGHEST)
        inside = (layer.grid + v >= low - 0.5) & (layer.grid + v <= high + 0.5)
        rate = how.rate * (1 - i / how.steps)
        v = jnp.clip(v - rate * jnp.sign(slope * layer.step) * inside, -0.5, 0.5)
        codes, values = layer.at(layer.grid + v)
        error = layer.error(values)
        better = error < least
        return v, values, jnp.where(better, codes, best), jnp.where(better, error, least)

    state = (jnp.zeros_like(layer.grid), values, nearest, layer.error(values))
    best = lax.fori_loop(0, how.steps, step, state)[2]
    return layer.solution(best, dtype)
