"""Rows that are constant in training, in files: more than memory holds, and for the next run."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from torch import Tensor

from workbench.encoding import Tokens
from workbench.errors import FileError
from workbench.files import read_tensors, write_tensors
from workbench.layers import EditableLayer
from workbench.models import LanguageModel

_MODEL = "model"  # the device of its first part


class RowsOnDisk:
    """What a frozen model makes of texts, a file for each, of these weights and layers only.

    Processes may share a folder. A file that cannot be read counts as none, and is written anew.

    Args:
        folder: For all models; may hold what other runs have left.
        lm: The frozen model.
        layers: Whose factors and inputs are kept.
    """

    def __init__(self, folder: Path, lm: LanguageModel, layers: Sequence[EditableLayer]) -> None:
        about = [lm.fingerprint(), *(layer.name for layer in layers)]
        self.folder, self._device = folder / _named(about), lm.device

    def read(self, kind: str, text: Tokens) -> tuple[Tensor, ...] | None:
        """A text's rows, to the bit; None where there are none.

        Args:
            kind: Of rows.
            text: The text.

        Returns:
            On the model's device; of a model on several, what was on another one there.
        """
        path = self._path(kind, text)
        if not path.is_file():
            return None
        try:
            tensors, about = read_tensors(path, FileError)
            devices = [
                name if name != _MODEL else self._device for name in about["devices"].split()
            ]
            return tuple(tensors[str(place)].to(device) for place, device in enumerate(devices))
        except (FileError, KeyError):
            return None

    def write(self, kind: str, text: Tokens, rows: tuple[Tensor, ...]) -> None:
        """Keep a text's rows.

        Raises:
            FileError: The disk is full, or the folder cannot be written.
        """
        tensors = {str(place): row.contiguous() for place, row in enumerate(rows)}
        # The processes of one run each have a device of their own.
        devices = [_MODEL if row.device == self._device else str(row.device) for row in rows]
        write_tensors(self._path(kind, text), tensors, {"devices": " ".join(devices)})

    def _path(self, kind: str, text: Tokens) -> Path:
        name = _named([kind, repr(text)])
        return self.folder / name[:2] / f"{name[2:]}.safetensors"


def _named(about: Sequence[str]) -> str:
    return sha256("\n".join(about).encode()).hexdigest()[:32]
