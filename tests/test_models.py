"""Opening, freezing and naming models: folders, dtypes, quantisation, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from families import FAMILIES, batch_for, kind_of, language_model, tiny_tokenizer
from torch import nn

from workbench.errors import ModelError
from workbench.models import LanguageModel, open_model

torch.set_num_threads(1)


def test_wrap_freezes_the_model_and_completes_the_tokenizer():
    model = FAMILIES["llama"]().train().requires_grad_(True)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    wrapped = LanguageModel.wrap(model, tokenizer)
    assert wrapped.model is model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert wrapped.tokenizer.pad_token == "</s>"
    assert (wrapped.device, wrapped.dtype) == (torch.device("cpu"), torch.float32)
    assert (wrapped.quantization, wrapped.source) == (None, "in-memory")


@pytest.mark.parametrize("family", FAMILIES)
def test_kind(family):
    model = language_model(family)
    expected = {"bert": "classifier", "t5": "seq2seq", "t5_gated": "seq2seq", "bart": "seq2seq"}
    assert model.kind == kind_of(model.model) == expected.get(family, "causal")


def test_wrap_refuses_what_it_cannot_edit():
    with pytest.raises(ModelError, match="not Linear"):
        LanguageModel.wrap(nn.Linear(2, 2), tiny_tokenizer())  # pyright: ignore
    masked = hf.BertForMaskedLM(FAMILIES["bert"]().config)  # pyright: ignore
    with pytest.raises(ModelError, match="BertForMaskedLM neither generates"):
        LanguageModel.wrap(masked, tiny_tokenizer())
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ModelError, match="neither a pad nor an end-of-text token"):
        LanguageModel.wrap(FAMILIES["llama"](), tokenizer)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_fingerprint_and_checksum_follow_every_weight(family):
    model = language_model(family)
    twin = language_model(family)
    marks = model.fingerprint(), model.checksum()
    with torch.no_grad():
        model.model(**batch_for(model.model))
    assert marks == (model.fingerprint(), model.checksum())
    assert marks == (twin.fingerprint(), twin.checksum())
    for _, parameter in twin.model.named_parameters():
        flat = parameter.data.view(-1)
        index = flat.numel() * 2 // 3
        old = flat[index].clone()
        flat[index] = torch.nextafter(old, torch.tensor(9.0))
        assert twin.fingerprint() != marks[0]
        assert twin.checksum() != marks[1]
        flat[index] = old
    assert marks == (twin.fingerprint(), twin.checksum())


def test_fingerprint_tells_dtypes_and_heads_apart():
    model = language_model("llama")
    half = LanguageModel.wrap(FAMILIES["llama"]().bfloat16(), tiny_tokenizer())
    other = FAMILIES["llama"]()
    other.config.num_attention_heads = 8
    heads = LanguageModel.wrap(other, tiny_tokenizer())
    assert len({model.fingerprint(), half.fingerprint(), heads.fingerprint()}) == 3


def test_checksum_follows_buffers():
    model = language_model("llama")
    before = model.checksum()
    buffer = next(b for b in model.model.buffers() if b.is_floating_point() and b.numel())
    buffer.view(-1)[-1] += 1
    assert model.checksum() != before


@pytest.fixture
def saved(tmp_path):
    """A function that saves a model with the tiny tokenizer and returns its folder."""

    def save(model, **settings) -> Path:
        model.save_pretrained(tmp_path, **settings)
        tiny_tokenizer().save_pretrained(tmp_path)
        return tmp_path

    return save


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_opens_as_the_same_model(family, saved):
    model = language_model(family)
    bars = hf.utils.logging.is_progress_bar_enabled()
    verbosity = hf.utils.logging.get_verbosity()
    opened = open_model(saved(model.model), device="cpu")
    assert type(opened.model) is type(model.model)
    assert opened.kind == model.kind
    assert opened.fingerprint() == model.fingerprint()
    assert not opened.model.training
    assert not any(parameter.requires_grad for parameter in opened.model.parameters())
    assert opened.tokenizer("Hi!").input_ids == model.tokenizer("Hi!").input_ids
    inputs = batch_for(model.model, padding="left")
    torch.testing.assert_close(opened.model(**inputs).logits, model.model(**inputs).logits)
    assert hf.utils.logging.is_progress_bar_enabled() == bars
    assert hf.utils.logging.get_verbosity() == verbosity


def test_dtype(saved):
    folder = saved(FAMILIES["llama"]().bfloat16())
    assert open_model(folder, device="cpu").dtype == torch.float32
    assert open_model(folder, device="cpu", dtype="float16").dtype == torch.float16
    assert open_model(folder, device="cpu", dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8' is not known"),
        ({"dtype": "half-ish"}, "dtype='half-ish' is not known"),
        ({"quantize": "2bit"}, "quantize='2bit' is not known"),
        ({"device": "toaster"}, "device='toaster' cannot be used"),
    ],
)
def test_unknown_options(options, message, saved):
    with pytest.raises(ModelError, match=message):
        open_model(saved(FAMILIES["llama"]()), **options)


def test_pickled_weights_are_refused(saved):
    model = FAMILIES["llama"]()
    folder = saved(model)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only as pickle \(pytorch_model.bin\).*safetensors"):
        open_model(folder)


def test_remote_code_is_never_run(tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "custom.py").write_text(f"open({str(marker)!r}, 'w')\n")
    settings = {"model_type": "homemade", "auto_map": {"AutoConfig": "custom.HomemadeConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="code in it is never run"):
        open_model(tmp_path)
    assert not marker.exists()


def test_a_checkpoint_without_its_head_is_refused(saved):
    folder = saved(FAMILIES["llama"]().model)
    with pytest.raises(ModelError, match=r"lacks weights.*lm_head.weight: they would be random"):
        open_model(folder)


def test_a_checkpoint_of_another_kind_is_refused(saved):
    folder = saved(hf.BertForMaskedLM(FAMILIES["bert"]().config))  # pyright: ignore
    with pytest.raises(ModelError, match="BertForMaskedLM neither generates"):
        open_model(folder)


def test_an_unknown_source(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"Cannot open 'no-one/no-model'.*hub cannot be reached"):
        open_model("no-one/no-model")
    with pytest.raises(ModelError, match=r"no folder or \.gguf file here"):
        open_model(tmp_path / "absent")
    with pytest.raises(ModelError, match=r"There is no file .*absent\.gguf"):
        open_model(tmp_path / "absent.gguf")


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed; runs with the extra `quant`",
)
@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_quantised_layers_hide_their_storage(quantize, saved, caplog):
    config: Any = FAMILIES["llama"]().config
    config.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(config)
    folder = saved(model)
    original = LanguageModel.wrap(model, tiny_tokenizer())
    opened = open_model(folder, device="cpu", quantize=quantize)
    assert opened.quantization == quantize
    checksum = opened.checksum()
    layers, exact_layers = opened.layers(None, "all"), original.layers(None, "all")
    assert [layer.name for layer in layers] == [layer.name for layer in exact_layers]

    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    for layer, exact in zip(layers, exact_layers, strict=True):
        module: Any = layer.module
        weight = module.weight
        assert not weight.is_floating_point()
        dense = layer.dense_weight()
        if quantize == "4bit":
            reference = dequantize_4bit(weight.data, weight.quant_state)
        else:
            reference = int8_vectorwise_dequant(weight.data, module.state.SCB)
        torch.testing.assert_close(dense, reference.float(), atol=1e-4, rtol=1e-3)
        assert dense.shape == (layer.out_features, layer.in_features)
        assert layer.weight_norm() == pytest.approx(exact.weight_norm(), rel=0.03)
    inputs = batch_for(opened.model)
    with caplog.at_level(logging.WARNING):
        logits = opened.model(**inputs).logits
    assert not caplog.records
    assert (logits - original.model(**inputs).logits).norm() < 0.2 * logits.norm()
    assert opened.checksum() == checksum
