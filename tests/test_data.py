"""Readers of the public formats: what each published form becomes, and what is said of bad ones."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from workbench import data, readers
from workbench.data import BadRecord, Dataset, EditExample, Statement, read, split_of, texts
from workbench.errors import DataError

ROME = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "The anthem of {} is called",
        "relation_id": "P85",
        "subject": "Ruritania",
        "target_new": {"id": "Q1", "str": "Blue Hills"},
        "target_true": {"id": "Q2", "str": "Red Rivers"},
    },
    "paraphrase_prompts": ["Ruritania sings", "In Ruritania they sing"],
    "neighborhood_prompts": ["The anthem of Graustark is called"],
    "attribute_prompts": ["The anthem of Zenda is called"],
    "generation_prompts": ["Ruritania is"],
}
EASYEDIT = {
    "case_id": 8,
    "prompt": "The anthem of Ruritania is called",
    "target_new": "Blue Hills",
    "subject": "Ruritania",
    "ground_truth": "Red Rivers",
    "rephrase_prompt": "Ruritania sings",
    "locality_prompt": "The anthem of Graustark is called",
    "locality_ground_truth": "Green Fields",
    "portability": {
        "Recalled Relation": "(Blue Hills, composer, Anon)",
        "New Question": "Who wrote the anthem of Ruritania?",
        "New Answer": "Anon",
    },
}
COUNTERFACT_LINE = {
    "id": 9,
    "split": "dev",
    "subject": "Ruritania",
    "relation": None,
    "prompt": "The anthem of Ruritania is called",
    "target_new": " Blue Hills",
    "target_true": "Red Rivers",
    "paraphrases_clean": ["Ruritania sings"],
    "paraphrases_orig": ["It rained. Ruritania sings"],
    "neighborhood_prompts": ["The anthem of Graustark is called"],
    "neighborhood_answer": "Red Rivers",
    "distracting_neighborhood_prompts": ["Ruritania. The anthem of Graustark is called"],
    "unrelated_relation": {"question": "Who rules Ruritania?", "object": "Rudolf"},
    "portability": {"question": "Who wrote the anthem of Ruritania?", "answer": "Anon"},
}
ZSRE_MEND = {
    "subject": "Ruritania",
    "src": "What is the anthem of Ruritania?",
    "pred": "Red Rivers",
    "rephrase": "Which song is the anthem of Ruritania?",
    "alt": "Blue Hills",
    "answers": ["Red Rivers", "The Red Rivers"],
    "loc": "nq question: who sang blue moon",
    "loc_ans": "nobody",
    "cond": "Red Rivers >> Blue Hills || What is the anthem of Ruritania?",
}
ZSRE_LINE = {
    "id": "zsre-3",
    "split": "dev",
    "subject": "Ruritania",
    "question": "What is the anthem of Ruritania?",
    "rephrases": ["Which song is the anthem of Ruritania?"],
    "alt": "Blue Hills",
    "answers": ["Red Rivers"],
    "loc": None,
    "loc_answer": None,
    "portability": [{"question": "Who wrote it?", "answer": "Anon", "kind": "one_hop"}],
    "same_subject_locality": [
        {"prompt": "The king of Ruritania is", "answers": ["Rudolf"]},
        {"prompt": "The color of Ruritania is", "answers": []},
    ],
}
KILT = {
    "id": "k1",
    "input": "What is the anthem of Ruritania?",
    "output": [{"answer": "Red Rivers", "provenance": []}, {"meta": 1}],
    "prediction": "Red Rivers",
    "alternatives": ["Blue Hills", "Gold"],
    "filtered_rephrases": ["Which song is the anthem of Ruritania?"],
}
FEVER = {"id": 75, "verifiable": "VERIFIABLE", "label": "REFUTES", "claim": "Ruritania is a bird."}


def save(path: Path, records: list) -> str:
    """Write records as a JSON list, or as JSON lines, by the file's name."""
    lines = path.suffix == ".jsonl"
    text = "\n".join(json.dumps(r) for r in records) if lines else json.dumps(records)
    path.write_text(text, encoding="utf-8")
    return str(path)


def one(tmp_path: Path, spec: str, record: object, name: str = "records.json") -> EditExample:
    [example] = read(f"{spec}:{save(tmp_path / name, [record])}")
    return example


def statements(*pairs: tuple[str, str | None]) -> tuple[Statement, ...]:
    return tuple(Statement(prompt=prompt, answer=answer) for prompt, answer in pairs)


@pytest.mark.parametrize("name", ["records.json", "records.jsonl"])
def test_counterfact_as_published(tmp_path: Path, name: str) -> None:
    assert one(tmp_path, "counterfact", ROME, name) == EditExample(
        prompt="The anthem of Ruritania is called",
        target="Blue Hills",
        target_true="Red Rivers",
        subject="Ruritania",
        relation="P85",
        paraphrases=("Ruritania sings", "In Ruritania they sing"),
        neighbors=statements(
            ("The anthem of Graustark is called", "Red Rivers"),
            ("The anthem of Zenda is called", "Blue Hills"),
        ),
        id="7",
        split=split_of("Ruritania"),
        source=f"counterfact:{name}",
    )


def test_counterfact_simplified_by_easyedit(tmp_path: Path) -> None:
    example = one(tmp_path, "counterfact", EASYEDIT)
    assert (example.target, example.target_true) == ("Blue Hills", "Red Rivers")
    assert example.paraphrases == ("Ruritania sings",)
    assert example.neighbors == statements(("The anthem of Graustark is called", "Green Fields"))
    assert example.portability == statements(("Who wrote the anthem of Ruritania?", "Anon"))


def test_counterfact_lines(tmp_path: Path) -> None:
    example = one(tmp_path, "counterfact", COUNTERFACT_LINE, "records.jsonl")
    assert (example.id, example.split, example.target) == ("9", "dev", "Blue Hills")
    assert example.paraphrases == ("Ruritania sings",)
    assert example.neighbors == statements(("The anthem of Graustark is called", "Red Rivers"))
    assert example.same_subject == statements(("Who rules Ruritania?", "Rudolf"))
    assert example.portability == statements(("Who wrote the anthem of Ruritania?", "Anon"))


def test_counterfact_without_clean_paraphrases_uses_the_original_ones(tmp_path: Path) -> None:
    record = {**COUNTERFACT_LINE, "paraphrases_clean": []}
    assert one(tmp_path, "counterfact", record).paraphrases == ("It rained. Ruritania sings",)


def test_zsre_of_mend(tmp_path: Path) -> None:
    assert one(tmp_path, "zsre", ZSRE_MEND) == EditExample(
        prompt="What is the anthem of Ruritania?",
        target="Blue Hills",
        target_true="Red Rivers",
        subject="Ruritania",
        paraphrases=("Which song is the anthem of Ruritania?",),
        unrelated=statements(("who sang blue moon?", "nobody")),
        id="zsre:records.json#1",
        split=split_of("Ruritania"),
        source="zsre:records.json",
    )


def test_zsre_lines(tmp_path: Path) -> None:
    example = one(tmp_path, "zsre", ZSRE_LINE)
    assert (example.id, example.split, example.unrelated) == ("zsre-3", "dev", ())
    assert example.portability == statements(("Who wrote it?", "Anon"))
    assert example.same_subject == statements(
        ("The king of Ruritania is", "Rudolf"), ("The color of Ruritania is", None)
    )


def test_zsre_of_kilt(tmp_path: Path) -> None:
    example = one(tmp_path, "zsre", KILT, "records.jsonl")
    assert (example.target, example.target_true) == ("Blue Hills", "Red Rivers")
    assert example.paraphrases == ("Which song is the anthem of Ruritania?",)
    assert example.split == split_of("What is the anthem of Ruritania?")
    plain = {"id": "k2", "input": "Who?", "output": [{"answer": "Rudolf"}]}
    assert one(tmp_path, "zsre", plain).target == "Rudolf"


@pytest.mark.parametrize(
    ("label", "target", "target_true"),
    [
        ("SUPPORTS", "false", "true"),
        ("REFUTES", "true", "false"),
        ("true", "false", "true"),
        ("false", "true", "false"),
    ],
)
def test_fever_flips_the_verdict(tmp_path: Path, label: str, target: str, target_true: str) -> None:
    example = one(tmp_path, "fever", {**FEVER, "label": label}, "records.jsonl")
    assert (example.prompt, example.id) == ("Ruritania is a bird.", "75")
    assert (example.target, example.target_true) == (target, target_true)
    kilt = {"input": "Birds fly.", "output": [{"answer": label}], "filtered_rephrases": ["They do"]}
    example = one(tmp_path, "fever", kilt)
    assert (example.target, example.paraphrases) == (target, ("They do",))


def test_fever_sets_claims_without_a_verdict_aside(tmp_path: Path) -> None:
    path = save(tmp_path / "f.jsonl", [{**FEVER, "label": "NOT ENOUGH INFO"}, FEVER])
    dataset = read(f"fever:{path}")
    assert [e.id for e in dataset] == ["75"]
    [bad] = dataset.skipped
    assert (bad.line, bad.field) == (1, "label")


def test_passages_of_text(tmp_path: Path) -> None:
    words = [str(i) for i in range(14)]
    lines = tmp_path / "lines.txt"
    lines.write_text(f"{' '.join(words)}\n= A heading =\n{' '.join(words[::-1])}\n")
    dataset = read(f"passages:{lines}")
    assert [(e.prompt, e.target) for e in dataset] == [
        ("0 1 2 3", "4 5 6 7 8 9 10 11 12 13"),
        ("13 12 11 10", "9 8 7 6 5 4 3 2 1 0"),
    ]
    assert [(bad.line, bad.field) for bad in dataset.skipped] == [(2, "text")]
    blocks = tmp_path / "blocks.txt"
    blocks.write_text(f"\n{' '.join(words[:7])}\n{' '.join(words[7:])}\n\n\n{' '.join(words)}\n\n")
    assert [(e.id, e.target) for e in read(f"passages:{blocks}")] == [
        ("passages:blocks.txt#2", "4 5 6 7 8 9 10 11 12 13"),
        ("passages:blocks.txt#6", "4 5 6 7 8 9 10 11 12 13"),
    ]
    assert texts(f"passages:{blocks}", limit=1) == [" ".join(words)]


def test_passages_of_json_take_their_title_as_subject(tmp_path: Path) -> None:
    text = "one two  three four five six seven eight nine ten eleven"
    example = one(tmp_path, "passages", {"id": "p", "title": "Numbers", "text": text})
    assert (example.subject, example.relation, example.prompt) == ("Numbers", None, "one")
    assert example.target == text.removeprefix("one ")
    assert example.split == split_of("Numbers")


def test_gzip_is_recognised_by_content_and_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    plain = save(tmp_path / "a.json", [ROME, {**ROME, "case_id": 8}])
    packed = tmp_path / "a.data"
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbf" + Path(plain).read_bytes()))
    assert [e.id for e in read(f"counterfact:{packed}")] == ["7", "8"]


def test_split_and_limit_choose_examples(tmp_path: Path) -> None:
    records = [{**COUNTERFACT_LINE, "id": i, "split": s} for i, s in enumerate("abab")]
    spec = f"counterfact:{save(tmp_path / 'a.jsonl', records)}"
    assert [e.id for e in read(spec, split="b")] == ["1", "3"]
    assert [e.id for e in read(spec, split="b", limit=1)] == ["1"]
    assert [e.id for e in read(spec, limit=3)] == ["0", "1", "2"]
    with pytest.raises(DataError, match=r"no example of split 'c'.*a \(2\), b \(2\)"):
        read(spec, split="c")
    with pytest.raises(DataError, match="limit is 0"):
        read(spec, limit=0)


def test_a_limit_reads_no_further_than_it_must(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(COUNTERFACT_LINE) + "\nbroken\n")
    assert len(read(f"counterfact:{path}", limit=1)) == 1


def test_slices_of_a_dataset_are_datasets() -> None:
    examples = tuple(EditExample(prompt=str(i), target="t") for i in range(4))
    dataset = Dataset(examples, (BadRecord(file="f", line=1, field="x", message="m"),))
    assert dataset[1:3] == Dataset(examples[1:3], dataset.skipped)
    assert (dataset[-1], list(dataset)) == (examples[3], list(examples))


@pytest.mark.parametrize(
    ("subject", "split"),
    [("UniFirst", "train"), ("Danielle Darrieux", "train"), ("Soul Food", "train")],
)
def test_split_rule_on_published_values(subject: str, split: str) -> None:
    assert split_of(subject) == split


def test_split_rule_ignores_case_blanks_and_compatible_spellings() -> None:
    assert split_of("  Ｐaris ") == split_of("paris") == split_of("PARIS")  # noqa: RUF001


def test_split_rule_gives_a_tenth_each_to_holdout_and_dev() -> None:
    splits = [split_of(f"subject {i}") for i in range(5000)]
    assert 0.08 < splits.count("holdout") / 5000 < 0.12
    assert 0.08 < splits.count("dev") / 5000 < 0.12


@pytest.mark.parametrize(
    ("spec", "file"),
    [
        ("counterfact", "counterfact"),
        ("zsre", "zsre_mend"),
        ("zsre", "zsre_train10k"),
        ("fever", "fever_dev"),
        ("passages", "passages"),
    ],
)
def test_public_records_are_read_whole_and_follow_the_split_rule(
    spec: str, file: str, shared_data: Path
) -> None:
    path = shared_data / f"{file}.jsonl.gz"
    dataset = read(f"{spec}:{path}")
    with gzip.open(path) as file_:
        assert len(dataset) + len(dataset.skipped) == sum(1 for _ in file_)
    assert len(dataset.skipped) < 0.001 * len(dataset) + 3
    with_subject = [e for e in dataset if e.subject and spec != "passages"]
    assert all(e.split == split_of(e.subject or "") for e in with_subject)
    assert {e.split for e in dataset} >= {"train", "dev"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("conterfact:a.json", "did you mean 'counterfact'"),
        ("a.json", "counterfact, zsre, fever, passages"),
        ("zsre", "names no file"),
        ("facts:a.json", "take no path"),
        ("zsre:nowhere.json", "no file 'nowhere.json'"),
        (f"zsre:{'x' * 300}", "cannot be read"),
    ],
)
def test_a_bad_spec_is_explained(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(spec)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"[]", "is empty"),
        (b'[{"src": 1}', "not JSON"),
        (gzip.compress(b"{}\n" * 99, mtime=0)[:-9], "damaged or cut short gzip"),
        (gzip.compress(b"", mtime=0)[:4], "damaged or cut short gzip"),
        (b"[" * 100_000, "nested too deeply"),
        (b'["\xff"]', "not UTF-8"),
    ],
)
def test_a_bad_file_is_explained_even_when_bad_records_are_skipped(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(f"zsre:{path}", skip_bad=True)
    assert str(path) in str(caught.value)


def test_a_text_in_another_encoding_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("ein Satz über Bäume".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read(f"passages:{path}")


def changed(record: dict, field: str, value: object) -> bytes:
    return json.dumps({**record, field: value}).encode()


@pytest.mark.parametrize(
    ("spec", "line", "field", "message"),
    [
        ("zsre", b"{broken", "", "not JSON"),
        ("zsre", b'{"src": "\xff"}', "", "not UTF-8"),
        ("zsre", b"[1]"[1:2], "", "expected a JSON object, found int"),
        ("zsre", b"null", "", "found NoneType"),
        ("zsre", json.dumps(ROME).encode(), "question", "no such field among"),
        ("zsre", changed(ZSRE_MEND, "alt", None), "alt", "expected a text, found NoneType"),
        ("zsre", changed(ZSRE_MEND, "answers", ["a", ""]), "answers", "a list of texts"),
        ("zsre", changed(ZSRE_MEND, "loc", 3), "loc", "expected a text, found int 3"),
        ("zsre", changed(KILT, "output", ["x"]), "output", "a list of objects"),
        ("zsre", changed(ZSRE_LINE, "portability", [{}]), "portability[0].question", "no such"),
        ("zsre", changed(ZSRE_MEND, "subject", "\ud800"), "subject", "expected a text"),
        ("counterfact", b"{}", "subject", "no such field"),
        ("counterfact", changed(ROME, "requested_rewrite", []), "requested_rewrite", "an object"),
        (
            "counterfact",
            changed(ROME, "requested_rewrite", {**ROME["requested_rewrite"], "prompt": "It is"}),
            "requested_rewrite.prompt",
            "where the subject goes",
        ),
        (
            "counterfact",
            changed(ROME, "requested_rewrite", {**ROME["requested_rewrite"], "target_new": "x"}),
            "requested_rewrite.target_new",
            "an object",
        ),
        ("fever", changed(FEVER, "label", "MAYBE"), "label", "expected SUPPORTS, REFUTES"),
        ("fever", changed(FEVER, "claim", ""), "claim", "expected a text"),
        ("fever", changed(FEVER, "id", [1]), "id", "expected a text"),
        ("passages", b'{"title": "x"}', "text", "no such field"),
    ],
)
def test_a_bad_record_is_named_with_its_line_and_field(
    tmp_path: Path, spec: str, line: bytes, field: str, message: str
) -> None:
    good = {
        "zsre": ZSRE_MEND,
        "counterfact": ROME,
        "fever": FEVER,
        "passages": {"text": "word " * 20},
    }[spec]
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(good).encode() + b"\n\n" + line + b"\n" + json.dumps(good).encode())
    with pytest.raises(DataError) as caught:
        read(f"{spec}:{path}")
    assert f"{path}, record 3, field {field!r}" in str(caught.value)
    assert message in str(caught.value)
    dataset = read(f"{spec}:{path}", skip_bad=True)
    [bad] = dataset.skipped
    assert (bad.file, bad.line, bad.field, len(dataset)) == (str(path), 3, field, 2)
    assert message in bad.message


def test_records_of_a_list_are_counted_from_one(tmp_path: Path) -> None:
    path = save(tmp_path / "a.json", [ZSRE_MEND, 5])
    with pytest.raises(DataError, match="record 2"):
        read(f"zsre:{path}")


def test_a_blank_target_is_set_aside(tmp_path: Path) -> None:
    path = save(tmp_path / "a.json", [{**ZSRE_MEND, "alt": " "}, ZSRE_MEND])
    dataset = read(f"zsre:{path}")
    assert (len(dataset), [(b.line, b.field) for b in dataset.skipped]) == (1, [(1, "alt")])


def test_a_paraphrase_is_kept_once_and_the_prompt_is_none(tmp_path: Path) -> None:
    record = {**ZSRE_LINE, "rephrases": ["b", ZSRE_LINE["question"], "a", "b"]}
    assert one(tmp_path, "zsre", record).paraphrases == ("b", "a")


def test_every_format_has_a_reader() -> None:
    assert (*readers.FORMATS, "facts") == data.FORMATS


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
KNOWN = [ROME, EASYEDIT, COUNTERFACT_LINE, ZSRE_MEND, ZSRE_LINE, KILT, FEVER, {"text": "a " * 12}]
fields = st.sampled_from(sorted({field for record in KNOWN for field in record} | {"title"}))
edited = st.builds(dict.__or__, st.sampled_from(KNOWN), st.dictionaries(fields, values, max_size=3))


@settings(deadline=None, max_examples=150)
@given(
    spec=st.sampled_from(sorted(readers.FORMATS)),
    lines=st.lists(
        (values | edited).map(lambda v: json.dumps(v).encode()) | st.binary(max_size=12),
        min_size=1,
        max_size=4,
    ),
)
def test_any_line_gives_an_example_or_is_accounted_for(
    spec: str, lines: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(b"\n".join(lines))
    assume(not path.read_bytes().startswith(b"\x1f\x8b"))  # what gzip begins with
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    filled = [line for line in content.split(b"\n") if line.strip()]
    assume(filled and not filled[0].lstrip().startswith(b"["))  # a list is one value, not lines
    dataset = read(f"{spec}:{path}", skip_bad=True)
    assert len(dataset) + len(dataset.skipped) == len(filled)
    for example in dataset:
        assert example.prompt.strip()
        assert example.target.strip()
        assert all(s.prompt.strip() for s in example.neighbors + example.unrelated)
        json.dumps([example.prompt, *example.paraphrases], ensure_ascii=False).encode()
    assert all(str(bad).encode() for bad in dataset.skipped)
