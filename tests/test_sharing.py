"""Editors on the hub: what is pushed opens elsewhere, by id, and nothing else is fetched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from families import language_model
from hub_server import Hub, served
from huggingface_hub import ModelCard, constants

from apps.editor.shelf import OpenModel
from workbench import EditorError, EditRequest, FineTune, Mend, MendConfig, Workbench, open_model
from workbench.__main__ import main
from workbench.editors import (
    Ke,
    KeConfig,
    TrainableEditor,
    gradient_factors,
    open_editor,
    push_editor,
)
from workbench.files import read_tensors, write_tensors
from workbench.models import LanguageModel
from workbench.sharing import CARD, FILES, TENSORS, is_id, known_as, locate_editor

torch.set_num_threads(1)
NAME = "user/name"
# The client hands a file to its HTTP library the old way where the storage is not the hub's own.
pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with served(monkeypatch, tmp_path / "cache") as hub:
        yield hub


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return language_model("llama")


def editor_for(lm: LanguageModel, seed: int = 0) -> Mend:
    """A MEND editor with all its parameters moved, as if trained."""
    editor = Mend(lm, MendConfig(rank=2, edit_lr=1.0)).eval()
    asked = [EditRequest("abba is", "xy")]
    with torch.no_grad():
        editor.transform(gradient_factors(lm, editor.layers, asked)[1], gather=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in editor.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    editor.card = {"data": ["counterfact:some/facts"], "steps": 3}
    return editor


def saved(folder: Path, lm: LanguageModel) -> dict[str, bytes]:
    """The files of an editor."""
    editor_for(lm).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def logits(wb: Workbench) -> torch.Tensor:
    with torch.no_grad(), wb.applied() as model:
        return model(**wb.lm.tokenizer("abba is", return_tensors="pt")).logits


def test_what_is_pushed_opens_elsewhere_and_offline(
    hub: Hub, tiny_model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = Workbench(lm := open_model(tiny_model, device="cpu"), editor_for(lm))
    assert here.editor.push_to_hub(NAME, private=True) == f"{hub.url}/{NAME}"  # type: ignore[attr-defined]
    assert hub.visibility == {NAME: "private"}
    here.edit("abba is", "xy")
    there = Workbench.open(tiny_model, editor=NAME, device="cpu")
    assert not torch.equal(logits(there), logits(here))
    there.edit("abba is", "xy")
    assert torch.equal(logits(there), logits(here))
    assert isinstance(there.editor, Mend)
    assert there.editor.source == f"{NAME}@{hub.commits[NAME][-1][0]}"
    assert there.editor.card == here.editor.card  # type: ignore[attr-defined]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    count = len(hub.asked)
    offline = Workbench.open(tiny_model, editor=NAME, device="cpu")
    offline.edit("abba is", "xy")
    assert torch.equal(logits(offline), logits(here))
    again = Workbench.load(offline.save(tmp_path / "session"), device="cpu")
    assert isinstance(again.editor, Mend)
    assert again.editor.source == there.editor.source
    assert len(hub.asked) == count


def test_a_model_card_is_pushed_with_the_editors_name(hub: Hub, lm: LanguageModel) -> None:
    editor_for(lm).push_to_hub(NAME)
    pushed = hub.commits[NAME][-1][1]
    assert pushed.keys() == set(FILES)
    card = ModelCard(pushed["README.md"].decode())
    assert card.data.get("datasets") == ["some/facts"]
    assert f'Workbench.open("tiny-llama", editor="{NAME}")' in card.text
    assert json.loads(pushed["editor.json"])["card"]["steps"] == 3


def test_a_revision_opens_the_editor_that_was_there_then(hub: Hub, lm: LanguageModel) -> None:
    editors = [editor_for(lm, seed) for seed in (1, 2)]
    for editor in editors:
        editor.push_to_hub(NAME)
    first, last = (sha for sha, _ in hub.commits[NAME])
    for source, editor in ((f"{NAME}@{first}", editors[0]), (NAME, editors[1])):
        found = Mend.from_pretrained(source, lm)
        for name, tensor in editor.state_dict().items():
            assert torch.equal(found.state_dict()[name], tensor)
    assert Mend.from_pretrained(NAME, lm).source == f"{NAME}@{last}"


def test_an_editors_file_alone_is_fetched(hub: Hub, lm: LanguageModel, tmp_path: Path) -> None:
    """Whatever else a repository holds is left there: pickles, code, more tensors."""
    others = [
        CARD,
        "editor.pkl",
        "modeling.py",
        "config.json",
        "model.safetensors",
        f"sub/{TENSORS}",
    ]
    hub.commit(NAME, saved(tmp_path / "editor", lm) | {path: b"\x80\x04 no" for path in others})
    assert isinstance(open_editor(NAME, lm), Mend)
    assert hub.fetched == {TENSORS}
    _, folder = locate_editor(NAME)
    assert {path.name for path in folder.rglob("*")} == {TENSORS}


def test_an_editor_that_is_too_large_is_not_downloaded(
    hub: Hub, lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit(NAME, saved(tmp_path / "editor", lm))
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=1000))
    model = OpenModel(lm, {"ft": FineTune(lm)})
    with pytest.raises(EditorError, match=f"not enough memory for the editor in {NAME}"):
        model.add(NAME)
    assert not any(method == "GET" and "/resolve/" in path for method, path in hub.asked)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert model.add(NAME) == (NAME, "")
    assert any(method == "GET" and "/resolve/" in path for method, path in hub.asked)


def test_settings_that_ask_for_more_than_the_file_holds_take_no_memory(
    lm: LanguageModel, tmp_path: Path
) -> None:
    """No machine has as much as these: making the editor would end in another error."""
    path = Ke(lm, KeConfig(lstm=2, condition=2)).save_pretrained(tmp_path) / TENSORS
    tensors, metadata = read_tensors(path, EditorError)
    about = json.loads(metadata["about"])
    about["settings"]["lstm"] = 10**7
    write_tensors(path, tensors, {"about": json.dumps(about)})
    with pytest.raises(EditorError, match="size mismatch for lstm"):
        open_editor(tmp_path, lm)


def test_a_folder_comes_before_an_id(
    hub: Hub, lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    editor_for(lm).save_pretrained(tmp_path / NAME)
    found = open_editor(NAME, lm)
    assert isinstance(found, Mend)
    assert found.source == str(tmp_path / NAME)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("source", "known"),
    [
        *((NAME, True), (f"{NAME}@v1.0", True), (f"{NAME}@refs/pr/1", True)),
        *(("name", False), ("./name", False), ("../name", False), ("/user/name", False)),
        *(("a/b/c", False), (f"{NAME}@", False), ("~/name", False), (Path(NAME), False)),
        *((f"{NAME}@x/../../y", False), ("us..er/name", False), ("data/it.jsonl", False)),
    ],
)
def test_ids_are_told_from_folders(source: str | Path, known: bool) -> None:
    assert is_id(source) is known
    if isinstance(source, str):
        assert known_as(source) == (source if known else Path(source).name)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("user/none", "user/none is no folder here, .* unknown there, or private.*hf auth login"),
        ("user/private", "unknown there, or private.*HF_TOKEN"),
        ("user/gated", "gives access on request.*huggingface.co/user/gated"),
        (f"{NAME}@v2", f"{NAME}@v2 is no folder here.*not with this revision"),
        ("user/model", "holds no editor.safetensors.*a model goes to --model"),
        ("user/damaged", "damaged or no safetensors file"),
        ("user/name--x", "Cannot have -- or"),
    ],
)
def test_what_cannot_be_fetched_says_why(
    hub: Hub, lm: LanguageModel, tmp_path: Path, source: str, message: str
) -> None:
    files = saved(tmp_path / "editor", lm)
    for name in (NAME, "user/private", "user/gated"):
        hub.commit(name, files)
    hub.closed = {"user/private": "RepoNotFound", "user/gated": "GatedRepo"}
    hub.commit("user/model", {"config.json": b"{}", "model.safetensors": b""})
    hub.commit("user/damaged", files | {"editor.safetensors": b"PK"})
    with pytest.raises(EditorError, match=message):
        open_editor(source, lm)


def test_without_the_hub_only_what_was_fetched_before_opens(
    hub: Hub, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor_for(lm).push_to_hub(NAME)
    open_editor(NAME, lm)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    open_editor(NAME, lm)
    with pytest.raises(EditorError, match=r"user/other is no folder here.*HF_HUB_OFFLINE is set"):
        open_editor("user/other", lm)
    with pytest.raises(EditorError, match="HF_HUB_OFFLINE is set"):
        editor_for(lm).push_to_hub(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    open_editor(NAME, lm)
    with pytest.raises(EditorError, match="Look whether the hub can be reached"):
        open_editor("user/other", lm)


def test_an_editor_of_another_model_or_kind_is_refused_by_its_id(
    hub: Hub, lm: LanguageModel
) -> None:
    editor_for(lm).push_to_hub(NAME)
    with pytest.raises(EditorError, match=f"{NAME} was trained for tiny-llama and does not fit"):
        open_editor(NAME, language_model("gpt2"))
    with pytest.raises(EditorError, match="holds a 'mend' editor: open it by Mend"):
        Ke.from_pretrained(NAME, lm)
    Ke(lm, KeConfig(lstm=2, condition=2)).push_to_hub(NAME)
    assert isinstance(TrainableEditor.from_pretrained(NAME, lm), Ke)


def test_the_command_pushes_a_folder_and_leaves_a_card_that_was_written(
    hub: Hub, lm: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / CARD).write_text("of a project")
    folder = editor_for(lm).save_pretrained(tmp_path)
    assert (folder / CARD).read_text() == "of a project"
    (folder / CARD).unlink()
    (folder / "notes.txt").write_text("mine")
    assert main(["push", str(folder), NAME, "--no-private"]) == 0
    assert capsys.readouterr().out.strip() == f"{hub.url}/{NAME}"
    assert hub.visibility == {NAME: "public"}
    pushed = hub.commits[NAME][-1][1]
    assert pushed.keys() == set(FILES)
    assert pushed[TENSORS] == (folder / TENSORS).read_bytes()
    hub.commit(NAME, {CARD: b"written there"})
    push_editor(folder, NAME)
    assert hub.commits[NAME][-1][1][CARD] == b"written there"
    (folder / CARD).write_text("written here")
    push_editor(folder, NAME)
    assert hub.commits[NAME][-1][1][CARD] == b"written here"


def test_a_repository_of_something_else_or_public_against_the_wish_is_left_alone(
    hub: Hub, lm: LanguageModel, tmp_path: Path
) -> None:
    folder = editor_for(lm).save_pretrained(tmp_path / "editor")
    hub.commit("user/new", {".gitattributes": b"", CARD: b"---\nlicense: mit\n---\n"})
    hub.commit("user/model", {".gitattributes": b"", CARD: b"mine", "model.safetensors": b""})
    push_editor(folder, NAME, private=False)
    push_editor(folder, "user/new")
    before = {name: len(commits) for name, commits in hub.commits.items()}
    with pytest.raises(EditorError, match=r"user/model holds other files and no editor\.saf"):
        push_editor(folder, "user/model")
    with pytest.raises(EditorError, match=f"{NAME} is there already, and public; nothing was sent"):
        push_editor(folder, NAME, private=True)
    assert {name: len(commits) for name, commits in hub.commits.items()} == before
    editor_for(lm).push_to_hub("user/own", private=True)
    editor_for(lm).push_to_hub("user/own", private=True)
    assert len(hub.commits["user/own"]) == 2


def test_editors_of_the_hub_are_averaged(hub: Hub, tiny_model: str, tmp_path: Path) -> None:
    lm = open_model(tiny_model, device="cpu")
    for seed, name in enumerate((NAME, "user/other")):
        editor_for(lm, seed).push_to_hub(name)
    ids = ["--editor", NAME, "--average", "user/other"]
    assert main(["pack", "--model", tiny_model, *ids, "--out", str(tmp_path)]) == 0
    one, other, mixed = (
        dict(TrainableEditor.from_pretrained(source, lm).named_parameters())
        for source in (NAME, "user/other", tmp_path)
    )
    for name, weight in mixed.items():
        torch.testing.assert_close(weight, (one[name] + other[name]) / 2, rtol=1e-3, atol=1e-3)
    card = TrainableEditor.from_pretrained(tmp_path, lm).card
    assert card["averaged"] == "0.5 of the weights come from user/other"


def test_what_cannot_be_pushed_says_why_and_sends_nothing(
    hub: Hub, lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = editor_for(lm).save_pretrained(tmp_path / "editor")
    with pytest.raises(EditorError, match="There is no file"):
        push_editor(tmp_path, NAME)
    with pytest.raises(EditorError, match="'name' is no name of a repository: give owner/name"):
        push_editor(folder, "name")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(EditorError, match=r"needs a token.*`hf auth login`, or set HF_TOKEN"):
        push_editor(folder, NAME)
    tensors, metadata = read_tensors(folder / TENSORS, EditorError)
    about = json.loads(metadata["about"]) | {"base_model": "/home/me/tiny-llama"}
    write_tensors(tmp_path / "old" / TENSORS, tensors, {"about": json.dumps(about)})
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    with pytest.raises(EditorError, match=r"its base model by where it lay, /home.*save it anew"):
        push_editor(tmp_path / "old", NAME)
    assert hub.asked == []
    with pytest.raises(EditorError, match=f"{NAME} cannot be written.*a token that may do so"):
        push_editor(folder, NAME)
    assert hub.commits == {}


def test_the_app_opens_an_editor_by_its_id(hub: Hub, lm: LanguageModel) -> None:
    editor_for(lm).push_to_hub(NAME)
    model = OpenModel(lm, {"ft": FineTune(lm)})
    assert model.add(NAME) == (NAME, "")
    assert isinstance(model.editors[NAME], Mend)
    assert model.add(f"{NAME}@{hub.commits[NAME][0][0]}") == (NAME, "")  # the same one
    editor_for(lm, 1).push_to_hub(NAME)
    named = f"{NAME}@{hub.commits[NAME][1][0][:7]}"
    assert model.add(NAME) == model.add(NAME) == (named, "")
    assert [*model.editors] == ["ft", NAME, named]


def test_a_local_model_is_named_without_where_it_lies(tiny_model: str, tmp_path: Path) -> None:
    lm = open_model(tiny_model, device="cpu")
    folder = editor_for(lm).save_pretrained(tmp_path / "editor")
    for file in folder.iterdir():
        assert str(Path(tiny_model).parent).encode() not in file.read_bytes()
    again = open_model(tiny_model, device="cpu", dtype="bfloat16")
    assert isinstance(open_editor(folder, again), Mend)  # the same model: no warning
