"""How many weights each leaf keeps when a whole tree is to have one sparsity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.errors import SpecError
from jaxcompress.numerics import unit_scale
from jaxcompress.pruning.select import kept_count

Shape = tuple[int, ...]


def uniform(shapes: Sequence[Shape], sparsity: float) -> list[int]:
    """Every leaf gets the same sparsity.

    Examples:
      >>> uniform([(4, 5), (10,)], 0.5)
      [10, 5]
    """
    return [kept_count(math.prod(shape), sparsity) for shape in shapes]


def erk(shapes: Sequence[Shape], sparsity: float) -> list[int]:
    """Erdos-Renyi-Kernel: small kernels are pruned less than large ones.

    The density of a kernel of shape `(d_1, ..., d_m)` is `min(1, eps (d_1 + ... + d_m) / (d_1 ...
    d_m))`, with the one `eps` for which `round(N (1 - sparsity))` of all N weights stay: exactly,
    by the largest remainders.

    References:
      Mocanu et al., *Scalable Training of Artificial Neural Networks with Adaptive Sparse
      Connectivity Inspired by Network Science*, 2018; Evci et al., *Rigging the Lottery: Making
      All Tickets Winners*, 2020 (kernels).

    Examples:
      >>> erk([(100, 100), (100, 10)], 0.9)
      [710, 390]
    """
    sizes = [math.prod(shape) for shape in shapes]
    budget = kept_count(sum(sizes), sparsity)
    raw = [float(sum(shape)) if size else 0.0 for shape, size in zip(shapes, sizes)]
    full = [size == 0 for size in sizes]
    while True:
        # Kernels that would keep more than they have keep all; the others share what is left.
        left = budget - sum(n for n, f in zip(sizes, full) if f)
        total = sum(r for r, f in zip(raw, full) if not f)
        shares = [
            float(n) if f else left * r / total if total else 0.0
            for n, f, r in zip(sizes, full, raw)
        ]
        over = [not f and share > n for share, n, f in zip(shares, sizes, full)]
        if not any(over):
            break
        full = [f or o for f, o in zip(full, over)]
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for i in by_remainder[: budget - sum(counts)]:
        counts[i] += 1
    return counts


def lamp(scores: jax.Array, signed: bool = False) -> jax.Array:
    """Layer-adaptive magnitudes: scores of one weight that compare between weights.

    `lamp_u = s_u**2 / sum_{v: s_v >= s_u} s_v**2`, so that the largest of each weight has 1 and
    no weight is removed as a whole. Within a weight the order is that of the scores; of equal ones,
    that of the lowest index counts as the larger.

    Args:
      scores: of one weight; magnitudes count, unless `signed`: then those below zero give
        minus infinity.
      signed: rank by value rather than by magnitude.

    Returns:
      float32 in the shape of the scores.

    References:
      Lee et al., *Layer-Adaptive Sparsity for the Magnitude-Based Pruning*, 2021.

    Examples:
      >>> import jax.numpy as jnp
      >>> tuple(round(float(x), 4) for x in lamp(jnp.array([1.0, -2.0, 3.0])))
      (0.0714, 0.3077, 1.0)
    """
    if not scores.size:
        return scores.astype(jnp.float32)
    x = scores.astype(jnp.float32).reshape(-1)
    magnitude = jnp.maximum(x, 0) if signed else jnp.abs(x)
    magnitude = magnitude * unit_scale(jnp.max(magnitude))[1]
    # Ties by the lowest index: of equals it comes last, and so has the largest share.
    order = jnp.argsort(magnitude[::-1], stable=True)
    squares = jnp.square(magnitude[::-1][order])
    above = jnp.cumsum(squares[::-1])[::-1]
    share = jnp.where(above > 0, squares / jnp.where(above > 0, above, 1), 0)
    share = lax.cummax(share)  # against the rounding of the sum, which could change the order
    out = jnp.zeros_like(share).at[order].set(share)[::-1]
    if signed:
        out = jnp.where(x < 0, -jnp.inf, out)
    return out.reshape(scores.shape)


ALLOCATIONS: dict[str, Callable[[Sequence[Shape], float], list[int]]] = {
    "uniform": uniform,
    "erk": erk,
}
_NAMES = (*ALLOCATIONS, "lamp")


def check_allocation(name: str) -> None:
    """Refuses a name that is none of `uniform`, `erk` and `lamp`.

    Raises:
      SpecError: naming them.
    """
    if name not in _NAMES:
        raise SpecError(f"allocation={name!r}: write one of {', '.join(_NAMES)}")
