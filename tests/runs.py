"""Small editors, examples and training runs, shared by the tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from families import language_model

from workbench.data import EditExample, Statement
from workbench.editors import EditRequest, TrainableEditor
from workbench.editors.mend import Mend, MendConfig
from workbench.encoding import Tokens, tokenize
from workbench.models import LanguageModel
from workbench.training import EditTexts, Progress, StepLosses, Trainer, TrainingConfig

torch.set_num_threads(1)
opened = cache(language_model)
KINDS = ("gpt2", "llama", "t5", "bert")  # Conv1D and Linear, two stacks, a classifier
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


def edits_for(lm: LanguageModel) -> list[EditTexts]:
    """Three edits of different lengths, with unequal numbers of other texts."""
    targets = ("LABEL_1", "LABEL_0", "LABEL_1") if lm.kind == "classifier" else ("Lyon", "b", "one")

    def read(prompt: str, target: str) -> Tokens:
        return tokenize(lm, prompt, target)

    one, two, three = targets
    near = (read("Spain has", two), read("A dog", one), read("It is said to", three))
    return [
        EditTexts(
            read("France's capital is", one),
            (read("France has", one), read("Its capital:", one)),
            near[:2],
        ),
        EditTexts(read("She", two), (read("She", two),), near[1:]),
        EditTexts(read("This and", three), (read("That or this and", three),), near[2:]),
    ]


def requests_for(lm: LanguageModel) -> list[EditRequest]:
    """Two edits of different lengths."""
    targets = ("LABEL_1", "LABEL_0") if lm.kind == "classifier" else ("Lyon", "a much longer one")
    return [
        EditRequest("The capital of France is", targets[0]),
        EditRequest("Her name was", targets[1]),
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
    editor: TrainableEditor | None = None,
    data: Sequence[EditExample] = (),
    on_step: Callable[[Progress, StepLosses], bool | None] | None = None,
    on_record: Callable[[Mapping[str, Any]], object] | None = None,
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
        on_record=on_record,
    )


def left_by(trainer: Trainer) -> tuple[dict[str, bytes], Progress]:
    """All that a run leaves behind."""
    files = {path.name: path.read_bytes() for path in trainer.folder.iterdir()}
    return files, trainer.progress
