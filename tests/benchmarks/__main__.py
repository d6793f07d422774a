"""`make bench`: what editing, generating, training, evaluating and opening cost, beside rivals.

All figures of a table come from one run, the rivals in turn. Medians, with the lowest and highest.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from tests.benchmarks.edits import edit, undo
from tests.benchmarks.evaluation import evaluation
from tests.benchmarks.generation import generation
from tests.benchmarks.opening import imports, opening
from tests.benchmarks.peaks import peaks
from tests.benchmarks.products import products
from tests.benchmarks.setting import Setting
from tests.benchmarks.targets import judged, markdown
from tests.benchmarks.timing import Figures
from tests.benchmarks.training import rank, training

# What takes longer to run takes part in fewer rounds.
BENCHMARKS: dict[str, tuple[Callable[[Setting, int], Figures], int]] = {
    "edit": (edit, 1),
    "undo": (undo, 1),
    "generation": (generation, 2),
    "training": (training, 5),
    "rank": (rank, 3),
    "evaluation": (evaluation, 3),
    "products": (products, 1),
    "imports": (imports, 3),
    "opening": (opening, 3),
}
NAMES = (*BENCHMARKS, "peaks")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--only", choices=NAMES, action="append", help="leave out all others")
    parser.add_argument("--rounds", type=int, default=15, help="of an edit; of what is long, fewer")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    options = parser.parse_args()
    setting = Setting.default(options.device)
    text = ""
    # Written each time, so that what fails late loses nothing of what was measured before.
    for results in measured(setting, options.only or NAMES, options.rounds):
        text = markdown(results)
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        if options.markdown:
            options.markdown.write_text(text, encoding="utf-8")
    print(text)


def measured(setting: Setting, names: Sequence[str], rounds: int) -> Iterator[Figures]:
    """The figures of the benchmarks of those names so far, and the targets; after each of them."""
    results: Figures = {"machine": machine(setting.device)}
    for name, (benchmark, share) in BENCHMARKS.items():
        if name in names:
            print(f"{name} ...", file=sys.stderr, flush=True)
            results[name] = benchmark(setting, max(1, rounds // share))
            yield results | {"targets": judged(results)}
    if "peaks" in names:
        print("peaks ...", file=sys.stderr, flush=True)
        results["peaks"] = peaks(setting.device)
        yield results | {"targets": judged(results)}


def machine(device: torch.device) -> Figures:
    """Where figures come from."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
