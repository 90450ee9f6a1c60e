"""Layers of one shape as mixtures of a few templates, the best ones by SVD."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.arrays.base import is_compressed
from jaxcompress.arrays.template import TemplateArray
from jaxcompress.decomposition.svd import truncated_svd
from jaxcompress.errors import SpecError
from jaxcompress.numerics import rounded
from jaxcompress.rules import flatten, match
from jaxcompress.specs import is_count


def template_bank(stack: jax.Array, templates: int) -> tuple[jax.Array, jax.Array]:
    """The bank and the coefficients whose mixtures are nearest to some weights.

    `min sum_l |w_l - sum_k alpha_lk T_k|^2` is a truncated SVD of the matrix whose rows are the
    weights (Eckart and Young). Templates and coefficients are scaled alike, as `truncated_svd` has
    them.

    Args:
      stack: `[L, *weight]`, any float dtype.
      templates: K, from 1 to `min(L, n)` for n values in a weight; static.

    Returns:
      The bank `[K, *weight]` in the dtype of the stack, and `alpha`, `[L, K]`, in float32.

    References:
      Savarese and Maire, *Learning Implicitly Recurrent CNNs Through Parameter Sharing*, 2019;
      Eckart and Young, *The approximation of one matrix by another of lower rank*, 1936.

    Examples:
      >>> import jax.numpy as jnp
      >>> bank, alpha = template_bank(jnp.stack([jnp.ones((2, 2)), 3 * jnp.ones((2, 2))]), 1)
      >>> bank.shape, round(float(alpha[1, 0] / alpha[0, 0]), 4)
      ((1, 2, 2), 3.0)
    """
    flat = stack.reshape(stack.shape[0], -1).astype(jnp.float32)
    alpha, bank = truncated_svd(flat, templates)
    return rounded(bank, stack.dtype).reshape(templates, *stack.shape[1:]), alpha


_bank = jax.jit(template_bank, static_argnums=1)


def share_templates(params: Any, rules: Mapping[str, int | None]) -> Any:
    """Puts the leaves that one rule matches into one bank of templates.

    Each leaf becomes a `TemplateArray` with the bank of its rule, one object at all its places, and
    coefficients of its own: `save` stores the bank once, and `tie(tree)` gives the tree in which
    it is trained as one:

        shared, ties = tie(share_templates(params, {"**/kernel": 4}))
        loss = lambda shared, x: jc.compressed(apply)(ties.expand(shared), x)

    Args:
      params: any pytree of arrays.
      rules: `{glob: number of templates, or None}`; the first that matches a leaf wins.

    Returns:
      The tree.

    Raises:
      RuleError: for a rule that matches nothing.
      SpecError: for leaves of one rule that differ in shape or dtype, or are fewer than templates.

    References:
      Savarese and Maire, *Learning Implicitly Recurrent CNNs Through Parameter Sharing*, 2019;
      Plummer et al., *Neural Parameter Allocation Search*, 2022.

    Examples:
      >>> import jax.numpy as jnp
      >>> tree = share_templates({"a": jnp.ones((8, 8)), "b": 2 * jnp.ones((8, 8))}, {"*": 1})
      >>> tree["b"], tree["a"].bank is tree["b"].bank
      (TemplateArray(float32[8, 8], 1 templates), True)
    """
    leaves, structure = flatten(params)
    found: dict[str, list[int]] = collections.defaultdict(list)
    for i, hit in enumerate(match(rules, [path for path, _ in leaves])):
        if hit is not None and hit[1] is not None:
            found[hit[0]].append(i)
    out = [leaf for _, leaf in leaves]
    for pattern, places in found.items():
        members = [leaves[i] for i in places]
        _check(pattern, rules[pattern], members)
        bank, alpha = _bank(jnp.stack([leaf for _, leaf in members]), rules[pattern])
        for row, i in enumerate(places):
            out[i] = TemplateArray.of(bank, alpha[row])
    return jax.tree.unflatten(structure, out)


def _check(pattern: str, templates: Any, members: list[tuple[str, Any]]) -> None:
    first, like = members[0]
    for path, leaf in members:
        if is_compressed(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise SpecError(f"{path}: {leaf!r} is no dense floating array; a bank is made of those")
        if leaf.shape != like.shape or leaf.dtype != like.dtype:
            raise SpecError(
                f"rule {pattern!r}: {path} is {leaf.dtype}{list(leaf.shape)} and {first} "
                f"{like.dtype}{list(like.shape)}; a bank has one shape and dtype, so write "
                "a rule for each"
            )
    most = min(len(members), like.size)
    if not is_count(templates, 1, most):
        raise SpecError(
            f"rule {pattern!r}: {templates!r} templates for {len(members)} leaves of {like.size} "
            f"values; write a whole number from 1 to {most}"
        )
