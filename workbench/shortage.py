"""Out of memory: what PyTorch and Python raise, as one error that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from workbench.errors import OutOfMemory

_SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
LESS = (
    "Ask for less at once (fewer or shorter texts, fewer new tokens), open the model with "
    "dtype='bfloat16' or quantize='8bit' or '4bit', or end what else uses the memory."
)


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory has run out: the card's or the machine's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextmanager
def memory_errors(advice: str = LESS) -> Iterator[None]:
    """Raise what says that memory has run out as an error of the workbench; also a decorator.

    Args:
        advice: What to do.

    Raises:
        OutOfMemory: There is not enough memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        error.__traceback__ = None  # its frames would keep alive what was computed
        raise OutOfMemory(f"There is not enough memory ({reason}). {advice}") from None
