"""What is in a file, leaf by leaf: shapes, forms, and where the bytes are."""

from __future__ import annotations

import collections
import dataclasses
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcompress.checkpoint.file import StoredLeaf, read_recipe, stored_leaves
from jaxcompress.checkpoint.sources import Source, open_source
from jaxcompress.compress import nbytes
from jaxcompress.errors import RecipeError
from jaxcompress.recipes.recipe import Recipe
from jaxcompress.rules import flatten
from jaxcompress.tables import Tabular, size_text

if TYPE_CHECKING:  # rich is imported when a table is drawn, not with the package
    from rich.table import Table
    from rich.tree import Tree


@dataclasses.dataclass(frozen=True)
class Contents(Tabular):
    """A table of the leaves in a file; prints in a terminal, shows in a notebook.

    Attributes:
      path: the file or folder.
      kind: `jaxcompress`, `safetensors`, `hugging face`, `npz`, `msgpack` or `orbax`.
      rows: one dict a leaf: `path`, `shape`, `dtype`, `form`, `bytes` in the file and `memory` once
        loaded, `bits` in the file per weight, `share` of all bytes, and `parts`, the bytes in the
        file by kind of child (codes, scale, index, ...).
      total: bytes of the file, its header included.
      recipe: the name of the recipe that made it, or None.
    """

    path: str
    kind: str
    rows: list[dict[str, Any]]
    total: int
    recipe: str | None = None

    def as_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        rows = [{**row, "shape": list(row["shape"])} for row in self.rows]
        return {**dataclasses.asdict(self), "rows": rows, "values": self.values}

    @property
    def values(self) -> int:
        """The number of weights."""
        return sum(math.prod(row["shape"]) for row in self.rows)

    def _title(self) -> str:
        recipe = f", recipe {self.recipe}" if self.recipe else ""
        return f"{self.path} ({self.kind}{recipe})"

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self._title()))
        for name in ("leaf", "shape", "form"):
            table.add_column(name, overflow="fold")
        for name in ("bits/weight", "bytes", "share"):
            table.add_column(name, justify="right")
        for row in self.rows:
            table.add_row(Text(row["path"]), _shape_text(row), Text(row["form"]), *_figures(row))
        rest = self.total - sum(row["bytes"] for row in self.rows)
        table.add_section()
        table.add_row("header and rest", "", "", "", size_text(rest), _percent(rest, self.total))
        bits = 8 * self.total / self.values if self.values else 0.0
        table.add_row("total", "", "", f"{bits:.2f}", size_text(self.total), "", style="bold")
        return table

    def tree(self) -> Tree:
        """The same as a tree, with the bytes of every branch."""
        from rich.markup import escape
        from rich.tree import Tree

        root = Tree(f"[bold]{escape(self._title())}[/]  {size_text(self.total)}")
        sums: dict[tuple[str, ...], int] = collections.Counter()
        for row in self.rows:
            keys = tuple(row["path"].split("/"))
            for i in range(len(keys)):
                sums[keys[:i]] += row["bytes"]
        branches: dict[tuple[str, ...], Tree] = {(): root}
        for row in self.rows:
            *parents, name = row["path"].split("/")
            for i, parent in enumerate(parents):
                above, here = tuple(parents[:i]), tuple(parents[: i + 1])
                if here not in branches:
                    size = f"{size_text(sums[here])}  {_percent(sums[here], self.total)}"
                    branches[here] = branches[above].add(f"{escape(parent)}  {size}")
            bits, size, share = _figures(row)
            form = f"{_shape_text(row)} {escape(row['form'])}  {bits} bits"
            branches[tuple(parents)].add(f"{escape(name)}  {form}  {size}  {share}")
        return root

    def __repr__(self) -> str:
        return f"Contents({len(self.rows)} leaves, {size_text(self.total)})"


def _shape_text(row: dict[str, Any]) -> str:
    return "x".join(map(str, row["shape"])) or "scalar"


def _percent(part: int, total: int) -> str:
    return f"{100 * part / total:.1f}%" if total else ""


def _figures(row: dict[str, Any]) -> tuple[str, str, str]:
    return f"{row['bits']:.2f}", size_text(row["bytes"]), f"{100 * row['share']:.1f}%"


def contents(path: str | os.PathLike[str]) -> Contents:
    """Lists what is in a file or folder of weights, compressed or not; no weights are read.

    Args:
      path: anything that `open_params` opens.

    Returns:
      A `Contents`, to print or to read row by row.

    Raises:
      FileError: as `open_params`.

    Examples:
      >>> import tempfile, os, jax.numpy as jnp, jaxcompress as jc
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "small.safetensors")
      ...     jc.save(path, {"kernel": jc.Quantize("int4")(jnp.ones((64, 32)))})
      ...     row = jc.contents(path).rows[0]
      >>> row["form"], row["bytes"], row["bits"], row["parts"]
      ('int4', 1088, 4.25, {'codes': 1024, 'scale': 64})
    """
    source = open_source(path)
    if source.kind == "jaxcompress":
        leaves = stored_leaves(source.files[0])
    else:
        leaves = [
            StoredLeaf(name, tuple(leaf.shape), leaf.dtype, "dense", size, {"dense": size})
            for name, leaf in flatten(source.tree)[0]
            if hasattr(leaf, "dtype")
            for size in [nbytes(leaf)]
        ]
    every = sum(sum(leaf.parts.values()) for leaf in leaves)
    rows = [_row(leaf, every) for leaf in leaves]
    total = sum(map(_on_disk, source.files))
    return Contents(str(path), source.kind, rows, total, _recipe(source))


def _row(leaf: StoredLeaf, every: int) -> dict[str, Any]:
    size, count = sum(leaf.parts.values()), math.prod(leaf.shape)
    return {
        "path": leaf.path,
        "shape": leaf.shape,
        "dtype": np.dtype(leaf.dtype).name,
        "form": leaf.form,
        "bytes": size,
        "memory": leaf.memory,
        "bits": 8 * size / count if count else 0.0,
        "share": size / every if every else 0.0,
        "parts": leaf.parts,
    }


def _recipe(source: Source) -> str | None:
    text = read_recipe(source.files[0]) if source.kind == "jaxcompress" else None
    if text is None:
        return None
    try:
        return Recipe.from_yaml(text).name or "without a name"
    except RecipeError:  # as for leaves: what is not imported here can still be listed
        return "of specs that are not registered here"


def _on_disk(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size
