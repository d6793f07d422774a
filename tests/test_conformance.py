"""What every editor must hold to, whichever it is: one suite over the registry."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from families import language_model
from references import assert_near, hook_count, logits_of
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from workbench import EditError, EditExample, EditorError, EditRequest, Statement, Workbench
from workbench.adapters import export_peft, import_peft
from workbench.cancel import cancellable
from workbench.editors import (
    Editor,
    Enn,
    EnnConfig,
    Ke,
    KeConfig,
    Mend,
    MendConfig,
    TrainableEditor,
    editor_class,
    editor_names,
    open_editor,
)
from workbench.encoding import collate, tokenize
from workbench.errors import Cancelled
from workbench.evaluate import evaluate
from workbench.models import LanguageModel
from workbench.overlay import overlay
from workbench.updates import Update


def mend(lm: LanguageModel) -> Editor:
    # Without normalisation a fresh network passes the gradient on: a step down, as if trained.
    torch.manual_seed(0)
    return Mend(lm, MendConfig(rank=4, normalize=False, edit_lr=3.0)).eval()


def ke(lm: LanguageModel) -> Editor:
    # A fresh one takes a step of plain gradient descent.
    torch.manual_seed(0)
    return Ke(lm, KeConfig(lstm=4, condition=8, hidden=4, edit_lr=1.0)).eval()


def enn(lm: LanguageModel) -> Editor:
    return Enn(lm, EnnConfig(edit_lr=1.0)).eval()


def untrained(name: str, **settings: Any) -> Callable[[LanguageModel], Editor]:
    return lambda lm: editor_class(name).from_settings(lm, settings)


# How to make an editor that edits within a moment; a new editor gets its line here.
MAKERS: dict[str, Callable[[LanguageModel], Editor]] = {
    "enn": enn,
    "ft": untrained("ft", max_steps=4, lr=1e-2),
    "ft_kl": untrained("ft_kl", max_steps=4, lr=1e-2, c_locality=1.0, texts=2, text_tokens=6),
    "ke": ke,
    "lora": untrained("lora", max_steps=4, lr=1e-2, rank=2),
    "mend": mend,
    "rome": untrained("rome", block=0, lr=10.0, clamp=80.0, prefixes=1, prefix_words=1, texts=10),
}
FAMILIES = ("gpt2", "llama", "t5", "bert")
REFUSED = {("rome", "t5"), ("rome", "bert")}
CASES = sorted(set(product(editor_names(), FAMILIES)) - REFUSED)
FIRST, SECOND = "Who is Abba", "The sea at Ulm is"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What editors keep for the next time is kept for this test only."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=CASES, ids="-".join)
def editor(request: pytest.FixtureRequest, cache: None) -> Editor:
    name, family = request.param
    return MAKERS[name](language_model(family))


def requests(editor: Editor) -> list[EditRequest]:
    """Two edits, of which the model says neither beforehand."""
    labels = [str(name) for name in getattr(editor.lm.model.config, "id2label", {}).values()]
    if editor.lm.kind != "classifier":
        return [EditRequest(FIRST, "xy"), EditRequest(SECOND, "q")]
    said = [int(logits_of(editor.lm.model, inputs(editor.lm, p)).argmax()) for p in (FIRST, SECOND)]
    return [EditRequest(p, labels[1 - s]) for p, s in zip((FIRST, SECOND), said, strict=True)]


def inputs(lm: LanguageModel, prompt: str, target: str = "") -> dict[str, Tensor]:
    """What the model takes, written out: the target, but for its last token, where it is read."""
    after = {"causal": f"{prompt} {target}"[:-1] if target else prompt}.get(lm.kind, prompt)
    given = {"input_ids": torch.tensor([lm.tokenizer(after)["input_ids"]])}
    if lm.kind == "seq2seq":
        start = lm.model.config.decoder_start_token_id
        given["decoder_input_ids"] = torch.tensor(
            [[start, *lm.tokenizer(target)["input_ids"][:-1]]]
        )
    return {name: ids.to(lm.device) for name, ids in given.items()}


def said(lm: LanguageModel, update: Update | None = None) -> Tensor:
    """All the model says of a text."""
    with overlay(lm.model, update):
        return logits_of(lm.model, inputs(lm, SECOND, "abc"))


def nll(lm: LanguageModel, request: EditRequest, update: Update | None = None) -> float:
    """Loss of a request's target, from the model's plain logits."""
    tokens = tokenize(lm, request.prompt, request.target)
    batch = collate(lm, [tokens])
    with overlay(lm.model, update):
        logits = logits_of(lm.model, batch.inputs)[0]
    rows = log_softmax(logits if lm.kind == "classifier" else logits[batch.columns], -1)
    rows = rows.reshape(len(tokens.targets), -1)
    return -rows[torch.arange(len(rows)), batch.targets].mean().item()


def assert_same(found: Update, expected: Update) -> None:
    """Equal to the bit."""
    assert list(found) == list(expected)
    for one, other in zip(found.values(), expected.values(), strict=True):
        assert torch.equal(one.A, other.A)
        assert torch.equal(one.B, other.B)
        assert torch.equal(one.thresholds(), other.thresholds())
        assert float(one.scale) == float(other.scale)


def traces(lm: LanguageModel) -> list[object]:
    """Whatever an edit could leave behind on a model, its modules and the random numbers."""
    modules = [(n, id(m), m.training, sorted(vars(m))) for n, m in lm.model.named_modules()]
    parameters = [(n, id(p), p.requires_grad, p.grad) for n, p in lm.model.named_parameters()]
    config = lm.model.config.to_json_string()
    rng = torch.get_rng_state().tolist()
    return [lm.checksum(), hook_count(lm.model), modules, parameters, config, rng]


def test_every_editor_is_tried() -> None:
    assert sorted(MAKERS) == editor_names()


@pytest.mark.parametrize(("name", "family"), sorted(REFUSED))
def test_a_model_that_an_editor_cannot_edit_is_refused_with_a_reason(name: str, family: str):
    with pytest.raises(EditorError, match=r"decoder.*editor='ft'"):
        MAKERS[name](language_model(family))


def test_the_proposal_names_the_layers_it_changes_and_the_rest_is_untouched(editor: Editor):
    proposal = editor.propose(requests(editor))
    names = [layer.name for layer in proposal.layers]
    assert list(proposal.update) == names == [layer.name for layer in editor.layers]
    assert proposal.layers == editor.layers
    assert set(proposal.factors) == set(names)
    assert len(proposal.tokens) == 2
    for layer in proposal.layers:
        change = proposal.update[layer.name]
        assert (change.A.shape[-1], change.B.shape[-1]) == (layer.in_features, layer.out_features)
        assert change.norm() > 0
        assert proposal.factors[layer.name].delta.shape[::2] == (2, layer.out_features)
    assert not any(tensor.requires_grad for tensor in proposal.update.tensors())
    assert proposal.update.is_finite()


def test_several_requests_at_once_are_all_carried_out(editor: Editor):
    wanted = requests(editor)
    update = editor.propose(wanted).update
    for request in wanted:
        assert nll(editor.lm, request, update) < nll(editor.lm, request)


def test_evaluation_measures_the_proposed_update(editor: Editor):
    lm, (request, other) = editor.lm, requests(editor)
    near = Statement(prompt=other.prompt, answer=other.target)
    example = EditExample(
        prompt=request.prompt, target=request.target, target_true=other.target, neighbors=(near,)
    )
    scores = evaluate(editor, [example]).edits[0]
    update = editor.propose([request]).update
    batch = collate(lm, [tokenize(lm, other.prompt, other.target)])
    rows = []
    for change in (None, update):
        with overlay(lm.model, change):
            logits = logits_of(lm.model, batch.inputs)[0]
        rows.append(log_softmax(logits if lm.kind == "classifier" else logits[batch.columns], -1))
    base, edited = (row.reshape(len(batch.targets), -1) for row in rows)
    divergence = kl_div(edited, base, reduction="none", log_target=True).sum(-1).mean()
    assert not torch.equal(base, edited)
    assert_near(torch.tensor(scores.kl_neighborhood), divergence)
    assert scores.neighborhood_kept == (base.argmax(-1) == edited.argmax(-1)).float().mean()


def test_undo_is_exact_and_the_weights_are_never_written(editor: Editor):
    lm, bench = editor.lm, Workbench(editor.lm, editor)
    base, weights = said(lm), lm.checksum()
    first = bench.edit_many(requests(editor))
    bench.edit_many(requests(editor)[1:])
    both = said(lm, bench.update)
    bench.undo()
    assert torch.equal(said(lm, bench.update), said(lm, first.update))
    assert not torch.equal(both, said(lm, first.update))
    bench.undo()
    assert torch.equal(said(lm, bench.update), base)
    assert not torch.equal(both, base)
    bench.redo()
    bench.redo()
    assert torch.equal(said(lm, bench.update), both)
    assert lm.checksum() == weights


def test_nothing_is_left_behind(editor: Editor):
    lm, wanted = editor.lm, requests(editor)
    before = traces(lm)
    editor.propose(wanted)
    assert traces(lm) == before


def test_a_failed_edit_leaves_no_trace(editor: Editor):
    lm, bench, wanted = editor.lm, Workbench(editor.lm, editor), requests(editor)
    before = traces(lm)
    for bad in ([], [*wanted, EditRequest(FIRST, " ")]):
        with pytest.raises(EditError):
            bench.edit_many(bad)
    for looks in (0, 2):
        passed = iter(range(looks))
        with suppress(Cancelled), cancellable(lambda left=passed: next(left, None) is None):
            editor.propose(wanted)
    assert traces(lm) == before
    assert not bench.history
    assert not bench.can_undo


def test_while_an_edit_is_made_others_see_the_model_as_it_is(editor: Editor):
    lm, base, seen = editor.lm, said(editor.lm), []
    with ThreadPoolExecutor(1) as other:

        def look() -> bool:
            seen.append(torch.equal(other.submit(said, lm).result(), base))
            seen.append(torch.equal(said(lm), base))
            return False

        with cancellable(look):
            editor.propose(requests(editor))
    assert all(seen)
    assert seen or isinstance(editor, TrainableEditor)


def test_the_same_request_gives_the_same_update(editor: Editor):
    wanted, updates = requests(editor), []
    for seed in range(2):
        torch.manual_seed(seed)
        updates.append(editor.propose(wanted).update)
    assert_same(*updates)


def test_an_editor_made_again_from_its_file_or_settings_edits_alike(editor: Editor, tmp_path: Path):
    if isinstance(editor, TrainableEditor):
        again: Editor = TrainableEditor.from_pretrained(
            editor.save_pretrained(tmp_path / "editor"), editor.lm
        )
    else:
        settings = json.loads(json.dumps(editor.settings()))
        again = open_editor(editor.name, editor.lm, settings)
    assert json.dumps(again.settings()) == json.dumps(editor.settings())
    assert type(again) is type(editor)
    wanted = requests(editor)
    assert_same(again.propose(wanted).update, editor.propose(wanted).update)


def test_an_edit_is_a_lora_adapter(editor: Editor, tmp_path: Path):
    update = editor.propose(requests(editor)).update
    again = import_peft(export_peft(update, editor.lm, tmp_path / "adapter"), editor.lm)
    assert_near(said(editor.lm, again), said(editor.lm, update))
    assert not torch.equal(said(editor.lm, again), said(editor.lm))
