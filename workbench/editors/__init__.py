"""Editors: whatever turns a model and edit requests into an update."""

from __future__ import annotations

from pathlib import Path

from workbench.editors.base import (
    Editor,
    EditRequest,
    Proposal,
    TrainableEditor,
    editor_class,
    editor_names,
    load_editor,
    save_editor,
)
from workbench.editors.finetune import FineTune, FineTuneConfig
from workbench.editors.mend import Mend, MendConfig
from workbench.errors import EditorError
from workbench.models import DEFAULT_MODEL, LanguageModel

__all__ = [
    "EditRequest",
    "Editor",
    "FineTune",
    "FineTuneConfig",
    "Mend",
    "MendConfig",
    "Proposal",
    "TrainableEditor",
    "assets_folder",
    "default_editor_folder",
    "editor_class",
    "editor_names",
    "editor_source",
    "load_editor",
    "open_editor",
    "save_editor",
]


def assets_folder() -> Path:
    """Where the trained editor and the pictures lie: in the checkout, or inside the package."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "assets"
    return installed if installed.is_dir() else package.parent / "assets"


def default_editor_folder() -> Path:
    """The trained editor of the embedded default model."""
    return assets_folder() / "editors" / DEFAULT_MODEL


def editor_source(editor: Editor) -> str:
    """What `open_editor` opens the same editor from: a name, or where it lies.

    One that was trained in memory and never saved has nothing but its name.
    """
    folder = getattr(editor, "folder", None)
    if folder is None or Path(folder).resolve() == default_editor_folder().resolve():
        return editor.name
    return str(Path(folder).resolve())


def open_editor(source: str | Path | None, lm: LanguageModel) -> Editor:
    """Open an editor for a model.

    Args:
        source: A trained editor's folder; "ft" for fine-tuning, which needs no training; "mend"
            for the default model's trained editor; None: that one where it fits, else "ft".
        lm: The model to edit.

    Raises:
        EditorError: Nothing of that name, or the editor does not fit the model.
    """
    trained = default_editor_folder()
    if source is None:
        return load_editor(trained, lm) if lm.source == DEFAULT_MODEL else FineTune(lm)
    if source == FineTune.name:
        return FineTune(lm)
    if source == Mend.name and lm.source == DEFAULT_MODEL:
        return load_editor(trained, lm)
    if Path(source).is_dir():
        return load_editor(source, lm)
    if source in editor_names():
        raise EditorError(
            f"There is no trained {source!r} editor for {lm.source}. Train one (python -m "
            f"workbench train --editor {source} --model {lm.source} --data facts --out DIR) and "
            f"give its folder, or use editor='ft', which needs no training."
        )
    raise EditorError(
        f"There is no editor folder {str(source)!r}, and no editor of that name. Give the folder "
        f"of a trained editor, or one of: {', '.join(editor_names())}."
    )
