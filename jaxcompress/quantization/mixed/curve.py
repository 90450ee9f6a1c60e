"""What quality costs: the best allocation for each of several budgets, and its picture."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcompress.errors import CompressError, SpecError
from jaxcompress.quantization.mixed.table import Allocation, Sensitivities
from jaxcompress.tables import Tabular, size_text

if TYPE_CHECKING:  # rich is imported when a table is drawn, not with the package
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class BudgetCurve(Tabular):
    """Budgets and errors; prints in a terminal, shows in a notebook.

    Attributes:
      name: of the budget, such as `bits`.
      rows: one dict a budget: `budget`, `taken` of it, `bytes`, `bits` to a weight, the predicted
        `error`, and `measured`, or None.
      allocations: the allocation of each.
    """

    name: str
    rows: list[dict[str, Any]]
    allocations: list[Allocation]

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(title=f"error by {self.name}")
        for name in (self.name, "taken", "bits/weight", "bytes", "predicted", "measured"):
            table.add_column(name, justify="right")
        for row in self.rows:
            measured = "" if row["measured"] is None else f"{row['measured']:.4g}"
            table.add_row(
                f"{row['budget']:.6g}", f"{row['taken']:.6g}", f"{row['bits']:.2f}",
                size_text(row["bytes"]), f"{row['error']:.3g}", measured,
            )  # fmt: skip
        return table

    def __repr__(self) -> str:
        return f"BudgetCurve({self.name}, {len(self.rows)} budgets)"


def budget_curve(
    table: Sensitivities,
    budgets: Sequence[float] | int = 12,
    *,
    name: str = "bits",
    measure: Callable[[Allocation], float] | None = None,
) -> BudgetCurve:
    """Solves for several budgets, the sensitivities measured once.

    Args:
      table: of `sensitivities`.
      budgets: the budgets; or how many, evenly from the least possible to what binds nothing.
      name: of the budget, see `allocate`.
      measure: what an allocation really gives, such as the error of the model compressed by its
        rules; called once for each that differs from the one before.

    Returns:
      A `BudgetCurve`. Its predicted errors never rise with the budget.

    Raises:
      SpecError: for a budget below the least possible, and no budgets.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.quantization.mixed import budget_curve, sensitivities
      >>> table = sensitivities(
      ...     None, {"w": jnp.linspace(-1, 1, 2048).reshape(64, 32)}, sensitivity="weight",
      ...     choices=[jc.Quantize("int2"), jc.Quantize("int4"), jc.Quantize("int8")],
      ... )
      >>> [row["taken"] for row in budget_curve(table, [2, 5, 8], name="code_bits").rows]
      [2.0, 4.0, 8.0]
    """
    if isinstance(budgets, int):
        if budgets < 2:
            raise SpecError(f"budgets={budgets}: write 2 or more, or a list of budgets")
        ends = table.least(name), table.most(name)
        wanted = [float(x) for x in np.linspace(*ends, budgets)]
        wanted[0], wanted[-1] = ends  # to the last bit
    else:
        wanted = [float(x) for x in budgets]
    if not wanted:
        raise SpecError("budgets is empty: give at least one")
    found = [table.allocate({name: budget}) for budget in wanted]
    rows: list[dict[str, Any]] = []
    for i, (budget, one) in enumerate(zip(wanted, found)):
        same = i > 0 and one.choices == found[i - 1].choices
        measured = None
        if measure is not None:
            measured = rows[-1]["measured"] if same else float(measure(one))
        rows.append(
            {
                "budget": budget,
                "taken": one.cost(name),
                "bytes": one.bytes,
                "bits": one.bits,
                "error": one.error,
                "measured": measured,
            }
        )
    return BudgetCurve(name, rows, found)


def draw_budget(curve: BudgetCurve, out: str | os.PathLike[str]) -> None:
    """Draws the predicted error, and the measured one, against what is taken of the budget.

    Args:
      curve: of `budget_curve`.
      out: the picture; its suffix says the kind.

    Raises:
      CompressError: when matplotlib is not installed, or does not know the suffix.

    Examples:
      >>> import jax.numpy as jnp, tempfile, pathlib, jaxcompress as jc
      >>> from jaxcompress.quantization.mixed import budget_curve, draw_budget, sensitivities
      >>> table = sensitivities(
      ...     None, {"w": jnp.linspace(-1, 1, 2048).reshape(64, 32)}, sensitivity="weight",
      ...     choices=[jc.Quantize("int2"), jc.Quantize("int8")],
      ... )
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     picture = pathlib.Path(folder, "budget.png")
      ...     draw_budget(budget_curve(table, 3), picture)
      ...     picture.read_bytes()[1:4]
      b'PNG'
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CompressError("pictures need matplotlib: pip install 'jaxcompress[plots]'") from error

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    taken = [row["taken"] for row in curve.rows]
    for name, label in (("error", "predicted"), ("measured", "measured")):
        values = [row[name] for row in curve.rows]
        if all(value is not None for value in values):
            axes.plot(taken, values, "o-", label=label, markersize=4)
    if all(row["error"] > 0 and (row["measured"] or 1) > 0 for row in curve.rows):
        axes.set_yscale("log")
    axes.set(xlabel=curve.name, ylabel="error", title="error by budget")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    try:
        figure.savefig(out, dpi=120)
    except ValueError as error:  # matplotlib lists the suffixes that it knows
        raise CompressError(f"{os.fspath(out)}: {error}") from error
