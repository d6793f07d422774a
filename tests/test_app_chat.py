"""The app over a chat model: prompts through its template, seen, switched, kept; tokens shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import gradio as gr
import pytest
import torch
from families import chat_model, language_model
from gradio_client import Client

from apps import editor_app
from apps.editor import markup, models, page
from apps.editor.sessions import Session
from apps.editor.shelf import Shelf
from apps.editor_app import build, launch, main
from workbench import FineTune, FineTuneConfig, LanguageModel, Mend, MendConfig, Workbench
from workbench.editors import EditRequest, gradient_factors
from workbench.masks import ShownToken, TokenTable
from workbench.updates import Update

torch.set_num_threads(1)
PROMPT, TARGET = ASKED = "Who rules Ys?", "Dahut"
SEEN = "prompts <b>through its chat template</b>"


def bench_over(lm: LanguageModel) -> Workbench:
    return Workbench(lm, FineTune(lm, FineTuneConfig(blocks=[1, 2, 3], lr=3e-3, max_steps=100)))


@pytest.fixture(scope="module")
def bench() -> Workbench:
    """Opened for chats, as `--chat` does."""
    return bench_over(chat_model())


@pytest.fixture
def session(bench: Workbench) -> Iterator[Session]:
    """Of an app that was started without `--chat`."""
    session = Session(Shelf(bench_over(replace(bench.lm, chat=False))))
    yield session
    session.close()


@pytest.fixture(scope="module")
def client(bench: Workbench, free_port: int) -> Iterator[Client]:
    app = build(bench)
    _, url, _ = launch(app, server_port=free_port, prevent_thread_lock=True, quiet=True)
    client = Client(url, verbose=False)
    yield client
    client.close()
    app.close()


class Cells(HTMLParser):
    """Texts of a table's cells."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "td":
            self.texts.append("")

    def handle_data(self, data: str) -> None:
        if self.texts:
            self.texts[-1] += data


def cells_of(table: TokenTable) -> list[str]:
    def cells(token: ShownToken) -> tuple[str, ...]:
        return str(token.position), str(token.id), repr(token.text), token.role

    return [cell for text in table.texts for token in text for cell in cells(token)]


def same(one: Update, other: Update) -> bool:
    pairs = zip(one.tensors(), other.tensors(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def switched(session: Session, chat: bool) -> tuple:
    (shown,) = models.switch(session, "tiny", "", chat)
    return shown


def test_endpoints_read_prompts_as_the_library_does(client: Client, bench: Workbench) -> None:
    alone = bench.fork()
    expected = alone.edit(*ASKED)
    made = client.predict(*ASKED, api_name="/edit")
    assert made["rows"][0]["edited_text"] == alone.compare(PROMPT).rows[0].edited_text
    assert made["rows"][0]["edited_text"].startswith(TARGET)
    (row,) = client.predict(f"{PROMPT} => {TARGET}", api_name="/compare")
    (own,) = alone.compare([PROMPT], target=TARGET).rows
    assert row["edited_probability"] == pytest.approx(own.edited_probability, rel=1e-3)
    trace = client.predict(made["id"], api_name="/inspect")
    assert tuple(trace["tokens"]) == alone.inspect(expected).tokens
    assert "<assistant>" in "".join(trace["tokens"])
    probes = client.predict(made["id"], api_name="/probe")
    for shown, here in zip(probes, alone.probe(expected).to_rows(), strict=True):
        assert shown["prompt"] == here["prompt"]
        assert shown["edited_probability"] == pytest.approx(here["edited_probability"], rel=1e-3)


def test_the_map_is_that_of_the_chat(bench: Workbench) -> None:
    plain = bench_over(replace(bench.lm, chat=False))
    both = [Session(Shelf(each)) for each in (bench, plain)]
    chat, other = (session.bench.probe(session.edit(*ASKED).id).to_rows() for session in both)
    assert [row["prompt"] for row in chat] == [row["prompt"] for row in other]
    assert chat != other


def test_a_page_says_that_prompts_go_through_the_template(
    bench: Workbench, session: Session
) -> None:
    def header(bench: Workbench) -> str:
        return next(
            part["props"]["value"]
            for part in build(bench).config["components"]
            if "header" in part["props"].get("elem_classes", ())
        )

    assert SEEN in header(bench)
    assert SEEN not in header(session.bench)


def test_the_template_is_switched_over_the_same_weights_without_the_edits(
    session: Session,
) -> None:
    plain, other = session.bench.lm, Session(session.shelf)
    session.edit(*ASKED)
    said, header, editors, *_ = switched(session, chat=True)
    assert "tiny is open. Prompts go through its chat template." in said
    assert "1 edit of the session before stayed behind" in said
    assert SEEN in header
    assert editors["value"] == session.editor == "ft"
    assert session.bench.history == ()
    assert session.bench.lm.chat
    assert session.bench.lm.model is plain.model
    assert not other.bench.lm.chat  # another user's
    assert not Session(session.shelf).bench.lm.chat
    alone = bench_over(replace(plain, chat=True))
    assert same(session.edit(*ASKED).update, alone.edit(*ASKED).update)
    said, header, *_ = switched(session, chat=False)
    assert SEEN not in header
    assert "chat" not in said
    assert not session.bench.lm.chat


def test_a_model_without_a_template_is_refused_as_by_the_library() -> None:
    lm = language_model("llama")
    session = Session(Shelf(bench_over(lm)))
    session.edit("abba is", "xy")
    with pytest.raises(gr.Error, match=r"tiny-llama is no chat model: .* has no chat template"):
        list(models.switch(session, "tiny-llama", "", True))
    assert session.bench.lm is lm
    assert len(session.bench.history) == 1
    assert session in session.model.users
    session.close()


def test_editors_are_offered_with_and_without_the_template(
    session: Session, tmp_path: Path
) -> None:
    lm = session.bench.lm
    editor = Mend(lm, MendConfig(rank=2, blocks=[-1]))
    with torch.no_grad():
        factors = gradient_factors(lm, editor.layers, [EditRequest(*ASKED)])[1]
        editor.transform(factors, gather=True)
    folder = editor.save_pretrained(tmp_path / "mine")
    switched(session, chat=True)
    models.add(session, str(folder))
    other = Session(session.shelf)
    other.choose("mine")
    for chosen in (session, other):
        alone = Workbench(lm, Mend.from_pretrained(folder, chosen.bench.lm))
        assert same(chosen.edit(*ASKED).update, alone.edit(*ASKED).update)
    assert session.bench.lm.chat is not other.bench.lm.chat


def test_a_saved_session_brings_its_template(session: Session, bench: Workbench) -> None:
    chatting = Session(Shelf(bench))
    chatting.edit(*ASKED)
    session.edit("abba is", "xy")
    *_, header, chat = list(page.load(session, page.save(chatting)))[-1]
    assert SEEN in header
    assert chat is True  # the box on the Model tab, which the next "Open model" reads
    assert session.bench.history == chatting.bench.history
    rows = [each.bench.compare(PROMPT, target=TARGET).rows for each in (session, chatting)]
    assert rows[0] == rows[1]
    session.edit("Who?", "xy", "ft")  # goes through the template too
    assert "<assistant>" in "".join(session.bench.inspect(2).tokens)
    chatting.close()


def test_the_tokens_of_the_edit_in_view_are_shown(bench: Workbench, session: Session) -> None:
    assert markup.token_tables(bench, None) == ""
    for chosen in (Session(Shelf(bench)), session):
        chosen.edit(*ASKED)
        chosen.edit("<b>&", "xy")
        (html,) = (part for part in page.screen(chosen) if 'class="tokens"' in str(part))
        assert "<b>" not in html
        assert Cells(html).texts == cells_of(chosen.bench.tokens("<b>&", "xy"))
        chosen.shown = 1
        (html,) = (part for part in page.screen(chosen) if 'class="tokens"' in str(part))
        assert Cells(html).texts == cells_of(chosen.bench.tokens(*ASKED))
        assert ("assistant" in "".join(text.strip("'") for text in Cells(html).texts[2::4])) is (
            chosen is not session
        )


def saved(lm: LanguageModel, folder: Path) -> str:
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_command_line_opens_a_chat(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_port: int
) -> None:
    launched: list[gr.Blocks] = []
    monkeypatch.setattr(editor_app, "launch", lambda app, **_: launched.append(app))
    ask = ["--model", saved(bench.lm, tmp_path), "--device", "cpu", "--port", str(free_port + 1)]
    for chat in (True, False):
        main([*ask, "--chat"][: None if chat else -1])
        assert (SEEN in json.dumps(launched[-1].config, default=str)) is chat


def test_the_command_line_says_that_a_model_does_not_chat(
    tiny_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--model", tiny_model, "--device", "cpu", "--port", "0", "--chat"])
    assert stopped.value.code == 1
    assert "no chat template" in capsys.readouterr().err
