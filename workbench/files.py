"""Files that are complete or not there: written beside the target, then renamed into place."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from workbench.errors import EditorError, FileError, WorkbenchError
from workbench.shortage import is_shortage

# What reading settings out of JSON raises where that holds others than expected.
MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file by `data` in one step; a kill at any moment leaves the old one or the new.

    Raises:
        FileError: The disk is full, or the place cannot be written.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with beside.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise what the system says of a file that cannot be written as an error with advice.

    Raises:
        FileError: The disk is full, or the place cannot be written.
    """
    try:
        yield
    except (OSError, ValueError) as error:  # the last: of names that no file can have
        reason = getattr(error, "strerror", None) or error
        raise FileError(
            f"{path} cannot be written: {reason}. What stood there before is as it was. Make room, "
            f"or give a folder that can be written."
        ) from None


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, its metadata inside, in one step."""
    write_bytes(path, save({k: v.detach().cpu() for k, v in tensors.items()}, dict(metadata)))


def read_tensors(
    path: Path, error: Callable[[str], WorkbenchError]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file and its metadata.

    Args:
        path: The file.
        error: The class of error to raise.

    Raises:
        WorkbenchError: The file is missing, cut short or no safetensors file.
    """
    with _opened(path, error) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def read_metadata(path: Path, error: Callable[[str], WorkbenchError]) -> dict[str, str]:
    """`read_tensors` without the tensors."""
    with _opened(path, error) as file:
        return dict(file.metadata() or {})


@contextmanager
def _opened(path: Path, error: Callable[[str], WorkbenchError]) -> Iterator[safe_open]:
    if not path.is_file():
        raise error(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, RuntimeError) as problem:
        if is_shortage(problem):
            raise
        raise error(f"{path} is damaged or no safetensors file: {problem}.") from None


def flat_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as tensors by name, for a safetensors file."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{index}.{key}": torch.as_tensor(value)
        for index, entries in state.items()
        for key, value in entries.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `flat_optimizer` gave; learning rates stay the optimiser's own.

    Raises:
        EditorError: That belongs to other parameters, or is damaged.
    """
    whole = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"optimizer\.(\d{1,9})\.(\w+)", name):
            index, key = int(match[1]), match[2]
            if index >= len(parameters) or tensor.shape not in ((), parameters[index].shape):
                raise EditorError(
                    f"The optimiser's state {name} of shape {tuple(tensor.shape)} is of other "
                    f"parameters than those being trained. Give another folder."
                )
            state.setdefault(index, {})[key] = tensor
    optimizer.load_state_dict({**whole, "state": state})
