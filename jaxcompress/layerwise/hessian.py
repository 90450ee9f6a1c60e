"""The Hessian of a layer's squared error, from the Gram matrix of its inputs, factored safely."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.errors import SpecError
from jaxcompress.layerwise.factor import cholesky, upper_inverse
from jaxcompress.numerics import unit_scale
from jaxcompress.specs import is_number

# Where none was asked for and it takes some, and where the search ends: a damping of K times the
# mean makes any matrix dominated by its diagonal.
_LEAST, _MOST = 1e-6, 1e6


class Hessian(NamedTuple):
    """`H = X' X` of K inputs, ready for use.

    Attributes:
      gram: float32 `[K, K]`, divided by `scale`, zero for dead inputs.
      matrix: `gram + damping mean(diag) I`, with ones on the diagonal for dead inputs.
      factor: upper triangular U with `U' U = matrix^-1`.
      dead: bool `[K]`, inputs that were always zero.
      scale: a power of two near the largest diagonal entry.
      damping: the share of the mean diagonal that was added.
    """

    gram: jax.Array
    matrix: jax.Array
    factor: jax.Array
    dead: jax.Array
    scale: jax.Array
    damping: jax.Array


class Normal(NamedTuple):
    """A Gram matrix brought near 1: `gram`, `dead` and `scale` as in `Hessian`."""

    gram: jax.Array
    dead: jax.Array
    scale: jax.Array


def normalized(gram: jax.Array) -> Normal:
    """A Gram matrix in float32, its largest diagonal entry near 1, zero for dead inputs."""
    gram = gram.astype(jnp.float32)
    # Powers of two: exact, and neither the sums nor the squares of anything overflow.
    scale, inverse = unit_scale(jnp.max(jnp.diagonal(gram), initial=0.0))
    gram = gram * inverse
    diagonal = jnp.diagonal(gram)
    dead = diagonal <= 0
    gram = jnp.where(dead[:, None] | dead[None, :], 0.0, gram)
    return Normal(gram, dead, scale)


def hessian(gram: jax.Array, damping: float | jax.Array) -> Hessian:
    """Normalizes, damps and factors a Gram matrix.

    `H = gram + damping mean(diag(gram)) I`, the mean being over inputs that are not dead. The
    damping is the asked one or, where that is not enough for a factor that rounding errors do not
    spoil, ten times as much, and so on: until `[H^-1]_ii H_ii < 1 / (4 eps)` for all i. The
    largest of these products is the condition number, up to a factor of K**2, of H scaled to ones
    on its diagonal. The pivots of the Cholesky factor alone do not tell: all may be far from 0 and
    the inverse as large as you like.

    The factor of the inverse takes one Cholesky factor and no inverse: with the order of the inputs
    reversed, `H = R R'` for an upper triangular R, so that `H^-1 = R^-T R^-1` and `U = R^-1`.

    Args:
      gram: `[K, K]`, positive semi-definite up to rounding.
      damping: non-negative.

    Examples:
      >>> import jax.numpy as jnp
      >>> h = hessian(jnp.ones((2, 2)), damping=0.0)  # of rank one
      >>> bool(h.damping > 0), bool(jnp.isfinite(h.factor).all())
      (True, True)
    """
    gram, dead, scale = normalized(gram)
    diagonal = jnp.diagonal(gram)
    live = jnp.sum(~dead)
    mean = jnp.where(live > 0, jnp.sum(jnp.where(dead, 0.0, diagonal)) / jnp.maximum(live, 1), 1.0)
    base = gram + jnp.diag(dead.astype(jnp.float32))
    eye = jnp.eye(gram.shape[0], dtype=jnp.float32)

    def damped(damping: jax.Array) -> jax.Array:
        return base + damping * mean * eye

    def attempt(state: Any) -> Any:
        following, *_ = state
        matrix = damped(following)
        root = cholesky(matrix[::-1, ::-1])[::-1, ::-1]
        factor = upper_inverse(root)
        condition = jnp.sum(factor**2, axis=0) * jnp.diagonal(matrix)
        sound = jnp.all(condition < 1 / (4 * jnp.finfo(jnp.float32).eps))  # false for NaN
        return jnp.maximum(10 * following, _LEAST), following, factor, sound

    first = jnp.float32(damping)
    _, used, factor, _ = lax.while_loop(
        lambda state: ~state[3] & (state[0] < _MOST),
        attempt,
        (first, first, eye, jnp.asarray(False)),
    )
    return Hessian(gram, damped(used), factor, dead, scale, used)


class Solution(NamedTuple):
    """What a solver found for weights `[..., K, N]`.

    Attributes:
      weight: the new weights, in the dtype of the old, exactly zero where the mask is false.
      mask: bool, which weights stay.
      damping: float32 `[...]`, the share of the mean diagonal that was added to the Gram matrix:
        what was asked for, or more where that was too little.
      error: float32 `[...]`, `tr((w - w')' gram (w - w'))`, the squared error of the outputs summed
        over the inputs that were observed, without damping.
      codes: integer codes of the new weights `[..., K, N]` where they were quantized, or None.
      scale: the scales of the codes, `[..., K / group, N]`, or None.
      zero_point: the zero points of the codes in the shape of `scale`, or None.
    """

    weight: Any
    mask: Any
    damping: Any
    error: Any
    codes: Any = None
    scale: Any = None
    zero_point: Any = None


def output_error(h: Hessian | Normal, before: jax.Array, after: jax.Array) -> jax.Array:
    """`tr(d' gram d)` of the difference d of weights `[K, N]`, float32, and infinite if too large.

    The difference is brought near 1 before it is squared, so that nothing overflows on the way.
    """
    change = before.astype(jnp.float32) - after.astype(jnp.float32)
    scale, inverse = unit_scale(jnp.max(jnp.abs(change), initial=0.0))
    change = change * inverse
    product = jnp.matmul(h.gram, change, precision=lax.Precision.HIGHEST)
    return jnp.maximum(jnp.sum(change * product), 0.0) * scale * h.scale * scale


def check_shapes(w: Any, gram: Any, name: str) -> None:
    """Refuses what does not fit.

    Raises:
      SpecError: naming both shapes.
    """
    if w.ndim < 2 or tuple(gram.shape) != (*w.shape[:-1], w.shape[-2]):
        raise SpecError(
            f"{name}: weights {tuple(w.shape)} and a Gram matrix {tuple(gram.shape)} do not fit: "
            "write weights [..., K, N], inputs before outputs, and their gram [..., K, K]"
        )


def check_finite(gram: Any, name: str) -> None:
    """Refuses a Gram matrix that is NaN or infinite in float32, where it is concrete.

    Raises:
      SpecError: says how many entries are.
    """
    if isinstance(gram, jax.core.Tracer) or not gram.size:
        return
    with jax.ensure_compile_time_eval():  # also where a trace is under way
        bad = int(_count_bad(gram))
    if bad:
        raise SpecError(
            f"{name}: {bad} of {gram.size} entries of the Gram matrix are NaN or beyond float32; "
            "write the sum over inputs that are finite, divided by their number if they are huge"
        )


@jax.jit
def _count_bad(gram: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(gram.astype(jnp.float32)))


def check_damping(damping: Any) -> None:
    """Refuses a damping that is no number of at least 0.

    Raises:
      SpecError: says what to write.
    """
    if not is_number(damping, 0) or damping >= 1e6:
        raise SpecError(f"damping={damping!r}: write a share of the mean diagonal, such as 0.01")


def over_stack(solve: Any, *arrays: jax.Array) -> Solution:
    """Runs a solver of `[K, N]` over leading axes of arrays that end in two axes, one at a time.

    One after the other and not side by side, for the temporaries of one are large enough.
    """
    lead = arrays[0].shape[:-2]
    if not lead:
        return solve(*arrays)
    flat = [x.reshape(-1, *x.shape[len(lead) :]) for x in arrays]
    found = lax.map(lambda xs: solve(*xs), tuple(flat))
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found)


def unchanged(w: jax.Array) -> Solution:
    """The solution for weights that there are none of."""
    lead = w.shape[:-2]
    return Solution(w, jnp.zeros(w.shape, bool), jnp.zeros(lead), jnp.zeros(lead))
