"""Blocks that run again in the backward pass, in the context that they ran in before."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

from torch import nn
from torch.utils.checkpoint import checkpoint

Again: TypeAlias = Callable[[], AbstractContextManager[object]]


class _Anew:
    """A context that can be entered several times, and is made each time."""

    def __init__(self, make: Again) -> None:
        self._make, self._made = make, list[AbstractContextManager[object]]()

    def __enter__(self) -> None:
        self._made.append(self._make())
        self._made[-1].__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self._made.pop().__exit__(*error)


def run_twice(block: nn.Module, again: Again, *args: Any, **kwargs: Any) -> Any:
    """Run a block, and once more in each backward pass, so that nothing inside it is kept.

    Args:
        block: Of a transformer; it draws no random numbers.
        again: Makes the context to run it again in: overlays have gone when gradients are taken.
        args: The block's.
        kwargs: The block's.
    """
    return checkpoint(
        block,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), _Anew(again)),
        **kwargs,
    )
