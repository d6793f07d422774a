"""Draws the batches of meta-training: which edits, which of their equivalents and neighbours."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from workbench.crossing import Crossing
from workbench.data import EditExample, Statement
from workbench.editors.scoping import about
from workbench.encoding import Tokens, first_token, tokenize, tokenize_text
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
        scoped: Whether the editor asks where an edit's subject stands.
    """

    def __init__(
        self,
        lm: LanguageModel,
        examples: Sequence[EditExample],
        texts: Sequence[str],
        config: TrainingConfig,
        scoped: bool = False,
    ) -> None:
        if not examples:
            raise EditorError("There are no training examples. Check the data's path and split.")
        self._lm, self._examples, self._texts, self._config = lm, examples, texts, config
        self._scoped = scoped
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
            locality += [first_token(lm, prompt, example.target) for prompt in crossed]
        at_risk = len(locality)
        for _ in range(config.texts):
            if far and (not self._texts or chooser.random() < 0.5):
                locality.append(_statement(lm, chooser.choice(far)))
            elif self._texts:
                text = chooser.choice(self._texts)
                locality.append(tokenize_text(lm, text, config.text_tokens))
        edit = tokenize(lm, example.prompt, example.target)
        return EditTexts(
            about(lm, edit, example.prompt, example.subject) if self._scoped else edit,
            tuple(tokenize(lm, w, example.target) for w in wordings[: config.equivalents]),
            tuple(locality),
            at_risk,
        )


def _statement(lm: LanguageModel, statement: Statement) -> Tokens:
    return tokenize(lm, statement.prompt, statement.answer or "")
