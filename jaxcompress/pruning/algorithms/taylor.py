"""Importance by the change of the loss, averaged while training goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxcompress.pruning.algorithms.base import Algorithm, Moment, check_share, where_finite
from jaxcompress.pruning.choice import Choice


@dataclasses.dataclass(frozen=True)
class _Taylor(Algorithm):
    decay: float

    apart: ClassVar[bool] = True

    def init(self, weights: Sequence[jax.Array]) -> Any:
        return [jnp.zeros_like(w, dtype=jnp.float32) for w in weights]

    def follow(self, memory: Any, weights: Any, grads: Any, masks: Any, step: Any) -> Any:
        f32, d = jnp.float32, self.decay
        return [
            where_finite(d * s + (1 - d) * jnp.abs(g.astype(f32) * w.astype(f32)), s)
            for s, g, w in zip(memory, grads, weights)
        ]

    def choose(self, choice: Choice, moment: Moment, memory: Any) -> tuple[list[jax.Array], Any]:
        return choice.spread(choice.take(choice.pooled(memory), moment.counts)), memory


def taylor(*, decay: float = 0.9, scope: str = "local", allocation: str = "uniform") -> Algorithm:
    """The weights that change the loss least go, to first order: `|w dL/dw|`.

    `S <- d S + (1 - d) |w g|` at each update.

    Args:
      decay: d; begin pruning only after some `1 / (1 - d)` updates.
      scope: see `magnitude`; these scores compare between leaves.
      allocation: see `magnitude`.

    References:
      Molchanov et al., *Pruning Convolutional Neural Networks for Resource Efficient Inference*,
      2016.

    Examples:
      >>> taylor(scope="global").decay
      0.9
    """
    check_share("decay", decay)
    return _Taylor(scope, allocation, decay)
