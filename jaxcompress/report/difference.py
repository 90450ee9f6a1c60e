"""How two trees differ, leaf by leaf."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
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

    Numbers count as arrays of no axes; texts are alike or infinitely apart.

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
      CompressError: when two leaves of one path differ in shape, or a tree has two of one path.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> w = jnp.array([[3.0, 4.0]])
      >>> jc.diff({"w": w}, {"w": w.at[0, 1].set(4.5)}).relative
      0.1
    """
    ours, theirs = _by_path(first), _by_path(second)
    rows = []
    for path in ours:
        if path not in theirs:
            continue
        a, b = ours[path], theirs[path]
        if np.shape(a) != np.shape(b):
            raise CompressError(
                f"{path}: shape {np.shape(a)} in the first, {np.shape(b)} in the second; "
                "transpose or select before comparing"
            )
        rows.append({"path": path, "shape": tuple(np.shape(a)), **_compare(a, b)})
        done(path)
    return Difference(
        rows, [p for p in ours if p not in theirs], [p for p in theirs if p not in ours]
    )


def _by_path(tree: Any) -> dict[str, Any]:
    leaves = flatten(tree)[0]
    out = dict(leaves)
    if len(out) < len(leaves):
        raise CompressError("two leaves of a tree have one path, such as {'a/b': x, 'a': {'b': y}}")
    return out


def _compare(a: Any, b: Any) -> dict[str, float]:
    if isinstance(a, str) or isinstance(b, str):
        same = a == b
        gap = 0.0 if same else math.inf
        return {"relative": gap, "cosine": float(same), "max": gap}
    return _measures(_dense(a), _dense(b))


def _dense(leaf: Any) -> np.ndarray:
    loaded = leaf.load() if isinstance(leaf, LazyArray) else leaf
    return np.asarray(materialize(loaded)).reshape(-1)


def _wide(x: np.ndarray, kind: str) -> np.ndarray:
    return x.astype(np.complex128 if "c" in kind else np.float64)


def _gap(x: np.ndarray, y: np.ndarray, kind: str) -> np.ndarray:
    """`|x - y|`, exactly where both are integers of one dtype, whose span may be 64 bits."""
    if x.dtype == y.dtype and x.dtype.kind in "iu":
        larger, smaller = np.maximum(x, y).astype(np.uint64), np.minimum(x, y).astype(np.uint64)
        return (larger - smaller).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.abs(_wide(x, kind) - _wide(y, kind))


def _measures(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    kind = a.dtype.kind + b.dtype.kind
    pieces = [slice(start, start + _PIECE) for start in range(0, a.size, _PIECE)]
    # In units of about the greatest magnitude, so that no square overflows or vanishes.
    tops = [np.max(np.abs(_wide(x[p], kind))) for x in (a, b) for p in pieces]
    top = float(np.max(tops, initial=0.0))
    # A power of two, which rounds nothing.
    unit = math.ldexp(1.0, math.frexp(top)[1] - 1) if 0 < top < math.inf else 1.0
    error = first = second = inner = most = 0.0
    for p in pieces:
        x, y, gap = _wide(a[p], kind) / unit, _wide(b[p], kind) / unit, _gap(a[p], b[p], kind)
        error += float(np.sum(np.square(gap / unit)))
        first += float(np.sum(np.square(np.abs(x))))
        second += float(np.sum(np.square(np.abs(y))))
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
