"""What a typed prompt is about: the corpus's relation in whose wording it is, and its subject."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from workbench.corpus import Relation, relations
from workbench.corpus.edits import bare

_NAME = r"[A-Z0-9][\w'\u2019.&-]*"
_LINKS = r"(?:\s+(?:of|the|de|da|di|von|van|der|la|le|and|&))*"
_NAMES = re.compile(rf"{_NAME}(?:{_LINKS}\s+{_NAME})*")
_OPENERS = re.compile(
    r"^(?:(?:the|an?|in|on|at|for|to|who|whom|what|which|when|where|why|how|is|was|are|were|q|a|"
    r"question|answer|it|he|she|they|i|you|we|this|that)\b[:,]?\s*)+",
    re.IGNORECASE,
)
_POSSESSIVE = re.compile(r"['\u2019]s$")
_ROLE = re.compile(r"^[A-Z]{2,}s? of (?:the )?")  # the CEO of Acme: it is about Acme
_AFTER = re.compile(
    r"\b(?:of|for|in|by|from|called|named|about)\s+(.+?)\s+"
    r"(?:is|was|are|were|has|have|had|will|can|does|did)\b",
    re.IGNORECASE,
)
_BEFORE = re.compile(r"^(.+?)\s+(?:is|was|are|were|has|have|had|will|can)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Topic:
    """What a prompt is about.

    Args:
        subject: As the relation's facts write it, else as the prompt does.
        relation: Of the corpus; None where the prompt is in none of its wordings.
        wording: The relation's wording that the prompt is in; empty for none.
    """

    subject: str
    relation: Relation | None = None
    wording: str = ""

    @property
    def known(self) -> str | None:
        """The subject as the relation's facts write it; None where they lack it."""
        return named(self.relation, self.subject) if self.relation else None


def topic_of(prompt: str) -> Topic:
    """Recognise a prompt: by the corpus's wordings, with any subject, else by a guess.

    Where several relations share a wording, the one that knows the subject is taken.
    """
    matches = [
        Topic(named(relation, match[1]) or match[1], relation, wording)
        for relation, wording, pattern in _patterns()
        if (match := pattern.fullmatch(prompt.strip()))
    ]
    known = (topic for topic in matches if topic.known)
    return next(known, matches[0] if matches else Topic(guess_subject(prompt)))


def guess_subject(prompt: str) -> str:
    """The part of a prompt that it seems to be about: a name, else the noun before the verb, else
    its first word."""
    words = _OPENERS.sub("", prompt.strip()).split()
    return likely_subject(prompt) or (words[0] if words else prompt.strip())


def likely_subject(prompt: str) -> str | None:
    """`guess_subject` where the prompt's form tells it; None: by its first word alone."""
    names = [_ROLE.sub("", _OPENERS.sub("", found)) for found in _NAMES.findall(prompt)]
    longest = max(reversed([name for name in names if name]), key=len, default="")
    if longest:
        return _POSSESSIVE.sub("", longest)
    for pattern in (_AFTER, _BEFORE):
        match = pattern.search(prompt)
        subject = _OPENERS.sub("", match[1]) if match else ""
        if subject:
            return subject
    return None


def named(relation: Relation, subject: str) -> str | None:
    """A subject as the relation's facts write it, whatever its case and article."""
    return _plain_names(relation).get(bare(subject.lower()))


@cache
def _plain_names(relation: Relation) -> dict[str, str]:
    return {bare(subject.lower()): subject for subject in relation.facts}


@cache
def _patterns() -> tuple[tuple[Relation, str, re.Pattern[str]], ...]:
    return tuple(
        (relation, wording, _pattern(wording))
        for relation in relations().values()
        for wording in relation.wordings
    )


def _pattern(wording: str) -> re.Pattern[str]:
    """A wording as a pattern; its further gaps repeat the first."""
    first, *rest = (re.escape(part) for part in wording.split("{}"))
    return re.compile(f"{first}(.+?)" + r"\1".join(rest), re.IGNORECASE)
