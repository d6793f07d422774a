"""The benchmarks run and give what their tables read: tiny models, one round, no time judged."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.benchmarks import opening
from tests.benchmarks.__main__ import BENCHMARKS, NAMES, machine
from tests.benchmarks.peaks import MAKERS, OPENING, peak
from tests.benchmarks.peaks import NAMES as PEAKS
from tests.benchmarks.setting import Setting, facts, gather_statistics, texts_of
from tests.benchmarks.shapes import SHAPES, random_model, word_tokenizer
from tests.benchmarks.targets import TARGETS, judged, markdown
from workbench import Mend, MendConfig
from workbench.training import TrainingConfig


def tiny(precision: str) -> Setting:
    """A tiny model, in batches of the default setting's sizes."""
    config, examples = SHAPES["tiny"](), facts(16)
    tokenizer = word_tokenizer(examples, config.get_text_config().vocab_size)
    lm = random_model(config, precision, torch.device("cpu"), tokenizer)
    edits = texts_of(lm, examples, TrainingConfig(batch=4))
    gated, linear = MendConfig(rank=4, gate=0.3, rounds=2), MendConfig(rank=4, edit_lr=1e-2)
    editor, other = (gather_statistics(Mend(lm, config), edits) for config in (gated, linear))
    return Setting(lm, editor, other, examples, ranks=(4, 8), live=(0, 1, 10), tokens=2)


@pytest.fixture(scope="module")
def setting() -> Setting:
    return tiny("float32")


@pytest.fixture(scope="module")
def results(setting: Setting) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "_IMPORTS", {"torch": "import json", "workbench": "import ast"})
        patch.setattr(opening, "_LIBRARIES", "import decimal")
        patch.setattr(opening, "_OPEN", "bench = ast.parse('1')")
        found = {name: benchmark(setting, 1) for name, (benchmark, _) in BENCHMARKS.items()}
    found["peaks"] = {"edit.edit": peak(setting.device, MAKERS["edit"](setting)["edit"]())}
    return {"machine": machine(setting.device)} | found


def numbers(figures: Any) -> Iterator[float]:
    for value in figures.values():
        yield from numbers(value) if isinstance(value, dict) else [value]


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_gives_finite_positive_numbers(name: str, results: dict[str, Any]):
    found = list(numbers(results[name]))
    assert found
    assert all(math.isfinite(value) and value > 0 for value in found), results[name]


def test_every_target_is_measured_and_judged(results: dict[str, Any]):
    found = judged(results)
    assert len(found) == len(TARGETS)
    assert all(row["holds"] in (True, False) for row in found)
    assert {target.path[0] for target in TARGETS} == set(BENCHMARKS) - {"evaluation", "products"}


def test_targets_hold_on_their_side_of_the_bound():
    for target in TARGETS:
        assert target.holds(target.bound)
        assert target.holds(target.bound * (2 if target.least else 0.5))
        assert not target.holds(target.bound * (0.5 if target.least else 2))


def test_a_benchmark_left_out_leaves_its_targets_unjudged(results: dict[str, Any]):
    some = {name: results[name] for name in ("machine", "edit")}
    rows = judged(some)
    assert [row["holds"] is None for row in rows] == [t.path[0] != "edit" for t in TARGETS]
    assert "not measured" in markdown(some)


def test_the_tables_show_every_figure(results: dict[str, Any]):
    text = markdown(results)
    for name in BENCHMARKS:
        assert f"\n| {name} ms" in text
    assert "| edit.edit |" in text
    for target in TARGETS:
        assert str(target) in text


def test_steps_and_the_reference_loop_have_the_same_losses(results: dict[str, Any]):
    for losses in results["training"]["losses"].values():
        assert losses["step"] == pytest.approx(losses["reference"], rel=1e-4)


def test_half_precision_is_measured_too():
    half = tiny("bf16")
    assert half.lm.dtype == torch.bfloat16
    for name in ("edit", "training", "generation"):
        assert all(map(math.isfinite, numbers(BENCHMARKS[name][0](half, 1))))


def test_edits_and_adapters_say_the_same(results: dict[str, Any]):
    assert results["generation"]["same_texts"] == 1


def test_every_peak_belongs_to_an_action(setting: Setting):
    full = Setting(setting.lm, setting.editor, setting.linear, setting.examples)
    known = {f"{name}.{action}" for name, makers in MAKERS.items() for action in makers(full)}
    assert set(PEAKS) - {OPENING} <= known


def test_a_peak_counts_what_an_action_holds_for_a_while():
    def action() -> None:
        torch.ones(2**24).sum()  # 64 MiB

    found = peak(torch.device("cpu"), action)
    assert found["peak_mib"] - found["before_mib"] > 60


@pytest.mark.parametrize("benchmark", MAKERS)
def test_each_action_runs_by_itself(benchmark: str):
    for action in MAKERS[benchmark](tiny("float32")):
        MAKERS[benchmark](tiny("float32"))[action]()()
