"""`Hashed`: a kernel as few values that a hash spreads over it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.arrays.hashed import HashedArray, bucket_and_sign
from jaxcompress.errors import SpecError
from jaxcompress.numerics import rounded, unit_scale
from jaxcompress.specs import LeafContext, Plan, Spec, is_count, is_number, register_spec

INITS = ("least_squares", "norm")


@register_spec("hashed")
@dataclasses.dataclass(frozen=True, repr=False)
class Hashed(Spec):
    """Lets weights share values at random: `w[i] = xi(i) * v[h(i)]` with a hash h and signs xi.

    What is stored is v alone, and the seed. The values start as the signed mean of their weights,
    `v_k = mean(xi(i) w_i : h(i) = k)`, the exact minimizer of `sum_i (w_i - xi(i) v[h(i)])**2`.
    Of weights that have nothing in common, that keeps one part in `compression` of the squared
    norm: it is a start for training and no compression of what is trained already.

    Args:
      compression: weights per value; `K = max(1, round(n / compression))`.
      buckets: in place of it, the number of values K of one weight.
      seed: of the hash; all weights of a stack, and all leaves of one shape, are spread alike.
      init: `least_squares`, or `norm`: the same values times one factor, so that the norm of the
        weights stays what an initializer made it (if any is left), for training from scratch.

    Raises:
      SpecError: unless exactly one of `compression` and `buckets` is given and possible.

    References:
      Chen, Wilson, Tyree, Weinberger and Chen, *Compressing Neural Networks with the Hashing
      Trick*, 2015.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> Hashed(8)(jnp.ones((32, 16)))
      HashedArray(float32[32, 16], hashed 64)
    """

    compression: float | None = None
    _: dataclasses.KW_ONLY
    buckets: int | None = None
    seed: int = 0
    init: str = "least_squares"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.compression is None) == (self.buckets is None):
            raise SpecError("write one of compression and buckets: Hashed(8) or Hashed(buckets=64)")
        if self.compression is not None and not is_number(self.compression, 1):
            raise SpecError(f"compression={self.compression!r}: write a number of at least 1")
        if self.buckets is not None and not is_count(self.buckets, 1, 2**31):
            raise SpecError(f"buckets={self.buckets!r}: write a whole number of at least 1")
        if not is_count(self.seed, 0, 2**32 - 1):
            raise SpecError(f"seed={self.seed!r}: write a whole number from 0 to 2**32 - 1")
        if self.init not in INITS:
            raise SpecError(f"init={self.init!r}: write one of {', '.join(INITS)}")

    def plan(self, leaf: Any, context: LeafContext) -> Plan:
        """Settles the number of values; a scalar is refused."""
        if leaf.ndim == 0:
            raise SpecError(f"{context.path}: a scalar shares nothing; leave it dense")
        batch = context.axes.batch_ndim(leaf.ndim)
        n = math.prod(leaf.shape[batch:])
        if n > 2**32:
            raise SpecError(
                f"{context.path}: a weight of shape {leaf.shape[batch:]} has more places than 32 "
                "bits number; split it"
            )
        if self.buckets is not None:
            if self.buckets > n:
                raise SpecError(
                    f"{context.path}: {self.buckets} buckets for {n} weights; write at most {n}"
                )
            return _HashedPlan(self.buckets, self.seed, self.init, batch)
        assert self.compression is not None
        return _HashedPlan(max(1, round(n / self.compression)), self.seed, self.init, batch)


@dataclasses.dataclass(frozen=True)
class _HashedPlan(Plan):
    buckets: int
    seed: int
    init: str
    batch_ndim: int

    def apply(self, leaf: jax.Array, key: jax.Array | None) -> HashedArray:
        one = lambda w: hashed_values(w, self.buckets, seed=self.seed, init=self.init)
        for _ in range(self.batch_ndim):
            one = jax.vmap(one)
        return HashedArray.of(one(leaf), leaf.shape[self.batch_ndim :], seed=self.seed)


def hashed_values(
    w: jax.Array, buckets: int, *, seed: int = 0, init: str = "least_squares"
) -> jax.Array:
    """The values of a hashed weight that are nearest to a dense one.

    Args:
      w: one weight, any shape and float dtype; sums are taken in float32.
      buckets: the number of values; static.
      seed: of the hash; static.
      init: as in `Hashed`; static.

    Returns:
      `[buckets]` in the dtype of `w`; 0 for a bucket that no weight falls into.

    Examples:
      >>> import jax.numpy as jnp
      >>> hashed_values(jnp.array([[1.0, -1.0], [4.0, 7.0]]), 3).tolist()
      [0.0, 1.0, 4.0]
    """
    flat = w.reshape(-1).astype(jnp.float32)
    # The sum of the largest floats overflows; all steps commute with a power of two.
    scale, inverse = unit_scale(jnp.max(jnp.abs(flat), initial=0))
    flat = flat * inverse
    bucket, sign = bucket_and_sign(jnp.arange(flat.size, dtype=jnp.uint32), buckets, seed)
    zeros = jnp.zeros(buckets, jnp.float32)
    counts = zeros.at[bucket].add(1.0)
    values = zeros.at[bucket].add(flat * sign) / jnp.maximum(counts, 1)
    if init == "norm":
        left = jnp.sum(counts * values**2)
        factor = jnp.sqrt(jnp.sum(flat**2) / jnp.where(left > 0, left, 1))
        values = values * jnp.where(left > 0, factor, 1)
    return rounded(values * scale, w.dtype)
