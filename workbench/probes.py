"""Prompts that show how far an edit reaches: equivalents, neighbours, unrelated ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TypeVar

from workbench.checks import check_text
from workbench.corpus import EXAMPLES, SENTENCES, Relation, relations
from workbench.data import EditExample, Statement
from workbench.subjects import topic_of

T = TypeVar("T")
KINDS = ("edit", "equivalent", "portability", "neighbor", "unrelated", "other")
LISTED = ("equivalent", "neighbor", "unrelated", "other")  # in forms, beside the edit's own prompt
_WITH_ANSWER = ("neighbor", "unrelated")


@dataclass(frozen=True)
class Probe:
    """A prompt to look at, and what it is there for.

    Args:
        prompt: What the model reads.
        kind: "edit" or "equivalent" (should change), "portability" (follows from the edit),
            "neighbor" or "unrelated" (should not change), "other" (nothing is expected).
        target: Answer whose probability is of interest: the edit's target where it should appear,
            the true answer where nothing should change; None where none is known.
        made: How the probe was made, in a few words.
    """

    prompt: str
    kind: str = "other"
    target: str | None = None
    made: str = ""


def suggest(
    prompt: str, target: str, *, equivalents: int = 2, neighbors: int = 2, unrelated: int = 3
) -> tuple[Probe, ...]:
    """Probes for an edit that someone typed: the prompt itself, then each kind.

    A prompt of the gallery brings its own; one in a wording of the built-in corpus gets the other
    wordings and other subjects; any other is read after an unrelated sentence.

    Args:
        prompt: The edit's prompt.
        target: The edit's target.
        equivalents: How many prompts that should change with it.
        neighbors: How many of the same relation or subject that should not.
        unrelated: How many others that should not.

    Raises:
        EditError: Prompt or target is no text, or holds half of a surrogate pair.
    """
    check_text(prompt, "prompt")
    check_text(target, "target")
    alike, near = _known(prompt)
    alike += [
        Probe(f"{sentence} {prompt}", "equivalent", made="after an unrelated sentence")
        for sentence in _chosen(SENTENCES, prompt)[: max(0, equivalents - len(alike))]
    ]
    taken = {prompt, *(probe.prompt for probe in (*alike, *near))}
    relation = topic_of(prompt).relation
    far = [
        Probe(statement.prompt, "unrelated", statement.answer, "of another gallery example")
        for example in _chosen(EXAMPLES, prompt)
        for statement in example.unrelated[:1]
        if example.prompt != prompt and statement.prompt not in taken
        if relation is None or topic_of(statement.prompt).relation is not relation
    ]
    return (
        Probe(prompt, "edit", target, "as typed"),
        *(replace(probe, target=target) for probe in alike[:equivalents]),
        *near[:neighbors],
        *list(dict.fromkeys(far))[:unrelated],
    )


def _known(prompt: str) -> tuple[list[Probe], list[Probe]]:
    """Equivalents and neighbours of a prompt that the gallery or the corpus knows."""
    for example in EXAMPLES:
        if prompt.strip() == example.prompt:
            return _from_example(example)
    topic = topic_of(prompt)
    if topic.relation is None:
        return [], []
    return _from_relation(topic.relation, topic.subject, prompt.strip())


def _from_example(example: EditExample) -> tuple[list[Probe], list[Probe]]:
    alike = [Probe(p, "equivalent", made="written for this example") for p in example.paraphrases]
    pairs = zip(example.neighbors, example.same_subject, strict=False)
    near = [probe for pair in pairs for probe in map(_neighbor, pair, ("relation", "subject"))]
    return alike, near


def _neighbor(statement: Statement, same: str) -> Probe:
    return Probe(statement.prompt, "neighbor", statement.answer, f"same {same}")


def _from_relation(
    relation: Relation, subject: str, prompt: str
) -> tuple[list[Probe], list[Probe]]:
    wordings = [wording.replace("{}", subject) for wording in relation.wordings]
    alike = [
        Probe(wording[0].upper() + wording[1:], "equivalent", made="another wording")
        for wording in wordings
        if wording.lower() != prompt.lower()
    ]
    others = [s for s in _chosen(relation.subjects, prompt) if s.lower() != subject.lower()]
    near = [_neighbor(relation.ask(other, prompt), "relation") for other in others[:4]]
    same = [
        _neighbor(other.ask(subject, prompt), "subject")
        for other in relations().values()
        if other is not relation and subject in other.facts
    ]
    return alike, [*near[:1], *same[:1], *near[1:], *same[1:]]


def _chosen(items: Sequence[T], key: str) -> list[T]:
    """Items in an order that depends on the key alone: the same prompt gets the same probes."""
    return sorted(items, key=lambda item: sha256(f"{key}|{item}".encode()).digest())


# Prompts as text: one a line, "prompt => answer" where an answer is to be followed


def as_lines(probes: Sequence[Probe], kind: str) -> str:
    """The prompts of one kind as text."""
    lines = []
    for probe in probes:
        if probe.kind == kind:
            answer = f" => {probe.target}" if probe.target and kind in _WITH_ANSWER else ""
            lines.append(" ".join(probe.prompt.splitlines()) + answer)
    return "\n".join(lines)


def read_lines(text: str, kind: str, target: str | None = None) -> tuple[Probe, ...]:
    """Text as probes; `target` is for the lines that name no answer.

    Raises:
        EditError: It is no text, or holds half of a surrogate pair.
    """
    lines = check_text(text, "list of prompts").splitlines()
    parts = (line.partition(" => ") for line in lines)
    return tuple(
        Probe(prompt.strip(), kind, answer.strip() or target)
        for prompt, _, answer in parts
        if prompt.strip()
    )


def read_form(prompt: str, target: str, *lists: str) -> tuple[Probe, ...]:
    """The probes that the form describes: the edit's own prompt, then the lists of `LISTED`."""
    wanted = target.strip() or None
    probes = (Probe(prompt.strip(), "edit", wanted),) if prompt.strip() else ()
    for kind, text in zip(LISTED, lists, strict=True):
        probes += read_lines(text, kind, None if kind in _WITH_ANSWER else wanted)
    return probes
