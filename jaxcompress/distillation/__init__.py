"""Distillation: what a student and its teacher, or several students, have to do with each other.

Losses give one value per example, are functions of arrays, and pass no gradient to the teacher.
"""

from jaxcompress.distillation.activation_maps import attention_transfer, gradient_transfer
from jaxcompress.distillation.adversarial import discriminator_loss, generator_loss
from jaxcompress.distillation.alignment import cka
from jaxcompress.distillation.batch_norms import (
    Moments,
    batch_norm_loss,
    moments,
    stored_moments,
    with_norm_moments,
)
from jaxcompress.distillation.beam import Beams, beam_search, closest
from jaxcompress.distillation.bleu import sentence_bleu
from jaxcompress.distillation.boundaries import activation_boundaries
from jaxcompress.distillation.branches import (
    branch_gate,
    branch_gate_init,
    native_ensemble,
    native_ensemble_loss,
)
from jaxcompress.distillation.congruence import correlation_congruence
from jaxcompress.distillation.contrastive import crd, crd_init, crd_negatives
from jaxcompress.distillation.correlation import dist
from jaxcompress.distillation.decoupled import dkd
from jaxcompress.distillation.distilled_data import dataset_distillation, train_on_distilled
from jaxcompress.distillation.divergences import (
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skewed_kl,
    skewed_reverse_kl,
)
from jaxcompress.distillation.ema import EmaTeacherState, ema_teacher, mean_teacher
from jaxcompress.distillation.factor import (
    factor_transfer,
    paraphrase,
    paraphraser_init,
    paraphraser_loss,
    translate,
    translator_init,
)
from jaxcompress.distillation.flow import fsp, fsp_matrix
from jaxcompress.distillation.generators import generator_distillation
from jaxcompress.distillation.hints import hint
from jaxcompress.distillation.init_layers import init_from_layers
from jaxcompress.distillation.inversion import (
    Inversion,
    InversionState,
    Inverted,
    competition,
    inversion,
    invert,
    jitter,
    total_variation,
)
from jaxcompress.distillation.kdgan import gumbel_softmax, kdgan_discriminator, kdgan_generator
from jaxcompress.distillation.layer_maps import layer_map, over_layers
from jaxcompress.distillation.logits import distillation_loss, logit_regression, soft_targets
from jaxcompress.distillation.margins import measured_margin, normal_margin, overhaul
from jaxcompress.distillation.mutual import mutual_learning
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
from jaxcompress.distillation.small_loss import co_teaching, small_losses
from jaxcompress.distillation.stored_logits import TopLogits, top_k_logits, top_k_soft_targets
from jaxcompress.distillation.taps import tap
from jaxcompress.distillation.teachers import (
    annealed_targets,
    multi_task,
    switched_teacher,
    teacher_ensemble,
)
from jaxcompress.distillation.transformers import (
    attention_mse,
    hidden_states,
    patient,
    projection_init,
)
from jaxcompress.distillation.variational import vid, vid_init

__all__ = [
    "Beams",
    "EmaTeacherState",
    "Inversion",
    "InversionState",
    "Inverted",
    "Moments",
    "TopLogits",
    "activation_boundaries",
    "annealed_targets",
    "attention_kl",
    "attention_mse",
    "attention_scores",
    "attention_transfer",
    "batch_norm_loss",
    "beam_search",
    "branch_gate",
    "branch_gate_init",
    "cka",
    "closest",
    "co_teaching",
    "competition",
    "correlation_congruence",
    "crd",
    "crd_init",
    "crd_negatives",
    "dataset_distillation",
    "discriminator_loss",
    "dist",
    "distillation_loss",
    "dkd",
    "ema_teacher",
    "factor_transfer",
    "forced_logits",
    "forward_kl",
    "fsp",
    "fsp_matrix",
    "generator_distillation",
    "generator_loss",
    "gradient_transfer",
    "gumbel_softmax",
    "hidden_states",
    "hint",
    "init_from_layers",
    "inversion",
    "invert",
    "jensen_shannon",
    "jitter",
    "kdgan_discriminator",
    "kdgan_generator",
    "layer_map",
    "logit_regression",
    "mean_teacher",
    "measured_margin",
    "minilm",
    "minilm_v2",
    "moments",
    "multi_task",
    "mutual_learning",
    "native_ensemble",
    "native_ensemble_loss",
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
    "small_losses",
    "soft_targets",
    "stored_moments",
    "switched_teacher",
    "tap",
    "teacher_ensemble",
    "token_mask",
    "top_k_logits",
    "top_k_soft_targets",
    "total_variation",
    "train_on_distilled",
    "translate",
    "translator_init",
    "vid",
    "vid_init",
    "virtual_teacher",
    "with_norm_moments",
    "word_level",
]
