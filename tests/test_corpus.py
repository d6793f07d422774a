"""The built-in corpus: what must hold of every edit, whatever the libraries' data become."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

from workbench.corpus import EXAMPLES, SENTENCES, facts, relations
from workbench.corpus.edits import bare, draw, fill
from workbench.data import EditExample, Statement, read, split_of

ROOT = Path(__file__).resolve().parents[1]


def mentions(text: str, subject: str) -> bool:
    """Whether a text has the subject in it as words of their own, in this spelling."""
    return subject in text and word(subject).search(text) is not None


@cache
def word(subject: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(subject)}(?!\w)")


@pytest.fixture(scope="module")
def edits() -> tuple[EditExample, ...]:
    return facts()


@pytest.fixture(scope="module")
def truths() -> dict[str, dict[str, tuple[str, str]]]:
    """By relation: the subject and the object of everything that its wordings can state."""
    return {
        name: {
            fill(wording, subject): (subject, answer)
            for subject, answer in relation.facts.items()
            for wording in relation.wordings
        }
        for name, relation in relations().items()
    }


def test_read_gives_the_corpus_and_its_splits(edits: tuple[EditExample, ...]) -> None:
    assert read("facts").examples == edits
    parts = [read("facts", split=split).examples for split in ("train", "dev", "holdout")]
    assert sum(map(len, parts)) == len(edits)
    assert all(len(part) > 0.05 * len(edits) for part in parts)
    assert read("facts", limit=5).examples == edits[:5]


def test_the_corpus_is_large_and_varied(edits: tuple[EditExample, ...]) -> None:
    assert len(edits) >= 4000
    assert len({e.id for e in edits}) == len(edits)
    assert len({(e.prompt, e.target) for e in edits}) == len(edits)
    subjects = defaultdict(set)
    for edit in edits:
        subjects[edit.relation].add(edit.subject)
    assert len(subjects) >= 40
    assert min(map(len, subjects.values())) >= 20
    assert max(map(len, subjects.values())) < len(edits) / 5


@pytest.mark.parametrize(
    ("relation", "subject", "answer"),
    [
        ("country.capital", "France", "Paris"),
        ("country.continent", "Kenya", "Africa"),
        ("country.language", "Brazil", "Portuguese"),
        ("country.currency", "Japan", "Japanese yen"),
        ("country.largest_city", "the United Kingdom", "London"),
        ("capital.country", "Oslo", "Norway"),
        ("city.country", "Osaka", "Japan"),
        ("city.us_state", "Dallas", "Texas"),
        ("state.largest_city", "Texas", "Houston"),
        ("airport.city", "Charles de Gaulle International Airport", "Paris"),
        ("language.script", "Russian", "Cyrillic"),
        ("language.country", "Danish", "Denmark"),
        ("element.symbol", "gold", "Au"),
        ("element.number", "carbon", "6"),
        ("book.author", "Don Quixote", "Miguel de Cervantes"),
        ("landmark.city", "the Eiffel Tower", "Paris"),
    ],
)
def test_known_facts(relation: str, subject: str, answer: str) -> None:
    assert relations()[relation].facts[subject] == answer


def test_every_relation_has_clozes_and_questions() -> None:
    for relation in relations().values():
        questions = [wording for wording in relation.wordings if "?" in wording]
        assert len(questions) >= 2
        assert len(relation.wordings) - len(questions) >= 2
        assert len(set(relation.wordings)) == len(relation.wordings)
        for wording in relation.wordings:
            assert "{}" in wording
            assert not wording.endswith((" ", "?", "{}"))


def test_facts_are_clean_texts_that_say_something() -> None:
    for relation in relations().values():
        for subject, answer in relation.facts.items():
            assert (subject, answer) == (subject.strip(), answer.strip())
            assert bare(subject)
            assert bare(answer)
            assert bare(subject) != bare(answer)


def test_the_target_is_another_object_of_the_relation(edits: tuple[EditExample, ...]) -> None:
    for edit in edits:
        objects = set(relations()[edit.relation or ""].objects)
        assert edit.target != edit.target_true
        assert {edit.target, edit.target_true} <= objects
        assert bare(edit.target) != edit.subject


def test_prompt_and_paraphrases_are_the_wordings_about_the_subject(
    edits: tuple[EditExample, ...], truths: dict[str, dict[str, tuple[str, str]]]
) -> None:
    for edit in edits:
        prompts = (edit.prompt, *edit.paraphrases)
        assert len(set(prompts)) == len(prompts) == 5
        for prompt in prompts:
            subject, answer = truths[edit.relation or ""][prompt]
            assert (bare(subject), answer) == (edit.subject, edit.target_true)
            assert mentions(prompt.lower(), subject.lower())


def test_neighbors_are_true_statements_about_others(
    edits: tuple[EditExample, ...], truths: dict[str, dict[str, tuple[str, str]]]
) -> None:
    for edit in edits:
        about = set()
        for neighbor in edit.neighbors:
            subject, answer = truths[edit.relation or ""][neighbor.prompt]
            assert answer == neighbor.answer
            assert not mentions(neighbor.prompt, edit.subject or "")
            about.add(subject)
        assert len(about) == len(edit.neighbors) == 6


def test_neighbors_share_objects_where_a_relation_has_few(edits: tuple[EditExample, ...]) -> None:
    continents = [e for e in edits if e.relation == "city.continent"]
    for edit in continents:
        answers = [neighbor.answer for neighbor in edit.neighbors]
        assert answers.count(edit.target_true) >= 2
        assert answers.count(edit.target) >= 2


def test_same_subject_statements_are_true_and_of_other_relations(
    edits: tuple[EditExample, ...], truths: dict[str, dict[str, tuple[str, str]]]
) -> None:
    assert sum(bool(edit.same_subject) for edit in edits) > len(edits) / 2
    for edit in edits:
        kind = (edit.relation or "").partition(".")[0]
        for statement in edit.same_subject:
            [relation] = [name for name, known in truths.items() if statement.prompt in known]
            subject, answer = truths[relation][statement.prompt]
            assert relation != edit.relation
            assert relation.startswith(f"{kind}.")
            assert (bare(subject), answer) == (edit.subject, statement.answer)


def test_unrelated_statements_leave_the_subject_out(edits: tuple[EditExample, ...]) -> None:
    for edit in edits:
        assert sum(s.answer is None for s in edit.unrelated) == 2
        assert sum(s.answer is not None for s in edit.unrelated) == 2
        assert not any(mentions(s.prompt, edit.subject or "") for s in edit.unrelated)


def test_entailed_statements_follow_from_the_new_object(edits: tuple[EditExample, ...]) -> None:
    entailed = [edit for edit in edits if edit.portability]
    assert {edit.relation for edit in entailed} == {
        "airport.city",
        "book.author",
        "city.country",
        "landmark.city",
        "mountain.country",
    }
    continents = relations()["country.continent"].facts
    for edit in entailed:
        [statement] = edit.portability
        assert mentions(statement.prompt, edit.subject or "")
        if edit.relation == "city.country":
            assert statement.answer == continents[edit.target] != continents[edit.target_true or ""]


def test_a_subject_is_in_one_split_and_training_meets_no_other(
    edits: tuple[EditExample, ...], truths: dict[str, dict[str, tuple[str, str]]]
) -> None:
    subject_of = {
        prompt: bare(subject) for known in truths.values() for prompt, (subject, _) in known.items()
    }
    for edit in edits:
        assert edit.split == split_of(edit.subject or "")
        if edit.split == "train":
            for statement in edit.neighbors + edit.same_subject + edit.unrelated:
                about = subject_of.get(statement.prompt, statement.prompt)
                assert split_of(about) == "train"


def test_the_corpus_is_the_same_in_every_process(edits: tuple[EditExample, ...]) -> None:
    code = (
        "import hashlib; from workbench.corpus import facts;"
        "print(hashlib.sha256(repr(facts()).encode()).hexdigest())"
    )
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": seed},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == hashlib.sha256(repr(edits).encode()).hexdigest()


def test_drawing_finds_every_member_that_fits() -> None:
    for size in range(1, 40):
        pool = list(range(size))
        for key in "abc":
            assert sorted(draw(key, pool, size)) == pool
            assert draw(key, pool, size, lambda n: n == 0) == [0]
    assert draw("a", [], 1) == []
    assert len({tuple(draw(str(n), range(30), 3)) for n in range(50)}) > 40


def test_filling_in_a_subject() -> None:
    assert fill("{} is in", "the Louvre") == "The Louvre is in"
    assert fill("Where is {}? {} is in", "a {b}") == "Where is a {b}? a {b} is in"
    assert bare("the Louvre") == "Louvre"
    assert bare("an owl") == "owl"
    assert bare("The Hobbit") == "The Hobbit"


def test_sentences_are_plain_and_different() -> None:
    assert len(set(SENTENCES)) == len(SENTENCES) >= 110
    for sentence in SENTENCES:
        assert 12 <= len(sentence.split()) <= 30
        assert sentence.endswith((".", '."', '!"', '?"'))
    assert {split_of(sentence) for sentence in SENTENCES} == {"train", "dev", "holdout"}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.subject)
def test_gallery_examples_are_complete(example: EditExample) -> None:
    counts = map(
        len, (example.paraphrases, example.neighbors, example.same_subject, example.unrelated)
    )
    assert list(counts) == [3, 4, 3, 3]
    assert example.target != example.target_true
    assert len({example.prompt, *example.paraphrases}) == 4
    assert example.subject
    for prompt in (example.prompt, *example.paraphrases):
        assert example.subject in prompt
    others: tuple[Statement, ...] = example.neighbors + example.unrelated
    assert all(statement.answer for statement in others + example.same_subject)
    assert not any(mentions(statement.prompt, example.subject) for statement in others)
    for statement in example.same_subject + example.portability:
        assert mentions(statement.prompt, example.subject)


def test_the_gallery_has_eight_examples_of_different_relations() -> None:
    assert len(EXAMPLES) == len({example.relation for example in EXAMPLES}) == 8
