"""Meta-training of editors: settings, what is drawn, a step, the loop around it; their scopes."""

from __future__ import annotations

from workbench.training.config import TrainingConfig
from workbench.training.sampling import TextSampler
from workbench.training.scoping import LearnedScope, learn_scope, with_scope
from workbench.training.step import EditTexts, MetaStep, StepLosses
from workbench.training.trainer import CHECKPOINT, LOG, Progress, Trainer

__all__ = [
    "CHECKPOINT",
    "LOG",
    "EditTexts",
    "LearnedScope",
    "MetaStep",
    "Progress",
    "StepLosses",
    "TextSampler",
    "Trainer",
    "TrainingConfig",
    "learn_scope",
    "with_scope",
]
