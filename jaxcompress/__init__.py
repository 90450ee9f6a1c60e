"""Functional neural-network compression for JAX and Flax.

A compressed model is the same pytree with smaller leaves, and any JAX function can run on it:

- `compress(params, rules)` makes the leaves small, `decompress` undoes it;
- `compressed(fn)` runs any function on them;
- `save` and `load` keep them small on disk.
"""

from jaxcompress import decomposition, distillation, drivers, pruning, quantization, sharing
from jaxcompress._version import __version__
from jaxcompress.arrays.adapted import AdaptedArray
from jaxcompress.arrays.base import (
    CompressedArray,
    is_compressed,
    register_array,
    register_rule,
)
from jaxcompress.arrays.codebook import CodebookArray
from jaxcompress.arrays.factored_conv import FactoredArray
from jaxcompress.arrays.fake_quantized import FakeQuantizedArray
from jaxcompress.arrays.low_rank import LowRankArray
from jaxcompress.arrays.packed import PackedArray
from jaxcompress.arrays.product import ProductArray
from jaxcompress.arrays.quantized import QuantizedArray
from jaxcompress.arrays.quantized_input import QuantizedInputArray
from jaxcompress.arrays.rotated import RotatedArray
from jaxcompress.arrays.scaled import ScaledArray
from jaxcompress.arrays.sparse import SparseArray
from jaxcompress.arrays.summed import SumArray
from jaxcompress.checkpoint.file import load, read_metadata, read_plan, save
from jaxcompress.checkpoint.sources import open_params
from jaxcompress.compress import (
    combine,
    compress,
    decompress,
    finalize,
    nbytes,
    partition,
    trainable_mask,
)
from jaxcompress.decomposition.lora import LoRA
from jaxcompress.decomposition.matrices import Kronecker, Monarch, Separable
from jaxcompress.decomposition.spec import LowRank
from jaxcompress.decomposition.tensors import CP, BlockTerm, TensorRing, TensorTrain, Tucker
from jaxcompress.errors import CompressError, FileError, RecipeError, RuleError, SpecError
from jaxcompress.input_stats import InputStats, histogram_edges
from jaxcompress.interpret import compressed
from jaxcompress.kernel_axes import kernel_axes
from jaxcompress.lazy import LazyArray
from jaxcompress.observe import observe
from jaxcompress.pruning.solvers import SparseGPT
from jaxcompress.pruning.spec import Prune
from jaxcompress.pruning.wrapper import sparsify
from jaxcompress.quantization.activations import QuantizeInput
from jaxcompress.quantization.learned import LSQ
from jaxcompress.quantization.solvers import AWQ, GPTQ
from jaxcompress.quantization.spec import FakeQuantize, Quantize
from jaxcompress.quantization.transforms import SmoothQuant
from jaxcompress.recipes.recipe import Recipe, Rule
from jaxcompress.report.coding import CodedSizes, coded_sizes
from jaxcompress.report.contents import Contents, contents
from jaxcompress.report.difference import Difference, diff
from jaxcompress.report.summary import Summary, summary
from jaxcompress.rules import KernelAxes
from jaxcompress.sharing.product import ProductQuantize, ResidualQuantize
from jaxcompress.sharing.spec import Codebook
from jaxcompress.specs import LeafContext, Plan, Spec, chain, register_spec

__all__ = [
    "AWQ",
    "CP",
    "GPTQ",
    "LSQ",
    "AdaptedArray",
    "BlockTerm",
    "Codebook",
    "CodebookArray",
    "CodedSizes",
    "CompressError",
    "CompressedArray",
    "Contents",
    "Difference",
    "FactoredArray",
    "FakeQuantize",
    "FakeQuantizedArray",
    "FileError",
    "InputStats",
    "KernelAxes",
    "Kronecker",
    "LazyArray",
    "LeafContext",
    "LoRA",
    "LowRank",
    "LowRankArray",
    "Monarch",
    "PackedArray",
    "Plan",
    "ProductArray",
    "ProductQuantize",
    "Prune",
    "Quantize",
    "QuantizeInput",
    "QuantizedArray",
    "QuantizedInputArray",
    "Recipe",
    "RecipeError",
    "ResidualQuantize",
    "RotatedArray",
    "Rule",
    "RuleError",
    "ScaledArray",
    "Separable",
    "SmoothQuant",
    "SparseArray",
    "SparseGPT",
    "Spec",
    "SpecError",
    "SumArray",
    "Summary",
    "TensorRing",
    "TensorTrain",
    "Tucker",
    "__version__",
    "chain",
    "coded_sizes",
    "combine",
    "compress",
    "compressed",
    "contents",
    "decomposition",
    "decompress",
    "diff",
    "distillation",
    "drivers",
    "finalize",
    "histogram_edges",
    "is_compressed",
    "kernel_axes",
    "load",
    "nbytes",
    "observe",
    "open_params",
    "partition",
    "pruning",
    "quantization",
    "read_metadata",
    "read_plan",
    "register_array",
    "register_rule",
    "register_spec",
    "save",
    "sharing",
    "sparsify",
    "summary",
    "trainable_mask",
]
