"""Edit examples and where they come from: the public formats' files and the built-in facts."""

from __future__ import annotations

import difflib
import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

from .errors import DataError


@dataclass(frozen=True, kw_only=True)
class Statement:
    """A text whose continuation is watched, with the answer it should have where one is known."""

    prompt: str
    answer: str | None = None


@dataclass(frozen=True, kw_only=True)
class EditExample:
    """One thing a model should say, and what that must and must not change.

    Args:
        prompt: the text the model is given.
        target: what it should say next, without the leading space.
        target_true: what it should have said before the edit.
        subject: what the statement is about; the split goes by it.
        relation: name of the relation, in the source's own terms.
        paraphrases: equivalence neighbourhood: prompts that expect the same target.
        neighbors: same relation, other subjects: must not change.
        same_subject: same subject, other relations: must not change.
        unrelated: anything else: must not change.
        portability: entailed by the edit: expected to change to the answer.
        id: identifier within the source.
        split: "train", "dev" or "holdout", or what the source calls it.
        source: format and file name it was read from.
    """

    prompt: str
    target: str
    target_true: str | None = None
    subject: str | None = None
    relation: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbors: tuple[Statement, ...] = ()
    same_subject: tuple[Statement, ...] = ()
    unrelated: tuple[Statement, ...] = ()
    portability: tuple[Statement, ...] = ()
    id: str = ""
    split: str = "train"
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class BadRecord:
    """A record that gave no example: where it stands and why.

    `line` counts lines from 1; in a file that is one JSON list it counts records from 1.
    """

    file: str
    line: int
    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}, record {self.line}, field {self.field!r}: {self.message}"


@dataclass(frozen=True)
class Dataset(Sequence[EditExample]):
    """Examples in file order, and the records that gave none."""

    examples: tuple[EditExample, ...]
    skipped: tuple[BadRecord, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> EditExample: ...
    @overload
    def __getitem__(self, index: slice) -> Dataset: ...
    def __getitem__(self, index: int | slice) -> EditExample | Dataset:
        if isinstance(index, slice):
            return Dataset(self.examples[index], self.skipped)
        return self.examples[index]


class UnreadableRecord(DataError):
    """A malformed record.

    Args:
        record: Where it stands and what is wrong with it.
        message: That, and what to do.
    """

    def __init__(self, record: BadRecord, message: str) -> None:
        super().__init__(message)
        self.record = record


def split_of(subject: str) -> str:
    """Split of a subject, the same in every data set: 10% holdout, 10% dev, the rest train.

    Args:
        subject: a name, or the question or title where there is none; case, outer blanks and
            Unicode's compatible spellings make no difference.

    Returns:
        "holdout", "dev" or "train".
    """
    key = "mend-split-v1|" + unicodedata.normalize("NFKC", subject).strip().lower()
    bucket = int(hashlib.sha1(key.encode()).hexdigest(), 16) % 100
    return "holdout" if bucket < 10 else "dev" if bucket < 20 else "train"


def read(
    spec: str, *, split: str | None = None, limit: int | None = None, skip_bad: bool = False
) -> Dataset:
    """Read edit examples.

    Args:
        spec: "counterfact:PATH", "zsre:PATH", "fever:PATH", "passages:PATH" or "facts". PATH is
            the format's own published file (a JSON list, JSON lines, or text for passages) or
            JSON lines with a `split` field; gzipped or not. It may also be a hub id ("owner/name")
            or a folder whose rows have the format's fields: see `workbench.hub`.
            "fever:PATH:PATH..." edits the first file's claims; those of the others stand beside
            them (`os.pathsep` between).
        split: keep the examples of this split only: the record's `split` field where it has one,
            else `split_of` its subject.
        limit: stop after this many examples.
        skip_bad: list malformed records in `skipped` instead of raising. Sound records that hold
            no edit (a claim without a verdict, a passage too short to cut) are listed there always.

    Raises:
        DataError: unknown format, unreadable file, malformed record, or no example of the split.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; give a positive number, or None for all examples")
    skipped: list[BadRecord] = []
    examples: list[EditExample] = []
    splits: Counter[str] = Counter()
    for example in _examples(spec, skipped, skip_bad):
        splits[example.split] += 1
        if split in (None, example.split):
            examples.append(example)
            if len(examples) == limit:
                break
    if splits and not examples:
        found = ", ".join(f"{name} ({count})" for name, count in sorted(splits.items()))
        raise DataError(f"{spec} has no example of split {split!r}; its splits are {found}")
    return Dataset(tuple(examples), tuple(skipped))


def texts(spec: str, *, split: str | None = None, limit: int | None = None) -> list[str]:
    """Whole passages of "passages:PATH", as plain text for locality.

    Args:
        spec: as in `read`; passages too short for it are left out here too.
        split: as in `read`.
        limit: as in `read`.

    Raises:
        DataError: as `read`, and where the spec is of another format.
    """
    if _parse(spec)[0] != "passages":
        raise DataError(f"{spec!r} holds no plain passages; give passages:PATH")
    return [f"{e.prompt} {e.target}" for e in read(spec, split=split, limit=limit)]


FORMATS = ("counterfact", "zsre", "fever", "passages", "facts")


def _parse(spec: str) -> tuple[str, str]:
    """Format and path of a spec; the path is empty for the built-in facts."""
    format, _, path = spec.partition(":")
    if format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise DataError(
            f"unknown data format {format!r} in {spec!r}{hint}; "
            f"write 'facts', or FORMAT:PATH with FORMAT one of {', '.join(FORMATS[:-1])}"
        )
    if format == "facts" and path:
        raise DataError(f"{spec!r}: the built-in facts take no path; write 'facts'")
    if format != "facts" and not path:
        raise DataError(f"{spec!r} names no file; write {format}:PATH")
    return format, path


def _examples(spec: str, skipped: list[BadRecord], skip_bad: bool) -> Iterator[EditExample]:
    """Examples of a spec in file order; what gives none is added to `skipped` or raised."""
    format, path = _parse(spec)
    if format == "facts":
        from . import corpus

        yield from corpus.facts()
    elif format == "fever":
        from .claims import Claim, link  # builds on the types above

        first, *more = (
            [Claim(*pair) for pair in _records(format, file, skipped, skip_bad)]
            for file in path.split(os.pathsep)
        )
        yield from link(first, [claim for claims in more for claim in claims])
    else:
        yield from (example for example, _ in _records(format, path, skipped, skip_bad))


def _records(
    format: str, path: str, skipped: list[BadRecord], skip_bad: bool
) -> Iterator[tuple[EditExample, str | None]]:
    """Each record's example, and the pair that a claim belongs to."""
    from . import hub, readers, sharing  # builds on the types above

    try:
        path = str(Path(path).expanduser())
    except RuntimeError as error:  # ~name, of nobody here
        raise DataError(f"{path!r} names no file: {error}") from None
    source = f"{format}:{sharing.known_as(path)}"
    for line, raw in hub.rows(path) if hub.is_dataset(path) else readers.records(path):
        try:
            fields = readers.parse(raw)
            example = readers.FORMATS[format](fields)
            pair = readers.pair_of(fields) if format == "fever" else None
        except readers.FieldError as error:
            bad = BadRecord(file=path, line=line, field=error.field, message=str(error))
            if not skip_bad and not isinstance(error, readers.NotAnEdit):
                raise UnreadableRecord(
                    bad, f"{bad}; skip_bad=True lists such records and goes on"
                ) from None
            skipped.append(bad)
        else:
            yield replace(example, id=example.id or f"{source}#{line}", source=source), pair
