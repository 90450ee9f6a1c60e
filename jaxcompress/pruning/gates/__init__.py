"""Gates: trained leaves that learn which weights, or groups of weights, are not needed.

Put them in with `jaxcompress.compress`, train them under `jaxcompress.compressed`, and
`jaxcompress.finalize` stores what they leave.
"""

from jaxcompress.pruning.gates.base import GateArray
from jaxcompress.pruning.gates.bottleneck import BottleneckArray, InformationBottleneck
from jaxcompress.pruning.gates.gaussian import GaussianArray
from jaxcompress.pruning.gates.horseshoe import Horseshoe, HorseshoeArray
from jaxcompress.pruning.gates.l0 import HardConcreteArray, L0HardConcrete
from jaxcompress.pruning.gates.masked import (
    EdgePopup,
    EdgePopupArray,
    Piggyback,
    PiggybackArray,
)
from jaxcompress.pruning.gates.threshold import SoftThreshold, SoftThresholdArray
from jaxcompress.pruning.gates.variational import VariationalDropout, VariationalDropoutArray
from jaxcompress.pruning.gates.verbs import (
    GateReport,
    gate_penalty,
    gate_report,
    posterior_bits,
    quiet,
    sample,
)

__all__ = [
    "BottleneckArray",
    "EdgePopup",
    "EdgePopupArray",
    "GateArray",
    "GateReport",
    "GaussianArray",
    "HardConcreteArray",
    "Horseshoe",
    "HorseshoeArray",
    "InformationBottleneck",
    "L0HardConcrete",
    "Piggyback",
    "PiggybackArray",
    "SoftThreshold",
    "SoftThresholdArray",
    "VariationalDropout",
    "VariationalDropoutArray",
    "gate_penalty",
    "gate_report",
    "posterior_bits",
    "quiet",
    "sample",
]
