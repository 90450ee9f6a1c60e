"""Re-parametrizations: the same function, in a form that is easier to quantize."""

from jaxcompress.quantization.transforms.batch_norm import fold_batch_norms
from jaxcompress.quantization.transforms.bias_correction import correct_biases, relu_mean
from jaxcompress.quantization.transforms.equalize import equalize
from jaxcompress.quantization.transforms.rotate import Rotate
from jaxcompress.quantization.transforms.smooth import (
    SmoothQuant,
    smooth_into_norms,
    smoothing_scale,
)

__all__ = [
    "Rotate",
    "SmoothQuant",
    "correct_biases",
    "equalize",
    "fold_batch_norms",
    "relu_mean",
    "smooth_into_norms",
    "smoothing_scale",
]
