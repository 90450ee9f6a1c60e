"""Weight sharing: few values, or few vectors, or one array, for many weights.

- `Codebook` and `kmeans_1d`: k-means of the values of a kernel (`spec`);
- `ProductQuantize`, `ResidualQuantize` and `kmeans`: of blocks of them (`product`, `vectors`);
- `soft_sharing`, `DKM`, `SoftToHard`: sharing that is learned (`soft`, `dkm`);
- `Hashed`: sharing by a hash (`hashed`);
- `TieRows`, `tie`, `share_templates`: rows, leaves and layers in common (`tied_rows`, `tying`).
"""

from jaxcompress.arrays.fake_product import FakeProductArray
from jaxcompress.arrays.hashed import HashedArray
from jaxcompress.arrays.row_shared import RowSharedArray
from jaxcompress.arrays.template import TemplateArray
from jaxcompress.sharing.dkm import (
    DKM,
    SoftToHard,
    annealed,
    refresh,
    soft_entropy,
    soft_to_hard_gap,
)
from jaxcompress.sharing.fake_product import FakeProductQuantize, refresh_codebooks
from jaxcompress.sharing.hashed import Hashed, hashed_values
from jaxcompress.sharing.kmeans import assign, kmeans_1d
from jaxcompress.sharing.mixture import (
    Mixture,
    gamma_penalty,
    init_mixture,
    log_likelihood,
    merge,
    symmetric_kl,
)
from jaxcompress.sharing.product import ProductQuantize, ResidualQuantize
from jaxcompress.sharing.soft import share_by_mixture, sharing_gap, soft_sharing
from jaxcompress.sharing.soft_codebook import DKMArray, SoftToHardArray
from jaxcompress.sharing.soft_kmeans import soft_histogram, soft_kmeans, soft_values
from jaxcompress.sharing.spec import Codebook
from jaxcompress.sharing.templates import share_templates, template_bank
from jaxcompress.sharing.tied_rows import TieRows, cluster_rows, row_similarity, share_rows
from jaxcompress.sharing.tying import Ties, Transposed, layers, tie
from jaxcompress.sharing.vectors import Clusters, kmeans

__all__ = [
    "DKM",
    "Clusters",
    "Codebook",
    "DKMArray",
    "FakeProductArray",
    "FakeProductQuantize",
    "Hashed",
    "HashedArray",
    "Mixture",
    "ProductQuantize",
    "ResidualQuantize",
    "RowSharedArray",
    "SoftToHard",
    "SoftToHardArray",
    "TemplateArray",
    "TieRows",
    "Ties",
    "Transposed",
    "annealed",
    "assign",
    "cluster_rows",
    "gamma_penalty",
    "hashed_values",
    "init_mixture",
    "kmeans",
    "kmeans_1d",
    "layers",
    "log_likelihood",
    "merge",
    "refresh",
    "refresh_codebooks",
    "row_similarity",
    "share_by_mixture",
    "share_rows",
    "share_templates",
    "sharing_gap",
    "soft_entropy",
    "soft_histogram",
    "soft_kmeans",
    "soft_sharing",
    "soft_to_hard_gap",
    "soft_values",
    "symmetric_kl",
    "template_bank",
    "tie",
]
