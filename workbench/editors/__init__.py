"""Editors: whatever turns a model and edit requests into an update."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.checks import path_of
from workbench.editors.base import (
    Editor,
    TrainableEditor,
    editor_class,
    editor_names,
    push_editor,
    with_chat,
)
from workbench.editors.enn import Enn, EnnConfig
from workbench.editors.finetune import FineTune, FineTuneConfig, FineTuneKL
from workbench.editors.ke import Ke, KeConfig
from workbench.editors.lora import Lora, LoraConfig
from workbench.editors.mend import Mend, MendConfig
from workbench.editors.proposals import EditRequest, Proposal, gradient_factors
from workbench.editors.rome import Rome, RomeConfig
from workbench.errors import EditorError
from workbench.models import DEFAULT_MODEL, LanguageModel
from workbench.sharing import is_id
from workbench.shipped import assets_folder

__all__ = [
    "SHIPPED",
    "EditRequest",
    "Editor",
    "Enn",
    "EnnConfig",
    "FineTune",
    "FineTuneConfig",
    "FineTuneKL",
    "Ke",
    "KeConfig",
    "Lora",
    "LoraConfig",
    "Mend",
    "MendConfig",
    "Proposal",
    "Rome",
    "RomeConfig",
    "TrainableEditor",
    "editor_class",
    "editor_names",
    "editor_source",
    "gradient_factors",
    "open_editor",
    "push_editor",
    "shipped_editor",
    "trainable_editors",
    "with_chat",
]

# The editors that are ready as soon as they are made.
TRAINING_FREE = [
    name for name in editor_names() if not issubclass(editor_class(name), TrainableEditor)
]


def trainable_editors() -> dict[str, type[TrainableEditor]]:
    """Name -> class of the editors that are meta-trained."""
    classes = {name: editor_class(name) for name in editor_names()}
    return {name: cls for name, cls in classes.items() if issubclass(cls, TrainableEditor)}


# The trained editors of the embedded model that come along, and their folders: MEND with a gate,
# the same trained for edits that live together, and as in the paper, whose edits are adapters.
SHIPPED = {
    "mend": DEFAULT_MODEL,
    "mend-many": f"{DEFAULT_MODEL}-many",
    "mend-linear": f"{DEFAULT_MODEL}-linear",
}


def shipped_editor(name: str = "mend") -> Path:
    """The folder of one of the embedded model's trained editors (`SHIPPED`)."""
    return assets_folder() / "editors" / SHIPPED[name]


def editor_source(editor: Editor) -> str:
    """What `open_editor` opens the same editor from: a name, a folder, or a hub id with its commit.

    One that was trained in memory and never saved has nothing but its name.
    """
    source = editor.source if isinstance(editor, TrainableEditor) else None
    if source is None:
        return editor.name
    shipped = {str(shipped_editor(name).resolve()): name for name in SHIPPED}
    return shipped.get(source, source)


def open_editor(
    source: str | Path | None, lm: LanguageModel, settings: Mapping[str, Any] | None = None
) -> Editor:
    """Open an editor for a model.

    Args:
        source: A trained editor's folder, or its hub id, "owner/name" or "owner/name@revision";
            the name of one that needs no training ("ft", "ft_kl", "rome", "lora"); for the
            embedded model "mend", "mend-many" or "mend-linear", its trained editors;
            None: "mend" for that model, else "ft".
        lm: The model to edit.
        settings: Of an editor that needs no training, those that differ from its defaults. A
            trained one brings its own.

    Raises:
        EditorError: Nothing of that name, or the editor does not fit the model.
    """
    embedded = lm.source == DEFAULT_MODEL
    if source is None:
        source = Mend.name if embedded else FineTune.name
    folder = path_of(source, EditorError)
    if source in TRAINING_FREE:
        return editor_class(str(source)).from_settings(lm, settings or {})
    if embedded and source in SHIPPED:
        return TrainableEditor.from_pretrained(shipped_editor(str(source)), lm)
    if folder.is_dir() or is_id(source):
        return TrainableEditor.from_pretrained(source, lm)
    known = sorted({*editor_names(), *SHIPPED})
    if source in known:
        name = str(source).partition("-")[0]
        raise EditorError(
            f"There is no trained {source!r} editor for {lm.source}. Train one (python -m "
            f"workbench train --editor {name} --model {lm.source} --data facts --out DIR) and give "
            f"its folder, or use editor='ft', which needs no training."
        )
    raise EditorError(
        f"There is no editor folder {str(source)!r}, and no editor of that name. Give the folder "
        f"or the hub id of a trained editor, or one of: {', '.join(known)}."
    )
