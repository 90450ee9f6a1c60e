"""`sparsify`: pruning as an optax wrapper, so that no training loop changes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxcompress.arrays.base import CompressedArray, is_compressed
from jaxcompress.errors import RuleError, SpecError
from jaxcompress.pruning.algorithms import Algorithm
from jaxcompress.pruning.allocation import allocation
from jaxcompress.pruning.schedules import Schedule
from jaxcompress.pruning.select import has_nan, kept_count, n_of_m_mask, top_mask, top_masks
from jaxcompress.pruning.spec import parse_pattern
from jaxcompress.rules import KernelAxes, check_axes, default_axes, flatten, match


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


@dataclasses.dataclass(frozen=True)
class _Site:
    """One pruned leaf: its place among the flat leaves, and how it is pruned.

    `batch_ndim` leading axes are a stack; `pattern` is None or `(n, m)` along `axis`.
    """

    place: int
    path: str
    shape: tuple[int, ...]
    batch_ndim: int
    pattern: tuple[int, int] | None
    axis: int

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.shape[self.batch_ndim :]


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
      rules: `{pattern: "unstructured" or "n:m" or None}`, globs over paths as in `compress`; the
        first match wins, None leaves a leaf dense, as does no match. An `n:m` leaf keeps, of each
        m consecutive inputs, `max(n, round(m (1 - s)))` at sparsity s.
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
        sites = _sites(params, rules, axes or {})
        leaves, structure = jax.tree.flatten(params)
        _check_patterns(sites, schedule)
        _check_finite(sites, leaves)
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
        sites = _sites(params, rules, axes or {})
        flat_params: tuple[list[Any], Any] = jax.tree.flatten(params)
        weights, structure = flat_params
        grads = _flat_like(structure, updates)
        slots = structure.flatten_up_to(state.masks)
        old = [slots[site.place] for site in sites]
        pruned = [weights[site.place] for site in sites]

        def choose(i: jax.Array, chosen: Any) -> Any:
            # Tied to the turn of the loop, or a compiler would take the search out of it.
            _, step, weights = lax.optimization_barrier((i, state.step, pruned))
            masks = _choose(sites, algorithm.scores(weights), algorithm, schedule, step)
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
    sites: Sequence[_Site],
    scores: Sequence[jax.Array],
    algorithm: Algorithm,
    schedule: Schedule,
    step: jax.Array,
) -> list[jax.Array]:
    masks: list[Any] = [None] * len(sites)
    free = []
    for i, site in enumerate(sites):
        if site.pattern is None:
            free.append(i)
        else:
            n, m = site.pattern
            first, last = (max(n, kept_count(m, s)) for s in (schedule.initial, schedule.final))
            kept = schedule.kept(first, last, step).astype(jnp.int32)
            masks[i] = n_of_m_mask(scores[i], kept, m, site.axis)
    if algorithm.scope == "global":
        total = sum(math.prod(sites[i].shape) for i in free)
        first, last = (kept_count(total, s) for s in (schedule.initial, schedule.final))
        chosen = top_masks([scores[i] for i in free], schedule.kept(first, last, step))
        for i, mask in zip(free, chosen):
            masks[i] = mask
        return masks
    ends = [
        _local_counts([sites[i] for i in free], algorithm, s)
        for s in (schedule.initial, schedule.final)
    ]
    for i, first, last in zip(free, *ends):
        select = top_mask
        for _ in range(sites[i].batch_ndim):
            select = jax.vmap(select, (0, None))
        masks[i] = select(scores[i], schedule.kept(first, last, step))
    return masks


def _local_counts(sites: Sequence[_Site], algorithm: Algorithm, sparsity: float) -> list[int]:
    """How many weights stay in one weight of each leaf; the weights of a stack count each."""
    shapes, owner = [], []
    for i, site in enumerate(sites):
        layers = math.prod(site.shape[: site.batch_ndim])
        shapes += [site.weight_shape] * layers
        owner += [i] * layers
    counts: dict[int, int] = {}
    for i, count in zip(owner, allocation(algorithm.allocation)(shapes, sparsity)):
        # A remainder given to some layers of a stack is not enough for all.
        counts[i] = min(count, counts.get(i, count))
    return [counts.get(i, 0) for i in range(len(sites))]


def _sites(
    params: Any, rules: Mapping[str, str | None], axes: Mapping[str, KernelAxes]
) -> list[_Site]:
    """The leaves that the rules name, from their paths and shapes alone."""
    leaves, _ = flatten(params)
    if not leaves:  # optax asks for the state of a tree without leaves, to see its structure
        return []
    check_axes(axes, leaves)
    sites, place = [], 0
    for (path, leaf), hit in zip(leaves, match(rules, [path for path, _ in leaves])):
        size = len(jax.tree.leaves(leaf))
        if hit is not None and hit[1] is not None:
            array, offset = _dense_weight(path, leaf, hit[0])
            sites.append(_site(place + offset, path, array, hit, axes))
        place += size
    return sites


def _dense_weight(path: str, leaf: Any, pattern: str) -> tuple[Any, int]:
    """The array to prune, and its place among the arrays of the leaf."""
    array, offset = leaf, 0
    if is_compressed(leaf):
        named = [getattr(leaf, name) for name in leaf.trainable]
        whole = [x for x in named if not isinstance(x, CompressedArray) and x is not None]
        whole = [x for x in whole if x.shape == leaf.shape]
        if len(whole) != 1:
            raise RuleError(
                f"rule {pattern!r} matches {path!r}, a {type(leaf).__name__} that holds no dense "
                f"weight to prune; put {path!r}: None before it"
            )
        array = whole[0]
        offset = next(i for i, x in enumerate(jax.tree.leaves(leaf)) if x is array)
    if not hasattr(array, "dtype") or not jnp.issubdtype(array.dtype, jnp.floating):
        kind = getattr(array, "dtype", type(array).__name__)
        raise RuleError(
            f"rule {pattern!r} matches {path!r} of {kind}, and only floating arrays can be "
            f"pruned; put {path!r}: None before it"
        )
    return array, offset


def _site(
    place: int, path: str, array: Any, hit: tuple[str, Any], axes: Mapping[str, KernelAxes]
) -> _Site:
    pattern, kind = hit
    if array.ndim == 0:
        raise RuleError(
            f"rule {pattern!r} matches {path!r}, a scalar, which cannot be pruned; put {path!r}: "
            "None before it"
        )
    if not isinstance(kind, str):
        raise RuleError(
            f"rule {pattern!r}: {kind!r} is no pattern; write 'unstructured', 'n:m' such as "
            "'2:4', or None"
        )
    where = axes.get(path, default_axes(path, array.ndim))
    shape = tuple(array.shape)
    numbers = None if kind == "unstructured" else parse_pattern(kind)
    return _Site(place, path, shape, where.batch_ndim(array.ndim), numbers, max(where.input))


def _check_patterns(sites: Sequence[_Site], schedule: Schedule) -> None:
    for site in sites:
        if site.pattern is None:
            continue
        n, m = site.pattern
        if kept_count(m, schedule.final) > n:
            raise SpecError(
                f"{site.path}: {n}:{m} removes {1 - n / m:g} of the weights, and the schedule ends "
                f"at {schedule.final:g}: write a final sparsity of at least {1 - n / m:g}"
            )


def _check_finite(sites: Sequence[_Site], leaves: Sequence[Any]) -> None:
    for site in sites:
        array = leaves[site.place]
        if isinstance(array, (jax.core.Tracer, jax.ShapeDtypeStruct)):
            continue
        if bad := int(jnp.sum(~jnp.isfinite(array))):
            raise SpecError(
                f"{site.path}: {bad} of {array.size} weights are NaN or infinite; mend them, for "
                "instance with jnp.nan_to_num, before pruning"
            )


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
