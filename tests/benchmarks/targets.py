"""What the benchmarks' figures should be, and tables of what they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.benchmarks.timing import Figures


@dataclass(frozen=True)
class Target:
    """A bound on one figure.

    Args:
        says: What is bounded.
        path: Where the figure stands in the results: the benchmark's name, then keys.
        bound: The bound.
        unit: Of figure and bound.
        least: The figure should be at least the bound; else at most.
    """

    says: str
    path: tuple[str, ...]
    bound: float
    unit: str
    least: bool = False

    def measured(self, results: Mapping[str, Any]) -> float | None:
        """The figure; None where its benchmark was left out."""
        found: Any = results
        for key in self.path:
            if key not in found:
                if found is results:
                    return None
                raise KeyError(f"{self.path} is not among the figures: {key!r}.")
            found = found[key]
        return float(found)

    def holds(self, value: float) -> bool:
        """Whether the figure keeps to the bound."""
        return value >= self.bound if self.least else value <= self.bound

    def __str__(self) -> str:
        return f"{self.says} {'≥' if self.least else '≤'} {self.bound:g} {self.unit}"


_REFERENCE, _FLOOR = "× the reference loop's examples/s", "× the floor"
TARGETS = (
    Target("edit of one round", ("edit", "edit_over_floor", "median"), 1.15, _FLOOR),
    Target(
        "edit as the default makes it",
        ("edit", "edit_in_rounds_over_floor", "median"),
        1.15,
        _FLOOR,
    ),
    *(
        Target(
            f"training at batch {size}",
            ("training", f"batch_{size}_over_reference", "median"),
            20,
            _REFERENCE,
            least=True,
        )
        for size in (16, 64)
    ),
    Target(
        "training at batch 64 in the last blocks",
        ("training", "late_64_over_late_reference", "median"),
        20,
        _REFERENCE,
        least=True,
    ),
    Target("losses of the two apart", ("training", "losses_apart"), 1e-4, "of the reference's"),
    Target("undo", ("undo", "ms", "undo", "median"), 0.2, "ms"),
    Target(
        "generation with 10 live edits",
        ("generation", "edits_10_over_edits_0", "median"),
        1.10,
        "× without",
    ),
    Target("import workbench", ("imports", "ms", "workbench", "median"), 2000, "ms"),
    Target("opening the cached default", ("opening", "ms", "whole", "median"), 4000, "ms"),
    Target("an example at rank 1920", ("rank", "large_over_small", "median"), 2, "× rank 128"),
)


def judged(results: Mapping[str, Any]) -> list[Figures]:
    """Each target with its measured value and whether it holds; None where it was not measured."""
    found = []
    for target in TARGETS:
        value = target.measured(results)
        holds = None if value is None else target.holds(value)
        found.append({"target": str(target), "measured": value, "holds": holds})
    return found


def markdown(results: Mapping[str, Any]) -> str:
    """The targets, and all figures, as tables."""
    names = {True: "yes", False: "**no**", None: "not measured"}
    rows = [(row["target"], _text(row["measured"]), names[row["holds"]]) for row in judged(results)]
    return f"{table(('target', 'measured', 'holds'), rows)}\n\n{tables(results)}"


def tables(results: Mapping[str, Any]) -> str:
    """The machine, all figures with a spread, all single ones, and the peaks."""
    figures = {k: v for k, v in results.items() if k not in ("machine", "targets", "peaks")}
    found = list(_flat(figures))
    spreads = [(n, *map(_text, v.values())) for n, v in found if isinstance(v, Mapping)]
    singles = [(n, _text(v)) for n, v in found if not isinstance(v, Mapping)]
    peaks = [
        (name, *(f"{mib:,.0f}" for mib in (*v.values(), v["peak_mib"] - v["before_mib"])))
        for name, v in results.get("peaks", {}).items()
    ]
    parts = [
        "; ".join(f"{key} {value}" for key, value in results["machine"].items()) + ".",
        table(("figure", "median", "lowest", "highest"), spreads),
        table(("figure", "value"), singles),
        table(("peak memory, MiB", "before", "peak", "more"), peaks),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; nothing for no rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _flat(figures: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in figures.items():
        name = f"{path} {key}".strip()
        if isinstance(value, Mapping) and "median" not in value:
            yield from _flat(value, name)
        else:
            yield name, value


def _text(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
