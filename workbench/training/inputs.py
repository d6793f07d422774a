"""What the lowest edited layer reads of many texts, and how metrics learn of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from tqdm.auto import tqdm

from workbench.encoding import Batch, Tokens, as_read, collate, encode, reads_at_most, span_of
from workbench.models import LanguageModel
from workbench.views import LayerInputs

_AT_ONCE = {"cpu": 64}  # texts of a forward pass, by device


def tokens_of(lm: LanguageModel, prompt: str | None, subject: str | None = None) -> Tokens | None:
    """A prompt's tokens, told where a subject stands; None where it is not in it or ends with its
    first token, at which models hold nearly the same whatever it is, or the text is too long."""
    if not prompt or (subject is not None and (not subject or subject not in prompt)):
        return None
    ids = tuple(encode(lm, as_read(lm, prompt))["input_ids"])
    span = span_of(lm, prompt, subject) if subject else None
    if len(ids) > (reads_at_most(lm) or len(ids)) or (span and span[1] == 0):
        return None
    return Tokens(ids, (), span)


def read_of(
    inputs: LayerInputs, texts: Iterable[Tokens]
) -> Iterator[tuple[list[Tokens], Batch, Tensor]]:
    """What the layer reads of texts, in batches of like lengths."""
    order = sorted(texts, key=lambda text: len(text.ids))
    count = _AT_ONCE.get(inputs.lm.device.type, 512)
    for start in tqdm(range(0, len(order), count), desc="inputs", disable=None):
        some = order[start : start + count]
        batch = collate(inputs.lm, some)
        yield some, batch, inputs(batch)


def descend(
    size: tuple[int, int],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    device: torch.device,
    generator: torch.Generator,
    what: str,
) -> tuple[Tensor, float]:
    """A metric learned from a fresh one, which keeps lengths on average.

    Args:
        size: `(rank, in)`.
        loss_of: A step's loss by the metric and the scale of its logits.
        steps: Of AdamW, whose rate falls to 0.
        device: Of what the loss is of.
        generator: Of the fresh metric.
        what: Named beside the progress bar.

    Returns:
        The metric, and the loss of the last step.
    """
    start = torch.randn(*size, generator=generator) * size[1] ** -0.5
    metric = torch.nn.Parameter(start.to(device))
    log_scale = torch.nn.Parameter(torch.tensor(2.0, device=device))
    optimizer = torch.optim.AdamW([metric, log_scale], lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss = torch.zeros(())
    for _ in tqdm(range(steps), desc=what, disable=None):
        loss = loss_of(metric, log_scale.exp())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return metric.detach(), loss.item()
