"""Drivers: methods that call the user's own training several times, and resume after a kill."""

from jaxcompress.drivers.chain import (
    ChainRound,
    ChosenTeacher,
    DistilledRound,
    choose_teacher,
    distil_chain,
)
from jaxcompress.drivers.early_bird import EarlyBird, EarlyBirdState, early_bird, mask_distance
from jaxcompress.drivers.iterative import (
    PrunedRound,
    Round,
    Trained,
    iterative_pruning,
    learning_rate_rewinding,
    lottery_ticket,
)
from jaxcompress.drivers.layer_by_layer import CompressedRound, LayerRound, layer_by_layer
from jaxcompress.drivers.shrinking import ShrinkRound, ShrunkRound, iterative_shrinking
from jaxcompress.drivers.teacher_cache import TeacherCache, cache_teacher

__all__ = [
    "ChainRound",
    "ChosenTeacher",
    "CompressedRound",
    "DistilledRound",
    "EarlyBird",
    "EarlyBirdState",
    "LayerRound",
    "PrunedRound",
    "Round",
    "ShrinkRound",
    "ShrunkRound",
    "TeacherCache",
    "Trained",
    "cache_teacher",
    "choose_teacher",
    "distil_chain",
    "early_bird",
    "iterative_pruning",
    "iterative_shrinking",
    "layer_by_layer",
    "learning_rate_rewinding",
    "lottery_ticket",
    "mask_distance",
]
