"""GPTQ: one pass over the inputs, in which later weights make up for those that are rounded."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.formats import code_format
from jaxcompress.errors import SpecError
from jaxcompress.layerwise.frame import Frame, frame
from jaxcompress.layerwise.hessian import (
    Solution,
    check_damping,
    check_finite,
    check_shapes,
    hessian,
    output_error,
    over_stack,
)
from jaxcompress.layerwise.ranges import Scales, codes_of, searched_scales, values_of
from jaxcompress.layerwise.rounding import Rounding, group_along
from jaxcompress.layerwise.sweep import Fixed, Sweep, sweep
from jaxcompress.numerics import rounded, unit_scale
from jaxcompress.pruning.select import top_mask
from jaxcompress.quantization.spec import Quantize, check_quantize
from jaxcompress.specs import is_count, is_number


def gptq(
    w: jax.Array,
    gram: jax.Array,
    quantize: Quantize,
    *,
    act_order: bool = False,
    block_size: int = 128,
    damping: float = 0.01,
    tries: int = 0,
) -> Solution:
    """Rounds a layer in one pass over its inputs, so that its outputs change little.

    With `H = gram + damping mean(diag) I` and the upper triangular U of `U' U = H^-1`, rows
    (inputs) are taken in turn. Row c becomes `q_c`, the nearest codes of what it is by then, and
    all later rows j make up for it:

        `w_j <- w_j - U_cj (w_c - q_c) / U_cc`.

    Updates go to the rest of the block at once, to the blocks behind it in one product when it is
    done. A weight that is exactly zero, a pruned one, stays so; later rows make up for that too.

    Scales are those of the weights as they are when the first row of their group is reached;
    without groups those of the weights that were given.

    Args:
      w: `[..., K, N]`, inputs before outputs; float32, bfloat16 or float16.
      gram: `[..., K, K]`, `sum x x'`, as `observe` has it. The weights of an input that was
        always zero (a zero on the diagonal) are rounded to nearest: later inputs may be others.
      quantize: the format, a `Quantize` without `axis`.
      act_order: whether rows are taken by decreasing diagonal of `gram`, of equal ones the first
        one first. Groups stay where they lie, with the scales of the weights that were given, so
        that what is stored has the form that it has without.
      block_size: inputs in a block; rounded up to whole groups. It changes the result by rounding
        alone.
      damping: the share of the mean diagonal that is added; ten times as much, and so on, where
        that is too little for a factor that rounding does not spoil.
      tries: how many narrower ranges are tried for each group, down to 0.3 of the plain one. That
        of the least `sum_c (w_c - q_c)**2 / U_cc**2` is taken; with `act_order` the weights of the
        sum are the diagonal of H.

    Returns:
      The weights, damping, error, `codes`, `scale` and `zero_point`. `weight` is the value of the
      codes, bit for bit; `mask` is None.

    Raises:
      SpecError: for shapes that do not fit, an option that is none, and a Gram matrix that is
        concrete and not finite.

    References:
      Frantar, Ashkboos, Hoefler and Alistarh, *GPTQ: Accurate Post-Training Quantization for
      Generative Pre-trained Transformers*, 2023.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> gram = jnp.array([[1.0, 0.9], [0.9, 1.0]])  # the inputs are nearly the same,
      >>> w = jnp.array([[0.4, 7.0], [0.4, 7.0]])  # so that only the sum of weights matters
      >>> gptq(w, gram, jc.Quantize("int4"), damping=0.0).codes.tolist()
      [[7, 7], [7, 7]]
    """
    check_shapes(w, gram, "gptq")
    check_format(quantize, "gptq")
    options = Options(quantize, act_order, block_size, damping, tries)
    check_finite(gram, "gptq")
    return solve(w, gram, options, w.shape[-2])


@dataclasses.dataclass(frozen=True)
class Options:
    """What `gptq` is asked for, and `spqr`: the share of weights that are kept beside the codes."""

    quantize: Quantize
    act_order: bool = False
    block_size: int = 128
    damping: float = 0.01
    tries: int = 0
    outliers: float = 0.0

    def __post_init__(self) -> None:
        if not is_number(self.outliers, 0, 1):
            raise SpecError(
                f"outliers={self.outliers!r}: write the share of weights to keep beside the codes, "
                "from 0 to 1, such as 0.01"
            )
        check_damping(self.damping)
        check_tries(self.tries)
        if not is_count(self.block_size, 1):
            raise SpecError(f"block_size={self.block_size!r}: write a whole number of at least 1")
        if not isinstance(self.act_order, bool):
            raise SpecError(f"act_order={self.act_order!r}: write True or False")

    def group(self, run: int) -> int | None:
        """Rows that share scales, within runs of rows of that length."""
        return group_along(self.quantize, run)


def check_format(quantize: Any, name: str) -> None:
    """Refuses what is no quantization along the inputs, None included.

    Raises:
      SpecError: says what to write.
    """
    if quantize is None:
        raise SpecError(f"{name}: quantize=None: write such as jc.Quantize('int4')")
    check_quantize(quantize, name)


def check_tries(tries: Any) -> None:
    """Refuses what is no number of narrower ranges.

    Raises:
      SpecError: says what to write.
    """
    if not is_count(tries, 0, 1000):
        raise SpecError(f"tries={tries!r}: write how many narrower ranges to try, such as 0 or 32")


def nothing(w: jax.Array, spec: Quantize, group: int | None) -> Solution:
    """The solution for weights that there are none of."""
    lead, columns = w.shape[:-2], w.shape[-1]
    groups = 1 if group is None else -(-w.shape[-2] // group)
    dtype = code_format(spec.format).dtype
    scale = jnp.ones((*lead, groups, columns), spec.scale_dtype)
    zero = None if spec.symmetric else jnp.zeros(scale.shape, dtype)
    return Solution(
        w, None, jnp.zeros(lead), jnp.zeros(lead), jnp.zeros(w.shape, dtype), scale, zero
    )


def solve(w: jax.Array, gram: jax.Array, options: Options, run: int) -> Solution:
    """`gptq` on what was checked; `run` as in `frame`: no group goes beyond so many inputs."""
    if not w.size:
        return nothing(w, options.quantize, options.group(run))
    damping = jnp.float32(options.damping)
    return _solve(w, gram, damping, dataclasses.replace(options, damping=0.0), run)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _solve(w: jax.Array, gram: jax.Array, damping: Any, options: Options, run: int) -> Solution:
    group = options.group(run)
    rounding = Rounding(np.dtype(w.dtype), options.quantize, group, options.tries)
    # Fixed scales go with their rows anywhere, so nothing is put between the groups.
    lay = frame(w.shape[-2], run, options.block_size, (1 if options.act_order else group or 1,))
    how = Sweep(lay.block, rounding)
    one = _in_order_of_size if options.act_order else _in_place
    count = round(options.outliers * w.shape[-2] * w.shape[-1])
    return over_stack(lambda w, gram: one(w, gram, damping, lay, how, run, count), w, gram)


def _in_place(
    w: jax.Array, gram: jax.Array, damping: Any, lay: Frame, how: Sweep, run: int, outliers: int
) -> Solution:
    h = hessian(lay.padded(lay.padded(gram).T), damping)
    inverse = jnp.sum(jnp.square(h.factor), axis=0)[lay.place]
    exact = _outliers(w, inverse, how.rounding, run, outliers)
    weight, codes, scales = _swept(w, h.factor, lay, how, None, exact)
    firsts = lay.firsts(how.rounding.group, run)
    scales = jax.tree.map(lambda y: y[firsts], scales)
    weight = weight.astype(w.dtype)
    error = output_error(h._replace(gram=h.gram[lay.place][:, lay.place]), w, weight)
    return Solution(weight, exact, h.damping, error, codes, *scales)


def _in_order_of_size(
    w: jax.Array, gram: jax.Array, damping: Any, lay: Frame, how: Sweep, run: int, outliers: int
) -> Solution:
    order = jnp.argsort(-jnp.diagonal(gram), stable=True)
    back = jnp.argsort(order)
    h = hessian(lay.padded(lay.padded(gram[order][:, order]).T), damping)
    inverse = jnp.sum(jnp.square(h.factor), axis=0)[lay.place][back]
    exact = _outliers(w, inverse, how.rounding, run, outliers)
    coded = w if exact is None else jnp.where(exact, 0, w)
    scales = run_scales(coded, jnp.diagonal(h.matrix)[lay.place][back], how.rounding, run)
    group = lay.padded(jnp.asarray(group_of(w.shape[0], how.rounding.group, run))[order])
    apart = None if exact is None else exact[order]
    weight, codes, _ = _swept(w[order], h.factor, lay, how, Fixed(scales, group), apart)
    weight = weight.astype(w.dtype)
    inner = h._replace(gram=h.gram[lay.place][:, lay.place])
    error = output_error(inner, w[order], weight)
    return Solution(weight[back], exact, h.damping, error, codes[back], *scales)


def _outliers(w: jax.Array, inverse: jax.Array, rounding: Rounding, run: int, count: int) -> Any:
    """The `count` weights that it helps most to keep beside the codes; None if none.

    With `e_c = (w_c - q_c)**2 / [H^-1]_cc` and q the nearest codes, it helps by `e_c`, and in the
    case of the largest magnitude of a group by all that the group loses without it.
    """
    if not count:
        return None
    wide = w.astype(jnp.float32)
    unit = unit_scale(jnp.max(jnp.abs(wide)))[1]  # so that no square overflows
    group = group_of(w.shape[0], rounding.group, run)
    groups = int(group[-1]) + 1
    places = jnp.arange(w.shape[0])[:, None]

    def error(x: jax.Array) -> jax.Array:
        gap = x.astype(jnp.float32) - nearest(x, 1 / inverse, rounding, run)[1]
        return jnp.square(gap * unit) / inverse[:, None]

    sums = lambda x: jax.ops.segment_sum(x, group, groups, indices_are_sorted=True)[group]
    most = lambda x: jax.ops.segment_max(x, group, groups, indices_are_sorted=True)[group]
    top = jnp.abs(wide) == most(jnp.abs(wide))
    top = top & (places == -most(jnp.where(top, -places, -w.shape[0])))  # the first of equal ones
    own = error(w)
    gain = jnp.where(top, jnp.maximum(own, sums(own) - sums(error(jnp.where(top, 0, w)))), own)
    return top_mask(gain, count)


def nearest(
    w: jax.Array, weights: jax.Array, rounding: Rounding, run: int
) -> tuple[jax.Array, jax.Array, Scales]:
    """Plain rounding of `[K, N]`: codes, values as they are stored, float32, and scales.

    `weights` `[K]` are those of the errors by which narrower ranges are weighed.
    """
    spec, group = rounding.spec, rounding.group
    assert spec is not None
    scales = run_scales(w, weights, rounding, run)
    runs = lambda x: x if group is None else x.reshape(-1, run, x.shape[-1])
    rows = lambda x: x if group is None else x.reshape(-1, -(-run // group), x.shape[-1])
    mine = jax.tree.map(rows, scales)
    codes = codes_of(runs(w), mine, spec, group)
    values = rounded(values_of(codes, mine, spec, group), w.dtype).astype(jnp.float32)
    return codes.reshape(w.shape), values.reshape(w.shape), scales


def _swept(
    w: jax.Array, factor: jax.Array, lay: Frame, how: Sweep, fixed: Fixed | None, exact: Any
) -> tuple[jax.Array, jax.Array, Scales]:
    x = lay.padded(w.astype(jnp.float32))
    counts = jnp.zeros(x.shape[0] // how.block, jnp.int32)  # nothing is chosen
    apart = None if exact is None else lay.padded(exact)
    weight, _, codes, scales = sweep(x, factor, jnp.asarray(lay.real), counts, how, fixed, apart)
    return weight[lay.place], codes[lay.place], scales


def group_of(inputs: int, group: int | None, run: int) -> np.ndarray:
    """The group of each input, int32."""
    at = np.arange(inputs)
    if group is None:
        return np.zeros(inputs, np.int32)
    return (at // run * -(-run // group) + at % run // group).astype(np.int32)


def run_scales(w: jax.Array, weights: jax.Array, rounding: Rounding, run: int) -> Scales:
    """The scales `[groups, N]` of weights `[K, N]` as they are, errors weighed by input `[K]`."""
    spec, group = rounding.spec, rounding.group
    assert spec is not None
    if group is None:
        return searched_scales(w, weights[:, None], spec, None, rounding.tries)
    runs = w.reshape(-1, run, w.shape[-1])
    scales = searched_scales(runs, weights.reshape(-1, run, 1), spec, group, rounding.tries)
    return jax.tree.map(lambda y: y.reshape(-1, w.shape[-1]), scales)
