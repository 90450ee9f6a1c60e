"""Trees with adapted leaves: what is trained, and changes taken into the weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.arrays.adapted import AdaptedArray
from jaxcompress.arrays.base import cast, is_compressed, materialize
from jaxcompress.errors import SpecError
from jaxcompress.rules import KernelAxes, check_axes, default_axes, flatten, map_with_path
from jaxcompress.specs import LeafContext, Spec


def partition_adapters(tree: Any) -> tuple[Any, Any]:
    """Splits a tree into the changes of its adapted leaves and all the rest.

    Args:
      tree: any pytree.

    Returns:
      `(adapters, rest)`, each with None where the other has arrays; `jaxcompress.combine` puts them
      together. Differentiate with respect to the first, and give it to the optimizer.

    Raises:
      SpecError: where nothing is adapted.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.decomposition.lora import LoRA
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
      >>> params = jc.compress(params, {"kernel": LoRA(1)}, key=jax.random.key(0))
      >>> adapters, rest = partition_adapters(params)
      >>> [x.shape for x in jax.tree.leaves(adapters)], rest["bias"].shape
      ([(4, 1), (1, 3)], (3,))
    """
    adapted = lambda x: isinstance(x, AdaptedArray)
    if not any(adapted(x) for x in jax.tree.leaves(tree, is_leaf=adapted)):
        raise SpecError("no leaf is adapted: compress some by LoRA first, or use jc.partition")

    def part(x: Any, delta: bool) -> Any:
        """The change, or all but it."""
        nothing = lambda y: jax.tree.map(lambda _: None, y)
        if not adapted(x):
            return None if delta else x
        if delta:
            return x.replace(base=nothing(x.base))
        return x.replace(delta=nothing(x.delta))

    adapters = jax.tree.map(lambda x: part(x, True), tree, is_leaf=adapted)
    rest = jax.tree.map(lambda x: part(x, False), tree, is_leaf=adapted)
    return adapters, rest


def merge(tree: Any, spec: Spec | None = None, *, axes: dict[str, KernelAxes] | None = None) -> Any:
    """The tree with each change taken into its weight, and the weight perhaps compressed anew.

    A merged leaf costs no product of its own, but is another weight than the one that was trained:
    rounded to the dtype, and then by `spec`, whose steps may be larger than the change itself.
    `merge_gaps` says what that lost. `jaxcompress.finalize` merges only where the base is dense.

    Args:
      tree: a tree with adapted leaves; all others stay as they are.
      spec: how merged weights are compressed, such as `Quantize("nf4", group_size=64)`. None: they
        are dense.
      axes: the input and output axes of leaves by path, as in `jaxcompress.compress`.

    Returns:
      The tree, each adapted leaf dense or what the spec makes of it.

    Raises:
      SpecError: for a change within another leaf.
      RuleError: for `axes` that name no leaf.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.decomposition.lora import LoRA
      >>> qlora = jc.chain(jc.Quantize("int4"), LoRA(1))
      >>> params, key = {"kernel": jnp.ones((4, 3))}, jax.random.key(0)
      >>> params = jc.compress(params, {"kernel": qlora}, key=key)
      >>> merge(params, jc.Quantize("int8"))
      {'kernel': QuantizedArray(float32[4, 3], int8)}
    """

    leaves = flatten(tree)[0]
    check_axes(axes or {}, leaves)
    for path, leaf in leaves:
        _refuse_within(path, leaf)

    def one(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, AdaptedArray):
            return leaf
        dense = leaf.materialize()
        if spec is None:
            return dense
        return spec(dense, LeafContext(path, (axes or {}).get(path, default_axes(path, leaf.ndim))))

    return map_with_path(one, tree)


def _refuse_within(path: str, leaf: Any) -> None:
    """An adapter within another leaf would be passed over."""
    if not is_compressed(leaf) or isinstance(leaf, AdaptedArray):
        return
    adapted = lambda x: isinstance(x, AdaptedArray)
    if any(adapted(x) for x in jax.tree.leaves(leaf, is_leaf=adapted)):
        raise SpecError(
            f"{path}: the change is within a {type(leaf).__name__}, which is not merged; merge "
            "first, and put that around what comes out"
        )


class Gap(NamedTuple):
    """What merging changed of one weight.

    Attributes:
      weight: `|merged - trained| / |trained|`, in Frobenius norms.
      change: `|merged - trained| / |scale * delta|`: what share of the trained change rounding is
        as large as; 1 and more when the change is drowned. Infinite where the change is zero, but
        0 where nothing was lost.
    """

    weight: float
    change: float


def merge_gaps(trained: Any, merged: Any) -> dict[str, Gap]:
    """How far the merged weights are from those that were trained, by path.

    Args:
      trained: a tree with adapted leaves.
      merged: what `merge` or `jaxcompress.finalize` made of it.

    Returns:
      A `Gap` for each adapted leaf. The trained weight is `base + scale * delta` in float32, before
      any rounding. A leaf that `finalize` kept adapted has a gap as well, of rounding the factors
      to the dtype of the base, which they are used in; its outputs are the same.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.decomposition.lora import LoRA
      >>> params, key = {"kernel": jnp.ones((4, 3))}, jax.random.key(0)
      >>> params = jc.compress(params, {"kernel": LoRA(1)}, key=key)
      >>> merge_gaps(params, jc.finalize(params))
      {'kernel': Gap(weight=0.0, change=0.0)}
    """
    after = dict(flatten(merged)[0])
    out = {}
    for path, leaf in flatten(trained)[0]:
        _refuse_within(path, leaf)
        if isinstance(leaf, AdaptedArray):
            if path not in after:
                raise SpecError(f"{path} is not in the merged tree: give what merge made of this")
            out[path] = Gap(*map(float, _gap(leaf, after[path])))
    return out


@jax.jit
def _gap(leaf: AdaptedArray, merged: Any) -> tuple[jax.Array, jax.Array]:
    change = leaf.scale * _wide(cast(leaf.delta, jnp.float32))
    trained = _wide(leaf.base) + change
    lost = jnp.linalg.norm((_wide(merged) - trained).ravel())

    def share(of: jax.Array) -> jax.Array:
        return jnp.where(lost == 0, 0.0, lost / jnp.linalg.norm(of.ravel()))

    return share(trained), share(change)


def _wide(x: Any) -> jax.Array:
    return materialize(x).astype(jnp.float32)
