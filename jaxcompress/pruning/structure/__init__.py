"""Structured removal: which channels go together, which of them go, and the model without them."""

from jaxcompress.pruning.structure.empty import zero_channels
from jaxcompress.pruning.structure.find import Groups, groups
from jaxcompress.pruning.structure.folding import fold_removed
from jaxcompress.pruning.structure.latency import Clock, Trial, plan_for_latency
from jaxcompress.pruning.structure.members import Group, Member
from jaxcompress.pruning.structure.planning import plan
from jaxcompress.pruning.structure.plans import LeafPlan, Plan, keep_channels
from jaxcompress.pruning.structure.readers import Consumer, consumers
from jaxcompress.pruning.structure.rebuilding import rebuild
from jaxcompress.pruning.structure.shrinking import (
    mask_channels,
    shrink,
    shrink_params,
    shrink_state,
    shrunk,
)
from jaxcompress.pruning.structure.stage import Shrink

__all__ = [
    "Clock",
    "Consumer",
    "Group",
    "Groups",
    "LeafPlan",
    "Member",
    "Plan",
    "Shrink",
    "Trial",
    "consumers",
    "fold_removed",
    "groups",
    "keep_channels",
    "mask_channels",
    "plan",
    "plan_for_latency",
    "rebuild",
    "shrink",
    "shrink_params",
    "shrink_state",
    "shrunk",
    "zero_channels",
]
