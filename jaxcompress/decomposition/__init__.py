"""Low-rank and tensor decompositions: pure functions on arrays, and specs of leaves.

- `svd`, `cp`, `tucker`, `tensor_train`, ...: an array in, factors out;
- `LowRank`: a kernel as the product of two thin ones (`spec`);
- `ActivationSVD`, `FisherSVD`, `reduce_responses`: by what meets the kernel (`data_aware`);
- `vbmf`, `allocate_ranks`: how large the ranks are (`ranks`, `budget`);
- `Tucker`, `CP`, `TensorTrain`, `TensorRing`, `BlockTerm`: a kernel as a network (`tensors`);
- `Separable`, `Kronecker`, `Monarch`: structured kernels (`matrices`);
- `LoRA`, `LoftQ`, `LowRankPlusQuantized`, `LowRankPlusSparse`: a low-rank part beside another leaf.
"""

from jaxcompress.arrays.adapted import AdaptedArray
from jaxcompress.decomposition.adapters import Gap, merge, merge_gaps, partition_adapters
from jaxcompress.decomposition.block_term import block_term
from jaxcompress.decomposition.budget import allocate_ranks, allocated, rank_errors
from jaxcompress.decomposition.cp import cp
from jaxcompress.decomposition.data_aware import ASVD, ActivationSVD, FisherSVD, fisher_stats
from jaxcompress.decomposition.elementwise import WeightedFactors, weighted_low_rank
from jaxcompress.decomposition.kronecker import kronecker
from jaxcompress.decomposition.lora import LoRA
from jaxcompress.decomposition.matrices import Kronecker, Monarch, Separable
from jaxcompress.decomposition.monarch import monarch
from jaxcompress.decomposition.randomized import randomized_svd, svd
from jaxcompress.decomposition.ranks import VBMF, vbmf, vbmf_ranks
from jaxcompress.decomposition.residual import alternate, low_rank_correction
from jaxcompress.decomposition.residual_spec import (
    LoftQ,
    LowRankPlusQuantized,
    LowRankPlusSparse,
)
from jaxcompress.decomposition.responses import Responses, asymmetric, reduce_responses
from jaxcompress.decomposition.robust_pca import RobustPCA, robust_pca
from jaxcompress.decomposition.spec import LowRank
from jaxcompress.decomposition.svd import truncated_svd
from jaxcompress.decomposition.tensor_ring import tensor_ring
from jaxcompress.decomposition.tensor_train import tensor_train, tensor_train_matrix
from jaxcompress.decomposition.tensors import CP, BlockTerm, TensorRing, TensorTrain, Tucker
from jaxcompress.decomposition.tucker import hosvd, tucker, tucker2
from jaxcompress.decomposition.weighted import activation_svd, asvd, fisher_svd

__all__ = [
    "ASVD",
    "CP",
    "VBMF",
    "ActivationSVD",
    "AdaptedArray",
    "BlockTerm",
    "FisherSVD",
    "Gap",
    "Kronecker",
    "LoRA",
    "LoftQ",
    "LowRank",
    "LowRankPlusQuantized",
    "LowRankPlusSparse",
    "Monarch",
    "Responses",
    "RobustPCA",
    "Separable",
    "TensorRing",
    "TensorTrain",
    "Tucker",
    "WeightedFactors",
    "activation_svd",
    "allocate_ranks",
    "allocated",
    "alternate",
    "asvd",
    "asymmetric",
    "block_term",
    "cp",
    "fisher_stats",
    "fisher_svd",
    "hosvd",
    "kronecker",
    "low_rank_correction",
    "merge",
    "merge_gaps",
    "monarch",
    "partition_adapters",
    "randomized_svd",
    "rank_errors",
    "reduce_responses",
    "robust_pca",
    "svd",
    "tensor_ring",
    "tensor_train",
    "tensor_train_matrix",
    "truncated_svd",
    "tucker",
    "tucker2",
    "vbmf",
    "vbmf_ranks",
    "weighted_low_rank",
]
