"""Laws of ENN: its training is that of the plain inner step, its base a checkpoint of its own."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from references import assert_near, in_double, logits_of
from runs import KINDS, edits_for, examples, left_by, opened, requests_for, trainer_for
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from workbench import Workbench
from workbench.editors import Enn, EnnConfig, Mend, MendConfig
from workbench.encoding import Tokens, collate, tokenize
from workbench.errors import EditError, EditorError
from workbench.evaluate import evaluate
from workbench.files import read_tensors
from workbench.models import LanguageModel, open_model
from workbench.overlay import overlay
from workbench.training import MetaStep, TrainingConfig

kinds = pytest.mark.parametrize("family", KINDS)


def editor_for(lm: LanguageModel, **config: Any) -> Enn:
    settings: dict[str, Any] = {"edit_lr": 0.3}
    return Enn(lm, EnnConfig(**(settings | config)))


def stirred(editor: Enn) -> Enn:
    """The editor with its base and alphas moved, as if trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in editor.parameters():
            spread = 0.3 * parameter.abs().mean()
            parameter += spread * torch.randn(parameter.shape, generator=generator)
    return editor


def inputs(lm: LanguageModel) -> dict[str, Tensor]:
    return collate(lm, [tokenize(lm, r.prompt, r.target) for r in requests_for(lm)]).inputs


# Training


def plain_logits(lm: LanguageModel, text: Tokens, weights: dict[str, Tensor]) -> Tensor:
    """Logits of a text's targets, by the whole model, alone, with some weights replaced."""
    given = {"input_ids": torch.tensor([text.ids])}
    if lm.kind == "seq2seq":
        start = lm.model.config.decoder_start_token_id
        given["decoder_input_ids"] = torch.tensor([[start, *text.targets[:-1]]])
    logits = functional_call(lm.model, weights, kwargs=given).logits
    return logits if lm.kind == "classifier" else logits[0, -len(text.targets) :]


def nll(lm: LanguageModel, text: Tokens, weights: dict[str, Tensor]) -> Tensor:
    return cross_entropy(plain_logits(lm, text, weights), torch.tensor(text.targets))


def plain_step(
    editor: Enn, config: TrainingConfig
) -> tuple[tuple[float, float, float], dict[str, Tensor]]:
    """Losses and gradients by the letter: dense weights, one text at a time, autograd alone."""
    lm = editor.original
    names = [f"{layer.name}.weight" for layer in editor.layers]
    base = {
        name: w.detach().clone() for name, w in zip(names, editor.weights.values(), strict=True)
    }
    alphas = editor.edit_lrs.detach().clone().requires_grad_()
    for weight in base.values():
        weight.requires_grad_()
    edited, kept, moved = [], [], []
    with sdpa_kernel(SDPBackend.MATH):
        for edit in edits_for(lm):
            slopes = torch.autograd.grad(
                nll(lm, edit.edit, base), list(base.values()), create_graph=True, allow_unused=True
            )
            weights = dict(base)
            for name, slope, alpha in zip(names, slopes, alphas, strict=True):
                if slope is not None:
                    slope = slope.detach() if editor.config.first_order else slope
                    weights[name] = base[name] - alpha * slope
            edited += [nll(lm, text, weights) for text in edit.equivalents]
            for text in edit.locality:
                p = plain_logits(lm, text, {}).log_softmax(-1)
                for found, held in ((kept, weights), (moved, base)):
                    q = plain_logits(lm, text, held).log_softmax(-1)
                    found.append((p.exp() * (p - q)).sum(-1).mean())
        means = [torch.stack(found).mean() for found in (edited, kept, moved)]
        factors = torch.tensor([config.c_edit, config.c_locality, config.c_base]).to(means[0])
        (factors @ torch.stack(means)).backward()
    gradients = {
        f"weights.{name.removesuffix('.weight').replace('.', '-')}": weight.grad
        for name, weight in base.items()
    }
    found = tuple(mean.item() for mean in means)
    return found, {"edit_lrs": alphas.grad, **gradients}  # type: ignore[return-value, dict-item]


@kinds
@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
def test_step_equals_the_plain_inner_step(family: str, first_order: bool):
    lm = in_double(opened(family))
    editor = stirred(editor_for(lm, first_order=first_order).double()).train()
    config = TrainingConfig(c_edit=0.3, c_locality=2.0, c_base=0.7)
    losses, wanted = plain_step(editor, config)
    assert wanted.keys() == dict(editor.named_parameters()).keys()
    checksum = lm.checksum()
    others = replace(config, chunk=2), replace(config, checkpointing=True)
    for settings in (config, *others):
        found = MetaStep(editor, settings).losses(edits_for(lm))
        assert (found.edit, found.locality, found.base) == pytest.approx(losses, rel=1e-5, abs=1e-6)
        for name, parameter in editor.named_parameters():
            atol = 1e-5 * wanted[name].abs().max().item()
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=0, atol=atol)
        editor.zero_grad(set_to_none=True)
    assert lm.checksum() == checksum
    assert all(parameter.grad is None for parameter in lm.model.parameters())


@kinds
def test_first_steps_of_training_lower_the_loss(family: str):
    lm = opened(family)
    editor, edits = editor_for(lm).train(), edits_for(lm)
    step = MetaStep(editor, TrainingConfig(c_edit=1.0))
    optimizer = torch.optim.Adam(editor.parameters(), lr=1e-3)
    found = []
    for _ in range(4):
        found.append(step.losses(edits))
        optimizer.step()
        optimizer.zero_grad()
    edit = [losses.edit for losses in found]
    assert edit == sorted(edit, reverse=True)
    assert found[0].base == pytest.approx(0, abs=1e-6)
    assert found[-1].base > found[0].base


def test_a_resumed_run_is_the_unbroken_one(tmp_path: Path):
    def editor() -> Enn:
        return editor_for(opened("gpt2"), blocks=[-1])

    whole = trainer_for(tmp_path / "whole", editor=editor())
    whole.run(bar=False)
    broken = tmp_path / "broken"
    trainer_for(broken, editor=editor(), on_step=lambda p, _: p.step != 3).run(bar=False)
    resumed = trainer_for(broken, editor=editor())
    resumed.run(resume=True, bar=False)
    assert left_by(resumed) == left_by(whole)
    assert not any(p.requires_grad for p in resumed.editor.lm.model.parameters())


# The trained base


@kinds
def test_a_fresh_base_is_the_original_and_shares_all_that_is_not_trained(family: str):
    lm = opened(family)
    editor = editor_for(lm)
    assert torch.equal(logits_of(editor.lm.model, inputs(lm)), logits_of(lm.model, inputs(lm)))
    mine = dict(editor.lm.model.named_parameters())
    trained = {f"{layer.name}.weight" for layer in editor.layers}
    assert mine.keys() == dict(lm.model.named_parameters()).keys()
    for name, parameter in lm.model.named_parameters():
        assert (mine[name].data_ptr() == parameter.data_ptr()) == (name not in trained)


def test_an_overlay_of_the_one_model_leaves_the_other_alone():
    lm = opened("llama")
    editor = stirred(editor_for(lm))
    update = editor.propose(requests_for(lm)).update
    for one, other in ((editor.lm.model, lm.model), (lm.model, editor.lm.model)):
        before = logits_of(one, inputs(lm)), logits_of(other, inputs(lm))
        with overlay(one, update):
            assert not torch.equal(logits_of(one, inputs(lm)), before[0])
            assert torch.equal(logits_of(other, inputs(lm)), before[1])


@kinds
def test_an_edit_is_one_gradient_step_and_undone_to_the_bit(family: str, tmp_path: Path):
    lm = opened(family)
    editor, checksum = stirred(editor_for(lm)), lm.checksum()
    loaded = Enn.from_pretrained(editor.save_pretrained(tmp_path / "editor"), lm)
    assert isinstance(loaded, Enn)
    tensors, _ = read_tensors(tmp_path / "editor" / "editor.safetensors", EditorError)
    trained = {f"weights.{layer.name.replace('.', '-')}" for layer in editor.layers}
    assert tensors.keys() == {"edit_lrs", *trained}
    (request, _), base = requests_for(lm), logits_of(editor.lm.model, inputs(lm))
    assert torch.equal(logits_of(loaded.lm.model, inputs(lm)), base)
    bench = Workbench(lm, editor)
    edit = bench.edit(request.prompt, request.target)
    again = loaded.propose([request]).update
    for one, two in zip(edit.update.tensors(), again.tensors(), strict=True):
        assert torch.equal(one, two)
    text = tokenize(lm, request.prompt, request.target)
    names = [f"{layer.name}.weight" for layer in editor.layers]
    weights = {
        name: w.detach().clone().requires_grad_()
        for name, w in zip(names, editor.weights.values(), strict=True)
    }
    nll(lm, text, weights).backward()
    for layer, name, alpha in zip(editor.layers, names, editor.edit_lrs.tolist(), strict=True):
        slope = weights[name].grad
        assert slope is not None
        assert_near(
            edit.update[layer.name].dense(), -alpha * (slope.T if layer.transposed else slope)
        )
    with bench.applied() as model:
        assert not torch.equal(logits_of(model, inputs(lm)), base)
    bench.undo()
    with bench.applied() as model:
        assert torch.equal(logits_of(model, inputs(lm)), base)
    assert lm.checksum() == checksum


def test_a_session_comes_back_over_its_trained_base(tmp_path: Path):
    opened("llama").model.save_pretrained(tmp_path / "model")
    opened("llama").tokenizer.save_pretrained(tmp_path / "model")
    lm = open_model(tmp_path / "model", device="cpu", progress=False)
    folder = stirred(editor_for(lm)).save_pretrained(tmp_path / "editor")
    bench = Workbench.open(tmp_path / "model", editor=folder, device="cpu")
    bench.edit("Her name was", "Jo")
    bench.save(tmp_path / "session")
    again = Workbench.load(tmp_path / "session", device="cpu")
    assert again.lm.fingerprint() == bench.lm.fingerprint() != lm.fingerprint()
    assert again.generate("Her name was") == bench.generate("Her name was")
    with again.applied() as one, bench.applied() as two:
        assert torch.equal(logits_of(one, inputs(lm)), logits_of(two, inputs(lm)))
    (folder / "editor.safetensors").unlink()
    with (
        pytest.warns(UserWarning, match="its editor is not"),
        pytest.raises(EditError, match="made over"),
    ):
        Workbench.load(tmp_path / "session", device="cpu")


def test_what_the_training_of_the_base_lost_is_evaluated_apart():
    lm = opened("gpt2")
    moved = evaluate(stirred(editor_for(lm, edit_lr=0.0)), examples(3)).means()
    # Edits of step size 0 change nothing: whatever is lost was lost before.
    assert moved["drawdown"].value == 0
    fresh = evaluate(editor_for(lm, edit_lr=0.0), examples(3)).means()
    assert fresh["base_drawdown"].value == 0
    plain = evaluate(Mend(lm, MendConfig(rank=2, normalize=False)), examples(1)).means()
    assert "base_drawdown" not in plain


def test_weights_that_cannot_be_trained_are_refused():
    lm = opened("gpt2")
    with pytest.raises(EditorError, match="without quantize"):
        editor_for(replace(lm, quantization="8bit"))
    half = editor_for(LanguageModel.wrap(in_double(lm).model.bfloat16(), lm.tokenizer))
    with pytest.raises(EditorError, match="dtype='float32'"):
        half.learned()


def test_losses_of_a_frozen_base_have_no_base_term():
    lm = opened("gpt2")
    losses = MetaStep(Mend(lm, MendConfig(rank=2)).train(), TrainingConfig()).losses(edits_for(lm))
    assert asdict(losses)["base"] == 0.0
