"""Scores: how much each weight matters, as a tree of the structure of the params.

The least important have the lowest score, in every one, so that `make_masks` keeps the largest.
Scores of whole units are broadcast to the shape of the weight; `make_masks` pools them again.
"""

from jaxcompress.pruning.scores.basic import lamp, magnitude, random
from jaxcompress.pruning.scores.curvature import fisher, obd
from jaxcompress.pruning.scores.filters import (
    batch_norm_slimming,
    filter_norm,
    geometric_median,
    nisp,
)
from jaxcompress.pruning.scores.first_order import skeletonization, snip, taylor
from jaxcompress.pruning.scores.grasp import grasp
from jaxcompress.pruning.scores.inputs import hrank, wanda
from jaxcompress.pruning.scores.iterated import ScoredMasks, force
from jaxcompress.pruning.scores.karnin import KarninState, karnin, track_karnin
from jaxcompress.pruning.scores.synflow import synaptic_flow, synflow

__all__ = [
    "KarninState",
    "ScoredMasks",
    "batch_norm_slimming",
    "filter_norm",
    "fisher",
    "force",
    "geometric_median",
    "grasp",
    "hrank",
    "karnin",
    "lamp",
    "magnitude",
    "nisp",
    "obd",
    "random",
    "skeletonization",
    "snip",
    "synaptic_flow",
    "synflow",
    "taylor",
    "track_karnin",
    "wanda",
]
