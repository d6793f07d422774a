"""A plain training loop: seeded batches, Adam, checkpoints to resume from, a progress bar."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from workbench.errors import DataError
from workbench.files import flat_optimizer, read_tensors, restore_optimizer, write_tensors

CHECKPOINT = "checkpoint.safetensors"
_WINDOW = 16  # batches among which texts are sorted by length


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Settings of a training from labelled texts.

    Args:
        steps: Optimiser steps.
        batch: Texts in each.
        lr: Adam's learning rate, after warm-up; it falls to 0 along a cosine's second half.
        warmup: Steps over which it rises from 0.
        weight_decay: AdamW's.
        seed: Chooses initial weights and batches.
        save_every: Steps between checkpoints.
        few: Texts, the first ones, that are seen alone at first. Facts are learned late where there
            are many of them: until then the model looks for what links a subject to its answer,
            and finds it sooner among few (Zucchet et al. 2025, arXiv 2503.21676).
        few_steps: For so many steps.
    """

    steps: int
    batch: int = 64
    lr: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.0
    seed: int = 0
    save_every: int = 200
    few: int = 0
    few_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "save_every"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} must be at least 1; got {getattr(self, name)}.")

    def lr_at(self, step: int) -> float:
        """The learning rate of a step (0-based)."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        left = 1 - max(0, step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * rise * min(1.0, left)


@lru_cache(maxsize=2)
def _epoch(lengths: tuple[int, ...], size: int, seed: int, epoch: int) -> list[list[int]]:
    """All texts once, in random batches of like lengths."""
    chooser = random.Random(f"{seed}:{epoch}")
    order = list(range(len(lengths)))
    chooser.shuffle(order)
    windows = [order[i : i + _WINDOW * size] for i in range(0, len(order), _WINDOW * size)]
    alike = [index for window in windows for index in sorted(window, key=lengths.__getitem__)]
    batches = [alike[i : i + size] for i in range(0, len(alike), size)]
    chooser.shuffle(batches)
    return batches


def batch_of(lengths: Sequence[int], config: FitConfig, step: int) -> list[int]:
    """Indices of the texts of a step: they depend on the seed and the step alone."""
    seen = lengths[: config.few] if step < config.few_steps else lengths
    place = step if step < config.few_steps else step - config.few_steps
    epoch, place = divmod(place, -(-len(seen) // config.batch))
    return _epoch(tuple(seen), config.batch, config.seed, epoch)[place]


def fit(
    parameters: Mapping[str, torch.nn.Parameter],
    loss: Callable[[list[int]], Tensor],
    lengths: Sequence[int],
    config: FitConfig,
    folder: Path,
    name: str,
) -> None:
    """Train parameters in place, from the folder's checkpoint on if there is one.

    Args:
        parameters: What is trained, by name.
        loss: Mean loss of the texts of these indices.
        lengths: Length of each text.
        config: Settings.
        folder: Receives `checkpoint.safetensors`.
        name: Shown beside the progress bar.

    Raises:
        DataError: The checkpoint is of a run with other settings.
    """
    weights = list(parameters.values())
    optimizer = torch.optim.AdamW(
        weights, lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True
    )
    first = _restore(parameters, optimizer, config, folder)
    with tqdm(total=config.steps, initial=first, desc=name, mininterval=5) as bar:
        for step in range(first, config.steps):
            for group in optimizer.param_groups:
                group["lr"] = config.lr_at(step)
            found = loss(batch_of(lengths, config, step))
            optimizer.zero_grad(set_to_none=True)
            found.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            bar.update()
            if step % 10 == 0:
                bar.set_postfix(loss=f"{found.item():.3f}", refresh=False)
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                about = json.dumps({"step": step + 1, "config": asdict(config)})
                tensors = {f"weight.{key}": value for key, value in parameters.items()}
                write_tensors(
                    folder / CHECKPOINT, tensors | flat_optimizer(optimizer), {"about": about}
                )


@torch.no_grad()
def _restore(
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    config: FitConfig,
    folder: Path,
) -> int:
    """Put a checkpoint's values back; returns its step, 0 where there is none."""
    if not (folder / CHECKPOINT).exists():
        return 0
    tensors, metadata = read_tensors(folder / CHECKPOINT, DataError)
    about = json.loads(metadata.get("about", "{}"))
    if about.get("config") != asdict(config):
        raise DataError(
            f"{folder} holds a run with settings {about.get('config')}; this one has "
            f"{asdict(config)}. Give another folder, or the same settings."
        )
    for key, parameter in parameters.items():
        parameter.copy_(tensors[f"weight.{key}"])
    restore_optimizer(optimizer, tensors)
    return about["step"]
