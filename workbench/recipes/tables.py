"""`make tables`: train what is to be compared, evaluate it, and write the tables of results.

`tables.toml` lists them. Each variant of a table's part is one `python -m workbench evaluate`
command and each trained editor one `python -m workbench train` command, run as a user would run
them; what is finished is kept, so that a run that was stopped goes on where it was, and an editor
that has changed is measured anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.__main__ import main as workbench
from workbench.errors import WorkbenchError
from workbench.files import write_text

RECIPES = Path(__file__).with_suffix(".toml")
MEASURES = (
    "edit_success",
    "paraphrase_success",
    "neighborhood_kept",
    "neighborhood_score",
    "other_subjects_kept",
    "other_relations_kept",
    "unrelated_kept",
    "drawdown",
)
TRAINED = "@"


@dataclass(frozen=True)
class Measurement:
    """One `evaluate` command: editors on the same examples, and the rows that they make.

    Args:
        labels: Editor -> its row's name; editors marked TRAINED are of the recipes.
        arguments: Of `python -m workbench evaluate`, without editors and output.
        name: Of the file of its results: other arguments are another file.
    """

    labels: Mapping[str, str]
    arguments: str
    name: str


def measurements(part: Mapping[str, Any], limit: int | None = None) -> Iterator[Measurement]:
    """What a part of a table takes: its editors in every variant, by number of examples.

    Args:
        part: Of a table of the recipes.
        limit: Most examples, instead of the recipes' own.
    """
    fewer = part.get("limits", {})
    for variant, more in part.get("variants", {"": ""}).items():
        groups: dict[int | None, list[str]] = {}
        for editor in part["editors"]:
            groups.setdefault(limit or fewer.get(editor), []).append(editor)
        for most, editors in groups.items():
            few = f"--limit {most}" if most else ""
            arguments = " ".join(filter(None, (part["evaluate"], more, few)))
            names = {editor: editor.removeprefix(TRAINED) for editor in editors}
            labels = {e: f"{n}, {variant}" if variant else n for e, n in names.items()}
            key = hashlib.sha1(arguments.encode()).hexdigest()[:8]
            title = "".join(c if c.isalnum() else "-" for c in f"{part['title']} {variant}".lower())
            yield Measurement(labels, arguments, f"{title[:40].strip('-')}-{key}.json")


def expand(recipes: Mapping[str, Any], name: str, kind: str = "editors") -> str:
    """An editor's training arguments, or those of its scope (`kind` "scopes"; empty for none), with
    what `[common]` has of them; folders stay names."""
    known = {"data": "{data}", "work": "{work}"}
    for word, text in recipes.get("common", {}).items():
        known[word] = text.format(**known)
    return recipes.get(kind, {}).get(name, "").format(**known)


def training(recipes: Mapping[str, Any], name: str) -> str:
    """The command that makes an editor: `train`, or `pack` where it is an average of others."""
    arguments = expand(recipes, name)
    return arguments if arguments.startswith("pack ") else f"train --resume {arguments}"


class Runner:
    """Runs the commands that are missing.

    Args:
        recipes: The contents of `tables.toml`.
        data: Folder of the data sets that the commands name as `{data}`.
        out: Receives the tables and, in `rows`, what each command wrote.
        work: Receives the trained editors.
        limit: Most examples of each evaluation, instead of the recipes' own; for a try.
    """

    def __init__(
        self, recipes: Mapping[str, Any], data: Path, out: Path, work: Path, limit: int | None
    ) -> None:
        self.recipes, self.data, self.out, self.work = recipes, data, out, work
        self.limit = limit

    def table(self, table: Mapping[str, Any]) -> None:
        """Bring a table up to date, writing it anew after every command."""
        for part in table["parts"]:
            for measurement in measurements(part, self.limit):
                self.measure(measurement)
                self.write(table)

    def measure(self, measurement: Measurement) -> None:
        """Run a command, after training its editors if need be; what it has measured is kept."""
        editors = ",".join(self.editor(name) for name in measurement.labels)
        file = self.out / "rows" / measurement.name
        self.run(f"evaluate {measurement.arguments} --editors {editors} --json {file} --resume")

    def editor(self, name: str) -> str:
        """What the evaluate command calls an editor: a name, or a trained editor's folder."""
        if not name.startswith(TRAINED):
            return name
        name = name.removeprefix(TRAINED)
        folder = self.work / name
        arguments, marker = expand(self.recipes, name), folder / "finished"
        scope = expand(self.recipes, name, "scopes")
        whole = f"{arguments} scope {scope}" if scope else arguments
        if not marker.exists():
            for other in self.recipes["editors"]:  # that it is trained on from, or made of
                if f" {{work}}/{other} " in f" {arguments} ":
                    self.editor(TRAINED + other)
            self.run(f"{training(self.recipes, name)} --out {folder}")
            if scope:
                self.run(f"scope --editor {folder} {scope} --out {folder}")
            write_text(marker, whole + "\n")
        elif marker.read_text().strip() != whole:
            raise WorkbenchError(
                f"{folder} was trained with other arguments than the recipe's: remove it to train "
                f"it again."
            )
        return str(folder)

    def run(self, command: str) -> None:
        """Run one command of the workbench in this process."""
        command = command.format(data=self.data, work=self.work)
        print(f"$ python -m workbench {command}", flush=True)
        if status := workbench(shlex.split(command)):
            raise SystemExit(status)

    def write(self, table: Mapping[str, Any]) -> None:
        """Write a table's Markdown and JSON from what has been measured."""
        lines, found = [f"# {table['title']}", "", table["text"].strip(), ""], []
        for part in table["parts"]:
            measured = list(self.rows(part))
            shown = _markdown(measured) if measured else ["Not measured yet."]
            lines += [f"## {part['title']}", "", *shown, "", _command(part), ""]
            found += [{"part": part["title"], **row} for row in measured]
        write_text(self.out / f"{table['name']}.md", "\n".join(lines))
        whole = {"title": table["title"], "rows": found}
        write_text(self.out / f"{table['name']}.json", json.dumps(whole, indent=1) + "\n")

    def rows(self, part: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """What has been measured of a part, in the order of its editors."""
        found: dict[tuple[int, int], dict[str, Any]] = {}
        for place, measurement in enumerate(measurements(part, self.limit)):
            file = self.out / "rows" / measurement.name
            results = json.loads(file.read_text()) if file.exists() else {"editors": {}}
            named = {Path(name).name: scores for name, scores in results["editors"].items()}
            for editor, label in measurement.labels.items():
                if scores := named.get(editor.removeprefix(TRAINED)):
                    found[part["editors"].index(editor), place] = {
                        "row": label,
                        "arguments": measurement.arguments,
                        **scores,
                    }
        yield from (found[key] for key in sorted(found))


def _markdown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [name for name in MEASURES if any(name in row for row in rows)]
    head = ["editor", *names, "s/edit", "n"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        half = row["confidence_95"]
        cells = [f"{row[n]:.3f} ± {half[n]:.3f}" if n in row else "-" for n in names]
        cells = [row["row"], *cells, f"{row['seconds_per_edit']:.2f}", str(row["n"])]
        lines.append(f"| {' | '.join(cells)} |")
    # Editors on fewer examples, and ENN's own base, have another score before any edit.
    most = max(rows, key=lambda row: row["n"])
    base = most.get("neighborhood_score_base")
    note = f"Before any edit, neighborhood_score is {base:.3f}. " if base else ""
    devices = ", ".join(sorted({row["device"] for row in rows}))
    return [*lines, "", f"{note}Measured on {devices}; ± is half a 95% interval."]


def _command(part: Mapping[str, Any]) -> str:
    arguments = part["evaluate"].format(data="DATA", work="WORK")
    return f"`python -m workbench evaluate {arguments} --editors EDITOR --json FILE`"


def main() -> None:
    """Bring the tables of `tables.toml` up to date."""
    parser = argparse.ArgumentParser(prog="python -m workbench.recipes.tables", description=__doc__)
    parser.add_argument("--data-folder", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("assets/results"))
    parser.add_argument("--work", type=Path, default=Path("work/tables"))
    parser.add_argument("--only", metavar="TABLE", help="one table, by name")
    parser.add_argument("--editor", help="train this editor of the recipes, and no more")
    parser.add_argument("--limit", type=int, help="fewer examples, for a try (give --out too)")
    options = parser.parse_args()
    recipes = tomllib.loads(RECIPES.read_text(encoding="utf-8"))
    names = [table["name"] for table in recipes["tables"]]
    if options.only not in (None, *names):
        parser.error(f"there is no table {options.only!r}; tables: {', '.join(names)}")
    if not options.data_folder.is_dir():
        parser.error(f"no folder {options.data_folder}; give --data-folder")
    runner = Runner(recipes, options.data_folder, options.out, options.work, options.limit)
    if options.editor:
        if options.editor not in recipes["editors"]:
            parser.error(
                f"there is no editor {options.editor!r}; editors: {', '.join(recipes['editors'])}"
            )
        print(runner.editor(TRAINED + options.editor))
        return
    for table in recipes["tables"]:
        if options.only in (None, table["name"]):
            runner.table(table)


if __name__ == "__main__":
    main()
