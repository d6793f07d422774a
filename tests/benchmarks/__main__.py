"""`make bench`: what an edit, an undo and a training step cost, beside their rivals.

All figures of a table come from one run, the rivals in turn, so that a machine whose speed drifts
does not favour one. Medians, with the lowest and highest.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from tests.benchmarks.reference import ReferenceLoop
from workbench import Workbench
from workbench.corpus import SENTENCES
from workbench.data import read
from workbench.editors import Mend, MendConfig
from workbench.encoding import collate, tokenize
from workbench.training import MetaStep, TextSampler, TrainingConfig

PROMPT, TARGET = "The capital of France is", "Lyon"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    bench = Workbench.open(editor=None)
    results = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {bench.lm.device}",
        "torch": torch.__version__,
        "edit": edit_against_floor(bench, options.rounds),
        "undo": undo(bench),
        "training": training_against_reference(bench, max(3, options.rounds // 5)),
    }
    for name, figures in results.items():
        print(f"{name}: {json.dumps(figures, indent=2) if isinstance(figures, dict) else figures}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def timed(device: torch.device, function: Callable[[], object]) -> float:
    """Seconds that a call takes, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def in_turn(device: torch.device, rounds: int, **rivals: Callable[[], object]) -> dict[str, dict]:
    """Time the rivals one after another, round by round, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for round_number in range(rounds + 1):
        for name, function in rivals.items():
            seconds = timed(device, function)
            if round_number:
                times[name].append(seconds)
    return {
        name: {
            "median_ms": round(1e3 * statistics.median(values), 2),
            "min_ms": round(1e3 * min(values), 2),
            "max_ms": round(1e3 * max(values), 2),
        }
        for name, values in times.items()
    }


def edit_against_floor(bench: Workbench, rounds: int) -> dict:
    """An edit beside a bare forward plus a backward that ends at the first edited layer."""
    lm = bench.lm
    batch = collate(lm, [tokenize(lm, PROMPT, TARGET)])
    first = bench.editor.layers[0].module

    def floor() -> None:
        leaves: list[torch.Tensor] = []

        def cut(module: object, args: object, output: torch.Tensor) -> torch.Tensor:
            leaves.append(output.detach().requires_grad_())
            return leaves[0]

        handle = first.register_forward_hook(cut)
        logits = lm.model(**batch.inputs).logits[batch.rows, batch.columns]
        handle.remove()
        torch.autograd.grad(cross_entropy(logits, batch.targets), leaves)

    pointers = {name: p.data_ptr() for name, p in lm.model.named_parameters()}
    assert isinstance(bench.editor, Mend)
    once = Workbench(lm, bench.editor.changed(rounds=1))  # as the paper, without a look at the edit
    figures = in_turn(
        lm.device,
        rounds,
        edit=lambda: bench.edit(PROMPT, TARGET),
        edit_of_one_round=lambda: once.edit(PROMPT, TARGET),
        floor=floor,
    )
    assert pointers == {name: p.data_ptr() for name, p in lm.model.named_parameters()}
    edit = bench.edits[-1]
    bench.reset()
    changed = sum(layer.in_features * layer.out_features for layer in bench.editor.layers)
    return figures | {
        "edit_over_floor": ratio(figures, "edit", "floor"),
        "edit_of_one_round_over_floor": ratio(figures, "edit_of_one_round", "floor"),
        "numbers_in_update": edit.update.numbers(),
        "numbers_in_edited_weights": changed,
    }


def undo(bench: Workbench) -> dict:
    """An undo, with one live edit."""
    times = []
    for _ in range(50):
        bench.edit(PROMPT, TARGET) if not bench.can_redo else bench.redo()
        times.append(timed(bench.lm.device, bench.undo))
    return {"median_ms": round(1e3 * statistics.median(times), 4)}


def training_against_reference(bench: Workbench, rounds: int) -> dict:
    """Meta-training, vectorised over the trunk cache, beside the reference loop, same texts."""
    lm, blocks = bench.lm, sorted({layer.block for layer in bench.editor.layers})
    config = TrainingConfig(batch=16)
    sampler = TextSampler(lm, list(read("facts", split="train", limit=400)), SENTENCES, config)
    editor = Mend(lm, MendConfig(rank=128, blocks=blocks)).train()
    meta, reference = MetaStep(editor, config), ReferenceLoop(editor, config)
    edits = sampler.batch(0)
    meta.losses(edits)
    editor.eval()
    fast_loss = meta.losses(edits).total
    editor.train()

    def slow() -> None:
        for edit in edits[:2]:
            reference.example(edit)
        editor.zero_grad()

    def fast() -> None:
        meta.losses(edits)
        editor.zero_grad()

    def uncached() -> None:
        MetaStep(editor, config, cached=False).losses(edits)
        editor.zero_grad()

    editor.eval()
    slow_loss = statistics.mean(reference.example(edit) for edit in edits)
    editor.train()
    figures = in_turn(lm.device, rounds, fast=fast, uncached=uncached, slow=slow)
    rates = {
        "examples_per_second": round(1e3 * 16 / figures["fast"]["median_ms"], 2),
        "examples_per_second_uncached": round(1e3 * 16 / figures["uncached"]["median_ms"], 2),
        "examples_per_second_reference": round(1e3 * 2 / figures["slow"]["median_ms"], 2),
    }
    return rates | {
        "speedup": round(8 * figures["slow"]["median_ms"] / figures["fast"]["median_ms"], 1),
        "speedup_uncached": round(
            8 * figures["slow"]["median_ms"] / figures["uncached"]["median_ms"], 1
        ),
        "loss": round(fast_loss, 5),
        "loss_reference": round(slow_loss, 5),
    }


def ratio(figures: dict[str, dict], above: str, below: str) -> float:
    """Of two medians."""
    return round(figures[above]["median_ms"] / figures[below]["median_ms"], 3)


if __name__ == "__main__":
    main()
