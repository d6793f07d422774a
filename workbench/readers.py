"""The public data formats: from a file to records, and from a record to an edit example."""

from __future__ import annotations

import gzip
import json
import re
import reprlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

from .data import EditExample, Statement, split_of
from .errors import DataError


class FieldError(Exception):
    """A record cannot be used: the field that is wrong, and what was found and expected."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


class NotAnEdit(FieldError):
    """A sound record from which no edit can be made."""


def records(path: str) -> Iterator[tuple[int, object]]:
    """Records of a file with their line, or their place in the file's one JSON list, from 1.

    Args:
        path: a JSON list, JSON lines or, if named .txt, passages: one a line, or runs of lines
            between blank lines where there are any. Gzip is recognised by content.

    Yields:
        Raw lines of JSON lines (see `parse`); values of a JSON list; {"text": ...} of a passage.

    Raises:
        DataError: the file cannot be read, is empty, or is neither form.
    """
    try:
        with _open(path) as file:
            empty = True
            for place in _passages(file) if _is_text(path) else _json(file):
                empty = False
                yield place
            if empty:
                raise DataError(f"{path} is empty; expected at least one record")
    except FileNotFoundError:
        raise DataError(f"there is no file {path!r}; give the path of a data file") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged or cut short gzip: {error}; fetch it again") from None
    except FieldError as error:
        raise DataError(f"{path}: {error}") from None
    except ValueError as error:  # a zero byte, or half of a surrogate pair
        raise DataError(f"{path!r} can be no file's name: {error}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def parse(raw: object) -> Fields:
    """Fields of one record: a line of JSON, or a value already parsed.

    Raises:
        FieldError: not UTF-8, not JSON, or not an object.
    """
    value = _loads(raw) if isinstance(raw, bytes) else raw
    if not isinstance(value, dict):
        raise FieldError("", f"expected a JSON object, found {_shown(value)}")
    return Fields(value)


class Fields:
    """Checked access to the fields of a record; `name` is where it stands in the whole one."""

    def __init__(self, values: dict[str, Any], name: str = ""):
        self.values = values
        self.name = name

    def __contains__(self, field: str) -> bool:
        return self.values.get(field) is not None

    def error(self, field: str, expected: str) -> FieldError:
        if field in self.values:
            found = _shown(self.values[field])
        else:
            found = f"no such field among {_shown(list(self.values)[:12])}"
        return FieldError(self.name + field, f"expected {expected}, found {found}")

    def maybe(self, field: str) -> str | None:
        """A text without its outer blanks; None where it is absent, null or blank."""
        value = self.values.get(field)
        if value is None:
            return None
        if not _is_utf8(value):
            raise self.error(field, "a text")
        return value.strip() or None

    def text(self, field: str) -> str:
        """A text that must be there."""
        value = self.maybe(field)
        if value is None:
            raise self.error(field, "a text")
        return value

    def target(self, field: str) -> str:
        """What the edit should say; a blank one makes the record no edit."""
        value = self.maybe(field)
        if value is None and field in self:
            raise NotAnEdit(self.name + field, "the edit's target is blank")
        return value or self.text(field)

    def texts(self, field: str) -> tuple[str, ...]:
        """A list of texts, or a single one; empty where it is absent, null or blank."""
        value = self.values.get(field)
        if value is None or isinstance(value, str):
            value = self.maybe(field)
            return (value,) if value else ()
        if not isinstance(value, list) or not all(_is_utf8(v) and v.strip() for v in value):
            raise self.error(field, "a list of texts")
        return tuple(v.strip() for v in value)

    def children(self, field: str) -> list[Fields]:
        """A list of objects, or a single one; empty where it is absent or null."""
        value = self.values.get(field)
        if isinstance(value, dict):
            return [self.child(field)]
        items = [] if value is None else value
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise self.error(field, "an object or a list of objects")
        return [Fields(item, f"{self.name}{field}[{i}].") for i, item in enumerate(items)]

    def child(self, field: str) -> Fields:
        """An object that must be there."""
        value = self.values.get(field)
        if not isinstance(value, dict):
            raise self.error(field, "an object")
        return Fields(value, f"{self.name}{field}.")


def counterfact(record: Fields) -> EditExample:
    """CounterFact (Meng et al. 2022): as published, as EasyEdit simplifies it, or JSON lines."""
    neighbors = record.texts("neighborhood_prompts")
    paraphrases = record.texts("paraphrase_prompts")
    if "requested_rewrite" in record:
        rewrite = record.child("requested_rewrite")
        target = rewrite.child("target_new").target("str")
        target_true = rewrite.child("target_true").text("str")
        subject, template = rewrite.text("subject"), rewrite.text("prompt")
        if "{}" not in template:
            raise rewrite.error("prompt", "a text with {} where the subject goes")
        prompt = template.replace("{}", subject)
        relation = rewrite.maybe("relation_id")
    else:
        subject, prompt = record.text("subject"), record.text("prompt")
        target, relation = record.target("target_new"), record.maybe("relation")
        if "ground_truth" in record:
            target_true = record.text("ground_truth")
            paraphrases = record.texts("rephrase_prompt")
            neighbors = record.texts("locality_prompt")
        else:
            target_true = record.text("target_true")
            paraphrases = record.texts("paraphrases_clean") or record.texts("paraphrases_orig")
    neighbor_answer = (
        record.maybe("neighborhood_answer") or record.maybe("locality_ground_truth") or target_true
    )
    return _example(
        record,
        prompt=prompt,
        target=target,
        target_true=target_true,
        subject=subject,
        relation=relation,
        paraphrases=paraphrases,
        neighbors=(
            *(Statement(prompt=p, answer=neighbor_answer) for p in neighbors),
            # Prompts about other subjects of which the new target is already true.
            *(Statement(prompt=p, answer=target) for p in record.texts("attribute_prompts")),
        ),
        same_subject=tuple(
            Statement(prompt=other.text("question"), answer=other.maybe("object"))
            for other in record.children("unrelated_relation")
        ),
    )


def zsre(record: Fields) -> EditExample:
    """zsRE question answering: MEND's and EasyEdit's form, KILT's and De Cao's, or JSON lines."""
    if "input" in record:
        question, answers, paraphrases = _kilt(record)
        target = record.texts("alternatives")[:1] or answers[:1]
    else:
        question = record.text("src" if "src" in record else "question")
        answers = record.texts("answers")
        paraphrases = record.texts("rephrase") or record.texts("rephrases")
        target = (record.target("alt"),)
    if not target:
        raise NotAnEdit("output", "no answer to edit to")
    # Locality questions come as "nq question: who ...", lower-case and without a question mark.
    loc = (record.maybe("loc") or "").removeprefix("nq question:").strip().rstrip("?")
    loc_answer = record.maybe("loc_ans") or record.maybe("loc_answer")
    return _example(
        record,
        prompt=question,
        target=target[0],
        target_true=answers[0] if answers else None,
        subject=record.maybe("subject"),
        paraphrases=paraphrases,
        unrelated=(Statement(prompt=loc + "?", answer=loc_answer),) if loc else (),
        same_subject=tuple(
            Statement(prompt=other.text("prompt"), answer=next(iter(other.texts("answers")), None))
            for other in record.children("same_subject_locality")
        ),
    )


def fever(record: Fields) -> EditExample:
    """FEVER claims, as published, in KILT's or De Cao's form, or JSON lines: the verdict flips."""
    if "input" in record:
        claim, answers, paraphrases = _kilt(record)
        label, field = (answers or ("",))[0], "output"
    else:
        claim, paraphrases = record.text("claim"), record.texts("rephrases")
        label, field = record.text("label"), "label"
    if (match := _SYMMETRIC.fullmatch(_number(record))) and match[2] != "3":
        raise NotAnEdit("evidence", "the verdict follows from evidence made up for it")
    if label.upper() == "NOT ENOUGH INFO":
        raise NotAnEdit(field, "the claim has no verdict to flip (NOT ENOUGH INFO)")
    verdicts = {"SUPPORTS": "true", "TRUE": "true", "REFUTES": "false", "FALSE": "false"}
    verdict = verdicts.get(label.upper())
    if verdict is None:
        raise FieldError(
            record.name + field,
            f"expected SUPPORTS, REFUTES, NOT ENOUGH INFO, true or false, found {_shown(label)}",
        )
    return _example(
        record,
        prompt=claim,
        target="false" if verdict == "true" else "true",
        target_true=verdict,
        subject=record.maybe("subject"),
        paraphrases=paraphrases,
    )


# Fever-Symmetric (Schuster et al. 2019) numbers a claim's three variants after FEVER's number:
# 2 and 4 stand beside evidence that was made up, 3 contradicts the claim of that number.
_SYMMETRIC = re.compile(r"(?:\w+-)?(\d+?)000000([234])")


def pair_of(record: Fields) -> str | None:
    """What a claim and its hard negatives share: a contrast pair's name, or FEVER's number."""
    if "pair_id" in record:
        return record.text("pair_id")
    number = _number(record)
    match = _SYMMETRIC.fullmatch(number)
    return match[1] if match else number.rpartition("-")[2] or None


def _number(record: Fields) -> str:
    return str(record.values.get("id") or "")


CUT = 10  # words of a passage that are its target, as in the paper's Wikitext generation task


def passage(record: Fields) -> EditExample:
    """A passage, cut before its last ten words (Mitchell et al. 2022, section 5)."""
    text = record.text("text")
    head, *tail = text.rsplit(maxsplit=CUT)
    if len(tail) < CUT:
        raise NotAnEdit("text", f"a passage of {len(tail) + 1} words; needs more than {CUT}")
    return _example(
        record,
        prompt=head,
        target=text[len(head) :].strip(),
        subject=record.maybe("title"),
        split_key=record.maybe("title") or text[:80],
    )


FORMATS: dict[str, Callable[[Fields], EditExample]] = {
    "counterfact": counterfact,
    "zsre": zsre,
    "fever": fever,
    "passages": passage,
}


def _example(
    record: Fields,
    *,
    prompt: str,
    paraphrases: tuple[str, ...] = (),
    split_key: str | None = None,
    **fields: Any,
) -> EditExample:
    """Example with the fields that all formats share."""
    name = "case_id" if "case_id" in record else "id"
    number = record.values.get(name)
    return EditExample(
        prompt=prompt,
        paraphrases=tuple(p for p in dict.fromkeys(paraphrases) if p != prompt),
        portability=tuple(
            Statement(
                prompt=hop.text("New Question" if "New Question" in hop else "question"),
                answer=hop.text("New Answer" if "New Answer" in hop else "answer"),
            )
            for hop in record.children("portability")
        ),
        id=str(number) if isinstance(number, int) else record.maybe(name) or "",
        split=record.maybe("split") or split_of(split_key or fields.get("subject") or prompt),
        **fields,
    )


def _kilt(record: Fields) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Input, answers and rephrases of a KILT record, with De Cao's additions."""
    answers = tuple(o.text("answer") for o in record.children("output") if "answer" in o)
    return record.text("input"), answers, record.texts("filtered_rephrases")


def _open(path: str) -> BinaryIO:
    with open(path, "rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, gzip.open(path) if gzipped else open(path, "rb"))


def _is_text(path: str) -> bool:
    return path.lower().removesuffix(".gz").endswith(".txt")


def _json(file: BinaryIO) -> Iterator[tuple[int, object]]:
    """Values of a JSON list, or the lines of JSON lines that are not blank."""
    first = True
    for number, line in enumerate(file, 1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not line.strip():
            continue
        if first and line.lstrip().startswith(b"["):
            yield from enumerate(cast(list[object], _loads(line + file.read())), 1)
            return
        first = False
        yield number, line


def _passages(file: BinaryIO) -> Iterator[tuple[int, object]]:
    """Passages of a text with the line they begin at."""
    try:
        lines = file.read().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise FieldError("", f"not UTF-8 text: {error.reason} at byte {error.start}") from None
    while lines and not lines[-1].strip():
        lines.pop()
    if all(line.strip() for line in lines):
        yield from ((number, {"text": line}) for number, line in enumerate(lines, 1))
        return
    start, block = 1, []
    for number, line in enumerate([*lines, ""], 1):
        if line.strip():
            block.append(line.strip())
        else:
            if block:
                yield start, {"text": " ".join(block)}
            start, block = number + 1, []


def _loads(raw: bytes) -> object:
    try:
        return json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise FieldError("", f"not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise FieldError("", "JSON nested too deeply to be a record") from None
    except ValueError as error:
        raise FieldError(
            "", f"not JSON ({error}); expected a JSON list, or one JSON object a line"
        ) from None


def _is_utf8(value: object) -> bool:
    """Whether it is a text that can be written: JSON may hold halves of surrogate pairs."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _shown(value: object) -> str:
    """A value cut to a few dozen characters; halves of surrogate pairs cannot be printed."""
    shown = f"{type(value).__name__} {reprlib.repr(value)}"
    return shown.encode("utf-8", "backslashreplace").decode()
