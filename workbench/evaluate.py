"""Evaluation: many edits, alone or together; their texts share batches, each under its edit."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from workbench import parallel
from workbench.aggregate import Aggregation, propose_together
from workbench.compare import generate_texts
from workbench.corpus import SENTENCES
from workbench.crossing import Crossing
from workbench.data import EditExample, Statement
from workbench.divergence import kl
from workbench.editors import Editor, EditRequest, TrainableEditor
from workbench.encoding import Tokens, collate, first_token, passes, tokenize, tokenize_text
from workbench.errors import EditError
from workbench.layers import EditableLayer
from workbench.metrics import EditorScores, EditScores, begins_with, exact, gathered, mean_or_none
from workbench.models import LanguageModel
from workbench.overlay import overlay
from workbench.stacking import stack_sequences
from workbench.updates import Update
from workbench.views import Trunk, TrunkCache, target_logits


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured for each edit.

    Args:
        neighbors: Most neighbours looked at.
        crossed: Prompts crossed with other examples looked at, of each of their two kinds; see
            `crossing.Crossing`.
        unrelated: Unrelated texts looked at: the example's own, filled up from the given texts.
        text_tokens: Tokens read of an unrelated text; every position counts.
        generate: Also generate from the prompt (free-running success).
        at_once: Edits that are live together when each of them is measured; left-over examples
            make a smaller set.
        aggregation: How edits that are live together are made one update; see
            `aggregate.propose_together`.
        damping: Of its least squares.
    """

    neighbors: int = 10
    crossed: int = 0
    unrelated: int = 2
    text_tokens: int = 24
    generate: bool = False
    at_once: int = 1
    aggregation: Aggregation = "sum"
    damping: float = 0.003

    def __post_init__(self) -> None:
        if self.at_once < 1:
            raise EditError(f"at_once is a number of edits, at least 1; got {self.at_once}.")


class Baselines:
    """What unedited models make of the texts that edits are judged by: computed once, then kept.

    Args:
        gigabytes: Memory for each model and height at which edits begin.
    """

    def __init__(self, gigabytes: float = 1.0) -> None:
        self._gigabytes = gigabytes
        self._caches: dict[tuple[LanguageModel, int], TrunkCache] = {}

    def of(self, lm: LanguageModel, layers: Sequence[EditableLayer]) -> TrunkCache:
        """The cache for edits of these layers."""
        trunk = Trunk(lm, layers)
        return self._caches.setdefault((lm, trunk.start), TrunkCache(lm, trunk, self._gigabytes))


def evaluate(
    editor: Editor,
    examples: Sequence[EditExample],
    config: EvaluationConfig | None = None,
    *,
    texts: Sequence[str] = SENTENCES,
    on_edit: Callable[[EditScores], object] | None = None,
    baselines: Baselines | None = None,
) -> EditorScores:
    """Make each example's edit, alone or with others, and measure what it changed.

    Before the edit is the model that the editor edits: for ENN its trained base, whose own losses
    against the original are given apart (`base_drawdown`).

    Of several processes (`parallel.join`) each takes its share of the edits; all get all scores.

    Args:
        editor: Makes the updates.
        examples: What to edit.
        config: What is measured; None: the defaults.
        texts: Unrelated texts, for examples that bring too few of their own.
        on_edit: Called with each edit's scores, in the process that made it.
        baselines: Kept from one editor to the next, so that what the model itself makes of the
            texts is computed once; None: kept for this call.
    """
    config = config or EvaluationConfig()
    crossing = Crossing(examples) if config.crossed else None
    judge = _Judge(editor, config, texts, baselines or Baselines(), crossing)
    # Rounds are the same however many processes there are: so is what shares a batch.
    size = max(config.at_once, _EDITS // config.at_once * config.at_once)
    scores: dict[int, EditScores] = {}
    for first in range(parallel.place() * size, len(examples), parallel.count() * size):
        end = min(first + size, len(examples))
        while first < end:
            for found in judge.score(examples[first:end]):
                scores[first] = found
                first += 1
                if on_edit:
                    on_edit(found)
    return EditorScores(gathered(scores, len(examples)))


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

    Near are the neighbours with their own answers, rivals the same with the edit's target; what is
    crossed has another subject or asks another relation.
    """

    edit: int
    kind: Literal["wanted", "near", "rival", "subject", "relation", "far"]
    text: Tokens

    @property
    def read(self) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """What the model reads: answers of one token to the same prompt share it."""
        return self.edit, self.text.ids, self.text.targets[:-1]


@dataclass(frozen=True)
class _Seen:
    """What a text's targets showed, averaged over them; pairs are before and after.

    The original's accuracy is that before the editor's own training, where that changes the model.
    """

    exact: float
    kept: float
    divergence: float
    loss: tuple[float, float]
    accuracy: tuple[float, float]
    original: float | None
    tokens: int

    @classmethod
    def of(
        cls, base: Tensor, edited: Tensor, targets: Tensor, original: Tensor | None = None
    ) -> _Seen:
        """Compare logits at a text's targets, `(n, vocabulary)`."""
        before, after = base.argmax(-1), edited.argmax(-1)
        return cls(
            exact=float((after == targets).all()),
            kept=(before == after).float().mean().item(),
            divergence=kl(base, edited).mean().item(),
            loss=(_loss(base, targets), _loss(edited, targets)),
            accuracy=(_accuracy(base, targets), _accuracy(edited, targets)),
            original=None if original is None else _accuracy(original, targets),
            tokens=len(targets),
        )


_TEXT = 8  # tokens of an unrelated text from which on it has a perplexity worth the name
# Most edits judged in one round unless more are live together, most numbers that their texts'
# copies of them may hold, and most texts whose logits are held at a time.
_EDITS, _NUMBERS, _TEXTS = 8, 2**26, 256
_ASKED = 512  # prompts sorted by length at a time


class _Judge:
    def __init__(
        self,
        editor: Editor,
        config: EvaluationConfig,
        texts: Sequence[str],
        baselines: Baselines,
        crossing: Crossing | None,
    ) -> None:
        self.crossing = crossing
        self.editor, self.config, self.lm, self.texts = editor, config, editor.lm, texts
        self.base, self.original = baselines.of(self.lm, editor.layers), None
        if isinstance(editor, TrainableEditor) and editor.trains_base:
            self.original = baselines.of(editor.original, editor.layers)

    def score(self, examples: Sequence[EditExample]) -> list[EditScores]:
        """Scores of the first examples: as many as memory allows in one round."""
        config, size = self.config, self.config.at_once
        looks: list[_Look] = []
        updates: list[Update] = []
        found: list[EditScores] = []
        for first in range(0, len(examples), size):
            together = examples[first : first + size]
            requests = [EditRequest(e.prompt, e.target, e.subject) for e in together]
            start = time.perf_counter()
            made = propose_together(
                self.editor, requests, config.aggregation, config.damping
            ).update
            seconds = (time.perf_counter() - start) / len(together)
            updates.append(made)
            for example in together:
                looks += self._looks(len(found), example)
                found.append(EditScores(edit_success=0.0, seconds=seconds))
            if made.numbers() * len(looks) > _NUMBERS:  # each text has a copy of its edit
                break
        seen = self._see(looks, updates)
        for edit, (scores, example) in enumerate(zip(found, examples, strict=False)):
            mine: dict[str, list[_Seen]] = {}
            for look, shown in zip(looks, seen, strict=True):
                if look.edit == edit:
                    mine.setdefault(look.kind, []).append(shown)
            _fill(scores, example, mine)
            if config.generate:
                with overlay(self.lm.model, updates[edit // size]):
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
        if self.crossing:
            chooser = random.Random(example.prompt)
            for _ in range(config.crossed):
                if prompt := self.crossing.other_subject(example, chooser):
                    yield _Look(edit, "subject", first_token(lm, prompt, example.target))
                if prompt := self.crossing.other_relation(example, chooser):
                    yield _Look(edit, "relation", first_token(lm, prompt, example.target))
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
        for first in range(0, len(readings), _TEXTS):
            self._see_some(readings[first : first + _TEXTS], looks, updates, seen)
        return [seen[index] for index in range(len(looks))]

    def _see_some(
        self,
        readings: Sequence[Sequence[int]],
        looks: Sequence[_Look],
        updates: Sequence[Update],
        seen: dict[int, _Seen],
    ) -> None:
        for places in passes(self.lm, [looks[indices[0]].text for indices in readings]):
            group = [readings[place] for place in places]
            heads = [looks[indices[0]] for indices in group]
            texts = [look.text for look in heads]
            batch, hidden = collate(self.lm, texts), self.base.hidden(texts)
            base = self.base.logits(texts)
            update = updates[0]
            if len(updates) > 1:
                size = self.config.at_once
                update = stack_sequences([updates[look.edit // size] for look in heads])
            with overlay(self.lm.model, update):
                edited = self.base.trunk.logits(batch, hidden)
            counts = [len(text.targets) for text in texts]
            original = [None] * len(counts)
            if self.original:
                original = self.original.logits(texts).split(counts)
            for before, after, raw, indices in zip(
                base.split(counts), edited.split(counts), original, group, strict=True
            ):
                for index in indices:
                    targets = torch.tensor(looks[index].text.targets, device=before.device)
                    seen[index] = _Seen.of(before, after, targets, raw)


def _fill(scores: EditScores, example: EditExample, seen: Mapping[str, Sequence[_Seen]]) -> None:
    """Sum up what one edit's texts have shown."""
    wanted, near, far = (seen.get(kind, ()) for kind in ("wanted", "near", "far"))
    scores.edit_success = wanted[0].exact
    scores.paraphrase_success = wanted[1].exact if len(wanted) > 1 else None
    scores.neighborhood_kept = mean_or_none(s.kept for s in near)
    scores.kl_neighborhood = mean_or_none(s.divergence for s in near)
    scores.other_subjects_kept = mean_or_none(s.kept for s in seen.get("subject", ()))
    scores.other_relations_kept = mean_or_none(s.kept for s in seen.get("relation", ()))
    scores.unrelated_kept = mean_or_none(s.kept for s in far)
    scores.drawdown = mean_or_none(s.accuracy[0] - s.accuracy[1] for s in far)
    scores.base_drawdown = mean_or_none(
        s.original - s.accuracy[0] for s in far if s.original is not None
    )
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


def _accuracy(logits: Tensor, targets: Tensor) -> float:
    return (logits.argmax(-1) == targets).float().mean().item()


def _loss(logits: Tensor, targets: Tensor) -> float:
    """Mean negative log-likelihood, nats a token."""
    return cross_entropy(logits.float(), targets).item()
