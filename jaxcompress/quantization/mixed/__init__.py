"""Mixed precision: which leaf gets how many bits, under a budget."""

from jaxcompress.quantization.mixed.allocate import allocate, sensitivities
from jaxcompress.quantization.mixed.costs import bops
from jaxcompress.quantization.mixed.curve import BudgetCurve, budget_curve, draw_budget
from jaxcompress.quantization.mixed.knapsack import best_choices
from jaxcompress.quantization.mixed.table import Allocation, Sensitivities

__all__ = [
    "Allocation",
    "BudgetCurve",
    "Sensitivities",
    "allocate",
    "best_choices",
    "bops",
    "budget_curve",
    "draw_budget",
    "sensitivities",
]
