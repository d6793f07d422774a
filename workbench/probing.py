"""Probe edits: make the probes, run base and edited model on them, say what reached where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from workbench.cancel import checkpoint
from workbench.checks import check_count
from workbench.compare import score_both, write_both
from workbench.editors import EditRequest
from workbench.encoding import label_names, reads_at_most, tokenize
from workbench.errors import EditError
from workbench.metrics import begins_with
from workbench.models import LanguageModel
from workbench.neighborhood import probes_around
from workbench.probes import Probe
from workbench.report import ProbeReport, ProbeResult, own_answer
from workbench.results import PromptComparison
from workbench.sentences import Encoder, sentence_encoder
from workbench.updates import Update

Watch = Callable[[int, int], object]
_CHUNK = 24  # prompts in one pass, each read by both models


def probe_requests(
    lm: LanguageModel,
    update: Update,
    requests: Sequence[EditRequest],
    max_new_tokens: int = 8,
    watch: Watch | None = None,
) -> ProbeReport:
    """Probe what an update does to each request and around it.

    Args:
        lm: The frozen model.
        update: The change.
        requests: What the update should make the model say.
        max_new_tokens: Length of the continuations.
        watch: Called with how many probes are done, and of how many.

    Raises:
        EditError: `max_new_tokens` is not 1 or more, or a prompt so continued is too long.
        Cancelled: See `cancellable`.
    """
    check_count(max_new_tokens, "max_new_tokens")
    encoder = sentence_encoder(lm)
    around = []
    for request in requests:
        checkpoint()
        probes = probes_around(request.prompt, request.target, encoder)
        around.append([p for p in probes if p.kind == "edit" or _fits(lm, p, max_new_tokens)])
    total, done = sum(map(len, around)), 0
    rows: list[ProbeResult] = []
    for request, probes in zip(requests, around, strict=True):
        compared: dict[Probe, PromptComparison] = {}
        order = sorted(probes, key=lambda probe: len(probe.prompt))  # little padding in each pass
        for start in range(0, len(order), _CHUNK):
            checkpoint()
            if watch:
                watch(done, total)
            chunk = order[start : start + _CHUNK]
            done += len(chunk)
            compared |= zip(chunk, _compared(lm, update, chunk, max_new_tokens), strict=True)
        rows += _results(request, probes, compared, encoder)
    if watch:
        watch(total, total)
    return ProbeReport(rows=tuple(rows), encoder=encoder.name)


def _fits(lm: LanguageModel, probe: Probe, max_new_tokens: int) -> bool:
    """Whether the model can read a probe and write on: its window may be short."""
    spare = label_names(lm)[0] if lm.kind == "classifier" else probe.target or "."
    limit = reads_at_most(lm)
    try:
        length = len(tokenize(lm, probe.prompt, spare).ids)
    except EditError:
        return False
    return not limit or length + max_new_tokens <= limit


def _compared(
    lm: LanguageModel, update: Update, probes: Sequence[Probe], max_new_tokens: int
) -> list[PromptComparison]:
    texts = write_both(lm, update, [probe.prompt for probe in probes], max_new_tokens)
    asked = [_answered(probe, text) for probe, text in zip(probes, texts, strict=False)]
    return score_both(lm, update, asked, texts)


def _answered(probe: Probe, base_text: str) -> Probe:
    """A probe with the answer to follow: of what should stay, the one that the base model gives."""
    if probe.kind not in ("neighbor", "unrelated"):
        return probe
    if probe.target and begins_with(base_text, probe.target):
        return probe
    return replace(probe, target=own_answer(base_text) or None)


def _results(
    request: EditRequest,
    probes: Sequence[Probe],
    compared: dict[Probe, PromptComparison],
    encoder: Encoder,
) -> list[ProbeResult]:
    title = f"{request.prompt} → {request.target}"
    closeness = encoder.closeness(request.prompt, [probe.prompt for probe in probes])
    return [
        ProbeResult(**vars(compared[probe]), edit=title, made=probe.made, closeness=near)
        for probe, near in zip(probes, closeness, strict=True)
    ]
