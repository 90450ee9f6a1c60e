"""Distillation: what a student and its teacher, or several students, have to do with each other.

Losses give one value per example, are functions of arrays, and pass no gradient to the teacher.
"""

from jaxcompress.distillation.activation_maps import attention_transfer, gradient_transfer
from jaxcompress.distillation.alignment import cka
from jaxcompress.distillation.boundaries import activation_boundaries
from jaxcompress.distillation.congruence import correlation_congruence
from jaxcompress.distillation.contrastive import crd, crd_init, crd_negatives
from jaxcompress.distillation.factor import (
    factor_transfer,
    paraphrase,
    paraphraser_init,
    paraphraser_loss,
    translate,
    translator_init,
)
from jaxcompress.distillation.flow import fsp, fsp_matrix
from jaxcompress.distillation.hints import hint
from jaxcompress.distillation.init_layers import init_from_layers
from jaxcompress.distillation.layer_maps import layer_map, over_layers
from jaxcompress.distillation.logits import soft_targets
from jaxcompress.distillation.margins import measured_margin, normal_margin, overhaul
from jaxcompress.distillation.probabilistic import pkt
from jaxcompress.distillation.regressors import regressor, regressor_init, resize
from jaxcompress.distillation.relational import rkd_angle, rkd_distance
from jaxcompress.distillation.relations_qkv import (
    attention_kl,
    attention_scores,
    minilm,
    minilm_v2,
    relation_kl,
)
from jaxcompress.distillation.similarity import similarity_preserving
from jaxcompress.distillation.taps import tap
from jaxcompress.distillation.transformers import (
    attention_mse,
    hidden_states,
    patient,
    projection_init,
)
from jaxcompress.distillation.variational import vid, vid_init

__all__ = [
    "activation_boundaries",
    "attention_kl",
    "attention_mse",
    "attention_scores",
    "attention_transfer",
    "cka",
    "correlation_congruence",
    "crd",
    "crd_init",
    "crd_negatives",
    "factor_transfer",
    "fsp",
    "fsp_matrix",
    "gradient_transfer",
    "hidden_states",
    "hint",
    "init_from_layers",
    "layer_map",
    "measured_margin",
    "minilm",
    "minilm_v2",
    "normal_margin",
    "over_layers",
    "overhaul",
    "paraphrase",
    "paraphraser_init",
    "paraphraser_loss",
    "patient",
    "pkt",
    "projection_init",
    "regressor",
    "regressor_init",
    "relation_kl",
    "resize",
    "rkd_angle",
    "rkd_distance",
    "similarity_preserving",
    "soft_targets",
    "tap",
    "translate",
    "translator_init",
    "vid",
    "vid_init",
]
