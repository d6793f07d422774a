"""Losses of next-token distributions and their gradient, a few rows' logits at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

# Rows whose logits are held at a time, and looked at: what the CPU's caches hold.
_HELD, _LOOKED_AT = {"cpu": 256}, {"cpu": 32}
_ELSEWHERE = 1024


def rows_held(device: torch.device) -> int:
    """Most rows whose logits are held at a time."""
    return _HELD.get(device.type, _ELSEWHERE)


def losses_of(
    finals: Tensor, targets: Tensor, base: Tensor, head: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Losses in nats, `(n,)`: -log p of the first rows' targets, then KL(base || edited) of those
    left. Their gradient, softmax(edited) less what should be, goes through the head in the same
    pass, so that the logits of all rows are never held.

    Args:
        finals: What the head reads, `(n, width)`; the losses are differentiable in it, once.
        targets: Ids, `(m,)`.
        base: What it reads in the original, `(n - m, width)`.
        head: Gives logits, `(rows, vocabulary)`, each row from its own; its weights are frozen.

    Returns:
        The losses, and whether each target is the most likely token, `(m,)` bool.
    """
    return _Losses.apply(finals, targets, base, head)  # type: ignore[no-any-return]


def kl(base: Tensor, edited: Tensor) -> Tensor:
    """KL(base || edited) of next-token distributions, nats, `(n, vocabulary)` -> `(n,)`."""
    none = torch.empty(0, dtype=torch.long, device=edited.device)
    return losses_of(edited, none, base, lambda logits: logits)[0]


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, finals: Tensor, targets: Tensor, base: Tensor, head: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        told, count = len(targets), len(finals)
        losses = torch.empty(count, device=targets.device)
        right = torch.empty(told, dtype=torch.bool, device=targets.device)
        learns = ctx.needs_input_grad[0]
        slopes = torch.empty_like(finals) if learns else None
        for rows in (*_parts(finals, 0, told, _HELD), *_parts(finals, told, count, _HELD)):
            some = finals[rows].detach().requires_grad_(learns)
            with torch.set_grad_enabled(learns):
                logits = head(some)
            now, own, before = logits.detach(), targets[rows], None
            if rows.start >= told:
                before = head(base[rows.start - told : rows.stop - told])
            slope = torch.empty_like(now)
            for part in _parts(now, 0, len(now), _LOOKED_AT):
                after = log_softmax(now[part].float(), -1)
                if before is None:
                    at = own[part].unsqueeze(1)
                    loss = after.gather(1, at).squeeze(1).neg_()
                    share = after.exp_().scatter_add_(1, at, after.new_full(at.shape, -1))
                else:
                    was = log_softmax(before[part].float(), -1)
                    share = was.exp()
                    loss = torch.linalg.vecdot(share, was.sub_(after))
                    share = after.exp_().sub_(share)
                losses[rows][part], slope[part] = loss, share
            if before is None:
                right[rows] = now.argmax(-1) == own
            if slopes is not None:
                (slopes[rows],) = torch.autograd.grad(logits, some, slope)
        if slopes is not None:
            ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(right)
        return losses, right

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        by_row = grads[0].unsqueeze(-1).to(slopes.device, slopes.dtype)
        return slopes.mul_(by_row), None, None, None  # once: autograd sees to that


def _parts(tensor: Tensor, start: int, end: int, sizes: Mapping[str, int]) -> Iterator[slice]:
    size = sizes.get(tensor.device.type, _ELSEWHERE)
    return (slice(first, min(first + size, end)) for first in range(start, end, size))
