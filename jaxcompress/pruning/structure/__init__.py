"""Structured removal: which channels go together, which of them go, and the model without them."""

from jaxcompress.pruning.structure.find import Groups, groups
from jaxcompress.pruning.structure.members import Group, Member
from jaxcompress.pruning.structure.planning import plan
from jaxcompress.pruning.structure.plans import LeafPlan, Plan, keep_channels
from jaxcompress.pruning.structure.rebuilding import rebuild
from jaxcompress.pruning.structure.shrinking import (
    mask,
    shrink,
    shrink_params,
    shrink_state,
    shrunk,
)
from jaxcompress.pruning.structure.stage import Shrink

__all__ = [
    "Group",
    "Groups",
    "LeafPlan",
    "Member",
    "Plan",
    "Shrink",
    "groups",
    "keep_channels",
    "mask",
    "plan",
    "rebuild",
    "shrink",
    "shrink_params",
    "shrink_state",
    "shrunk",
]
