"""Draws the batches of meta-training: which edits, which of their equivalents and neighbours."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from networkx.utils import UnionFind

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
        at_risk = len(locality)
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
            at_risk,
        )


class Crossing:
    """Hard negatives from pairs of edits: one's wording, the other's subject.

    A wording is a prompt without its subject. Where a data set names no relations, wordings that
    paraphrase one another are of one relation: another wording of the edit's own relation would
    teach it not to follow paraphrases.

    Args:
        examples: Those that name a subject and hold it in their prompt can be crossed, within
            one format of data.
    """

    def __init__(self, examples: Sequence[EditExample]) -> None:
        self._alike = UnionFind()
        for example in examples:
            if not example.relation and _wording(example, example.prompt):
                known = (_wording(example, p) for p in (example.prompt, *example.paraphrases))
                self._alike.union(*filter(None, known))
        self._wordings: dict[str, list[tuple[str, str]]] = {}
        self._subjects: dict[tuple[str, str], list[str]] = {}
        for example in examples:
            if relation := self._relation(example):
                form, subject = _format(example), example.subject or ""
                self._subjects.setdefault((form, relation), []).append(subject)
                mine = self._wordings.setdefault(form, [])
                mine.append((relation, example.prompt.replace(subject, GAP, 1)))
                if not example.relation:
                    others = (_wording(example, s.prompt) for s in example.same_subject)
                    mine += [(self._alike[other], other) for other in others if other]

    def draw(self, example: EditExample, count: int, chooser: random.Random) -> list[str]:
        """Prompts that an edit must not move, by turns: another subject of the same relation, and
        the same subject in another relation.

        Args:
            example: The edit.
            count: At most this many; fewer where others offer none.
            chooser: Draws the others, and which kind comes first.
        """
        relation, form, subject = self._relation(example), _format(example), example.subject or ""
        if not relation or form not in self._wordings:
            return []
        first, found = chooser.randrange(2), []
        for turn in range(first, first + count):
            if turn % 2:
                other, wording = chooser.choice(self._wordings[form])
                if other != relation:
                    found.append(wording.replace(GAP, subject, 1))
            else:
                other = chooser.choice(self._subjects.get((form, relation), [subject]))
                if other != subject:
                    found.append(example.prompt.replace(subject, other, 1))
        return found

    def _relation(self, example: EditExample) -> str | None:
        """What the edit is of its subject; None where the prompt does not hold the subject."""
        wording = _wording(example, example.prompt)
        return wording and (example.relation or self._alike[wording])


GAP = "{}"  # where a wording's subject goes


def _wording(example: EditExample, prompt: str) -> str | None:
    """A prompt without the example's subject; None where it does not hold it."""
    subject = example.subject
    return prompt.replace(subject, GAP, 1) if subject and subject in prompt else None


def _format(example: EditExample) -> str:
    return example.source.partition(":")[0]


def _first(lm: LanguageModel, prompt: str, target: str) -> Tokens:
    """A text with the target's first token alone: later ones would follow the edit's own words."""
    text = tokenize(lm, prompt, target)
    cut = len(text.targets) - 1 if lm.kind == "causal" else 0
    return Tokens(text.ids[: len(text.ids) - cut], text.targets[:1])


def _statement(lm: LanguageModel, statement: Statement) -> Tokens:
    return tokenize(lm, statement.prompt, statement.answer or "")
