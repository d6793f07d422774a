"""Scopes learned: the metric by which an editor knows texts about an edit's subject."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm.auto import tqdm

from workbench.crossing import Crossing
from workbench.data import EditExample
from workbench.editors import Editor, Mend, MendConfig
from workbench.editors.scoping import scope_of
from workbench.encoding import Batch, Tokens, as_read, collate, encode, reads_at_most, span_of
from workbench.errors import EditorError
from workbench.models import LanguageModel
from workbench.scope import Reading
from workbench.views import LayerInputs

_DRAWN = 192  # subjects of a step, and ends of prompts beside them
_HARDEST = 24  # of each subject's non-matches those that its loss is of
_AT_ONCE = 64  # texts of a forward pass
_HELD_OUT = 200  # most subjects that are measured rather than learned


@dataclass(frozen=True)
class LearnedScope:
    """How learning a scope went.

    Args:
        examples: Of those given, how many have a subject in their prompt and in another text.
        loss: Of the last step.
        held_out: Subjects that were measured, not learned.
        matched: Share of the texts about those that are within the scope of an edit of theirs.
        matched_elsewhere: Share of the texts about others that are: of neighbours, unrelated
            prompts, the edit's own prompt with another subject, and other edits' prompts.
    """

    examples: int
    loss: float
    held_out: int
    matched: float
    matched_elsewhere: float


@dataclass
class _Subject:
    """A subject's texts: prompts of edits, other texts about it, and texts about others."""

    examples: int = 0
    edits: dict[Tokens, None] = field(default_factory=dict)
    about: dict[Tokens, None] = field(default_factory=dict)
    elsewhere: dict[Tokens, None] = field(default_factory=dict)


def with_scope(editor: Editor, rank: int, share: float) -> Mend:
    """The editor with a scope of these settings, whose metric is still to be learned.

    Args:
        editor: A MEND editor of a decoder; a scope that it has makes room.
        rank: Of the metric.
        share: How much of the match with an edit's own subject is enough.

    Raises:
        EditorError: It is of another kind, or of a model that has no scopes.
    """
    if not isinstance(editor, Mend):
        raise EditorError(
            f"Of the editors MEND's have a scope; got a {editor.name!r} editor. Give the folder of "
            f"a trained MEND editor."
        )
    if rank < 1:
        raise EditorError(f"A scope's rank must be at least 1; got {rank}.")
    return editor.changed(scope=0).changed(scope=rank, scope_share=share)


def learn_scope(
    editor: Mend, examples: Sequence[EditExample], *, steps: int = 1500, seed: int = 0
) -> LearnedScope:
    """Learn the metric of an editor's scope, in place; nothing else of the editor changes.

    Contrastive, over what the lowest edited layer reads of the frozen model: at a subject's last
    token in an edit's prompt, against the same in other texts about the subject (matches), in
    texts about other subjects, and at the ends of prompts (non-matches). A tenth of the subjects is
    held out and measured.

    Args:
        editor: Has a scope.
        examples: Those are used that name a subject which their prompt and another text hold.
        steps: Of 192 subjects each.
        seed: Of what is drawn.

    Raises:
        EditorError: The editor has no scope, or fewer than three subjects can be used.
    """
    if not editor.scoped:
        raise EditorError(
            "The editor has no scope whose metric could be learned. Give it one of rank 128: "
            "editor.changed(scope=128)."
        )
    if steps < 1:
        raise EditorError(f"steps must be at least 1; got {steps}.")
    chooser, layer = random.Random(seed), editor.layers[0]
    subjects = _subjects(editor.lm, examples, chooser)
    if len(subjects) < 3:
        raise EditorError(
            f"A scope is learned from examples whose prompt names their subject, as another of "
            f"their texts does; of {len(examples)} examples {len(subjects)} subjects are so, and "
            f"at least 3 are needed. Give more examples, or data with subjects: counterfact:PATH, "
            f"zsre:PATH or facts."
        )
    chooser.shuffle(subjects)
    count = min(_HELD_OUT, -(-len(subjects) // 10))
    inputs = LayerInputs(editor.lm, layer)
    metric, loss = _learn(inputs, subjects[count:], editor.config, steps, chooser)
    editor.get_buffer("scope_metric").copy_(metric)
    used = sum(subject.examples for subject in subjects)
    return LearnedScope(used, loss, count, *_measured(editor, inputs, subjects[:count]))


def _subjects(
    lm: LanguageModel, examples: Sequence[EditExample], chooser: random.Random
) -> list[_Subject]:
    """The subjects of examples that have two texts or more, with these."""
    crossing, found = Crossing(examples), defaultdict[str, _Subject](_Subject)
    for example in tqdm(examples, desc="texts", disable=None):
        subject = (example.subject or "").strip()
        edit = _tokens(lm, example.prompt, subject)
        if edit is None:
            continue
        here = found[subject]
        here.examples += 1
        here.edits[edit] = None
        crossed = [crossing.other_relation(example, chooser) for _ in range(2)]
        same = [statement.prompt for statement in example.same_subject[:2]]
        for prompt in (*example.paraphrases[:3], *same, *crossed):
            if text := _tokens(lm, prompt, subject):
                here.about[text] = None
        crossed = [crossing.other_subject(example, chooser) for _ in range(2)]
        others = (*example.neighbors[:4], *example.unrelated[:2])
        random_one = chooser.choice(examples).prompt
        for prompt in (*(statement.prompt for statement in others), *crossed, random_one):
            if prompt and subject not in prompt and (text := _tokens(lm, prompt)):
                here.elsewhere[text] = None
    return [each for each in found.values() if each.about.keys() - each.edits.keys()]


def _tokens(lm: LanguageModel, prompt: str | None, subject: str | None = None) -> Tokens | None:
    """A prompt's tokens, told where a subject stands; None where it is not in it or ends with its
    first token, at which models hold nearly the same whatever it is, or the text is too long."""
    if not prompt or (subject is not None and (not subject or subject not in prompt)):
        return None
    ids = tuple(encode(lm, as_read(lm, prompt))["input_ids"])
    span = span_of(lm, prompt, subject) if subject else None
    if len(ids) > (reads_at_most(lm) or len(ids)) or (span and span[1] == 0):
        return None
    return Tokens(ids, (), span)


def _read(
    inputs: LayerInputs, texts: Iterable[Tokens]
) -> Iterator[tuple[list[Tokens], Batch, Tensor]]:
    """What the layer reads of texts, in batches of like lengths."""
    order = sorted(texts, key=lambda text: len(text.ids))
    for start in tqdm(range(0, len(order), _AT_ONCE), desc="inputs", disable=None):
        some = order[start : start + _AT_ONCE]
        batch = collate(inputs.lm, some)
        yield some, batch, inputs(batch)


def _learn(
    inputs: LayerInputs,
    subjects: Sequence[_Subject],
    config: MendConfig,
    steps: int,
    chooser: random.Random,
) -> tuple[Tensor, float]:
    """The metric, `(rank, in)`, and the loss of the last step."""
    owners = {t.ids: n for n, each in enumerate(subjects) for t in (*each.edits, *each.about)}
    texts = (t for each in subjects for t in (*each.edits, *each.about, *each.elsewhere))
    places, names, ends = dict[Tokens, int](), list[Tensor](), list[Tensor]()
    for some, _, read in _read(inputs, dict.fromkeys(texts)):
        for text, row in zip(some, read, strict=True):
            places[text] = len(places)
            end = len(text.ids) - 1
            names.append(row[text.subject[1] if text.subject else end].float().clone())
            ends.append(row[end].float().clone())
    at_names, at_ends = torch.stack(names), torch.stack(ends)
    device, width = at_names.device, at_names.shape[1]
    whose = torch.tensor([owners.get(text.ids, -1) for text in places])
    edits = [[places[text] for text in each.edits] for each in subjects]
    about = [[places[t] for t in each.about if t not in each.edits] for each in subjects]

    generator = torch.Generator().manual_seed(chooser.getrandbits(32))
    start = torch.randn(config.scope, width, generator=generator) * width**-0.5
    metric = torch.nn.Parameter(start.to(device))
    log_scale = torch.nn.Parameter(torch.tensor(2.0, device=device))
    optimizer = torch.optim.AdamW([metric, log_scale], lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss = torch.zeros(())
    columns = torch.arange(2 * _DRAWN, device=device)
    for _ in tqdm(range(steps), desc="scope", disable=None):
        drawn = chooser.choices(range(len(subjects)), k=_DRAWN)
        others = torch.randint(len(places), (_DRAWN,), generator=generator)
        anchors = at_names[[chooser.choice(edits[number]) for number in drawn]] @ metric.mT
        named = at_names[[chooser.choice(about[number]) for number in drawn]]
        read = torch.cat([named, at_ends[others.to(device)]]) @ metric.mT
        shares = anchors @ read.mT / (anchors * anchors).sum(-1, keepdim=True)
        who = torch.tensor(drawn)
        same = (who.unsqueeze(1) == torch.cat([who, whose[others]])).to(device)
        matches = same & (columns < _DRAWN)
        logits = log_scale.exp() * (shares - config.scope_share)
        losses = binary_cross_entropy_with_logits(logits, matches.float(), reduction="none")
        hardest = losses.masked_fill(same, 0).topk(_HARDEST, 1).values
        loss = losses[matches].mean() + 2 * hardest.mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return metric.detach(), loss.item()


@torch.no_grad()
def _measured(
    editor: Mend, inputs: LayerInputs, subjects: Sequence[_Subject]
) -> tuple[float, float]:
    """Shares of subjects' own texts, and of texts about others, that the scope of an edit of theirs
    holds: of their first."""
    first = [next(iter(each.edits)) for each in subjects]
    batch = collate(editor.lm, first)
    metric = editor.get_buffer("scope_metric")
    scope = scope_of(
        *(editor.lm, inputs.layer, metric, editor.config.scope_share),
        *(first, inputs(batch).to(metric)),
    )
    reached = dict[Tokens, Tensor]()
    for some, batch, read in _read(inputs, {t for e in subjects for t in (*e.about, *e.elsewhere)}):
        reading = Reading(scope)
        reading.begin(batch.inputs["input_ids"], batch.inputs["attention_mask"], None)
        reading.look(read)
        assert reading.reached is not None
        reached.update(zip(some, reading.reached[:, -1], strict=True))
    about = [reached[t][n] for n, e in enumerate(subjects) for t in e.about if t not in e.edits]
    elsewhere = [reached[t][n] for n, e in enumerate(subjects) for t in e.elsewhere]
    return _share(about), _share(elsewhere)


def _share(found: Sequence[Tensor]) -> float:
    return round(sum(map(bool, found)) / max(1, len(found)), 4)
