"""One choice for each item, of least error under some budgets: an integer program."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcompress.errors import SpecError

# Each cut forbids one assignment that the solver's tolerance let through.
_CUTS = 1000


def best_choices(
    errors: Sequence[Sequence[float]],
    costs: Sequence[Sequence[Sequence[float]]],
    budgets: Sequence[float],
) -> list[int]:
    """The choice c(i) for each item that makes `sum_i errors[i][c(i)]` least, within all budgets.

    `sum_i costs[k][i][c(i)] <= budgets[k]` for each k holds exactly, in float64. It is the
    multiple-choice knapsack, a 0/1 program with one variable for each item and choice, solved to
    optimality by HiGHS. Of choices of one item that no other betters in error or any cost, the
    first of equals is kept; the outcome depends on nothing but the arguments.

    Args:
      errors: `[items][choices]`; the items may have different numbers of choices.
      costs: `[budgets][items][choices]`.
      budgets: what each cost may sum up to.

    Raises:
      SpecError: when no assignment is within the budgets.

    References:
      Sinha and Zoltners, *The Multiple-Choice Knapsack Problem*, 1979; Huangfu and Hall,
      *Parallelizing the Dual Revised Simplex Method*, 2018 (HiGHS).

    Examples:
      >>> best_choices([[5.0, 1.0], [4.0, 0.0]], [[[1, 3], [1, 2]]], [3])
      [0, 1]
    """
    if not len(errors):
        return []
    kept = [_undominated(i, errors, costs) for i in range(len(errors))]
    pairs = [(i, c) for i, choices in enumerate(kept) for c in choices]
    table = np.array([[of[i][c] for i, c in pairs] for of in costs], np.float64)
    goal = np.array([errors[i][c] for i, c in pairs], np.float64)
    item = np.array([i for i, _ in pairs])
    chosen = _milp(goal, table, np.asarray(budgets, np.float64), item)
    return [c for (_, c), take in zip(pairs, chosen) if take]


def _undominated(
    i: int, errors: Sequence[Sequence[float]], costs: Sequence[Sequence[Sequence[float]]]
) -> list[int]:
    """The choices of an item that no other beats or equals in everything; of equals the first."""
    rows = [(errors[i][c], *(of[i][c] for of in costs)) for c in range(len(errors[i]))]

    def beaten(c: int) -> bool:
        return any(
            all(x <= y for x, y in zip(rows[d], rows[c])) and (d < c or rows[d] != rows[c])
            for d in range(len(rows))
            if d != c
        )

    return [c for c in range(len(rows)) if not beaten(c)]


def _milp(goal: np.ndarray, table: np.ndarray, budgets: np.ndarray, item: np.ndarray) -> np.ndarray:
    from scipy.optimize import Bounds, LinearConstraint, milp  # takes a while to import

    each = (item[None] == np.arange(item[-1] + 1)[:, None]).astype(np.float64)
    # Errors in units in which HiGHS's absolute gap of 1e-6 is nothing; costs in shares of budgets.
    spread = float(goal.max() - goal.min())
    goal = (goal - goal.min()) * (1e6 / spread if spread > 0 else 1.0)
    largest = np.abs(table).max(axis=1, initial=0.0)
    scale = np.where(largest > 0, largest, 1.0)
    constraints: list[Any] = [LinearConstraint(each, 1, 1)]
    if len(table):
        constraints.append(LinearConstraint(table / scale[:, None], -np.inf, budgets / scale))
    for _ in range(_CUTS):
        found = milp(
            goal,
            integrality=np.ones(len(goal)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            break
        chosen = found.x > 0.5
        if all(math.fsum(row[chosen]) <= most for row, most in zip(table, budgets)):
            return chosen
        constraints.append(
            LinearConstraint(chosen.astype(np.float64)[None], -np.inf, len(each) - 1)
        )
    raise SpecError("no assignment is within all the budgets; raise one, or give smaller choices")
