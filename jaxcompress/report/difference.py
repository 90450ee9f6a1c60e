"""How two trees differ, leaf by leaf."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcompress.arrays.base import materialize
from jaxcompress.errors import CompressError
from jaxcompress.lazy import LazyArray
from jaxcompress.rules import flatten
from jaxcompress.tables import Tabular

if TYPE_CHECKING:  # rich is imported when a table is drawn, not with the package
    from rich.table import Table

_PIECE = 1 << 20  # values that are held in float64 at a time


@dataclasses.dataclass(frozen=True)
class Difference(Tabular):
    """A table of differences; prints in a terminal, shows in a notebook.

    Attributes:
      rows: one dict a leaf that both have: `path`, `shape`, `relative`, `cosine`, `max`.
      only_first: paths of leaves that only the first tree has.
      only_second: and only the second.
    """

    rows: list[dict[str, Any]]
    only_first: list[str]
    only_second: list[str]

    @property
    def relative(self) -> float:
        """The greatest relative error of a leaf; infinite when a leaf is missing."""
        if self.only_first or self.only_second:
            return math.inf
        worst = [row["relative"] for row in self.rows]
        return math.nan if any(map(math.isnan, worst)) else max(worst, default=0.0)

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for name in ("leaf", "shape"):
            table.add_column(name, overflow="fold")
        for name in ("relative error", "cosine", "max error"):
            table.add_column(name, justify="right")
        for row in self.rows:
            shape = "x".join(map(str, row["shape"])) or "scalar"
            figures = f"{row['relative']:.3e}", f"{row['cosine']:.6f}", f"{row['max']:.3e}"
            table.add_row(Text(row["path"]), shape, *figures)
        for which, paths in (("first", self.only_first), ("second", self.only_second)):
            for path in paths:
                table.add_row(Text(path), f"only in the {which}", "", "", "")
        return table

    def __repr__(self) -> str:
        missing = len(self.only_first) + len(self.only_second)
        return f"Difference({len(self.rows)} leaves, {missing} missing, {self.relative:.2g})"


def diff(first: Any, second: Any, *, done: Callable[[str], None] = lambda path: None) -> Difference:
    """Compares two trees by path, each leaf as the dense array it stands for.

    `relative` is `||a - b|| / ||a||`, `cosine` is `<a, b> / (||a|| ||b||)`, `max` is
    `max |a - b|`; sums are taken in float64. A relative error is 0 where both are zero everywhere
    and infinite where only a is; a cosine is 1 then, and 0.

    Args:
      first: a tree; leaves may be compressed or lazy, and are then read one at a time.
      second: another; its containers may differ.
      done: called with the path of each leaf that was compared.

    Returns:
      A `Difference`, to print or to read row by row.

    Raises:
      CompressError: when two leaves of one path differ in shape.

    Example:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> w = jnp.array([[3.0, 4.0]])
      >>> jc.diff({"w": w}, {"w": w.at[0, 1].set(4.5)}).relative
      0.1
    """
    ours, theirs = _arrays(first), _arrays(second)
    rows = []
    for path in ours:
        if path not in theirs:
            continue
        a, b = ours[path], theirs[path]
        if tuple(a.shape) != tuple(b.shape):
            raise CompressError(
                f"{path}: shape {tuple(a.shape)} in the first, {tuple(b.shape)} in the second; "
                "transpose or select before comparing"
            )
        rows.append({"path": path, "shape": tuple(a.shape), **_measures(_dense(a), _dense(b))})
        done(path)
    return Difference(
        rows, [p for p in ours if p not in theirs], [p for p in theirs if p not in ours]
    )


def _arrays(tree: Any) -> dict[str, Any]:
    return {path: leaf for path, leaf in flatten(tree)[0] if hasattr(leaf, "dtype")}


def _dense(leaf: Any) -> np.ndarray:
    loaded = leaf.load() if isinstance(leaf, LazyArray) else leaf
    return np.asarray(materialize(loaded)).reshape(-1)


def _pieces(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    wide = np.complex128 if "c" in a.dtype.kind + b.dtype.kind else np.float64
    for start in range(0, a.size, _PIECE):
        yield a[start : start + _PIECE].astype(wide), b[start : start + _PIECE].astype(wide)


def _measures(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    error = first = second = inner = most = 0.0
    for x, y in _pieces(a, b):
        gap = np.abs(x - y)
        error += float(np.sum(gap * gap))
        first += float(np.sum(np.abs(x) ** 2))
        second += float(np.sum(np.abs(y) ** 2))
        inner += float(np.real(np.vdot(x, y)))
        most = float(np.maximum(most, np.max(gap)))  # a NaN stays one
    if first:
        relative = math.sqrt(error) / math.sqrt(first)
    else:
        relative = math.inf if error else error
    if first and second:
        cosine = inner / (math.sqrt(first) * math.sqrt(second))
    else:
        cosine = float(first == second)
    return {"relative": relative, "cosine": cosine, "max": most}
