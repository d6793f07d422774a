"""The tab where an editor is trained: the form, and the server's run as every user sees it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from apps.editor import layout as parts
from apps.editor import markup, models
from apps.editor.figures import shown
from apps.editor.run import Run
from apps.editor.runs import EDITING, TRAINING, blocks_of
from apps.editor.sessions import Session, guarded
from workbench import DataError, EditorError, plots
from workbench.data import FORMATS

DATA = {
    "facts": "Built-in facts (7,051 edits)",
    "counterfact": "CounterFact file",
    "zsre": "zsRE file",
    "fever": "FEVER file",
    "passages": "Plain passages",
}
assert set(DATA) == set(FORMATS)


def layout() -> dict[str, Any]:
    """The tab's components by name."""
    tab: dict[str, Any] = {}
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            gr.Markdown(
                "### Train a MEND editor for the open model\n"
                "The editor learns, from many example edits, to turn the gradient of one example "
                "into a local change. This server trains one at a time, in the background: leave "
                "or reload the page as you like. It is slow on a processor: some minutes give a "
                "rough editor, hours a good one."
            )
            tab["name"] = gr.Textbox("my-editor", label="Name", elem_id="run-name")
            tab["data"] = gr.Dropdown(
                [(text, name) for name, text in DATA.items()],
                value="facts",
                label="Data",
                elem_id="run-data",
            )
            tab["upload"] = gr.File(
                label="Data file: JSON, JSON lines (gzipped or not), or text for passages",
                file_types=[".json", ".jsonl", ".gz", ".txt"],
                visible=False,
                elem_id="run-upload",
                height=120,
            )
            with gr.Row():
                small: dict[str, Any] = {"precision": 0, "min_width": 100}
                tab["steps"] = gr.Number(
                    TRAINING.steps, label="Steps", minimum=1, elem_id="run-steps", **small
                )
                tab["batch"] = gr.Number(
                    TRAINING.batch, label="Edits a step", minimum=1, elem_id="run-batch", **small
                )
            with gr.Accordion("More settings", open=False):
                tab["blocks"] = gr.Textbox(
                    "",
                    label="Blocks",
                    placeholder="empty: the usual choice",
                    info="Whose MLP matrices are edited, e.g. 16, 17, 18; -1 is the last. Empty: "
                    "those of the embedded model's own editor; the last three of another model",
                )
                with gr.Row():
                    tab["rank"] = gr.Number(EDITING.rank, label="Rank", minimum=1, **small)
                    tab["lr"] = gr.Number(TRAINING.lr, label="Learning rate", min_width=100)
                    tab["c_edit"] = gr.Number(
                        TRAINING.c_edit, label="Edit-loss weight", min_width=100
                    )
                tab["skip_bad"] = gr.Checkbox(False, label="Leave out records that cannot be read")
            with gr.Row():
                tab["start"] = gr.Button(
                    "Start training", variant="primary", min_width=120, elem_id="run-start"
                )
                tab["stop"] = gr.Button(
                    "Stop", variant="stop", interactive=False, min_width=120, elem_id="run-stop"
                )
            gr.Markdown("### Earlier runs over this model")
            tab["earlier"] = gr.Dropdown(
                [], value=None, label="Run", info="Choose one to see its curves", elem_id="run-list"
            )
            with gr.Row():
                tab["resume"] = gr.Button("Resume", size="sm", min_width=90, elem_id="run-resume")
                tab["take"] = gr.Button(
                    "Open its editor", size="sm", min_width=90, elem_id="run-take"
                )
        with gr.Column(scale=4, min_width=320):
            tab["status"] = gr.HTML(
                markup.run_status(None), elem_id="run-status", apply_default_css=False
            )
            gr.Markdown(
                "**Edit loss**: how far the model is from saying the target after an edit; it "
                "should fall well below the dotted line. **Locality loss**: how much texts that "
                "the edit is not about have moved; it should stay small. **Edit success**: the "
                "share of edits that a paraphrase follows to the letter."
            )
            tab["curves"] = gr.Plot(show_label=False, visible=False, elem_id="run-curves")
            tab["saving"] = parts.saving()
    return tab


# What shows the run: status, curves, start, stop, earlier runs; and the choice of editors.


def show(session: Session) -> tuple[Any, ...]:
    """The server's run, or the one that the user has chosen, as it stands."""
    runs, run = session.runs, session.watched()
    live = runs.last is not None and runs.last.live
    names = runs.of(session.bench.lm)
    records = run.records() if run else []
    has_steps = any("total" in record for record in records)
    return (
        markup.run_status(run),
        gr.update(
            value=shown(
                session, "training-curves", plots.training_curves(records) if has_steps else None
            ),
            visible=has_steps,
        ),
        gr.update(interactive=not live),
        gr.update(interactive=live),
        gr.update(choices=names, value=run.name if run and run.name in names else None),
        gr.update(**models.choice(session)),
    )


def refresh(session: Session) -> tuple[Any, ...]:
    """`show`, where something has changed since the last look."""
    run, before = session.watched(), session.seen
    names = tuple(session.runs.of(session.bench.lm)), tuple(session.model.editors)
    session.seen = run and (run.name, run.state, len(run.records())), names
    if session.seen == before:
        return (gr.skip(),) * 6
    shown = show(session)
    if before is not None and before[1] == names:  # nobody's open list closes at each step
        shown = (*shown[:4], gr.skip(), gr.skip())
    return shown


def arrive(session: Session) -> tuple[Any, ...]:
    """What a freshly loaded page shows."""
    session.seen = None
    return markup.header(session.bench, session.editor), *refresh(session)


def watch(session: Session, name: str | None) -> tuple[Any, ...]:
    """Look at another run."""
    session.watching = name
    return arrive(session)[1:]


def needs_file(data: str) -> dict[str, Any]:
    """Ask for a file where the data is not built in."""
    return gr.update(visible=data != "facts")


def _whole(name: str, value: float | None) -> int:
    if value is None or value < 1:
        raise EditorError(f"{name} must be a whole number from 1 on; got {value}.")
    return int(value)


def _rate(name: str, value: float | None) -> float:
    if value is None or value <= 0:
        raise EditorError(f"{name} must be a positive number; got {value}.")
    return float(value)


def _blocks(text: str) -> list[int] | list[str] | None:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    whole = [part for part in parts if part.lstrip("-").isdigit()]
    return ([int(part) for part in parts] if len(whole) == len(parts) else parts) or None


@guarded
def start(
    session: Session,
    name: str,
    data: str,
    upload: str | None,
    steps: float | None,
    batch: float | None,
    blocks: str,
    rank: float | None,
    lr: float | None,
    c_edit: float | None,
    skip_bad: bool,
) -> tuple[Any, ...]:
    """Start a run over the session's model."""
    if data != "facts" and not upload:
        raise DataError(f"Give the {DATA[data]}, or choose the built-in facts.")
    editor = replace(
        EDITING,
        rank=_whole("Rank", rank),
        blocks=_blocks(blocks) or blocks_of(session.bench.lm),
    )
    training = replace(
        TRAINING,
        steps=_whole("Steps", steps),
        batch=_whole("Edits a step", batch),
        lr=_rate("Learning rate", lr),
        c_edit=_rate("Edit-loss weight", c_edit),
    )
    run = session.runs.start(
        session.model,
        name.strip(),
        data,
        upload=Path(upload) if upload and data != "facts" else None,
        editor=editor,
        training=training,
        skip_bad=skip_bad,
        chat=session.bench.lm.chat,
    )
    return _now(session, run)


@guarded
def stop(session: Session) -> tuple[Any, ...]:
    """Stop the server's run after its step."""
    session.runs.stop()
    return show(session)


@guarded
def resume(session: Session, name: str | None) -> tuple[Any, ...]:
    """Go on with an earlier run."""
    return _now(session, session.runs.resume(session.model, _chosen(name)))


@guarded
def take(session: Session, name: str | None) -> tuple[Any, ...]:
    """Edit with what a run has kept."""
    run = session.runs.get(_chosen(name))
    if not run.keeps_editor:
        raise EditorError(f"{run.name} has kept no editor: it is {run.state}.")
    kept, _ = session.model.add(run.folder)
    session.choose(kept)
    gr.Info(f"{kept} makes the next edits.")
    return show(session)


def _now(session: Session, run: Run) -> tuple[Any, ...]:
    session.watching = run.name
    return show(session)


def _chosen(name: str | None) -> str:
    if not name:
        raise EditorError("Choose one of the earlier runs first.")
    return name
