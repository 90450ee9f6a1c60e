"""Pruned weights that live on: the params are the masked image of a dense copy in the state."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxcompress.errors import SpecError
from jaxcompress.pruning.algorithms.base import Algorithm, Moment, check_share, masked, where_finite
from jaxcompress.pruning.choice import Choice


@dataclasses.dataclass(frozen=True)
class _StraightThrough(Algorithm):
    dense: ClassVar[bool] = True
    apart: ClassVar[bool] = True

    def scores(self, params: Sequence[jax.Array]) -> list[jax.Array]:
        return list(params)

    def gradients(self, grads: Any, weights: Any, masks: Any, memory: Any) -> list[Any]:
        return list(grads)


def straight_through(*, scope: str = "local", allocation: str = "uniform") -> Algorithm:
    """Masks by magnitude, through which the gradient passes straight to all weights.

    Forward `w = m theta`, backward `d theta = d w`, so that a pruned weight goes on training and
    may come back. The dense theta is kept in the state, and the wrapped optimizer trains it; the
    params are `m theta`, to the rounding of one addition.

    Args:
      scope: see `magnitude`.
      allocation: see `magnitude`.

    References:
      Bengio, Leonard and Courville, *Estimating or Propagating Gradients Through Stochastic
      Neurons for Conditional Computation*, 2013; Lin et al., *Dynamic Model Pruning with
      Feedback*, 2020.

    Examples:
      >>> import optax, jaxcompress as jc
      >>> tx = jc.sparsify(
      ...     optax.adam(1e-3), jc.pruning.straight_through(), jc.pruning.periodic(0.9, every=16),
      ...     {"**/kernel": "unstructured"},
      ... )
    """
    return _StraightThrough(scope, allocation)


@dataclasses.dataclass(frozen=True)
class _TopKast(_StraightThrough):
    backward: float
    l2: float

    apart: ClassVar[bool] = False  # the larger set has a budget of its own

    def init(self, weights: Sequence[jax.Array]) -> Any:
        return [jnp.ones_like(w, dtype=bool) for w in weights]

    def choose(self, choice: Choice, moment: Moment, memory: Any) -> tuple[list[jax.Array], Any]:
        masks, _ = super().choose(choice, moment, memory)
        wider = choice.counts((self.backward,), lambda count: count)
        more = [jnp.maximum(jnp.asarray(a, jnp.uint32), b) for a, b in zip(wider, moment.counts)]
        scores = choice.pooled(moment.weights)
        return masks, choice.spread(choice.take(scores, more))

    def gradients(self, grads: Any, weights: Any, masks: Any, memory: Any) -> list[Any]:
        out = []
        for g, w, m, wide in zip(grads, weights, masks, memory):
            if g is not None and self.l2:
                density = jnp.maximum(jnp.mean(m, dtype=jnp.float32), 1 / max(1, m.size))
                pull = self.l2 * w.astype(jnp.float32) * jnp.where(m, 1.0, 1 / density)
                g = (g.astype(jnp.float32) + pull).astype(g.dtype)
            out.append(masked(wide, g))
        return out

    def moved(self, updates: Any, masks: Any, memory: Any, step: Any, real: Any) -> list[Any]:
        # Momentum and decay would go on moving what is outside of B.
        return [masked(wide, u) for wide, u in zip(memory, updates)]


def top_kast(
    *,
    backward: float,
    l2: float = 0.0,
    scope: str = "local",
    allocation: str = "uniform",
) -> Algorithm:
    """Top-KAST: a sparse forward pass, and gradients for a larger set of weights.

    Forward, the largest `|theta|` up to the sparsity of the schedule, A. Gradients, and so updates,
    are for the larger set B of the sparsity `backward`; of the weights in B but not in A, an l2
    penalty stronger by the inverse of the density pulls the idle ones back:
    `l2 (theta_A + theta_{B - A} / density)` is added to the gradient.

    Args:
      backward: the sparsity of B, below that of the schedule.
      l2: the strength of the penalty.
      scope: see `magnitude`.
      allocation: see `magnitude`.

    Raises:
      SpecError: for a sparsity outside of 0 to 1, or a negative l2.

    References:
      Jayakumar et al., *Top-KAST: Top-K Always Sparse Training*, 2020.

    Examples:
      >>> top_kast(backward=0.8).backward
      0.8
    """
    check_share("backward", backward)
    if not l2 >= 0:
        raise SpecError(f"l2={l2!r}: write a strength of at least 0, such as 1e-4")
    return _TopKast(scope, allocation, backward, l2)


@dataclasses.dataclass(frozen=True)
class _Movement(Algorithm):
    dense: ClassVar[bool] = True
    apart: ClassVar[bool] = True
    signed: ClassVar[bool] = True

    def init(self, weights: Sequence[jax.Array]) -> Any:
        return [jnp.zeros_like(w, dtype=jnp.float32) for w in weights]

    def follow(self, memory: Any, weights: Any, grads: Any, masks: Any, step: Any) -> Any:
        f32 = jnp.float32
        return [
            where_finite(s - g.astype(f32) * w.astype(f32), s)
            for s, g, w in zip(memory, grads, weights)
        ]

    def choose(self, choice: Choice, moment: Moment, memory: Any) -> tuple[list[jax.Array], Any]:
        scores = choice.pooled(memory, signed=True)
        return choice.spread(choice.take(scores, moment.counts, signed=True)), memory

    def moved(self, updates: Any, masks: Any, memory: Any, step: Any, real: Any) -> list[Any]:
        # Momentum and decay would go on moving what is pruned.
        return [masked(m, u) for m, u in zip(masks, updates)]


def movement(*, scope: str = "local", allocation: str = "uniform") -> Algorithm:
    """Movement pruning: weights that move away from zero stay, those that shrink go.

    `S <- S - w dL/dw'` at each update, with `w' = m w`, and the largest S stay. Only weights in the
    mask are trained; a pruned one keeps its value in the state, goes on collecting S, and may come
    back with that value.

    Args:
      scope: see `magnitude`; the paper found a global threshold no better.
      allocation: see `magnitude`.

    References:
      Sanh, Wolf and Rush, *Movement Pruning: Adaptive Sparsity by Fine-Tuning*, 2020.

    Examples:
      >>> import optax, jaxcompress as jc
      >>> tx = jc.sparsify(
      ...     optax.adam(1e-3), jc.pruning.movement(),
      ...     jc.pruning.cubic_schedule(0.9, begin=100, end=5_000), {"**/kernel": "unstructured"},
      ... )
    """
    return _Movement(scope, allocation)


@dataclasses.dataclass(frozen=True)
class _SoftMovement(_Movement):
    threshold: float
    rate: float
    penalty: float

    def follow(self, memory: Any, weights: Any, grads: Any, masks: Any, step: Any) -> Any:
        moved = super().follow([jnp.zeros_like(s) for s in memory], weights, grads, masks, step)
        slope = [jax.nn.sigmoid(s) * jax.nn.sigmoid(-s) for s in memory]
        return [
            s + self.rate * (d - self.penalty / max(1, s.size) * p)
            for s, d, p in zip(memory, moved, slope)
        ]

    def choose(self, choice: Choice, moment: Moment, memory: Any) -> tuple[list[jax.Array], Any]:
        scores = choice.pooled(memory, signed=True)
        return choice.spread([x > self.threshold for x in scores]), memory

    def check(self, choice: Choice) -> None:
        for site in choice.sites:
            if site.pattern.m:
                raise SpecError(
                    f"{site.path}: a threshold keeps no {site.pattern.kind} pattern: write "
                    "movement(), or 'unstructured'"
                )


def soft_movement(*, threshold: float = -0.1, rate: float = 1.0, penalty: float = 1.0) -> Algorithm:
    """Soft movement pruning: a threshold on the movement instead of a share of the weights.

    `S <- S - rate (w dL/dw' + penalty / n sigmoid'(S))` from S = 0, and weights with
    `S > threshold` stay. How many these are follows from the penalty; the schedule says only when
    masks are chosen.

    Args:
      threshold: tau; below zero, so that all weights stay at first.
      rate: the learning rate of S.
      penalty: the strength of `mean(sigmoid(S))`, which pushes all S down.

    References:
      Sanh, Wolf and Rush, *Movement Pruning: Adaptive Sparsity by Fine-Tuning*, 2020.

    Examples:
      >>> soft_movement(penalty=10.0).penalty
      10.0
    """
    return _SoftMovement("local", "uniform", threshold, rate, penalty)
