"""Clocks and tables: rivals timed in turn, so that a machine whose speed drifts favours none."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Action = Callable[[], object]
Makers = Mapping[str, Callable[[], Action]]  # each sets one action up
Figures = dict[str, Any]


def seconds(device: torch.device, action: Action) -> float:
    """What a call takes: by events in the device's queue on CUDA, by the clock elsewhere."""
    if device.type != "cuda":
        start = time.perf_counter()
        action()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        action()
        end.record()
        torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


@dataclass(frozen=True)
class Times:
    """Seconds of each rival in each round."""

    rounds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        """Seconds."""
        return statistics.median(self.rounds[name])

    def milliseconds(self) -> Figures:
        """Median and spread of each rival."""
        return {
            name: _spread([1e3 * value for value in values]) for name, values in self.rounds.items()
        }

    def ratio(self, above: str, below: str, factor: float = 1.0) -> Figures:
        """Of two rivals, round by round, times a factor; median and spread."""
        pairs = zip(self.rounds[above], self.rounds[below], strict=True)
        return _spread([factor * a / b for a, b in pairs])

    def rate(self, name: str, count: int) -> Figures:
        """Of `count` things done in each call: how many a second."""
        return _spread([count / value for value in self.rounds[name]])


def made(makers: Makers) -> dict[str, Action]:
    """All actions, set up."""
    return {name: maker() for name, maker in makers.items()}


def in_turn(device: torch.device, rounds: int, rivals: Mapping[str, Action]) -> Times:
    """Time the rivals one after another, round by round, after one round that does not count.

    The order turns round from one round to the next, so that none always follows the same one.
    """
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for action in rivals.values():
        action()
    gc.collect()
    for number in range(rounds):
        for name in list(rivals)[:: -1 if number % 2 else 1]:
            times[name].append(seconds(device, rivals[name]))
    return Times(times)


def _spread(values: Sequence[float]) -> Figures:
    return {
        "median": _rounded(statistics.median(values)),
        "min": _rounded(min(values)),
        "max": _rounded(max(values)),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
