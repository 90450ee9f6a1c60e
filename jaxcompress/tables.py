"""Tables that print in a terminal and show in a notebook."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # rich is imported when a table is drawn, not with the package
    from rich.console import Console
    from rich.table import Table


class Tabular:
    """A result that shows as a table; subclasses define `__rich__`."""

    def __rich__(self) -> Table:
        raise NotImplementedError

    def __str__(self) -> str:
        return self._recorded(100).export_text().rstrip()

    def _recorded(self, width: int) -> Console:
        from rich.console import Console

        # In a notebook, a console would display the table as it is printed, and so twice.
        console = Console(file=io.StringIO(), record=True, width=width, force_jupyter=False)
        console.print(self)
        return console

    def _repr_html_(self) -> str:
        return self._recorded(120).export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def size_text(n: int) -> str:
    """A number of bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.2f} {unit}"
        n = n / 1000  # type: ignore[assignment]
    return f"{n:.2f} GB"
