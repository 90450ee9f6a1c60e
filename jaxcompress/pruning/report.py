"""How sparse each leaf is, from params or from the state of an optimizer."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import is_compressed, materialize
from jaxcompress.errors import CompressError
from jaxcompress.pruning.select import has_nan
from jaxcompress.pruning.wrapper import SparsifyState
from jaxcompress.rules import flatten
from jaxcompress.tables import Tabular

if TYPE_CHECKING:  # rich is imported when a table is drawn, not with the package
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class SparsityReport(Tabular):
    """A table of leaves; prints in a terminal, shows in a notebook.

    Attributes:
      rows: one dict a leaf: `path`, `shape`, `kept` and `size` in values, `sparsity`, and
        whether there is a `nan`.
    """

    rows: list[dict[str, Any]]

    @property
    def kept(self) -> int:
        """How many values stay, all together."""
        return sum(row["kept"] for row in self.rows)

    @property
    def size(self) -> int:
        """How many values there are, all together."""
        return sum(row["size"] for row in self.rows)

    @property
    def sparsity(self) -> float:
        """The share that is removed."""
        return 1 - self.kept / self.size if self.size else 0.0

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(title="sparsity")
        for name in ("leaf", "shape"):
            table.add_column(name, overflow="fold")
        for name in ("kept", "of", "sparsity", "NaN"):
            table.add_column(name, justify="right")
        for row in self.rows:
            table.add_row(
                Text(row["path"]),  # a plain string would be read as markup
                "x".join(map(str, row["shape"])) or "scalar",
                f"{row['kept']:,}",
                f"{row['size']:,}",
                f"{100 * row['sparsity']:.2f}%",
                "yes" if row["nan"] else "",
                style="bold red" if row["nan"] else None,
            )
        table.add_section()
        table.add_row("total", "", f"{self.kept:,}", f"{self.size:,}",
                      f"{100 * self.sparsity:.2f}%", "", style="bold")  # fmt: skip
        return table

    def __repr__(self) -> str:
        return (
            f"SparsityReport({len(self.rows)} leaves, {self.kept} of {self.size} kept, "
            f"{100 * self.sparsity:.4g}% sparse)"
        )


def sparsity_report(tree: Any) -> SparsityReport:
    """Counts what is kept, leaf by leaf.

    Args:
      tree: params, dense or compressed, whose nonzero values are counted; or the state of an
        optimizer with a `sparsify` in it, whose masks are, and which weights held a NaN when the
        masks were last chosen.

    Returns:
      A `SparsityReport`, to print or to read row by row.

    Raises:
      CompressError: for a tree without floating arrays or masks.

    Examples:
      >>> import jax.numpy as jnp
      >>> sparsity_report({"kernel": jnp.array([[0.0, 2.0], [0.0, 0.0]])})
      SparsityReport(1 leaves, 1 of 4 kept, 75% sparse)
    """
    states = [x for x in jax.tree.leaves(tree, is_leaf=_is_state) if _is_state(x)]
    rows: list[dict[str, Any]] = []
    while states:
        state = states.pop(0)
        rows += _mask_rows(state)
        inner = jax.tree.leaves(state.inner, is_leaf=_is_state)
        states += [x for x in inner if _is_state(x)]
    if not rows:
        rows = [_row(path, x != 0, has_nan(x)) for path, x in _floating(tree)]
    if not rows:
        raise CompressError(
            "there are neither floating arrays nor masks of `sparsify` to report on"
        )
    return SparsityReport(rows)


def _is_state(x: Any) -> bool:
    return isinstance(x, SparsifyState)


def _mask_rows(state: SparsifyState) -> list[dict[str, Any]]:
    masks = [(path, mask) for path, x in flatten(state.masks)[0] for mask in jax.tree.leaves(x)]
    nan = np.asarray(state.nan)  # with leading axes, where several networks are trained at once
    return [_row(path, mask, nan[..., i].any()) for i, (path, mask) in enumerate(masks)]


def _floating(tree: Any) -> list[tuple[str, Any]]:
    found = [(path, x) for path, x in flatten(tree)[0] if hasattr(x, "dtype")]
    found = [(path, x) for path, x in found if jnp.issubdtype(x.dtype, jnp.floating)]
    return [(path, materialize(x) if is_compressed(x) else x) for path, x in found]


def _row(path: str, kept: Any, nan: Any) -> dict[str, Any]:
    count, size = int(np.count_nonzero(np.asarray(kept))), int(np.prod(kept.shape))
    return {
        "path": path,
        "shape": tuple(kept.shape),
        "kept": count,
        "size": size,
        "sparsity": 1 - count / size if size else 0.0,
        "nan": bool(nan),
    }
