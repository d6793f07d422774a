"""Editing and training at the shape of a large model: time, peak memory, and the estimate of it.

The model has random weights, made where it runs; nothing is downloaded. What it needs is worked out
and printed before anything is made.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import psutil
import torch

from tests.benchmarks.__main__ import machine
from tests.benchmarks.estimate import Estimate, estimate
from tests.benchmarks.peaks import peak
from tests.benchmarks.setting import Step, facts, gather_statistics, texts_of
from tests.benchmarks.shapes import PRECISIONS, SHAPES, filled, outline, word_tokenizer
from tests.benchmarks.targets import tables
from tests.benchmarks.timing import Figures, in_turn
from workbench import LanguageModel, Mend, MendConfig, Workbench
from workbench.memory import free_on, size
from workbench.models import device_named
from workbench.training import TrainingConfig


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scale", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rank", type=int, default=1920, help="of the editor (1920 in the paper)")
    parser.add_argument("--batch", type=int, default=16, help="edits in a training step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    results = scale(
        options.shape,
        options.precision,
        device_named(options.device),
        MendConfig(rank=options.rank),
        options.batch,
        options.rounds,
    )
    print(tables(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def scale(
    shape: str, precision: str, device: torch.device, config: MendConfig, batch: int, rounds: int
) -> Figures:
    """All figures of one shape in one precision.

    Raises:
        SystemExit: The estimate is that it will not fit.
    """
    settings, examples = SHAPES[shape](), facts(4 * batch)
    vocabulary: int = settings.get_text_config().vocab_size
    model = outline(settings, precision)
    tokenizer = word_tokenizer(examples, vocabulary)
    lm, training = LanguageModel.wrap(model, tokenizer, shape), TrainingConfig(batch=batch)
    edits = texts_of(lm, examples, training)
    needed = estimate(lm, config, edits, training, device)
    check(f"{shape} in {precision}", needed, device)

    start, before = time.perf_counter(), _held(device)
    lm = LanguageModel.wrap(filled(model, precision, device), tokenizer, shape)
    editor = gather_statistics(Mend(lm, config), edits[:1])
    built = time.perf_counter() - start
    bench, asked = Workbench(lm, editor), examples[0]

    def edit() -> None:
        bench.edit(asked.prompt, asked.target)

    edit()
    editing = peak(device, edit)
    edit_times = in_turn(device, rounds, {"edit": edit})
    step = Step(editor.train(), edits)
    learning = peak(device, step)
    step_times = in_turn(device, rounds, {"step": step})
    return {
        "machine": machine(device) | {"shape": shape, "precision": lm.precision},
        "scale": {
            "parameters": sum(p.numel() for p in outline(settings, "bf16").parameters()),
            "editor_parameters": sum(p.numel() for p in editor.parameters()),
            "rank": config.rank,
            "batch": batch,
            "seconds_to_build": round(built, 2),
            "ms": edit_times.milliseconds() | step_times.milliseconds(),
            "examples_per_second": step_times.rate("step", batch),
        },
        "estimate_mib": needed.figures(),
        "off": {
            "editing": _off(needed.editing, editing["peak_mib"] - before),
            "training": _off(needed.training, learning["peak_mib"] - before),
        },
        "peaks": {"edit": editing, "training": learning},
    }


def check(name: str, needed: Estimate, device: torch.device) -> None:
    """Print what is needed and what is free, and stop where that is less."""
    free = free_on(device)
    print(f"{name} needs about {needed}. {size(free)} are free on {device}.", flush=True)
    if max(needed.editing, needed.training) > free:
        raise SystemExit("There is not enough memory, so nothing was made.")


def _held(device: torch.device) -> float:
    """MiB held now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    return psutil.Process().memory_info().rss / 2**20


def _off(estimated: int, mib: float) -> float:
    """How far an estimate lies above what was measured, as a share of that."""
    return round(estimated / 2**20 / mib - 1, 3)


if __name__ == "__main__":
    main()
