"""Steps of meta-training: against the reference loop, and at a large rank against a small one."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial

from tests.benchmarks.reference import ReferenceLoop
from tests.benchmarks.setting import Setting, Step
from tests.benchmarks.timing import Action, Figures, Makers, in_turn, made
from workbench.editors import Mend
from workbench.training import EditTexts, TrainingConfig

_EXAMPLES = 2  # that the reference loop goes through in one round; each takes the same time


def training_makers(setting: Setting) -> Makers:
    """A step of each size, with what is constant for a text at hand; the middle one also without;
    the reference loop; then a step and the loop where the paper edits, in the last blocks."""
    editor, middle = setting.untrained(setting.ranks[0]), _middle(setting)
    late, most = setting.untrained(setting.ranks[0], late=True), max(setting.batches)
    return {
        **{f"batch_{size}": partial(Step, editor, setting.batch(size)) for size in setting.batches},
        f"uncached_{middle}": partial(Step, editor, setting.batch(middle), cached=False),
        "reference": partial(_going_through, editor, setting.batch(_EXAMPLES)),
        f"late_{most}": partial(Step, late, setting.batch(most)),
        "late_reference": partial(_going_through, late, setting.batch(_EXAMPLES)),
    }


def training(setting: Setting, rounds: int) -> Figures:
    """Examples a second, and how many times the reference's; the losses that both have computed.

    The reference's optimiser steps are left out, in its favour: it would take one in many examples.
    """
    rivals = made(training_makers(setting))
    times = in_turn(setting.device, rounds, rivals)
    steps = {name: step for name, step in rivals.items() if isinstance(step, Step)}
    sizes = {name: len(steps[name].edits) if name in steps else _EXAMPLES for name in rivals}
    beside = {name: "late_reference" if "late" in name else "reference" for name in steps}
    return {
        "ms": times.milliseconds(),
        "examples_per_second": {name: times.rate(name, sizes[name]) for name in rivals},
        **{
            f"{name}_over_{loop}": times.ratio(loop, name, sizes[name] / _EXAMPLES)
            for name, loop in beside.items()
        },
        "losses": {name: _losses(step) for name, step in steps.items()},
    }


def _losses(step: Step) -> Figures:
    """A step's loss and that of the reference, of the editor as it now is."""
    step.editor.eval()
    loop = ReferenceLoop(step.editor, TrainingConfig())
    losses = [loop.example(edit, backward=False) for edit in step.edits]
    return {"step": step.loss(), "reference": statistics.mean(losses)}


def rank_makers(setting: Setting) -> Makers:
    """A step of the middle size with a small editor and with a large one."""

    def step(rank: int) -> Action:
        return Step(setting.untrained(rank), setting.batch(_middle(setting)))

    return {f"rank_{rank}": partial(step, rank) for rank in setting.ranks}


def rank(setting: Setting, rounds: int) -> Figures:
    """What an example costs at the paper's rank beside the small one."""
    rivals, size = made(rank_makers(setting)), _middle(setting)
    times = in_turn(setting.device, rounds, rivals)
    small, large = rivals
    return {
        "ms": times.milliseconds(),
        "batch": size,
        "examples_per_second": {name: times.rate(name, size) for name in rivals},
        "large_over_small": times.ratio(large, small),
    }


def _middle(setting: Setting) -> int:
    return sorted(setting.batches)[len(setting.batches) // 2]


def _going_through(editor: Mend, edits: Sequence[EditTexts]) -> Action:
    loop = ReferenceLoop(editor, TrainingConfig())

    def run() -> None:
        for edit in edits:
            loop.example(edit)
        editor.zero_grad()

    return run
