"""How many edits a second are made and judged."""

from __future__ import annotations

from tests.benchmarks.setting import Setting
from tests.benchmarks.timing import Figures, Makers, in_turn, made
from workbench.evaluate import evaluate

_EDITS = 8


def makers(setting: Setting) -> Makers:
    """Some edits, each alone, their texts computed anew."""
    examples = setting.examples[:_EDITS]
    return {
        "in_rounds": lambda: lambda: evaluate(setting.editor, examples),
        "one_round": lambda: lambda: evaluate(setting.linear, examples),
    }


def evaluation(setting: Setting, rounds: int) -> Figures:
    """Edits a second by the default editor, and by one of a single round."""
    rivals = made(makers(setting))
    times, edits = in_turn(setting.device, rounds, rivals), len(setting.examples[:_EDITS])
    return {
        "ms": times.milliseconds(),
        "edits_per_second": {name: times.rate(name, edits) for name in rivals},
    }
