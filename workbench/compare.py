"""Base and edited model side by side: texts and probabilities from the same forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from workbench.cancel import checkpoint
from workbench.checks import check_count, check_text
from workbench.divergence import kl
from workbench.encoding import (
    Batch,
    as_read,
    collate,
    encode,
    has_label,
    label_names,
    padded,
    per_sequence_mean,
    reads_at_most,
    tokenize,
)
from workbench.errors import EditError
from workbench.files import MALFORMED
from workbench.metrics import total_variation
from workbench.models import LanguageModel
from workbench.overlay import overlay
from workbench.probes import Probe
from workbench.results import Comparison, PromptComparison
from workbench.shortage import is_shortage
from workbench.updates import Update
from workbench.views import target_logits

_CHUNK = 16  # prompts in one pass


def generate_texts(
    lm: LanguageModel,
    prompts: Sequence[str],
    max_new_tokens: int,
    watch: Callable[[list[str]], object] | None = None,
    **options: Any,
) -> list[str]:
    """Continue prompts in one left-padded batch, greedily unless options say otherwise.

    Args:
        lm: The model, under whatever overlay is live.
        prompts: Texts, none empty.
        max_new_tokens: Length of the continuations.
        watch: Called with the continuations so far, token by token.
        options: For transformers' `generate`.

    Raises:
        EditError: A prompt is empty or no text, the prompts with their continuations are longer
            than the model reads, it does not generate text, or transformers fails with the options.
        Cancelled: See `cancellable`.
    """
    if lm.kind == "classifier":
        raise EditError("A classifier has no continuation: compare its labels' probabilities.")
    check_count(max_new_tokens, "max_new_tokens")
    for prompt in prompts:
        check_text(prompt, "prompt")
        if not prompt.strip():
            raise EditError("A prompt is empty. Give a text to continue.")
    if not prompts:
        return []
    tokenizer = lm.tokenizer
    read = encode(lm, [as_read(lm, prompt) for prompt in prompts])["input_ids"]
    # A decoder writes on from its last token; an encoder may count positions from its first.
    ids, mask = padded(read, cast(int, tokenizer.pad_token_id), left=lm.kind == "causal")
    _check_length(lm, ids.shape[1], max_new_tokens)
    start = 0 if lm.kind == "seq2seq" else ids.shape[1]

    def texts(tokens: Tensor) -> list[str]:
        return tokenizer.batch_decode(tokens[:, start:], skip_special_tokens=True)

    def each_token(input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """A stopping criterion that stops nothing: a place to cancel, and to look at the tokens."""
        checkpoint()
        if watch:
            watch(texts(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    settings["pad_token_id"] = tokenizer.pad_token_id
    with torch.no_grad(), _taking(options):
        stops = [*options.pop("stopping_criteria", ()), each_token]
        if config := deepcopy(options.pop("generation_config", None)):
            config.update(**settings)  # transformers takes a configuration or settings, not both
            settings = {"generation_config": config}
        else:
            settings |= {"do_sample": False, "num_beams": 1}
        output = cast(Any, lm.model).generate(
            input_ids=ids.to(lm.device),
            attention_mask=mask.to(lm.device),
            stopping_criteria=stops,
            **(settings | options),
        )
        return texts(getattr(output, "sequences", output))


@contextmanager
def _taking(options: Mapping[str, Any]) -> Iterator[None]:
    """Say of options that transformers fails with which they are."""
    given = dict(options)
    try:
        yield
    except MALFORMED as error:
        if not given or is_shortage(error):
            raise
        raise EditError(
            f"transformers cannot generate with {given!r:.200}: {error!s:.200}. Give options as "
            f"its GenerationConfig describes them."
        ) from error


def _check_length(lm: LanguageModel, tokens: int, more: int) -> None:
    """Refuse texts beyond the last position: the model's lookup fails, and a card with it."""
    limit = reads_at_most(lm)
    longest = max(tokens, more) if lm.kind == "seq2seq" else tokens + more
    if limit and longest > limit:
        raise EditError(
            f"The longest prompt has {tokens} tokens and is to be continued by {more}; this model "
            f"reads at most {limit} in all. Shorten the prompt, or give a smaller max_new_tokens."
        )


def compare_prompts(
    lm: LanguageModel,
    update: Update,
    probes: Sequence[Probe],
    max_new_tokens: int,
    watch: Callable[[Comparison], object] | None = None,
) -> Comparison:
    """Every probe before and after an update; base and edited run as rows of one batch.

    Args:
        lm: The frozen model.
        update: The change; empty: both sides are the base model.
        probes: What to look at.
        max_new_tokens: Length of the continuations.
        watch: Called with the rows so far, as their texts grow token by token.

    Raises:
        EditError: A prompt or an answer cannot be read, or `max_new_tokens` is not 1 or more.
        Cancelled: See `cancellable`.
    """
    check_count(max_new_tokens, "max_new_tokens")
    for probe in probes:
        check_text(probe.prompt, "prompt")
        if probe.target is not None:
            check_text(probe.target, "target")
    rows: list[PromptComparison] = []
    for start in range(0, len(probes), _CHUNK):
        checkpoint()
        chunk = probes[start : start + _CHUNK]
        grown = partial(_show, watch, tuple(rows), chunk) if watch else None
        rows += _compare_chunk(lm, update, chunk, max_new_tokens, grown)
    return Comparison(tuple(rows))


def _show(
    watch: Callable[[Comparison], object],
    finished: tuple[PromptComparison, ...],
    probes: Sequence[Probe],
    texts: list[str],
) -> None:
    """Hand on the rows so far: those that are finished, then those under way."""
    pairs = zip(probes, texts, texts[len(probes) :], strict=False)
    late = [PromptComparison(probe.prompt, probe.kind, base, new) for probe, base, new in pairs]
    watch(Comparison((*finished, *late), unfinished=len(late)))


def _compare_chunk(
    lm: LanguageModel,
    update: Update,
    probes: Sequence[Probe],
    max_new_tokens: int,
    watch: Callable[[list[str]], object] | None,
) -> list[PromptComparison]:
    texts = write_both(lm, update, [probe.prompt for probe in probes], max_new_tokens, watch)
    return score_both(lm, update, probes, texts)


def write_both(
    lm: LanguageModel,
    update: Update,
    prompts: Sequence[str],
    max_new_tokens: int,
    watch: Callable[[list[str]], object] | None = None,
) -> list[str]:
    """Continue prompts with the base model, then with the edited one, as rows of one batch.

    Returns:
        The base model's continuations, then the edited model's; a classifier writes none.
    """
    if lm.kind == "classifier":
        return [""] * 2 * len(prompts)
    with overlay(lm.model, update, _edited(lm, len(prompts))):
        return generate_texts(lm, [*prompts, *prompts], max_new_tokens, watch)


def score_both(
    lm: LanguageModel, update: Update, probes: Sequence[Probe], texts: Sequence[str]
) -> list[PromptComparison]:
    """What both models make of each probe's answer, as rows of one batch.

    Args:
        lm: The frozen model.
        update: The change.
        probes: What to look at.
        texts: What `write_both` gave for their prompts.
    """
    n = len(probes)
    known = [probe.target is not None and _sayable(lm, probe.target) for probe in probes]
    # Without an answer to follow, the base model's own text stands in: it shows what moved.
    spare = label_names(lm)[0] if lm.kind == "classifier" else "."
    answers = [
        (probe.target or "") if follow else text if text.strip() else spare
        for probe, follow, text in zip(probes, known, texts, strict=False)
    ]
    tokens = [tokenize(lm, p.prompt, a) for p, a in zip(probes, answers, strict=True)]
    batch = collate(lm, tokens * 2)
    with overlay(lm.model, update, _edited(lm, n)), torch.no_grad():
        logits = target_logits(lm, batch).float()
    chosen = logits.log_softmax(-1).gather(1, batch.targets[:, None]).squeeze(1)
    exact = logits.argmax(-1) == batch.targets
    log_p = chosen.new_zeros(2 * n).index_add(0, batch.rows, chosen)
    misses = chosen.new_zeros(2 * n).index_add(0, batch.rows, (~exact).float())
    if lm.kind == "classifier":
        texts = [label_names(lm)[label] for label in logits.argmax(-1).tolist()]
    first = _first_positions(batch, lm.tokenizer.all_special_ids)
    moved = kl(logits[first[:n]], logits[first[n:]]).clamp(min=0)
    base, edited = logits.chunk(2)  # both hold the same answers
    changes = per_sequence_mean(total_variation(base, edited).repeat(2), batch)
    found = []
    for i, probe in enumerate(probes):
        found.append(
            PromptComparison(
                prompt=probe.prompt,
                kind=probe.kind,
                base_text=texts[i],
                edited_text=texts[n + i],
                target=probe.target if known[i] else None,
                base_probability=log_p[i].exp().item() if known[i] else None,
                edited_probability=log_p[n + i].exp().item() if known[i] else None,
                base_exact=bool(misses[i] == 0) if known[i] else None,
                edited_exact=bool(misses[n + i] == 0) if known[i] else None,
                divergence=moved[i].item(),
                change=changes[i].item(),
            )
        )
    return found


def _edited(lm: LanguageModel, n: int) -> Tensor:
    """The edited half of a batch of `n` prompts, each read twice."""
    return torch.arange(2 * n, device=lm.device) >= n


def _sayable(lm: LanguageModel, target: str) -> bool:
    return lm.kind != "classifier" or has_label(lm, target)


def _first_positions(batch: Batch, special: Sequence[int]) -> Tensor:
    """Index of each sequence's first target of its own: BART's answers begin with a mark."""
    rows, n = batch.rows, len(batch.rows)
    marks = torch.isin(batch.targets, torch.tensor(special, device=rows.device))
    places = torch.arange(n, device=rows.device).masked_fill(marks, n)
    own = torch.full_like(rows[:1], n).repeat(batch.size).scatter_reduce(0, rows, places, "amin")
    first = torch.searchsorted(rows, torch.arange(batch.size, device=rows.device))
    return torch.where(own < n, own, first)
