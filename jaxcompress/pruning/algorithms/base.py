"""What decides, during training, which weights stay: the contract, and scores of weights alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.errors import SpecError
from jaxcompress.lowering import by_devices
from jaxcompress.pruning.choice import Choice, Counts, check_choice


class Moment(NamedTuple):
    """What an algorithm may look at when masks are chosen; lists have an entry a pruned leaf.

    Attributes:
      weights: the weights; where the algorithm keeps a dense copy, that copy.
      grads: the gradients of the loss at the sparse weights, also where they are masked.
      masks: the masks until now, all true before the first choice.
      counts: how many units shall stay, as `Choice.take` wants them.
      step: the number of the update, int32.
      first: whether these are the first masks.
      numbers: of the leaves, among all pruned ones.
    """

    weights: list[jax.Array]
    grads: list[jax.Array]
    masks: list[jax.Array]
    counts: Counts
    step: jax.Array
    first: jax.Array
    numbers: Sequence[int]


# Random numbers that are drawn at a time.
_DRAWN = 2**16


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """Which weights go, when it is settled how many: those of least score.

    A subclass defines `scores`, or `choose` where masks come about otherwise. What it has to
    remember lives in the optimizer state: `init` makes it, `follow` brings it up to date at
    each update.

    Attributes:
      scope: `local` compares within each weight, `global` among all that the rules name.
      allocation: how a local budget is divided, `uniform`, `erk` or `lamp`.
    """

    scope: str
    allocation: str

    # Whether pruned weights live on: the params are the masked image of a copy in the state.
    dense: ClassVar[bool] = False
    # Whether removed weights may come back, from zero.
    regrows: ClassVar[bool] = False
    # Whether scores are ranked by value rather than by magnitude.
    signed: ClassVar[bool] = False
    # Whether a local choice in one leaf looks at no other, nor at how a budget is divided. What is
    # remembered is then a list with an entry a leaf, or ().
    apart: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice(self.scope, self.allocation)

    def check(self, choice: Choice) -> None:
        """Refuses leaves that it cannot prune, with a `SpecError`."""

    def init(self, weights: Sequence[jax.Array]) -> Any:
        """What it remembers: a pytree of arrays."""
        return ()

    def follow(self, memory: Any, weights: Any, grads: Any, masks: Any, step: Any) -> Any:
        """The memory after one more gradient."""
        return memory

    def scores(self, params: Sequence[jax.Array]) -> list[jax.Array]:
        """A score for each weight of each leaf; its magnitude counts."""
        raise NotImplementedError

    def choose(self, choice: Choice, moment: Moment, memory: Any) -> tuple[list[jax.Array], Any]:
        """The masks from now on, and the memory."""
        scores = choice.pooled(self.scores(moment.weights), self.signed)
        return choice.spread(choice.take(scores, moment.counts, self.signed)), memory

    def gradients(self, grads: Any, weights: Any, masks: Any, memory: Any) -> list[Any]:
        """What the wrapped optimizer is given: the gradients of the sparse network."""
        return [masked(m, g) for m, g in zip(masks, grads)]

    def moved(self, updates: Any, masks: Any, memory: Any, step: Any, real: Any) -> list[Any]:
        """What becomes of the optimizer's updates; `real` is 0 while it accumulates, else 1."""
        return list(updates)


def masked(mask: jax.Array, grad: Any) -> Any:
    """A gradient where the mask is true, else zero; None stays None."""
    return None if grad is None else jnp.where(mask, grad, jnp.zeros((), grad.dtype))


def where_finite(new: jax.Array, old: jax.Array) -> jax.Array:
    """What is remembered, without the gradients that were NaN or infinite."""
    return jnp.where(jnp.isfinite(new), new, old)


def draws(like: Sequence[jax.Array], moment: Moment, seed: int) -> list[jax.Array]:
    """Uniform multiples of 2**-16 below 1 in the shapes of arrays, new at each step and leaf."""
    key = jax.random.fold_in(jax.random.key(seed), moment.step)
    keys = [jax.random.fold_in(key, i) for i in moment.numbers]
    return [_uniform(k, x.shape) for k, x in zip(keys, like)]


def _uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Some rows at a time, for a draw takes five times the memory of what it makes."""
    rest = shape[1:]
    rows = max(1, _DRAWN // max(1, math.prod(rest)))
    if shape[0] <= rows:
        return _sixteen_bits(key, shape)
    some = lambda k: _sixteen_bits(jax.random.wrap_key_data(k), (rows, *rest))
    keys = jax.random.key_data(jax.random.split(key, -(-shape[0] // rows)))
    drawn = by_devices(jax.vmap(some), lambda k: lax.map(some, k))(keys)
    return drawn.reshape(-1, *rest)[: shape[0]]


def _sixteen_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Two numbers of each 32 bits, which are most of the time that a choice takes."""
    bits = jax.random.bits(key, (-(-shape[0] // 2), *shape[1:]))
    both = jnp.concatenate([bits & 0xFFFF, bits >> 16])[: shape[0]]
    return both.astype(jnp.float32) * 2.0**-16


def check_share(name: str, value: Any) -> None:
    """Refuses what is no number from 0 to 1.

    Raises:
      SpecError: naming the argument.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
        raise SpecError(f"{name}={value!r}: write a share from 0 to 1, such as 0.3")


@dataclasses.dataclass(frozen=True)
class _Magnitude(Algorithm):
    apart: ClassVar[bool] = True

    def scores(self, params: Sequence[jax.Array]) -> list[jax.Array]:
        return list(params)


def magnitude(*, scope: str = "local", allocation: str = "uniform") -> Algorithm:
    """The smallest `|w|` go.

    With `cubic_schedule` this is gradual magnitude pruning; with `cyclic_schedule`, AC/DC.

    Args:
      scope: `local` compares the weights within each leaf (of a stack, within each layer);
        `global` compares all weights that the rules name, so that leaves of small weights become
        sparser than others.
      allocation: of a local budget: `uniform`, the same sparsity for each leaf; `erk`, by
        which small kernels are pruned less (see `erk`); or `lamp`, one threshold on magnitudes
        relative to all larger ones of a weight (it sorts each leaf).

    Raises:
      SpecError: for another scope or allocation, or a global one with an allocation.

    References:
      Hagiwara, *A Simple and Effective Method for Removal of Hidden Units and Weights*, 1994; Han
      et al., *Learning both Weights and Connections for Efficient Neural Networks*, 2015.

    Examples:
      >>> magnitude(scope="global").scope
      'global'
    """
    return _Magnitude(scope, allocation)


@dataclasses.dataclass(frozen=True)
class _Random(Algorithm):
    seed: int

    apart: ClassVar[bool] = True

    def choose(self, choice: Choice, moment: Moment, memory: Any) -> tuple[list[jax.Array], Any]:
        active = [x != 0 for x in choice.pooled(moment.masks)]
        scores = draws(active, moment, self.seed)
        # What is there comes before what is not, so that a schedule that tightens only removes.
        scores = [jnp.where(on, 1 + u, u) for on, u in zip(active, scores)]
        return choice.spread(choice.take(scores, moment.counts)), memory


def random(*, seed: int = 0, scope: str = "local", allocation: str = "erk") -> Algorithm:
    """Any weights go: the control for every other score.

    With `one_shot` at update 0 this is static sparse training.

    Args:
      seed: of the draw.
      scope: see `magnitude`.
      allocation: see `magnitude`.

    References:
      Liu et al., *The Unreasonable Effectiveness of Random Pruning*, 2022.

    Examples:
      >>> random(seed=1).allocation
      'erk'
    """
    return _Random(scope, allocation, seed)


@dataclasses.dataclass(frozen=True, eq=False)
class _Static(Algorithm):
    masks: dict[str, Any] | None

    apart: ClassVar[bool] = True

    def check(self, choice: Choice) -> None:
        if self.masks is None:
            return
        for site in choice.sites:
            mask = self.masks.get(site.key)
            if mask is None or tuple(mask.shape) != site.shape:
                found = "none" if mask is None else f"one of shape {tuple(mask.shape)}"
                raise SpecError(
                    f"{site.path}: the rules name it and want a mask of shape {site.shape}, and "
                    f"the masks of static() have {found}"
                )

    def choose(self, choice: Choice, moment: Moment, memory: Any) -> tuple[list[jax.Array], Any]:
        if self.masks is None:
            return [w != 0 for w in moment.weights], memory
        return [jnp.asarray(self.masks[site.key], bool) for site in choice.sites], memory


def static(masks: Any = None) -> Algorithm:
    """The masks that are given, or the zeros that are there, at every choice.

    With `one_shot` the first update masks, and the masks stay. How much is removed is the masks'
    affair; the sparsity of the schedule is not looked at.

    Args:
      masks: a tree as `make_masks` gives it; None: a weight that is zero at the first choice stays
        zero.

    Examples:
      >>> import jax.numpy as jnp, optax, jaxcompress as jc
      >>> params = {"kernel": jnp.array([[0.0, 2.0]])}
      >>> tx = jc.sparsify(
      ...     optax.sgd(1.0), static(), jc.pruning.one_shot(0.5), {"kernel": "unstructured"}
      ... )
      >>> updates, state = tx.update({"kernel": jnp.ones((1, 2))}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["kernel"].tolist()
      [[0.0, 1.0]]
    """
    found = None
    if masks is not None:
        leaves = jax.tree_util.tree_flatten_with_path(masks)[0]
        found = {jax.tree_util.keystr(path): x for path, x in leaves}
    return _Static("local", "uniform", found)
