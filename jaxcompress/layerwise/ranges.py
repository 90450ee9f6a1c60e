"""The scales of groups: those that a quantization takes, or narrower ones, weighed by an error."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.arrays.ranges import group_sums
from jaxcompress.arrays.scheme import Scheme

if TYPE_CHECKING:
    from jaxcompress.quantization.spec import Quantize

# The narrowest range that is tried, as a share of the whole.
_NARROWEST = 0.3


class Scales(NamedTuple):
    """Scales and zero points, one entry a group; without quantization None."""

    scale: Any = None
    zero_point: Any = None


def _scheme(spec: Quantize, group: int | None) -> Scheme:
    along_rows = dataclasses.replace(spec, axis=(-2,)).scheme
    return dataclasses.replace(along_rows, group_size=group)


def plain_scales(w: jax.Array, spec: Quantize, group: int | None) -> Scales:
    """The scales that `Quantize` takes along the rows of `[..., K, N]`."""
    return Scales(*_scheme(spec, group).scales(w))


def codes_of(w: jax.Array, scales: Scales, spec: Quantize, group: int | None) -> jax.Array:
    """The nearest codes along the rows of `[..., K, N]`."""
    return _scheme(spec, group).codes(w, *scales)


def values_of(codes: jax.Array, scales: Scales, spec: Quantize, group: int | None) -> jax.Array:
    """What codes are restored as, float32."""
    return _scheme(spec, group).values(codes, *scales, jnp.float32)


def searched_scales(
    w: jax.Array, weights: jax.Array, spec: Quantize, group: int | None, tries: int
) -> Scales:
    """For each group the range, of some that are narrower and narrower, of the least error.

    The error is `sum_i weights_i (w_i - w_hat_i)**2` over the weights of the group, what lies
    beyond the range being clipped. Tried are shares `1 - (1 - 0.3) j / tries` of the plain range,
    `j = 0 .. tries`; of equal ones the widest is taken, so that no group is worse off than with the
    plain scales.

    Args:
      w: `[..., K, N]`, rows share scales.
      weights: `[..., K, 1]` or `[..., K, N]`, not negative.
      spec: the quantization.
      group: rows in a group, or None: all.
      tries: how many narrower ranges are tried; 0: none.
    """
    if not tries:
        return plain_scales(w, spec, group)
    scheme = _scheme(spec, group)
    w32 = w.astype(jnp.float32)

    def attempt(share: Any) -> tuple[jax.Array, Scales]:
        scales = plain_scales((w32 * share).astype(w.dtype), spec, group)
        gap = w32 - values_of(codes_of(w, scales, spec, group), scales, spec, group)
        return group_sums(weights * gap * gap, scheme), scales

    def step(j: Any, best: tuple[jax.Array, Scales]) -> tuple[jax.Array, Scales]:
        error, scales = attempt(1 - (1 - _NARROWEST) * j / tries)
        better = error < best[0]  # false for NaN
        pick = lambda new, old: jnp.where(better, new, old)
        return pick(error, best[0]), jax.tree.map(pick, scales, best[1])

    return lax.fori_loop(1, tries + 1, step, attempt(jnp.float32(1.0)))[1]
