"""Solvers: codes that change the outputs of a layer least, rather than its weights.

All work on `gram = sum x x'` of the inputs that meet a layer, from `jaxcompress.observe`, and on
weights `[..., K, N]`, inputs before outputs; the specs do it on the leaves of a tree.
"""

from jaxcompress.quantization.solvers.adaround import adaround, signround
from jaxcompress.quantization.solvers.awq import awq
from jaxcompress.quantization.solvers.awq_spec import AWQ
from jaxcompress.quantization.solvers.gptq import gptq
from jaxcompress.quantization.solvers.hqq import HQQ, hqq
from jaxcompress.quantization.solvers.obq import obq
from jaxcompress.quantization.solvers.spec import GPTQ, AdaRound, SignRound
from jaxcompress.quantization.solvers.spqr import SpQR, spqr

__all__ = [
    "AWQ",
    "GPTQ",
    "HQQ",
    "AdaRound",
    "SignRound",
    "SpQR",
    "adaround",
    "awq",
    "gptq",
    "hqq",
    "obq",
    "signround",
    "spqr",
]
