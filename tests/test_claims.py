"""Claims: rewordings that keep the verdict, and what is set beside a claim."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from workbench.claims import Claim, link, reworded
from workbench.data import EditExample, read

PERSON = "Ada Example"


def claim(text: str, verdict: str = "true", pair: str | None = None, **fields: str) -> Claim:
    other = "false" if verdict == "true" else "true"
    about: dict[str, Any] = {"subject": PERSON, "split": "train"} | fields
    return Claim(EditExample(prompt=text, target=other, target_true=verdict, **about), pair)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        (f"Night was directed by {PERSON}.", f"{PERSON} directed Night."),
        (f"{PERSON} wrote Night.", f"Night was written by {PERSON}."),
        (f"Night was written by {PERSON}.", f"{PERSON} wrote Night."),
        (f"{PERSON} was born in Rome.", f"The birth of {PERSON} was in Rome."),
        (f"{PERSON} is in a film.", f"{PERSON} is in a movie."),
    ],
)
def test_a_claim_is_turned(text: str, first: str) -> None:
    assert reworded(text, PERSON)[0] == first


def test_rewordings_name_the_subject_and_never_say_that_they_are_true() -> None:
    texts = (f"{PERSON} starred in a film.", "Night was directed by Jo, then by Al.", "It began.")
    for text in texts:
        subject = PERSON if PERSON in text else None
        found = reworded(text, subject)
        assert found
        assert text not in found
        assert len(set(found)) == len(found)
        for other in found:
            assert subject is None or subject in other
            assert "true" not in other.lower()
    assert reworded("Night was directed by Jo, then by Al.", None) == (
        "Claim: Night was directed by Jo, then by Al.",
    )


def test_a_pair_makes_neighbors_and_a_subject_what_says_something_else() -> None:
    edited = claim(f"{PERSON} plays the piano.", pair="p", id="e")
    others = [
        claim(f"{PERSON} invented the piano.", "false", "p"),
        claim(f"{PERSON} plays the piano well.", subject=PERSON.upper()),  # nearly the same
        claim(f"{PERSON} lives abroad.", "false"),
        claim("Ice is cold.", subject="Ice"),
        claim(f"Tea was brought to {PERSON}.", subject="Tea"),  # names the subject
    ]
    [example] = link([edited], others)
    assert [(s.prompt, s.answer) for s in example.neighbors] == [
        (f"{PERSON} invented the piano.", "false")
    ]
    assert [(s.prompt, s.answer) for s in example.same_subject] == [
        (f"{PERSON} lives abroad.", "false")
    ]
    assert {s.prompt for s in example.unrelated} <= {"Ice is cold."}
    assert (example.prompt, example.target) == (edited.example.prompt, edited.example.target)


def test_training_claims_meet_no_others_and_linking_repeats() -> None:
    claims = [
        claim(f"Claim {i} of {s}.", pair=f"{i % 3}", split=s, subject=f"S{i % 5}", id=f"{s}{i}")
        for i in range(30)
        for s in ("train", "dev")
    ]
    linked = list(link(claims))
    assert linked == list(link(claims))
    for example in linked:
        beside = (*example.neighbors, *example.same_subject, *example.unrelated)
        assert example.prompt not in {s.prompt for s in beside}
        if example.split == "train":
            assert all(s.prompt.endswith("train.") for s in beside)
    assert any(s.prompt.endswith("train.") for e in linked if e.split == "dev" for s in e.neighbors)


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def test_variants_of_fever_symmetric_stand_beside_the_claim_they_contradict(tmp_path: Path) -> None:
    fever = write(tmp_path / "f.jsonl", [{"id": 75, "label": "SUPPORTS", "claim": "Lost is one."}])
    variants = {75: "Lost is one.", 750000002: "Lost is one.", 750000003: "Lost is two."}
    records = [
        {"id": number, "label": label, "claim": text, "evidence": "e"}
        for (number, text), label in zip(
            variants.items(), ("SUPPORTS", "REFUTES", "REFUTES"), strict=True
        )
    ]
    symmetric = write(tmp_path / "s.jsonl", [*records, records[2] | {"id": 750000004}])
    dataset = read(f"fever:{fever}{os.pathsep}{symmetric}")
    [example] = dataset
    assert [(s.prompt, s.answer) for s in example.neighbors] == [("Lost is two.", "false")]
    # What was made up to fit evidence that was made up is no fact to edit.
    assert [bad.line for bad in dataset.skipped] == [2, 4]


def test_public_claims_have_rewordings_hard_negatives_and_unrelated_claims(
    shared_data: Path,
) -> None:
    creak = read(f"fever:{shared_data / 'creak.jsonl.gz'}", split="dev")
    assert sum(bool(e.neighbors) for e in creak) > 20  # contrast pairs
    path = os.pathsep.join(str(shared_data / f"fever_{n}.jsonl.gz") for n in ("dev", "symmetric"))
    fever = read(f"fever:{path}", split="dev")
    assert all(e.paraphrases for e in fever)
    assert sum(len(e.unrelated) == 2 for e in fever) > 0.98 * len(fever)  # some names are words
    assert sum(bool(e.neighbors) for e in fever) > 10
    assert sum(bool(e.same_subject) for e in fever) > 0.9 * len(fever)
    statements = [s for e in fever for s in (*e.neighbors, *e.same_subject, *e.unrelated)]
    assert {s.answer for s in statements} == {"true", "false"}
