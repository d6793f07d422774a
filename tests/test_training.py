"""A step of meta-training: vectorised and cached it is the plain one; what it draws."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from families import FAMILIES, language_model
from hypothesis import given
from hypothesis import settings as property_settings
from hypothesis import strategies as st
from runs import TEXTS, editor_for, edits_for, examples, opened
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy, kl_div

from workbench.crossing import Crossing
from workbench.data import EditExample, Statement
from workbench.divergence import kl, losses_of
from workbench.editors.mend import Mend
from workbench.encoding import Tokens, tokenize
from workbench.errors import EditorError
from workbench.factors import capture
from workbench.models import LanguageModel
from workbench.overlay import overlay
from workbench.training import (
    EditTexts,
    MetaStep,
    StepLosses,
    TextSampler,
    TrainingConfig,
)
from workbench.updates import Update


def stirred(editor: Mend, edits: Sequence[EditTexts]) -> Mend:
    """The editor with statistics gathered and all its parameters moved, as if trained."""
    MetaStep(editor.train(), TrainingConfig()).losses(edits, backward=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in editor.parameters():
            spread = 0.3 * parameter.abs().mean() + 0.01
            parameter += spread * torch.randn(parameter.shape, generator=generator)
    return editor.eval()


# The step, against a plain one


def plain_logits(lm: LanguageModel, text: Tokens, weights: dict[str, Tensor]) -> Tensor:
    """Logits of a text's targets, all by the whole model, alone and without padding."""
    inputs = {"input_ids": torch.tensor([text.ids])}
    if lm.kind == "seq2seq":
        start = lm.model.config.decoder_start_token_id
        inputs["decoder_input_ids"] = torch.tensor([[start, *text.targets[:-1]]])
    logits = functional_call(lm.model, weights, kwargs=inputs).logits
    return logits if lm.kind == "classifier" else logits[0, -len(text.targets) :]


def plain_step(editor: Mend, edits: Sequence[EditTexts], config: TrainingConfig) -> StepLosses:
    """Equations 1 and 2 word for word: one text at a time, dense weights, one undivided graph."""
    lm = editor.lm
    nll, before, locality, right = [], [], [], []
    own, wanted = ("sum" if s else "mean" for s in (editor.config.sum_tokens, config.whole_targets))
    for edit in edits:
        targets = torch.tensor(edit.edit.targets)
        with capture(editor.layers) as tap:
            logits = plain_logits(lm, edit.edit, {})
            factors = tap.factors(cross_entropy(logits, targets, reduction=own))
        before.append(cross_entropy(logits.detach(), targets, reduction=wanted))
        weights = {}
        pseudo = editor.transform(factors)
        for layer, alpha in zip(editor.layers, editor.edit_lrs, strict=True):
            part = pseudo[layer.name]
            change = -alpha * torch.einsum("bto,bti->oi", part.delta, part.activation)
            weight = lm.model.get_parameter(f"{layer.name}.weight")
            weights[f"{layer.name}.weight"] = weight + (change.T if layer.transposed else change)
        for text in edit.equivalents:
            logits, targets = plain_logits(lm, text, weights), torch.tensor(text.targets)
            nll.append(cross_entropy(logits, targets, reduction=wanted))
            right.append((logits.argmax(-1) == targets).all().float())
        for text in edit.locality:
            edited, base = (plain_logits(lm, text, w).log_softmax(-1) for w in (weights, {}))
            divergence = kl_div(edited, base, reduction="none", log_target=True).sum(-1)
            locality.append(divergence.mean())
    edit_loss, kept = torch.stack(nll).mean(), torch.stack(locality).mean()
    total = config.c_edit * edit_loss + config.c_locality * kept
    total.backward()
    return StepLosses(
        edit_loss.item(),
        torch.stack(before).mean().item(),
        kept.item(),
        total.item(),
        torch.stack(right).mean().item(),
    )


def gradients(editor: Mend) -> dict[str, Tensor]:
    """The editor's gradients, which are cleared."""
    found = {name: p.grad for name, p in editor.named_parameters() if p.grad is not None}
    editor.zero_grad(set_to_none=True)
    return found


def compare_with_the_plain_step(editor: Mend, **settings: Any) -> None:
    edits, config = edits_for(editor.lm), TrainingConfig(c_edit=0.3, c_locality=2.0, **settings)
    stirred(editor, edits)
    wanted, slopes = plain_step(editor, edits, config), gradients(editor)
    assert slopes.keys() == dict(editor.named_parameters()).keys()
    cached, uncached = MetaStep(editor, config), MetaStep(editor, config, cached=False)
    for step in (cached, cached, uncached):  # with the cache empty, full, and off
        assert asdict(step.losses(edits)) == pytest.approx(asdict(wanted), rel=1e-5, abs=1e-6)
        for name, slope in gradients(editor).items():
            atol = 1e-5 * slopes[name].abs().max().item()
            torch.testing.assert_close(slope, slopes[name], rtol=0, atol=atol)


@pytest.mark.parametrize("at_once", [1, 2])
def test_the_hardest_are_those_that_the_edit_moves_most(at_once: int):
    lm = opened("llama")
    editor = stirred(editor_for("llama"), edits_for(lm))
    near = tuple(tokenize(lm, f"The capital of {place} is", "Lyon") for place in ("Peru", "Chad"))
    edits = [replace(e, locality=(*near, *e.locality), near=2) for e in edits_for(lm)[:2]]

    def locality(*kept: tuple[int, ...], hardest: int = 0, near: int = 2) -> float:
        some = [
            replace(e, locality=tuple(e.locality[k] for k in k_of), near=near)
            for e, k_of in zip(edits, kept, strict=True)
        ]
        config = TrainingConfig(hardest=hardest)
        return MetaStep(editor, config).losses(some, backward=False, at_once=at_once).locality

    whole = tuple(range(4)), tuple(range(4))
    ways = [locality((a, 2, 3), (b, 2, 3), near=1) for a in (0, 1) for b in (0, 1)]
    assert min(ways) < max(ways) == pytest.approx(locality(*whole, hardest=1), rel=1e-5)
    assert locality(*whole, hardest=2) == pytest.approx(locality(*whole), rel=1e-5)
    assert locality(*whole, hardest=9) == pytest.approx(locality(*whole), rel=1e-5)
    assert locality((2, 3), (2, 3), hardest=1, near=0) == locality((2, 3), (2, 3), near=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_step_equals_the_plain_one(family: str):
    compare_with_the_plain_step(editor_for(family))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_step_over_whole_targets_equals_the_plain_one(family: str, own: bool):
    compare_with_the_plain_step(editor_for(family, sum_tokens=own), whole_targets=True)


def undivided_step(
    editor: Mend, edits: Sequence[EditTexts], config: TrainingConfig, at_once: int
) -> Tensor:
    """The total loss in one undivided graph: each text alone, whole model, under its edits."""
    lm, updates, losses = editor.lm, [], []
    for edit in edits:
        with capture(editor.layers) as tap:
            loss = cross_entropy(plain_logits(lm, edit.edit, {}), torch.tensor(edit.edit.targets))
            factors = tap.factors(loss)
        updates.append(editor.update(editor.transform(factors), factors))
    for index, edit in enumerate(edits):
        first = index - index % at_once
        with overlay(lm.model, Update.sum(updates[first : first + at_once])):
            nll = [
                cross_entropy(plain_logits(lm, text, {}), torch.tensor(text.targets))
                for text in edit.equivalents
            ]
            edited = [plain_logits(lm, text, {}).log_softmax(-1) for text in edit.locality]
        base = [plain_logits(lm, text, {}).log_softmax(-1) for text in edit.locality]
        kept = [(p.exp() * (p - q)).sum(-1).mean() for p, q in zip(base, edited, strict=True)]
        losses.append((nll, kept))
    nll, kept = ([loss for part in parts for loss in part] for parts in zip(*losses, strict=True))
    return config.c_edit * torch.stack(nll).mean() + config.c_locality * torch.stack(kept).mean()


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_step_with_a_gate_equals_the_undivided_one(family: str, at_once: int):
    editor = editor_for(family, gate=0.3, edit_lr=0.1)
    edits, config = edits_for(editor.lm), TrainingConfig(c_edit=0.3, c_locality=2.0)
    stirred(editor, edits)
    total = undivided_step(editor, edits, config, at_once)
    total.backward()
    slopes = gradients(editor)
    assert slopes["gate_logits"].abs().min() > 0
    losses = MetaStep(editor, config).losses(edits, at_once=at_once)
    assert losses.total == pytest.approx(total.item(), rel=1e-5)
    for name, slope in gradients(editor).items():
        atol = 1e-4 * slopes[name].abs().max().item()
        torch.testing.assert_close(slope, slopes[name], rtol=0, atol=atol)


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("gate", [0.0, 0.3])
def test_a_step_in_chunks_is_the_whole_one(gate: float, at_once: int):
    editor = editor_for("llama", gate=gate)
    edits = edits_for(editor.lm)
    stirred(editor, edits)
    found = []
    for chunk in (3, 2, 1):
        losses = MetaStep(editor, TrainingConfig(chunk=chunk)).losses(edits, at_once=at_once)
        found.append((asdict(losses), gradients(editor)))
    for losses, slopes in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-6)
        for name, slope in found[0][1].items():
            atol = 1e-6 * slope.abs().max().item()
            torch.testing.assert_close(slopes[name], slope, rtol=0, atol=atol)


def test_step_on_attention_equals_the_plain_one_in_float64():
    lm = language_model("llama")
    lm.model.double()
    compare_with_the_plain_step(editor_for("llama", lm, matrices="all"))


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_each_edit_acts_on_its_own_texts_alone(family: str):
    editor, config = editor_for(family), TrainingConfig()
    edits = edits_for(editor.lm)
    step = MetaStep(stirred(editor, edits), config)
    together = step.losses(edits, backward=False)
    apart = [step.losses([edit], backward=False) for edit in edits]
    counts = [len(edit.equivalents) for edit in edits]
    edit = sum(n * losses.edit for n, losses in zip(counts, apart, strict=True)) / sum(counts)
    assert together.edit == pytest.approx(edit, rel=1e-5)


def test_an_edit_without_locality_texts_has_no_locality_loss():
    editor = editor_for("gpt2")
    edits = [replace(edit, locality=()) for edit in edits_for(editor.lm)]
    losses = MetaStep(stirred(editor, edits), TrainingConfig(c_edit=0.5)).losses(edits)
    assert (losses.locality, losses.total) == (0.0, 0.5 * losses.edit)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_logits_are_computed_where_they_are_needed_only(family: str):
    editor = editor_for(family)
    edits = edits_for(editor.lm)
    rows: list[int] = []

    def count(module: torch.nn.Module, inputs: object, logits: Tensor) -> None:
        rows.append(logits[..., 0].numel())

    head = editor.lm.model.get_output_embeddings()
    assert head is not None
    handle = head.register_forward_hook(count)
    MetaStep(editor.train(), TrainingConfig()).losses(edits)
    handle.remove()
    # Once for the edits' own losses and the equivalents, before and after for what must not change.
    texts = [text for edit in edits for text in (edit.edit, *edit.equivalents, *edit.locality)]
    watched = [text for edit in edits for text in edit.locality]
    assert sum(rows) == sum(len(text.targets) for text in (*texts, *watched))


@property_settings(deadline=None)
@given(st.lists(st.lists(st.floats(-50, 50), min_size=3, max_size=3), min_size=2, max_size=2))
def test_kl_is_that_of_the_definition(logits: list[list[float]]):
    base, edited = torch.tensor(logits, dtype=torch.float64)
    p, q = (x.softmax(0).clamp(min=1e-300) for x in (base, edited))
    found = kl(base[None], edited[None])
    torch.testing.assert_close(
        found, (p * (p.log() - q.log())).sum()[None], rtol=1e-4, atol=1e-4, check_dtype=False
    )
    assert kl(base[None], base[None]).item() == 0


@pytest.mark.parametrize(
    ("told", "rows"), [(0, 3), (3, 3), (0, 70), (40, 99), (99, 99), (0, 0), (300, 700)]
)
def test_losses_and_their_gradient_are_those_of_the_definition(told: int, rows: int):
    draw = torch.Generator().manual_seed(0)
    base, edited = torch.randn(2, rows, 5, generator=draw) * 3
    weight = torch.randn(7, 5, generator=draw)
    targets = torch.randint(7, (told,), generator=draw)
    weights = torch.randn(rows, generator=draw)
    ours, theirs = edited.clone().requires_grad_(), edited.clone().requires_grad_()

    def head(finals: Tensor) -> Tensor:
        return torch.tanh(finals @ weight.T)

    found, right = losses_of(ours, targets, base[told:], head)
    logs = head(theirs).log_softmax(-1)
    before = head(base[told:]).log_softmax(-1)
    assert right.tolist() == (logs[:told].argmax(-1) == targets).tolist()
    moved = kl_div(logs[told:], before, reduction="none", log_target=True).sum(-1)
    plain = torch.cat((cross_entropy(logs[:told], targets, reduction="none"), moved))
    torch.testing.assert_close(found, plain)
    (found * weights).sum().backward(retain_graph=True)
    (plain * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    with pytest.raises(RuntimeError, match="inplace"):  # the gradient is there once
        (found * weights).sum().backward()


@pytest.mark.parametrize("ascent", [False, True])
def test_a_fresh_edit_goes_downhill_unless_it_ascends(ascent: bool):
    editor = editor_for("gpt2", ascent=ascent)
    edits = [replace(edit, equivalents=(edit.edit,)) for edit in edits_for(editor.lm)]
    losses = MetaStep(editor.train(), TrainingConfig()).losses(edits)
    assert (losses.edit > losses.edit_before) == ascent


@pytest.mark.parametrize("ascent", [False, True])
def test_the_first_step_of_training_lowers_the_loss(ascent: bool):
    editor = editor_for("llama", ascent=ascent)
    edits = edits_for(editor.lm)
    step = MetaStep(editor.train(), TrainingConfig(c_edit=1.0, c_locality=0.0))
    before = step.losses(edits)
    torch.optim.Adam(editor.parameters(), lr=1e-3).step()
    after = MetaStep(editor.eval(), step.config).losses(edits, backward=False)
    assert after.edit < before.edit
    assert after.edit_before == before.edit_before


def test_statistics_are_gathered_in_training_mode_alone():
    editor = editor_for("gpt2").train()
    edits, key = edits_for(editor.lm), "networks.32x128.delta_stats.count"
    step = MetaStep(editor, TrainingConfig())
    step.losses(edits)
    seen = int(editor.state_dict()[key])
    assert seen > 0
    editor.eval()
    step.losses(edits)
    assert int(editor.state_dict()[key]) == seen


# Which texts a step draws


@property_settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 12), batch=st.integers(1, 7), seed=st.integers(0, 3))
def test_every_example_comes_once_an_epoch(count: int, batch: int, seed: int):
    config = TrainingConfig(batch=batch, seed=seed)
    sampler = TextSampler(opened("gpt2"), examples(count), TEXTS, config)
    drawn = [edit.edit for step in range(count) for edit in sampler.batch(step)]
    epochs = [drawn[first : first + count] for first in range(0, len(drawn), count)]
    assert len(epochs) == batch
    assert all(len(set(epoch)) == count for epoch in epochs)


def test_a_batch_depends_on_step_and_seed_alone():
    def sampler(seed: int) -> TextSampler:
        return TextSampler(opened("gpt2"), examples(40), TEXTS, TrainingConfig(batch=3, seed=seed))

    forward = [sampler(0).batch(step) for step in range(4)]
    once = sampler(0)
    state = torch.get_rng_state()
    assert [once.batch(step) for step in (3, 2, 1, 0)] == forward[::-1]
    assert torch.equal(torch.get_rng_state(), state)
    assert sampler(1).batch(0) != forward[0]


@pytest.mark.parametrize(
    ("equivalents", "wanted"), [(1, (1, 0)), (2, (1, 1)), (3, (2, 1)), (9, (3, 1))]
)
def test_equivalents_are_paraphrases_then_the_prompt(equivalents: int, wanted: tuple[int, int]):
    lm, (example,) = opened("gpt2"), examples(1)
    config = TrainingConfig(batch=1, equivalents=equivalents)
    (texts,) = TextSampler(lm, [example], TEXTS, config).batch(0)
    paraphrases = {tokenize(lm, prompt, example.target) for prompt in example.paraphrases}
    assert texts.edit == tokenize(lm, example.prompt, example.target)
    found = sum(text in paraphrases for text in texts.equivalents)
    assert (found, texts.equivalents.count(texts.edit)) == wanted
    assert len(set(texts.equivalents)) == sum(wanted)


def test_an_example_without_paraphrases_is_its_own_equivalent():
    lm, example = opened("gpt2"), EditExample(prompt="Item 1 is", target="a")
    config = TrainingConfig(batch=1, equivalents=2)
    (texts,) = TextSampler(lm, [example], (), config).batch(0)
    assert (texts.equivalents, texts.locality) == ((texts.edit,), ())


def test_locality_texts_are_neighbors_and_unrelated_ones():
    lm, (example,) = opened("gpt2"), examples(1)
    config = TrainingConfig(batch=1, neighbors=1, texts=1, text_tokens=8)
    sampler = TextSampler(lm, [example], TEXTS, config)
    near, ice = tokenize(lm, "Item 500 is", "z"), tokenize(lm, "Ice is", "cold")
    drawn = [texts.locality for step in range(60) for texts in sampler.batch(step)]
    assert {locality[0] for locality in drawn} == {near}
    far = Counter(locality[1] for locality in drawn)
    assert 15 < far.pop(ice) < 45  # half of them
    for text in far:
        assert len(text.ids) == len(text.targets) == 8
        start = lm.tokenizer.decode([*text.ids, text.targets[-1]])
        assert any(whole.startswith(str(start)) for whole in TEXTS)


def facts_about(subjects: str, relations: str) -> list[EditExample]:
    """Every subject in every relation, of one source."""
    return [
        EditExample(
            prompt=f"The {relation} of {subject} is",
            target="x",
            subject=subject,
            relation=relation,
            source="here",
        )
        for subject in subjects
        for relation in relations
    ]


def test_crossed_prompts_share_wording_or_subject_and_never_both():
    known = facts_about("ABC", "pqr")
    example, other_source = known[0], replace(facts_about("Z", "z")[0], source="there")
    crossing = Crossing([*known, other_source])
    drawn = [crossing.draw(example, 2, random.Random(seed)) for seed in range(200)]
    found = {prompt for prompts in drawn for prompt in prompts}
    assert found == {
        *(f"The p of {subject} is" for subject in "BC"),
        *(f"The {relation} of A is" for relation in "qr"),
    }
    for prompts in drawn:  # by turns: never two of one kind
        assert len({"of A" in prompt for prompt in prompts}) == len(prompts)


def crossed(known: Sequence[EditExample]) -> set[str]:
    """All that the first of some examples is crossed to."""
    crossing = Crossing(known)
    drawn = [crossing.draw(known[0], 1, random.Random(seed)) for seed in range(99)]
    return {prompt for prompts in drawn for prompt in prompts}


def test_relations_without_a_name_are_told_by_their_wording():
    known = [replace(example, relation=None) for example in facts_about("AB", "pq")]
    assert crossed(known) == {"The p of B is", "The q of A is"}


def test_wordings_that_paraphrase_one_another_are_of_one_relation():
    known = [replace(example, relation=None) for example in facts_about("AB", "pqr")]
    assert crossed(known) == {"The p of B is", "The q of A is", "The r of A is"}
    # "p" and "r" mean the same, as an example about somebody else says.
    alike = replace(known[3], paraphrases=("The r of B is",))
    assert crossed([*known[:3], alike, *known[4:]]) == {"The p of B is", "The q of A is"}


def test_what_else_is_known_of_subjects_is_a_wording_too():
    one, other = (replace(e, relation=None) for e in facts_about("AB", "p"))
    known = [one, replace(other, same_subject=(Statement(prompt="The age of B is"),))]
    assert crossed(known) == {"The p of B is", "The age of A is"}


@pytest.mark.parametrize("subject", [None, "Rome"])
def test_prompts_that_do_not_hold_their_subject_are_not_crossed(subject: str | None):
    example = replace(facts_about("A", "p")[0], subject=subject)
    assert Crossing([example, *facts_about("AB", "pq")]).draw(example, 2, random.Random(0)) == []


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_crossed_prompts_are_locality_texts_up_to_the_first_target_token(family: str):
    lm = opened(family)
    known = [replace(example, target="a much longer one") for example in facts_about("AB", "pq")]
    config = TrainingConfig(batch=4, crossed=1, texts=0)
    first = set()
    for example in known:
        whole = tokenize(lm, example.prompt, example.target)
        assert len(whole.targets) > 1
        read = tuple(lm.tokenizer(example.prompt)["input_ids"])
        first.add(Tokens(read, whole.targets[:1]))
    for texts in TextSampler(lm, known, (), config).batch(0):
        assert set(texts.locality) < first


def test_no_examples_are_refused():
    with pytest.raises(EditorError, match="no training examples"):
        TextSampler(opened("gpt2"), [], TEXTS, TrainingConfig())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *((name, 0) for name in ("steps", "batch", "accumulate", "equivalents")),
        *((name, 0) for name in ("save_every", "validate_every")),
        *(("decay", 1.5), ("text_tokens", 0)),
    ],
)
def test_settings_that_make_no_sense_are_refused(setting: str, value: float):
    with pytest.raises(EditorError, match=f"{setting} .*got {value}"):
        TrainingConfig(**{setting: value})  # type: ignore[arg-type]


@given(steps=st.integers(1, 60), warmup=st.integers(0, 60), decay=st.floats(0, 1))
def test_learning_rates_rise_stay_and_fall(steps: int, warmup: int, decay: float):
    config = TrainingConfig(steps=steps, warmup=warmup, decay=decay)
    factors = [config.lr_factor(step) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    peak = factors.index(max(factors))
    assert all(a <= b for a, b in pairwise(factors[: peak + 1]))
    assert all(a >= b for a, b in pairwise(factors[peak:]))
    last = steps - decay * steps
    level = [f for step, f in enumerate(factors) if warmup <= step + 1 and step <= last]
    assert level == pytest.approx([1] * len(level))
    if warmup:
        assert factors[0] <= 1 / warmup
    if decay * steps > 1:
        assert factors[-1] == pytest.approx(min(1 / (decay * steps), 1, steps / max(1, warmup)))


def test_a_step_draws_how_many_edits_are_live_together():
    config = TrainingConfig(batch=8, at_once=4)
    drawn = [config.together(step) for step in range(60)]
    assert set(drawn) == {1, 2, 4}
    assert drawn == [config.together(step) for step in range(60)]
    assert drawn != [replace(config, seed=1).together(step) for step in range(60)]


@pytest.mark.parametrize("at_once", [3, 16])
def test_edits_live_together_must_divide_the_batch(at_once: int):
    with pytest.raises(EditorError, match=f"power of 2 that divides the batch of 8; got {at_once}"):
        TrainingConfig(batch=8, at_once=at_once)
