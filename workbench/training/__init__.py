"""Meta-training of editors: settings, the batches that are drawn, a step, the loop around it."""

from __future__ import annotations

from workbench.training.config import TrainingConfig
from workbench.training.sampling import TextSampler
from workbench.training.step import EditTexts, MetaStep, StepLosses
from workbench.training.trainer import CHECKPOINT, LOG, Progress, Trainer

__all__ = [
    "CHECKPOINT",
    "LOG",
    "EditTexts",
    "MetaStep",
    "Progress",
    "StepLosses",
    "TextSampler",
    "Trainer",
    "TrainingConfig",
]
