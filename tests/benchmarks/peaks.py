"""Peak memory of one action in a process of its own: `python -m tests.benchmarks.peaks NAME`."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import psutil
import torch

from tests.benchmarks import edits, evaluation, generation, training
from tests.benchmarks.opening import ROOT
from tests.benchmarks.setting import Setting
from tests.benchmarks.timing import Action, Figures
from workbench import Workbench
from workbench.models import device_named

MAKERS = {
    "edit": edits.edit_makers,
    "undo": edits.undo_makers,
    "generation": generation.makers,
    "training": training.training_makers,
    "rank": training.rank_makers,
    "evaluation": evaluation.makers,
}
OPENING = "opening.open"
NAMES = (
    OPENING,
    *("edit.edit", "edit.edit_in_rounds", "edit.floor", "undo.undo"),
    *("generation.edits_0", "generation.edits_10", "generation.edits_100"),
    *("generation.peft_10", "generation.peft_100"),
    *("training.batch_1", "training.batch_16", "training.batch_64", "training.reference"),
    *("rank.rank_128", "rank.rank_1920", "evaluation.in_rounds"),
)


def peak(device: torch.device, action: Action) -> Figures:
    """MiB held before an action, and at most during it: on CUDA the allocator's, on the CPU the
    process's resident memory."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return _mib(before, torch.cuda.max_memory_allocated(device))
    before = psutil.Process().memory_info().rss
    _forget_peak()
    action()
    return _mib(before, _resident_peak())


def peaks(device: torch.device, names: tuple[str, ...] = NAMES) -> Figures:
    """Of each action, in a fresh process that has done nothing but set it up."""
    found = {}
    for name in names:
        command = [sys.executable, "-m", "tests.benchmarks.peaks", name, "--device", str(device)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def _forget_peak() -> None:
    """Linux counts the peak anew from here; elsewhere it stays that of the whole process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _resident_peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _mib(before: int, most: int) -> Figures:
    return {"before_mib": round(before / 2**20, 1), "peak_mib": round(most / 2**20, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.peaks", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = device_named(options.device)
    if options.name == OPENING:
        found = peak(device, lambda: Workbench.open(device=options.device, progress=False))
    else:
        setting = Setting.default(options.device)
        benchmark, _, action = options.name.partition(".")
        found = peak(device, MAKERS[benchmark](setting)[action]())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
