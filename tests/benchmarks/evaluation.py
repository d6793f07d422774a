"""How many edits a second are made and judged."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.func import functional_call

from tests.benchmarks.setting import Setting
from tests.benchmarks.timing import Figures, Makers, in_turn, made
from workbench import LanguageModel
from workbench.corpus import SENTENCES
from workbench.data import EditExample
from workbench.editors.proposals import EditRequest
from workbench.encoding import Tokens, collate, tokenize, tokenize_text
from workbench.evaluate import EvaluationConfig, evaluate

_EDITS = 8


def makers(setting: Setting) -> Makers:
    """Some edits, each alone, their texts computed anew; the same without the workbench."""
    examples = setting.examples[:_EDITS]
    return {
        "in_rounds": lambda: lambda: evaluate(setting.editor, examples),
        "one_round": lambda: lambda: evaluate(setting.linear, examples),
        "reference": lambda: lambda: [judged_densely(setting, example) for example in examples],
    }


def evaluation(setting: Setting, rounds: int) -> Figures:
    """Edits a second by the default editor, by one of a single round, and by that one as the
    published code judges it."""
    rivals = made(makers(setting))
    times, edits = in_turn(setting.device, rounds, rivals), len(setting.examples[:_EDITS])
    return {
        "ms": times.milliseconds(),
        "edits_per_second": {name: times.rate(name, edits) for name in rivals},
        "one_round_over_reference": times.ratio("reference", "one_round"),
    }


@torch.no_grad()
def judged_densely(setting: Setting, example: EditExample) -> list[torch.Tensor]:
    """One edit's weights formed densely, then each text by itself, before and after, logits at all
    positions, as the published code does it.

    Returns:
        Whether each text's most likely tokens are the targets, before and after, `(2, targets)`.
    """
    lm, editor = setting.lm, setting.linear
    update = editor.propose([EditRequest(example.prompt, example.target)]).update
    weights = {}
    for name, change in update.dense().items():
        weight = lm.model.get_parameter(f"{name}.weight")
        weights[f"{name}.weight"] = weight + change.to(weight.dtype)
    found = []
    for text in _texts(lm, example):
        batch, looks = collate(lm, [text]), []
        for changed in ({}, weights):
            output = functional_call(lm.model, changed, (), {**batch.inputs, "use_cache": False})
            looks.append(output.logits[batch.rows, batch.columns].argmax(-1) == batch.targets)
        found.append(torch.stack(looks))
    return found


def _texts(lm: LanguageModel, example: EditExample) -> Iterator[Tokens]:
    """As many of each kind as `evaluate` looks at."""
    config = EvaluationConfig()
    for prompt in (example.prompt, *example.paraphrases[:1]):
        yield tokenize(lm, prompt, example.target)
    for near in example.neighbors[: config.neighbors]:
        for answer in (near.answer or example.target, example.target):
            yield tokenize(lm, near.prompt, answer)
    for text in SENTENCES[: config.unrelated]:
        yield tokenize_text(lm, text, config.text_tokens)
