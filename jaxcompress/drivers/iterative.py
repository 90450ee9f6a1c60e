"""Train, prune, train again: iterative pruning, lottery tickets and rewinding."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.drivers.rounds_folder import RoundsFolder, fingerprint, name_of
from jaxcompress.drivers.trees import as_jax, checked, copied
from jaxcompress.errors import SpecError
from jaxcompress.progress import progress_bar
from jaxcompress.pruning import scores as scoring
from jaxcompress.pruning.masks import apply_masks, make_masks
from jaxcompress.pruning.scores.iterated import below_all, in_structure, shares
from jaxcompress.rules import KernelAxes

REWINDS = ("none", "weights", "learning_rate")


class Round(NamedTuple):
    """What a training is told.

    Attributes:
      number: 0 for the dense training, then 1 to `rounds`.
      sparsity: of the masks that it trains under.
      rewind: `none`, `weights` or `learning_rate`: how it goes on after the first round. With
        `none` the schedule of the learning rate is that of a fine-tuning, else it starts again.
    """

    number: int
    sparsity: float
    rewind: str


class Trained(NamedTuple):
    """What a training may return instead of the params, in round 0.

    Attributes:
      params: at its end.
      early: after the first few steps: what `rewind="weights"` goes back to, instead of the start.
    """

    params: Any
    early: Any


class PrunedRound(NamedTuple):
    """One round of training.

    Its arrays are those that the driver goes on from: copy what is to be donated to a jitted step.

    Attributes:
      number: 0 for the dense training, then 1 to `rounds`.
      sparsity: that was asked of the masks.
      start: the params that it started from, zeros where the masks are false.
      params: the trained params, zeros where the masks are false.
      masks: as `make_masks` gives them; in round 0 all true.
    """

    number: int
    sparsity: float
    start: Any
    params: Any
    masks: Any


Train = Callable[[Any, Any, Round], Any]


def iterative_pruning(
    train: Train,
    params: Any,
    *,
    sparsity: float,
    rounds: int,
    rules: Mapping[str, str | None],
    rewind: str = "none",
    score: Callable[[Any], Any] | None = None,
    scope: str = "local",
    allocation: str = "uniform",
    axes: Mapping[str, KernelAxes] | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Iterator[PrunedRound]:
    """Trains, prunes and trains again, a share of what is left removed in each round.

    Round 0 trains the dense params. Before round k the trained weights are scored, `1 - (1 -
    sparsity)**(k / rounds)` of all are removed, and training goes on: from the trained weights
    (`rewind="none"`, prune and fine-tune; `rewind="learning_rate"`, where `train` starts its
    schedule again) or from the first ones (`rewind="weights"`, see `lottery_ticket`).

    What was removed stays so. `allocation="erk"` may ask for one more weight of a leaf than the
    round before, since it rounds the leaves' shares to a total: that weight does not come back, and
    the total is short by it.

    Args:
      train: `train(params, masks, round) -> params`: the user's own training under masks, kept by
        `apply_masks` after each step or by `sparsify`. What it returns gets exact zeros in any
        case. In round 0 it may return `Trained(params, early)`.
      params: a tree of dense arrays, before training. On a mesh: rounds that are read from a folder
        are placed as these are.
      sparsity: the share to remove in the end, from 0 to below 1.
      rounds: how many times it is pruned; `train` is called once more.
      rules: `{glob: pattern or None}` as for `make_masks`.
      rewind: `none`, `weights` or `learning_rate`.
      score: of the trained params, the least important lowest; `scores.magnitude` unless given.
        With a folder, a function that is defined by `def`: its module and name are kept, and a run
        that goes on must have the same. What it closes over is not seen.
      scope: as for `make_masks`.
      allocation: as for `make_masks`.
      axes: as for `make_masks`.
      folder: where each round is kept once it is trained. A run that was killed is begun again by
        the same call: it reads the rounds up to the first that is not there, trains the others, and
        yields the same bits, if `train` gives the same ones. Rounds behind one that is trained are
        of a run that is no more, and are deleted.
      progress: show a progress bar on standard error.

    Yields:
      Each round when it is trained, or read from the folder; a list's last is the result.

    Raises:
      SpecError: for a number out of range, an unknown name, and a training that returns another
        tree; with a folder also for a score without a name, and for a leaf that cannot be kept; as
        `make_masks`.
      RuleError: for a rule that matches nothing.
      FileError: for a folder with rounds of other settings or other params, a link, or a damaged
        file.

    References:
      Han et al., *Learning both Weights and Connections for Efficient Neural Networks*, 2015.

    Examples:
      >>> import jax.numpy as jnp
      >>> train = lambda params, masks, round: {"kernel": 2 * params["kernel"]}
      >>> params, rules = {"kernel": jnp.array([1.0, 2.0, 3.0, 4.0])}, {"*": "unstructured"}
      >>> for done in iterative_pruning(train, params, sparsity=0.75, rounds=2, rules=rules):
      ...     print(done.sparsity, done.params["kernel"].tolist())
      0.0 [2.0, 4.0, 6.0, 8.0]
      0.5 [0.0, 0.0, 12.0, 16.0]
      0.75 [0.0, 0.0, 0.0, 32.0]
    """
    plan = [Round(k, share, rewind) for k, share in enumerate(shares(sparsity, rounds))]
    if rewind not in REWINDS:
        raise SpecError(f"rewind={rewind!r}: write one of {', '.join(REWINDS)}")
    params = as_jax(params)

    def masks_at(scores: Any, share: float) -> Any:
        found = make_masks(scores, share, rules, scope=scope, allocation=allocation, axes=axes)
        return in_structure(found, params)

    whole = masks_at(scoring.magnitude(params), 0.0)  # refuses what does not fit before training
    store = None
    if folder is not None:
        settings = {
            "sparsity": float(sparsity), "rounds": int(rounds),
            "rules": list(map(list, rules.items())), "rewind": rewind,
            "score": name_of(scoring.magnitude if score is None else score),
            "scope": scope, "allocation": allocation,
            "axes": sorted([path, *map(list, at)] for path, at in (axes or {}).items()),
            "params": fingerprint(params),
        }  # fmt: skip
        store = RoundsFolder(folder, settings, params)
    score = scoring.magnitude if score is None else score
    return _rounds(train, params, plan, whole, score, masks_at, store, progress)


def _rounds(
    train: Train,
    params: Any,
    plan: list[Round],
    masks: Any,
    score: Callable[[Any], Any],
    masks_at: Callable[[Any, float], Any],
    store: RoundsFolder | None,
    progress: bool,
) -> Iterator[PrunedRound]:
    point, last = params, params
    with progress_bar(progress, "training", len(plan)) as advance:
        for now in plan:
            kept = None if store is None else store.read(now.number)
            if kept is not None:
                trained, masks, early = kept
                start = apply_masks(point if now.rewind == "weights" else last, masks)
            else:
                if now.number:
                    found = masks_at(below_all(score(last), masks), now.sparsity)
                    masks = _both(found, masks)
                start = apply_masks(point if now.rewind == "weights" else last, masks)
                trained, early = _trained(train(copied(start), masks, now), params, now.number)
                trained = apply_masks(trained, masks)
                if store is not None:
                    store.write(now.number, trained, masks, early)
            point = point if early is None else early
            last = trained
            advance(f"{100 * now.sparsity:.1f}% sparse")
            yield PrunedRound(now.number, now.sparsity, start, trained, masks)


def lottery_ticket(
    train: Train,
    params: Any,
    *,
    sparsity: float,
    rounds: int,
    rules: Mapping[str, str | None],
    **options: Any,
) -> Iterator[PrunedRound]:
    """Iterative magnitude pruning with weights rewound: the masks of winning tickets.

    After each round the weights that stay go back to their values before training, or, when
    `train` returns `Trained(params, early)` in round 0, to those after its first few steps, which
    larger networks need. `start` and `masks` of a round are its ticket.

    Args:
      train: see `iterative_pruning`.
      params: a tree of dense arrays, before training.
      sparsity: the share to remove in the end.
      rounds: how many times it is pruned.
      rules: `{glob: pattern or None}`.
      **options: others of `iterative_pruning`.

    Yields:
      As `iterative_pruning`.

    Raises:
      SpecError: as `iterative_pruning`.
      RuleError: as `iterative_pruning`.
      FileError: as `iterative_pruning`.

    References:
      Frankle and Carbin, *The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural
      Networks*, 2019; Frankle et al., *Linear Mode Connectivity and the Lottery Ticket
      Hypothesis*, 2020 (rewinding to an early step).

    Examples:
      >>> import jax.numpy as jnp
      >>> train = lambda params, masks, round: {"kernel": jnp.flip(params["kernel"])}
      >>> params, rules = {"kernel": jnp.array([1.0, 2.0, 3.0, 4.0])}, {"*": "unstructured"}
      >>> *_, last = lottery_ticket(train, params, sparsity=0.5, rounds=1, rules=rules)
      >>> last.start["kernel"].tolist()
      [1.0, 2.0, 0.0, 0.0]
    """
    return iterative_pruning(
        train, params, sparsity=sparsity, rounds=rounds, rules=rules, rewind="weights", **options
    )


def learning_rate_rewinding(
    train: Train,
    params: Any,
    *,
    sparsity: float,
    rounds: int,
    rules: Mapping[str, str | None],
    **options: Any,
) -> Iterator[PrunedRound]:
    """Iterative pruning with trained weights kept and the learning rate's schedule started again.

    `train` is told by `round.rewind == "learning_rate"` that each round is a whole training, not a
    fine-tuning at the last, small rate.

    Args:
      train: see `iterative_pruning`.
      params: a tree of dense arrays, before training.
      sparsity: the share to remove in the end.
      rounds: how many times it is pruned.
      rules: `{glob: pattern or None}`.
      **options: others of `iterative_pruning`.

    Yields:
      As `iterative_pruning`.

    Raises:
      SpecError: as `iterative_pruning`.
      RuleError: as `iterative_pruning`.
      FileError: as `iterative_pruning`.

    References:
      Renda, Frankle and Carbin, *Comparing Rewinding and Fine-tuning in Neural Network Pruning*,
      2020.

    Examples:
      >>> import jax.numpy as jnp
      >>> seen = []
      >>> train = lambda params, masks, round: seen.append(round.rewind) or params
      >>> params, rules = {"kernel": jnp.ones(4)}, {"*": "unstructured"}
      >>> done = [*learning_rate_rewinding(train, params, sparsity=0.5, rounds=1, rules=rules)]
      >>> seen
      ['learning_rate', 'learning_rate']
    """
    return iterative_pruning(
        train, params, sparsity=sparsity, rounds=rounds, rules=rules, rewind="learning_rate",
        **options,
    )  # fmt: skip


def _trained(found: Any, params: Any, number: int) -> tuple[Any, Any]:
    early = None
    if isinstance(found, Trained):
        if number:
            raise SpecError(f"train returned Trained in round {number}; only round 0 has an early")
        found, early = found
    return checked(found, params, number), None if early is None else checked(early, params, number)


def _both(found: Any, before: Any) -> Any:
    """Masks that keep what both do: counts that grow take what comes last, which was removed."""
    return jax.tree.map(jnp.logical_and, found, before)
