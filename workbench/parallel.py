"""Several processes that share one task: started by a launcher, each with a model of its own."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from workbench.errors import EditorError, ModelError

# Where launchers (accelerate, torchrun, mpirun) say how many processes they have started.
_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
Item = TypeVar("Item")


def join(device: str) -> str:
    """Meet the other processes of `accelerate launch`, torchrun or mpirun; alone, do nothing.

    Args:
        device: As `open_model` takes it.

    Returns:
        Where this process works: on a card of its own, or on the CPU.

    Raises:
        ModelError: The device is a single card.
    """
    if max(int(os.environ.get(name) or 1) for name in _SIZES) == 1:
        return device
    if device not in ("auto", "cpu", "cuda"):
        raise ModelError(
            f"Several processes cannot share the device {device}: leave --device out, and each "
            f"takes a card of its own, or start one process."
        )
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    on_cpu = device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=on_cpu or not torch.cuda.is_available())
    atexit.register(state.destroy_process_group)
    return str(state.device)


def refuse_shards(model: nn.Module) -> None:
    """Refuse a model of whose weights each process holds a part.

    Its layers gather their weights when the model as a whole runs; editing runs parts of it, and
    looks at single layers.

    Raises:
        ModelError: It is sharded by FSDP, tensor parallelism or DeepSpeed's ZeRO.
    """
    if not dist.is_available():
        return
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    found = None
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        found = "by FSDP (FullyShardedDataParallel)"
    for name, weight in model.named_parameters():
        if isinstance(weight, DTensor):
            found = f"as DTensors, by FSDP or tensor parallelism ({name})"
        elif hasattr(weight, "ds_id"):
            found = f"by DeepSpeed's ZeRO stage 3 ({name})"
    if found:
        raise ModelError(
            f"The model is sharded {found}; a whole one is needed, which is frozen and never "
            f"synchronised. Where it fits on each card, open it in every process "
            f"(accelerate launch -m workbench train ...); where it does not, spread one over the "
            f"cards of a machine with open_model(folder, device_map='auto'). The folder: "
            f"model.save_pretrained(folder, state_dict=accelerator.get_state_dict(model))."
        )


def count() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def place() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if count() > 1 else 0


def leads() -> bool:
    """Whether this is the process that writes files and prints."""
    return place() == 0


def share(items: Sequence[Item], together: int = 1) -> Sequence[Item]:
    """This process's part of a sequence; the parts of all are the whole, in order.

    Args:
        items: The same in every process.
        together: Items, one after another, that stay in one part; divides their number.
    """
    sets = len(items) // together
    first, end = (sets * number // count() * together for number in (place(), place() + 1))
    return items[first:end]


def add_up(tensor: Tensor) -> Tensor:
    """Sum a contiguous tensor over all processes, in place; returns it."""
    if count() > 1:
        dist.all_reduce(tensor)
    return tensor


def added(values: Sequence[float]) -> list[float]:
    """Sums over all processes, each value's own."""
    # NCCL takes what lies on a card alone.
    device = "cuda" if count() > 1 and dist.get_backend() == "nccl" else "cpu"
    return add_up(torch.tensor(values, dtype=torch.float64, device=device)).tolist()


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum each parameter's gradient over all processes, in place; none counts as zero."""
    if count() > 1:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)


def agree(value: int, what: str) -> None:
    """Refuse processes that would go separate ways.

    Args:
        value: Must be the same in all.
        what: What it says, for the message.

    Raises:
        EditorError: It is not.
    """
    found = [0.0] * count()
    found[place()] = float(value)
    if len({*added(found)}) > 1:
        raise EditorError(
            f"The processes do not find the same: {what}. Give each machine the same files, and a "
            f"folder that all of them share."
        )
