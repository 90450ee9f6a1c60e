"""Quantization of what weights meet: static, dynamic, and with trained ranges."""

from jaxcompress.quantization.activations.gradients import quantize_gradient
from jaxcompress.quantization.activations.ranges import (
    entropy_range,
    moving_average,
    mse_range,
    percentile_range,
)
from jaxcompress.quantization.activations.spec import QuantizeInput
from jaxcompress.quantization.activations.trained import PACT, DoReFaInput, LSQInput

__all__ = [
    "PACT",
    "DoReFaInput",
    "LSQInput",
    "QuantizeInput",
    "entropy_range",
    "moving_average",
    "mse_range",
    "percentile_range",
    "quantize_gradient",
]
