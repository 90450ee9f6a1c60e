"""`allocate`: how many bits for which leaf, under a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.arrays.base import is_compressed, materialize
from jaxcompress.compress import Hit, Stats, compress_leaf, nbytes, plan_rules
from jaxcompress.errors import SpecError
from jaxcompress.lazy import LazyArray
from jaxcompress.observe import observe
from jaxcompress.progress import progress_bar
from jaxcompress.quantization.mixed import errors
from jaxcompress.quantization.mixed.costs import Cost, code_bytes, cost_of
from jaxcompress.quantization.mixed.table import (
    OWN,
    Allocation,
    Candidate,
    Choosable,
    Sensitivities,
)
from jaxcompress.rules import KernelAxes, check_axes, escape, flatten, match
from jaxcompress.specs import Spec

Choices = Sequence[Spec | None]


def allocate(
    fn: Callable[..., Any] | None,
    params: Any,
    batches: Iterable[Any] = (),
    *,
    choices: Choices | Mapping[str, Choices],
    budget: float | Mapping[str, float],
    **options: Any,
) -> Allocation:
    """Chooses for each leaf one of several specs: the least error in sum within a budget.

        minimize sum_i E[i, c(i)]   subject to   sum_i cost[i, c(i)] <= budget

    Every choice is made for real, one leaf at a time, so that bytes are those of the leaves that
    `compress` will make, scales and zero points included. The program is solved to optimality; a
    larger budget never gives a larger error.

    Args:
      fn: see `sensitivities`, like all others but `budget`.
      params: a tree of dense arrays.
      batches: what to run `fn` on.
      choices: the specs to choose from, one list for all leaves or one for each glob.
      budget: bytes of the whole tree, as a number; or several budgets, all of which are kept:
        `{"bits": 4.0}` for bits to a weight over the leaves that have a choice, with scales and
        zero points; `code_bits` for those of the codes alone; `bytes`; and any name of `costs`.
      **options: the others of `sensitivities`.

    Returns:
      An `Allocation`, whose `rules` are for `compress`.

    Raises:
      SpecError: for a budget below the least possible, and as `sensitivities`.
      RuleError: as `sensitivities`.

    References:
      Dong et al., *HAWQ: Hessian AWare Quantization of Neural Networks with Mixed-Precision*,
      2019; Yao et al., *HAWQ-V3: Dyadic Neural Network Quantization*, 2021 (the integer program).

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {"a": jax.random.normal(keys[0], (64, 32)), "b": jnp.eye(32)}
      >>> fn = lambda params, x: x @ params["a"] @ params["b"]
      >>> found = allocate(
      ...     fn, params, [jax.random.normal(keys[1], (100, 64))],
      ...     choices=[jc.Quantize("int2"), jc.Quantize("int8")], budget={"code_bits": 6.0},
      ... )
      >>> found.rules
      {'a': Quantize('int8'), 'b': Quantize('int2')}
      >>> found.bytes == jc.nbytes(jc.compress(params, found.rules))
      True
    """
    return sensitivities(fn, params, batches, choices=choices, **options).allocate(budget)


def sensitivities(
    fn: Callable[..., Any] | None,
    params: Any,
    batches: Iterable[Any] = (),
    *,
    choices: Choices | Mapping[str, Choices],
    sensitivity: str | errors.Error = "output",
    leaves: str | Sequence[str] | None = None,
    min_size: int = 1024,
    stats: Stats | None = None,
    axes: Mapping[str, KernelAxes] | None = None,
    costs: Mapping[str, Cost | Mapping[str, Sequence[float]]] | None = None,
    key: jax.Array | None = None,
    probes: int = 8,
    progress: bool = False,
) -> Sensitivities:
    """The error and the cost of every choice of every leaf.

    With w a leaf, d what a choice changes in it, and sums over all batches:

    - `output`: `tr(d' G d) / tr(w' G w)`, G the Gram matrix of the inputs that meet the leaf: the
      relative squared error of its outputs. One pass over the batches.
    - `end_to_end`: `sum |y' - y|**2 / sum |y|**2` of what `fn` returns with this one leaf changed.
      One pass for each leaf and choice.
    - `hessian`: `t |d|**2 / 2`, t the mean of the diagonal of the leaf's block of the Hessian of a
      loss, estimated with random signs (Hutchinson); a mean below zero counts as zero.
    - `fisher`: `sum f d**2 / 2`, f the mean over examples of the squared gradients of a loss.
    - `weight`: `|d|**2 / |w|**2`; needs no data.

    Args:
      fn: a function of `params` and a batch, as for `observe`; for `hessian` and `fisher` a loss,
        which for `fisher` is given batches of one example. None where nothing is run.
      params: a tree of dense arrays.
      batches: what to run it on: `fn(params, *batch)` for a tuple, `fn(params, batch)` for
        anything else.
      choices: the specs to choose from; None among them leaves a leaf dense. A dict gives each
        glob over paths its own, the first match wins; what matches none stays dense.
      sensitivity: one of the above, or a function of a path, the dense leaf and the same as a
        choice would make it, both arrays.
      leaves: globs of the leaves that get the choices of a list; None: all floating leaves of two
        axes and more.
      min_size: leaves with fewer weights stay dense.
      stats: statistics from `observe`, for specs that need them, and for `output`; those are
        collected where none are given.
      axes: the input and output axes of leaves by path, from `kernel_axes`.
      costs: further costs by name: a function of path, dense leaf and compressed leaf (see
        `bops`), or a table with the cost of each choice, by path.
      key: a random key, for specs that draw and the probes of `hessian`.
      probes: how many for each batch.
      progress: show a progress bar on standard error.

    Returns:
      A `Sensitivities`; its method `allocate` solves for one budget, at no further cost.

    Raises:
      SpecError: for no choices, an unknown sensitivity, no batches where they are needed, an error
        that is no number, and where a spec does not fit its leaf.
      RuleError: for globs, axes or statistics that name no leaf.

    References:
      Dong et al., *HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks*, 2020;
      Hutchinson, *A Stochastic Estimator of the Trace of the Influence Matrix for Laplacian
      Smoothing Splines*, 1990.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> w = jnp.array([[7.0, 0.0], [3.4, 7.0]])
      >>> specs = [jc.Quantize("int4"), None]
      >>> table = sensitivities(
      ...     None, {"w": w}, choices=specs, sensitivity="weight", min_size=0
      ... )
      >>> [row["bytes"] for row in table.as_json()]
      [6, 16]
    """
    found = flatten(params)[0]
    mine = _choosable(found, choices, leaves, min_size)
    for name in costs or {}:
        if name in OWN:
            raise SpecError(f"costs[{name!r}]: every choice has such a cost; take another name")
    held = list(batches)
    if stats is None and sensitivity == "output":
        if fn is None or not held:
            raise SpecError("sensitivity='output' needs fn and batches, or stats")
        globs = [escape(path) for path in mine]
        stats = observe(fn, params, held, ("gram",), leaves=globs, progress=progress)
    error = _error(sensitivity, fn, params, held, stats, key, probes)
    check_axes(axes or {}, found)
    hits = {p: _hits(p, leaf, mine[p], axes or {}) for p, leaf in found if p in mine}
    groups = _tied(found, mine, hits)
    out = []
    with progress_bar(progress, "measuring", sum(len(mine[g[0][0]]) for g in groups)) as advance:
        for group in groups:
            out.append(_measured(group, hits, error, costs or {}, key, stats, advance))
    chosen = {path for leaf in out for path in leaf.paths}
    rest = sum(nbytes(leaf) for path, leaf in found if path not in chosen)
    kind = sensitivity if isinstance(sensitivity, str) else "own"
    return Sensitivities(tuple(out), rest, kind)


def _choosable(
    found: Sequence[tuple[str, Any]], choices: Any, leaves: Any, min_size: int
) -> dict[str, tuple[Spec | None, ...]]:
    """The paths of the leaves that have a choice, with their choices."""
    globs = choices if isinstance(choices, Mapping) else None
    if globs is not None and leaves is not None:
        raise SpecError("choices is a dict of globs, and so says which leaves; leave out `leaves`")
    if globs is None and leaves is not None:
        globs = dict.fromkeys([leaves] if isinstance(leaves, str) else leaves, choices)
    paths = [path for path, _ in found]
    hits: list[Any] = [("", choices)] * len(paths) if globs is None else match(globs, paths)
    out = {}
    for (path, leaf), hit in zip(found, hits):
        floating = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
        if hit is None or hit[1] is None or (globs is None and not (floating and leaf.ndim > 1)):
            continue
        if not hasattr(leaf, "shape") or math.prod(leaf.shape) < max(1, min_size):
            continue
        if is_compressed(leaf) or isinstance(leaf, LazyArray):
            raise SpecError(
                f"{path}: a {type(leaf).__name__} has no dense weights to choose for; write "
                "jc.decompress(params)"
            )
        specs = tuple(hit[1])
        if not specs or any(not isinstance(s, Spec) and s is not None for s in specs):
            raise SpecError(
                f"choices of {path!r} are {specs}; write specs such as Quantize('int4')"
            )
        out[path] = specs
    if not out:
        raise SpecError(
            f"no leaf has a choice: none of {len(paths)} has two axes and {min_size} weights, or "
            "all globs match smaller ones; lower min_size"
        )
    return out


def _error(
    kind: Any, fn: Any, params: Any, batches: list[Any], stats: Stats | None, key: Any, probes: int
) -> errors.ErrorOfAll:
    if callable(kind):
        return errors.summed(kind)
    if kind not in errors.KINDS:
        raise SpecError(f"sensitivity={kind!r}: write one of {', '.join(errors.KINDS)}")
    if kind == "weight":
        return errors.summed(errors.weight_error)
    if kind == "output":
        return errors.summed(errors.output_error(stats or {}))
    if fn is None:
        raise SpecError(f"sensitivity={kind!r} runs a function, and fn is None")
    if kind == "end_to_end":
        return errors.end_to_end_error(fn, params, batches)
    if kind == "fisher":
        return errors.summed(errors.fisher_error(fn, params, batches))
    return errors.summed(errors.hessian_error(fn, params, batches, key, probes))


def _hits(path: str, leaf: Any, specs: Choices, axes: Mapping[str, KernelAxes]) -> list[Hit | None]:
    """What each choice would do to one leaf, refused as `compress` would refuse it."""
    mine = {path: axes[path]} if path in axes else {}
    return [plan_rules([(path, leaf)], {escape(path): spec}, mine)[0] for spec in specs]


def _tied(found: Any, mine: Mapping[str, Any], hits: Mapping[str, Any]) -> list[list[Any]]:
    """Leaves with the same array, axes and choices, together, as `(path, leaf, index)`."""
    groups: dict[Any, list[Any]] = {}
    for index, (path, leaf) in enumerate(found):
        if path in mine:
            where = next((hit.axes for hit in hits[path] if hit is not None), None)
            groups.setdefault((id(leaf), mine[path], where), []).append((path, leaf, index))
    return list(groups.values())


def _measured(
    group: Sequence[tuple[str, Any, int]],
    hits: Mapping[str, list[Hit | None]],
    error: errors.ErrorOfAll,
    costs: Mapping[str, Any],
    key: jax.Array | None,
    stats: Stats | None,
    advance: Callable[[str], None],
) -> Choosable:
    """All choices of one leaf, each made, measured and let go."""
    first, leaf, index = group[0]
    array, paths = jnp.asarray(leaf), tuple(path for path, *_ in group)
    candidates = []
    for c, hit in enumerate(hits[first]):
        small, dense = array, array
        if hit is not None:
            small = compress_leaf(leaf, hit.spec, hit.context(key, index, stats), donate=False)
            dense = materialize(small)
        value = 0.0 if hit is None else float(error(paths, array, dense))
        if not math.isfinite(value):
            name = "dense" if hit is None else repr(hit.spec)
            raise SpecError(f"{first}: the error of {name} is {value}, and no number")
        more = {
            name: sum(cost_of(cost, name, path, c, array, small) for path in paths)
            for name, cost in costs.items()
        }
        spec = None if hit is None else hit.spec
        candidates.append(Candidate(spec, value, nbytes(small), code_bytes(small), more))
        advance(first)
    return Choosable(paths, tuple(array.shape), tuple(candidates))
