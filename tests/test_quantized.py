"""8-bit and 4-bit models: captured and overlaid like others, their weights never written."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from families import FAMILIES, batch_for, tiny_tokenizer
from references import edited_copy, hook_count, logits_of, losses, random_update
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from workbench import Workbench
from workbench.corpus import SENTENCES
from workbench.data import EditExample
from workbench.editors import Mend, MendConfig
from workbench.errors import ModelError
from workbench.factors import Factors, capture
from workbench.layers import EditableLayer
from workbench.models import LanguageModel, Quantization, open_model
from workbench.overlay import EditStack, overlay
from workbench.training import MetaStep, TextSampler, TrainingConfig

pytest.importorskip("bitsandbytes", reason="install the extra 'quant' to run these")
pytest.importorskip("accelerate", reason="install the extra 'quant' to run these")

# In 8-bit layers the activations are rounded too, which no matrix product does.
TOLERANCE = {"8bit": 0.02, "4bit": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved model whose widths are multiples of 64, as blockwise quantisation wants them."""
    made = tmp_path_factory.mktemp("tiny")
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    partial(FAMILIES["llama"], **small)().save_pretrained(made)
    tiny_tokenizer().save_pretrained(made)
    return str(made)


@pytest.fixture(scope="module", params=["8bit", "4bit"])
def lm(request: pytest.FixtureRequest, folder: str) -> LanguageModel:
    quantize: Quantization = request.param
    lm = open_model(folder, device="cpu", quantize=quantize, progress=False)
    assert lm.quantization == quantize
    return lm


@pytest.fixture(scope="module")
def layers(lm: LanguageModel) -> tuple[EditableLayer, ...]:
    found = lm.layers([0, 1], "all")
    assert len(found) == 14
    assert not any(layer.module.get_parameter("weight").is_floating_point() for layer in found)
    return found


@pytest.fixture(scope="module")
def dense(lm: LanguageModel, layers: tuple[EditableLayer, ...], folder: str) -> PreTrainedModel:
    """The same model with its weights dequantised."""
    twin = copy.deepcopy(open_model(folder, device="cpu", progress=False).model)
    for layer in layers:
        twin.get_submodule(layer.name).get_parameter("weight").copy_(layer.dense_weight())
    return twin


def assert_near(lm: LanguageModel, found: Tensor, expected: Tensor, passes: int = 1) -> None:
    error = torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)
    assert error < passes * TOLERANCE[str(lm.quantization)]


def test_the_dense_reference_is_the_model(lm: LanguageModel, dense: PreTrainedModel) -> None:
    inputs = batch_for(dense)
    assert_near(lm, logits_of(lm.model, inputs), logits_of(dense, inputs))


def test_an_overlay_equals_editing_the_dequantised_weights(
    lm: LanguageModel, layers: tuple[EditableLayer, ...], dense: PreTrainedModel
) -> None:
    inputs, update = batch_for(dense), random_update(layers)
    expected = logits_of(edited_copy(dense, update), inputs)
    with overlay(lm.model, update):
        found = logits_of(lm.model, inputs)
    assert_near(lm, found, expected)
    moved = torch.linalg.vector_norm(expected - logits_of(dense, inputs))
    assert moved > 0.5 * torch.linalg.vector_norm(expected)


def test_a_layers_change_is_not_rounded(
    lm: LanguageModel, layers: tuple[EditableLayer, ...]
) -> None:
    update = random_update(layers)
    for layer in layers:
        x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            base = layer.module(x)
            with overlay(lm.model, update):
                found = layer.module(x)
        assert_close(found, base + x @ update[layer.name].dense().T, rtol=1e-5, atol=1e-5)


def test_each_sequence_has_its_own_update(
    lm: LanguageModel, layers: tuple[EditableLayer, ...]
) -> None:
    inputs, batched = batch_for(lm.model), random_update(layers, batch=3)
    with overlay(lm.model, batched):
        found = logits_of(lm.model, inputs)
    for row in range(3):
        alone = batched.map(lambda factor, row=row: factor[row])
        with overlay(lm.model, alone):
            assert_near(lm, found[row], logits_of(lm.model, inputs)[row])


def test_an_editor_trains_edits_and_is_undone_over_quantised_weights(
    lm: LanguageModel, layers: tuple[EditableLayer, ...], dense: PreTrainedModel
) -> None:
    facts = (("ab is in", "cd"), ("ef is in", "gh"))
    examples = [EditExample(prompt=prompt, target=target) for prompt, target in facts]
    found = []
    for model in (lm, LanguageModel.wrap(dense, lm.tokenizer)):
        torch.manual_seed(0)
        editor = Mend(model, MendConfig(rank=8, blocks=[1], edit_lr=0.1)).train()
        config = TrainingConfig(batch=2, text_tokens=6)
        texts = TextSampler(model, examples, SENTENCES, config).batch(0)
        losses = MetaStep(editor, config).losses(texts)
        slopes = torch.cat([p.grad.flatten() for p in editor.parameters() if p.grad is not None])
        found.append((torch.tensor([losses.edit, losses.edit_before]), slopes))
        bench, inputs = Workbench(model, editor.eval()), batch_for(dense)
        base = logits_of(model.model, inputs)
        made = bench.edit("ab is in", "cd")
        with overlay(model.model, bench.update):
            edited = logits_of(model.model, inputs)
        assert made.update.is_finite()
        assert not torch.equal(edited, base)
        bench.undo()
        assert torch.equal(logits_of(model.model, inputs), base)
    for quantised, plain in zip(*found, strict=True):
        # Forwards and backwards, for the edit and with it.
        assert_near(lm, quantised, plain, passes=4)


def test_weights_of_four_bits_are_normal_floats(folder: str) -> None:
    from bitsandbytes.nn.modules import Linear4bit

    model = open_model(folder, device="cpu", quantize="4bit", progress=False)
    layers: list[Any] = [m for m in model.model.modules() if isinstance(m, Linear4bit)]
    assert {layer.weight.quant_type for layer in layers} == {"nf4"}


def test_weights_repacked_elsewhere_are_refused(folder: str) -> None:
    from bitsandbytes.nn.modules import Linear4bit

    model = open_model(folder, device="cpu", quantize="4bit", progress=False)
    layer: Any = next(m for m in model.model.modules() if isinstance(m, Linear4bit))
    layer.weight.quant_state.packing_format_for_cpu = True  # as on AVX512-BF16 processors
    with pytest.raises(ModelError, match="open the model anew"):
        LanguageModel.wrap(model.model, model.tokenizer)


def test_factors_sum_to_the_dense_gradient(
    lm: LanguageModel, layers: tuple[EditableLayer, ...], dense: PreTrainedModel
) -> None:
    inputs = batch_for(dense)
    with capture(layers) as tap:
        found: dict[str, Factors] = tap.factors(losses(lm.model, inputs).sum(), 3)
    twin = copy.deepcopy(dense).requires_grad_(True)
    losses(twin, inputs).sum().backward()
    for name, factors in found.items():
        gradient = twin.get_submodule(name).get_parameter("weight").grad
        assert gradient is not None
        assert_near(lm, factors.gradient(), gradient)
    assert all(p.grad is None and not p.requires_grad for p in lm.model.parameters())


def test_undo_restores_every_bit(lm: LanguageModel, layers: tuple[EditableLayer, ...]) -> None:
    inputs = batch_for(lm.model)
    base, checksum, hooks = logits_of(lm.model, inputs), lm.checksum(), hook_count(lm.model)
    stack = EditStack()
    for seed in range(3):
        stack.push(seed, random_update(layers, seed))
        with overlay(lm.model, stack.combined()):
            assert not torch.equal(logits_of(lm.model, inputs), base)
    while stack.can_undo:
        stack.undo()
    with overlay(lm.model, stack.combined()):
        assert torch.equal(logits_of(lm.model, inputs), base)
    assert torch.equal(logits_of(lm.model, inputs), base)
    assert lm.checksum() == checksum
    assert hook_count(lm.model) == hooks
