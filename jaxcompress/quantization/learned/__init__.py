"""Trained quantized weights: dense while they are trained, and what they will be where used.

Put them in with `jaxcompress.compress`, train them under `jaxcompress.compressed` with any
optimizer, and `jaxcompress.finalize` stores them, with the same values bit for bit.
"""

from jaxcompress.quantization.learned.base import LearnedArray
from jaxcompress.quantization.learned.binary import (
    XNOR,
    BinaryArray,
    BinaryConnect,
    LossAwareBinary,
    set_curvature,
)
from jaxcompress.quantization.learned.dsq import DSQ, DSQArray
from jaxcompress.quantization.learned.elq import ELQ, ELQArray, perturbed_loss
from jaxcompress.quantization.learned.fixed import WRPN, DoReFa, DoReFaArray, WRPNArray
from jaxcompress.quantization.learned.incremental import IncrementalArray, quantize_more
from jaxcompress.quantization.learned.inq import INQ, INQArray
from jaxcompress.quantization.learned.lsq import LSQ, LSQArray, LSQPlus, LSQPlusArray
from jaxcompress.quantization.learned.multibit import MultiBit, MultiBitArray
from jaxcompress.quantization.learned.noise import QuantNoise, QuantNoiseArray
from jaxcompress.quantization.learned.qil import QIL, QILArray
from jaxcompress.quantization.learned.ternary import TTQ, TWN, BitNet, TernaryArray, TTQArray

__all__ = [
    "DSQ",
    "ELQ",
    "INQ",
    "LSQ",
    "QIL",
    "TTQ",
    "TWN",
    "WRPN",
    "XNOR",
    "BinaryArray",
    "BinaryConnect",
    "BitNet",
    "DSQArray",
    "DoReFa",
    "DoReFaArray",
    "ELQArray",
    "INQArray",
    "IncrementalArray",
    "LSQArray",
    "LSQPlus",
    "LSQPlusArray",
    "LearnedArray",
    "LossAwareBinary",
    "MultiBit",
    "MultiBitArray",
    "QILArray",
    "QuantNoise",
    "QuantNoiseArray",
    "TTQArray",
    "TernaryArray",
    "WRPNArray",
    "perturbed_loss",
    "quantize_more",
    "set_curvature",
]
