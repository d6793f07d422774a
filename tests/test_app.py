"""The app: what its endpoints and handlers do, over a live server and the default model."""

from __future__ import annotations

import copy
import re
import socket
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr
import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError

from apps import editor_app
from apps.editor import figures, markup, page
from apps.editor.sessions import MOST_PROMPTS, Session
from apps.editor.shelf import Shelf
from apps.editor_app import ENDPOINTS, build, launch, main
from workbench import (
    Comparison,
    FineTune,
    FineTuneConfig,
    PromptComparison,
    Workbench,
    tables,
)
from workbench.editors import Mend, shipped_editor
from workbench.results import HistoryEntry

if TYPE_CHECKING:
    from workbench.models import LanguageModel

FRANCE = ("The capital of France is", "Lyon")
NASTY = "<img src=x onerror=alert(1)> ${alert(2)} {{value}} & \"'"


@pytest.fixture(scope="module")
def bench(default_model: LanguageModel) -> Workbench:
    """Fine-tuning one block at this rate takes a few steps, and ends when the target is said."""
    torch.set_num_threads(1)
    config = FineTuneConfig(blocks=[18], lr=1e-3, max_steps=20)
    return Workbench(default_model, FineTune(default_model, config))


@pytest.fixture(scope="module")
def url(bench: Workbench, free_port: int) -> Iterator[str]:
    app = build(bench)
    _, url, _ = launch(app, server_port=free_port, prevent_thread_lock=True, quiet=True)
    yield url
    app.close()


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    client = Client(url, verbose=False)
    yield client
    client.close()


@pytest.fixture
def session(bench: Workbench) -> Iterator[Session]:
    session = Session(Shelf(bench))
    yield session
    session.close()


def look(client: Client, prompt: str = FRANCE[0]) -> dict:
    return client.predict(f"{prompt} => Lyon", api_name="/compare")[0]


def test_endpoints_are_named(client: Client):
    described = client.view_api(return_format="dict", print_info=False)
    assert set(described["named_endpoints"]) == {f"/{name}" for name in (*ENDPOINTS, "cancel")}  # type: ignore[index]


def test_an_edit_is_made_undone_exactly_and_done_again(client: Client):
    before = look(client)
    made = client.predict(*FRANCE, api_name="/edit")
    assert made["rows"][0]["prompt"] == FRANCE[0]
    assert made["rows"][0]["edited_text"].split()[0].startswith("Lyon")
    assert made["rows"][0]["base_text"] != made["rows"][0]["edited_text"]
    assert {row["kind"] for row in made["rows"]} == {"edit", "equivalent", "neighbor", "unrelated"}
    after = look(client)
    assert after["edited_exact"]
    assert after["edited_probability"] > before["edited_probability"]
    assert client.predict(api_name="/undo") == []
    assert look(client) == before
    assert client.predict(api_name="/redo") == made["history"]
    assert look(client) == after


def test_switch_strength_and_removal_act_on_the_model(client: Client):
    made = client.predict(*FRANCE, api_name="/edit")
    on = look(client)
    assert client.predict(made["id"], api_name="/toggle")[0]["enabled"] is False
    assert look(client)["divergence"] == 0
    assert client.predict(made["id"], api_name="/toggle")[0]["enabled"] is True
    assert client.predict(made["id"], 0.5, api_name="/strength")[0]["strength"] == 0.5
    assert 0 < look(client)["divergence"] < on["divergence"]
    assert client.predict(made["id"], api_name="/remove") == client.predict(api_name="/history")
    assert look(client)["divergence"] == 0


def test_inspect_and_probe_are_about_the_edit(client: Client, bench: Workbench):
    made = client.predict(*FRANCE, api_name="/edit")
    trace = client.predict(made["id"], api_name="/inspect")
    assert [layer["name"] for layer in trace["layers"]] == [
        layer.name for layer in bench.editor.layers
    ]
    assert "".join(trace["tokens"]) == FRANCE[0]
    assert all(layer["update_norm"] > 0 for layer in trace["layers"])
    rows = client.predict(made["id"], api_name="/probe")
    assert rows[0]["prompt"] == FRANCE[0]
    assert rows[0]["edited_text"].startswith(made["rows"][0]["edited_text"][:4])
    assert {"equivalent", "portability", "neighbor", "unrelated"} <= {row["kind"] for row in rows}
    assert all(row["verdict"] and row["made"] and 0 <= row["score"] <= 1 for row in rows)


def test_two_users_edit_at_once_and_see_their_own_edits_alone(url: str, bench: Workbench):
    requests = [FRANCE, ("The Eiffel Tower is located in the city of", "Rome")]
    with ThreadPoolExecutor() as pool:
        clients = list(pool.map(lambda _: Client(url, verbose=False), requests))
        made = list(pool.map(lambda c, r: c.predict(*r, api_name="/edit"), clients, requests))
    for client, request, answer in zip(clients, requests, made, strict=True):
        assert [e["title"] for e in client.predict(api_name="/history")] == [" → ".join(request)]
        alone = bench.fork()
        alone.edit(*request)
        row = alone.compare(alone.suggest(*request)).rows[0]
        assert answer["rows"][0]["edited_text"] == row.edited_text
        assert answer["rows"][0]["edited_probability"] == pytest.approx(
            row.edited_probability, rel=1e-3
        )
        client.close()
    assert bench.history == ()


@pytest.mark.parametrize(
    ("endpoint", "arguments", "message"),
    [
        ("edit", ("", "Lyon"), "prompt is empty"),
        ("edit", ("The capital of France is", "  "), "target is empty"),
        ("edit", ("word " * 9000, "Lyon"), "token"),
        ("undo", (), "nothing to undo"),
        ("redo", (), "nothing to redo"),
        ("toggle", (9,), "no edit 9"),
        ("strength", (9, 1.0), "no edit 9"),
        ("remove", (9,), "no edit 9"),
        ("inspect", (9,), "no edit 9"),
        ("probe", (9,), "no edit 9"),
        ("compare", ("\n \n",), "prompts, one a line"),
        ("compare", ("Bees make\n" * (MOST_PROMPTS + 1),), "prompts, one a line"),
    ],
)
def test_bad_input_is_answered_with_a_message(
    client: Client, endpoint: str, arguments: tuple, message: str
):
    with pytest.raises(AppError, match=message):
        client.predict(*arguments, api_name=f"/{endpoint}")
    assert client.predict(api_name="/history") == []


def test_a_copied_session_shares_the_model_and_has_no_edits(session: Session):
    session.edit(*FRANCE)
    copied = copy.deepcopy(session)
    assert copied.bench.lm is session.bench.lm
    assert copied.bench.editor is session.bench.editor
    assert copied.bench.history == () != session.bench.history


def test_a_session_goes_to_a_file_and_back(session: Session, bench: Workbench):
    session.edit(*FRANCE)
    session.edit("Bees make", "silk")
    session.bench.toggle(1)
    session.bench.strength(2, 0.5)
    saved = page.save(session)
    other = Session(Shelf(bench))
    *_, values = page.load(other, saved)
    assert other.bench.history == session.bench.history
    assert "Bees make" in values
    restored, kept = (
        bench.compare(["Bees make"], max_new_tokens=1) for bench in (other.bench, session.bench)
    )
    assert restored == kept
    other.close()


def test_the_export_is_an_adapter(session: Session):
    session.edit(*FRANCE)
    with zipfile.ZipFile(page.export(session)) as archive:
        names = set(archive.namelist())
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= names


def test_a_file_that_is_no_session_is_refused(session: Session, tmp_path):
    session.edit(*FRANCE)
    text, empty = tmp_path / "notes.zip", tmp_path / "empty.zip"
    text.write_text("no archive")
    with zipfile.ZipFile(empty, "w") as archive:
        archive.writestr("session/notes.txt", "{}")
    for path in (text, empty):
        with pytest.raises(gr.Error, match="is no saved session"):
            list(page.load(session, str(path)))
    assert len(session.bench.history) == 1


@pytest.mark.parametrize("absolute", [False, True])
def test_names_in_an_archive_lead_to_no_file_outside(
    session: Session, tmp_path: Path, absolute: bool
):
    session.edit(*FRANCE)
    with zipfile.ZipFile(page.save(session)) as archive:
        saved = archive.read(f"session/{page.SESSION_FILE}")
    outside = session.folder("loaded").parent / page.SESSION_FILE
    packed = tmp_path / "session.zip"

    def loaded(inside: bytes, there: bytes) -> None:
        outside.write_bytes(there)
        before = files_below(outside.parent)
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr(str(outside) if absolute else f"../{page.SESSION_FILE}", inside)
        try:
            list(page.load(session, str(packed)))
        finally:
            assert files_below(outside.parent) == before

    with pytest.raises(gr.Error, match="damaged"):
        loaded(b"no session", there=saved)
    session.bench.undo()
    loaded(saved, there=b"no session")
    assert [entry.title for entry in session.bench.history] == [" → ".join(FRANCE)]


def files_below(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_figures_in_sight_are_saved_as_one_page_that_asks_no_one(session: Session):
    with pytest.raises(gr.Error, match="no figure to save"):
        figures.as_page(session, "update-size")
    session.edit(*FRANCE)
    page.screen(session)
    saved = Path(figures.as_page(session, "update-size\nupdate-share"))
    text = saved.read_text()
    assert saved.name == "update-size.html"
    assert text.count("Plotly.newPlot(") == 2
    assert not re.search(r"<script[^>]+src=|<link", text)
    with pytest.raises(gr.Error, match="no figure to save"):
        figures.as_page(session, "../update-size")


def test_a_locked_app_opens_and_trains_nothing(bench: Workbench, url: str):
    def handlers(app: gr.Blocks) -> set[str]:
        return {f.fn.__module__ + "." + f.fn.__name__ for f in app.fns.values() if f.fn}

    locked, open_ = handlers(build(bench, locked=True)), handlers(build(bench))
    assert locked < open_
    missing = {name.rpartition(".")[2] for name in open_ - locked}
    assert {"estimate", "switch", "add", "start", "stop", "resume", "take"} <= missing
    assert not [name for name in locked if ".train." in name]


class Page(HTMLParser):
    """Tags and text of a piece of HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_texts_are_shown_as_text():
    row = PromptComparison(NASTY, "edit", f"{NASTY} old", f"{NASTY} new", NASTY, 0.1, 0.9, False)
    entry = HistoryEntry(1, NASTY, True, 1.0)
    for html in (
        tables.comparison_table(Comparison((row,)), NASTY),
        markup.history_list([entry], 1),
        tables.placeholder(NASTY),
    ):
        shown = Page(html)
        assert NASTY in shown.text
        assert not {"img", "script"} & set(shown.tags)


def test_the_header_tells_how_the_editor_was_trained(bench: Workbench, default_model):
    assert "<details>" not in markup.header(bench, "ft")
    editor = Mend.from_pretrained(shipped_editor(), default_model)
    shown = Page(markup.header(Workbench(default_model, editor), "mend"))
    assert f"{default_model.model.get_memory_footprint() / 2**20:,.0f} MiB" in shown.text
    assert f"{editor.card['edits_seen']:,}" in shown.text


def test_what_changed_is_marked_and_nothing_else():
    row = PromptComparison("p", "edit", "It is Paris today", "It is Lyon today", "Lyon")
    html = tables.comparison_table(Comparison((row,)))
    assert "It is <del>Paris </del>today" in html
    assert "It is <mark>Lyon </mark>today" in html
    same = PromptComparison("p", "unrelated", "It is\nso", "It is\nso")
    html = tables.comparison_table(Comparison((same,)))
    assert "<mark>" not in html
    assert "✓ unchanged" in html


@pytest.mark.parametrize(
    ("after", "answer", "verdict", "count"),
    [
        ("Berlin, so", "Berlin", "✓ unchanged", "1 of 1 neighbours kept"),
        ("Berlin. Then", "Berlin", "✓ answer kept", "1 of 1 neighbours kept"),
        ("Lyon, so", "Berlin", "✗ changed", "0 of 1 neighbours kept"),
        ("Bonn, so", "Bonn", "✗ changed", "0 of 1 neighbours kept"),  # not what it said before
        ("Berlin. Then", None, "✗ changed", "0 of 1 neighbours kept"),
    ],
)
def test_a_neighbour_is_kept_where_its_answer_is(after, answer, verdict, count):
    row = PromptComparison("p", "neighbor", "Berlin, so", after, answer)
    html = tables.comparison_table(Comparison((row,)))
    assert verdict in html
    assert count in html


def test_the_command_line_says_why_a_model_cannot_be_opened(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(["--model", str(tmp_path / "nothing"), "--device", "cpu"])
    assert stopped.value.code == 1
    assert "nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "can open models and folders on it, and train. --locked leaves"),
        (["--host", "0.0.0.0", "--locked"], "can edit with what is open, and no more"),
        ([], ""),
        (["--locked"], ""),
    ],
)
def test_it_says_what_a_public_host_lets_others_do(
    arguments: list[str], said: str, tiny_model: str, capsys, monkeypatch: pytest.MonkeyPatch
):
    served = []
    monkeypatch.setattr(editor_app, "launch", lambda app, **options: served.append(options))
    main(["--model", tiny_model, "--device", "cpu", "--port", "0", *arguments])
    assert [options["server_name"] for options in served] == ["0.0.0.0" if said else "127.0.0.1"]
    out = capsys.readouterr().out
    assert said in out
    assert ("Whoever reaches this server" in out) is bool(said)


def test_a_port_in_use_is_named_and_another_asked_for(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as stopped:
            main(["--port", str(port)])
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert str(port) in said
    assert "--port" in said
