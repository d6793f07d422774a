"""Draws the batches of meta-training: which edits, which of their equivalents and neighbours."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from workbench.data import EditExample, Statement
from workbench.encoding import Tokens, tokenize, tokenize_text
from workbench.errors import EditError, EditorError
from workbench.models import LanguageModel
from workbench.training.config import TrainingConfig
from workbench.training.step import EditTexts


class TextSampler:
    """Draws each step's batch: which edits, which of their equivalents and neighbours.

    Args:
        lm: For its tokenizer.
        examples: Training examples.
        texts: Unrelated texts.
        config: How many of each.
    """

    def __init__(
        self,
        lm: LanguageModel,
        examples: Sequence[EditExample],
        texts: Sequence[str],
        config: TrainingConfig,
    ) -> None:
        if not examples:
            raise EditorError("There are no training examples. Check the data's path and split.")
        self._lm, self._examples, self._texts, self._config = lm, examples, texts, config
        self._crossing = Crossing(examples) if config.crossed else None

    def batch(self, step: int) -> list[EditTexts]:
        """The edits of one step; each epoch goes through all examples in a new order."""
        size, n = self._config.batch, len(self._examples)
        chooser = random.Random(f"{self._config.seed}:{step}")
        return [self.texts(self._pick(step * size + k, n), chooser) for k in range(size)]

    def _pick(self, position: int, n: int) -> EditExample:
        # A random affine walk visits every example once an epoch, with no list to keep or save.
        epoch, place = divmod(position, n)
        chooser = random.Random(f"{self._config.seed}:epoch:{epoch}")
        start, stride = chooser.randrange(n), chooser.randrange(1, n + 1)
        while math.gcd(stride, n) != 1:
            stride += 1
        return self._examples[(start + place * stride) % n]

    def texts(self, example: EditExample, chooser: random.Random) -> EditTexts:
        """One example's texts, its equivalents and neighbours drawn by `chooser`."""
        try:
            return self._tokenized(example, chooser)
        except EditError as error:
            raise EditError(f"Training example {example.id!r}: {error}") from error

    def _tokenized(self, example: EditExample, chooser: random.Random) -> EditTexts:
        lm, config = self._lm, self._config
        others = list(example.paraphrases)
        chooser.shuffle(others)
        wordings = [*others[: max(1, config.equivalents - 1)], example.prompt]
        near = [s for s in (*example.neighbors, *example.same_subject) if s.answer]
        chooser.shuffle(near)
        far = [s for s in example.unrelated if s.answer]
        locality = [_statement(lm, s) for s in near[: config.neighbors]]
        if self._crossing:
            crossed = self._crossing.draw(example, config.crossed, chooser)
            locality += [_first(lm, prompt, example.target) for prompt in crossed]
        for _ in range(config.texts):
            if far and (not self._texts or chooser.random() < 0.5):
                locality.append(_statement(lm, chooser.choice(far)))
            elif self._texts:
                text = chooser.choice(self._texts)
                locality.append(tokenize_text(lm, text, config.text_tokens))
        return EditTexts(
            tokenize(lm, example.prompt, example.target),
            tuple(tokenize(lm, w, example.target) for w in wordings[: config.equivalents]),
            tuple(locality),
        )


class Crossing:
    """Hard negatives from pairs of edits: one's wording, the other's subject.

    A wording is a prompt without its subject. Where a data set names no relations, a wording is
    its own.

    Args:
        examples: Those that name a subject and hold it in their prompt can be crossed.
    """

    def __init__(self, examples: Sequence[EditExample]) -> None:
        self._sources: dict[str, list[EditExample]] = {}
        self._relations: dict[tuple[str, str], list[EditExample]] = {}
        for example in examples:
            if relation := _relation(example):
                self._sources.setdefault(example.source, []).append(example)
                self._relations.setdefault((example.source, relation), []).append(example)

    def draw(self, example: EditExample, count: int, chooser: random.Random) -> list[str]:
        """Prompts that an edit must not move, by turns: another subject of the same relation, and
        the same subject in another relation.

        Args:
            example: The edit.
            count: At most this many; fewer where others offer none.
            chooser: Draws the others, and which kind comes first.
        """
        relation, others = _relation(example), self._sources.get(example.source)
        if not relation or not others:
            return []
        alike = self._relations.get((example.source, relation), others)
        first, found = chooser.randrange(2), []
        for turn in range(first, first + count):
            other = turn % 2
            drawn = chooser.choice(others if other or len(alike) < 2 else alike)
            if other and _relation(drawn) != relation:
                found.append(_fill(drawn, example))
            elif not other and drawn.subject != example.subject:
                found.append(_fill(example, drawn))
        return found


def _relation(example: EditExample) -> str | None:
    """What the edit is of its subject; None where the prompt does not hold the subject."""
    if not example.subject or example.subject not in example.prompt:
        return None
    return example.relation or example.prompt.replace(example.subject, "{}", 1)


def _fill(wording: EditExample, subject: EditExample) -> str:
    return wording.prompt.replace(wording.subject or "", subject.subject or "", 1)


def _first(lm: LanguageModel, prompt: str, target: str) -> Tokens:
    """A text with the target's first token alone: later ones would follow the edit's own words."""
    text = tokenize(lm, prompt, target)
    cut = len(text.targets) - 1 if lm.kind == "causal" else 0
    return Tokens(text.ids[: len(text.ids) - cut], text.targets[:1])


def _statement(lm: LanguageModel, statement: Statement) -> Tokens:
    return tokenize(lm, statement.prompt, statement.answer or "")
