"""OBQ: weights are rounded one by one, the cheapest first, and the others make up for each."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress.layerwise.hessian import (
    Hessian,
    Solution,
    check_damping,
    check_finite,
    check_shapes,
    hessian,
    output_error,
    over_stack,
)
from jaxcompress.layerwise.ranges import Scales, codes_of, values_of
from jaxcompress.layerwise.rounding import Rounding
from jaxcompress.numerics import rounded
from jaxcompress.quantization.solvers.gptq import Options, check_format, nothing, run_scales
from jaxcompress.quantization.spec import Quantize


def obq(
    w: jax.Array, gram: jax.Array, quantize: Quantize, *, damping: float = 0.01, tries: int = 0
) -> Solution:
    """Optimal Brain Quantizer: each column rounds its weights in the order that costs it least.

    With `H` the damped Gram matrix, each column has an inverse of its own over the weights that
    are not rounded yet. In each step the weight of least `(w_q - q(w_q))**2 / [H^-1]_qq` is
    rounded, of several the first, and the column becomes

        `w - ((w_q - q(w_q)) / [H^-1]_qq) H^-1 e_q`, `H^-1 - H^-1 e_q e_q' H^-1 / [H^-1]_qq`.

    Scales are those of the weights that were given. A weight that is exactly zero stays so. For
    small layers: each column takes K steps of `K**2` operations, one column after the other.

    Args:
      w: `[..., K, N]`; see `gptq`, like all that follow.
      gram: `[..., K, K]`.
      quantize: the format.
      damping: the share of the mean diagonal that is added.
      tries: how many narrower ranges are tried, weighed by the diagonal of H.

    Returns:
      As `gptq`.

    Raises:
      SpecError: as `gptq`.

    References:
      Frantar, Singh and Alistarh, *Optimal Brain Compression: A Framework for Accurate
      Post-Training Quantization and Pruning*, 2022.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> gram = jnp.array([[1.0, 0.9], [0.9, 1.0]])
      >>> w = jnp.array([[0.4, 7.0], [0.4, 7.0]])
      >>> obq(w, gram, jc.Quantize("int4"), damping=0.0).codes.tolist()
      [[7, 7], [7, 7]]
    """
    check_shapes(w, gram, "obq")
    check_format(quantize, "obq")
    check_damping(damping)
    check_finite(gram, "obq")
    group = Options(quantize, tries=tries).group(max(1, w.shape[-2]))
    if not w.size:
        return nothing(w, quantize, group)
    return _solve(w, gram, jnp.float32(damping), quantize, group, tries)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _solve(
    w: jax.Array, gram: jax.Array, damping: Any, spec: Quantize, group: int | None, tries: int
) -> Solution:
    rounding = Rounding(np.dtype(w.dtype), spec, group, tries)
    return over_stack(lambda w, gram: _one(w, hessian(gram, damping), rounding), w, gram)


def _one(w: jax.Array, h: Hessian, rounding: Rounding) -> Solution:
    rows, spec, group = w.shape[0], rounding.spec, rounding.group
    assert spec is not None
    inverse = jnp.matmul(h.factor.T, h.factor, precision=lax.Precision.HIGHEST)
    scales = run_scales(w, jnp.diagonal(h.matrix), rounding, rows)

    def round_all(x: jax.Array, mine: Scales) -> tuple[jax.Array, jax.Array]:
        codes = codes_of(x[:, None], mine, spec, group)
        values = rounded(values_of(codes, mine, spec, group), w.dtype).astype(jnp.float32)
        return codes[:, 0], values[:, 0]

    def column(given: tuple[jax.Array, Scales]) -> tuple[jax.Array, jax.Array]:
        start, mine = given
        mine = jax.tree.map(lambda y: y[:, None], mine)

        def step(_: Any, state: Any) -> Any:
            x, inverse, todo, codes, out = state
            new, values = round_all(x, mine)
            new = jnp.where(start == 0, round_all(start, mine)[0], new)
            values = jnp.where(start == 0, 0.0, values)
            diagonal = jnp.where(todo, jnp.diagonal(inverse), 1.0)
            q = jnp.argmin(jnp.where(todo, jnp.square(x - values) / diagonal, jnp.inf))
            slope = inverse[:, q] / inverse[q, q]
            x = x - (x[q] - values[q]) * slope
            inverse = inverse - slope[:, None] * inverse[q]
            gone = jnp.arange(rows) == q
            inverse = jnp.where(gone[:, None] | gone[None, :], 0.0, inverse)
            # Never below 0 but for rounding: a variance is at least 1 / H_qq.
            least = jnp.maximum(jnp.diagonal(inverse), 1 / jnp.diagonal(h.matrix))
            inverse = jnp.where(jnp.eye(rows, dtype=bool), least, inverse)
            keep = lambda old, new: jnp.where(gone, new, old)
            return x, inverse, todo & ~gone, keep(codes, new), keep(out, values)

        codes, _ = round_all(start, mine)
        state = (start, inverse, jnp.ones(rows, bool), codes, jnp.zeros(rows))
        return lax.fori_loop(0, rows, step, state)[3:]

    x = w.astype(jnp.float32)
    codes, values = lax.map(column, (x.T, jax.tree.map(jnp.transpose, scales)))
    weight = values.T.astype(w.dtype)
    return Solution(weight, None, h.damping, output_error(h, w, weight), codes.T, *scales)
