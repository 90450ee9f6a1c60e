"""Early-bird tickets: masks that have settled long before the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.errors import SpecError
from jaxcompress.specs import is_count


class EarlyBirdState(NamedTuple):
    """What an early bird remembers.

    Attributes:
      recent: the last masks, newest first, along a leading axis of each leaf.
      seen: how many masks there were, at most as many as are compared.
      distance: the largest of the newest mask to the others of the window; 1 before it is full.
      drawn: whether the ticket is drawn, bool.
    """

    recent: Any
    seen: jax.Array
    distance: jax.Array
    drawn: jax.Array


class EarlyBird(NamedTuple):
    """A pair of pure functions, as in optax.

    Attributes:
      init: `init(masks) -> state`, of masks that only count by their shapes.
      update: `update(masks, state) -> state`, once an epoch.
    """

    init: Callable[[Any], EarlyBirdState]
    update: Callable[[Any, EarlyBirdState], EarlyBirdState]


def mask_distance(a: Any, b: Any) -> jax.Array:
    """The normalized Hamming distance: the share of places at which two trees of masks differ.

    Args:
      a: a tree of bool masks; None and `optax.MaskedNode()` do not count.
      b: another of the same structure.

    Returns:
      float32, from 0 to 1; 0 for trees without masks.

    Raises:
      SpecError: for trees of different structures or shapes.

    References:
      You et al., *Drawing Early-Bird Tickets: Towards More Efficient Training of Deep Networks*,
      2020.

    Examples:
      >>> import jax.numpy as jnp
      >>> a, b = jnp.array([True, True, False, False]), jnp.array([True, False, False, False])
      >>> float(mask_distance({"w": a}, {"w": b}))
      0.25
    """
    kinds: list[Any] = [
        (jax.tree.structure(x), list(map(jnp.shape, jax.tree.leaves(x)))) for x in (a, b)
    ]
    if kinds[0] != kinds[1]:
        raise SpecError("the masks are of different trees: give two of the same params and rules")
    differ = [jnp.sum(x != y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))]
    size = sum(x.size for x in jax.tree.leaves(a))
    # Divided leaf by leaf: a count over a large model need not fit in 32 bits.
    return sum((x.astype(jnp.float32) / max(1, size) for x in differ), jnp.zeros(()))


def early_bird(window: int = 5, epsilon: float = 0.1) -> EarlyBird:
    """Watches masks of a training and tells when they have settled: then the ticket is drawn.

    It is drawn when the newest mask is within `epsilon` of each of the `window - 1` before it, in
    normalized Hamming distance. Masks are of any kind: of the weights' magnitudes, or of the
    scales of batch normalizations as in the paper, at the sparsity that is wanted.

    Args:
      window: how many masks are compared, the newest included.
      epsilon: the largest distance, from 0 to 1.

    Returns:
      Two pure functions, which also run inside a jitted or scanned loop.

    Raises:
      SpecError: for a window below 2, or an epsilon outside of 0 to 1.

    References:
      You et al., *Drawing Early-Bird Tickets: Towards More Efficient Training of Deep Networks*,
      2020.

    Examples:
      >>> import jax.numpy as jnp
      >>> bird = early_bird(window=2, epsilon=0.3)
      >>> masks = [jnp.arange(4) < n for n in (1, 3, 4)]
      >>> state, drawn = bird.init(masks[0]), []
      >>> for mask in masks:
      ...     state = bird.update(mask, state)
      ...     drawn.append(bool(state.drawn))
      >>> drawn
      [False, False, True]
    """
    if not is_count(window, 2):
        raise SpecError(f"window={window!r}: write a whole number of masks from 2 on")
    if not 0 <= epsilon <= 1:
        raise SpecError(f"epsilon={epsilon!r}: write a share of the mask from 0 to 1")

    def init(masks: Any) -> EarlyBirdState:
        recent = jax.tree.map(lambda m: jnp.zeros((window, *m.shape), bool), masks)
        return EarlyBirdState(recent, jnp.zeros((), jnp.int32), jnp.ones(()), jnp.asarray(False))

    def update(masks: Any, state: EarlyBirdState) -> EarlyBirdState:
        recent = jax.tree.map(
            lambda new, old: jnp.concatenate([new[None], old[:-1]]), masks, state.recent
        )
        earlier = jax.tree.map(lambda m: m[1:], recent)
        far = lambda other: mask_distance(masks, other)
        # Trees without masks have nothing to map over, and no distance.
        distance = jnp.max(jax.vmap(far)(earlier)) if jax.tree.leaves(earlier) else far(earlier)
        seen = jnp.minimum(state.seen + 1, window)
        distance = jnp.where(seen < window, 1.0, distance)
        return EarlyBirdState(recent, seen, distance, (seen >= window) & (distance <= epsilon))

    return EarlyBird(init, update)
