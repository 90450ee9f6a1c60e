"""Pruning: which weights go, when, and how that composes with an optimizer.

`jaxcompress.Prune` removes weights of a saved tree in one shot, `jaxcompress.sparsify` while an
optimizer trains them.
"""

from jaxcompress.pruning import gates, scores, solvers
from jaxcompress.pruning.algorithms import (
    Algorithm,
    Moment,
    deep_r,
    dsr,
    gse,
    magnitude,
    movement,
    random,
    rigl,
    set_,
    snfs,
    soft_movement,
    static,
    straight_through,
    taylor,
    top_kast,
)
from jaxcompress.pruning.allocation import erk, lamp, uniform
from jaxcompress.pruning.growl import growl
from jaxcompress.pruning.masks import (
    apply_masks,
    count_kept,
    fit_masks,
    make_masks,
    multiplications,
    sparse_bytes,
)
from jaxcompress.pruning.penalties import (
    Penalty,
    group_lasso,
    l1,
    sparse_group_lasso,
    weight_elimination,
)
from jaxcompress.pruning.plots import draw_sparsity
from jaxcompress.pruning.proximal import ProximalState, proximal
from jaxcompress.pruning.report import sparsity_report
from jaxcompress.pruning.schedules import (
    Schedule,
    cubic_schedule,
    cyclic_schedule,
    exponential_schedule,
    iterative_schedule,
    one_shot,
    periodic,
)
from jaxcompress.pruning.select import kept_count, kth_largest, n_of_m_mask, top_mask, top_masks
from jaxcompress.pruning.structure import (
    Group,
    Groups,
    LeafPlan,
    Member,
    Plan,
    groups,
    keep_channels,
    plan,
    shrink,
    shrink_params,
    shrink_state,
    shrunk,
)
from jaxcompress.pruning.structure import mask as mask_channels
from jaxcompress.pruning.wrapper import SparsifyState, sparsify

__all__ = [
    "Algorithm",
    "Group",
    "Groups",
    "LeafPlan",
    "Member",
    "Moment",
    "Penalty",
    "Plan",
    "ProximalState",
    "Schedule",
    "SparsifyState",
    "apply_masks",
    "count_kept",
    "cubic_schedule",
    "cyclic_schedule",
    "deep_r",
    "draw_sparsity",
    "dsr",
    "erk",
    "exponential_schedule",
    "fit_masks",
    "gates",
    "group_lasso",
    "groups",
    "growl",
    "gse",
    "iterative_schedule",
    "keep_channels",
    "kept_count",
    "kth_largest",
    "l1",
    "lamp",
    "magnitude",
    "make_masks",
    "mask_channels",
    "movement",
    "multiplications",
    "n_of_m_mask",
    "one_shot",
    "periodic",
    "plan",
    "proximal",
    "random",
    "rigl",
    "scores",
    "set_",
    "shrink",
    "shrink_params",
    "shrink_state",
    "shrunk",
    "snfs",
    "soft_movement",
    "solvers",
    "sparse_bytes",
    "sparse_group_lasso",
    "sparsify",
    "sparsity_report",
    "static",
    "straight_through",
    "taylor",
    "top_kast",
    "top_mask",
    "top_masks",
    "uniform",
    "weight_elimination",
]
