"""Pruning: which weights go, when, and how that composes with an optimizer.

`jaxcompress.Prune` removes weights of a saved tree in one shot, `jaxcompress.sparsify` while an
optimizer trains them.
"""

from jaxcompress.pruning.algorithms import Algorithm, magnitude
from jaxcompress.pruning.allocation import erk, lamp, uniform
from jaxcompress.pruning.masks import apply_masks, count_kept, fit_masks, make_masks
from jaxcompress.pruning.report import sparsity_report
from jaxcompress.pruning.schedules import Schedule, cubic_schedule, one_shot, periodic
from jaxcompress.pruning.select import kept_count, kth_largest, n_of_m_mask, top_mask, top_masks
from jaxcompress.pruning.wrapper import SparsifyState, sparsify

__all__ = [
    "Algorithm",
    "Schedule",
    "SparsifyState",
    "apply_masks",
    "count_kept",
    "cubic_schedule",
    "erk",
    "fit_masks",
    "kept_count",
    "kth_largest",
    "lamp",
    "magnitude",
    "make_masks",
    "n_of_m_mask",
    "one_shot",
    "periodic",
    "sparsify",
    "sparsity_report",
    "top_mask",
    "top_masks",
    "uniform",
]
