"""`make tables`: train what is to be compared, evaluate it, and write the tables of results.

`tables.toml` lists them. Each row of a table is one `python -m workbench evaluate` command and each
trained editor one `python -m workbench train` command, run as a user would run them; what is
finished is kept, so that a run that was stopped goes on where it was.
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
    "unrelated_kept",
    "drawdown",
)
TRAINED = "@"


@dataclass(frozen=True)
class Row:
    """One evaluation: its names in the table, and its command's arguments.

    Args:
        label: The editor, and what else tells the rows apart.
        editor: A name, or TRAINED and the name of an editor of the recipes.
        arguments: Of `python -m workbench evaluate`, without editor and output.
    """

    label: str
    editor: str
    arguments: str

    @property
    def file(self) -> str:
        """Name of the row's results: other arguments are another file."""
        key = hashlib.sha1(f"{self.editor} {self.arguments}".encode()).hexdigest()[:8]
        return f"{''.join(c if c.isalnum() else '-' for c in self.label).strip('-')}-{key}.json"


def rows(part: Mapping[str, Any], limit: int | None = None) -> Iterator[Row]:
    """The rows of a part of a table: every editor in every variant.

    Args:
        part: Of a table of the recipes.
        limit: Most examples, instead of the recipes' own.
    """
    few = f"--limit {limit}" if limit else ""
    for editor in part["editors"]:
        name = editor.removeprefix(TRAINED)
        for variant, more in part.get("variants", {"": ""}).items():
            label = f"{name}, {variant}" if variant else name
            yield Row(label, editor, " ".join(filter(None, (part["evaluate"], more, few))))


class Runner:
    """Runs the commands that are missing.

    Args:
        recipes: The contents of `tables.toml`.
        data: Folder of the data sets that the commands name as `{data}`.
        out: Receives the tables and, in `rows`, what each row's command wrote.
        work: Receives the trained editors.
        limit: Most examples of each evaluation, instead of the recipes' own; for a try.
    """

    def __init__(
        self, recipes: Mapping[str, Any], data: Path, out: Path, work: Path, limit: int | None
    ) -> None:
        self.recipes, self.data, self.out, self.work = recipes, data, out, work
        self.limit = limit

    def table(self, table: Mapping[str, Any]) -> None:
        """Bring a table up to date, writing it anew after every row."""
        for part in table["parts"]:
            for row in rows(part, self.limit):
                if not self.result(row).exists():
                    self.evaluate(row)
                self.write(table)
        self.write(table)

    def result(self, row: Row) -> Path:
        """Where a row's results lie."""
        return self.out / "rows" / row.file

    def evaluate(self, row: Row) -> None:
        """Run a row's command, after training its editor if need be."""
        trained = row.editor.startswith(TRAINED)
        editor = self.trained(row.editor.removeprefix(TRAINED)) if trained else row.editor
        self.run(f"evaluate {row.arguments} --editors {editor} --json {self.result(row)}")

    def trained(self, name: str) -> str:
        """The folder of a trained editor, which is trained now unless it was."""
        folder = self.work / name
        arguments, marker = self.recipes["editors"][name], folder / "finished"
        if not marker.exists():
            self.run(f"train {arguments} --out {folder} --resume")
            write_text(marker, arguments + "\n")
        elif marker.read_text().strip() != arguments:
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
        """Write a table's Markdown and JSON from the rows there are."""
        lines, found = [f"# {table['title']}", "", table["text"].strip(), ""], []
        for part in table["parts"]:
            measured = [
                (row, json.loads(self.result(row).read_text()))
                for row in rows(part, self.limit)
                if self.result(row).exists()
            ]
            lines += [f"## {part['title']}", "", *_markdown(measured), "", _command(part), ""]
            found += [
                {"part": part["title"], "row": row.label, "arguments": row.arguments, **result}
                for row, result in measured
            ]
        write_text(self.out / f"{table['name']}.md", "\n".join(lines))
        whole = {"title": table["title"], "rows": found}
        write_text(self.out / f"{table['name']}.json", json.dumps(whole, indent=1) + "\n")


def _markdown(measured: Sequence[tuple[Row, Mapping[str, Any]]]) -> list[str]:
    figures = [(row, *result["editors"].values()) for row, result in measured]
    names = [name for name in MEASURES if any(name in scores for _, scores in figures)]
    head = ["editor", *names, "s/edit", "n"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row, scores in figures:
        half = scores["confidence_95"]
        cells = [f"{scores[n]:.3f} ± {half[n]:.3f}" if n in scores else "-" for n in names]
        lines.append(
            f"| {' | '.join([row.label, *cells])} | {scores['seconds_per_edit']:.2f} "
            f"| {scores['n']} |"
        )
    if measured:
        base = {scores.get("neighborhood_score_base") for _, scores in figures} - {None}
        machines = {result["settings"]["device"] for _, result in measured}
        note = f"Before any edit, neighborhood_score is {min(base):.3f}. " if base else ""
        lines += ["", f"{note}Measured on {', '.join(sorted(machines))}; ± is a 95% interval."]
    return lines


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
    parser.add_argument("--limit", type=int, help="fewer examples, for a try (give --out too)")
    options = parser.parse_args()
    recipes = tomllib.loads(RECIPES.read_text(encoding="utf-8"))
    names = [table["name"] for table in recipes["tables"]]
    if options.only not in (None, *names):
        parser.error(f"there is no table {options.only!r}; tables: {', '.join(names)}")
    if not options.data_folder.is_dir():
        parser.error(f"no folder {options.data_folder}; give --data-folder")
    runner = Runner(recipes, options.data_folder, options.out, options.work, options.limit)
    for table in recipes["tables"]:
        if options.only in (None, table["name"]):
            runner.table(table)


if __name__ == "__main__":
    main()
