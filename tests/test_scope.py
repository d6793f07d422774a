"""An edit with a scope acts from the token on that names its subject, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from families import PAD, batch_for, language_model
from hypothesis import example, given
from hypothesis import strategies as st
from references import assert_exact, editable, in_double, logits_of, random_update
from runs import TEXTS, editor_for, edits_for, examples
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from workbench import EditError, EditorError, LanguageModel, Workbench
from workbench.adapters import export_peft
from workbench.aggregate import inputs_under, ridge
from workbench.data import EditExample
from workbench.editors import EditRequest, Mend, MendConfig
from workbench.editors.networks import EditorNetwork
from workbench.editors.proposals import capture_texts
from workbench.editors.scoping import Measure, about, scope_of, sentences, subject_in
from workbench.encoding import Tokens, collate, tokenize
from workbench.factors import capture
from workbench.layers import EditableLayer
from workbench.overlay import overlay
from workbench.scope import Scope
from workbench.stacking import each_within, of_sequences, stack_sequences
from workbench.training import MetaStep, TextSampler, Trainer, TrainingConfig
from workbench.updates import LayerUpdate, Update
from workbench.views import LayerInputs, target_logits

DECODERS = ["llama", "gpt2"]
NAMED = 3  # the token that the scopes below know
NOWHERE = 10**6  # an id that no text holds


@pytest.fixture(scope="module", params=DECODERS)
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return in_double(language_model(request.param))


def lowest(lm: LanguageModel) -> str:
    return editable(lm)[0].name


def inputs_of(lm: LanguageModel, ids: Tensor) -> Tensor:
    """What the lowest edited layer reads of a text, `(tokens, in)`."""
    seen: list[Tensor] = []
    module = lm.model.get_submodule(lowest(lm))
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    logits_of(lm.model, {"input_ids": ids[None]})
    handle.remove()
    return seen[0]


def scope_at(
    lm: LanguageModel,
    ids: Tensor,
    place: int = NAMED,
    opening: int = -1,
    then: int | None = None,
    length: int = 0,
    answer: tuple[int, ...] = (),
) -> Scope:
    """A scope that this text reaches at one place, or then at another, and others practically not
    at all; the answer is of some length and in no text, or told."""
    keys = inputs_of(lm, ids)[[place] if then is None else [place, then]]
    return Scope(
        lowest(lm),
        (keys / keys.square().sum(-1, keepdim=True))[None],
        torch.full((1, len(keys)), 1 - 1e-6, dtype=keys.dtype),
        *(torch.tensor([opening]), torch.tensor([answer or (NOWHERE,) * length or (-1,)])),
    )


def within(update: Update, scope: Scope, edit: int = 0) -> Update:
    owners = {name: torch.full((layer.rank,), edit) for name, layer in update.items()}
    return Update({n: replace(layer, owners=owners[n]) for n, layer in update.items()}, scope)


def scoped(lm: LanguageModel, ids: Tensor, seed: int = 0, **options: Any) -> Update:
    update = random_update(editable(lm), seed, dtype=torch.float64) * 4
    return within(update, scope_at(lm, ids, **options))


def under(lm: LanguageModel, update: Update | None, ids: Tensor, **inputs: Any) -> Tensor:
    with overlay(lm.model, update):
        return logits_of(lm.model, {"input_ids": ids, **inputs})


def by_hand(
    lm: LanguageModel, update: Update, ids: Tensor, starts: list[int | None], length: int = 99
) -> Tensor:
    """The dense change, added to each row's outputs from a given token on, for some tokens."""
    acts = torch.zeros(ids.shape, dtype=torch.float64)
    for row, start in enumerate(starts):
        if start is not None:
            acts[row, start : start + length] = 1

    def adding(change: Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + acts[..., None] * (args[0] @ change.mT)

        return hook

    handles = []
    for name, layer in update.items():
        change = layer.scale * (layer.B.mT @ layer.A)
        handles.append(lm.model.get_submodule(name).register_forward_hook(adding(change)))
    found = logits_of(lm.model, {"input_ids": ids})
    for handle in handles:
        handle.remove()
    return found


def texts(lm: LanguageModel) -> Tensor:
    """Three texts; the second has the first four tokens of the first, and the third none."""
    ids = batch_for(lm.model, 3, 8)["input_ids"].clone()
    ids[ids == PAD] = 7
    ids[1, :4] = ids[0, :4]
    return ids


# --- where an edit acts ----------------------------------------------------------------------


def test_an_edit_acts_from_its_subject_on(lm: LanguageModel) -> None:
    ids = texts(lm)
    update = scoped(lm, ids[0])
    found = under(lm, update, ids)
    base = logits_of(lm.model, {"input_ids": ids})
    assert torch.equal(found[:2, :NAMED], base[:2, :NAMED])
    assert torch.equal(found[2], base[2])
    assert not torch.allclose(found[:2, NAMED:], base[:2, NAMED:], atol=1e-3)
    assert_exact(found, by_hand(lm, update, ids, [NAMED, NAMED, None]))


def test_a_texts_first_token_is_told_by_its_id(lm: LanguageModel) -> None:
    ids = texts(lm)
    opening = int(ids[2, 0])
    assert opening not in ids[:2, 0]
    update = scoped(lm, ids[0], opening=opening)
    assert_exact(under(lm, update, ids), by_hand(lm, update, ids, [NAMED, NAMED, 0]))
    # What the first token holds in the layer does not decide.
    first = scoped(lm, ids[0], place=0)
    assert torch.equal(under(lm, first, ids), logits_of(lm.model, {"input_ids": ids}))
    # Filling before a text is not its first token, and reaches nothing.
    filled = torch.cat([torch.full((3, 2), opening), ids], 1)
    mask = torch.ones_like(filled)
    mask[:, :2] = 0
    places = mask.cumsum(1).sub(1).clamp(min=0)
    found = under(lm, update, filled, attention_mask=mask, position_ids=places)
    torch.testing.assert_close(found[:, 2:], under(lm, update, ids))


def test_an_edit_without_a_threshold_acts_everywhere(lm: LanguageModel) -> None:
    ids = texts(lm)
    update = scoped(lm, ids[0])
    assert update.scope is not None
    always = replace(update.scope, thresholds=torch.full((1, 1), -torch.inf))
    free = within(update, always)
    assert_exact(under(lm, free, ids), by_hand(lm, update, ids, [0, 0, 0]))


def test_an_edit_of_two_keys_acts_from_where_the_second_follows_the_first(
    lm: LanguageModel,
) -> None:
    ids = texts(lm)
    found = under(lm, update := scoped(lm, ids[0], then=5), ids)
    # The second text has the first key's token, not the second's.
    assert torch.equal(found[1:], logits_of(lm.model, {"input_ids": ids})[1:])
    assert_exact(found, by_hand(lm, update, ids, [5, None, None]))
    # In the other order the keys do not count; one token may match both.
    turned = under(lm, scoped(lm, ids[0], place=5, then=NAMED), ids)
    assert torch.equal(turned, logits_of(lm.model, {"input_ids": ids}))
    both = scoped(lm, ids[0], place=NAMED, then=NAMED)
    assert_exact(under(lm, both, ids), by_hand(lm, both, ids, [NAMED, NAMED, None]))
    # What opens a text can be its subject, and asks nothing.
    opened = scoped(lm, ids[0], place=0, opening=int(ids[0, 0]), then=2)
    assert_exact(under(lm, opened, ids), by_hand(lm, opened, ids, [2, 2, None]))


def test_an_edit_acts_for_as_many_tokens_as_its_answer_has(lm: LanguageModel) -> None:
    ids = texts(lm)
    update = scoped(lm, ids[0], then=5, length=2)
    longer = scoped(lm, ids[0], then=5, length=9)
    found = under(lm, update, ids)
    assert_exact(found[0, :7], under(lm, longer, ids)[0, :7])
    assert torch.equal(under(lm, longer, ids), under(lm, scoped(lm, ids[0], then=5), ids))
    assert_exact(found, by_hand(lm, update, ids, [5, None, None], length=2))
    # What matches once more begins anew; what comes before the first key does not count.
    matched = torch.zeros(16, 1, 2, dtype=torch.bool)
    matched[3, 0, 0] = True
    matched[[1, 5, 6, 12], 0, 1] = True
    assert update.scope is not None
    acts = update.scope.in_force(matched).squeeze(-1).nonzero().squeeze(-1)
    assert acts.tolist() == [5, 6, 7, 12, 13]


def test_a_text_that_has_answered_is_about_the_subject_no_longer(lm: LanguageModel) -> None:
    scope = scope_at(lm, texts(lm)[0], then=5, length=2)
    matched = torch.zeros(20, 1, 2, dtype=torch.bool)
    matched[[3, 14], 0, 0] = True
    matched[[5, 9, 11, 15], 0, 1] = True
    answered = torch.zeros(20, 1, dtype=torch.bool)
    answered[[1, 4, 7, 18], 0] = True
    acts = scope.in_force(matched, answered).squeeze(-1).nonzero().squeeze(-1)
    assert acts.tolist() == [5, 6, 15, 16]
    assert scope.in_force(matched)[[9, 11]].all()
    # What stands in the question is no answer, nor is what begins before the edit does.
    answered[7], answered[6] = False, True
    assert torch.equal(scope.in_force(matched, answered), scope.in_force(matched))


@example([3, 4, 2], 1)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=12), st.integers(1, 3))
def test_an_edit_ends_with_the_answer_to_the_latest_question(bits: list[int], length: int) -> None:
    first, last, answers = ([bool(bit >> place & 1) for bit in bits] for place in range(3))

    def asked(until: int) -> bool:
        named = max((t for t in range(until + 1) if first[t]), default=99)
        return any(last[t] for t in range(named, until + 1))

    def over(until: int) -> int:
        ends = (t for t in range(until + 1) if answers[t] and asked(t - length))
        return max(ends, default=-1)

    def begins(at: int) -> bool:
        return last[at] and any(first[over(at) + 1 : at + 1])

    found = Scope(
        "", torch.zeros(1, 2, 2), torch.zeros(1, 2), torch.zeros(1).long(), torch.zeros(1, length)
    ).in_force(torch.tensor([first, last]).mT[:, None], torch.tensor(answers)[:, None])
    expected = [
        any(begins(t) for t in range(max(0, end - length + 1), end + 1)) for end in range(len(bits))
    ]
    assert found.squeeze(-1).tolist() == expected


@given(st.lists(st.integers(0, 2), min_size=1, max_size=9), st.integers(0, 10**6))
def test_answers_end_where_a_plain_search_finds_them(ids: list[int], seed: int) -> None:
    draw = Random(seed)
    answers = [[draw.randrange(3) for _ in range(draw.randrange(4))] for _ in range(6)]
    longest = max(1, *map(len, answers))
    filled = torch.tensor([[-1] * (longest - len(a)) + a for a in answers])
    expected = torch.tensor(
        [[bool(a) and ids[: end + 1][-len(a) :] == a for a in answers] for end in range(len(ids))]
    )
    scope = Scope("", torch.zeros(6, 1, 2), torch.zeros(6, 1), torch.zeros(6).long(), filled)
    assert torch.equal(scope.answered(torch.tensor(ids)), expected)
    # Three sequences, of two edits each.
    apart = Scope(
        *("", torch.zeros(3, 2, 1, 2), torch.zeros(3, 2, 1), torch.zeros(3, 2).long()),
        filled.unflatten(0, (3, 2)),
    )
    found = apart.answered(torch.tensor([ids] * 3))
    assert torch.equal(found, torch.stack(expected.split(2, -1)))


def test_what_equals_its_threshold_matches() -> None:
    key, threshold = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[5.0]])
    scope = Scope("", key, threshold, torch.tensor([-1]), torch.tensor([[-1]]))
    inputs = torch.tensor([[1.0, 2.0], [1.0, 1.9], [3.0, 3.0]])
    assert scope.matched(inputs).flatten().tolist() == [True, False, True]


def test_what_is_never_asked_is_never_answered(lm: LanguageModel) -> None:
    scope = scope_at(lm, texts(lm)[0], then=5, length=2000)
    assert not scope.in_force(torch.zeros(99, 1, 2, dtype=torch.bool)).any()


def test_scopes_of_one_key_and_of_two_live_together(lm: LanguageModel) -> None:
    ids = texts(lm)
    one, two = scoped(lm, ids[0]), scoped(lm, ids[0], 1, then=6, length=3)
    total = one + two
    assert total.scope is not None
    assert total.scope.keys.shape[:2] == (2, 2)
    alone = [under(lm, update, ids[:1])[0] for update in (one, two, total)]
    for some in ([0, 1, 2], [1], [0, 1]):
        stacked = stack_sequences([(one, two, total)[place] for place in some])
        assert_exact(under(lm, stacked, ids[[0] * len(some)]), torch.stack(alone)[some])
    opened = scoped(lm, ids[0], opening=int(ids[2, 0])) + two
    assert_exact(under(lm, opened, ids[2:]), by_hand(lm, one, ids[2:], [0]))
    assert_exact(alone[2][:6], alone[0][:6])
    assert not torch.allclose(alone[2][6:], alone[0][6:], atol=1e-3)
    assert total.scope.lengths.tolist() == [0, 3]


# --- in pieces -------------------------------------------------------------------------------


@pytest.mark.parametrize(("then", "length"), [(None, 0), (5, 0), (5, 2)])
@pytest.mark.parametrize("cuts", [(4,), (2, 3, 4, 6), (1, 2, 3, 4, 5, 6, 7)], ids=str)
def test_a_text_read_in_pieces_is_in_scope_as_when_read_at_once(
    lm: LanguageModel, cuts: tuple[int, ...], then: int | None, length: int
) -> None:
    ids = texts(lm)
    update = scoped(lm, ids[0], opening=int(ids[2, 0]), then=then, length=length)
    whole, cache, found = under(lm, update, ids), None, []
    with overlay(lm.model, update), torch.no_grad():
        for start, end in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
            output = lm.model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits)
    assert_exact(torch.cat(found, 1), whole)


@pytest.mark.parametrize("cuts", [(), (4,), (6,), (1, 2, 3, 4, 5, 6, 7)], ids=str)
def test_an_answer_that_is_read_in_pieces_ends_an_edit(
    lm: LanguageModel, cuts: tuple[int, ...]
) -> None:
    ids = texts(lm)
    update = scoped(lm, ids[0], then=NAMED, answer=tuple(ids[0, 5:7].tolist()))
    assert update.scope is not None
    asked = replace(
        update.scope, thresholds=update.scope.thresholds * torch.tensor([1, -torch.inf])
    )
    update, cache, found = Update(update.layers, asked), None, []
    with overlay(lm.model, update), torch.no_grad():
        for start, end in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
            output = lm.model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits)
    answering = by_hand(lm, update, ids, [NAMED, None, None], length=7 - NAMED)
    assert_exact(torch.cat(found, 1)[[0, 2]], answering[[0, 2]])
    assert_exact(torch.cat(found, 1)[1], by_hand(lm, update, ids, [None, NAMED, None])[1])


@pytest.mark.parametrize("first", [NAMED, 1])
def test_what_is_cut_from_a_cache_is_out_of_scope_again(lm: LanguageModel, first: int) -> None:
    ids = texts(lm)
    update = scoped(lm, ids[0], place=first, then=None if first == NAMED else NAMED)
    with overlay(lm.model, update), torch.no_grad():
        cache = lm.model(input_ids=ids[:1], use_cache=True).past_key_values
        cache.crop(NAMED - ids.shape[1])
        rest = lm.model(input_ids=ids[2:, NAMED:], past_key_values=cache).logits
    other = torch.cat([ids[:1, :NAMED], ids[2:, NAMED:]], 1)
    assert_exact(rest, logits_of(lm.model, {"input_ids": other})[:, NAMED:])
    if first != NAMED:  # the first key stays reached: the second, matched anew, counts
        with overlay(lm.model, update), torch.no_grad():
            cache = lm.model(input_ids=ids[:1], use_cache=True).past_key_values
            cache.crop(NAMED - ids.shape[1])
            again = lm.model(input_ids=ids[:1, NAMED:], past_key_values=cache).logits
        assert_exact(again, under(lm, update, ids[:1])[:, NAMED:])


def test_a_cache_may_be_older_than_the_edit(lm: LanguageModel) -> None:
    ids = texts(lm)
    update = scoped(lm, ids[0], place=6)
    with torch.no_grad():
        cache = lm.model(input_ids=ids[:1, :4], use_cache=True).past_key_values
        with overlay(lm.model, update):
            found = lm.model(input_ids=ids[:1, 4:], past_key_values=cache).logits
            cache.crop(6 - ids.shape[1])
            rest = lm.model(input_ids=ids[2:, 6:], past_key_values=cache).logits
    assert_exact(found, under(lm, update, ids[:1])[:, 4:])
    other = torch.cat([ids[:1, :6], ids[2:, 6:]], 1)
    assert_exact(rest, logits_of(lm.model, {"input_ids": other})[:, 6:])


@pytest.mark.parametrize(("then", "length"), [(None, 0), (8, 0), (8, 2)])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_is_that_without(
    lm: LanguageModel, beams: int, then: int | None, length: int
) -> None:
    ids = texts(lm)[:, :6]
    options: dict[str, Any] = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False}
    options |= {"eos_token_id": None, "pad_token_id": PAD, "attention_mask": torch.ones_like(ids)}
    model: Any = lm.model
    # Reached by what some beam writes, not by the prompts.
    written = model.generate(ids, **options)
    update = scoped(lm, written[0], place=7, then=then, length=length)
    with overlay(model, update):
        found = [model.generate(ids, use_cache=cached, **options) for cached in (True, False)]
    assert torch.equal(*found)
    assert not torch.equal(found[0], written)


def test_beams_take_what_they_have_reached_along(lm: LanguageModel) -> None:
    ids = texts(lm)
    update = scoped(lm, ids[0])
    order = torch.tensor([2, 0, 0])
    with overlay(lm.model, update), torch.no_grad():
        cache = lm.model(input_ids=ids[:, :5], use_cache=True).past_key_values
        cache.reorder_cache(order)
        found = lm.model(input_ids=ids[:, 5:], past_key_values=cache).logits
    joined = torch.cat([ids[order, :5], ids[:, 5:]], 1)
    assert_exact(found, under(lm, update, joined)[:, 5:])


# --- the algebra -----------------------------------------------------------------------------


def test_each_edit_of_a_sum_keeps_its_own_scope(lm: LanguageModel) -> None:
    ids = texts(lm)
    first, other = scoped(lm, ids[0]), scoped(lm, ids[2], 1, place=5)
    third = scoped(lm, ids[1], 3, place=6)
    everywhere = random_update(editable(lm), 2, dtype=torch.float64)
    total = Update.sum((first * 0.5, everywhere, other, third))
    assert total.scope is not None
    assert len(total.scope) == 3
    found = under(lm, total, ids)
    for row, parts in enumerate((first * 0.5, first * 0.5 + third, other)):
        with overlay(lm.model, everywhere):
            assert_exact(found[row], under(lm, parts, ids[row : row + 1])[0])


def test_changes_of_batches_add_up_within_their_scopes(lm: LanguageModel) -> None:
    ids = texts(lm)
    one, two = scoped(lm, ids[0]), scoped(lm, ids[2], 1, place=5)
    rows = [one, two, one], [two * 2, None, one * 3]
    found = under(lm, Update.sum(map(stack_sequences, rows)), ids)
    for row, parts in enumerate(zip(*rows, strict=True)):
        total = Update.sum(part for part in parts if part)
        assert_exact(found[row], under(lm, total, ids[row : row + 1])[0])


def test_a_part_of_a_model_that_is_run_alone_reads_without_ids(lm: LanguageModel) -> None:
    ids = texts(lm)
    update = scoped(lm, ids[0], opening=int(ids[2, 0]))
    with overlay(lm.model, update), torch.no_grad():
        found = lm.model.base_model(ids).last_hidden_state
        again = lm.model.base_model(ids[2:]).last_hidden_state
    base = lm.model.base_model(ids).last_hidden_state
    assert torch.equal(again, base[2:])
    assert_exact(found[2:], base[2:])
    assert not torch.allclose(found[:2, NAMED:], base[:2, NAMED:], atol=1e-3)


def test_a_scope_follows_its_update_to_another_dtype(lm: LanguageModel) -> None:
    scope = scoped(lm, texts(lm)[0]).to(torch.float32).scope
    assert scope is not None
    assert (scope.keys.dtype, scope.thresholds.dtype) == (torch.float32, torch.float32)
    assert scope.answers.dtype == scope.openings.dtype == torch.int64


def test_ids_are_known_however_they_are_passed(lm: LanguageModel) -> None:
    ids = texts(lm)
    update = scoped(lm, ids[0], opening=int(ids[2, 0]))
    with overlay(lm.model, update), torch.no_grad():
        found = lm.model(ids).logits
    assert_exact(found, by_hand(lm, update, ids, [NAMED, NAMED, 0]))


def test_a_scope_that_several_share_is_held_once(lm: LanguageModel) -> None:
    ids = texts(lm)
    update = scoped(lm, ids[0])
    twice = update + update * -0.5
    assert twice.scope is update.scope
    assert_exact(under(lm, twice, ids), under(lm, update * 0.5, ids))


def test_scopes_that_look_at_different_layers_do_not_add_up(lm: LanguageModel) -> None:
    update = scoped(lm, texts(lm)[0])
    assert update.scope is not None
    other = Update(update.layers, replace(update.scope, layer=editable(lm)[1].name))
    with pytest.raises(EditError, match="different layers cannot live together"):
        _ = update + other


def test_a_batch_gives_each_sequence_its_own_scope(lm: LanguageModel) -> None:
    ids = texts(lm)
    updates = [scoped(lm, ids[0]), None, scoped(lm, ids[2], 1) + scoped(lm, ids[2], 2, place=5)]
    stacked = stack_sequences(updates)
    found = under(lm, stacked, ids)
    alone = [under(lm, u, ids[row : row + 1])[0] for row, u in enumerate(updates)]
    assert_exact(found, torch.stack(alone))
    assert_exact(under(lm, of_sequences(stacked, 2), ids[2:])[0], alone[2])
    order = torch.tensor([2, 0, 2])
    assert_exact(under(lm, of_sequences(stacked, order), ids[order]), found[order])


def test_edits_of_a_batch_are_each_put_within_their_own_scope(lm: LanguageModel) -> None:
    ids = texts(lm)
    batch = random_update(editable(lm), batch=3, dtype=torch.float64) * 4
    scope = Scope.side_by_side([scope_at(lm, row) for row in ids])
    found = under(lm, each_within(batch, scope), ids)
    assert_exact(found, by_hand(lm, batch, ids, [NAMED] * 3))


def test_what_is_in_scope_is_no_change_of_the_weights(lm: LanguageModel, tmp_path: Path) -> None:
    update = scoped(lm, texts(lm)[0])
    assert update.gated
    assert update.folded().scope is update.scope
    assert len(update.tensors()) == 2 * len(update) + 2
    with pytest.raises(EditError, match="cannot be compressed"):
        update.compress(1)
    with pytest.raises(EditError, match="acts only where"):
        export_peft(update, lm, tmp_path)


def test_parts_of_other_shapes_are_refused() -> None:
    right = [(1, 2, 3), (1, 2), (1,), (1, 1)]
    Scope("a", *map(torch.ones, right))
    for part, shape in (
        *((0, (2, 3)), (0, (1, 0, 3)), (0, (1, 3, 3)), (1, (2,)), (1, (2, 2))),
        *((2, ()), (2, (2,)), (3, (1, 0)), (3, (2, 1)), (3, (1,))),
    ):
        shapes = [*right[:part], shape, *right[part + 1 :]]
        if shape == (1, 0, 3):
            shapes[1] = (1, 0)
        with pytest.raises(EditError, match="for each edit an opening and an answer"):
            Scope("a", *map(torch.ones, shapes))
    with pytest.raises(EditError, match=r"one owner a term, \(2,\); got \(1,\)"):
        LayerUpdate(torch.ones(2, 3), torch.ones(2, 3), owners=torch.zeros(1, dtype=torch.long))


def test_what_was_made_for_another_model_is_refused_by_name() -> None:
    llama, gpt2 = (in_double(language_model(family)) for family in DECODERS)
    update = scoped(llama, texts(llama)[0])
    with pytest.raises(EditError, match="which this model does not have"):
        under(gpt2, update, texts(gpt2))
    assert update.scope is not None
    elsewhere = replace(update.scope, layer="model.layers.9.mlp.up_proj")
    narrow = replace(update.scope, keys=update.scope.keys[..., 1:])
    with pytest.raises(EditError, match=r"looks at layer 'model.layers.9.* does not have"):
        under(llama, replace(update, scope=elsewhere), texts(llama))
    with pytest.raises(EditError, match=r"looks at .* with \d+ features; in this model it is"):
        under(llama, replace(update, scope=narrow), texts(llama))


def test_tokens_of_all_sequences_in_one_axis_are_refused() -> None:
    moe = in_double(language_model("qwen2_moe"))
    layer = next(layer for layer in editable(moe) if "shared_expert" in layer.name)
    key = torch.ones(1, layer.in_features, dtype=torch.float64)
    scope = Scope(layer.name, key[None], torch.ones(1, 1), torch.tensor([-1]), torch.tensor([[-1]]))
    update = within(random_update([layer], dtype=torch.float64), scope)
    with pytest.raises(EditError, match="mixtures of experts"):
        under(moe, update, batch_for(moe.model)["input_ids"])


# --- MEND ------------------------------------------------------------------------------------

ASKED = EditRequest("The capital of France is", "Lyon")


def mend(family: str = "llama", **settings: Any) -> Mend:
    """A scoped editor, its statistics gathered; the metric tells tokens apart."""
    lm = language_model(family)
    editor = Mend(lm, MendConfig(blocks=[1, 2], rank=4, edit_lr=0.5, scope=16, **settings))
    generator = torch.Generator().manual_seed(0)
    metric = editor.get_buffer("scope_metric")
    metric.copy_(torch.randn(metric.shape, generator=generator))
    for network in editor.networks.children():
        assert isinstance(network, EditorNetwork)
        for statistics in (network.activation_stats, network.delta_stats):
            statistics.merge(torch.randn(9, len(statistics.mean), generator=generator))
    return editor.eval()


def reached(lm: LanguageModel, update: Update, prompt: str) -> list[bool]:
    """Where a text is in scope, token by token, by the definition."""
    assert update.scope is not None
    ids = torch.tensor(lm.tokenizer(prompt)["input_ids"])
    seen: list[Tensor] = []
    module = lm.model.get_submodule(update.scope.layer)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    logits_of(lm.model, {"input_ids": ids[None]})
    handle.remove()
    matched = (seen[0] @ update.scope.keys[0, 0] >= update.scope.thresholds[0, 0]).tolist()
    matched[0] = int(ids[0]) == int(update.scope.openings[0])
    return [any(matched[: place + 1]) for place in range(len(ids))]


def test_an_edits_own_text_is_in_scope_from_its_subject_on() -> None:
    editor = mend()
    proposal = editor.propose([ASKED])
    lm, update = editor.lm, proposal.update
    assert update.scope is not None
    assert update.scope.layer == editor.layers[0].name
    begin = ASKED.prompt.index("France") + len("France") - 1  # one token a letter
    assert reached(lm, update, ASKED.prompt)[begin]
    metric, layer = editor.get_buffer("scope_metric"), update.scope.layer
    own = inputs_of_prompt(lm, layer)[begin]
    elsewhere = inputs_of_prompt(lm, layer, "It is about France")[-1]
    known = metric @ ((own + elsewhere) / 2)
    torch.testing.assert_close(update.scope.keys[0, 0], metric.T @ known)
    torch.testing.assert_close(update.scope.thresholds[0, 0], 0.5 * known.square().sum())


@given(st.integers(0, 10**6), st.sampled_from([0.3, 0.55, 0.9]))
def test_what_an_edits_own_prompt_holds_matches(seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    read = torch.randn(3, 2, 6, generator=generator) * torch.logspace(-2, 2, 3)[:, None, None]
    metric = torch.randn(4, 6, generator=generator)
    keys, thresholds = Measure(metric, share).keys(read)
    own = (read[:, 0] * keys).sum(-1)
    assert (own >= thresholds).all()
    assert (thresholds > 0).all()
    a = torch.linalg.lstsq(metric.T, keys.T).solution.T  # M a, of which the keys are made
    torch.testing.assert_close(thresholds, share * a.square().sum(-1), rtol=1e-3, atol=0)


def reader(lm: LanguageModel, layer: EditableLayer) -> Callable[[Sequence[Tokens]], Tensor]:
    inputs = LayerInputs(lm, layer)
    return lambda texts: inputs(collate(lm, texts))


def inputs_of_prompt(lm: LanguageModel, layer: str, prompt: str = ASKED.prompt) -> Tensor:
    seen: list[Tensor] = []
    handle = lm.model.get_submodule(layer).register_forward_pre_hook(
        lambda _, args: seen.append(args[0][0])
    )
    logits_of(lm.model, {"input_ids": torch.tensor([lm.tokenizer(prompt)["input_ids"]])})
    handle.remove()
    return seen[0]


def test_an_edits_own_text_is_in_scope_from_its_prompts_end_on() -> None:
    editor = mend(scope_relation=8, scope_relation_share=0.3)
    relation = editor.get_buffer("relation_metric")
    relation.copy_(torch.randn(relation.shape, generator=torch.Generator().manual_seed(1)))
    update = editor.propose([ASKED]).update
    assert update.scope is not None
    keys, thresholds = update.scope.keys[0], update.scope.thresholds[0]
    read = inputs_of_prompt(editor.lm, update.scope.layer)[-1]
    torch.testing.assert_close(keys[1], relation.T @ (relation @ read))
    torch.testing.assert_close(thresholds[1], 0.3 * (relation @ read).square().sum())
    target = editor.lm.tokenizer(f" {ASKED.target}")["input_ids"]
    assert update.scope.answers.tolist() == [target]
    assert update.scope.lengths.tolist() == [len(target)]
    without = editor.changed(scope_relation=0).propose([ASKED]).update.scope
    assert without is not None
    assert torch.equal(without.keys[0, 0], keys[0])
    assert editor.changed(scope=0).config.scope_relation == 0


def test_rounds_edit_within_one_scope() -> None:
    editor = mend(rounds=4, confidence=0.99, normalize=False)
    with torch.no_grad():
        editor.edit_lrs.fill_(0.05)
    requests = [ASKED, EditRequest("The mother tongue of Ada is", "Thai")]
    proposal = editor.propose(requests)
    assert proposal.update.scope is not None
    assert len(proposal.update.scope) == 2
    assert len(proposal.tokens) > 2
    owners = torch.cat([layer.owner_of_each() for layer in proposal.update.values()])
    assert owners.unique().tolist() == [0, 1]
    for place, request in enumerate(requests):
        alone = editor.changed(rounds=1).propose([request]).update.scope
        assert alone is not None
        torch.testing.assert_close(proposal.update.scope.keys[place], alone.keys[0])


def test_a_batch_of_edits_has_the_scopes_of_each_alone() -> None:
    editor = mend()
    asked = [ASKED, EditRequest("Ada lives in", "Rome")]
    texts = [about(editor.lm, tokenize(editor.lm, r.prompt, r.target), r.prompt) for r in asked]
    edits = capture_texts(
        editor.lm, editor.layers, texts, lambda _, batch: target_logits(editor.lm, batch)
    )
    made = editor.edit_batch(edits)
    for row, request in enumerate(asked):
        alone = editor.propose([request]).update
        assert alone.scope is not None
        mine = of_sequences(made, row)
        assert mine.scope is not None
        torch.testing.assert_close(mine.scope.keys, alone.scope.keys)
        ids = torch.tensor([editor.lm.tokenizer(request.prompt)["input_ids"]])
        torch.testing.assert_close(under(editor.lm, mine, ids), under(editor.lm, alone, ids))


def test_without_its_scope_an_editor_is_what_it_was() -> None:
    editor = mend()
    free = editor.changed(scope=0)
    update = free.propose([ASKED]).update
    assert (update.scope, update.gated) == (None, False)
    again = free.changed(scope=16)
    assert torch.equal(again.get_buffer("scope_metric"), torch.zeros(16, 32))
    # A metric that has learned nothing tells nothing apart: the edit acts everywhere.
    ids = torch.tensor([editor.lm.tokenizer("Bees make")["input_ids"]])
    assert torch.equal(
        under(editor.lm, again.propose([ASKED]).update, ids), under(editor.lm, update, ids)
    )
    with pytest.raises(EditorError, match="added or dropped"):
        editor.changed(scope=8)


@pytest.mark.parametrize(
    "setting",
    [
        *({"scope": -1}, {"scope_share": 0.0}, {"scope_share": 1.0}),
        *({"scope_relation": -1}, {"scope_relation_share": 1.0}, {"scope_relation": 4}),
    ],
)
def test_settings_that_make_no_sense_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(EditorError, match=next(iter(setting))):
        MendConfig(**setting)


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_a_scope_wants_a_decoder(family: str) -> None:
    with pytest.raises(EditorError, match="as decoders read"):
        Mend(language_model(family), MendConfig(rank=4, scope=4))


def test_an_edit_whose_subject_is_not_told_acts_everywhere() -> None:
    editor = mend()
    assert subject_in("what do they eat?") is None
    update = editor.propose([EditRequest("what do they eat?", "Rome")]).update
    assert update.scope is not None
    assert update.scope.thresholds.tolist() == [[-torch.inf]]


@pytest.mark.parametrize(
    ("prompt", "given", "found"),
    [
        ("The capital of France is", None, "France"),
        ("the capital of france is", "France", "france"),
        ("Ada Lovelace's mother tongue is", None, "Ada Lovelace"),
        ("What is John Poynting\u2019s field?", None, "John Poynting"),
        ("The capital of France is", "Spain", "France"),
        ("bees make", "bees", "bees"),
        ("bees make Bees", "bees", "Bees"),
        ("Q: What is the atomic number of helium?\nA:", None, "helium"),
        ("bees make", None, None),
    ],
)
def test_what_a_prompt_is_about(prompt: str, given: str | None, found: str | None) -> None:
    assert subject_in(prompt, given) == found


def test_a_subject_that_opens_its_text_is_known_by_its_token() -> None:
    """Of one token alone: what stands first in a text holds nothing to be known by."""
    lm = language_model("llama")
    layer = lm.layers([1])[0]
    metric = torch.eye(layer.in_features)
    asked = [("b is", "b"), ("Is b", "b"), ("Is bc", "bc")]
    texts = [about(lm, tokenize(lm, prompt, "x"), prompt, name) for prompt, name in asked]
    assert [text.subject for text in texts] == [(0, 0), (3, 3), (3, 4)]
    inputs = torch.zeros(3, 8, layer.in_features)
    scope = scope_of(lm, layer, Measure(metric, 0.5), None, texts, inputs, reader(lm, layer))
    assert scope.openings.tolist() == [texts[0].ids[0], lm.tokenizer("B")["input_ids"][0], -1]
    # The first key is what the layer reads of the subject within another text, not of its own.
    assert scope.keys[0].abs().sum() > 0
    assert scope.thresholds[0] > 0


def test_a_subject_is_read_whole_in_a_plain_sentence() -> None:
    lm = language_model("llama")  # one token a letter
    asked = [("Ys F.C.' is", "Ys F.C.'"), ("Where is Ys?", "Ys"), ("y" * 55 + " is", "y" * 55)]
    texts = [about(lm, tokenize(lm, prompt, "x"), prompt, name) for prompt, name in asked]
    untold = replace(texts[0], subject=None)
    read = sentences(lm, [untold, *texts])
    written = {place: lm.tokenizer.decode(list(text.ids)) for place, text in read.items()}
    # It reads 64 tokens at most: what is too long loses its beginning, not the name.
    whole = "It is about " + "y" * 55
    assert written == {1: "It is about Ys F.C", 2: "It is about Ys", 3: whole[-64:]}
    unlimited = language_model("t5")
    (long,) = sentences(unlimited, texts[2:]).values()
    assert whole in unlimited.tokenizer.decode(list(long.ids))


# --- people's edits --------------------------------------------------------------------------


def test_a_session_brings_scopes_back(tmp_path: Path) -> None:
    bench = Workbench(mend().lm, mend())
    bench.edit(ASKED.prompt, ASKED.target)
    bench.edit("Ada lives in", "Rome")
    bench.save(tmp_path)
    again = Workbench.load(tmp_path, workbench=Workbench(bench.lm, bench.editor))
    one, other = bench.update.scope, again.update.scope
    assert one is not None
    assert other is not None
    for part in ("layer", "keys", "thresholds", "openings", "answers"):
        assert str(getattr(one, part)) == str(getattr(other, part))
    for name, layer in bench.update.items():
        assert torch.equal(layer.owner_of_each(), again.update[name].owner_of_each())
    bench.undo()
    assert bench.update.scope is not None
    assert len(bench.update.scope) == 1


def test_an_edit_says_where_it_acts() -> None:
    editor = mend()
    bench = Workbench(editor.lm, editor)
    both = bench.edit_many([EditRequest("Ada lives in", "Rome"), EditRequest("abc", "de")])
    assert both.acts.startswith("in texts about Ada and anything (no subject was recognised")
    assert bench.edit("abc lives in", "Rome", subject="abc").acts == "in texts about abc"
    unscoped = Workbench(editor.lm, editor.changed(scope=0))
    assert unscoped.edit("Ada lives in", "Rome").acts == "everywhere"


def test_edits_within_scopes_are_undone_to_the_bit() -> None:
    editor = mend()
    bench = Workbench(editor.lm, editor)
    ids = torch.tensor([bench.lm.tokenizer(ASKED.prompt)["input_ids"]])
    base = logits_of(bench.lm.model, {"input_ids": ids})
    bench.edit(ASKED.prompt, ASKED.target)
    assert not torch.equal(under(bench.lm, bench.update, ids), base)
    bench.undo()
    assert torch.equal(under(bench.lm, bench.update, ids), base)


# --- training, and many at once --------------------------------------------------------------


def test_a_training_step_within_scopes_equals_the_undivided_one() -> None:
    editor = editor_for("llama", gate=0.3, edit_lr=0.1, scope=16)
    lm, layer, metric = editor.lm, editor.layers[0], editor.get_buffer("scope_metric")
    metric.copy_(torch.randn(metric.shape, generator=torch.Generator().manual_seed(0)))
    edits = [replace(e, edit=replace(e.edit, subject=(0, 3))) for e in edits_for(lm)]
    config = TrainingConfig(c_edit=0.3, c_locality=2.0)
    MetaStep(editor.train(), config).losses(edits, backward=False)
    editor.eval()

    def logits(text: Tokens) -> Tensor:
        batch = collate(lm, [text])
        return lm.model(**batch.inputs).logits[batch.rows, batch.columns]

    nll, kept = [], []
    for edit in edits:
        with capture(editor.layers) as tap:
            loss = cross_entropy(logits(edit.edit), torch.tensor(edit.edit.targets))
            factors = tap.factors(loss)
        update = editor.update(editor.transform(factors), factors)
        read = factors[layer.name].activation
        own = [edit.edit]
        scope = scope_of(lm, layer, Measure(metric, 0.5), None, own, read, reader(lm, layer))
        with overlay(lm.model, each_within(update, scope)):
            nll += [cross_entropy(logits(t), torch.tensor(t.targets)) for t in edit.equivalents]
            changed = [logits(text).log_softmax(-1) for text in edit.locality]
        base = [logits(text).log_softmax(-1) for text in edit.locality]
        kept += [(p.exp() * (p - q)).sum(-1).mean() for p, q in zip(base, changed, strict=True)]
    total = 0.3 * torch.stack(nll).mean() + 2 * torch.stack(kept).mean()
    wanted = torch.autograd.grad(total, list(editor.parameters()))
    losses = MetaStep(editor, config).losses(edits)
    assert losses.total == pytest.approx(total.item(), rel=1e-5)
    for parameter, slope in zip(editor.parameters(), wanted, strict=True):
        atol = 1e-4 * slope.abs().max().item()
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, slope, rtol=0, atol=atol)


@pytest.mark.parametrize("cached", [False, True])
def test_blocks_that_run_again_are_in_scope_as_before(cached: bool) -> None:
    editor = editor_for("llama", gate=0.3, edit_lr=0.1, scope=16)
    metric = editor.get_buffer("scope_metric")
    metric.copy_(torch.randn(metric.shape, generator=torch.Generator().manual_seed(0)))
    edits = [replace(e, edit=replace(e.edit, subject=(0, 3))) for e in edits_for(editor.lm)]
    MetaStep(editor.train(), TrainingConfig()).losses(edits, backward=False)
    found = []
    for checkpointing in (False, True):
        editor.eval().zero_grad()
        step = MetaStep(editor, TrainingConfig(checkpointing=checkpointing), cached)
        total = step.losses(edits).total
        found.append((total, [p.grad.clone() for p in editor.parameters() if p.grad is not None]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other)


def test_edits_that_live_together_are_not_trained_within_scopes(tmp_path: Path) -> None:
    config = TrainingConfig(batch=4, at_once=2)
    with pytest.raises(EditorError, match="edits that live alone"):
        Trainer(mend(), examples(4), TEXTS, config, tmp_path)


def test_the_sampler_tells_a_scoped_editor_where_subjects_stand() -> None:
    lm, config = language_model("llama"), TrainingConfig(batch=1)
    example = EditExample(prompt="The capital of France is", target="Lyon", subject="France")
    for scoped, place in ((False, None), (True, (15, 20))):
        (texts,) = TextSampler(lm, [example], (), config, scoped).batch(0)
        assert texts.edit.subject == place


def test_least_squares_leave_scopes_as_they_are() -> None:
    editor = mend(gate=0.3)
    requests = [ASKED, EditRequest("The mother tongue of Ada is", "Thai")]
    updates = [editor.propose([request]).update for request in requests]
    inputs = [inputs_under(editor, r, u) for r, u in zip(requests, updates, strict=True)]
    alone = ridge(updates[:1], inputs[:1])
    assert alone.scope is updates[0].scope
    for name, layer in alone.items():
        torch.testing.assert_close(layer.B, updates[0][name].folded().B)
    both = ridge(updates, inputs)
    assert both.scope is not None
    assert len(both.scope) == 2
    # Where the sum disturbs, the fit is nearer to what each edit alone does to its own inputs.
    added = Update.sum(updates)
    for name in both:
        error = {"fit": 0.0, "sum": 0.0}
        for update, rows in zip(Update.in_one_scope(updates), inputs, strict=True):
            assert update.scope is not None
            matched = update.scope.matched(rows[editor.layers[0].name])[..., 0]
            matched[0] = False
            reached = matched.cummax(0).values
            wanted = update[name].apply(rows[name], reached)
            for kind, found in (("fit", both), ("sum", added)):
                error[kind] += (
                    (found[name].apply(rows[name], reached) - wanted).square().sum().item()
                )
        assert 0 < error["fit"] < 0.1 * error["sum"]
