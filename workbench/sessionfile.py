"""Sessions on disk: `session.safetensors` holds everything, `session.json` what people read."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from workbench.checks import check_text, path_of
from workbench.editors import Editor, EditRequest, FineTune, editor_source, open_editor
from workbench.errors import EditError, EditorError, FileError
from workbench.files import MALFORMED, read_tensors, write_tensors, write_text
from workbench.layers import DENSE
from workbench.models import LanguageModel
from workbench.overlay import overlay
from workbench.results import EditTrace, LayerTrace, as_json
from workbench.scope import Scope
from workbench.shortage import is_shortage
from workbench.updates import LayerUpdate, Update

_FILE = "session.safetensors"
_SCOPE = ("keys", "thresholds", "openings", "answers")
Kind = TypeVar("Kind")


@dataclass(frozen=True, eq=False)
class SavedEdit:
    """One edit of a session as it is kept: what was asked, its update, how it stands."""

    requests: tuple[EditRequest, ...]
    update: Update
    trace: EditTrace | None
    seconds: float
    enabled: bool
    strength: float


@dataclass(frozen=True, eq=False)
class SavedSession:
    """A session as read back: model, editor, and edits, oldest first."""

    model: str
    fingerprint: str
    chat: bool
    editor: str
    settings: dict[str, Any]
    edits: tuple[SavedEdit, ...]

    @property
    def opening(self) -> dict[str, Any]:
        """Options that open the model as it was."""
        held = self.fingerprint.partition(":")[0]
        return {"quantize" if held in ("4bit", "8bit") else "dtype": held, "chat": self.chat}

    def open_editor(self, lm: LanguageModel) -> Editor:
        """The session's editor; where it is not to be had, fine-tuning, with a warning."""
        try:
            return open_editor(self.editor, lm, self.settings)
        except EditorError as error:
            warnings.warn(
                f"The session's edits are back, its editor is not, so that new edits are made by "
                f"fine-tuning: {error}",
                stacklevel=3,
            )
            return FineTune(lm)

    def check(self, lm: LanguageModel) -> None:
        """Refuse a model whose weights are not those the session was made over.

        Raises:
            EditError: They are not, or some update fits no layer of it.
        """
        if lm.fingerprint() != self.fingerprint:
            raise EditError(
                f"This session was made over {self.model} with weights {self.fingerprint}; the "
                f"model that is open, {lm.source}, has weights {lm.fingerprint()}. Open the first."
            )
        for edit in self.edits:
            with overlay(lm.model, edit.update):
                pass


def write_session(
    folder: str | Path, lm: LanguageModel, editor: Editor, edits: Sequence[SavedEdit]
) -> Path:
    """Write live edits into a folder: one safetensors file with everything, one JSON to be read.

    Args:
        folder: Made if it is not there.
        lm: The model the edits were made for.
        editor: What made them.
        edits: Oldest first.

    Raises:
        FileError: The folder cannot be written, or the disk is full.
    """
    folder = path_of(folder, FileError)
    tensors: dict[str, Tensor] = {}
    listed = []
    for place, edit in enumerate(edits):
        for name, layer in edit.update.items():
            tensors[f"{place}.A.{name}"] = layer.A.contiguous()
            tensors[f"{place}.B.{name}"] = layer.B.contiguous()
            tensors[f"{place}.scale.{name}"] = torch.tensor(float(layer.scale), dtype=torch.float64)
            if layer.threshold is not None:
                tensors[f"{place}.threshold.{name}"] = layer.threshold.contiguous()
            if layer.owners is not None:
                tensors[f"{place}.owners.{name}"] = layer.owners.contiguous()
        if (scope := edit.update.scope) is not None:
            for part, tensor in zip(_SCOPE, scope.parts(), strict=True):
                tensors[f"{place}.scope.{part}.{scope.layer}"] = tensor.contiguous()
        listed.append(
            {
                "requests": as_json(edit.requests),
                "enabled": edit.enabled,
                "strength": edit.strength,
                "seconds": edit.seconds,
                "trace": as_json(edit.trace),
            }
        )
    about = {
        "model": lm.source,
        "fingerprint": lm.fingerprint(),
        "chat": lm.chat,
        "editor": editor_source(editor),
        "settings": editor.settings(),
        "edits": listed,
    }
    text = json.dumps(about, ensure_ascii=False, indent=1)
    write_tensors(folder / _FILE, tensors, {"about": text})
    write_text(folder / "session.json", text + "\n")
    return folder


def read_session(folder: str | Path) -> SavedSession:
    """Read a session back.

    Raises:
        EditError: The folder holds no session that this version can read.
    """
    path = path_of(folder, EditError) / _FILE
    tensors, metadata = read_tensors(path, EditError)
    try:
        about = json.loads(metadata["about"])
        edits = tuple(_edit(place, item, tensors) for place, item in enumerate(about["edits"]))
        model, fingerprint, editor = (
            _of(str, about[key]) for key in ("model", "fingerprint", "editor")
        )
        chat, settings = _of(bool, about.get("chat", False)), _of(dict, about["settings"])
        return SavedSession(model, fingerprint, chat, editor, settings, edits)
    except MALFORMED as error:
        if is_shortage(error):
            raise
        raise EditError(
            f"{path} holds no session that this version can read ({error!r})."
        ) from None


def _edit(place: int, item: dict[str, Any], tensors: Mapping[str, Tensor]) -> SavedEdit:
    prefix = f"{place}.A."
    names = [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]
    update = Update(
        {
            name: LayerUpdate(
                tensors[f"{place}.A.{name}"],
                tensors[f"{place}.B.{name}"],
                tensors[f"{place}.scale.{name}"].item(),
                tensors.get(f"{place}.threshold.{name}"),
                tensors.get(f"{place}.owners.{name}"),
            )
            for name in names
        },
        _scope(place, tensors),
    )
    for factor in Update(update.layers).tensors():
        if factor.dtype not in DENSE or factor.dim() > 2:
            raise ValueError(f"a factor of {factor.dtype} and shape {tuple(factor.shape)}")
    if not update.is_finite():
        raise ValueError("numbers that are not finite")
    edits = 0 if update.scope is None else len(update.scope)
    for layer in update.values():
        owners = layer.owner_of_each()
        if owners.dtype != torch.int64 or not bool(((owners >= -1) & (owners < edits)).all()):
            raise ValueError(f"terms of edits that a scope of {edits} lacks")
    return SavedEdit(
        tuple(map(_request, item["requests"])),
        update,
        _trace(item["trace"]),
        float(item["seconds"]),
        bool(item["enabled"]),
        float(item["strength"]),
    )


def _scope(place: int, tensors: Mapping[str, Tensor]) -> Scope | None:
    prefix = f"{place}.scope."
    found = [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]
    if not found:
        return None
    layer = found[0].partition(".")[2]
    scope = Scope(layer, *(tensors[f"{prefix}{part}.{layer}"] for part in _SCOPE))
    keys, thresholds, *counts = scope.parts()
    if any(part.dtype != torch.int64 for part in counts) or not keys.isfinite().all():
        raise ValueError("a scope of other numbers")
    if thresholds.isnan().any() or bool((scope.answers < -1).any()):
        raise ValueError("a scope of other numbers")
    if keys.dtype not in DENSE or keys.dim() != 3:
        raise ValueError(f"a scope of {keys.dtype} and shape {tuple(keys.shape)}")
    return scope


def _of(kind: type[Kind], value: object) -> Kind:
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, found {value!r}")
    return value


def _request(item: dict[str, Any]) -> EditRequest:
    request = EditRequest(**item)
    for text in (request.prompt, request.target, request.subject or ""):
        check_text(text, "text of a request")
    return request


def _trace(item: dict[str, Any] | None) -> EditTrace | None:
    if item is None:
        return None
    layers: list[dict[str, Any]] = [
        {k: tuple(v) if isinstance(v, list) else v for k, v in layer.items()}
        for layer in item["layers"]
    ]
    return EditTrace(
        tuple(map(_request, item["requests"])),
        tuple(item["tokens"]),
        tuple(item["predicts"]),
        tuple(LayerTrace(**layer) for layer in layers),
        tuple(item["answers"]),
    )
