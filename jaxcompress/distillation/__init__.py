"""Distillation: what a student and its teacher, or several students, have to do with each other.

Losses give one value per example, are functions of arrays, and pass no gradient to the teacher.
"""

from jaxcompress.distillation.activation_maps import attention_transfer, gradient_transfer
from jaxcompress.distillation.alignment import cka
from jaxcompress.distillation.beam import Beams, beam_search, closest
from jaxcompress.distillation.bleu import sentence_bleu
from jaxcompress.distillation.boundaries import activation_boundaries
from jaxcompress.distillation.congruence import correlation_congruence
from jaxcompress.distillation.contrastive import crd, crd_init, crd_negatives
from jaxcompress.distillation.correlation import dist
from jaxcompress.distillation.decoupled import dkd
from jaxcompress.distillation.divergences import (
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skewed_kl,
    skewed_reverse_kl,
)
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
from jaxcompress.distillation.logits import distillation_loss, logit_regression, soft_targets
from jaxcompress.distillation.margins import measured_margin, normal_margin, overhaul
from jaxcompress.distillation.noise import noisy_logits, virtual_teacher
from jaxcompress.distillation.on_policy import on_policy_tokens, sample_sequences
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
from jaxcompress.distillation.sequences import forced_logits, token_mask, word_level
from jaxcompress.distillation.similarity import similarity_preserving
from jaxcompress.distillation.stored_logits import TopLogits, top_k_logits, top_k_soft_targets
from jaxcompress.distillation.taps import tap
from jaxcompress.distillation.transformers import (
    attention_mse,
    hidden_states,
    patient,
    projection_init,
)
from jaxcompress.distillation.variational import vid, vid_init

__all__ = [
    "Beams",
    "TopLogits",
    "activation_boundaries",
    "attention_kl",
    "attention_mse",
    "attention_scores",
    "attention_transfer",
    "beam_search",
    "cka",
    "closest",
    "correlation_congruence",
    "crd",
    "crd_init",
    "crd_negatives",
    "dist",
    "distillation_loss",
    "dkd",
    "factor_transfer",
    "forced_logits",
    "forward_kl",
    "fsp",
    "fsp_matrix",
    "gradient_transfer",
    "hidden_states",
    "hint",
    "init_from_layers",
    "jensen_shannon",
    "layer_map",
    "logit_regression",
    "measured_margin",
    "minilm",
    "minilm_v2",
    "noisy_logits",
    "normal_margin",
    "on_policy_tokens",
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
    "reverse_kl",
    "rkd_angle",
    "rkd_distance",
    "sample_sequences",
    "sentence_bleu",
    "similarity_preserving",
    "skewed_kl",
    "skewed_reverse_kl",
    "soft_targets",
    "tap",
    "token_mask",
    "top_k_logits",
    "top_k_soft_targets",
    "translate",
    "translator_init",
    "vid",
    "vid_init",
    "virtual_teacher",
    "word_level",
]
