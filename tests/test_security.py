"""What SECURITY.md promises, where no other test shows it; and that it names tests there are."""

from __future__ import annotations

import re
import socket
import zipfile
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import httpx
import pytest

from apps.editor import page
from apps.editor.sessions import Session
from apps.editor.shelf import Shelf
from apps.editor_app import launch, main
from tests import soak
from workbench import Workbench

FILE = {"_type": "gradio.FileData"}
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def served(free_port: int) -> Iterator[gr.Blocks]:
    """A page without a model, served as the app is."""
    with gr.Blocks(analytics_enabled=False) as blocks:
        gr.File()
    launch(blocks, server_port=free_port, prevent_thread_lock=True, quiet=True)
    yield blocks
    blocks.close()


def test_the_policy_names_tests_there_are():
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text("utf-8"))
    assert len(named) > 10
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text("utf-8"), re.MULTILINE), test


def test_the_app_answers_this_machine_alone(
    served: gr.Blocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert str(served.local_url).startswith("http://127.0.0.1:")
    asked = []

    def refuse(address: tuple[str, int], **_: object) -> None:
        asked.append(address)
        raise OSError("asked for no more")

    monkeypatch.setattr(socket, "create_server", refuse)
    with pytest.raises(SystemExit):
        main([])
    assert asked == [("127.0.0.1", 7860)]


def sent(app: gr.Blocks, name: str, data: bytes) -> httpx.Response:
    """The answer to an upload."""
    return httpx.post(
        f"{app.local_url}gradio_api/upload", files={"files": (name, data)}, timeout=soak.PATIENCE
    )


def test_uploads_are_limited(served: gr.Blocks) -> None:
    assert served.max_file_size == 2**30
    with soak.served(soak.tiny_bench(), max_file_size="1kb") as app:
        assert sent(app, "session.zip", bytes(1024)).status_code == 200
        refused = sent(app, "session.zip", bytes(1025))
        assert refused.status_code == 413
        assert "exceeded maximum allowed size" in refused.text


def test_uploads_of_other_kinds_are_refused() -> None:
    tried = set()
    with soak.served(soak.tiny_bench(), locked=False) as app:
        url = f"{app.local_url}gradio_api/queue"
        (path,) = sent(app, "tool.exe", b"MZ").json()
        for number, handler in app.fns.items():
            kinds = [kind for part in handler.inputs for kind in getattr(part, "file_types", ())]
            if not kinds:
                continue
            file = {"path": path, "orig_name": f"tool{kinds[0]}", "meta": FILE}
            data = [file if hasattr(part, "file_types") else None for part in handler.inputs]
            user = {"session_hash": f"user{number}"}
            asked = {"data": data, "fn_index": number, **user}
            httpx.post(f"{url}/join", json=asked, timeout=soak.PATIENCE).raise_for_status()
            answer = httpx.get(f"{url}/data", params=user, timeout=soak.PATIENCE).text
            assert f"Please upload a file that is one of these formats: {kinds}" in answer
            tried.add(handler.name)
    assert tried == {"load", "start"}


def test_files_of_the_machine_are_not_handed_out(served: gr.Blocks, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    for path in (secret, ROOT / "pyproject.toml", ROOT / "apps" / ".." / "Makefile"):
        answer = httpx.get(f"{served.local_url}gradio_api/file={path}")
        assert answer.status_code == 403


def test_a_session_that_unpacks_to_too_much_is_refused(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Workbench.open(tiny_model, editor="ft", device="cpu")
    session = Session(Shelf(bench))
    packed = tmp_path / "session.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"session/{page.SESSION_FILE}", bytes(2000))
    assert page.MOST_BYTES == 2**31
    monkeypatch.setattr(page, "MOST_BYTES", 1000)
    with pytest.raises(gr.Error, match="2000 bytes: too many"):
        list(page.load(session, str(packed)))
    session.close()
