"""Hard negatives for an edit, crossed from other edits of the same data."""

from __future__ import annotations

import random
from collections.abc import Sequence

from workbench.data import EditExample

GAP = "{}"  # where a wording's subject goes


class Crossing:
    """Prompts that an edit must not move, from pairs of edits: one's wording, the other's subject.

    A wording is a prompt without its subject. Where a data set names no relations, wordings that
    paraphrase one another are of one relation: another wording of the edit's own relation would
    teach it not to follow paraphrases.

    Args:
        examples: Those that name a subject and hold it in their prompt can be crossed, within
            one format of data.
    """

    def __init__(self, examples: Sequence[EditExample]) -> None:
        from networkx.utils import UnionFind

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
        """Both kinds by turns.

        Args:
            example: The edit.
            count: At most this many prompts; fewer where others offer none.
            chooser: Draws the others, and which kind comes first.
        """
        kinds = self.other_subject, self.other_relation
        first = chooser.randrange(2)
        drawn = (kinds[turn % 2](example, chooser) for turn in range(first, first + count))
        return [prompt for prompt in drawn if prompt]

    def other_subject(self, example: EditExample, chooser: random.Random) -> str | None:
        """The edit's wording, another subject of its relation; None where its own is drawn."""
        mine, subject = self._relation(example), example.subject or ""
        other = chooser.choice(self._subjects.get((_format(example), mine or ""), [subject]))
        return None if other == subject else example.prompt.replace(subject, other, 1)

    def other_relation(self, example: EditExample, chooser: random.Random) -> str | None:
        """The edit's subject in another relation's wording; None where its own is drawn."""
        mine, known = self._relation(example), self._wordings.get(_format(example), [])
        if not mine or not known:
            return None
        relation, wording = chooser.choice(known)
        return None if relation == mine else wording.replace(GAP, example.subject or "", 1)

    def _relation(self, example: EditExample) -> str | None:
        """What the edit is of its subject; None where the prompt does not hold the subject."""
        wording = _wording(example, example.prompt)
        return wording and (example.relation or self._alike[wording])


def _wording(example: EditExample, prompt: str) -> str | None:
    """A prompt without the example's subject; None where it does not hold it."""
    subject = example.subject
    return prompt.replace(subject, GAP, 1) if subject and subject in prompt else None


def _format(example: EditExample) -> str:
    return example.source.partition(":")[0]
