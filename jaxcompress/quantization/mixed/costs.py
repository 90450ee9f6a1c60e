"""What a choice costs besides bytes: bits of codes, and bit operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxcompress.arrays.base import is_compressed
from jaxcompress.compress import Stats, nbytes
from jaxcompress.errors import SpecError
from jaxcompress.pruning.masks import multiplications

# Of a leaf by its path, dense and as the choice makes it (the same where it stays dense).
Cost = Callable[[str, Any, Any], float]

_CODES = ("codes", "indices")


def code_bytes(leaf: Any) -> int:
    """The bytes of the codes alone, without scales, zero points and tables.

    Those of a leaf in which nothing is called codes or indices are all that it takes.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> leaf = jc.Quantize("int4", group_size=32)(jnp.ones((128, 16)))
      >>> code_bytes(leaf), leaf.nbytes
      (1024, 1152)
    """
    found = _code_bytes(leaf)
    return nbytes(leaf) if found is None else found


def _code_bytes(leaf: Any) -> int | None:
    if not is_compressed(leaf):
        return None
    parts = {name: getattr(leaf, name) for name in leaf.children}
    found = [nbytes(x) for name, x in parts.items() if name in _CODES]
    if not found:
        found = [n for x in parts.values() if (n := _code_bytes(x)) is not None]
    return sum(found) if found else None


def bops(stats: Stats, examples: int, *, activation_bits: int = 32) -> Cost:
    """Bit operations of one example: multiplications times bits of the weight and of the input.

    A cost to give to `allocate(..., costs={"bops": bops(stats, examples)})`. A look-up multiplies
    nothing.

    Args:
      stats: of `observe` with `gram`, of all leaves that are chosen for.
      examples: how many examples the batches of `observe` held.
      activation_bits: bits of the inputs.

    Returns:
      A function of path, dense leaf and compressed leaf.

    Raises:
      SpecError: for fewer than one example; when called, for a leaf that has no statistics.

    References:
      Yao et al., *HAWQ-V3: Dyadic Neural Network Quantization*, 2021.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> fn = lambda params, x: x @ params["w"]
      >>> w = jnp.ones((4, 2))
      >>> stats = jc.observe(fn, {"w": w}, [jnp.ones((10, 4))], ("gram",))
      >>> bops(stats, 10, activation_bits=8)("w", w, jc.Quantize("int4")(w))
      256.0
    """
    if examples < 1:
        raise SpecError(f"examples={examples}: write how many the observed batches held")
    contracted = {
        path: {axes: x for axes, x in found.items() if not _is_look_up(x)}
        for path, found in stats.items()
    }

    def cost(path: str, leaf: Any, small: Any) -> float:
        all_kept = {path: np.ones(leaf.shape, bool)}
        times = multiplications(all_kept, contracted, examples)
        return times * activation_bits * 8 * code_bytes(small) / max(1, leaf.size)

    return cost


def _is_look_up(found: Any) -> bool:
    return found.gram is not None and found.gram.ndim == np.ndim(found.count) + 1


def cost_of(cost: Cost | Mapping[str, Any], name: str, path: str, c: int, *leaves: Any) -> float:
    """What a cost says of choice `c` of a leaf: a call, or a look-up in a table.

    Raises:
      SpecError: for a table without the path or the choice, and for what is no number.
    """
    if callable(cost):
        value = cost(path, *leaves)
    else:
        try:
            value = cost[path][c]
        except (KeyError, IndexError):
            raise SpecError(
                f"costs[{name!r}] has no entry for choice {c} of {path!r}; write "
                "{path: [the cost of each choice]}, or a function of path, leaf and small leaf"
            ) from None
    value = float(value)
    if not np.isfinite(value):
        raise SpecError(f"costs[{name!r}] of choice {c} of {path!r} is {value}, and no cost")
    return value
