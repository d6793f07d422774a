"""`import workbench` and the opening of the default model, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.benchmarks.setting import Setting
from tests.benchmarks.timing import Figures, Times

ROOT = Path(__file__).resolve().parents[2]
_IMPORTS = {"torch": "import torch", "workbench": "import workbench"}
_LIBRARIES = "from transformers import AutoTokenizer, LlamaForCausalLM"
_OPEN = "bench = workbench.Workbench.open(progress=False)"


def timed_process(*lines: str) -> list[float]:
    """Seconds that each line takes in a fresh interpreter, whose own start does not count."""
    script = ["import time", "clock = [time.perf_counter()]"]
    for line in lines:
        script += [line, "clock.append(time.perf_counter())"]
    script.append("print(*(b - a for a, b in zip(clock, clock[1:])))")
    command = [sys.executable, "-c", "\n".join(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return [float(value) for value in done.stdout.split()]


def imports(setting: Setting, rounds: int) -> Figures:
    """The import beside that of what it cannot do without, torch."""
    timed_process(*_IMPORTS.values())  # byte code and the page cache
    taken: dict[str, list[float]] = {name: [] for name in _IMPORTS}
    for _ in range(rounds):
        for name, line in _IMPORTS.items():
            taken[name] += timed_process(line)
    return {"ms": Times(taken).milliseconds()}


def opening(setting: Setting, rounds: int) -> Figures:
    """The default model and editor, unpacked before: the import of what transformers needs for
    that model, with which a process's first opening begins, the rest of it, and both together."""
    lines = (_IMPORTS["workbench"], _LIBRARIES, _OPEN)
    timed_process(*lines)
    taken = [timed_process(*lines)[1:] for _ in range(rounds)]
    libraries, opened = zip(*taken, strict=True)
    times = {"libraries": libraries, "open": opened, "whole": list(map(sum, taken))}
    return {"ms": Times(times).milliseconds()}
