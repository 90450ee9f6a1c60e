"""The verbs on whole trees: compress, decompress, finalize, partition, combine, nbytes."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import CompressedArray, is_compressed, materialize
from jaxcompress.errors import RuleError, SpecError
from jaxcompress.input_stats import InputStats
from jaxcompress.lazy import LazyArray
from jaxcompress.progress import progress_bar
from jaxcompress.rules import KernelAxes, RuleSet, check_axes, default_axes, flatten, match
from jaxcompress.specs import LeafContext, Spec

if TYPE_CHECKING:  # pruning stands above
    from jaxcompress.pruning.structure.plans import Plan as RemovalPlan

Stats = Mapping[str, Mapping[tuple[int, ...], InputStats]]


def compress(
    params: Any,
    rules: Mapping[str, Spec | None] | RuleSet,
    *,
    key: jax.Array | None = None,
    donate: bool = False,
    progress: bool = False,
    axes: Mapping[str, KernelAxes] | None = None,
    lazy: bool = False,
    stats: Stats | None = None,
    plan: RemovalPlan | None = None,
) -> Any:
    """Compresses the leaves of a parameter tree by rules.

    A rule is a glob over `/`-joined paths and a spec; `*` stays within one key and `**` spans
    any number. The first rule that matches a leaf wins; None leaves it dense, as does no match. The
    tree is treated leaf by leaf, so at no time does more exist than the input, the output and what
    one leaf needs; shardings are kept.

    Args:
      params: any pytree of arrays: nested dicts, NNX state, partitioning boxes, lazily loaded.
      rules: `{pattern: spec}`, in order of precedence; or a `Recipe`.
      key: a random key, for specs that draw.
      donate: delete each dense array once it is compressed. The input is gone then; with it, the
        peak is the input and two leaves rather than the input and the output. An array that
        occurs at several places of the tree is kept.
      progress: show a progress bar on standard error.
      axes: the input and output axes of leaves by path, from `kernel_axes`; the conventions of
        Flax for all others (see `default_axes`).
      lazy: compress each leaf when it is loaded, and each time anew: with lazy leaves of a file in
        and `save` at the other end, a model larger than memory is compressed leaf by leaf. Until
        then a leaf counts as many bytes as it had; nothing is donated.
      stats: statistics of inputs from `observe`, for specs that look at them; a spec is given
        those of its leaf's input axes.
      plan: the channels that are removed first, from `jaxcompress.pruning.plan` or the stage of a
        recipe (`recipe.shrink.plan(groups, params)`). Rules, `axes` and `stats` are then of the
        smaller leaves, and `compressed(jaxcompress.pruning.shrunk(fn, plan))` runs the result. A
        recipe with such a stage must be given its plan, so that it is never left out silently.

    Returns:
      The same tree, the matched leaves compressed. A leaf that occurs at several places, under one
      spec, is compressed once.

    Raises:
      RuleError: for a rule that matches nothing, or matches integers, and for `axes` or `stats`
        that name no leaf or do not fit it.
      SpecError: where a spec does not fit its leaf, or the leaf is empty or not finite; the message
        names the leaf; or the recipe has a removal of channels, and no plan is given. The input is
        left as it was, unless donated leaves are gone already.
      CompressError: for a plan that is of other params.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> params = {"mlp": {"kernel": jnp.ones((256, 64)), "bias": jnp.zeros(64)}}
      >>> small = jc.compress(params, {"**/kernel": jc.Quantize("int4", group_size=64)})
      >>> small["mlp"]["kernel"]
      QuantizedArray(float32[256, 64], int4/64)
    """
    leaves, structure = flatten(params)
    leaves = smaller(leaves, rules, plan, donate and not lazy)
    hits = plan_rules(leaves, rules, axes or {})
    _check_stats(stats or {}, leaves)
    key = rules.key() if key is None and isinstance(rules, RuleSet) else key
    todo = sum(hit is not None for hit in hits)
    uses = collections.Counter(id(leaf) for _, leaf in leaves)  # a tied leaf must outlive its first
    tied: dict[Any, Any] = {}
    out: list[Any] = []
    with progress_bar(progress, "compressing", 0 if lazy else todo) as advance:
        while leaves:
            # Taken off the list, so that nothing here keeps a donated leaf alive.
            (path, leaf), hit, index = leaves.pop(0), hits[len(out)], len(out)
            if hit is None:
                out.append(leaf if lazy or not isinstance(leaf, LazyArray) else leaf.load())
                continue
            tie = (id(leaf), hit.spec, hit.axes) if uses[id(leaf)] > 1 else None
            small = tied.get(tie)
            if small is None:
                context, spare = hit.context(key, index, stats), donate and tie is None
                one = _lazily if lazy else compress_leaf
                small = one(leaf, hit.spec, context, spare)
                if tie is not None:
                    tied[tie] = small
            out.append(small)
            del leaf
            advance(path)
    return jax.tree.unflatten(structure, out)


def smaller(
    leaves: list[tuple[str, Any]],
    rules: Mapping[str, Spec | None] | RuleSet,
    plan: RemovalPlan | None,
    donate: bool = False,
) -> list[tuple[str, Any]]:
    """The leaves that the rules see: those without removed channels, made one by one."""
    if plan is not None:
        from jaxcompress.pruning.structure.stage import smaller_leaves

        return smaller_leaves(leaves, plan, donate)
    if getattr(rules, "shrink", None) is not None:
        raise SpecError(
            "the recipe removes channels before its rules, and which go together is a matter of "
            "the function: write plan = recipe.shrink.plan(jc.pruning.groups(fn, params, x), "
            "params), and compress with plan=plan"
        )
    return leaves


class Hit(NamedTuple):
    """What a rule makes of one leaf.

    Attributes:
      path: the leaf's path.
      pattern: the pattern that matched.
      spec: what it is compressed by.
      axes: its input and output axes.
    """

    path: str
    pattern: str
    spec: Spec
    axes: KernelAxes

    def context(self, key: jax.Array | None, index: int, stats: Stats | None = None) -> LeafContext:
        """What the spec is told; `index` is the number of the leaf in its tree."""
        leaf_key = None if key is None else jax.random.fold_in(key, index)
        mine = (stats or {}).get(self.path, {}).get(tuple(self.axes.input))
        return LeafContext(self.path, self.axes, leaf_key, mine)


def plan_rules(
    leaves: Sequence[tuple[str, Any]],
    rules: Mapping[str, Spec | None] | RuleSet,
    axes: Mapping[str, KernelAxes],
) -> list[Hit | None]:
    """For each leaf what is done to it, or None; all that can be refused before any is touched."""
    if isinstance(rules, RuleSet):
        found = rules.match(leaves)
    else:
        found = match(rules, [path for path, _ in leaves])
    check_axes(axes, leaves)
    hits: list[Hit | None] = []
    for (path, leaf), hit in zip(leaves, found):
        if hit is None or hit[1] is None:
            hits.append(None)
            continue
        _check_static(path, leaf, *hit)
        where = axes.get(path, default_axes(path, len(leaf.shape)))
        hits.append(Hit(path, *hit, where))
    return hits


def _check_stats(stats: Stats, leaves: Sequence[tuple[str, Any]]) -> None:
    paths = {path for path, _ in leaves}
    for path in stats:
        if path not in paths:
            raise RuleError(
                f"stats are of {path!r}, which is no leaf of the tree; observe the function on the "
                "same tree that is compressed"
            )


def _lazily(leaf: Any, spec: Spec, context: LeafContext, donate: bool) -> LazyArray:
    return LazyArray(
        tuple(leaf.shape), jax.dtypes.canonicalize_dtype(leaf.dtype), nbytes(leaf),
        lambda: compress_leaf(leaf, spec, context, donate=False),
    )  # fmt: skip


def compress_leaf(leaf: Any, spec: Spec, context: LeafContext, donate: bool) -> Any:
    """One leaf as `compress` makes it, when it is there."""
    array = leaf.load() if isinstance(leaf, LazyArray) else leaf
    if not is_compressed(array):
        array = jnp.asarray(array)
        _check_finite(context.path, array)
    out = spec(array, context)
    if isinstance(array, jax.core.Tracer) or any(
        isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(out)
    ):
        return out
    # Without waiting, leaf after leaf would be in flight at once and add up.
    jax.block_until_ready(out)
    held = any(x is array for x in jax.tree.leaves(out))  # by a leaf around it
    if donate and isinstance(array, jax.Array) and not held:
        array.delete()
    return out


def _check_static(path: str, leaf: Any, pattern: str, spec: Any) -> None:
    """All that can be refused before any leaf is touched."""
    if not isinstance(spec, Spec):
        raise RuleError(
            f"rule {pattern!r}: {spec!r} is no spec; write one such as Quantize('int8'), or None"
        )
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        raise RuleError(
            f"rule {pattern!r} matches {path!r}, which is {type(leaf).__name__} and no array; "
            f"put {path!r}: None before it"
        )
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise RuleError(
            f"rule {pattern!r} matches {path!r}, which is a shape without values; write "
            "jax.eval_shape(lambda params: jc.compress(params, rules), params)"
        )
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise RuleError(
            f"rule {pattern!r} matches {path!r} of dtype {leaf.dtype}, and only floating leaves "
            f"can be compressed; put {path!r}: None before it"
        )
    if 0 in leaf.shape:
        raise SpecError(
            f"{path}: shape {tuple(leaf.shape)} holds no values to compress; put {path!r}: None "
            f"before rule {pattern!r}"
        )


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(x))


def _check_finite(path: str, array: jax.Array) -> None:
    if isinstance(array, jax.core.Tracer) or _all_finite(array):
        return
    bad = int(jnp.sum(~jnp.isfinite(array)))
    raise SpecError(
        f"{path}: {bad} of {array.size} values are NaN or infinite; mend them, for instance with "
        "jnp.nan_to_num, before compressing"
    )


def _map_leaves(fn: Callable[[CompressedArray], Any], tree: Any) -> Any:
    return jax.tree.map(lambda x: fn(x) if is_compressed(x) else x, tree, is_leaf=is_compressed)


def decompress(tree: Any) -> Any:
    """The tree with every compressed leaf as the dense array it stands for; lazy leaves are read.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> jc.decompress({"w": jc.Prune(0.5)(jnp.array([1.0, -2.0]))})
      {'w': Array([ 0., -2.], dtype=float32)}
    """
    tree = jax.tree.map(lambda x: x.load() if isinstance(x, LazyArray) else x, tree)
    return _map_leaves(materialize, tree)


def finalize(tree: Any) -> Any:
    """The tree with every trainable leaf in its storage form; storage leaves stay as they are.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> jc.finalize({"w": jc.Quantize("int8")(jnp.ones((2, 2)))})
      {'w': QuantizedArray(float32[2, 2], int8)}
    """
    return _map_leaves(lambda leaf: leaf.finalize(), tree)


def nbytes(tree: Any) -> int:
    """The bytes of all arrays of a tree: codes, scales, masks, codebooks and dense leaves.

    A leaf of n values of b bits counts `n b / 8` bytes and its scales, which is what it
    takes in memory. Shapes (`jax.ShapeDtypeStruct`) count like arrays.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> jc.nbytes({"w": jnp.ones((128, 8)), "b": jnp.ones(8)})
      4128
    """
    total = 0
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, LazyArray):
            total += leaf.nbytes
        elif hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            total += nbytes(jax.eval_shape(jax.random.key_data, leaf))
        elif hasattr(leaf, "dtype"):
            total += int(np.prod(leaf.shape, dtype=np.int64)) * jnp.dtype(leaf.dtype).itemsize
        else:
            total += np.asarray(leaf).nbytes
    return total


def trainable_mask(tree: Any) -> Any:
    """A tree of booleans in the structure of `tree`: which arrays an optimizer should see.

    Dense floating arrays and the trainable children of compressed leaves (factors, centroids, kept
    values); never codes, masks, indices or the scales of a storage leaf. `partition` splits a
    tree by it, and it is the first half of that split that an optimizer should be given: integer
    arrays have no gradients to update them by.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> tree = {"step": jnp.zeros((), int), "w": jc.LowRank(1)(jnp.ones((4, 4)))}
      >>> jax.tree.leaves(jc.trainable_mask(tree))
      [False, True, True]
    """

    def mark(x: Any, above: bool) -> Any:
        if is_compressed(x):
            return x.replace(
                **{
                    name: jax.tree.map(
                        lambda y, on=above and name in x.trainable: mark(y, on),
                        getattr(x, name),
                        is_leaf=is_compressed,
                    )
                    for name in x.children
                }
            )
        if not hasattr(x, "dtype"):
            return above and isinstance(x, (float, complex))
        return above and bool(jnp.issubdtype(x.dtype, jnp.inexact))

    return jax.tree.map(lambda x: mark(x, True), tree, is_leaf=is_compressed)


def partition(tree: Any) -> tuple[Any, Any]:
    """Splits a tree into what is trained and the rest, each with None where the other has arrays.

    Differentiate with respect to the first; no `allow_int` is needed.

    Returns:
      `(trainable, rest)`; `combine(trainable, rest)` is the tree.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> params = {"w": jc.LowRank(1)(jnp.ones((4, 4)))}
      >>> trainable, rest = jc.partition(params)
      >>> loss = lambda t: jc.compressed(lambda p: p["w"].sum())(jc.combine(t, rest))
      >>> jax.grad(loss)(trainable)["w"].left.shape
      (4, 1)
    """
    mask = trainable_mask(tree)
    chosen = jax.tree.map(lambda m, x: x if m else None, mask, tree)
    rest = jax.tree.map(lambda m, x: None if m else x, mask, tree)
    return chosen, rest


def combine(*trees: Any) -> Any:
    """Puts the parts of `partition` together: at each place the first that is not None."""
    return jax.tree.map(
        lambda *xs: next((x for x in xs if x is not None), None),
        *trees,
        is_leaf=lambda x: x is None,
    )
