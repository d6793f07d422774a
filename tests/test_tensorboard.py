"""Training in TensorBoard: what its own reader finds there is what log.jsonl says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from runs import trainer_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from workbench.__main__ import main
from workbench.errors import EditorError
from workbench.training import LOG
from workbench.training.tensorboard import tensorboard_log


def logged(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The numbers of a training's log, by what TensorBoard should call them."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in (folder / LOG).read_text().splitlines():
        record = json.loads(line)
        group = "validation" if "validation" in record else "training"
        for name, value in record.get("validation", record).items():
            if name != "step":
                found.setdefault(f"{group}/{name}", []).append((record["step"], value))
    return found


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def assert_same(board: Path, run: Path) -> None:
    theirs, ours = shown(board), logged(run)
    assert theirs.keys() == ours.keys()
    assert {"training/edit", "training/gradient_norm", "validation/total"} <= ours.keys()
    for tag, pairs in ours.items():
        assert [step for step, _ in theirs[tag]] == [step for step, _ in pairs]
        values = [value for _, value in pairs]
        assert [value for _, value in theirs[tag]] == pytest.approx(values, rel=1e-6)


class Killed(Exception):
    """Ends a run between two checkpoints."""


def test_a_run_that_is_killed_and_resumed_shows_each_step_once(tmp_path: Path) -> None:
    board, run = tmp_path / "board", tmp_path / "run"

    def kill(progress: object, losses: object) -> None:
        if progress.step == 5:  # type: ignore[attr-defined]
            raise Killed

    with pytest.raises(Killed), tensorboard_log(board) as on_record:
        trainer_for(run, on_step=kill, on_record=on_record).run(bar=False)
    assert max(step for step, _ in shown(board)["training/edit"]) == 5
    with tensorboard_log(board) as on_record:
        trainer_for(run, on_record=on_record).run(resume=True, bar=False)
    assert [step for step, _ in shown(board)["training/edit"]] == list(range(1, 7))
    assert_same(board, run)


def test_the_command_logs_beside_its_own_file(tiny_model: str, tmp_path: Path) -> None:
    board, run = tmp_path / "board", tmp_path / "run"
    command = ["train", "--model", tiny_model, "--data", "facts", "--limit", "9", "--rank", "4"]
    command += ["--steps", "2", "--batch", "2", "--validation", "2", "--validate-every", "1"]
    command += ["--health-after", "0", "--text-tokens", "8", "--device", "cpu"]
    assert main([*command, "--out", str(run), "--tensorboard", str(board)]) == 0
    assert_same(board, run)


def test_without_tensorboard_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(EditorError, match=r"\[tensorboard\]"), tensorboard_log(tmp_path / "board"):
        pass
    assert not (tmp_path / "board").exists()
