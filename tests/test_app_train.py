"""The app's training runs: one at a time, the server's, stopped, resumed and kept."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gradio as gr
import psutil
import pytest
import torch
from families import chat_model, language_model

from apps.editor import figures, markup, models, runs, train
from apps.editor.run import ABOUT, Run
from apps.editor.runs import Runs, blocks_of
from apps.editor.sessions import Session
from apps.editor.shelf import Shelf
from workbench import EditorError, FineTune, FineTuneConfig, Mend, Workbench
from workbench.models import LanguageModel

torch.set_num_threads(1)
PATIENCE = 60


@pytest.fixture
def shelf() -> Shelf:
    lm = language_model("gpt2")
    return Shelf(Workbench(lm, FineTune(lm, FineTuneConfig(blocks=[-1], max_steps=2))))


@pytest.fixture
def session(shelf: Shelf, tmp_path: Path) -> Iterator[Session]:
    session = Session(shelf, Runs(tmp_path / "runs"))
    yield session
    if session.runs.last is not None and session.runs.last.live:
        session.runs.stop()
        wait(lambda: not session.runs.last.live)  # type: ignore[union-attr]
    session.close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twenty edits short enough for the tiny model."""
    file = tmp_path / "items.jsonl"
    records = [
        {
            "prompt": f"Item {index} is",
            "target": chr(ord("a") + index),
            "subject": f"Item {index}",
            "split": "train" if index % 4 else "dev",
            "paraphrases": [f"The {index}th is"],
        }
        for index in range(20)
    ]
    file.write_text("".join(json.dumps(counterfact(record)) + "\n" for record in records))
    return file


def counterfact(record: dict) -> dict:
    """A record in CounterFact's own form."""
    return {
        "case_id": record["subject"],
        "split": record["split"],
        "requested_rewrite": {
            "prompt": record["prompt"].replace(record["subject"], "{}"),
            "subject": record["subject"],
            "target_new": {"str": record["target"]},
            "target_true": {"str": "z"},
        },
        "paraphrase_prompts": record["paraphrases"],
        "neighborhood_prompts": ["Item 99 is"],
    }


def wait(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def begin(session: Session, data: Path, name: str = "mine", steps: int = 3, **other) -> Run:
    fields = {"blocks": "-1", "rank": 2, "lr": 1e-3, "c_edit": 0.3, "skip_bad": False} | other
    train.start(session, name, "counterfact", str(data), steps, 2, **fields)
    assert session.runs.last is not None
    return session.runs.last


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Holds every run before its second step until it is set."""
    gate, step = threading.Event(), runs.Trainer._step

    def held(trainer):
        if trainer.progress.step:
            assert gate.wait(PATIENCE)
        return step(trainer)

    monkeypatch.setattr(runs.Trainer, "_step", held)
    return gate


def test_a_run_ends_and_its_editor_is_offered_to_all(session: Session, data: Path):
    run = begin(session, data)
    wait(lambda: not run.live)
    assert (run.state, run.step) == ("finished", 3), run.plan.said
    other = Session(session.shelf, session.runs)
    assert {name for _, name in models.choice(other)["choices"]} == {"mine", "ft"}
    other.choose("mine")
    assert isinstance(other.bench.editor, Mend)
    assert other.edit("Item 3 is", "q").id == 1
    status, curves, start, stop, earlier, editor = train.show(other)
    assert "step 3 of 3" in status
    assert json.loads(curves["value"].plot)["config"]["toImageButtonOptions"]["scale"] == 2
    saved = Path(figures.as_page(other, "training-curves"))
    assert saved.name == "training-curves.html"
    assert "edit loss (nats)" in saved.read_text()
    other.close()
    assert (start["interactive"], stop["interactive"]) == (True, False)
    assert earlier["choices"] == ["mine"]
    assert editor["value"] == "mine"


def test_a_second_start_is_refused_and_a_reloaded_page_shows_the_first(
    session: Session, data: Path, gate: threading.Event
):
    run = begin(session, data)
    wait(lambda: run.step == 1)
    other = Session(session.shelf, session.runs)
    with pytest.raises(gr.Error, match="one editor at a time: mine is at step 1 of 3"):
        begin(other, data, "yours")
    header, status, _, start, stop, *_ = train.arrive(other)
    assert "tiny-gpt2" in header
    assert 'data-state="running"' in status
    assert "step 1 of 3" in status
    assert (start["interactive"], stop["interactive"]) == (False, True)
    assert all(value["__type__"] == "update" and len(value) == 1 for value in train.refresh(other))
    gate.set()
    wait(lambda: not run.live)
    assert 'data-state="finished"' in train.refresh(other)[0]


def test_a_stopped_run_keeps_its_editor_and_is_resumed(
    session: Session, data: Path, gate: threading.Event
):
    run = begin(session, data)
    wait(lambda: run.step == 1)
    train.stop(session)
    assert run.state == "stopping"
    gate.set()
    wait(lambda: not run.live)
    assert run.state == "stopped"
    assert run.step < 3
    assert "mine" in session.model.editors
    with pytest.raises(gr.Error, match="No training run is in progress"):
        train.stop(session)
    with pytest.raises(gr.Error, match="There is a run named 'mine'"):
        begin(session, data)
    data.unlink()  # the run has its own copy
    train.resume(session, "mine")
    resumed = session.runs.last
    assert resumed is not None
    wait(lambda: not resumed.live)
    assert (resumed.state, resumed.step) == ("finished", 3), resumed.plan.said
    with pytest.raises(gr.Error, match="mine is finished, after 3 steps"):
        train.resume(session, "mine")


def test_a_run_goes_on_with_the_template_that_it_began_with(
    data: Path, gate: threading.Event, tmp_path: Path
):
    lm = chat_model()
    session = Session(Shelf(Workbench(lm, FineTune(lm))), Runs(tmp_path / "runs"))
    run = begin(session, data)
    wait(lambda: run.step == 1)
    assert "· chat" in markup.run_status(run)
    session.runs.stop()
    gate.set()
    wait(lambda: not run.live)
    session.use(session.model, chat=False)
    train.resume(session, "mine")
    resumed = session.runs.last
    assert resumed is not None
    wait(lambda: not resumed.live)
    assert (resumed.state, resumed.step) == ("finished", 3), resumed.plan.said
    about = json.loads((resumed.folder / "editor.json").read_text())
    assert about["card"]["chat"] is True
    session.close()


def test_a_run_of_a_killed_server_is_shown_and_resumed(
    session: Session, data: Path, gate: threading.Event
):
    gate.set()
    run = begin(session, data)
    wait(lambda: not run.live)
    about = json.loads((run.folder / ABOUT).read_text())
    about |= {"state": "running", "training": about["training"] | {"steps": 5}}
    (run.folder / ABOUT).write_text(json.dumps(about))

    later = Session(session.shelf, Runs(session.runs.folder))
    assert later.watched() is None
    assert later.runs.of(later.bench.lm) == ["mine"]
    status = train.watch(later, "mine")[0]
    assert "interrupted" in status
    assert "step 3 of 5" in status
    train.take(later, "mine")
    assert later.editor == "mine"
    train.resume(later, "mine")
    resumed = later.runs.last
    assert resumed is not None
    wait(lambda: not resumed.live)
    assert (resumed.state, resumed.step) == ("finished", 5), resumed.plan.said


def test_a_run_of_another_living_server_is_left_to_it(session: Session, data: Path):
    run = begin(session, data, steps=1)
    wait(lambda: not run.live)
    parent = psutil.Process().ppid()
    about = json.loads((run.folder / ABOUT).read_text())
    about |= {"state": "running", "server": [parent, psutil.Process(parent).create_time()]}
    (run.folder / ABOUT).write_text(json.dumps(about))
    later = Session(session.shelf, Runs(session.runs.folder))
    assert "Another server" in train.watch(later, "mine")[0]
    with pytest.raises(gr.Error, match="Another server on this machine is at work on mine"):
        train.resume(later, "mine")


def test_an_upload_cannot_take_the_place_of_the_runs_own_files(session: Session, data: Path):
    run = begin(session, data.rename(data.with_name("run.json")), steps=1)
    wait(lambda: not run.live)
    assert Run.at(run.folder).plan.data == "counterfact:run.json"


def test_a_failed_run_says_why_and_offers_no_editor(
    session: Session, data: Path, monkeypatch: pytest.MonkeyPatch
):
    def diagnosed(self):
        raise EditorError("Training stopped at step 3: the edit loss does <not> fall.")

    monkeypatch.setattr(runs.Trainer, "_check_health", diagnosed)
    run = begin(session, data)
    wait(lambda: not run.live)
    assert run.state == "failed"
    shown = train.show(session)[0]
    assert "the edit loss does &lt;not&gt; fall" in shown
    assert list(session.model.editors) == ["ft"]
    with pytest.raises(gr.Error, match="has kept no editor: it is failed"):
        train.take(session, "mine")


def test_what_a_run_cannot_do_is_said_before_it_starts(session: Session, data: Path):
    data.write_text(data.read_text() + '{"case_id": 1}\n')
    for fields, message in (
        ({}, "items.jsonl, record 21, field 'subject'.*tick 'Leave out records"),
        ({"name": "../up"}, "no name for a run"),
        ({"name": " "}, "no name for a run"),
        ({"steps": None}, "Steps must be a whole number"),
        ({"lr": 0}, "Learning rate must be a positive number"),
        ({"blocks": "7", "skip_bad": True}, "block"),
    ):
        with pytest.raises(gr.Error, match=message) as refused:
            begin_with(session, data, fields)
        assert str(data.parent) not in str(refused.value)
    assert session.runs.last is None
    assert not list(data.parent.glob("runs/*"))
    run = begin(session, data, steps=1, skip_bad=True)
    wait(lambda: not run.live)
    assert run.state == "finished", run.plan.said


def begin_with(session: Session, data: Path, fields: dict) -> None:
    begin(session, data, **fields)


def test_a_file_is_asked_for(session: Session):
    assert train.needs_file("facts")["visible"] is False
    assert train.needs_file("zsre")["visible"] is True
    with pytest.raises(gr.Error, match="Give the zsRE file, or choose the built-in facts"):
        train.start(session, "mine", "zsre", None, 1, 1, "", 2, 1e-3, 0.3, False)


def test_a_run_of_another_model_is_not_resumed_here(session: Session, data: Path):
    run = begin(session, data, steps=1)
    wait(lambda: not run.live)
    run.note("stopped")
    lm = language_model("llama")
    other = Session(Shelf(Workbench(lm, FineTune(lm))), session.runs)
    assert session.runs.of(lm) == []
    with pytest.raises(gr.Error, match="mine trains an editor for tiny-gpt2"):
        train.resume(other, "mine")


def test_the_usual_blocks(default_model: LanguageModel):
    assert blocks_of(default_model) == [16, 17, 18]
    assert blocks_of(language_model("gpt2")) is None


def test_status_without_a_run():
    assert "No training run is in progress" in markup.run_status(None)
