"""What `sparsify` removes and lets grow."""

from jaxcompress.pruning.algorithms.base import Algorithm, Moment, magnitude, random, static
from jaxcompress.pruning.algorithms.deep_r import deep_r
from jaxcompress.pruning.algorithms.dense_copy import (
    movement,
    soft_movement,
    straight_through,
    top_kast,
)
from jaxcompress.pruning.algorithms.redistribute import dsr, snfs
from jaxcompress.pruning.algorithms.regrow import gse, rigl, set_
from jaxcompress.pruning.algorithms.taylor import taylor

__all__ = [
    "Algorithm",
    "Moment",
    "deep_r",
    "dsr",
    "gse",
    "magnitude",
    "movement",
    "random",
    "rigl",
    "set_",
    "snfs",
    "soft_movement",
    "static",
    "straight_through",
    "taylor",
    "top_kast",
]
