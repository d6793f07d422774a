"""`make tables`: its recipes are valid commands, and it goes on where it was stopped."""

from __future__ import annotations

import json
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest

from workbench.__main__ import _parser
from workbench.editors import SHIPPED, editor_names
from workbench.errors import WorkbenchError
from workbench.recipes.tables import RECIPES, TRAINED, Runner, measurements, training

SHIPPED_RECIPES: dict[str, Any] = tomllib.loads(RECIPES.read_text(encoding="utf-8"))
PARTS = [part for table in SHIPPED_RECIPES["tables"] for part in table["parts"]]


@pytest.mark.parametrize("name", SHIPPED_RECIPES["editors"])
def test_each_training_is_a_command(name: str) -> None:
    command = training(SHIPPED_RECIPES, name).format(data="DATA", work="WORK")
    options = _parser().parse_args([*shlex.split(command), "--out", "DIR"])
    assert options.command == "pack" or options.editor in editor_names()


@pytest.mark.parametrize("part", PARTS, ids=[part["title"] for part in PARTS])
def test_each_measurement_is_a_command_with_a_file_of_its_own(part: dict[str, Any]) -> None:
    listed = list(measurements(part))
    assert len({measurement.name for measurement in listed}) == len(listed)
    labels = [label for measurement in listed for label in measurement.labels.values()]
    assert len(set(labels)) == len(labels) == len(part["editors"]) * len(part.get("variants", "x"))
    assert set(part.get("limits", ())) <= set(part["editors"])
    for measurement in listed:
        arguments = measurement.arguments.format(data="", work="")
        _parser().parse_args(["evaluate", *shlex.split(arguments)])
        for name in measurement.labels:
            if name.startswith(TRAINED):
                assert name.removeprefix(TRAINED) in SHIPPED_RECIPES["editors"]
            else:
                assert name in {*editor_names(), *SHIPPED}


@pytest.fixture
def recipes(tiny_model: str) -> dict[str, Any]:
    model = f"--model {tiny_model} --data facts"
    steps = "--steps 2 --batch 2 --validation 2 --limit 4 --health-after 0"
    return {
        "editors": {
            "small": f"{model} {steps} --rank 2 --blocks -1",
            "mixed": f"pack --model {tiny_model} --editor {{work}}/longer --average {{work}}/small",
            "longer": f"{model} {steps} --start {{work}}/small --seed 1",
        },
        "tables": [
            {
                "name": "small",
                "title": "A small table",
                "text": "Of a tiny model.",
                "parts": [
                    {
                        "title": "Facts",
                        "evaluate": f"{model} --split dev --limit 3",
                        "editors": ["ft", "@small"],
                        "limits": {"ft": 2},
                        "variants": {"alone": "", "two": "--at-once 2"},
                    }
                ],
            }
        ],
    }


def test_a_table_goes_on_where_it_was(
    recipes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (table,) = recipes["tables"]
    runner = Runner(recipes, tmp_path, tmp_path / "out", tmp_path / "work", None)
    ran: list[str] = []
    run = runner.run
    monkeypatch.setattr(
        runner, "run", lambda command: (ran.append(command.split()[0]), run(command))
    )
    runner.table(table)
    assert sorted(ran) == ["evaluate"] * 4 + ["train"]
    whole = (tmp_path / "out/small.md").read_text()
    found = json.loads((tmp_path / "out/small.json").read_text())["rows"]
    assert [row["row"] for row in found] == ["ft, alone", "ft, two", "small, alone", "small, two"]
    assert all(f"| {row['row']} |" in whole for row in found)
    assert [row["n"] for row in found] == [2, 2, 3, 3]

    # What is there stays; an editor that has changed is measured anew.
    recipes["editors"]["small"] += " --seed 3"
    with pytest.raises(WorkbenchError, match="remove it to train it again"):
        runner.table(table)
    shutil.rmtree(tmp_path / "work/small")
    ran.clear()
    runner.table(table)
    assert ran.count("train") == 1
    again = json.loads((tmp_path / "out/small.json").read_text())["rows"]
    assert [old == new for old, new in zip(found, again, strict=True)] == [True, True, False, False]


def test_an_editor_is_made_after_what_it_is_made_of(
    recipes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, ran = Runner(recipes, tmp_path, tmp_path / "out", tmp_path / "work", None), []
    run = runner.run
    monkeypatch.setattr(runner, "run", lambda command: (ran.append(command), run(command)))
    folder = Path(runner.editor("@mixed"))
    assert [(c.split()[0], Path(c.split()[-1]).name) for c in ran] == [
        ("train", "small"),
        ("train", "longer"),
        ("pack", "mixed"),
    ]
    assert (folder / "editor.safetensors").exists()
    assert Path(runner.editor("@mixed")) == folder
    assert len(ran) == 3
