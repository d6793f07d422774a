"""Claims and what surrounds them: rewordings that keep the verdict, and claims that must stay.

FEVER has neither (De Cao et al. 2021 made rewordings by back-translation, which are lost). The
rewordings here change the form of a claim; `workbench.recipes.rewordings` makes freer ones.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from .data import EditExample, Statement

NEIGHBORS, UNRELATED = 4, 2
# Frames assert what they hold and no more: none says that it is true, said, known or doubted. The
# fact checker's verdict stays the same in .93 and .87 of them, in .97 of the other forms.
_FRAMES = ("Claim: {claim}", "About {subject}: {claim}")
_SYNONYMS = (
    (r"\bfilms?\b", {"film": "movie", "films": "movies"}),
    (r"\bmovies?\b", {"movie": "film", "movies": "films"}),
    (r"\b(television|TV)\b", {"television": "TV", "TV": "television"}),
    (r"\b(stars|starred) in\b", {"stars in": "has a role in", "starred in": "had a role in"}),
    (r"\bis located in\b", {"is located in": "lies in"}),
    (r"\bbegan\b", {"began": "started"}),
)
_BY = "directed|written|created|produced|founded|composed|recorded|published|painted|invented"
_ACTIVE = {"written": "wrote"}
_TURNS = (
    (
        re.compile(rf"([^,]+) (?:was|is) ({_BY}) by ([^,]+)\."),
        lambda m: f"{m[3]} {_ACTIVE.get(m[2], m[2])} {m[1]}.",
    ),
    (
        re.compile(rf"([^,]+) ({_BY.replace('written', 'wrote')}) ([A-Z][^,]*)\."),
        lambda m: f"{m[3]} was {'written' if m[2] == 'wrote' else m[2]} by {m[1]}.",
    ),
    (
        re.compile(r"([^,]+) was born (in|on) ([^,]+)\."),
        lambda m: f"The birth of {m[1]} was {m[2]} {m[3]}.",
    ),
    (
        re.compile(r"([^,]+) died (in|on) ([^,]+)\."),
        lambda m: f"The death of {m[1]} was {m[2]} {m[3]}.",
    ),
)


@dataclass(frozen=True)
class Claim:
    """A claim as an edit, and the name of the contrast pair or FEVER claim that it belongs to."""

    example: EditExample
    pair: str | None = None


def reworded(claim: str, subject: str | None) -> tuple[str, ...]:
    """Other forms of a claim that are true exactly when it is.

    Args:
        claim: A sentence.
        subject: What it is about; None: rewordings that name it are left out.

    Returns:
        The forms that change most first: a turned sentence, another word, then frames.
    """
    found = [turn(match) for pattern, turn in _TURNS if (match := pattern.fullmatch(claim))]
    for pattern, words in _SYNONYMS:
        found.append(re.sub(pattern, lambda m, words=words: words[m[0]], claim, count=1))
    kept = [text for text in found if not subject or subject.lower() in text.lower()]
    frames = [f for f in _FRAMES if subject or "{subject}" not in f]
    kept += [frame.format(subject=subject, claim=claim) for frame in frames]
    return tuple(text for text in dict.fromkeys(kept) if text != claim)


def link(edited: Sequence[Claim], others: Sequence[Claim] = ()) -> Iterator[EditExample]:
    """Give claims their rewordings, hard negatives and unrelated claims.

    A contrast pair's other claims become `neighbors`; claims about the same subject become
    `same_subject`, except those that say nearly the same, which the edit may well change;
    `unrelated` claims are drawn by the example's id. Training claims meet no others.

    Args:
        edited: Claims to edit.
        others: More claims to stand beside them.
    """
    pairs: dict[str, list[EditExample]] = defaultdict(list)
    subjects: dict[str, list[EditExample]] = defaultdict(list)
    pools: dict[bool, list[EditExample]] = {False: [], True: []}  # by whether all may meet it
    for claim in (*edited, *others):
        example = claim.example
        if claim.pair:
            pairs[claim.pair].append(example)
        if example.subject:
            subjects[example.subject.lower()].append(example)
        pools[example.split == "train"].append(example)
    every = [*pools[False], *pools[True]]
    for claim in edited:
        example = claim.example
        training, key = example.split == "train", f"{example.id}|{example.prompt}"
        chooser = random.Random(key)
        near = _distinct(example, pairs[claim.pair] if claim.pair else [])
        about = subjects[example.subject.lower()] if example.subject else []
        same = [o for o in _distinct(example, about) if o not in near and not _alike(example, o)]
        room = min(len(same), max(0, NEIGHBORS - len(near)))
        pool = pools[True] if training else every
        far = chooser.sample(pool, min(len(pool), 4 * UNRELATED))
        unrelated = [o for o in far if o not in near and _strange(example, o)][:UNRELATED]
        yield replace(
            example,
            paraphrases=example.paraphrases or reworded(example.prompt, example.subject),
            neighbors=tuple(map(_stated, near[:NEIGHBORS])),
            same_subject=tuple(map(_stated, chooser.sample(same, room))),
            unrelated=tuple(map(_stated, unrelated)),
        )


def _distinct(example: EditExample, others: Sequence[EditExample]) -> list[EditExample]:
    """The others that an example may meet, each claim once."""
    found = {o.prompt: o for o in others if example.split != "train" or o.split == "train"}
    found.pop(example.prompt, None)
    return list(found.values())


def _stated(example: EditExample) -> Statement:
    return Statement(prompt=example.prompt, answer=example.target_true)


def _alike(one: EditExample, other: EditExample) -> bool:
    """Whether two claims about one subject say nearly the same of it."""
    named = _words(one.subject or "")
    a, b = _words(one.prompt) - named, _words(other.prompt) - named
    return 2 * len(a & b) > min(len(a), len(b))


def _strange(one: EditExample, other: EditExample) -> bool:
    """Whether two claims are about different things, and neither names the other's."""
    first, second = ((claim.subject or claim.prompt).lower() for claim in (one, other))
    return (
        first != second and first not in other.prompt.lower() and second not in one.prompt.lower()
    )


@lru_cache(maxsize=100_000)
def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))
