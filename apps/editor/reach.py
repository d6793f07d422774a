"""The tab of an edit's reach: its probes, made and compared when asked for."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from queue import SimpleQueue
from typing import Any

import gradio as gr

from apps.editor import figures, page
from apps.editor.sessions import Session, now_and_then, readable
from workbench import EditError, ProbeReport
from workbench.errors import Cancelled
from workbench.reach import reach_list, reach_map
from workbench.tables import placeholder

EMPTY = placeholder("Nothing probed yet: it takes some seconds for each edit.")
# The rows carry what they are sorted by.
SCRIPT = """
element.addEventListener('click', event => {
    const button = event.target.closest('button[data-sort]');
    if (!button) return;
    const key = button.dataset.sort, rows = [...element.querySelectorAll('tbody tr')];
    const compare = key === 'prompt'
        ? (a, b) => a.dataset.prompt.localeCompare(b.dataset.prompt)
        : (a, b) => Number(a.dataset[key]) - Number(b.dataset[key]);
    rows.sort(compare).forEach(row => row.parentElement.append(row));
    for (const other of button.parentElement.children)
        other.setAttribute('aria-pressed', other === button);
});
"""


def layout() -> dict[str, Any]:
    """The tab's components."""
    small: dict[str, Any] = {"size": "sm", "min_width": 120}
    with gr.Row():
        tab: dict[str, Any] = {
            "one": gr.Button("Probe this edit", elem_id="probe-one", **small),
            "all": gr.Button("Probe all live edits", elem_id="probe-all", **small),
            "cancel": gr.Button("Cancel", visible=False, elem_id="probe-cancel", **small),
        }
    plot = gr.Plot(show_label=False, min_width=320, elem_id="reach-map")
    shown = gr.HTML(EMPTY, elem_id="reach", js_on_load=SCRIPT, apply_default_css=False)
    return tab | {"plot": plot, "list": shown}


def wire(tab: dict[str, Any], state: gr.State, history: gr.HTML, **options: Any) -> None:
    """Wire the tab; what it shows goes when the edits change.

    Args:
        tab: From `layout`.
        state: The session.
        history: The list of edits, which changes with them.
        options: For the events that run the model.
    """
    shown = [tab["plot"], tab["list"], tab["cancel"]]
    for name, handler in (("one", probe_one), ("all", probe_all)):
        tab[name].click(
            handler, state, shown, show_progress="hidden", trigger_mode="once", **options
        )
    quiet: dict[str, Any] = {"queue": False, "api_visibility": "private"}
    tab["cancel"].click(page.cancel, state, **quiet)
    history.change(lambda: (None, EMPTY), None, shown[:2], show_progress="hidden", **quiet)


def probe_one(session: Session) -> Iterator[tuple[Any, ...]]:
    """Probe the edit in view."""
    edit = session.current()
    yield from _probed(session, [edit.id] if edit else [])


def probe_all(session: Session) -> Iterator[tuple[Any, ...]]:
    """Probe every live edit that is on."""
    yield from _probed(session, [entry.id for entry in session.bench.history if entry.enabled])


def _probed(session: Session, ids: list[int]) -> Iterator[tuple[Any, ...]]:
    """The map and the list, after how far it is; cancelled, all is as it was."""

    def work() -> ProbeReport:
        with session.whole(lambda _: None):
            if not ids:
                raise EditError("There is no edit to probe: make one, or switch one on.")
            named = [id for id in ids if session.bench.get(id).requests]
            return session.bench.probe(named or ids, watch=lambda *at: steps.put(at))

    steps: SimpleQueue[tuple[int, int] | None] = SimpleQueue()
    yield gr.skip(), placeholder("Making probes …"), gr.update(visible=True)
    pool = ThreadPoolExecutor(1)
    done = pool.submit(copy_context().run, work)
    done.add_done_callback(lambda _: steps.put(None))
    pool.shutdown(wait=False)
    for at, of in now_and_then(steps):
        yield gr.skip(), placeholder(f"{at} of {of} probes compared …"), gr.skip()
    error = done.exception()
    if error is not None:
        yield figures.shown(session, "reach", None), EMPTY, gr.update(visible=False)
    if isinstance(error, Cancelled):
        gr.Info(str(error))
        return
    with readable():
        report = done.result()
        drawn = figures.shown(session, "reach", reach_map(report))
        yield drawn, reach_list(report, buttons=True), gr.update(visible=False)
