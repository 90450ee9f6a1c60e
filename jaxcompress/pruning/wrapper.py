"""`sparsify`: pruning as an optax wrapper, so that no training loop changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcompress.errors import SpecError
from jaxcompress.pruning.algorithms import Algorithm
from jaxcompress.pruning.choice import Choice, check_units
from jaxcompress.pruning.moments import Memory, owned
from jaxcompress.pruning.refresh import Held, refreshed
from jaxcompress.pruning.schedules import Schedule
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
      memory: what the algorithm remembers, see `Memory`.
    """

    step: jax.Array
    masks: Any
    nan: jax.Array
    inner: Any
    memory: Any


def sparsify(
    inner: optax.GradientTransformation,
    algorithm: Algorithm,
    schedule: Schedule,
    rules: Mapping[str, str | None],
    *,
    axes: Mapping[str, KernelAxes] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Prunes while `inner` trains.

    Let m be the masks, chosen anew at the updates that the schedule names, and w the params. Then

        g <- m g;    u <- inner(g);    update = m u - (1 - m) w

    so that `optax.apply_updates` puts exact zeros where m is 0, and the moments and norms of
    `inner` are those of the sparse network. Weights that come back (`rigl`, `set_`, ...) begin at
    zero, and their moments as `inner.init` makes them. Algorithms with a dense copy, such as
    `straight_through`, train that instead, and the params are its masked image. Everything lives in
    the optimizer state; nothing is traced again, and nothing but scalars passes between devices
    when masks are chosen by magnitude.

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
      algorithm: what goes and what comes, such as `magnitude()` or `rigl()`.
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

    Examples:
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
    regrows = algorithm.regrows or (schedule.loosens and not algorithm.dense)

    def init(params: Any) -> SparsifyState:
        sites = find_sites(params, rules, axes or {})
        leaves, structure = jax.tree.flatten(params)
        choice = _choice(algorithm, sites)
        check_ends(sites, schedule)
        check_units(choice)
        algorithm.check(choice)
        check_finite(sites, leaves)
        weights = [leaves[site.place] for site in sites]
        masks: list[Any] = [optax.MaskedNode()] * len(leaves)
        for site, weight in zip(sites, weights):
            masks[site.place] = jnp.ones_like(weight, dtype=bool)
        dense = [jnp.array(w) for w in weights] if algorithm.dense else []
        return SparsifyState(
            jnp.zeros((), jnp.int32),
            jax.tree.unflatten(structure, masks),
            jnp.zeros(len(sites), bool),
            inner.init(params),
            Memory(algorithm.init(weights) if sites else (), dense),
        )

    def update(
        updates: Any, state: SparsifyState, params: Any = None, **extra: Any
    ) -> tuple[Any, SparsifyState]:
        if params is None:
            raise SpecError("sparsify needs the params: write tx.update(grads, state, params)")
        sites = find_sites(params, rules, axes or {})
        if not sites:
            out, inner_state = inner.update(updates, state.inner, params, **extra)
            done = ends_an_update(state.inner, inner_state)
            return out, state._replace(step=state.step + done, inner=inner_state)
        flat_params: tuple[list[Any], Any] = jax.tree.flatten(params)
        leaves, structure = flat_params
        grads = _flat_like(structure, updates)
        slots = structure.flatten_up_to(state.masks)
        old = [slots[site.place] for site in sites]
        sparse = [leaves[site.place] for site in sites]
        weights = list(state.memory.dense) if algorithm.dense else sparse
        mine = [grads[site.place] for site in sites]
        choice = _choice(algorithm, sites)
        full = [jnp.zeros_like(w) if g is None else g for w, g in zip(weights, mine)]
        own = algorithm.follow(state.memory.own, weights, full, old, state.step)
        places = [site.place for site in sites]

        due = schedule.refreshes(state.step) & _starts_an_update(state.inner)
        held = Held(old, own, state.nan, [[] for _ in sites])
        parts = None
        if regrows:
            parts = owned(state.inner, inner.init(params), params, places)
            held = held._replace(moments=parts.moments())
        starts = parts.starts if parts else held.moments
        new, own, nan, moments = refreshed(
            algorithm, schedule, choice, due, state.step, held, weights, full, starts
        )
        before = parts.put(moments) if parts else state.inner
        passed = algorithm.gradients(mine, weights, new, own)
        for site, mask, grad, weight in zip(sites, new, passed, weights):
            slots[site.place], grads[site.place], leaves[site.place] = mask, grad, weight
        steps, inner_state = inner.update(
            jax.tree.unflatten(structure, grads),
            before,
            jax.tree.unflatten(structure, leaves),
            **extra,
        )
        flat = structure.flatten_up_to(steps)
        done = ends_an_update(state.inner, inner_state)
        moved = algorithm.moved([flat[p] for p in places], new, own, state.step, done)
        dense = []
        for site, mask, step, weight, there in zip(sites, new, moved, weights, sparse):
            if algorithm.dense:
                dense.append(weight if step is None else optax.apply_updates(weight, step))
                step = (dense[-1] - there).astype(there.dtype)
            flat[site.place] = jnp.where(mask, 0 if step is None else step, -there)
        return jax.tree.unflatten(structure, flat), SparsifyState(
            state.step + done,
            jax.tree.unflatten(structure, slots),
            nan,
            inner_state,
            Memory(own, dense),
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


def _accumulators(state: Any) -> list[optax.MultiStepsState]:
    def is_one(x: Any) -> bool:
        return isinstance(x, optax.MultiStepsState)

    return [x for x in jax.tree.leaves(state, is_leaf=is_one) if is_one(x)]


def _starts_an_update(state: Any) -> jax.Array:
    """Whether no gradient has been accumulated since the last real update."""
    fresh = [x.mini_step == 0 for x in _accumulators(state)]
    return jnp.all(jnp.stack(fresh)) if fresh else jnp.asarray(True)


def ends_an_update(before: Any, after: Any) -> jax.Array:
    """Whether this update was a real one, 1 or 0."""
    pairs = zip(_accumulators(before), _accumulators(after))
    done = [(b.gradient_step != a.gradient_step) for b, a in pairs]
    return jnp.all(jnp.stack(done)).astype(jnp.int32) if done else jnp.ones((), jnp.int32)
