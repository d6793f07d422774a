"""Evaluation: many edits, one at a time, each undone before the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from workbench.compare import generate_texts
from workbench.corpus import SENTENCES
from workbench.data import EditExample
from workbench.editors import Editor, EditRequest
from workbench.encoding import (
    Batch,
    Tokens,
    collate,
    per_sequence_mean,
    sequence_nll,
    tokenize,
    tokenize_text,
)
from workbench.metrics import (
    EditorScores,
    EditScores,
    accuracy,
    begins_with,
    exact,
    kept,
    mean_or_none,
)
from workbench.overlay import overlay
from workbench.training import kl
from workbench.updates import Update
from workbench.views import Trunk


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured for each edit.

    Args:
        neighbors: Most neighbours looked at.
        unrelated: Unrelated texts looked at: the example's own, filled up from the given texts.
        text_tokens: Tokens read of an unrelated text; every position counts.
        generate: Also generate from the prompt (free-running success).
    """

    neighbors: int = 10
    unrelated: int = 2
    text_tokens: int = 24
    generate: bool = False


def evaluate(
    editor: Editor,
    examples: Sequence[EditExample],
    config: EvaluationConfig | None = None,
    *,
    texts: Sequence[str] = SENTENCES,
    on_edit: Callable[[EditScores], object] | None = None,
) -> EditorScores:
    """Make each example's edit alone and measure what it changed.

    Args:
        editor: Makes the updates.
        examples: What to edit.
        config: What is measured; None: the defaults.
        texts: Unrelated texts, for examples that bring too few of their own.
        on_edit: Called with each edit's scores.
    """
    judge = _Judge(editor, config or EvaluationConfig(), texts)
    scores = EditorScores()
    for example in examples:
        scores.edits.append(judge.score(example))
        if on_edit:
            on_edit(scores.edits[-1])
    return scores


class _Judge:
    def __init__(self, editor: Editor, config: EvaluationConfig, texts: Sequence[str]) -> None:
        self.editor, self.config, self.lm, self.texts = editor, config, editor.lm, texts
        self.trunk = Trunk(self.lm, editor.layers)

    def score(self, example: EditExample) -> EditScores:
        start = time.perf_counter()
        update = self.editor.propose([EditRequest(example.prompt, example.target)]).update
        seconds = time.perf_counter() - start
        scores = self._wanted(example, update)
        scores.seconds = seconds
        self._neighborhood(example, update, scores)
        self._unrelated(example, update, scores)
        if self.config.generate:
            with overlay(self.lm.model, update):
                length = len(tokenize(self.lm, example.prompt, example.target).targets)
                text = generate_texts(self.lm, [example.prompt], length + 2)[0]
            scores.generated_success = float(begins_with(text, example.target))
        return scores

    def _wanted(self, example: EditExample, update: Update) -> EditScores:
        prompts = [example.prompt, *example.paraphrases[:1]]
        batch = collate(self.lm, [tokenize(self.lm, p, example.target) for p in prompts])
        success = exact(self._edited(batch, self.trunk.hidden(batch), update), batch).tolist()
        return EditScores(success[0], success[1] if len(success) > 1 else None)

    def _neighborhood(self, example: EditExample, update: Update, scores: EditScores) -> None:
        near = [s for s in (*example.neighbors, *example.same_subject) if s.answer]
        near = near[: self.config.neighbors]
        if not near:
            return
        true = [tokenize(self.lm, s.prompt, s.answer or "") for s in near]
        new = [tokenize(self.lm, s.prompt, example.target) for s in near]
        base, edited, batch = self._both([*true, *new], update)
        count = sum(len(tokens.targets) for tokens in true)
        right = _first(batch, len(true), count)
        changed, unchanged = edited[:count], base[:count]
        scores.neighborhood_kept = kept(unchanged, changed, right).mean().item()
        scores.kl_neighborhood = per_sequence_mean(kl(unchanged, changed), right).mean().item()
        # Where the neighbour's own answer is the edit's target, neither can be preferred.
        distinct = [i for i, s in enumerate(near) if s.answer != example.target]
        for name, logits in (("", edited), ("_base", base)):
            nll = sequence_nll(logits, batch)
            wins = [float(nll[i] < nll[len(true) + i]) for i in distinct]
            setattr(scores, f"neighborhood_score{name}", mean_or_none(wins))

    def _unrelated(self, example: EditExample, update: Update, scores: EditScores) -> None:
        own = [s for s in example.unrelated if s.answer][: self.config.unrelated]
        tokens = [tokenize(self.lm, s.prompt, s.answer or "") for s in own]
        # A plain text has no label for a classifier to keep.
        lacking = 0 if self.lm.kind == "classifier" else self.config.unrelated - len(own)
        for place in range(lacking):
            key = sha256(f"{example.prompt}:{place}".encode()).digest()
            text = self.texts[int.from_bytes(key[:8]) % len(self.texts)]
            tokens.append(tokenize_text(self.lm, text, self.config.text_tokens))
        if not tokens:
            return
        base, edited, batch = self._both(tokens, update)
        scores.unrelated_kept = kept(base, edited, batch).mean().item()
        scores.drawdown = (accuracy(base, batch) - accuracy(edited, batch)).mean().item()

    def _both(self, texts: Sequence[Tokens], update: Update) -> tuple[Tensor, Tensor, Batch]:
        """Logits at the texts' targets before and after, and where they belong."""
        # Answers of one token to the same prompt read the same input: it runs once.
        shared = {(text.ids, text.targets[:-1]): text for text in texts}
        batch = collate(self.lm, list(shared.values()))
        hidden = self.trunk.hidden(batch)
        with torch.no_grad():
            base = self.trunk.logits(batch, hidden)
        edited = self._edited(batch, hidden, update)
        each = torch.arange(len(base), device=base.device)
        spans = dict(
            zip(shared, each.split([len(t.targets) for t in shared.values()]), strict=True)
        )
        places = torch.cat([spans[text.ids, text.targets[:-1]] for text in texts])
        return base[places], edited[places], collate(self.lm, texts)

    def _edited(self, batch: Batch, hidden: Tensor | None, update: Update) -> Tensor:
        with overlay(self.lm.model, update), torch.no_grad():
            return self.trunk.logits(batch, hidden)


def _first(batch: Batch, sequences: int, count: int) -> Batch:
    """The first sequences of a batch, which hold its first `count` targets."""
    inputs = {name: tensor[:sequences] for name, tensor in batch.inputs.items()}
    return Batch(inputs, batch.rows[:count], batch.columns[:count], batch.targets[:count])
