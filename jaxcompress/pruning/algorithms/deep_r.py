"""Deep rewiring: a random walk of connections that keep their sign."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.errors import SpecError
from jaxcompress.pruning.algorithms.base import Algorithm, Moment, draws
from jaxcompress.pruning.algorithms.regrow import Regrow, active_units
from jaxcompress.pruning.choice import Choice


@dataclasses.dataclass(frozen=True)
class _DeepR(Regrow):
    rate: float
    l1: float
    temperature: float

    def check(self, choice: Choice) -> None:
        super().check(choice)
        for site in choice.sites:
            if site.pattern.m or not site.pattern.single:
                raise SpecError(
                    f"{site.path}: deep rewiring knows single weights and their signs: write "
                    f"'unstructured' instead of {site.pattern.kind!r}, or another algorithm"
                )

    def init(self, weights: Sequence[jax.Array]) -> Any:
        """Whether the sign of each connection is negative."""
        return [jnp.signbit(w) for w in weights]

    def choose(self, choice: Choice, moment: Moment, memory: Any) -> tuple[list[jax.Array], Any]:
        active = active_units(choice, moment.masks)
        gone = [
            on & ~moment.first & _crossed(w, minus)
            for on, w, minus in zip(active, moment.weights, memory)
        ]
        left = [on & ~moment.first & ~x for on, x in zip(active, gone)]
        # Where a schedule tightens, the smallest that stay go first.
        first, then = self.starts(moment.weights, moment), draws(left, moment, self.seed)
        scores = [
            jnp.where(stays, 1.0 + jnp.abs(w.astype(jnp.float32)), jnp.where(moment.first, a, b))
            for stays, w, a, b in zip(left, moment.weights, first, then)
        ]
        if self.initial == "magnitude":  # which may lie above 1; before the first choice none stays
            scores = [
                jnp.where(moment.first, jnp.abs(w.astype(jnp.float32)), s)
                for w, s in zip(moment.weights, scores)
            ]
        # What has just crossed zero comes again only where there is nothing else.
        scores = [jnp.where(x, s - 2.0, s) for x, s in zip(gone, scores)]
        masks = choice.take(scores, moment.counts, signed=True)
        signs = draws(left, moment, self.seed + 2)
        kept = [jnp.signbit(w) for w in moment.weights]
        new = [
            jnp.where(stays, minus, jnp.where(x, now, u < 0.5))
            for stays, minus, x, now, u in zip(left, memory, gone, kept, signs)
        ]
        return masks, [jnp.where(moment.first, a, b) for a, b in zip(kept, new)]

    def moved(self, updates: Any, masks: Any, memory: Any, step: Any, real: Any) -> list[Any]:
        spread = real * (2 * self.rate * self.temperature) ** 0.5
        pulled = real * self.rate * self.l1
        key = jax.random.fold_in(jax.random.key(self.seed + 3), step)
        out = []
        for i, (u, minus) in enumerate(zip(updates, memory)):
            pull = jnp.where(minus, pulled, -pulled)
            noise = spread * jax.random.normal(jax.random.fold_in(key, i), minus.shape)
            out.append(None if u is None else u + (pull + noise).astype(u.dtype))
        return out


def _crossed(w: jax.Array, minus: jax.Array) -> jax.Array:
    """Whether a weight has the other sign now; zero has either."""
    return jnp.where(minus, w > 0, w < 0)


def deep_r(
    learning_rate: float,
    *,
    l1: float = 1e-4,
    temperature: float = 0.0,
    initial: str = "random",
    allocation: str = "erk",
    seed: int = 0,
) -> Algorithm:
    """Deep rewiring: a connection that crosses zero goes, and a random one comes.

    Each connection has a sign for as long as it lives. To the update of the wrapped optimizer is
    added `-eta l1 sign + sqrt(2 eta T) N(0, 1)`. At a choice, connections whose weights have
    crossed zero go, and as many random ones come, at zero and with random signs. Choose at every
    update, `periodic(0.9, every=1)`, as the paper does, or less often.

    Args:
      learning_rate: eta, that of the wrapped optimizer.
      l1: the pull towards zero.
      temperature: T, of the random walk.
      initial: the first masks: `random`, or by `magnitude`.
      allocation: how the budget is divided among leaves, see `magnitude`.
      seed: of all draws.

    Raises:
      SpecError: for a negative number.

    References:
      Bellec et al., *Deep Rewiring: Training Very Sparse Deep Networks*, 2018.

    Examples:
      >>> import optax, jaxcompress as jc
      >>> tx = jc.sparsify(
      ...     optax.sgd(0.05), jc.pruning.deep_r(0.05, temperature=1e-6),
      ...     jc.pruning.periodic(0.9, every=1), {"**/kernel": "unstructured"},
      ... )
    """
    for name, value in {
        "learning_rate": learning_rate,
        "l1": l1,
        "temperature": temperature,
    }.items():
        if not isinstance(value, (int, float)) or not value >= 0:
            raise SpecError(f"{name}={value!r}: write a number of at least 0")
    return _DeepR("local", allocation, 0.0, None, initial, seed, learning_rate, l1, temperature)
