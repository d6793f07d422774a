"""How the times of what the workbench does grow: tiny models of random weights, a figure."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from tests.benchmarks.__main__ import machine
from tests.benchmarks.setting import Step, facts, gather_statistics, texts_of
from tests.benchmarks.shapes import SHAPES, random_model, word_tokenizer
from tests.benchmarks.timing import Action, Figures, in_turn
from workbench import Mend, MendConfig, Workbench, plots
from workbench.evaluate import evaluate
from workbench.models import device_named
from workbench.style import MATRIX_COLORS, TEMPLATE
from workbench.training import TrainingConfig

_BASE = {"width": 128, "depth": 4, "batch": 16, "rank": 64, "live edits": 1}
AXES: dict[str, tuple[int, ...]] = {
    "width": (64, 128, 256, 512),
    "depth": (4, 8, 16, 32),
    "batch": (1, 4, 16, 64),
    "rank": (16, 64, 256, 1024),
    "live edits": (1, 2, 4, 8, 16),  # of a batch of 16, in training
}
EDIT, STEP, GENERATION = "an edit", "a training step", "eight tokens"
EVALUATION, UNDO = "an evaluation", "an undo and redo"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.growth", description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--figure", type=Path, help="draw them here: .png, .svg, .pdf or .html")
    options = parser.parse_args()
    device = device_named(options.device)
    results: Figures = {"machine": machine(device), "base": _BASE}
    results["ms"] = {axis: growth(axis, AXES[axis], device, options.rounds) for axis in AXES}
    print(json.dumps(results["ms"], indent=2))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if options.figure:
        plots.save(figure(results["ms"]), options.figure)


def growth(axis: str, values: Iterable[int], device: torch.device, rounds: int) -> Figures:
    """Milliseconds of each action at each value of one axis, all else as in the base, in turn."""
    rivals: dict[tuple[str, int], Action] = {
        (name, value): action
        for value in values
        for name, action in _actions(**_keywords(_BASE | {axis: value}), device=device).items()
        if axis == "live edits" or name != GENERATION
    }
    times = in_turn(device, rounds, {f"{name}|{value}": a for (name, value), a in rivals.items()})
    found: Figures = {}
    for (name, value), figures in zip(rivals, times.milliseconds().values(), strict=True):
        found.setdefault(name, {})[value] = figures
    return found


def _keywords(settings: dict[str, int]) -> dict[str, int]:
    return {name.replace(" ", "_"): value for name, value in settings.items()}


def _actions(
    width: int, depth: int, batch: int, rank: int, live_edits: int, device: torch.device
) -> dict[str, Action]:
    """An edit of a batch of requests, a step and an evaluation of a batch, a continuation under the
    live edits, an undo of the last."""
    config: Any = SHAPES["tiny"]()
    config.hidden_size, config.intermediate_size = width, 2 * width
    config.num_hidden_layers, config.head_dim = depth, width // config.num_attention_heads
    examples = facts(256)
    lm = random_model(config, "float32", device, word_tokenizer(examples, config.vocab_size))
    editor = Mend(lm, MendConfig(rank=rank))
    edits = texts_of(lm, examples, TrainingConfig(batch=batch))
    bench = Workbench(lm, gather_statistics(editor, edits[:4]))
    for example in islice(cycle(examples), live_edits):
        bench.edit(example.prompt, example.target)
    # Edits at hand are counted in the time of the next one, those of the rounds are not.
    asked = [(example.prompt, example.target) for example in examples[:batch]]

    def edit() -> None:
        bench.fork(edits=True).edit_many(asked)

    step = Step(Mend(lm, MendConfig(rank=rank)).train(), edits, at_once=live_edits)
    generate: Callable[[], object] = partial(
        bench.generate, examples[0].prompt, max_new_tokens=8, min_new_tokens=8
    )

    def undo() -> None:
        bench.undo()
        bench.redo()

    return {
        EDIT: edit,
        STEP: step,
        GENERATION: generate,
        EVALUATION: partial(evaluate, bench.editor, examples[:batch]),
        UNDO: undo,
    }


def figure(ms: Figures) -> go.Figure:
    """One panel for each axis, both scales logarithmic."""
    drawn = make_subplots(rows=1, cols=len(ms), shared_yaxes=True, horizontal_spacing=0.02)
    colors = dict(zip((EDIT, STEP, GENERATION, EVALUATION, UNDO), MATRIX_COLORS, strict=False))
    named: set[str] = set()
    for column, (axis, lines) in enumerate(ms.items(), 1):
        for name, points in lines.items():
            medians = [point["median"] for point in points.values()]
            values = [int(value) for value in points]
            over, under = (
                [abs(point[end] - point["median"]) for point in points.values()]
                for end in ("max", "min")
            )
            line = go.Scatter(
                x=values,
                y=medians,
                name=name,
                mode="lines+markers",
                marker_color=colors[name],
                error_y={"array": over, "arrayminus": under, "thickness": 1},
                legendgroup=name,
                showlegend=name not in named,
            )
            named.add(name)
            drawn.add_trace(line, row=1, col=column)
        ticks = sorted({int(value) for points in lines.values() for value in points})
        drawn.update_xaxes(title_text=axis, tickvals=ticks, type="log", row=1, col=column)
    drawn.update_yaxes(type="log", dtick=1)
    drawn.update_yaxes(title_text="milliseconds", row=1, col=1)
    return drawn.update_layout(template=TEMPLATE, width=1000, height=320, margin_t=40)


if __name__ == "__main__":
    main()
