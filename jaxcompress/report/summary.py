"""What became of a tree, leaf by leaf."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcompress.arrays.base import is_compressed
from jaxcompress.compress import nbytes
from jaxcompress.errors import CompressError
from jaxcompress.rules import flatten
from jaxcompress.tables import Tabular, size_text

if TYPE_CHECKING:  # rich is imported when a table is drawn, not with the package
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Summary(Tabular):
    """A table of leaves before and after; prints in a terminal, shows in a notebook.

    Attributes:
      rows: one dict a leaf: `path`, `shape`, `dtype`, `form`, `before` and `after` in bytes,
        `bits` per value, `ratio`.
    """

    rows: list[dict[str, Any]]

    @property
    def before(self) -> int:
        """Bytes of the whole tree before."""
        return sum(row["before"] for row in self.rows)

    @property
    def after(self) -> int:
        """Bytes of the whole tree after."""
        return sum(row["after"] for row in self.rows)

    @property
    def ratio(self) -> float:
        """How many times smaller the tree became."""
        return self.before / self.after if self.after else float("nan")

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(title="jaxcompress")
        for name in ("leaf", "shape", "form"):
            table.add_column(name, overflow="fold")
        for name in ("before", "after", "bits/value", "ratio"):
            table.add_column(name, justify="right")
        for row in self.rows:
            table.add_row(
                Text(row["path"]),  # a plain string would be read as markup
                "x".join(map(str, row["shape"])) or "scalar",
                Text(row["form"]),
                size_text(row["before"]),
                size_text(row["after"]),
                f"{row['bits']:.2f}",
                f"{row['ratio']:.2f}x",
            )
        table.add_section()
        table.add_row("total", "", "", size_text(self.before), size_text(self.after), "",
                      f"{self.ratio:.2f}x", style="bold")  # fmt: skip
        return table

    def __repr__(self) -> str:
        sizes = f"{size_text(self.before)} -> {size_text(self.after)}"
        return f"Summary({len(self.rows)} leaves, {sizes}, {self.ratio:.2f}x)"


def summary(before: Any, after: Any) -> Summary:
    """Compares a tree with its compressed self, everything counted.

    Args:
      before: the dense tree, or its shapes.
      after: the same tree with compressed leaves.

    Returns:
      A `Summary`, to print or to read row by row.

    Raises:
      CompressError: when the two trees have different leaves.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> params = {"kernel": jnp.ones((256, 256)), "bias": jnp.ones(256)}
      >>> jc.summary(params, jc.compress(params, {"kernel": jc.Quantize("int8")}))
      Summary(2 leaves, 263.17 kB -> 67.07 kB, 3.92x)
    """
    dense, small = flatten(before)[0], flatten(after)[0]
    different = {path for path, _ in dense} ^ {path for path, _ in small}
    if different:
        raise CompressError(f"the trees differ at {sorted(different)[:3]}")
    after_by_path = dict(small)
    rows = []
    for path, old in dense:
        new = after_by_path[path]
        old_size, new_size = nbytes(old), nbytes(new)
        count = int(np.prod(np.shape(old), dtype=np.int64))
        rows.append(
            {
                "path": path,
                "shape": tuple(np.shape(old)),
                "dtype": str(getattr(old, "dtype", type(old).__name__)),
                "form": new.describe() if is_compressed(new) else "dense",
                "before": old_size,
                "after": new_size,
                "bits": 8 * new_size / count if count else 0.0,
                "ratio": old_size / new_size if new_size else float("nan"),
            }
        )
    return Summary(rows)
