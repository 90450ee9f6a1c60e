"""Remove a few channels, train, remove a few more: structured removal little by little."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcompress.drivers.rounds_folder import RoundsFolder, fingerprint, name_of
from jaxcompress.drivers.trees import as_jax, checked, copied
from jaxcompress.errors import SpecError
from jaxcompress.progress import progress_bar
from jaxcompress.pruning.structure.find import Groups, groups
from jaxcompress.pruning.structure.function import leaves_of
from jaxcompress.pruning.structure.members import Group
from jaxcompress.pruning.structure.planning import plan
from jaxcompress.pruning.structure.plans import LeafPlan, Plan, keep_channels
from jaxcompress.pruning.structure.shrinking import shrink_params, shrink_state, shrunk
from jaxcompress.pruning.structure.stage import kernel_scores

Keep = float | Mapping[str, float]


class ShrinkRound(NamedTuple):
    """What a training and a score are told.

    Attributes:
      number: 0 for the whole model, then 1 to the number of `keeps`.
      keep: the share of the whole model that stays in this round.
      plan: from the whole model to these params: `shrunk(loss, round.plan)` makes any function of
        the whole params one of these. A score is told what stays in this round, and the plan of the
        round before.
    """

    number: int
    keep: Any
    plan: Plan


class ShrunkRound(NamedTuple):
    """One round of training.

    Its arrays are those that the driver goes on from: copy what is to be donated to a jitted step.

    Attributes:
      number: 0 for the whole model, then 1 to the number of `keeps`.
      params: trained, the smaller leaves.
      state: of the optimizer, for these.
      plan: from the whole model to this one.
    """

    number: int
    params: Any
    state: Any
    plan: Plan


Train = Callable[[Callable[..., Any], Any, Any, ShrinkRound], tuple[Any, Any]]
Score = Callable[[Callable[..., Any], Any, ShrinkRound], Any]


def iterative_shrinking(
    train: Train,
    fn: Callable[..., Any],
    params: Any,
    state: Any,
    example: Sequence[Any],
    *,
    keeps: Sequence[Keep],
    score: Score | None = None,
    budget: str = "channels",
    allocation: str = "uniform",
    round_to: int = 8,
    only: Callable[[Group], bool] | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Iterator[ShrunkRound]:
    """Trains, removes channels and trains the smaller model, its optimizer going on.

    Round 0 trains the whole model. Before round k the channels of the trained one are scored, and
    those that are the least important are removed, so that `keeps[k - 1]` of the whole model stays.
    The moments of the optimizer lose the same channels, and its counts go on. The groups are
    found once, on the whole model; what was removed stays so.

    Args:
      train: `train(fn, params, state, round) -> (params, state)`: the user's own training. `fn`
        runs the params of this round, and is made anew for each: jit what holds it within `train`.
        Leave what was given as it is with `return params, state`, for instance in round 0
        when the model is trained already.
      fn: the function of the whole params and `example`, as the model is run after training.
      params: of the whole model, before round 0.
      state: of the optimizer, from its `init(params)`; or None. A state with factored moments
        cannot be followed (see `shrink_state`): give None, begin it anew in each round, and return
        None.
      example: the other arguments of `fn`: arrays, shapes, or static values.
      keeps: what stays after each removal, of the whole model: shares that fall, or dicts for
        `plan`'s `keep`. By a cubic schedule: `[1 - float(schedule.sparsity(k)) for k in range(1,
        n + 1)]` with `schedule = jaxcompress.pruning.cubic_schedule(...)`.
      score: `score(fn, params, round)`: a tree of the structure of the params of this round, such
        as a score of `jaxcompress.pruning.scores`, of which magnitudes count. Unless given, the
        magnitudes of leaves of two axes or more, which leaves out biases and statistics.
      budget: as for `plan`.
      allocation: as for `plan`; the mean score of a group is that of its channels, removed ones
        as zeros.
      round_to: as for `plan`.
      only: as for `plan`.
      folder: where each round is kept once it is trained. A run that was killed is begun again by
        the same call: it reads the rounds up to the first that is not there, trains the others, and
        yields the same bits, if `train` gives the same ones. `score` and `only` are then functions
        with names of their own (made by `def`), by which a run knows them.
      progress: show a progress bar on standard error.

    Yields:
      Each round when it is trained, or read from the folder; a list's last is the result.

    Raises:
      SpecError: for no `keeps`, a budget that cannot be met, a training that returns another tree,
        and with a folder for a score without a name.
      RuleError: for a glob that matches no group from which anything can be removed.
      CompressError: for scores of another structure, and a state that cannot be followed.
      FileError: for a folder with rounds of other settings or other params, a link, or a damaged
        file.

    References:
      Molchanov et al., *Pruning Convolutional Neural Networks for Resource Efficient Inference*,
      2017; Zhu and Gupta, *To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model
      Compression*, 2018 (the cubic schedule).

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> params = {"up": jnp.arange(1.0, 33).reshape(1, 32), "down": jnp.ones((32, 1))}
      >>> apply = lambda p, x: x @ p["up"] @ p["down"]
      >>> train = lambda fn, params, state, round: (params, state)
      >>> state, x = optax.adam(0.1).init(params), jnp.ones((1, 1))
      >>> for done in iterative_shrinking(train, apply, params, state, (x,), keeps=[0.75, 0.5]):
      ...     print(done.params["up"].shape, done.state[0].mu["up"].shape)
      (1, 32) (1, 32)
      (1, 24) (1, 24)
      (1, 16) (1, 16)
    """
    keeps = list(keeps)
    if not keeps:
        raise SpecError("keeps=[]: write the shares that stay, such as [0.75, 0.5]")
    params, state = as_jax(params), as_jax(state)
    found = groups(fn, params, *example)
    options: dict[str, Any] = {
        "budget": budget, "allocation": allocation, "round_to": round_to, "only": only,
    }  # fmt: skip
    whole = keep_channels(found, {})
    ones = jax.tree.map(lambda x: np.broadcast_to(np.float32(1), x.shape), params)
    for keep in keeps:  # refuses what does not fit before training
        plan(found, ones, keep, **options)
    store = None
    if folder is not None:
        store = RoundsFolder(folder, _settings(score, keeps, options, params, state),
                             (params, state, ""))  # fmt: skip
    choose = lambda scores, before, keep: _chosen(found, scores, before, keep, options)
    return _rounds(train, fn, params, state, [1.0, *keeps], whole, score, choose, store, progress)


def _settings(
    score: Score | None, keeps: list[Keep], options: dict[str, Any], params: Any, state: Any
) -> dict[str, Any]:
    plain = [list(map(list, k.items())) if isinstance(k, Mapping) else float(k) for k in keeps]
    only = options["only"]
    return {
        "driver": "iterative_shrinking", "keeps": plain, **options,
        "only": None if only is None else name_of(only),
        "score": None if score is None else name_of(score),
        "params": fingerprint((params, state)),
    }  # fmt: skip


def _rounds(
    train: Train,
    fn: Callable[..., Any],
    params: Any,
    state: Any,
    keeps: list[Keep],
    total: Plan,
    score: Score | None,
    choose: Callable[[Any, Plan, Keep], Plan],
    store: RoundsFolder | None,
    progress: bool,
) -> Iterator[ShrunkRound]:
    score, small = score or (lambda fn, params, now: kernel_scores(params)), fn
    with progress_bar(progress, "training", len(keeps)) as advance:
        for number, keep in enumerate(keeps):
            kept = None if store is None else store.read(number)
            if kept is not None:
                params, state, text = kept[0]
                total = Plan.from_json(text)
                small = shrunk(fn, total)
            else:
                if number:
                    scores = score(small, params, ShrinkRound(number, keep, total))
                    after = choose(scores, total, keep)
                    step = _between(total, after)
                    state = None if state is None else shrink_state(state, params, step)
                    params = shrink_params(params, step)
                    total, small = after, shrunk(fn, after)
                now = ShrinkRound(number, keep, total)
                params, state = _trained(train, small, params, state, now)
                if store is not None:
                    made = (params, state, total.to_json())
                    store.write(number, made, jax.tree.map(lambda _: None, made), None)
            advance(f"round {number}")
            yield ShrunkRound(number, params, state, total)


def _trained(
    train: Train, fn: Callable[..., Any], params: Any, state: Any, now: ShrinkRound
) -> tuple[Any, Any]:
    found = train(fn, copied(params), copied(state), now)
    if not isinstance(found, tuple) or len(found) != 2:
        raise SpecError(
            f"train returned a {type(found).__name__} in round {now.number}; return the params and "
            "the state of the optimizer, (params, state)"
        )
    return checked(found[0], params, now.number), checked(found[1], state, now.number)


def _chosen(
    found: Groups, scores: Any, before: Plan, keep: Keep, options: Mapping[str, Any]
) -> Plan:
    """The plan of the whole for what stays next, of what stayed before."""
    leaves = leaves_of(scores)
    before.check([(path, tuple(x.shape)) for path, x in leaves], whole=False)
    # On the whole model, of which the shares are. What is gone scores zero, and what is there more.
    spread = [_spread(x, leaf) for (_, x), leaf in zip(leaves, before.leaves)]
    whole = jax.tree.unflatten(jax.tree.structure(scores), spread)
    after = plan(found, whole, keep, **options)
    return Plan(tuple(map(_both, before.leaves, after.leaves)))


def _spread(score: Any, leaf: LeafPlan) -> np.ndarray:
    x = np.abs(np.asarray(score).astype(np.float32))
    out = np.zeros(leaf.shape, np.float32)
    out[np.ix_(*_kept(leaf))] = np.maximum(x, np.finfo(np.float32).tiny)
    return out


def _kept(leaf: LeafPlan) -> list[np.ndarray]:
    """The places that stay of each axis."""
    return [
        np.arange(n) if kept is None else np.asarray(kept, np.int64)
        for n, kept in zip(leaf.shape, leaf.kept)
    ]


def _planned(leaf: LeafPlan, places: Sequence[np.ndarray]) -> LeafPlan:
    kept = tuple(
        None if len(own) == n else tuple(own.tolist()) for n, own in zip(leaf.shape, places)
    )
    return LeafPlan(leaf.path, leaf.shape, kept)


def _both(a: LeafPlan, b: LeafPlan) -> LeafPlan:
    """What stays by two plans of the same leaf."""
    return _planned(a, [np.intersect1d(x, y) for x, y in zip(_kept(a), _kept(b))])


def _between(before: Plan, after: Plan) -> Plan:
    """The plan that leads from what one plan leaves to what a further one does."""
    leaves = []
    for a, b in zip(before.leaves, after.leaves):
        places = [np.searchsorted(x, y) for x, y in zip(_kept(a), _kept(b))]
        leaves.append(_planned(LeafPlan(a.path, a.small, (None,) * len(a.shape)), places))
    return Plan(tuple(leaves))
