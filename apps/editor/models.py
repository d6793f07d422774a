"""The tab where another model or another editor is opened."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from apps.editor import markup, page
from apps.editor.sessions import SCREEN, Session, guarded, readable
from apps.editor.shelf import LABELS
from workbench import EditorError
from workbench.models import DEFAULT_MODEL, Quantization
from workbench.tables import placeholder

WEIGHTS: list[tuple[str, str]] = [("Full", ""), ("8-bit", "8bit"), ("4-bit", "4bit")]


GATES = (
    "A scope keeps edits to texts about their question; without scope and gate they export as "
    "LoRA adapters."
)
UNTRAINED = (
    "There is no trained editor for this model yet: edits are made by fine-tuning, which is slower "
    "and reaches further. Training makes one."
)


def choice(session: Session) -> dict[str, Any]:
    """The editors to choose from, trained ones first, and the one in use."""
    names = [*session.model.editors][::-1]
    return {
        "choices": [(LABELS.get(name, name), name) for name in names],
        "value": session.editor,
        "info": GATES if len(names) > 1 else UNTRAINED,
    }


def layout(session: Session) -> dict[str, Any]:
    """The tab's components by name; its form tells what is open."""
    lm = session.bench.lm
    with gr.Row():
        with gr.Column(min_width=320):
            gr.Markdown(
                "### Another model\n"
                "All users of this server share its open models; their edits are their own. "
                "**Opening another one, or the same with other settings, begins a session without "
                "edits.** To keep yours, press *Save session* on the Edit tab first; it can be "
                "loaded when the model is open again."
            )
            source = gr.Textbox(
                "" if lm.source == DEFAULT_MODEL else lm.source,
                label="Model",
                placeholder="empty: the embedded model",
                info="Hub id (org/name), or a folder or .gguf file on the server",
                elem_id="model-source",
            )
            quantize = gr.Radio(
                WEIGHTS,
                value=lm.quantization or "",
                label="Weights",
                info="8-bit and 4-bit need bitsandbytes",
            )
            chat = gr.Checkbox(
                lm.chat,
                label="Chat",
                info="Prompts are a user's turns, read through the model's chat template, and "
                "targets what the assistant should say",
                elem_id="model-chat",
            )
            with gr.Row():
                estimate = gr.Button("Estimate", min_width=120, elem_id="model-estimate")
                open = gr.Button(
                    "Open model", variant="primary", min_width=120, elem_id="model-open"
                )
            said = gr.HTML(
                placeholder("The memory that a model needs is worked out before it is opened."),
                elem_id="model-said",
                apply_default_css=False,
            )
        with gr.Column(min_width=320):
            gr.Markdown(
                "### Another editor\n"
                "A trained editor belongs to the model that it was trained for. It is added to the "
                "choice on the Edit tab, and your edits stay. Without one there is fine-tuning; "
                "the Train tab makes one."
            )
            folder = gr.Textbox(
                "",
                label="Editor",
                placeholder="my-editor",
                info="Hub id (owner/name), or a folder on the server, as training writes it",
                elem_id="editor-folder",
            )
            add = gr.Button("Open editor", elem_id="editor-open")
            added = gr.HTML(elem_id="editor-said", apply_default_css=False)
    return {
        "source": source,
        "quantize": quantize,
        "chat": chat,
        "estimate": estimate,
        "open": open,
        "said": said,
        "folder": folder,
        "add": add,
        "added": added,
    }


def _quantization(name: str) -> Quantization | None:
    return name or None  # type: ignore[return-value]


def estimate(session: Session, source: str, quantize: str) -> str:
    """What a model would take, and whether it fits."""
    with readable():
        return markup.memory(session.shelf.estimate(source.strip(), _quantization(quantize)))


def switch(session: Session, source: str, quantize: str, chat: bool) -> Iterator[tuple[Any, ...]]:
    """Open a model and begin a session over it: the text, header, editors, then the screen."""
    source, held = source.strip(), _quantization(quantize)
    with readable():
        if session.shelf.find(source, held) is None:
            needed = session.shelf.estimate(source, held)
            said = markup.memory(needed, "Opening it …" if needed.fits else "")
            yield said, *(gr.skip(),) * (2 + SCREEN + page.FORM)
        model = session.shelf.open(source, held)
    with session.lock, readable():
        left = len(session.bench.edits)
        session.use(model, chat=chat)
        shown = page.screen(session)
    said = f"{model.lm.source} is open. "
    if chat:
        said += "Prompts go through its chat template. "
    if left:
        said += f"{left} edit{'s' * (left > 1)} of the session before stayed behind. "
    if len(model.editors) == 1:
        said += (
            "No trained editor is known for it: edits are made by fine-tuning, until you open an "
            "editor that was trained for it, or train one on the Train tab."
        )
    yield (
        placeholder(said),
        markup.header(session.bench, session.editor),
        gr.update(**choice(session)),
        *shown,
        *page.form("", "", ()),
    )


@guarded
def add(session: Session, folder: str) -> tuple[Any, ...]:
    """Open a trained editor for the session's model, and choose it."""
    if not folder.strip():
        raise EditorError(
            "Give the folder of a trained editor, which holds editor.safetensors, or its hub id."
        )
    name, warning = session.model.add(folder.strip())
    session.choose(name)
    said = f"{name} is open, and chosen for the next edit. {warning}"
    return (
        placeholder(said),
        markup.header(session.bench, session.editor),
        gr.update(**choice(session)),
    )


@guarded
def choose(session: Session, editor: str) -> str:
    """Make the next edits with another editor; returns the header."""
    session.choose(editor)
    return markup.header(session.bench, session.editor)
