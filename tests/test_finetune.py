"""FT, FT+KL and LoRA against the same descent written out on weights that really change."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from families import language_model
from references import assert_near, editable, logits_of
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.testing import assert_close

from workbench import EditorError, EditRequest, FineTune, FineTuneConfig, LanguageModel
from workbench.editors import FineTuneKL, Lora, LoraConfig, open_editor
from workbench.overlay import overlay

REQUEST = EditRequest("abba is", "xy")
TEXT = "so it was, it is"


def loss_of(model: Any, lm: LanguageModel, request: EditRequest = REQUEST) -> Tensor:
    """Mean loss of a decoder's target tokens, from plain logits."""
    ids = torch.tensor([lm.tokenizer(f"{request.prompt} {request.target}")["input_ids"]])
    size = len(request.target) + 1  # a space joins them, in characters
    return cross_entropy(model(input_ids=ids[:, :-1]).logits[0, -size:], ids[0, -size:])


def descended(
    lm: LanguageModel, config: FineTuneConfig, text: str | None = None
) -> dict[str, Tensor]:
    """How each layer's weight moves when a copy of the model itself is trained."""
    twin: Any = copy.deepcopy(lm.model)
    layers = lm.layers(config.blocks, config.matrices)
    weights = {layer.name: twin.get_submodule(layer.name).weight for layer in layers}
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_()
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[config.optimizer]
    optimizer = kind(weights.values(), lr=config.lr)
    for _ in range(config.max_steps):
        optimizer.zero_grad()
        loss = loss_of(twin, lm)
        if text is not None:
            ids = torch.tensor([lm.tokenizer(text)["input_ids"]])[:, : config.text_tokens]
            base = log_softmax(logits_of(lm.model, {"input_ids": ids}), -1)[0]
            now = log_softmax(twin(input_ids=ids).logits, -1)[0]
            drift = kl_div(now, base, reduction="batchmean", log_target=True)
            loss = loss + config.c_locality * drift
        loss.backward()
        optimizer.step()
    moved = {name: (weight - start[name]).detach() for name, weight in weights.items()}
    return {la.name: moved[la.name].T if la.transposed else moved[la.name] for la in layers}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("optimizer", "lr"), [("adam", 1e-3), ("sgd", 0.1)])
def test_fine_tuning_is_that_of_the_weights(family: str, optimizer, lr: float):
    lm = language_model(family)
    config = FineTuneConfig(optimizer=optimizer, lr=lr, max_steps=3, blocks=[1, 3])
    update = FineTune(lm, config).propose([REQUEST]).update
    for name, moved in descended(lm, config).items():
        assert_close(update[name].dense(), moved, rtol=1e-2, atol=1e-2 * moved.abs().max().item())


def test_the_locality_term_is_the_divergence_on_the_texts():
    lm = language_model("llama")
    config = FineTuneConfig(
        optimizer="sgd", lr=0.1, max_steps=4, c_locality=100.0, texts=1, text_tokens=9, blocks=[3]
    )
    update = FineTuneKL(lm, config, unrelated=[TEXT]).propose([REQUEST]).update
    plain = FineTune(lm, FineTuneConfig(optimizer="sgd", lr=0.1, max_steps=4, blocks=[3]))
    for name, moved in descended(lm, config, TEXT).items():
        assert_near(update[name].dense(), moved)
        assert not torch.allclose(plain.propose([REQUEST]).update[name].dense(), moved, atol=1e-5)


@pytest.mark.parametrize("editor", ["ft", "ft_kl", "lora"])
def test_it_stops_as_soon_as_the_target_is_said(editor: str):
    lm = language_model("gpt2")
    requests = [REQUEST, EditRequest("no no", "z")]
    steps = next(
        steps
        for steps in range(1, 60)
        if says(lm, requests, open_editor(editor, lm, {"lr": 2e-3, "max_steps": steps}))
    )
    assert steps > 1
    updates = [
        open_editor(editor, lm, {"lr": 2e-3, "max_steps": most}).propose(requests).update
        for most in (steps, steps + 10)
    ]
    for name in updates[0]:
        assert torch.equal(updates[0][name].dense(), updates[1][name].dense())


def says(lm: LanguageModel, requests: list[EditRequest], editor) -> bool:
    """Whether every target token is the most likely one, by plain logits."""
    with overlay(lm.model, editor.propose(requests).update):
        for request in requests:
            ids = lm.tokenizer(f"{request.prompt} {request.target}")["input_ids"]
            best = logits_of(lm.model, {"input_ids": torch.tensor([ids[:-1]])})[0].argmax(-1)
            size = len(request.target) + 1  # the space before it is its own
            if best[-size:].tolist() != ids[-size:]:
                return False
    return True


def test_a_low_rank_change_learns_both_factors():
    lm = language_model("llama")
    update = FineTune(lm, FineTuneConfig(rank=2, lr=1e-2, max_steps=3)).propose([REQUEST]).update
    still = FineTune(lm, FineTuneConfig(rank=2, lr=1e-9, max_steps=1)).propose([REQUEST]).update
    assert set(update.rank().values()) == {2}
    assert all(not torch.allclose(update[n].A, still[n].A, atol=1e-4) for n in update)
    assert still.norm() < 1e-6  # it starts from no change at all
    with overlay(lm.model, update):
        after = loss_of(lm.model, lm)
    assert after < loss_of(lm.model, lm)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_lora_is_what_peft_trains(family: str):
    lm = language_model(family)
    config = LoraConfig(rank=2, alpha=6.0, lr=1e-2, max_steps=3, seed=5, blocks=[2])
    update = Lora(lm, config).propose([REQUEST]).update
    with torch.random.fork_rng():
        torch.manual_seed(5)
        settings = peft.LoraConfig(
            r=2, lora_alpha=6, target_modules=list(update), fan_in_fan_out=family == "gpt2"
        )
        model: Any = peft.get_peft_model(copy.deepcopy(lm.model), settings)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, lm).backward()
        optimizer.step()
    for name, change in update.items():
        layer = model.base_model.model.get_submodule(name)
        assert change.scale == 3.0
        learned = layer.get_delta_weight("default").detach()
        expected = learned.T if family == "gpt2" else learned
        assert_close(change.dense(), expected, rtol=1e-2, atol=1e-5)


def test_in_half_precision_the_adapter_is_learned_in_single():
    lm = language_model("llama")
    half = LanguageModel.wrap(copy.deepcopy(lm.model).bfloat16(), lm.tokenizer)
    update = Lora(half, LoraConfig(max_steps=2)).propose([REQUEST]).update
    assert {tensor.dtype for tensor in update.tensors()} == {torch.float32}


def test_lora_edits_every_editable_layer():
    for family in ("bart", "qwen2_moe", "gpt_neox"):
        lm = language_model(family)
        names = [layer.name for layer in editable(lm)]
        editor = Lora(lm, LoraConfig(matrices="all", max_steps=2, rank=1))
        assert list(editor.propose([REQUEST]).update) == names


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (FineTuneConfig, {"optimizer": "adamw"}),
        (FineTuneConfig, {"rank": 0}),
        (FineTuneConfig, {"c_locality": -1.0}),
        (FineTuneConfig, {"max_steps": 0}),
        (LoraConfig, {"rank": 0}),
        (LoraConfig, {"alpha": 0.0}),
    ],
)
def test_settings_that_make_no_sense_are_refused(config: type, wrong: dict[str, object]):
    with pytest.raises(EditorError, match=f"{next(iter(wrong))}.*got"):
        config(**wrong)
