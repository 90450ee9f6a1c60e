"""Which part of an optimizer's state belongs to which leaf of the params."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def owner(path: tuple[Any, ...], paths: Sequence[tuple[Any, ...]]) -> int | None:
    """The number of the longest of the paths with which this one ends, or None.

    So `mu` and `nu` of any optax state are found, whatever wraps it.

    Examples:
      >>> owner(("0", "mu", "a", "kernel"), [("kernel",), ("a", "kernel"), ("bias",)])
      1
    """
    ends = [i for i, p in enumerate(paths) if path[max(0, len(path) - len(p)) :] == p]
    return max(ends, key=lambda i: len(paths[i]), default=None)
