"""Evaluation: many edits, each made alone; texts of several run together, under their own edit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from workbench.compare import generate_texts
from workbench.corpus import SENTENCES
from workbench.data import EditExample, Statement
from workbench.editors import Editor, EditRequest
from workbench.encoding import Tokens, collate, passes, tokenize, tokenize_text
from workbench.metrics import EditorScores, EditScores, begins_with, exact, mean_or_none
from workbench.models import LanguageModel
from workbench.overlay import overlay
from workbench.training import kl
from workbench.updates import Update, stack_sequences
from workbench.views import Trunk, target_logits


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
    while len(scores.edits) < len(examples):
        for found in judge.score(examples[len(scores.edits) :]):
            scores.edits.append(found)
            if on_edit:
                on_edit(found)
    return scores


@torch.no_grad()
def knows(lm: LanguageModel, asked: Sequence[tuple[str, str]]) -> list[bool]:
    """Whether the model gives each prompt's answer exactly, by greedy decoding.

    Greedy decoding gives an answer exactly when each of its tokens (of an encoder-decoder's, the
    end after them too) is the most likely one after those before it: no text need be generated.

    Args:
        lm: The model, under whatever overlay is live.
        asked: Prompts with their answers; a classifier's are its labels.
    """
    right: list[bool] = []
    for start in range(0, len(asked), _ASKED):
        tokens = [tokenize(lm, *pair) for pair in asked[start : start + _ASKED]]
        found = {}
        for places in passes(lm, tokens):
            batch = collate(lm, [tokens[place] for place in places])
            found |= zip(places, exact(target_logits(lm, batch), batch).tolist(), strict=True)
        right += [found[place] == 1 for place in range(len(tokens))]
    return right


@dataclass(frozen=True)
class _Look:
    """A text that an edit is judged by, and what it is there for.

    Near are the neighbours with their own answers, rivals the same with the edit's target.
    """

    edit: int
    kind: Literal["wanted", "near", "rival", "far"]
    text: Tokens

    @property
    def read(self) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """What the model reads: answers of one token to the same prompt share it."""
        return self.edit, self.text.ids, self.text.targets[:-1]


@dataclass(frozen=True)
class _Seen:
    """What a text's targets showed, averaged over them; pairs are before and after."""

    exact: float
    kept: float
    divergence: float
    loss: tuple[float, float]
    accuracy: tuple[float, float]
    tokens: int

    @classmethod
    def of(cls, base: Tensor, edited: Tensor, targets: Tensor) -> _Seen:
        """Compare logits at a text's targets, `(n, vocabulary)`."""
        before, after = base.argmax(-1), edited.argmax(-1)
        return cls(
            exact=float((after == targets).all()),
            kept=(before == after).float().mean().item(),
            divergence=kl(base, edited).mean().item(),
            loss=(_loss(base, targets), _loss(edited, targets)),
            accuracy=tuple((t == targets).float().mean().item() for t in (before, after)),  # type: ignore[arg-type]
            tokens=len(targets),
        )


_TEXT = 8  # tokens of an unrelated text from which on it has a perplexity worth the name
# Most edits judged in one round, and most numbers that their texts' copies of them may hold.
_EDITS, _NUMBERS = 8, 2**26
_ASKED = 512  # prompts sorted by length at a time


class _Judge:
    def __init__(self, editor: Editor, config: EvaluationConfig, texts: Sequence[str]) -> None:
        self.editor, self.config, self.lm, self.texts = editor, config, editor.lm, texts
        self.trunk = Trunk(self.lm, editor.layers)

    def score(self, examples: Sequence[EditExample]) -> list[EditScores]:
        """Scores of the first examples: as many as are fit for one round."""
        looks: list[_Look] = []
        updates: list[Update] = []
        found: list[EditScores] = []
        for edit, example in enumerate(examples[:_EDITS]):
            start = time.perf_counter()
            update = self.editor.propose([EditRequest(example.prompt, example.target)]).update
            found.append(EditScores(edit_success=0.0, seconds=time.perf_counter() - start))
            updates.append(update)
            looks += self._looks(edit, example)
            if update.numbers() * len(looks) > _NUMBERS:  # each text has a copy of its edit
                break
        seen = self._see(looks, updates)
        for edit, (scores, example) in enumerate(zip(found, examples, strict=False)):
            mine: dict[str, list[_Seen]] = {}
            for look, shown in zip(looks, seen, strict=True):
                if look.edit == edit:
                    mine.setdefault(look.kind, []).append(shown)
            _fill(scores, example, mine)
            if self.config.generate:
                with overlay(self.lm.model, updates[edit]):
                    length = len(tokenize(self.lm, example.prompt, example.target).targets)
                    text = generate_texts(self.lm, [example.prompt], length + 2)[0]
                scores.generated_success = float(begins_with(text, example.target))
        return found

    def _looks(self, edit: int, example: EditExample) -> Iterator[_Look]:
        config, lm = self.config, self.lm
        for prompt in (example.prompt, *example.paraphrases[:1]):
            yield _Look(edit, "wanted", tokenize(lm, prompt, example.target))
        for statement, answer in _answered(_neighbors(example), config.neighbors):
            yield _Look(edit, "near", tokenize(lm, statement.prompt, answer))
            yield _Look(edit, "rival", tokenize(lm, statement.prompt, example.target))
        own = _answered(example.unrelated, config.unrelated)
        for statement, answer in own:
            yield _Look(edit, "far", tokenize(lm, statement.prompt, answer))
        # A plain text has no label for a classifier to keep.
        for place in range(0 if lm.kind == "classifier" else config.unrelated - len(own)):
            key = sha256(f"{example.prompt}:{place}".encode()).digest()
            text = self.texts[int.from_bytes(key[:8]) % len(self.texts)]
            yield _Look(edit, "far", tokenize_text(lm, text, config.text_tokens))

    @torch.no_grad()
    def _see(self, looks: Sequence[_Look], updates: Sequence[Update]) -> list[_Seen]:
        shared: dict[object, list[int]] = {}
        for index, look in enumerate(looks):
            shared.setdefault(look.read, []).append(index)
        readings = list(shared.values())
        seen: dict[int, _Seen] = {}
        for places in passes(self.lm, [looks[indices[0]].text for indices in readings]):
            group = [readings[place] for place in places]
            heads = [looks[indices[0]] for indices in group]
            batch = collate(self.lm, [look.text for look in heads])
            hidden = self.trunk.hidden(batch)
            base = self.trunk.logits(batch, hidden)
            if len(updates) == 1:
                update = updates[0]
            else:
                update = stack_sequences([updates[look.edit] for look in heads])
            with overlay(self.lm.model, update):
                edited = self.trunk.logits(batch, hidden)
            counts = [len(look.text.targets) for look in heads]
            for before, after, indices in zip(
                base.split(counts), edited.split(counts), group, strict=True
            ):
                for index in indices:
                    targets = torch.tensor(looks[index].text.targets, device=before.device)
                    seen[index] = _Seen.of(before, after, targets)
        return [seen[index] for index in range(len(looks))]


def _fill(scores: EditScores, example: EditExample, seen: Mapping[str, Sequence[_Seen]]) -> None:
    """Sum up what one edit's texts have shown."""
    wanted, near, far = (seen.get(kind, ()) for kind in ("wanted", "near", "far"))
    scores.edit_success = wanted[0].exact
    scores.paraphrase_success = wanted[1].exact if len(wanted) > 1 else None
    scores.neighborhood_kept = mean_or_none(s.kept for s in near)
    scores.kl_neighborhood = mean_or_none(s.divergence for s in near)
    scores.unrelated_kept = mean_or_none(s.kept for s in far)
    scores.drawdown = mean_or_none(s.accuracy[0] - s.accuracy[1] for s in far)
    scores.drawdown_perplexity = mean_or_none(
        math.exp(s.loss[1]) - math.exp(s.loss[0]) for s in far if s.tokens >= _TEXT
    )
    # Where the neighbour's own answer is the edit's target, neither can be preferred.
    rivals = [
        (true.loss, new.loss)
        for true, new, (_, answer) in zip(
            near, seen.get("rival", ()), _answered(_neighbors(example), len(near)), strict=True
        )
        if answer != example.target
    ]
    before, after = ([float(true[i] < new[i]) for true, new in rivals] for i in (0, 1))
    scores.neighborhood_score_base = mean_or_none(before)
    scores.neighborhood_score = mean_or_none(after)


def _neighbors(example: EditExample) -> tuple[Statement, ...]:
    return (*example.neighbors, *example.same_subject)


def _answered(statements: Sequence[Statement], most: int) -> list[tuple[Statement, str]]:
    """The first statements that have an answer, with it."""
    return [(s, s.answer) for s in statements if s.answer][:most]


def _loss(logits: Tensor, targets: Tensor) -> float:
    """Mean negative log-likelihood, nats a token."""
    return cross_entropy(logits.float(), targets).item()
