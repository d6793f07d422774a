"""The tab where edits are made: its components, without what they do."""

from __future__ import annotations

from typing import Any

import gradio as gr

from apps.editor import markup, models, reach
from apps.editor.sessions import Session
from workbench.corpus import EXAMPLES
from workbench.reach import LEGEND

FIGURES = {
    "Probabilities": (
        "Each prompt's answer under the base model and under the edited one. The edit and its "
        "equivalents should move right; the others should stay where they were.",
        1,
    ),
    "Reach": (LEGEND, 0),
    "Factors": (
        "The gradient's factors by layer and token. Bright cells weigh most in the edit. On the "
        "right is what the editor makes of activation u and delta δ: the pseudoactivation ũ and "
        "the pseudodelta δ̃ that are written. Fine-tuning has the left half only.",
        1,
    ),
    "Update size": (
        "How much each edited matrix changes: ‖ΔW‖, and as a share of the matrix, ‖ΔW‖ / ‖W‖. See "
        "which blocks carry the edit, and how little of each of them it takes.",
        2,
    ),
    "Spectrum": (
        "Singular values of each update: how many directions the edit uses. An editor's update has "
        "at most one for each token; fine-tuning's has a long tail.",
        1,
    ),
    "Overlap": (
        "Cosine between the updates of every two live edits. Near 0 they write in unrelated "
        "directions; near 1 or −1 one changes what the other has written. "
        "It takes two edits to see.",
        1,
    ),
}
TOKENS = (
    "What the edit is to the model, token by token, with those that a chat template adds. The "
    "prompt's are read; the marked ones are the target, whose loss the edit is made from."
)


def form(session: Session) -> tuple[list[gr.Textbox], dict[str, Any], gr.Radio]:
    """The edit's form: prompt, target, the lists, the prompt that the lists are for; the editor."""
    prompt = gr.Textbox(
        "", label="Prompt", placeholder="The capital of France is", elem_id="prompt"
    )
    target = gr.Textbox("", label="What it should say", placeholder="Lyon", elem_id="target")
    editor = gr.Radio(
        **models.choice(session),
        label="Editor",
        elem_id="editor",
    )
    with gr.Row():
        edit = gr.Button("Edit", variant="primary", min_width=120, elem_id="edit")
        compare = gr.Button("Compare only", min_width=120, elem_id="compare")
    examples = gr.Dataset(
        components=[gr.Textbox(visible=False)],
        samples=[[f"{example.prompt} → {example.target}"] for example in EXAMPLES],
        label="Examples: one click fills the form",
        type="index",
        elem_id="examples",
    )
    with gr.Accordion("Prompts to compare", open=False, elem_id="probes"):
        gr.Markdown(
            "One a line, suggested for your edit; change them as you like. After ` => ` stands "
            "the answer whose probability is followed."
        )
        equivalents = gr.Textbox(
            "", label="Equivalent: should change with it", lines=2, max_lines=6
        )
        neighbors = gr.Textbox("", label="Neighbours: should stay", lines=2, max_lines=6)
        unrelated = gr.Textbox("", label="Unrelated: should stay", lines=3, max_lines=6)
        other = gr.Textbox("", label="Your own", lines=1, max_lines=6)
    listed_for = gr.Textbox("", visible=False)
    form = [prompt, target, equivalents, neighbors, unrelated, other, listed_for]
    return form, {"edit": edit, "compare": compare, "examples": examples}, editor


def history() -> tuple[gr.HTML, gr.Button, gr.Button, dict[str, Any]]:
    """The list of edits, undo and redo, and what goes to files."""
    gr.Markdown("### Edits")
    history = gr.HTML(
        markup.history_list((), None),
        elem_id="history",
        js_on_load=markup.HISTORY_SCRIPT,
        apply_default_css=False,
    )
    with gr.Row(elem_classes="tools"):
        small: dict[str, Any] = {"size": "sm", "min_width": 90}
        undo = gr.Button("↶ Undo", interactive=False, elem_id="undo", **small)
        redo = gr.Button("↷ Redo", interactive=False, elem_id="redo", **small)
        files = {
            "adapter": gr.Button("Export adapter", interactive=False, elem_id="adapter", **small),
            "session": gr.Button("Save session", interactive=False, elem_id="session", **small),
            "load": gr.UploadButton(
                "Load session", file_types=[".zip"], elem_id="load", size="sm", min_width=90
            ),
            "made": gr.DownloadButton(visible=False),
        }
    return history, undo, redo, files


def figures() -> tuple[list[Any], dict[str, gr.Button], dict[str, Any]]:
    """Tabs: every prompt's probability, the inside of the edit in view, its reach, its tokens."""
    with gr.Column(visible=False, elem_id="figures") as column:
        title = gr.HTML(apply_default_css=False)
        plots, probing = [], {}
        with gr.Tabs():
            for name, (text, count) in FIGURES.items():
                with gr.Tab(name):
                    gr.Markdown(text)
                    if name == "Reach":
                        probing = reach.layout()
                        continue
                    with gr.Row():
                        plots += [gr.Plot(show_label=False, min_width=320) for _ in range(count)]
            with gr.Tab("Tokens"):
                gr.Markdown(TOKENS)
                tokens = gr.HTML(elem_id="tokens", apply_default_css=False)
        buttons = saving()
    return [column, plots[0], title, tokens, *plots[1:]], buttons, probing


def saving() -> dict[str, gr.Button]:
    """Buttons that save the figures in sight."""
    with gr.Row(elem_classes="saving"):
        small: dict[str, Any] = {"size": "sm", "min_width": 120, "scale": 0}
        return {kind: gr.Button(f"Save as {kind}", **small) for kind in ("PNG", "HTML")}
