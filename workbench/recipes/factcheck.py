"""A fact checker: a sentence encoder whose upper half and verdict head were trained here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from workbench.data import EditExample, read
from workbench.encoding import collate, tokenize
from workbench.evaluate import knows
from workbench.gguf import quiet_loading
from workbench.models import LanguageModel
from workbench.recipes.fitting import FitConfig, fit
from workbench.shipped import BODY, body_folder
from workbench.views import Trunk, TrunkCache

LABELS = ("REFUTES", "SUPPORTS")
TRAINED_BLOCKS = 3  # of six
FILES = ("fever_dev", "creak", "fool_me_twice")


def claims(data_folder: Path, split: str) -> dict[str, list[EditExample]]:
    """Claims with their verdicts, by file."""
    return {name: list(read(f"fever:{data_folder / name}.jsonl.gz", split=split)) for name in FILES}


def untrained(seed: int) -> LanguageModel:
    """The sentence encoder with a random head."""
    torch.manual_seed(seed)
    with quiet_loading(bars=False):
        model = transformers.BertForSequenceClassification.from_pretrained(
            body_folder(),
            dtype=torch.float32,
            id2label=dict(enumerate(LABELS)),
            label2id={label: index for index, label in enumerate(LABELS)},
        )
        return LanguageModel.wrap(model, AutoTokenizer.from_pretrained(body_folder()), BODY)


def trained_parameters(lm: LanguageModel) -> dict[str, torch.nn.Parameter]:
    """What differs from the sentence encoder: the upper blocks, the pooler and the head."""
    [stack] = lm.stacks
    first = len(stack.blocks) - TRAINED_BLOCKS
    below = tuple(f"{stack.path}.{place}." for place in range(first))
    return {
        name: parameter
        for name, parameter in lm.model.named_parameters()
        if not name.startswith((*below, "bert.embeddings."))
    }


def train(data_folder: Path, folder: Path, config: FitConfig) -> LanguageModel:
    """Train upper blocks and head; what the lower blocks give is computed once for each claim."""
    lm = untrained(config.seed)
    [stack] = lm.stacks
    tokens = [
        tokenize(lm, example.prompt, example.target_true or "")
        for examples in claims(data_folder, "train").values()
        for example in examples
    ]
    trunk = Trunk(lm, lm.layers(range(-TRAINED_BLOCKS, 0)))
    cache = TrunkCache(lm, trunk, gigabytes=4.0)
    parameters = trained_parameters(lm)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for block in (*stack.blocks[-TRAINED_BLOCKS:], lm.model.get_submodule("dropout")):
        block.train()

    def loss(indices: list[int]) -> torch.Tensor:
        texts = [tokens[index] for index in indices]
        batch = collate(lm, texts)
        return cross_entropy(trunk.logits(batch, cache.hidden(texts)), batch.targets)

    fit(parameters, loss, [len(text.ids) for text in tokens], config, folder, "fact-checker")
    lm.model.eval().requires_grad_(False)
    return lm


def share_right(lm: LanguageModel, examples: Sequence[EditExample]) -> float:
    """Share of claims whose verdict the model gives."""
    return sum(knows(lm, [(e.prompt, e.target_true or "") for e in examples])) / len(examples)


def figures(lm: LanguageModel, data_folder: Path) -> dict[str, Any]:
    """Accuracy on the dev split of each file."""
    return {
        f"{name}, dev": {"accuracy": round(share_right(lm, examples), 4), "n": len(examples)}
        for name, examples in claims(data_folder, "dev").items()
    }
