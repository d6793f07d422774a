"""Cancel what runs: the one who starts it says when, the loops that take long look."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from workbench.errors import Cancelled

_asked: ContextVar[Callable[[], bool] | None] = ContextVar("workbench_cancel_asked", default=None)


@contextmanager
def cancellable(asked: Callable[[], bool]) -> Iterator[None]:
    """Let generation, comparison and fine-tuning inside the `with` be cancelled.

    Local to the context (thread, task) that enters it, as overlays are: one user's cancelling
    cannot end another's work.

    Args:
        asked: Whether to cancel; looked at before each token and each step.

    Raises:
        Cancelled: It said yes.
    """
    reset = _asked.set(asked)
    try:
        yield
    finally:
        _asked.reset(reset)


def checkpoint() -> None:
    """Stop here if that was asked for.

    Raises:
        Cancelled: It was.
    """
    asked = _asked.get()
    if asked is not None and asked():
        raise Cancelled("Cancelled: everything is as it was.")
