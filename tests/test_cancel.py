"""What runs can be watched and cancelled: by the one who started it, and without a trace."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import gradio as gr
import pytest
import torch
from families import language_model

from apps.editor import api, page
from apps.editor.sessions import SCREEN, Session
from apps.editor.shelf import Shelf
from workbench import Comparison, EditError, EditStack, FineTune, FineTuneConfig, Workbench
from workbench.cancel import cancellable, checkpoint
from workbench.errors import Cancelled
from workbench.probes import Probe

torch.set_num_threads(1)
PROMPTS = [f"Item {index} is" for index in range(20)]  # of two chunks
PATIENCE = 60


@pytest.fixture
def bench() -> Workbench:
    lm = language_model("llama")
    return Workbench(lm, FineTune(lm, FineTuneConfig(blocks=[-1], lr=1e-2, max_steps=30)))


def after(looks: int) -> Callable[[], bool]:
    """Asks to cancel at the look of that number."""
    seen = 0

    def asked() -> bool:
        nonlocal seen
        seen += 1
        return seen > looks

    return asked


def test_a_checkpoint_stops_only_what_asked_for_it() -> None:
    checkpoint()
    with cancellable(lambda: False):
        checkpoint()
    with pytest.raises(Cancelled), cancellable(lambda: True):
        checkpoint()
    checkpoint()
    with cancellable(lambda: True):
        thread = threading.Thread(target=checkpoint)  # another context: raises nothing
        thread.start()
        thread.join()


@pytest.mark.parametrize("looks", [0, 3])
def test_fine_tuning_is_cancelled_without_a_trace(bench: Workbench, looks: int) -> None:
    with pytest.raises(Cancelled), cancellable(after(looks)):
        bench.edit("abba is", "xy")
    assert bench.history == ()
    assert not bench.can_undo


@pytest.mark.parametrize("looks", [0, 2, 8])
def test_generation_and_comparison_are_cancelled(bench: Workbench, looks: int) -> None:
    for run in (bench.generate, bench.compare):
        with pytest.raises(Cancelled), cancellable(after(looks)):
            run(PROMPTS, max_new_tokens=6 if run == bench.compare else 20)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_watched_texts_grow_into_the_finished_ones(family: str) -> None:
    lm = language_model(family)
    bench = Workbench(lm, FineTune(lm, FineTuneConfig(lr=1e-2, max_steps=3)))
    bench.edit("abba is", "xy")
    probes = [Probe(prompt, "other", "xy") for prompt in PROMPTS]
    seen: list[Comparison] = []
    whole = bench.compare(probes, max_new_tokens=4, watch=seen.append)
    assert whole == bench.compare(probes, max_new_tokens=4)
    assert whole.unfinished == 0
    assert {part.unfinished for part in seen} == {16, 4}
    for part in seen:
        done = len(part.rows) - part.unfinished
        assert part.rows[:done] == whole.rows[:done]
        for row, final in zip(part.rows[done:], whole.rows[done:], strict=False):
            assert final.base_text.startswith(row.base_text)
            assert final.edited_text.startswith(row.edited_text)
            assert (row.prompt, row.kind, row.target) == (final.prompt, final.kind, None)


def test_a_fork_with_edits_goes_its_own_way(bench: Workbench) -> None:
    bench.edit("abba is", "xy")
    bench.edit("no no", "z")
    bench.undo()
    fork = bench.fork(edits=True)
    assert fork.history == bench.history
    fork.redo()
    fork.edit("so so", "q")
    assert [e.id for e in fork.edits] == [1, 2, 3]
    assert [e.id for e in bench.edits] == [1]
    bench.redo()
    assert [e.id for e in bench.edits] == [1, 2]
    assert bench.fork().history == ()
    assert EditStack().copy() == EditStack()


# The page


@pytest.fixture
def session(bench: Workbench) -> Iterator[Session]:
    session = Session(Shelf(bench))
    yield session
    session.close()


FORM = ("abba is", "xy", "abba was", "no no", "so so", "", "abba is")


def state(session: Session) -> tuple[object, ...]:
    bench = session.bench
    return bench.history, bench.can_undo, bench.can_redo, session.probes, session.table


def held(session: Session, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, ...]:
    """Holds the session's comparisons at their first token: (has come there, may go on)."""
    come, go = threading.Event(), threading.Event()
    compare = session.compare

    def slow(probes):
        watch = session.watch
        assert watch is not None

        def wait(comparison: Comparison) -> None:
            watch(comparison)
            come.set()
            assert go.wait(PATIENCE)

        session.watch = wait
        return compare(probes)

    monkeypatch.setattr(session, "compare", slow)
    return come, go


def test_the_table_fills_in_and_ends_as_without_watching(session: Session) -> None:
    *parts, last = page.edit(session, "ft", *FORM)
    assert {len(part) for part in (*parts, last)} == {SCREEN + 4}
    assert "Working" in parts[0][1]
    assert parts[0][2]["visible"] is True
    assert all("writing" in part[1] for part in parts[1:])
    assert last[2]["visible"] == "hidden"
    assert "edit made" in last[1] or "edit not reached" in last[1]
    assert session.table == last[1]


def test_a_cancelled_edit_leaves_everything_as_it_was(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(page.edit(session, "ft", *FORM))
    list(page.undo(session))  # so that a half-applied edit would cost the redo
    before = state(session)
    come, go = held(session, monkeypatch)
    with ThreadPoolExecutor() as pool:
        done = pool.submit(lambda: list(page.edit(session, "ft", *FORM)))
        assert come.wait(PATIENCE)
        page.cancel(session)
        go.set()
        parts = done.result()
    assert state(session) == before
    assert parts[-1][1] == session.table
    assert parts[-1][2]["visible"] == "hidden"
    monkeypatch.undo()
    list(page.redo(session))
    assert len(session.bench.history) == 1


@pytest.mark.parametrize("action", [page.undo, page.compare])
def test_other_actions_are_cancelled_as_a_whole(
    session: Session, monkeypatch: pytest.MonkeyPatch, action: Callable
) -> None:
    list(page.edit(session, "ft", *FORM))
    before = state(session)
    come, go = held(session, monkeypatch)
    with ThreadPoolExecutor() as pool:
        form = FORM if action is page.compare else ()
        done = pool.submit(lambda: list(action(session, *form)))
        assert come.wait(PATIENCE)
        page.cancel(session)
        go.set()
        done.result()
    assert state(session) == before


def test_one_users_cancel_does_not_stop_another(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Session(session.shelf)
    come, go = held(session, monkeypatch)
    with ThreadPoolExecutor() as pool:
        done = pool.submit(lambda: list(page.edit(session, "ft", *FORM)))
        assert come.wait(PATIENCE)
        page.cancel(other)
        go.set()
        done.result()
    assert len(session.bench.history) == 1
    list(page.edit(other, "ft", *FORM))  # an old wish does not cancel what comes later
    assert len(other.bench.history) == 1


def test_what_waits_for_its_turn_is_cancelled_before_it_begins(session: Session) -> None:
    list(page.edit(session, "ft", *FORM))
    before = state(session)
    page.cancel(session, waiting=True)
    parts = list(page.edit(session, "ft", *FORM))
    assert state(session) == before
    assert parts[-1][1] == session.table
    list(page.edit(session, "ft", *FORM))  # the next one is not called off
    assert len(session.bench.history) == 2


def test_what_is_refused_restores_the_table(session: Session) -> None:
    list(page.edit(session, "ft", *FORM))
    before, parts = state(session), page.edit(session, "ft", "abba", "", *FORM[2:])
    seen = [next(parts), next(parts)]
    assert seen[-1][1] == session.table
    with pytest.raises(Exception, match="target is empty"):
        next(parts)
    assert state(session) == before


def test_an_endpoint_that_fails_leaves_no_trace(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise EditError("nothing to see")

    before = state(session)
    monkeypatch.setattr(Workbench, "compare", refuse)
    with pytest.raises(gr.Error, match="nothing to see"):
        api.edit(session, "abba is", "xy")
    assert state(session) == before
