"""Model cards: a trained editor's README.md, made of what is known of it and of nothing else."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from math import inf
from typing import Any

from workbench.sharing import is_id

_NO_MEASURE = ("n", "seconds", "seconds_per_edit")


def model_card(about: Mapping[str, Any], name: str) -> str:
    """The card of a trained editor, with the front matter that the hub reads.

    Args:
        about: What `editor.json` holds; texts in it are shown as texts, never as Markdown.
        name: Of its repository, `owner/name`.
    """
    card = about["card"]
    parts = (
        f"---\n{_front_matter(about, name)}\n---",
        f"# A {code(about['editor'])} editor for {code(about['base_model'])}",
        "It turns one example of what the model should say into a change of the layers below, "
        "which can be taken back exactly. It is no model of its own.",
        _use(about, name),
        "## How it was trained",
        _table(("", ""), _training(card)) or "Its card does not say.",
        *_measured(mapping(card.get("evaluation")), name),
        "## Limits",
        _limits(about),
        "## Layers",
        "\n".join(f"- {code(name)}" for name in about["layers"]),
    )
    return "\n\n".join(parts) + "\n"


def _front_matter(about: Mapping[str, Any], repository: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    card, base = about["card"], about["base_model"]
    evaluation = mapping(card.get("evaluation"))
    figures, settings = figures_of(evaluation), mapping(evaluation.get("settings"))
    spec = line(settings.get("data") or "unknown")
    results = [
        EvalResult(
            task_type="model-editing",
            task_name="Model editing",
            dataset_type=next(iter(_hub_ids([spec])), spec),
            dataset_name=spec,
            dataset_split=line(settings["split"]) if settings.get("split") else None,
            metric_type=line(name),
            metric_value=value,
        )
        for name, value in figures.items()
    ]
    return ModelCardData(
        library_name="model-editing-workbench",
        base_model=base if is_id(base) else None,
        datasets=_hub_ids(listed(card.get("data"))) or None,
        tags=["model-editing", line(about["editor"])],
        metrics=[*map(line, figures)] or None,
        model_name=repository if results else None,
        eval_results=results or None,
    ).to_yaml()


def _use(about: Mapping[str, Any], name: str) -> str:
    base = json.dumps(line(about["base_model"]), ensure_ascii=False)
    options = ", chat=True" if about["card"].get("chat") else ""
    return f"""## Use

```python
from workbench import Workbench

wb = Workbench.open({base}, editor="{name}"{options})
wb.edit("The capital of France is", "Lyon")
```"""


def _training(card: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the card says in a word or a number; all else is in `editor.json`."""
    for name, value in card.items():
        if name == "data" and value:
            yield "data", ", ".join(map(code, listed(value)))
        elif isinstance(value, str | int | float):
            yield code(name), code(value)
    if card.get("start"):
        yield "begun from", "another trained editor"


def _measured(evaluation: Mapping[str, Any], repository: str) -> Iterator[str]:
    yield "## How it did"
    if not (figures := figures_of(evaluation)):
        yield (
            "It comes without figures. `python -m workbench evaluate --editors "
            f"{repository}` measures it on data of yours."
        )
        return
    half = mapping(evaluation["figures"].get("confidence_95"))
    settings = mapping(evaluation.get("settings"))
    given = {**settings, "edits": evaluation["figures"].get("n")}
    wanted = ("data", "split", "edits", "at_once", "aggregation", "dtype")
    yield "Measured by `python -m workbench evaluate`: " + ", ".join(
        f"{name} {code(given[name])}" for name in wanted if given.get(name) is not None
    )
    rows = (
        (code(name), code(value), code(half[name]) if name in half else "")
        for name, value in figures.items()
    )
    yield _table(("measure", "value", "± (95 %)"), rows)


def _limits(about: Mapping[str, Any]) -> str:
    chat = about["card"].get("chat")
    prompts = "turns of a chat" if chat else "plain prompts, not on turns of a chat"
    learned = "" if chat is None else f"- It was trained on {prompts}.\n"
    return (
        f"- It fits {code(about['base_model'])} with weights of the fingerprint "
        f"{code(about['base_fingerprint'])}; over others its edits can fail or spread.\n"
        f"{learned}"
        "- An edit can reach further than it should, or not as far: `wb.probe(edit)` shows how "
        "far it does."
    )


def figures_of(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Measures among what a card's `evaluation` holds: numbers, and no times or counts."""
    return {
        str(name): value
        for name, value in mapping(evaluation.get("figures")).items()
        if isinstance(value, int | float) and abs(value) < inf and name not in _NO_MEASURE
    }


def mapping(value: Any) -> Mapping[str, Any]:
    """The value, where it is a mapping; else an empty one."""
    return value if isinstance(value, Mapping) else {}


def listed(value: Any) -> list[str]:
    """A value, or each of a list's, as texts."""
    return [str(each) for each in (value if isinstance(value, list | tuple) else [value or ""])]


def _hub_ids(specs: list[str]) -> list[str]:
    """The hub ids among data sets that are written FORMAT:PATH."""
    paths = [path for spec in specs for path in spec.partition(":")[2].split(os.pathsep)]
    return [path for path in dict.fromkeys(paths) if is_id(path)]


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    # It ends a cell, in code too, and Markdowns differ in what a backslash before it does.
    lines = [[cell.replace("|", "¦") for cell in row] for row in rows]
    if not lines:
        return ""
    ruled = [list(head), ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in ruled)


def line(value: object) -> str:
    """Any text on one line of signs that can be seen, cut where it is long."""
    seen = "".join(sign if sign.isprintable() else " " for sign in str(value))
    return " ".join(seen.split())[:200].strip() or "?"


def code(value: object) -> str:
    """Any text as code, which no sign in it can end."""
    text = line(value)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"
