"""Small editors, examples and training runs, shared by the tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from families import language_model

from workbench.data import EditExample, Statement
from workbench.editors.mend import Mend, MendConfig
from workbench.models import LanguageModel
from workbench.trainer import Progress, Trainer
from workbench.training import StepLosses, TrainingConfig

torch.set_num_threads(1)
opened = cache(language_model)
# Where the MLP is routed, attention is what can be edited. The gradient at queries and keys is a
# small difference of large numbers: in float32 too noisy to compare.
MATRICES = {"mixtral": ("v_proj", "o_proj")}


def editor_for(family: str, lm: LanguageModel | None = None, **config: Any) -> Mend:
    """A fresh editor, always the same."""
    defaults = {"rank": 4, "edit_lr": 1e-3, "matrices": MATRICES.get(family, "mlp")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Mend(lm or opened(family), MendConfig(**(defaults | config)))


def examples(count: int) -> list[EditExample]:
    """Edits of different subjects, with all that a sampler draws from."""
    return [
        EditExample(
            prompt=f"Item {index} is",
            target=chr(ord("a") + index % 26),
            paraphrases=(f"The {index}th is", f"Number {index}:", f"Say {index}:"),
            neighbors=(Statement(prompt=f"Item {index + 500} is", answer="z"),),
            unrelated=(Statement(prompt="Ice is", answer="cold"), Statement(prompt="Fire is")),
        )
        for index in range(count)
    ]


# Unrelated texts.
TEXTS = ["The river runs to the sea.", "Bread is made of flour and water."]


RUN = TrainingConfig(
    steps=6,
    batch=2,
    lr=1e-2,
    edit_lr_lr=1e-4,
    text_tokens=8,
    warmup=2,
    decay=0.5,
    validate_every=3,
    validation=3,
    patience=0,
    save_every=2,
    cache_gb=0.0,
    health_after=0,
)


def trainer_for(
    folder: Path,
    *,
    editor: Mend | None = None,
    data: Sequence[EditExample] = (),
    on_step: Callable[[Progress, StepLosses], bool | None] | None = None,
    **config: Any,
) -> Trainer:
    """A small run, always the same; `config` goes over RUN's settings."""
    found = examples(12)
    return Trainer(
        editor or editor_for("gpt2", rank=2, blocks=[-1]),
        data or found[:9],
        TEXTS,
        replace(RUN, **config),
        folder,
        validation=found[9:],
        card={"data": "items"},
        on_step=on_step,
    )
