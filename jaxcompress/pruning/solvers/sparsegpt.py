"""SparseGPT: one pass over the inputs, in which what is left makes up for what is removed."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.errors import SpecError
from jaxcompress.layerwise.frame import frame, shares
from jaxcompress.layerwise.hessian import (
    Solution,
    check_damping,
    check_finite,
    check_shapes,
    hessian,
    output_error,
    over_stack,
    unchanged,
)
from jaxcompress.layerwise.rounding import Rounding, group_along
from jaxcompress.layerwise.sweep import Sweep, sweep
from jaxcompress.pruning.checks import check_share
from jaxcompress.pruning.patterns import parse_pattern
from jaxcompress.pruning.select import kept_count, n_of_m_mask, top_mask
from jaxcompress.quantization.spec import Quantize, check_quantize
from jaxcompress.specs import is_count


def sparsegpt(
    w: jax.Array,
    gram: jax.Array,
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    block_size: int = 128,
    damping: float = 0.01,
    quantize: Quantize | None = None,
) -> Solution:
    """Prunes a layer in one pass over its inputs, and quantizes what stays along the way.

    With `H = gram + damping mean(diag) I` and the upper triangular U of `U' U = H^-1`, rows
    (inputs) are taken in their order. Row c becomes what is stored, `q_c`: zero where it is pruned,
    else `w_c`, rounded; and all later rows j make up for it:

        `w_j <- w_j - U_cj (w_c - q_c) / U_cc`.

    What is pruned are the weights of least `w_c**2 / U_cc**2`, as they are when their turn comes:
    chosen for a block of `block_size` inputs at its beginning, over all its weights; with an
    `n:m` pattern in each m consecutive inputs of a column when the first of them is reached.
    Updates go to the rest of the block at once, to the blocks behind it in one product when it is
    done.

    Without a pattern exactly `round(K N (1 - sparsity))` weights stay: the block that ends with
    input c of K brings their number to `floor(c / K)` of that. Ties go to the lowest index.

    Scales are chosen from the weights as they are when the first row of their group is reached,
    pruned ones included, each column its own; without groups from the weights that were given.
    The error that is passed on is that of the very values that are stored: codes times scales, or
    without quantization the weights rounded to their dtype.

    Args:
      w: `[..., K, N]`, inputs before outputs; float32, bfloat16 or float16.
      gram: `[..., K, K]`, `sum x x'`, as `observe` has it. An input that is always zero (a zero on
        the diagonal) gets weights of zero.
      sparsity: the share of weights to remove, from 0 to 1; with a pattern it may be left out.
      pattern: None for any place, or `"n:m"`: n of each m consecutive inputs stay.
      block_size: inputs in a block; rounded up to whole groups of the pattern and of the scales.
      damping: the share of the mean diagonal that is added; ten times as much, and so on, where
        that is too little for a factor that rounding does not spoil.
      quantize: a `Quantize` without `axis` for what stays, or None.

    Returns:
      The weights, mask, damping and error; with `quantize` also `codes`, `scale` and `zero_point`,
      of which `weight` is the value, bit for bit.

    Raises:
      SpecError: for shapes that do not fit, a sparsity outside of 0 to 1 or other than the
        pattern's, a bad block size, damping or quantization, and a Gram matrix that is concrete
        and not finite.

    References:
      Frantar and Alistarh, *SparseGPT: Massive Language Models Can Be Accurately Pruned in
      One-Shot*, 2023; Frantar et al., *GPTQ*, 2023.

    Examples:
      >>> import jax.numpy as jnp
      >>> gram = jnp.array([[1.0, 0.9], [0.9, 1.0]])  # the inputs are nearly the same,
      >>> found = sparsegpt(jnp.array([[1.0], [2.0]]), gram, sparsity=0.5, damping=0.0)
      >>> [round(float(x), 3) for x in found.weight[:, 0]]  # so that one does the work of both
      [0.0, 2.9]
    """
    check_shapes(w, gram, "sparsegpt")
    check_options(sparsity, pattern, block_size, damping)
    check_quantize(quantize, "sparsegpt")
    check_finite(gram, "sparsegpt")
    if not w.size:
        return unchanged(w)
    options = Options(sparsity, pattern, block_size, damping, quantize)
    return solve(w, gram, options, w.shape[-2])


@dataclasses.dataclass(frozen=True)
class Options:
    """What `sparsegpt` is asked for."""

    sparsity: float | None
    pattern: str | None
    block_size: int
    damping: float
    quantize: Quantize | None


def check_options(sparsity: Any, pattern: Any, block_size: Any, damping: Any) -> None:
    """Refuses what cannot be done.

    Raises:
      SpecError: names the value and says what to write.
    """
    if pattern is None and sparsity is None:
        raise SpecError("write a sparsity, the share to remove, such as 0.5, or a pattern")
    if sparsity is not None:
        check_share("sparsity", sparsity, "the share to remove")
    if pattern is not None:
        n, m = parse_pattern(pattern)
        if sparsity is not None and not math.isclose(1 - n / m, sparsity, abs_tol=1e-6):
            raise SpecError(
                f"pattern {pattern!r} removes {1 - n / m:g} of the weights, not "
                f"sparsity={sparsity:g}: write {1 - n / m:g}"
            )
    if not is_count(block_size, 1):
        raise SpecError(f"block_size={block_size!r}: write a whole number of at least 1")
    check_damping(damping)


def solve(w: jax.Array, gram: jax.Array, options: Options, run: int, groups: int = 1) -> Solution:
    """`sparsegpt` on what was checked.

    Args:
      w: `[..., K, N]`, or `[..., groups, K, N]`.
      gram: `[..., K, K]`, likewise.
      options: what to do.
      run: the length of the last axis of those that make up the K inputs; no group of a pattern or
        of scales goes beyond it.
      groups: matrices that are one weight together, and share its count of what stays.
    """
    n, m = (0, 1) if options.pattern is None else parse_pattern(options.pattern)
    quantize = options.quantize
    group = None if quantize is None else group_along(quantize, run)
    inputs, outputs = w.shape[-2:]
    lay = frame(inputs, run, options.block_size, (m, group or 1))
    sizes = np.tile(lay.real.reshape(-1, lay.block).sum(axis=1) * outputs, groups)
    total = 0 if n else kept_count(int(sizes.sum()), options.sparsity or 0.0)
    counts = shares(total, sizes).reshape(*([groups] if groups > 1 else []), 1, -1)
    counts = np.broadcast_to(counts, (*w.shape[:-2], *counts.shape[-2:]))
    rounding = Rounding(np.dtype(w.dtype), quantize, group)
    how = Sweep(lay.block, rounding, m if n else lay.block, _Keep(n, m))
    return _solve(
        w, gram, counts.astype(np.int32), options.damping, how, m, options.block_size, run
    )


@dataclasses.dataclass(frozen=True)
class _Keep:
    """Which weights stay: `n` of each `m` rows of a column, or, with n = 0, the count's best."""

    n: int
    m: int

    def __call__(self, scores: jax.Array, count: jax.Array) -> jax.Array:
        if self.n:
            return n_of_m_mask(scores, self.n, self.m, 0, signed=True)
        return top_mask(scores, count, signed=True)


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7))
def _solve(
    w: jax.Array,
    gram: jax.Array,
    counts: Any,
    damping: Any,
    how: Sweep,
    m: int,
    block_size: int,
    run: int,
) -> Solution:
    lay = frame(w.shape[-2], run, block_size, (m, how.rounding.group or 1))

    def one(w: jax.Array, gram: jax.Array, counts: jax.Array) -> Solution:
        h = hessian(lay.padded(lay.padded(gram).T), damping)
        x = jnp.where(h.dead[:, None], 0.0, lay.padded(w.astype(jnp.float32)))
        x, mask, codes, scales = sweep(x, h.factor, jnp.asarray(lay.real), counts[0], how)
        weight, mask = x[lay.place].astype(w.dtype), mask[lay.place]
        inner = h._replace(gram=h.gram[lay.place][:, lay.place])
        error = output_error(inner, w, weight)
        if codes is None:
            return Solution(weight, mask, h.damping, error)
        firsts = lay.firsts(how.rounding.group, run)
        zero = None if scales.zero_point is None else scales.zero_point[firsts]
        return Solution(
            weight, mask, h.damping, error, codes[lay.place], scales.scale[firsts], zero
        )

    return over_stack(one, w, gram, jnp.asarray(counts))
