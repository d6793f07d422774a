"""The server's open models and their editors, shared by all users."""

from __future__ import annotations

import gc
import threading
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch

from workbench import EditorError, FineTune, LanguageModel, ModelError, Workbench, open_model
from workbench.editors import SHIPPED, Editor, TrainableEditor, editor_source, open_editor
from workbench.memory import MemoryEstimate, estimate_memory, free_on, size
from workbench.models import DEFAULT_MODEL, Quantization
from workbench.sharing import is_id, locate_editor

LABELS = {
    "mend": "MEND (scoped)",
    "mend-many": "MEND (for many edits)",
    "mend-linear": "MEND (linear)",
    "ft": "Fine-tuning",
}

KEPT = 2**29  # bytes of one user's edits, undone ones among them


@dataclass(eq=False)
class OpenModel:
    """One model, what can edit it, and who looks at it.

    Args:
        lm: The model.
        editors: By the name that users choose; fine-tuning, which needs no training, among them.
        users: Sessions and training runs; a model that has any stays open.

    Attributes:
        preferred: Name of the editor that sessions begin with, whatever users open: the last one.
    """

    lm: LanguageModel
    editors: dict[str, Editor]
    users: WeakSet[Any] = field(default_factory=WeakSet)
    preferred: str = field(init=False)

    def __post_init__(self) -> None:
        self.preferred = [*self.editors][-1]

    @property
    def most_bytes(self) -> int:
        """Of one user's edits that are kept: `KEPT`, or as many as the model's own if more."""
        return max(KEPT, self.lm.model.get_memory_footprint())

    def add(self, source: str | Path) -> tuple[str, str]:
        """Offer a trained editor to all users of the model.

        Args:
            source: Folder of the editor, or its hub id; one that is already on offer is read anew.

        Returns:
            Its name, and what must be said of it; "" if nothing.

        Raises:
            EditorError: No editor there, it does not fit the model or the memory, or it was
                never trained.
        """
        known, _ = locate_editor(source, partial(self._check_memory, _name_of(str(source))))
        name = _name_of(known)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            editor = TrainableEditor.from_pretrained(known, self.lm)
        if not editor.trained:
            raise EditorError(
                f"The editor in {name} was never trained: what it writes would mean nothing, so "
                f"it was not opened. Train one on the Train tab, open a trained one, or edit by "
                f"fine-tuning."
            )
        if is_id(known) and self._taken(name, known):
            name = known[: len(name) + 8]  # owner/name@1a2b3c4
        while self._taken(name, known):
            name += "'"
        self.editors[name] = editor
        return name, " ".join(str(w.message) for w in caught if w.category is UserWarning)

    def _taken(self, name: str, known: str) -> bool:
        return name in self.editors and getattr(self.editors[name], "source", "") != known

    def _check_memory(self, name: str, bytes: int) -> None:
        # Half a number's size in the file, whole in memory.
        needed, free = 2 * bytes, free_on(self.lm.device)
        if needed > free:
            raise EditorError(
                f"There is not enough memory for the editor in {name}: it needs about "
                f"{size(needed)} on {self.lm.device}, and {size(free)} are free."
            )


class Shelf:
    """Models that are open, at most `most`: the one unused for longest makes room for another.

    Args:
        bench: Its model and editor stay open.
        most: How many models.
        device_map: Spreads each of them; see `open_model`. None: they go where the first one is.
    """

    def __init__(self, bench: Workbench, most: int = 3, *, device_map: str | None = None) -> None:
        chosen = _name_of(editor_source(bench.editor))
        editors = _editors(bench.lm)
        if getattr(bench.editor, "trained", True):
            editors.pop(chosen, None)
            editors[chosen] = bench.editor
        self.first = OpenModel(bench.lm, editors)
        self.most = most
        self._where: dict[str, Any] = {"device": str(bench.lm.device), "device_map": device_map}
        self._open = {_key(bench.lm.source, bench.lm.quantization): self.first}
        self._lock = threading.Lock()

    def find(self, source: str, quantize: Quantization | None) -> OpenModel | None:
        """The model, if it is open."""
        return self._open.get(_key(source, quantize))

    def estimate(self, source: str, quantize: Quantization | None) -> MemoryEstimate:
        """Memory that a model would take.

        Raises:
            ModelError: There is no such model.
        """
        return estimate_memory(source or None, quantize=quantize, **self._where)

    def open(self, source: str, quantize: Quantization | None) -> OpenModel:
        """The model, opened if it is not open yet.

        Args:
            source: Hub id, folder or GGUF file; "" for the embedded default.
            quantize: "8bit", "4bit" or None.

        Raises:
            ModelError: It cannot be opened or does not fit into memory.
        """
        key = _key(source, quantize)
        with self._lock:  # so that two users who ask for a model get one
            found = self._open.pop(key, None)
            if found is None:
                self._make_room(source, quantize)
                lm = open_model(source or None, quantize=quantize, progress=False, **self._where)
                found = OpenModel(lm, _editors(lm))
            self._open[key] = found  # last: the one used most recently
            return found

    def _make_room(self, source: str, quantize: Quantization | None) -> None:
        unused = [key for key, model in self._open.items() if not model.users]
        while unused and (len(self._open) >= self.most or not self.estimate(source, quantize).fits):
            del self._open[unused.pop(0)]
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if len(self._open) >= self.most:
            names = ", ".join(model.lm.source for model in self._open.values())
            raise ModelError(
                f"All {self.most} models that this server keeps open are in use: {names}. Choose "
                f"one of them, or wait until one is free."
            )
        self.estimate(source, quantize).check()


def _name_of(source: str) -> str:
    """What users choose an editor by: its hub id, or the name of its folder or its own."""
    return source.partition("@")[0] if is_id(source) else Path(source).name


def _editors(lm: LanguageModel) -> dict[str, Editor]:
    """What can edit a model without more ado, the best last."""
    trained = [*SHIPPED][::-1] if lm.source == DEFAULT_MODEL else ()
    return {name: open_editor(name, lm) for name in (FineTune.name, *trained)}


def _key(source: str, quantize: Quantization | None) -> tuple[str, Quantization | None]:
    path = Path(source).expanduser()
    name = str(path.resolve()) if source and path.exists() else source or DEFAULT_MODEL
    return name, quantize
