"""`Sensitivities` and `Allocation`: what each choice costs, and which were taken."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxcompress.errors import SpecError
from jaxcompress.quantization.mixed.knapsack import best_choices
from jaxcompress.rules import escape
from jaxcompress.specs import Spec
from jaxcompress.tables import Tabular, size_text

if TYPE_CHECKING:  # rich is imported when a table is drawn, not with the package
    from rich.table import Table

# Costs that every choice has; `bits` and `code_bits` are means over the weights of chosen leaves.
OWN = ("bytes", "bits", "code_bits")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One choice for one leaf.

    Attributes:
      spec: the spec, or None for dense.
      error: what it is thought to cost in quality.
      bytes: of the compressed leaf: codes, scales, zero points, tables.
      code_bytes: of its codes alone.
      costs: further costs by name.
    """

    spec: Spec | None
    error: float
    bytes: int
    code_bytes: int
    costs: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Choosable:
    """A leaf with its choices; tied leaves are one.

    Attributes:
      paths: where it is.
      shape: its shape.
      candidates: its choices.
    """

    paths: tuple[str, ...]
    shape: tuple[int, ...]
    candidates: tuple[Candidate, ...]

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Sensitivities(Tabular):
    """The error and the cost of each choice of each leaf: what an allocation is solved from.

    Attributes:
      leaves: the leaves that have a choice.
      dense_bytes: of all that has none.
      kind: how the errors were found.
    """

    leaves: tuple[Choosable, ...]
    dense_bytes: int
    kind: str

    @property
    def size(self) -> int:
        """The number of weights that have a choice."""
        return sum(leaf.size for leaf in self.leaves)

    def allocate(self, budget: float | Mapping[str, float]) -> Allocation:
        """The choices of least error in sum within a budget; see `allocate`."""
        budgets = dict(budget) if isinstance(budget, Mapping) else {"bytes": budget}
        if not budgets:
            raise SpecError("budget is empty: write {'bits': 4.0} or {'bytes': 12_000_000}")
        costs, limits = [], []
        for name, limit in budgets.items():
            table, most = self._costs(name), self._limit(name, limit)
            least = math.fsum(min(row) for row in table)
            if least > most:
                raise SpecError(
                    f"budget {name}={limit:g} is below the least possible, "
                    f"{self._value(name, least):.6g}; raise it, or give smaller choices"
                )
            costs.append(table)
            limits.append(most)
        errors = [[c.error for c in leaf.candidates] for leaf in self.leaves]
        return Allocation(self, tuple(best_choices(errors, costs, limits)), budgets)

    def least(self, name: str = "bytes") -> float:
        """The least budget of a name that can be met."""
        return self._value(name, math.fsum(min(row) for row in self._costs(name)))

    def most(self, name: str = "bytes") -> float:
        """What the dearest choice of every leaf takes: a budget that binds nothing."""
        return self._value(name, math.fsum(max(row) for row in self._costs(name)))

    def _costs(self, name: str) -> list[list[float]]:
        of = {"bits": "bytes", "code_bits": "code_bytes"}.get(name, name)
        if of in ("bytes", "code_bytes"):
            return [[getattr(c, of) for c in leaf.candidates] for leaf in self.leaves]
        known = {n for leaf in self.leaves for c in leaf.candidates for n in c.costs}
        if name not in known:
            raise SpecError(
                f"budget {name!r} is none of {', '.join((*OWN, *sorted(known)))}; give its cost "
                f"as costs={{{name!r}: ...}}"
            )
        return [[c.costs[name] for c in leaf.candidates] for leaf in self.leaves]

    def _limit(self, name: str, limit: float) -> float:
        """A budget in the unit of `_costs`; sums of bytes are whole numbers."""
        number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
        if not number or not math.isfinite(limit):
            raise SpecError(f"budget {name}={limit!r}: write a number")
        if name == "bytes":
            return math.floor(limit) - self.dense_bytes
        # A mean of bits came of a division, whose rounding must not cost a byte.
        return math.floor(limit * self.size / 8 * (1 + 1e-12)) if name in OWN else limit

    def _value(self, name: str, total: float) -> float:
        """The other way."""
        if name == "bytes":
            return total + self.dense_bytes
        return 8 * total / max(1, self.size) if name in OWN else total

    def as_json(self) -> list[dict[str, Any]]:
        """A row for each leaf and choice, as plain values."""
        return [
            {
                "path": leaf.paths[0],
                "shape": list(leaf.shape),
                "spec": _name(c.spec),
                "error": c.error,
                "bytes": c.bytes,
                "code_bytes": c.code_bytes,
                **c.costs,
            }
            for leaf in self.leaves
            for c in leaf.candidates
        ]

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"sensitivity: {self.kind}")
        for name in ("leaf", "choice"):
            table.add_column(name, overflow="fold")
        for name in ("bits/weight", "error"):
            table.add_column(name, justify="right")
        for leaf in self.leaves:
            for i, c in enumerate(leaf.candidates):
                bits = 8 * c.bytes / max(1, leaf.size)
                head = Text("" if i else _title(leaf))
                table.add_row(head, Text(_name(c.spec)), f"{bits:.2f}", f"{c.error:.3g}")
            table.add_section()
        return table

    def __repr__(self) -> str:
        return f"Sensitivities({len(self.leaves)} leaves, {self.kind})"


@dataclasses.dataclass(frozen=True)
class Allocation(Tabular):
    """Which choice each leaf gets; prints in a terminal, shows in a notebook.

    Attributes:
      table: what it was solved from.
      choices: the number of the choice of each leaf of the table.
      budget: the budgets by name.
    """

    table: Sensitivities
    choices: tuple[int, ...]
    budget: Mapping[str, float]

    @property
    def chosen(self) -> list[tuple[Choosable, Candidate]]:
        """Each leaf with its choice."""
        return [(leaf, leaf.candidates[c]) for leaf, c in zip(self.table.leaves, self.choices)]

    @property
    def rules(self) -> dict[str, Spec | None]:
        """The rules to pass to `compress`: one for each leaf, None where it stays dense."""
        return {escape(path): c.spec for leaf, c in self.chosen for path in leaf.paths}

    @property
    def error(self) -> float:
        """The predicted error: the sum over leaves."""
        return sum(c.error for _, c in self.chosen)

    @property
    def bytes(self) -> int:
        """Bytes of the whole tree, dense leaves included; a tied leaf counts once."""
        return self.table.dense_bytes + sum(c.bytes for _, c in self.chosen)

    @property
    def bits(self) -> float:
        """Bits to a weight, over the leaves that had a choice; scales and zero points included."""
        return 8 * sum(c.bytes for _, c in self.chosen) / max(1, self.table.size)

    @property
    def code_bits(self) -> float:
        """Bits to a weight of the codes alone."""
        return 8 * sum(c.code_bytes for _, c in self.chosen) / max(1, self.table.size)

    def cost(self, name: str) -> float:
        """What it takes of one budget, by name."""
        if name in OWN:
            return float(getattr(self, name))
        return math.fsum(c.costs[name] for _, c in self.chosen)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dict a leaf: `path`, `shape`, `spec`, `bytes`, `bits` to a weight, and `error`."""
        return [
            {
                "path": _title(leaf),
                "shape": leaf.shape,
                "spec": _name(c.spec),
                "bytes": c.bytes,
                "bits": 8 * c.bytes / max(1, leaf.size),
                "error": c.error,
            }
            for leaf, c in self.chosen
        ]

    def as_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "sensitivity": self.table.kind,
            "budget": dict(self.budget),
            "error": self.error,
            "bytes": self.bytes,
            "bits": self.bits,
            "code_bits": self.code_bits,
            "rows": [{**row, "shape": list(row["shape"])} for row in self.rows],
        }

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        budget = ", ".join(f"{name} {limit:g}" for name, limit in self.budget.items())
        table = Table(title=f"allocation within {budget} (sensitivity: {self.table.kind})")
        for name in ("leaf", "shape", "choice"):
            table.add_column(name, overflow="fold")
        for name in ("bits/weight", "bytes", "error"):
            table.add_column(name, justify="right")
        for row in self.rows:
            table.add_row(
                Text(row["path"]), "x".join(map(str, row["shape"])), Text(row["spec"]),
                f"{row['bits']:.2f}", size_text(row["bytes"]), f"{row['error']:.3g}",
            )  # fmt: skip
        table.add_section()
        table.add_row("without choice", "", "", "", size_text(self.table.dense_bytes), "")
        table.add_row("total", "", "", f"{self.bits:.2f}", size_text(self.bytes),
                      f"{self.error:.3g}", style="bold")  # fmt: skip
        return table

    def __repr__(self) -> str:
        return (
            f"Allocation({len(self.choices)} leaves, {self.bits:.4g} bits to a weight, "
            f"{size_text(self.bytes)}, error {self.error:.3g})"
        )


def _name(spec: Spec | None) -> str:
    return "dense" if spec is None else repr(spec)


def _title(leaf: Choosable) -> str:
    rest = len(leaf.paths) - 1
    return leaf.paths[0] + (f" and {rest} tied to it" if rest else "")
