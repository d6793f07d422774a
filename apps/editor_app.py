"""The Gradio app: edit a language model in the browser, or through named API endpoints.

python apps/editor_app.py --port 7860
"""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Read once, when gradio is imported: nothing is sent anywhere.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
from fastapi import HTTPException, Request, Response
from fastapi.exception_handlers import http_exception_handler
from fastapi.responses import JSONResponse
from gradio import themes

from apps.editor import api, figures, layout, markup, models, page, reach, train
from apps.editor.runs import Runs
from apps.editor.sessions import Session
from apps.editor.shelf import Shelf
from workbench import Workbench, WorkbenchError
from workbench.tables import CSS

HOURS = 3600
SESSIONS = 500  # that are kept; the one unused for longest makes room for another
FORGOTTEN = 24 * HOURS  # after its last action; after one hour, by Gradio, where its page is closed
WAITING = 64  # requests of all users; more are refused with a message, not kept waiting
AT_ONCE = 4  # requests of each other kind
# The model runs for so many users at once; the others wait in the queue.
MODEL = {"concurrency_id": "model", "concurrency_limit": 2}
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
ENDPOINTS = {
    "edit": api.edit,
    "undo": api.undo,
    "redo": api.redo,
    "toggle": api.toggle,
    "strength": api.strength,
    "remove": api.remove,
    "history": api.history,
    "compare": api.compare,
    "inspect": api.inspect,
    "probe": api.probe,
}
# Cancel comes into sight at once: the server's word comes when it is this user's turn.
_ASK = """(...inputs) => {
    document.body.classList.add('asked');
    return inputs;
}"""
_ANSWERED = "() => document.body.classList.remove('asked')"
_CANCEL = """session => [session, document.body.classList.contains('asked')
    && !document.querySelector('#comparison [data-running]')]"""
# On a phone what is made is below the fold: go there, where progress shows.
_SCROLL = """(...inputs) => {
    const made = [...document.querySelectorAll('#comparison, #run-status')];
    const shown = made.find(part => part.offsetParent);
    if (innerWidth <= 640) setTimeout(() => shown.scrollIntoView(), 100);
    return inputs;
}"""
_ASK_AND_SCROLL = f"(...inputs) => ({_SCROLL})(...({_ASK})(...inputs))"
# Figures in sight, by the names they were given to be saved by.
_IN_SIGHT = """[...document.querySelectorAll('.js-plotly-plot')].filter(plot => plot.offsetParent)
    .map(plot => ({plot, ...plot._context.toImageButtonOptions}))"""
_NAMES = f"session => [session, {_IN_SIGHT}.map(shown => shown.filename).join('\\n')]"
_PICTURES = f"""() => {_IN_SIGHT}.forEach(({{plot, ...options}}) => Plotly.downloadImage(
    plot, {{...options, width: plot._fullLayout.width, height: plot._fullLayout.height}}))"""
_DOWNLOAD = """file => {
    Object.assign(document.createElement('a'), {href: file.url, download: file.orig_name}).click();
}"""


def build(
    workbench: Workbench,
    runs: Path | None = None,
    *,
    locked: bool = False,
    device_map: str | None = None,
) -> gr.Blocks:
    """Lay the app out over a workbench, whose model and editor all users share.

    Args:
        workbench: Each user begins with its model and editor, without its edits.
        runs: Folder of the training runs; None: one in the user's cache.
        locked: Users edit with what is open: they open no models or editors, and train none.
        device_map: Spreads the models that they open over several devices; see `open_model`.
    """
    shelf = Shelf(workbench, device_map=device_map)
    with gr.Blocks(
        title="Model-editing workbench",
        analytics_enabled=False,
        delete_cache=(HOURS, 24 * HOURS),
    ) as app:
        app.queue(max_size=WAITING, default_concurrency_limit=AT_ONCE)
        session = Session(shelf, Runs(runs))
        state = gr.State(session, time_to_live=FORGOTTEN, delete_callback=Session.close)
        header = gr.HTML(
            markup.header(workbench, session.editor), elem_classes="header", apply_default_css=False
        )
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Edit", id="edit"):
                with gr.Row():
                    with gr.Column(scale=2, min_width=320):
                        form, buttons, editor = layout.form(session)
                    with gr.Column(scale=4, min_width=320):
                        cancel = gr.Button("Cancel", visible="hidden", size="sm", elem_id="cancel")
                        table = gr.HTML(
                            session.table, elem_id="comparison", apply_default_css=False
                        )
                        history, undo, redo, files = layout.history()
                inside, saving, probing = layout.figures()
            if not locked:
                with gr.Tab("Model", id="model"):
                    opening = models.layout(session)
                with gr.Tab("Train", id="train"):
                    training = train.layout()
        _endpoints(state, form)  # before the page's own events, which would take the names
        tools = [undo, redo, files["adapter"], files["session"]]
        screen = [state, table, cancel, history, *tools, *inside]

        listed = [*form[2:5], form[-1]]  # the lists that are suggested, and for which prompt

        def on(
            event: Any, handler: Any, inputs: Any, outputs: Any, mode: Any = "once", js: Any = _ASK
        ) -> None:
            asked = event(
                handler,
                inputs,
                outputs,
                show_progress_on=table,
                trigger_mode=mode,
                js=js,
                **MODEL,
                **PRIVATE,
            )
            for ended in (asked.success, asked.failure):  # `then` does not follow a refusal
                ended(None, js=_ANSWERED, **PRIVATE)

        # Gradio counts the time to live from when an event gives the session back.
        app.load(lambda session: session, state, state, queue=False, **PRIVATE)
        said = gr.Textbox(visible=False)  # by the browser
        waiting = gr.Checkbox(visible=False)
        chat = gr.Checkbox(visible=False) if locked else opening["chat"]
        cancel.click(page.cancel, [state, waiting], js=_CANCEL, queue=False, **PRIVATE)
        for event in (buttons["edit"].click, form[0].submit, form[1].submit):
            on(event, page.edit, [state, editor, *form], [*screen, *listed], js=_ASK_AND_SCROLL)
        on(
            buttons["compare"].click,
            page.compare,
            [state, *form],
            [*screen, *listed],
            js=_ASK_AND_SCROLL,
        )
        on(undo.click, page.undo, [state], screen, "multiple")
        on(redo.click, page.redo, [state], screen, "multiple")
        on(history.act, page.act, [state], [*screen, *form], "multiple")
        loaded = [*screen, *form, header, chat]
        on(files["load"].upload, page.load, [state, files["load"]], loaded)
        editor.input(models.choose, [state, editor], header, show_progress="hidden", **PRIVATE)
        reach.wire(probing, state, history, **MODEL, **PRIVATE)
        shown = [saving]
        if not locked:
            _opening(opening, state, header, editor, screen, form)
            _training(app, training, state, header, editor)
            shown += [training["saving"]]
        buttons["examples"].click(
            page.example, buttons["examples"], form, show_progress="hidden", **PRIVATE
        )
        form[0].blur(
            page.relist,
            [form[0], form[1], form[-1]],
            listed,
            show_progress="hidden",
            **PRIVATE,
        )
        for name, handler in (("adapter", page.export), ("session", page.save)):
            made = files[name].click(handler, state, files["made"], **PRIVATE)
            made.success(None, files["made"], js=_DOWNLOAD, **PRIVATE)
        for save in shown:
            save["PNG"].click(None, js=_PICTURES, **PRIVATE)
            made = save["HTML"].click(
                figures.as_page, [state, said], files["made"], js=_NAMES, **PRIVATE
            )
            made.success(None, files["made"], js=_DOWNLOAD, **PRIVATE)
    return app


def _opening(
    tab: dict[str, Any],
    state: gr.State,
    header: gr.HTML,
    editor: gr.Radio,
    screen: Sequence[Any],
    form: Sequence[Any],
) -> None:
    """Wire the tab of models and editors."""
    wanted, said, shown = [state, tab["source"], tab["quantize"]], tab["said"], [header, editor]
    one_at_a_time: dict[str, Any] = {
        "concurrency_id": "opening",
        "concurrency_limit": 1,
        "trigger_mode": "once",
        **PRIVATE,
    }
    tab["estimate"].click(models.estimate, wanted, said, **one_at_a_time)
    for event in (tab["open"].click, tab["source"].submit):
        event(
            models.switch,
            [*wanted, tab["chat"]],
            [said, *shown, *screen, *form],
            show_progress_on=said,
            **one_at_a_time,
        )
    for event in (tab["add"].click, tab["folder"].submit):
        event(models.add, [state, tab["folder"]], [tab["added"], *shown], **one_at_a_time)


def _training(
    app: gr.Blocks, tab: dict[str, Any], state: gr.State, header: gr.HTML, editor: gr.Radio
) -> None:
    """Wire the tab of training; every page asks now and then how the server's run stands."""
    names = "status", "curves", "start", "stop", "earlier"
    shown = [*(tab[name] for name in names), editor]
    fields = "name", "data", "upload", "steps", "batch", "blocks", "rank", "lr", "c_edit"
    wanted = [state, *(tab[name] for name in (*fields, "skip_bad"))]
    quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, **PRIVATE}
    tab["data"].input(train.needs_file, tab["data"], tab["upload"], **quiet)
    begin: dict[str, Any] = {"js": _SCROLL, "show_progress_on": tab["status"], **PRIVATE}
    tab["start"].click(train.start, wanted, shown, **begin)
    tab["stop"].click(train.stop, state, shown, **quiet)
    for name, handler in (("resume", train.resume), ("take", train.take)):
        tab[name].click(
            handler, [state, tab["earlier"]], shown, show_progress_on=tab["status"], **PRIVATE
        )
    tab["earlier"].input(train.watch, [state, tab["earlier"]], shown, **quiet)
    app.load(train.arrive, state, [header, *shown], **quiet)
    gr.Timer(2).tick(train.refresh, state, shown, **quiet)


def _endpoints(state: gr.State, form: Sequence[gr.Textbox]) -> None:
    """Name the API's endpoints; their inputs and outputs are on no screen."""
    with gr.Column(visible=False):
        number, value = gr.Number(precision=0), gr.Number()
        prompts, answer = gr.Textbox(), gr.JSON(label="answer")
    inputs = {
        "edit": [*form[:2]],
        "compare": [prompts],
        "strength": [number, value],
        **{name: [number] for name in ("toggle", "remove", "inspect", "probe")},
    }
    for name, handler in ENDPOINTS.items():
        asked = [state, *inputs.get(name, [])]
        gr.on([], handler, asked, [state, answer], api_name=name, **MODEL)
    gr.on([], api.cancel, state, state, api_name="cancel", concurrency_limit=None)


async def _refuse(request: Request, error: Exception) -> Response:
    """Say in words of ours that the queue is full.

    Of a 503 a page shows Gradio's own words, of another status those of the answer; other clients
    know a full queue by its 503. Pages, and no one else, name an origin.
    """
    assert isinstance(error, HTTPException)
    if not str(error.detail).startswith("Queue is full"):
        return await http_exception_handler(request, error)
    said = f"The server is busy: {WAITING} requests wait, and no more may. Try again in a moment."
    return JSONResponse({"detail": said}, 429 if "origin" in request.headers else 503)


def launch(app: gr.Blocks, **options: Any) -> tuple[Any, str, str]:
    """Serve the app with its look, and nothing that asks another server for anything.

    Args:
        app: What `build` returned.
        options: For `gr.Blocks.launch`, e.g. `server_name`, `server_port`.
    """
    system = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
    mono = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
    # In the head, since Gradio rewrites the selectors of its own `css` and drops what it cannot.
    css = "".join(path.read_text("utf-8") for path in (CSS, Path(__file__).with_suffix(".css")))
    settings: dict[str, Any] = {
        "theme": themes.Base(
            primary_hue="indigo", neutral_hue="slate", font=system, font_mono=mono
        ).set(  # small print that can be read
            block_info_text_color="*neutral_500",
            block_info_text_color_dark="*neutral_300",
            body_text_color_subdued="*neutral_500",
            input_placeholder_color="*neutral_500",
            input_placeholder_color_dark="*neutral_400",
        ),
        "head": f"<style>{css}</style>",
        "footer_links": ["api", "settings"],
        "run_history": False,
        "show_error": True,
        "share": False,
        "ssr_mode": False,
        "pwa": False,
        "enable_monitoring": False,
        "state_session_capacity": SESSIONS,
        "max_file_size": "1gb",
        "app_kwargs": {"exception_handlers": {503: _refuse}},
    }
    return app.launch(**(settings | options))


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, open the model, serve until interrupted."""
    parser = argparse.ArgumentParser(description="Edit a language model in the browser.")
    parser.add_argument("--model", help="hub id, folder or GGUF file; default: the embedded one")
    parser.add_argument("--editor", help="a trained editor's folder or hub id, or ft")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (auto)")
    parser.add_argument(
        "--device-map",
        choices=("auto", "balanced", "sequential"),
        help="spread models over all cards, in place of --device",
    )
    parser.add_argument("--quantize", choices=("8bit", "4bit"), help="needs bitsandbytes")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="prompts are a user's turns in a chat, read through the model's template",
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 to serve others (127.0.0.1)")
    parser.add_argument(
        "--locked", action="store_true", help="users open no models or editors, and train none"
    )
    parser.add_argument("--port", type=int, default=7860, help="(7860)")
    options = parser.parse_args(arguments)
    try:  # now, not after a model has been opened
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        socket.create_server((options.host, options.port), family=family).close()
    except (OSError, OverflowError) as error:
        parser.exit(
            1,
            f"The app cannot be served at {options.host}, port {options.port}: {error}\n"
            "Give another: --host and --port, or HOST=... and PORT=... with make.\n",
        )
    try:
        bench = Workbench.open(
            options.model,
            editor=options.editor,
            device=options.device,
            quantize=options.quantize,
            device_map=options.device_map,
            chat=options.chat,
        )
    except WorkbenchError as error:
        parser.exit(1, f"{error}\n")
    if options.host not in ("127.0.0.1", "localhost", "::1"):
        print(
            "Whoever reaches this server can edit with what is open, and no more."
            if options.locked
            else "Whoever reaches this server can open models and folders on it, and train. "
            "--locked leaves them the edits alone."
        )
    app = build(bench, locked=options.locked, device_map=options.device_map)
    launch(app, server_name=options.host, server_port=options.port)


if __name__ == "__main__":
    main()
