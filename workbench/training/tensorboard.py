"""Training's losses for TensorBoard: the records of the log, as scalars."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from workbench.errors import EditorError
from workbench.files import writing


@contextmanager
def tensorboard_log(folder: str | Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A hook for `Trainer`'s `on_record` that writes each number of a record as a scalar.

    Losses of a step are `training/NAME`, those of a validation `validation/NAME`. A run that goes
    on where it was takes back what the folder shows of the steps that come again.

    Args:
        folder: For TensorBoard: `tensorboard --logdir FOLDER`.

    Raises:
        EditorError: TensorBoard is not installed.
        FileError: The folder cannot be written.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise EditorError(
            "This needs TensorBoard: pip install 'model-editing-workbench[tensorboard]', or read "
            "log.jsonl in the training's folder, which holds the same."
        ) from None
    writers: list[SummaryWriter] = []

    def write(record: Mapping[str, Any]) -> None:
        step = record["step"]
        if not writers:
            with writing(Path(folder)):
                writers.append(SummaryWriter(str(folder), purge_step=step))
        group = "validation" if "validation" in record else "training"
        for name, value in record.get("validation", record).items():
            if name != "step":
                writers[0].add_scalar(f"{group}/{name}", value, step)

    try:
        yield write
    finally:
        for writer in writers:
            writer.close()
