"""Many users in small: `make soak` with a few, and what it rests on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from weakref import WeakSet

import gradio as gr
import httpx
import pytest
import torch
from gradio_client.exceptions import AppError
from gradio_client.utils import QueueError

from apps import editor_app
from apps.editor import shelf
from apps.editor.sessions import Session
from tests import soak
from workbench import EditError, Workbench

ASKED = ("abba is", "xy")


@pytest.fixture(scope="module")
def bench() -> Workbench:
    torch.set_num_threads(1)
    return soak.tiny_bench()


@pytest.fixture(scope="module")
def app(bench: Workbench) -> Iterator[gr.Blocks]:
    with soak.served(bench) as app:
        yield app


@pytest.fixture
def born(monkeypatch: pytest.MonkeyPatch) -> WeakSet[Session]:
    """Copied sessions, which users have, in memory from now on."""
    born, real = WeakSet(), Session.__deepcopy__

    def copied(session: Session, memo: dict[int, object]) -> Session:
        made = real(session, memo)
        born.add(made)
        return made

    monkeypatch.setattr(Session, "__deepcopy__", copied)
    return born


def test_users_at_once_see_their_own_edits_alone_and_leave_nothing(bench: Workbench) -> None:
    report = soak.soak(bench, 4, 0)  # enough for each action of a user
    assert report.broken() == []
    assert bench.history == ()


def test_users_who_share_a_session_are_found_out(
    bench: Workbench, app: gr.Blocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "__deepcopy__", lambda self, memo: self)
    report, facts = soak.Report(2, 0), [soak.Fact.of(bench, number) for number in range(2)]
    # Each edit shows, on the prompt that both compare too.
    assert not soak.same(facts[0].with_edit[1:], facts[0].without[1:])
    assert not soak.same(facts[0].with_edit[1:], facts[1].with_edit[1:])
    soak.wave(app, facts, report, 0)
    assert report.leaks
    assert any(line.startswith("leak: ") for line in report.broken())


def test_sessions_that_are_kept_are_found_out(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, kept, close = threading.Semaphore(0), [], Session.close

    def leak(session: Session) -> None:
        close(session)
        kept.append(session)
        closed.release()

    monkeypatch.setattr(Session, "close", leak)
    report, facts = soak.Report(2, 0), [soak.Fact.of(bench, number) for number in range(2)]
    with soak.served(bench) as app:
        sessions = soak.wave(app, facts, report, 0)
        assert all(closed.acquire(timeout=soak.PATIENCE) for _ in facts)
        with monkeypatch.context() as patched:
            patched.setattr(soak, "PATIENCE", 1)
            report.held = soak.remaining(sessions)
        assert report.broken() == ["2 sessions are still held after their users have left"]
        kept.clear()
        assert soak.remaining(sessions) == 0


def test_memory_that_sessions_leave_behind_is_found_out(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, close = [], Session.close

    def leak(session: Session) -> None:
        close(session)
        left.append(b"x" * 16 * soak.MIB)

    monkeypatch.setattr(Session, "close", leak)
    (line,) = soak.soak(bench, 4, 0).broken()
    assert line.endswith("MiB did not come back")


def test_a_long_run_in_which_nothing_is_called_off_is_found_out() -> None:
    assert soak.Report(4, 0).broken() == []
    assert soak.Report(4, 20, cancelled=1).broken() == []
    assert "no comparison was called off" in soak.Report(4, 20).broken()[0]


@pytest.mark.parametrize("endpoint", ["history", "cancel"])
def test_who_leaves_is_forgotten_whatever_was_asked(
    app: gr.Blocks, born: WeakSet[Session], endpoint: str
) -> None:
    client = soak.connected(str(app.local_url))
    client.predict(api_name=f"/{endpoint}")
    assert len(born) == 1
    client.close()
    assert soak.remaining(born) == 0


def test_who_leaves_without_a_goodbye_is_forgotten_after_the_time_to_live(
    bench: Workbench, born: WeakSet[Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(editor_app, "FORGOTTEN", 1)
    sessions = []
    monkeypatch.setattr(Session, "close", lambda session: sessions.append(id(session)))
    with soak.served(bench) as app:
        born.clear()  # the app's own
        # No more than a request: no connection that would end.
        url = f"{app.local_url}gradio_api/call/history"
        event = httpx.post(url, json={"data": []}, timeout=soak.PATIENCE).json()["event_id"]
        answer = httpx.get(f"{url}/{event}", timeout=soak.PATIENCE).text
        assert "event: complete" in answer
        assert soak.remaining(born) == 0
        assert soak.sessions_of(app) == []
    assert len(sessions) == 1


def test_a_users_cancel_stops_that_users_work_alone(
    app: gr.Blocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    come, go, compare = threading.Event(), threading.Event(), Session.compare

    def held(session, probes):
        come.set()
        assert go.wait(soak.PATIENCE)
        return compare(session, probes)

    monkeypatch.setattr(Session, "compare", held)
    mine, other = (soak.connected(str(app.local_url)) for _ in range(2))
    for who in (other, mine):
        come.clear()
        go.clear()
        job = mine.submit("Bees make", api_name="/compare")
        assert come.wait(soak.PATIENCE)
        who.predict(api_name="/cancel")
        go.set()
        if who is other:
            assert [row["prompt"] for row in job.result()] == ["Bees make"]
        else:
            with pytest.raises(AppError, match="Cancelled"):
                job.result()
    mine.close()
    other.close()


def test_a_full_queue_refuses_with_a_message(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(editor_app, "WAITING", 0)
    with soak.served(bench) as app:
        client = soak.connected(str(app.local_url))
        with pytest.raises(QueueError, match="Queue is full! Please try again"):
            client.predict(api_name="/history")
        client.close()
        url = f"{app.local_url}gradio_api/call/history"
        # A page shows what is said with any status but 503, which other clients know.
        for headers, status in (({}, 503), ({"origin": str(app.local_url)}, 429)):
            answer = httpx.post(url, json={"data": []}, headers=headers, timeout=soak.PATIENCE)
            assert answer.status_code == status
            assert "0 requests wait, and no more may. Try again" in answer.json()["detail"]


def test_undo_forgets_the_oldest_actions_where_edits_take_too_much(bench: Workbench) -> None:
    size = bench.fork().edit(*ASKED).nbytes
    bounded = Workbench(bench.lm, bench.editor, most_bytes=3 * size)
    for _ in range(6):
        bounded.remove(bounded.edit(*ASKED).id)
    seen = set()
    while bounded.can_undo:
        bounded.undo()
        seen |= {edit.id for edit in bounded.edits}
    assert len(seen) == 3


def test_an_edit_that_does_not_fit_beside_the_live_ones_is_refused(bench: Workbench) -> None:
    size = bench.fork().edit(*ASKED).nbytes
    bounded = Workbench(bench.lm, bench.editor, most_bytes=2 * size)
    for _ in range(2):
        bounded.edit(*ASKED)
    before = bounded.history
    with pytest.raises(EditError, match="Remove a live edit"):
        bounded.edit(*ASKED)
    assert bounded.history == before
    bounded.remove(before[0].id)
    bounded.edit(*ASKED)
    assert len(bounded.fork(edits=True).history) == 2
    assert Workbench(bench.lm, bench.editor, most_bytes=1).edit(*ASKED).id == 1


def test_every_session_of_the_app_is_bounded(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf, "KEPT", 0)
    session = Session(shelf.Shelf(bench))
    assert session.bench.most_bytes == bench.lm.model.get_memory_footprint()
    monkeypatch.setattr(shelf, "KEPT", 2**40)
    session.use(session.model)
    assert session.bench.most_bytes == 2**40
    session.close()
