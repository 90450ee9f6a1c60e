"""What training keeps and passes on, in few bits: optimizer states and gradients."""

from jaxcompress.quantization.state.gradients import QuantizeGradientsState, quantize_gradients
from jaxcompress.quantization.state.wrapper import QuantizedState, quantize_state

__all__ = ["QuantizeGradientsState", "QuantizedState", "quantize_gradients", "quantize_state"]
