"""`sparsify`: pruning as an optax wrapper, so that no training loop changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxcompress.errors import SpecError
from jaxcompress.pruning.algorithms import Algorithm
from jaxcompress.pruning.choice import Choice, check_units
from jaxcompress.pruning.schedules import Schedule
from jaxcompress.pruning.select import has_nan
from jaxcompress.pruning.sites import Site, check_ends, check_finite, find_sites
from jaxcompress.rules import KernelAxes


class SparsifyState(NamedTuple):
    """The state of `sparsify`.

    Attributes:
      step: updates so far, int32; of `optax.MultiSteps` only the real ones.
      masks: the tree of params with a mask, bool, for each pruned leaf and `optax.MaskedNode()`
        for all others.
      nan: whether each pruned leaf held a NaN when masks were last chosen, in the order of the
        leaves; `sparsity_report` names them.
      inner: the state of the wrapped optimizer.
    """

    step: jax.Array
    masks: Any
    nan: jax.Array
    inner: Any


def sparsify(
    inner: optax.GradientTransformation,
    algorithm: Algorithm,
    schedule: Schedule,
    rules: Mapping[str, str | None],
    *,
    axes: Mapping[str, KernelAxes] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Prunes while `inner` trains.

    Let m be the masks, chosen anew from the params w at the updates that the schedule names. Then

        g <- m g;    u <- inner(g);    update = m u - (1 - m) w

    so that `optax.apply_updates` puts exact zeros where m is 0, and the moments and norms of
    `inner` are those of the sparse network. Everything lives in the optimizer state; nothing is
    traced again, and nothing but scalars passes between devices when masks are chosen.

    It must be the outermost link, `sparsify(optax.chain(...), ...)`: a transformation after it
    would move the zeros. What an inner optimizer holds besides the params is not pruned: multiply
    the evaluation params of `optax.contrib.schedule_free` by the masks. The schedule counts real
    updates: in `sparsify(optax.MultiSteps(...))` those at the end of an accumulation. Leaves that
    need other sparsities get a `sparsify` of their own:
    `sparsify(sparsify(inner, ..., rules_a), ..., rules_b)`.

    In a compressed leaf with a trainable dense weight, such as `FakeQuantizedArray`, that weight is
    pruned. In a stack of layers (see `axes`) each layer keeps equally many weights, unless the
    scope is global.

    Args:
      inner: the optimizer.
      algorithm: what goes, such as `magnitude()`.
      schedule: how much and when, such as `cubic_schedule(0.9, end=10_000)`.
      rules: `{glob: pattern or None}`, globs over paths as in `compress`; the first match wins,
        None leaves a leaf dense, as does no match. Patterns are `unstructured`, `n:m`,
        `block:RxC`, `vector`, `channel`, `filter`, `head` and `layer`; sparsity counts their units.
        An `n:m` leaf keeps, of each m consecutive inputs, `max(n, round(m (1 - s)))` at
        sparsity s.
      axes: the input and output axes of leaves by path, from `kernel_axes`.

    Returns:
      An optax transformation; its `update` needs the params.

    Raises:
      RuleError: from `init`, for a rule that matches nothing or what cannot be pruned, and for
        `axes` that name no leaf or do not fit it.
      SpecError: from `init`, where the params hold NaN or infinity, naming the leaf, or the
        schedule ends before an `n:m` pattern is reached.

    References:
      Zhu and Gupta, *To Prune, or Not to Prune*, 2017; Lee et al., *JaxPruner: A Concise Library
      for Sparsity Research*, 2023 (pruning as an optimizer wrapper).

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxcompress as jc
      >>> params = {"kernel": jnp.arange(1.0, 9.0).reshape(4, 2), "bias": jnp.zeros(2)}
      >>> tx = jc.sparsify(
      ...     optax.sgd(0.1),
      ...     jc.pruning.magnitude(),
      ...     jc.pruning.one_shot(0.75),
      ...     {"kernel": "unstructured"},
      ... )
      >>> state = tx.init(params)
      >>> grads = jax.tree.map(jnp.ones_like, params)
      >>> updates, state = tx.update(grads, state, params)
      >>> optax.apply_updates(params, updates)["kernel"].tolist()
      [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [6.900000095367432, 7.900000095367432]]
    """
    if not isinstance(algorithm, Algorithm):
        raise SpecError(f"{algorithm!r} is no algorithm: write one such as jc.pruning.magnitude()")
    if not isinstance(schedule, Schedule):
        raise SpecError(
            f"{schedule!r} is no schedule: write one such as jc.pruning.cubic_schedule(0.9, "
            "end=10_000)"
        )
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> SparsifyState:
        sites = find_sites(params, rules, axes or {})
        leaves, structure = jax.tree.flatten(params)
        check_ends(sites, schedule)
        check_units(_choice(algorithm, sites))
        check_finite(sites, leaves)
        masks: list[Any] = [optax.MaskedNode()] * len(leaves)
        for site in sites:
            masks[site.place] = jnp.ones_like(leaves[site.place], dtype=bool)
        return SparsifyState(
            jnp.zeros((), jnp.int32),
            jax.tree.unflatten(structure, masks),
            jnp.zeros(len(sites), bool),
            inner.init(params),
        )

    def update(
        updates: Any, state: SparsifyState, params: Any = None, **extra: Any
    ) -> tuple[Any, SparsifyState]:
        if params is None:
            raise SpecError("sparsify needs the params: write tx.update(grads, state, params)")
        sites = find_sites(params, rules, axes or {})
        flat_params: tuple[list[Any], Any] = jax.tree.flatten(params)
        weights, structure = flat_params
        grads = _flat_like(structure, updates)
        slots = structure.flatten_up_to(state.masks)
        old = [slots[site.place] for site in sites]
        pruned = [weights[site.place] for site in sites]
        choice = _choice(algorithm, sites)

        def choose(i: jax.Array, chosen: Any) -> Any:
            # Tied to the turn of the loop, or a compiler would take the search out of it.
            _, step, weights = lax.optimization_barrier((i, state.step, pruned))
            masks = _choose(choice, algorithm.scores(weights), schedule, step)
            return masks, jnp.stack([has_nan(w) for w in weights])

        due = schedule.refreshes(state.step) & _starts_an_update(state.inner)
        # A loop of one turn or none: where a conditional would copy the masks that it does not
        # change, a loop hands them on in place.
        new, nan = (old, state.nan)
        if sites:
            new, nan = lax.fori_loop(0, due.astype(jnp.int32), choose, (old, state.nan))
        for site, mask in zip(sites, new):
            slots[site.place] = mask
            grads[site.place] = _masked(mask, grads[site.place])
        steps, inner_state = inner.update(
            jax.tree.unflatten(structure, grads), state.inner, params, **extra
        )
        flat = structure.flatten_up_to(steps)
        for site, mask in zip(sites, new):
            step, weight = flat[site.place], weights[site.place]
            flat[site.place] = jnp.where(mask, 0 if step is None else step, -weight)
        done = _ends_an_update(state.inner, inner_state)
        return jax.tree.unflatten(structure, flat), SparsifyState(
            state.step + done, jax.tree.unflatten(structure, slots), nan, inner_state
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _choice(algorithm: Algorithm, sites: Sequence[Site]) -> Choice:
    return Choice(tuple(sites), algorithm.scope, algorithm.allocation)


def _flat_like(structure: Any, updates: Any) -> list[Any]:
    """The gradients in the order of the params, None where there is none."""
    try:
        return structure.flatten_up_to(updates)
    except ValueError as error:
        raise SpecError(
            "the gradients have another structure than the params, as under optax.lookahead; "
            f"sparsify cannot put them together: {str(error).splitlines()[0][:200]}"
        ) from None


def _masked(mask: jax.Array, grad: Any) -> Any:
    return None if grad is None else jnp.where(mask, grad, jnp.zeros((), grad.dtype))


def _choose(
    choice: Choice, scores: Sequence[jax.Array], schedule: Schedule, step: jax.Array
) -> list[jax.Array]:
    between = lambda first, last: schedule.kept(first, last, step)
    counts = choice.counts((schedule.initial, schedule.final), between)
    return choice.spread(choice.take(choice.pooled(scores), counts))


def _accumulators(state: Any) -> list[optax.MultiStepsState]:
    def is_one(x: Any) -> bool:
        return isinstance(x, optax.MultiStepsState)

    return [x for x in jax.tree.leaves(state, is_leaf=is_one) if is_one(x)]


def _starts_an_update(state: Any) -> jax.Array:
    """Whether no gradient has been accumulated since the last real update."""
    fresh = [x.mini_step == 0 for x in _accumulators(state)]
    return jnp.all(jnp.stack(fresh)) if fresh else jnp.asarray(True)


def _ends_an_update(before: Any, after: Any) -> jax.Array:
    """Whether this update was a real one, 1 or 0."""
    pairs = zip(_accumulators(before), _accumulators(after))
    done = [(b.gradient_step != a.gradient_step) for b, a in pairs]
    return jnp.all(jnp.stack(done)).astype(jnp.int32) if done else jnp.ones((), jnp.int32)
