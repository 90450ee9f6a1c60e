"""Distillation: losses between a student and its teacher, one value per example."""

from jaxcompress.distillation.logits import soft_targets

__all__ = ["soft_targets"]
