"""Many probes around one edit: what should change with it, what it entails, what should stay."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache, cached_property
from heapq import nlargest
from itertools import zip_longest

from workbench.corpus import EXAMPLES, SENTENCES, Relation, relations
from workbench.corpus.edits import ENTAILS, PLACES, TIED, bare, draw, fill
from workbench.data import EditExample, Statement
from workbench.probes import Probe
from workbench.rewrites import rewritten, translated
from workbench.sentences import Encoder
from workbench.subjects import Topic, named, topic_of

_SAME, _FAR = 0.7, 0.3  # cosines above which a prompt asks the same, below which it is unrelated
_INVERSE = 0.8  # share of facts that two relations that are each other's inverse agree on
_NOUN = re.compile(r"(The [^{}]*\{\}[^{}]*?) is")
# Same subject, nothing to do with any fact about it; {} is the subject, the answer its own.
_OPENINGS = (
    "Yesterday I read a long article about {} and",
    "My opinion of {} is that",
    "There is a photograph of {} on the wall of the",
)


@dataclass(frozen=True)
class _Request:
    """An edit to probe, and what is known of it."""

    prompt: str
    target: str
    encoder: Encoder

    @cached_property
    def topic(self) -> Topic:
        return topic_of(self.prompt)

    @cached_property
    def relation(self) -> Relation | None:
        """The prompt's relation, unless the target is no object of its kind."""
        relation = self.topic.relation
        return relation if relation and _is_of_kind(self.target, relation) else None

    @cached_property
    def example(self) -> EditExample | None:
        """The gallery's example of this prompt."""
        return next((e for e in EXAMPLES if e.prompt == self.prompt.strip()), None)

    @cached_property
    def nearest(self) -> list[tuple[Relation, Statement]]:
        """The corpus's prompts that mean nearly the same and do not name the subject."""
        words = _words(self.prompt)
        others = [pair for pair in _corpus() if not self.mentions(pair[1].prompt)]
        # The encoder sees those alone that share most words.
        pool = nlargest(
            self.encoder.most, others, key=lambda pair: _shared(words, _words(pair[1].prompt))
        )
        alike = self.encoder.closeness(self.prompt, [statement.prompt for _, statement in pool])
        order = sorted(range(len(pool)), key=lambda i: (-alike[i], pool[i][1].prompt))
        return [pool[i] for i in order[:6]]

    @property
    def key(self) -> str:
        return f"{self.prompt}|{self.target}"

    def mentions(self, text: str) -> bool:
        """Whether a text names the subject."""
        return bare(self.topic.subject.lower()) in text.lower()


def probes_around(
    prompt: str,
    target: str,
    encoder: Encoder,
    *,
    equivalents: int = 12,
    portability: int = 4,
    neighbors: int = 16,
    unrelated: int = 8,
) -> tuple[Probe, ...]:
    """Probes of every kind for an edit that someone typed; the same ones each time.

    Args:
        prompt: The edit's prompt.
        target: The edit's target.
        encoder: Tells what is close in meaning.
        equivalents: At most so many that should change with it.
        portability: At most so many that follow from it.
        neighbors: At most so many near ones that should stay.
        unrelated: At most so many others that should stay.
    """
    asked = _Request(prompt.strip(), target.strip(), encoder)
    groups = (
        (_equivalents(asked), equivalents),
        (_portability(asked), portability),
        (_neighbors(asked), neighbors),
        (_unrelated(asked), unrelated),
    )
    found = [Probe(prompt, "edit", target, "as typed")]
    taken = {prompt.strip().lower()}
    for ways, most in groups:
        chosen = []
        for probe in _in_turn(ways):
            if len(chosen) < most and probe.prompt.strip().lower() not in taken:
                taken.add(probe.prompt.strip().lower())
                chosen.append(probe)
        found += chosen
    return tuple(found)


def _in_turn(ways: Iterable[Iterable[Probe]]) -> Iterator[Probe]:
    """One probe of each way, then the next of each."""
    for row in zip_longest(*ways):
        yield from (probe for probe in row if probe is not None)


def _statement(statement: Statement, kind: str, made: str) -> Probe:
    return Probe(statement.prompt, kind, statement.answer, made)


# Should change


def _equivalents(asked: _Request) -> list[list[Probe]]:
    subject, relation = asked.topic.subject, asked.relation
    written = asked.example.paraphrases if asked.example else ()
    wordings = [fill(w, subject) for w in relation.wordings] if relation else []
    after = [f"{sentence} {asked.prompt}" for sentence in draw(asked.key, SENTENCES, 3)]
    ways: list[list[tuple[str, str]]] = [
        [(text, "written for this example") for text in written],
        [(text, "another wording of the relation") for text in wordings],
        rewritten(asked.prompt, subject),
        [(text, "after an unrelated sentence") for text in after],
        translated(asked.prompt, asked.target, subject, asked.encoder),
    ]
    return [[Probe(text, "equivalent", asked.target, made) for text, made in way] for way in ways]


# Follows from it


def _portability(asked: _Request) -> list[list[Probe]]:
    written = asked.example.portability if asked.example else ()
    ways = [[_statement(s, "portability", "written for this example") for s in written]]
    if asked.relation:
        ways += [_inverse(asked, asked.relation), _entailed(asked, asked.relation)]
        ways += [_chained(asked, asked.relation)]
    return ways


def _inverse(asked: _Request, relation: Relation) -> list[Probe]:
    """The relation the other way round, asked of the new object."""
    found = []
    for name in _inverses(relation.name):
        for wording in draw(asked.key, relations()[name].wordings, 2):
            prompt = fill(wording, asked.target)
            found.append(Probe(prompt, "portability", asked.topic.subject, f"inverse, {name}"))
    return found


@cache
def _inverses(name: str) -> tuple[str, ...]:
    """Relations that lead back from the objects of one to its subjects, by their facts."""
    own = relations()[name].facts
    return tuple(
        other.name
        for other in relations().values()
        if _led_back(own, other.facts) and _led_back(other.facts, own)
    )


def _led_back(facts: dict[str, str], others: dict[str, str]) -> bool:
    return sum(others.get(o) == s for s, o in facts.items()) >= _INVERSE * len(facts)


def _entailed(asked: _Request, relation: Relation) -> list[Probe]:
    """Another relation of the subject whose object the new one decides: the country of its city."""
    own = relations().get(ENTAILS.get(relation.name, ""))
    object_ = next((o for o in relation.objects if bare(o) == bare(asked.target)), None)
    if own is None or object_ is None:
        return []
    answers = {own.facts[s] for s in relation.by_object[object_] if s in own.facts}
    before = own.facts.get(asked.topic.known or "")
    if len(answers) != 1 or answers == {before}:
        return []
    answer = answers.pop()
    return [
        Probe(fill(wording, asked.topic.subject), "portability", answer, f"entailed, {own.name}")
        for wording in draw(asked.key, own.wordings, 2)
    ]


def _chained(asked: _Request, relation: Relation) -> list[Probe]:
    """A fact of the new object, asked by way of the subject: the language of its author."""
    nouns = [match[1] for w in relation.wordings if (match := _NOUN.fullmatch(w))]
    if not nouns:
        return []
    noun = fill(nouns[0], asked.topic.subject)
    noun = noun[0].lower() + noun[1:]
    true = relation.facts.get(asked.topic.known or "", "")
    found = []
    for other in relations().values():
        object_ = named(other, asked.target)
        before = named(other, true)
        if object_ is None or other.name in _inverses(relation.name):
            continue
        answer = other.facts[object_]
        if before is not None and other.facts[before] == answer:
            continue
        prompts = [fill(w, noun) for w in other.wordings if w.count("{}") == 1 and w[:2] != "{}"]
        made = f"in two steps, {relation.name} and {other.name}"
        found += [Probe(text, "portability", answer, made) for text in draw(asked.key, prompts, 1)]
    return draw(asked.key, found, 4)


# Should stay


def _neighbors(asked: _Request) -> list[list[Probe]]:
    written: list[Probe] = []
    if asked.example:
        for way, same in (("neighbors", "relation"), ("same_subject", "subject")):
            made = f"same {same}, written for this example"
            written += [_statement(s, "neighbor", made) for s in getattr(asked.example, way)]
    return [
        _other_subjects(asked, asked.relation) if asked.relation else [],
        _lookalikes(asked),
        _other_relations(asked),
        _nearest(asked),
        written,
    ]


def _other_subjects(asked: _Request, relation: Relation) -> list[Probe]:
    """Same relation: two that share the old object, two the new one, then any."""
    objects = relation.facts.get(asked.topic.known or "", ""), asked.target
    pools = [relation.by_object.get(o, ()) for o in objects]
    drawn = [s for pool in pools for s in draw(asked.key, pool, 2)]
    drawn += draw(asked.key, relation.subjects, 8)
    others = [s for s in dict.fromkeys(drawn) if not asked.mentions(s)]
    asks = [
        Statement(prompt=fill(asked.topic.wording, s), answer=relation.facts[s])
        if place % 2 == 0
        else relation.ask(s, asked.key)
        for place, s in enumerate(others)
    ]
    return [_statement(ask, "neighbor", "same relation, other subject") for ask in asks]


def _lookalikes(asked: _Request) -> list[Probe]:
    """The prompt itself about subjects whose names look alike."""
    subject, relation = asked.topic.subject, asked.relation
    capital = bare(subject)[:1].isupper()
    pool = (relation or asked.nearest[0][0]).subjects
    others = [s for s in pool if not asked.mentions(s) and bare(s)[:1].isupper() == capital]
    alike = nlargest(4, others, key=lambda other: (_alike(bare(subject), bare(other)), other))
    return [
        Probe(
            asked.prompt.replace(bare(subject), bare(other)),
            "neighbor",
            relation.facts[other] if relation else None,
            "look-alike, a similar name",
        )
        for other in alike
        if bare(subject) in asked.prompt
    ]


def _alike(a: str, b: str) -> float:
    return SequenceMatcher(None, a.lower(), b.lower()).ratio()


def _other_relations(asked: _Request) -> list[Probe]:
    """Same subject: its other facts, unless they ask the same or follow; then plain openings."""
    subject, own = asked.topic.subject, asked.topic.relation
    facts = [
        other.ask(known, asked.key)
        for other in relations().values()
        if other is not own and not (own and _tied(own, other)) and (known := named(other, subject))
    ]
    alike = asked.encoder.closeness(asked.prompt, [s.prompt for s in facts])
    apart = [s for s, cosine in zip(facts, alike, strict=True) if own or cosine < _SAME]
    first = bare(subject)[:1].upper()
    openings = [Statement(prompt=fill(opening, subject)) for opening in _OPENINGS]
    openings.append(Statement(prompt=f'The word "{subject}" begins with the letter', answer=first))
    made = "same subject, another relation", "same subject, another sentence"
    return [
        *(_statement(s, "neighbor", made[0]) for s in draw(asked.key, apart, 4)),
        *(_statement(s, "neighbor", made[1]) for s in openings),
    ]


def _tied(own: Relation, other: Relation) -> bool:
    """Whether an edit of one relation may change the other, of the same subject."""
    if own.kind == other.kind:
        return own.kind in TIED
    return own.kind in PLACES and other.kind in PLACES


def _nearest(asked: _Request) -> list[Probe]:
    return [_statement(s, "neighbor", "nearest in the corpus") for _, s in asked.nearest]


def _unrelated(asked: _Request) -> list[list[Probe]]:
    gallery = [s for e in EXAMPLES if e is not asked.example for s in e.unrelated]
    pools = (
        (asked.example.unrelated if asked.example else (), "written for this example"),
        (draw(asked.key, gallery, 12), "unrelated, of the gallery"),
        ([s for _, s in draw(asked.key, _corpus(), 12)], "unrelated, of the corpus"),
        (draw(f"{asked.key}|half", _beginnings(), 12), "beginning of an unrelated sentence"),
    )
    found = []
    for pool, made in pools:
        alike = asked.encoder.closeness(asked.prompt, [s.prompt for s in pool])
        far = [s for s, cosine in zip(pool, alike, strict=True) if cosine < _FAR]
        apart = [s for s in far if not asked.mentions(s.prompt)]
        found.append([_statement(s, "unrelated", made) for s in apart])
    return found


@cache
def _corpus() -> tuple[tuple[Relation, Statement], ...]:
    """Every fact of the corpus, each in one wording."""
    return tuple((r, r.ask(s, "")) for r in relations().values() for s in r.subjects)


@cache
def _beginnings() -> tuple[Statement, ...]:
    halves = (sentence.split() for sentence in SENTENCES)
    return tuple(Statement(prompt=" ".join(w[: (len(w) + 1) // 2])) for w in halves)


@cache
def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


def _shared(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b) if a or b else 0.0


def _is_of_kind(target: str, relation: Relation) -> bool:
    """Whether a target can be the relation's object: a country where all of them are."""
    countries = {bare(s) for s in relations()["country.capital"].subjects}
    objects = [bare(o) for o in relation.objects]
    tests = (lambda o: bare(o) in countries, lambda o: o.isdigit())
    return all(test(target) for test in tests if sum(map(test, objects)) > 0.8 * len(objects))
