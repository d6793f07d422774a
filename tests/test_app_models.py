"""The app's shelf of models, and the tab that opens models and editors."""

from __future__ import annotations

import gc
import json
import re
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradio as gr
import psutil
import pytest
import torch
from families import FAMILIES, language_model, tiny_tokenizer

from apps.editor import models, page
from apps.editor.sessions import SCREEN, Session
from apps.editor.shelf import Shelf
from workbench import (
    EditorError,
    EditRequest,
    FineTune,
    FineTuneConfig,
    Mend,
    MendConfig,
    ModelError,
    Workbench,
)
from workbench.editors.proposals import gradient_factors
from workbench.files import read_tensors, write_tensors
from workbench.models import LanguageModel, open_model
from workbench.sharing import TENSORS

torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "tiny-gpt2", "gpt2")


def saved(folder: Path, family: str) -> Path:
    FAMILIES[family]().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def trained(folder: Path, lm: LanguageModel) -> Path:
    """A MEND editor that has seen one edit."""
    editor = Mend(lm, MendConfig(rank=2, blocks=[-1]))
    editor.card = {"steps": 1}
    with torch.no_grad():
        asked = [EditRequest("abba is", "xy")]
        editor.transform(gradient_factors(lm, editor.layers, asked)[1], gather=True)
    return editor.save_pretrained(folder)


@pytest.fixture
def shelf() -> Shelf:
    lm = language_model("llama")
    return Shelf(Workbench(lm, FineTune(lm, FineTuneConfig(blocks=[-1], max_steps=2))), most=2)


@pytest.fixture
def session(shelf: Shelf) -> Iterator[Session]:
    session = Session(shelf)
    yield session
    session.close()


def switched(session: Session, source: Path | str) -> list[tuple]:
    return list(models.switch(session, str(source), "", False))


def test_a_model_is_estimated_then_opened_without_the_edits(session: Session, folder: Path):
    session.edit("abba is", "xy")
    before = session.model
    opening, opened = switched(session, folder)
    assert len(opening) == len(opened) == 3 + SCREEN + page.FORM
    assert "It fits." in opening[0]
    assert str(folder) in opened[0]
    assert "1 edit of the session before stayed behind" in opened[0]
    assert "No trained editor is known" in opened[0]
    assert str(folder) in opened[1]
    assert opened[2]["choices"] == [("Fine-tuning", "ft")]
    assert session.bench.lm.source == str(folder)
    assert session.bench.history == ()
    assert session not in before.users
    assert session.edit("abba is", "xy").id == 1


def test_users_share_a_model(shelf: Shelf, folder: Path):
    sessions = [Session(shelf) for _ in range(3)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda session: switched(session, folder), sessions))
    assert len({id(session.bench.lm) for session in sessions}) == 1
    (again,) = switched(sessions[0], folder)  # open already: nothing to estimate
    assert "is open" in again[0]


def test_a_model_that_does_not_fit_is_refused_and_nothing_is_lost(
    session: Session, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    session.edit("abba is", "xy")
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=1000))
    said = models.estimate(session, str(folder), "")
    assert "It does not fit." in said
    assert "or open a smaller model" in said
    with pytest.raises(gr.Error, match="not enough memory, so nothing was opened"):
        switched(session, folder)
    assert session.bench.lm is session.shelf.first.lm
    assert len(session.bench.history) == 1


def test_a_model_that_is_not_there_is_named_and_escaped(session: Session):
    with pytest.raises(gr.Error, match="&lt;b&gt;"):
        switched(session, "<b>none</b>.gguf")


def test_the_model_unused_for_longest_makes_room(shelf: Shelf, session: Session, tmp_path: Path):
    first, second = (saved(tmp_path / name, "gpt2") for name in ("first", "second"))
    gone = weakref.ref(shelf.open(str(first), None).lm)
    shelf.open(str(second), None)
    gc.collect()
    assert gone() is None
    assert shelf.find(str(first), None) is None
    assert shelf.find("tiny-llama", None) is shelf.first  # a session uses it


def test_models_in_use_are_not_dropped(shelf: Shelf, tmp_path: Path):
    users = [Session(shelf) for _ in range(2)]
    first, second = (saved(tmp_path / name, "gpt2") for name in ("first", "second"))
    switched(users[1], first)
    with pytest.raises(ModelError, match=r"All 2 models.*in use: tiny-llama"):
        shelf.open(str(second), None)
    users[1].use(shelf.first)
    assert shelf.open(str(second), None).lm.source == str(second)


def test_an_opened_editor_is_offered_to_all_and_edits_stay(
    session: Session, shelf: Shelf, tmp_path: Path
):
    session.edit("abba is", "xy")
    said, _, radio = models.add(session, str(trained(tmp_path / "mine", session.bench.lm)))
    assert "mine is open" in said
    assert radio["value"] == "mine"
    assert len(session.bench.history) == 1
    assert isinstance(session.bench.editor, Mend)
    assert session.edit("no no", "z").id == 2
    other = Session(shelf)
    assert {name for _, name in models.choice(other)["choices"]} == {"mine", "ft"}
    assert other.editor == "ft"  # as the server was started, whatever others open
    models.choose(session, "ft")
    assert isinstance(session.bench.editor, FineTune)
    models.add(session, str(tmp_path / "mine"))  # read anew, not offered twice
    models.add(session, str(trained(tmp_path / "other" / "mine", session.bench.lm)))
    assert list(session.model.editors) == ["ft", "mine", "mine'"]


@pytest.mark.parametrize(
    "card",
    [
        {"evaluation": [1]},
        {"evaluation": {"figures": []}},
        {"data": None, "steps": [1], "edits_seen": {}},
        {"data": ["<i>", "\ud800"], "evaluation": {"figures": {"<i>\ud800": 1e400, "<b>": 1}}},
    ],
)
def test_a_hostile_card_is_shown_as_text(session: Session, tmp_path: Path, card: dict) -> None:
    folder = trained(tmp_path / "evil", session.bench.lm)
    tensors, metadata = read_tensors(folder / TENSORS, EditorError)
    about = json.loads(metadata["about"]) | {"card": card}
    write_tensors(folder / TENSORS, tensors, {"about": json.dumps(about)})
    _, header, _ = models.add(session, str(folder))
    assert models.choose(session, "evil") == header
    assert "How the editor was trained" in header
    assert not re.findall("<i>|\ud800", header)


def test_an_editor_that_does_not_fit_is_refused_and_nothing_is_lost(
    session: Session, tmp_path: Path
):
    session.edit("abba is", "xy")
    foreign = trained(tmp_path / "foreign", language_model("gpt2"))
    for folder, message in (
        (foreign, "does not fit tiny-llama"),
        (tmp_path / "none", "There is no file"),
        (" ", "Give the folder"),
    ):
        with pytest.raises(gr.Error, match=message):
            models.add(session, str(folder))
    with pytest.raises(gr.Error, match="no editor 'mend'"):
        models.choose(session, "mend")
    assert session.editor == "ft"
    assert len(session.bench.history) == 1


def test_an_untrained_editor_is_refused_with_what_to_do_instead(session: Session, tmp_path: Path):
    lm = session.bench.lm
    Mend(lm, MendConfig(rank=2, blocks=[-1])).save_pretrained(tmp_path / "fresh")
    with pytest.raises(gr.Error, match=r"never trained.*Train tab.*fine-tuning"):
        models.add(session, str(tmp_path / "fresh"))
    assert list(session.model.editors) == ["ft"]
    assert models.choice(session)["info"] == models.UNTRAINED
    begun = Session(Shelf(Workbench(lm, Mend(lm, MendConfig(rank=2, blocks=[-1])))))
    assert begun.editor == "ft"
    assert begun.edit("abba is", "xy").id == 1


def test_an_editor_too_large_for_the_memory_is_refused(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = trained(tmp_path / "large", session.bench.lm)
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=1000))
    with pytest.raises(gr.Error, match=r"not enough memory for the editor in large"):
        models.add(session, str(folder))
    assert list(session.model.editors) == ["ft"]


def test_an_editor_of_other_weights_comes_with_a_warning(session: Session, tmp_path: Path):
    lm = session.bench.lm
    twin = language_model("llama")
    with torch.no_grad():
        next(twin.model.parameters()).mul_(2)
    said, *_ = models.add(session, str(trained(tmp_path / "twin", twin)))
    assert lm.fingerprint() in said
    assert "fail or spread" in said


def test_the_default_model_brings_its_trained_editor(default_model: LanguageModel, shelf: Shelf):
    model = shelf.open("", None)
    assert (model.lm.source, model.preferred) == (default_model.source, "mend")
    assert shelf.find(default_model.source, None) is model


def test_a_session_of_another_model_says_which(session: Session, folder: Path):
    session.edit("abba is", "xy")
    made = page.save(session)
    switched(session, folder)
    with pytest.raises(gr.Error, match="was made over tiny-llama"):
        list(page.load(session, made))
    assert session.bench.lm.source == str(folder)


def test_opened_as_by_the_library(shelf: Shelf, folder: Path):
    assert shelf.open(str(folder), None).lm.fingerprint() == open_model(folder).fingerprint()
