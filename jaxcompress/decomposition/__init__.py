"""Low-rank and tensor decompositions: pure functions on arrays, and specs of leaves.

- `svd`, `cp`, `tucker`, `tensor_train`, ...: an array in, factors out;
- `LowRank`: a kernel as the product of two thin ones (`spec`);
- `Tucker`, `CP`, `TensorTrain`, `TensorRing`, `BlockTerm`: a kernel as a network (`tensors`);
- `Separable`, `Kronecker`, `Monarch`: structured kernels (`matrices`).
"""

from jaxcompress.decomposition.block_term import block_term
from jaxcompress.decomposition.cp import cp
from jaxcompress.decomposition.kronecker import kronecker
from jaxcompress.decomposition.matrices import Kronecker, Monarch, Separable
from jaxcompress.decomposition.monarch import monarch
from jaxcompress.decomposition.randomized import randomized_svd, svd
from jaxcompress.decomposition.spec import LowRank
from jaxcompress.decomposition.svd import truncated_svd
from jaxcompress.decomposition.tensor_ring import tensor_ring
from jaxcompress.decomposition.tensor_train import tensor_train, tensor_train_matrix
from jaxcompress.decomposition.tensors import CP, BlockTerm, TensorRing, TensorTrain, Tucker
from jaxcompress.decomposition.tucker import hosvd, tucker, tucker2

__all__ = [
    "CP",
    "BlockTerm",
    "Kronecker",
    "LowRank",
    "Monarch",
    "Separable",
    "TensorRing",
    "TensorTrain",
    "Tucker",
    "block_term",
    "cp",
    "hosvd",
    "kronecker",
    "monarch",
    "randomized_svd",
    "svd",
    "tensor_ring",
    "tensor_train",
    "tensor_train_matrix",
    "truncated_svd",
    "tucker",
    "tucker2",
]
