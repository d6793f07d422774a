"""What the benchmarks measure: a model, its editors, and examples; the default ones, or tiny."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from workbench import LanguageModel, Mend, MendConfig, Workbench, open_model
from workbench.corpus import SENTENCES
from workbench.data import EditExample, read
from workbench.editors import open_editor
from workbench.training import EditTexts, MetaStep, TextSampler, TrainingConfig

PROMPT, TARGET = "The capital of France is", "Lyon"


@dataclass(frozen=True)
class Setting:
    """A model and what is done with it.

    Args:
        lm: The model.
        editor: Whose edits are timed, as it makes them by default.
        linear: One whose edits are LoRA adapters.
        examples: Edits to make, to train on, to evaluate.
        ranks: A small and a large rank of editors in training.
        batches: Edits in a training step.
        live: Numbers of live edits.
        tokens: Generated for each prompt.
    """

    lm: LanguageModel
    editor: Mend
    linear: Mend
    examples: Sequence[EditExample]
    ranks: tuple[int, int] = (128, 1920)
    batches: tuple[int, ...] = (1, 16, 64)
    live: tuple[int, ...] = (0, 1, 10, 100)
    tokens: int = 16

    @classmethod
    def default(cls, device: str = "auto") -> Setting:
        """The embedded model with the editors that come along."""
        lm = open_model(device=device, progress=False)
        editor, linear = open_editor("mend", lm), open_editor("mend-linear", lm)
        assert isinstance(editor, Mend)
        assert isinstance(linear, Mend)
        return cls(lm, editor, linear, facts(128))

    @property
    def device(self) -> torch.device:
        return self.lm.device

    def bench(self, editor: Mend | None = None) -> Workbench:
        """A workbench of its own."""
        return Workbench(self.lm, editor or self.editor)

    def batch(self, size: int) -> list[EditTexts]:
        """The first edits of training; a larger batch begins with the smaller one's."""
        return texts_of(self.lm, self.examples, TrainingConfig(batch=size))

    def untrained(self, rank: int, late: bool = False) -> Mend:
        """An editor at the start of training, of the default editor's layers or the paper's."""
        blocks = sorted({f"{layer.stack}:{layer.block}" for layer in self.editor.layers})
        return Mend(self.lm, MendConfig(rank=rank, blocks=None if late else blocks)).train()


def facts(count: int) -> list[EditExample]:
    """Edits of the built-in corpus."""
    return list(read("facts", split="train", limit=count))


def texts_of(
    lm: LanguageModel, examples: Sequence[EditExample], config: TrainingConfig
) -> list[EditTexts]:
    """A training batch as tokens."""
    return TextSampler(lm, examples, SENTENCES, config).batch(0)


class Step:
    """One step of training: losses, gradient, clipping, Adam, as the trainer does them.

    Adam's learning rates are 0, so that every step meets the same editor.

    Args:
        editor: What is trained.
        edits: The batch.
        cached: Whether what is constant for a text is kept.
        at_once: Edits that are live together when their texts are scored.
    """

    def __init__(
        self, editor: Mend, edits: Sequence[EditTexts], cached: bool = True, at_once: int = 1
    ) -> None:
        self.editor, self.edits, self.at_once = editor, edits, at_once
        self.config = TrainingConfig(batch=len(edits))
        self.meta = MetaStep(editor, self.config, cached)
        self.optimizer = torch.optim.Adam(editor.parameters(), lr=0.0, fused=True)

    def __call__(self) -> float:
        """The batch's total loss."""
        losses = self.meta.losses(self.edits, at_once=self.at_once)
        torch.nn.utils.clip_grad_norm_(self.editor.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return losses.total

    def loss(self) -> float:
        """The same without a step, the running statistics as they are."""
        self.editor.eval()
        total = self.meta.losses(self.edits, backward=False, at_once=self.at_once).total
        self.editor.train()
        return total


def gather_statistics(editor: Mend, edits: Sequence[EditTexts]) -> Mend:
    """Let an editor of random weights see some edits, so that it can make its own."""
    editor.train()
    MetaStep(editor, TrainingConfig(batch=len(edits)), cached=False).losses(edits, backward=False)
    editor.eval()
    return editor
