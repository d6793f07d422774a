"""Edit examples made from facts: each states a wrong object and knows what must stay."""

from __future__ import annotations

import math
import re
import tomllib
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TypeVar

from workbench.data import EditExample, Statement, split_of

from .libraries import library_facts
from .wordings import WORDINGS

# Kinds whose relations depend on each other: an edit of one may change the others.
TIED = {"airport", "book", "city", "landmark", "mountain", "river"}
# What an edit entails: a relation whose object follows from the object of the edited one.
ENTAILS = {
    "airport.city": "airport.country",
    "book.author": "book.language",
    "city.country": "city.continent",
    "landmark.city": "landmark.country",
    "mountain.country": "mountain.continent",
}
PLACES = {"airport", "capital", "city", "country", "landmark", "mountain", "river", "state"}
T = TypeVar("T")

HERE = Path(__file__).parent
SENTENCES = tuple((HERE / "sentences.txt").read_text(encoding="utf-8").splitlines())

EDITS_PER_RELATION = 180
EDITS_PER_FACT = 3
ARTICLE = re.compile(r"^(the|an?) ")


@dataclass(frozen=True, eq=False)
class Relation:
    """A relation: its wordings, and its object for every subject."""

    name: str  # "kind.attribute"
    wordings: tuple[str, ...]
    facts: dict[str, str]

    @cached_property
    def kind(self) -> str:
        return self.name.partition(".")[0]

    @cached_property
    def objects(self) -> tuple[str, ...]:
        return tuple(sorted(set(self.facts.values())))

    @cached_property
    def subjects(self) -> tuple[str, ...]:
        return tuple(sorted(self.facts))

    @cached_property
    def by_object(self) -> dict[str, tuple[str, ...]]:
        """Subjects of each object."""
        found: dict[str, list[str]] = defaultdict(list)
        for subject in self.subjects:
            found[self.facts[subject]].append(subject)
        return {key: tuple(value) for key, value in found.items()}

    def ask(self, subject: str, key: str) -> Statement:
        """The true fact about a subject, in a wording chosen by the key."""
        wording = self.wordings[_number(key + subject) % len(self.wordings)]
        return Statement(prompt=fill(wording, subject), answer=self.facts[subject])


@cache
def relations() -> dict[str, Relation]:
    """Every relation of the corpus by name."""
    facts = {**library_facts(), **_table_facts()}
    return {
        name: Relation(name, wordings, {s: o for s, o in facts[name].items() if bare(s) != bare(o)})
        for name, wordings in WORDINGS.items()
    }


def _table_facts() -> dict[str, dict[str, str]]:
    """The hand-written tables as facts: relation "kind.column" -> subject -> object."""
    text = (HERE / "tables.toml").read_text(encoding="utf-8")
    facts: dict[str, dict[str, str]] = {}
    for kind, table in tomllib.loads(text).items():
        rows = [row.split(" = ") for row in table["rows"].splitlines()]
        for place, column in enumerate(table["columns"], 1):
            facts[f"{kind}.{column}"] = {row[0]: row[place] for row in rows if row[place] != "-"}
    return facts


@cache
def facts() -> tuple[EditExample, ...]:
    """All edits of the built-in corpus: the same in every process, and made once in each."""
    return tuple(
        edit
        for relation in relations().values()
        for subject in relation.subjects
        for edit in _edits(relation, subject)
    )


def bare(subject: str) -> str:
    """A subject without its article."""
    return ARTICLE.sub("", subject)


def fill(wording: str, subject: str) -> str:
    """A wording about a subject, with a capital at its beginning."""
    text = wording.replace("{}", subject)
    return text[0].upper() + text[1:]


def draw(
    key: str, pool: Sequence[T], count: int, fits: Callable[[T], bool] = lambda _: True
) -> list[T]:
    """Up to `count` members of a pool that fit, met on a walk through it that the key decides."""
    size = len(pool)
    if not size:
        return []
    number = _number(key)
    start, stride = (number >> 32) % size, number % size or 1
    while math.gcd(stride, size) > 1:
        stride += 1
    chosen: list[T] = []
    for step in range(size):
        item = pool[(start + step * stride) % size]
        if fits(item):
            chosen.append(item)
            if len(chosen) == count:
                break
    return chosen


def _number(key: str) -> int:
    """A number below 2^64 that depends on the key alone: its CRC, spread by the golden ratio."""
    return zlib.crc32(key.encode()) * 0x9E3779B97F4A7C15 % 2**64


def _edits(relation: Relation, subject: str) -> Iterator[EditExample]:
    """The edits of one fact: different targets, each asked in a different wording."""
    true = relation.facts[subject]
    name = bare(subject)
    split = split_of(name)
    count = min(EDITS_PER_FACT, max(1, EDITS_PER_RELATION // len(relation.facts)))
    key = f"{relation.name}|{subject}"
    targets = draw(
        key, relation.objects, count, lambda other: bare(other) not in (bare(true), name)
    )
    wordings = draw(key, relation.wordings, len(relation.wordings))
    prompts = [fill(wording, subject) for wording in wordings]
    same_subject = tuple(
        other.ask(subject, key) for other in _siblings(relation) if subject in other.facts
    )
    for number, target in enumerate(targets):
        key = f"{relation.name}|{subject}|{number}"
        yield EditExample(
            prompt=prompts[number],
            target=target,
            target_true=true,
            subject=name,
            relation=relation.name,
            paraphrases=(*prompts[:number], *prompts[number + 1 :]),
            neighbors=_neighbors(relation, name, true, target, wordings[number], split, key),
            same_subject=same_subject,
            unrelated=tuple(_unrelated(relation, name, split, key)),
            portability=tuple(_entailed(relation, subject, target, key)),
            id=f"{relation.name}/{name}/{number}",
            split=split,
            source="facts",
        )


def _neighbors(
    relation: Relation, name: str, true: str, target: str, wording: str, split: str, key: str
) -> tuple[Statement, ...]:
    """Six other subjects: two that share the true object, two the target, where there are any."""

    def fits(other: str) -> bool:
        return name.lower() not in other.lower() and may_meet(other, split)

    others = dict.fromkeys(
        draw(key, relation.by_object[true], 2, fits)
        + draw(key, relation.by_object[target], 2, fits)
        + draw(key, relation.subjects, 6, fits)
    )
    statements = []
    for place, other in enumerate(list(others)[:6]):
        if place % 2:
            statements.append(relation.ask(other, key))
        else:
            answer = relation.facts[other]
            statements.append(Statement(prompt=fill(wording, other), answer=answer))
    return tuple(statements)


@cache
def may_meet(subject: str, split: str) -> bool:
    """Whether an example of the split may mention the subject: training ones meet no others."""
    return split != "train" or split_of(bare(subject)) == "train"


@cache
def _siblings(relation: Relation) -> tuple[Relation, ...]:
    """Other relations of the same subjects that an edit of this one leaves alone."""
    others = () if relation.kind in TIED else relations().values()
    return tuple(r for r in others if r.kind == relation.kind and r != relation)


@cache
def _strangers(kind: str) -> tuple[Relation, ...]:
    """Relations that have nothing to do with a kind of subject."""
    related = PLACES if kind in PLACES else {kind}
    return tuple(other for other in relations().values() if other.kind not in related)


def _unrelated(relation: Relation, name: str, split: str, key: str) -> Iterator[Statement]:
    """Two facts about other kinds of things and two plain sentences."""
    for other in draw(key, _strangers(relation.kind), 2):
        for subject in draw(key, other.subjects, 1, lambda s: name not in s and may_meet(s, split)):
            yield other.ask(subject, key)
    word = f" {name.lower()} "
    for sentence in draw(key, SENTENCES, 2, lambda s: word not in _words(s) and may_meet(s, split)):
        yield Statement(prompt=sentence)


@cache
def _words(sentence: str) -> str:
    return f" {' '.join(re.findall(r'[a-z]+', sentence.lower()))} "


def _entailed(relation: Relation, subject: str, target: str, key: str) -> Iterator[Statement]:
    """What the new object entails about the subject, where it differs from before."""
    own = relations().get(ENTAILS.get(relation.name, ""))
    if own and subject in own.facts:
        others = relation.by_object[target]
        answers = {own.facts[other] for other in others if other in own.facts}
        if len(answers) == 1 and answers != {own.facts[subject]}:
            yield Statement(prompt=own.ask(subject, key).prompt, answer=answers.pop())
