"""Files that are complete or not there: written beside the target, then renamed into place."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from workbench.errors import WorkbenchError


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file by `data` in one step; a kill at any moment leaves the old one or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with beside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


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
    if not path.is_file():
        raise error(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = file.keys(), file.metadata()
            return {name: file.get_tensor(name) for name in names}, dict(metadata or {})
    except (SafetensorError, OSError, RuntimeError) as problem:
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
    """Put back what `flat_optimizer` gave; learning rates stay the optimiser's own."""
    whole = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        prefix, _, rest = name.partition(".")
        if prefix == "optimizer":
            index, key = rest.split(".")
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**whole, "state": state})
