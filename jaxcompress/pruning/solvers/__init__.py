"""Solvers: weights are removed, and those that stay make up for them.

All work on `gram = sum x x'` of the inputs that meet a layer, from `jaxcompress.observe`, and on
weights `[..., K, N]`, inputs before outputs; `jaxcompress.SparseGPT` does it on the leaves
of a tree.
"""

from jaxcompress.layerwise.hessian import Solution
from jaxcompress.pruning.solvers.obs import layerwise_obs, obs, reconstruct
from jaxcompress.pruning.solvers.sparsegpt import sparsegpt
from jaxcompress.pruning.solvers.spec import SparseGPT

__all__ = ["Solution", "SparseGPT", "layerwise_obs", "obs", "reconstruct", "sparsegpt"]
