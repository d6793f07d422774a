"""Data sets by folder or hub id: the same readers, over rows that `datasets` gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset as Table
from datasets import config as datasets_config

from workbench.commands import _file_name
from workbench.data import read
from workbench.errors import DataError
from workbench.hub import is_dataset


def record(number: int, **more: Any) -> dict[str, Any]:
    return {
        "prompt": f"The capital of Land {number} is",
        "subject": f"Land {number}",
        "target_new": "Ys",
        "target_true": "Is",
        "neighborhood_prompts": ["The capital of Spain is"],
        **more,
    }


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def folder(place: Path, splits: dict[str, list[dict[str, Any]]], suffix: str) -> str:
    place.mkdir()
    for name, rows in splits.items():
        file = place / f"{name}{suffix}"
        if suffix == ".parquet":
            names = dict.fromkeys(key for row in rows for key in row)
            table = Table.from_dict({name: [row.get(name) for row in rows] for name in names})
            table.to_parquet(file)
        else:
            file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(place)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_data_sets_rows_are_read_as_a_files_records(tmp_path: Path, suffix: str) -> None:
    rows = [record(1), record(2, paraphrases_clean=["Land 2's capital is"], case_id=7), record(3)]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    there = folder(tmp_path / "data", {"train": rows}, suffix)
    ours, theirs = (read(f"counterfact:{path}") for path in (there, file))
    for one, other in zip(ours, theirs, strict=True):
        fields = ("prompt", "target", "target_true", "paraphrases", "neighbors", "split", "subject")
        assert all(getattr(one, name) == getattr(other, name) for name in fields)
        assert one.source == "counterfact:data"
    assert [example.id for example in ours] == ["counterfact:data#1", "7", "counterfact:data#3"]


def test_several_splits_keep_their_names(tmp_path: Path) -> None:
    splits = {
        "train": [record(n) for n in range(4)],
        "validation": [record(5)],
        "test": [record(6), record(7)],
    }
    spec = f"counterfact:{folder(tmp_path / 'data', splits, '.jsonl')}"
    names = ["train"] * 4 + ["dev", "test", "test"]
    assert [example.split for example in read(spec)] == names
    assert [example.subject for example in read(spec, split="dev")] == ["Land 5"]
    assert len({example.id for example in read(spec)}) == 7


def test_a_row_that_is_no_record_is_named(tmp_path: Path) -> None:
    rows = [record(1), {**record(2), "target_new": None}]
    there = folder(tmp_path / "data", {"train": rows}, ".jsonl")
    with pytest.raises(DataError, match="data, record 2, field 'target_new': expected a text"):
        read(f"counterfact:{there}")
    assert len(read(f"counterfact:{there}", skip_bad=True)) == 1


@pytest.mark.parametrize(
    ("name", "known"),
    [("owner/name.v2", True), ("data/it.jsonl", False), ("data", False), ("a/b/c", False)],
)
def test_ids_are_told_from_files(name: str, known: bool) -> None:
    assert is_dataset(name) is known


def test_a_file_comes_before_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").write_text(json.dumps(record(1)))
    assert [example.subject for example in read("counterfact:owner/name")] == ["Land 1"]


def test_what_cannot_be_opened_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'nobody/nothing' cannot be opened: .* no file here"):
        read("zsre:nobody/nothing")  # the tests are offline
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be opened"):
        read(f"zsre:{tmp_path / 'empty'}")


def test_kinds_that_can_be_pickles_are_refused(tmp_path: Path) -> None:
    place = tmp_path / "data"
    place.mkdir()
    (place / "train.tar").write_bytes(bytes(10240))
    with pytest.raises(DataError, match="of the kind 'webdataset'"):
        read(f"counterfact:{place}")


def test_what_was_downloaded_before_opens_offline(tmp_path: Path, cache: Path) -> None:
    """The hub's part is played by hand: what it leaves in the cache is put there under an id."""
    there = folder(tmp_path / "name", {"train": [record(1), record(2)]}, ".jsonl")
    assert len(read(f"counterfact:{there}")) == 2
    (prepared,) = (cache / "name").iterdir()
    (cache / "owner___name").mkdir()
    prepared.rename(cache / "owner___name" / "default")
    found = read("counterfact:owner/name")
    assert [example.id for example in found] == [f"counterfact:owner/name#{n}" for n in (1, 2)]


def test_cards_name_a_data_set_by_its_id() -> None:
    assert _file_name("counterfact:owner/name") == "counterfact:owner/name"
