"""What the lowest edited layer reads of many texts, for metrics that are learned of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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


def fresh(rank: int, width: int, generator: torch.Generator) -> Tensor:
    """A metric before it learns, `(rank, width)`: lengths are kept on average."""
    return torch.randn(rank, width, generator=generator) * width**-0.5
