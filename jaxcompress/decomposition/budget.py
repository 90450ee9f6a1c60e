"""`allocate_ranks`: one budget over all layers, and a rank for each."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import is_compressed
from jaxcompress.compress import Hit, Stats, nbytes, plan_rules
from jaxcompress.decomposition.data_aware import ActivationSVD, FisherSVD, fisher_stats
from jaxcompress.decomposition.ranks import saving_rank
from jaxcompress.decomposition.spec import LowRank
from jaxcompress.decomposition.weighted import weighted_spectrum
from jaxcompress.errors import SpecError
from jaxcompress.layerwise.folding import Folding, folding
from jaxcompress.lazy import LazyArray
from jaxcompress.observe import observe
from jaxcompress.progress import progress_bar
from jaxcompress.quantization.mixed.table import Allocation, Candidate, Choosable, Sensitivities
from jaxcompress.rules import KernelAxes, check_axes, escape, flatten, match
from jaxcompress.specs import LeafContext, Spec, is_count, is_number, on_all_devices, on_auto_axes

METRICS = ("weights", "output", "fisher")
UNITS = ("bytes", "multiplications")


def allocate_ranks(
    fn: Callable[..., Any] | None,
    params: Any,
    batches: Iterable[Any] = (),
    *,
    budget: float,
    unit: str = "bytes",
    **options: Any,
) -> Allocation:
    """Chooses a rank for each leaf, or leaves it dense: the least error in sum within a budget.

        minimize sum_i E[i, r(i)]   subject to   sum_i cost[i, r(i)] <= budget

    The error of every rank of a leaf comes of one spectrum, the sum of the squared singular values
    that are left out. The program is solved to optimality; a larger budget never gives a larger
    error.

    Args:
      fn: see `rank_errors`, like all others but `budget` and `unit`.
      params: a tree of dense arrays.
      batches: what to run `fn` on.
      budget: above 1 an amount: bytes of the whole tree, or multiplications by the leaves that have
        a choice, over all batches. Up to 1 a share of what the leaves that have a choice take when
        they are dense.
      unit: `"bytes"` or `"multiplications"`.
      **options: the others of `rank_errors`.

    Returns:
      An `Allocation`, whose `rules` are for `compress`, with the `stats` that the error was found
      by.

    Raises:
      SpecError: for a budget below the least possible, and as `rank_errors`.
      RuleError: as `rank_errors`.

    References:
      Kim, Khan and Kyung, *Efficient Neural Network Compression*, 2019 (ranks of all layers under
      one budget); Sinha and Zoltners, *The Multiple-Choice Knapsack Problem*, 1979.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> params = {"a": jnp.diag(jnp.linspace(8.0, 1.0, 8)), "b": jnp.ones((8, 8))}
      >>> found = allocate_ranks(None, params, metric="weights", budget=0.75, min_size=0)
      >>> found.rules
      {'a': None, 'b': LowRank(1)}
    """
    return allocated(rank_errors(fn, params, batches, **options), budget, unit)


def allocated(table: Sensitivities, budget: float, unit: str = "bytes") -> Allocation:
    """The ranks of least error within one budget, of a table that was made once.

    Args:
      table: from `rank_errors`.
      budget: as in `allocate_ranks`.
      unit: likewise.

    Raises:
      SpecError: for a budget that is none, or below the least possible.

    Examples:
      >>> import jax.numpy as jnp
      >>> table = rank_errors(None, {"w": jnp.ones((8, 8))}, metric="weights", min_size=0)
      >>> [allocated(table, share).rules["w"] for share in (0.3, 0.25)]
      [LowRank(1), LowRank(1)]
    """
    if unit not in UNITS:
        raise SpecError(f"unit={unit!r}: write one of {', '.join(UNITS)}")
    if not is_number(budget) or budget <= 0:
        raise SpecError(
            f"budget={budget!r}: write a share of the dense leaves up to 1, such as 0.5, or an "
            f"amount of {unit}"
        )
    if unit == "multiplications" and unit not in table.leaves[0].candidates[0].costs:
        raise SpecError(
            "multiplications are counted while a function runs: give fn and batches, or stats"
        )
    if budget <= 1:
        dense = [next(c for c in leaf.candidates if c.spec is None) for leaf in table.leaves]
        whole = sum(c.bytes if unit == "bytes" else c.costs[unit] for c in dense)
        # Back from a product, whose rounding must not cost a byte.
        budget = math.floor(budget * whole * (1 + 1e-12))
        budget += table.dense_bytes if unit == "bytes" else 0
    return table.allocate({unit: budget})


def rank_errors(
    fn: Callable[..., Any] | None,
    params: Any,
    batches: Iterable[Any] = (),
    *,
    metric: str = "output",
    candidates: int | Sequence[int] = 64,
    leaves: str | Sequence[str] | None = None,
    min_size: int = 1024,
    stats: Stats | None = None,
    axes: Mapping[str, KernelAxes] | None = None,
    progress: bool = False,
) -> Sensitivities:
    """The error and the cost of many ranks of each leaf, from one spectrum of each.

    With d what a rank leaves out of a leaf w, and sums over all batches:

    - `output`: `tr(d' G d) / tr(w' G w)`, G the Gram matrix of the inputs that meet the leaf: the
      relative squared error of its outputs. The rules are `ActivationSVD(rank)`, without damping.
    - `fisher`: `sum_i f_i sum_j d_ij**2 / 2`, `f_i` the mean over the outputs of an input of the
      Fisher's diagonal. The rules are `FisherSVD(rank)`, without damping.
    - `weights`: `|d|**2 / |w|**2`, without data. The rules are `LowRank(rank)`.

    Args:
      fn: a function of `params` and a batch, as for `observe`; for `fisher` a loss. None where
        there is nothing to run.
      params: a tree of dense arrays.
      batches: what to run it on: `fn(params, *batch)` for a tuple, `fn(params, batch)` for
        anything else.
      metric: one of the above.
      candidates: how many ranks are tried, evenly spaced up to the largest that saves anything; or
        the ranks. To stay dense is always one more.
      leaves: globs of the leaves that get a rank; None: all floating leaves of two axes and more
        for which a rank saves anything (with `output`, that meet a contraction).
      min_size: leaves with fewer weights stay dense.
      stats: statistics of `observe` with `gram`, or of `fisher_stats`; they are collected where
        none are given.
      axes: the input and output axes of leaves by path; Flax's conventions for all others.
      progress: show a progress bar on standard error.

    Returns:
      A `Sensitivities`, whose costs are `bytes` and, where a function was observed,
      `multiplications`; `allocated` solves it for one budget.

    Raises:
      SpecError: for an unknown metric, no ranks or leaves, no batches where they are needed, and
        where statistics do not fit a leaf.
      RuleError: for globs, axes or statistics that name no leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> w = jnp.diag(jnp.array([2.0, 1.0, 1.0, 1.0, 1.0]))
      >>> table = rank_errors(None, {"w": w}, metric="weights", min_size=0)
      >>> [(row["spec"], round(row["error"], 3), row["bytes"]) for row in table.as_json()]
      [('dense', 0.0, 100), ('LowRank(1)', 0.5, 40), ('LowRank(2)', 0.375, 80)]
    """
    if metric not in METRICS:
        raise SpecError(f"metric={metric!r}: write one of {', '.join(METRICS)}")
    found = flatten(params)[0]
    check_axes(axes or {}, found)
    held = list(batches)
    stats = _stats(metric, fn, params, held, stats, leaves, axes, progress)
    mine = _choosable(found, leaves, min_size, stats if metric != "weights" else None, axes or {})
    counts = _counts(fn, params, held, stats, [hit.path for hit, *_ in mine], progress)
    table, tied = [], _tied(mine)
    with progress_bar(progress, "measuring", len(tied)) as advance:
        for group in tied:
            table.append(_measured(group, metric, candidates, stats, counts))
            advance(group[0].hit.path)
    chosen = {path for leaf in table for path in leaf.paths}
    rest = sum(nbytes(leaf) for path, leaf in found if path not in chosen)
    return Sensitivities(tuple(table), rest, metric)


class _Leaf(NamedTuple):
    hit: Hit
    leaf: Any
    how: Folding


def _stats(
    metric: str, fn: Any, params: Any, batches: list[Any], stats: Any, leaves: Any, axes: Any,
    progress: bool,
) -> Any:  # fmt: skip
    if stats is not None or metric == "weights":
        return stats
    if fn is None or not batches:
        raise SpecError(f"metric={metric!r} needs fn and batches, or stats")
    if metric == "fisher":
        return fisher_stats(fn, params, batches, leaves=leaves, axes=axes)
    return observe(fn, params, batches, ("gram",), leaves=leaves, progress=progress)


def _counts(
    fn: Any, params: Any, batches: list[Any], stats: Any, paths: list[str], progress: bool
) -> dict[str, float] | None:
    """How many inputs met each leaf, all weights of a stack together, or None if nothing ran."""
    seen = stats
    if stats is None or any(s.fisher is not None for of in stats.values() for s in of.values()):
        if fn is None or not batches:
            return None
        globs = [escape(path) for path in paths]
        seen = observe(fn, params, batches, ("abs_max",), leaves=globs, progress=progress)
    return {
        path: float(sum(np.sum(np.asarray(s.count, np.float64)) for s in seen[path].values()))
        for path in paths
        if path in seen
    }


def _choosable(
    found: Sequence[tuple[str, Any]],
    leaves: Any,
    min_size: int,
    stats: Any,
    axes: Mapping[str, KernelAxes],
) -> list[_Leaf]:
    paths = [path for path, _ in found]
    hits: list[Any] = [True] * len(paths)
    if leaves is not None:
        hits = match(dict.fromkeys([leaves] if isinstance(leaves, str) else leaves, True), paths)
    out = []
    for (path, leaf), asked in zip(found, hits):
        floating = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
        if asked is None or not floating or leaf.ndim < 2 or math.prod(leaf.shape) < min_size:
            continue
        if is_compressed(leaf) or isinstance(leaf, LazyArray):
            raise SpecError(
                f"{path}: a {type(leaf).__name__} has no dense weights to factor; write "
                "jc.decompress(params)"
            )
        named = {path: axes[path]} if path in axes else {}
        hit = plan_rules([(path, leaf)], {escape(path): LowRank(1)}, named)[0]
        assert hit is not None
        how = folding(leaf, hit.axes)
        if not saving_rank(math.prod(how.inputs), math.prod(how.outputs)):
            continue
        if stats is not None and leaves is None:
            seen = stats.get(path, {}).get(tuple(hit.axes.input))
            if seen is None or np.ndim(seen.count) > len(how.batch):  # of a grouped convolution
                continue
            if seen.gram is None and seen.fisher is None:  # a table that is only looked up
                continue
        out.append(_Leaf(hit, leaf, how))
    if not out:
        raise SpecError(
            f"no leaf has a choice: none of {len(paths)} has two axes, {min_size} weights and a "
            "rank that saves anything; lower min_size, or see what `leaves` matches"
        )
    return out


def _tied(mine: list[_Leaf]) -> list[list[_Leaf]]:
    groups: dict[Any, list[_Leaf]] = {}
    for leaf in mine:
        groups.setdefault((id(leaf.leaf), leaf.hit.axes), []).append(leaf)
    return list(groups.values())


def _measured(
    group: list[_Leaf], metric: str, candidates: Any, stats: Any, counts: dict[str, float] | None
) -> Choosable:
    """All ranks of one leaf, and of those tied to it."""
    leaf, how = group[0].leaf, group[0].how
    rows, columns = math.prod(how.inputs), math.prod(how.outputs)
    ranks = _ranks(candidates, rows, columns, group[0].hit.path)
    spectrum = np.sum([_spectrum(one, metric, stats) for one in group], axis=0)
    tail = np.concatenate([np.cumsum(spectrum[::-1])[::-1], [0.0]])  # of rank 0, 1, ...
    stack, size = math.prod(how.batch), jnp.dtype(leaf.dtype).itemsize
    seen = None if counts is None else sum(counts[one.hit.path] for one in group) / max(1, stack)
    makers: dict[str, Callable[[int], Spec]] = {
        "weights": LowRank,
        "output": lambda rank: ActivationSVD(rank, damping=0.0),
        "fisher": lambda rank: FisherSVD(rank, damping=0.0),
    }
    make = makers[metric]

    def candidate(spec: Spec | None, error: float, values: int) -> Candidate:
        taken = values * stack * size
        more = {} if seen is None else {"multiplications": seen * values * stack}
        return Candidate(spec, error, taken, taken, more)

    found = [candidate(None, 0.0, rows * columns)]
    found += [candidate(make(r), float(tail[r]), r * (rows + columns)) for r in ranks]
    return Choosable(tuple(one.hit.path for one in group), tuple(leaf.shape), tuple(found))


def _ranks(candidates: Any, rows: int, columns: int, path: str) -> list[int]:
    most = saving_rank(rows, columns)
    if isinstance(candidates, int) and not isinstance(candidates, bool):
        if candidates < 1:
            raise SpecError(f"candidates={candidates}: write how many ranks, or the ranks")
        return sorted({round(x) for x in np.linspace(1, most, min(most, candidates))})
    ranks = list(candidates)
    if not ranks or not all(is_count(r, 1) for r in ranks):
        raise SpecError(f"candidates={candidates!r}: write how many ranks, or the ranks")
    fit = sorted({int(r) for r in ranks if r <= most})
    if not fit:
        raise SpecError(
            f"{path}: none of candidates={ranks} saves anything of a {rows} x {columns} matrix; "
            f"write ranks up to {most}, or leave it out of `leaves`"
        )
    return fit


def _spectrum(one: _Leaf, metric: str, stats: Any) -> np.ndarray:
    """The squared singular values as parts of the error, summed over a stack, float64."""
    hit, how = one.hit, one.how
    leaf, _ = on_auto_axes(jnp.asarray(one.leaf))
    if metric == "weights":
        values = _of_metric(leaf, jnp.ones((*how.batch, math.prod(how.inputs))), how)
    else:
        seen = stats.get(hit.path, {}).get(tuple(hit.axes.input))
        # A spec of rank 1 refuses what does not fit, as compress would.
        spec = (ActivationSVD if metric == "output" else FisherSVD)(1)
        context = LeafContext(hit.path, hit.axes, None, seen)
        how, _ = spec.folded(leaf, context)
        values = _of_metric(leaf, on_all_devices(jnp.asarray(spec.metric(context)), leaf), how)
    values = np.asarray(values, np.float64).reshape(-1, values.shape[-1]).sum(axis=0)
    # What may be rounding alone must not ask for ranks.
    values = np.where(values > np.finfo(np.float32).eps * values.sum(), values, 0.0)
    if metric == "fisher":
        return values / math.prod(how.outputs) / 2
    return values / (values.sum() or 1.0)


@functools.partial(jax.jit, static_argnums=2)
def _of_metric(leaf: jax.Array, metric: jax.Array, how: Folding) -> jax.Array:
    return weighted_spectrum(how.fold(leaf), metric)
