"""The memory estimate: what an opened model takes, known before a weight is read."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import torch
from families import FAMILIES, tiny_tokenizer

from workbench import memory
from workbench.errors import ModelError
from workbench.memory import MemoryEstimate, estimate_memory, size
from workbench.models import Quantization, open_model

if TYPE_CHECKING:
    from workbench.models import LanguageModel


def saved(folder: Path, family: str, **settings: int) -> Path:
    """A tiny model's folder."""
    partial(FAMILIES[family], **settings)().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart", "bert", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_those_of_the_opened_model(family: str, dtype: torch.dtype, tmp_path: Path):
    folder = saved(tmp_path, family)
    found = estimate_memory(folder, device="cpu", dtype=dtype)
    opened = open_model(folder, device="cpu", dtype=dtype, progress=False)
    parameters = list(opened.model.parameters())
    assert found.parameters == sum(p.numel() for p in parameters)
    assert found.weights == sum(p.numel() * p.itemsize for p in parameters)
    assert found.precision == opened.precision
    assert found.working > 0


# Rows whose lengths are multiples of 64, of which each has a scale in 4-bit; T5 keeps its `wo`.
QUANTISABLE = {
    "gpt2": {"n_embd": 64},
    "llama": {"hidden_size": 64, "intermediate_size": 128},
    "t5": {"d_model": 64, "d_ff": 128},
    "t5_gated": {"d_model": 64, "d_ff": 128},
    "bart": {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128},
}


@pytest.mark.parametrize("family", QUANTISABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_quantised_weights_take_what_they_take(
    family: str, dtype: torch.dtype, quantize: Quantization, tmp_path: Path
):
    pytest.importorskip("bitsandbytes", reason="install the extra 'quant' to run this")
    folder = saved(tmp_path, family, **QUANTISABLE[family])
    found = estimate_memory(folder, device="cpu", dtype=dtype, quantize=quantize)
    opened = open_model(folder, device="cpu", dtype=dtype, quantize=quantize, progress=False)
    assert found.precision == quantize
    held = 0
    for parameter in opened.model.parameters():
        held += parameter.numel() * parameter.itemsize
        if state := getattr(parameter, "quant_state", None):
            held += state.absmax.numel() * state.absmax.itemsize
    assert found.weights == held
    assert found.weights < estimate_memory(folder, device="cpu", dtype=dtype).weights


def test_no_weight_is_read(tmp_path: Path):
    folder = saved(tmp_path, "llama")
    whole = estimate_memory(folder, device="cpu")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    without = estimate_memory(folder, device="cpu")
    assert replace(without, free=0, free_main=0) == replace(whole, free=0, free_main=0)


def test_a_gguf_file_is_estimated_from_its_header(
    default_model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    unpacked = estimate_memory(device="cpu")
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    found = estimate_memory(device="cpu")
    assert unpacked.unpacking == 0 < found.weights < found.unpacking
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    for name in ("source", "precision", "parameters", "weights", "working"):
        assert getattr(found, name) == getattr(unpacked, name)
    assert found.parameters == sum(p.numel() for p in default_model.model.parameters())


def test_a_damaged_gguf_file_is_named(tmp_path: Path):
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"not a model" * 100)
    with pytest.raises(ModelError, match=r"broken.gguf cannot be read as a GGUF file"):
        estimate_memory(file, device="cpu")


def test_what_is_free_is_the_systems_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = saved(tmp_path, "gpt2")
    real = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(available=1000))
    found = estimate_memory(folder, device="cpu")
    assert found.free == found.free_main == 1000
    assert not found.fits


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = saved(tmp_path / "model", "gpt2")
    groups = tmp_path / "cgroup"
    groups.mkdir()
    monkeypatch.setattr(memory, "_CGROUPS", groups)
    unlimited = estimate_memory(folder, device="cpu").free
    (groups / "memory.current").write_text("5000\n")
    (groups / "memory.stat").write_text("anon 4000\ninactive_file 700\nactive_file 300\n")
    for limit, free in (("max", unlimited), ("6000", 1700), ("4000", 0)):
        (groups / "memory.max").write_text(f"{limit}\n")
        found = estimate_memory(folder, device="cpu").free
        assert found == pytest.approx(free, rel=0.5 if limit == "max" else 0)


ESTIMATE = MemoryEstimate("big", "cpu", "float32", 10, 40, 8, 0, 48, 48)


def test_a_model_that_does_not_fit_is_refused_with_the_numbers():
    assert ESTIMATE.needed == 48
    ESTIMATE.check()
    gib = 2**30
    large = replace(ESTIMATE, weights=30 * gib, working=2 * gib, free=20 * gib, free_main=20 * gib)
    with pytest.raises(ModelError, match=r"32\.0 GiB on cpu.*20\.0 GiB are free.*8bit or 4bit"):
        large.check()
    with pytest.raises(ModelError, match="hold its weights in 4bit, or"):
        replace(large, precision="8bit").check()
    with pytest.raises(ModelError, match=r"Free some, or open a smaller model"):
        replace(large, precision="4bit").check()


def test_unpacking_needs_main_memory_whatever_the_device():
    on_card = replace(ESTIMATE, device="cuda:0", unpacking=100, free_main=99)
    assert not on_card.fits
    with pytest.raises(ModelError, match="Unpacking"):
        on_card.check()
    assert replace(on_card, free_main=100).fits


def test_sources_are_refused_as_by_opening_them(tmp_path: Path):
    for source, message in (
        (tmp_path, "config.json"),
        (tmp_path / "no.gguf", "no file"),
        ("org/none", "Cannot open 'org/none'"),
    ):
        with pytest.raises(ModelError, match=message):
            estimate_memory(source, device="cpu")


def test_sizes_are_written_for_people():
    assert size(513 * 2**20) == "513 MiB"
    assert size(2**40) == "1,024.0 GiB"


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device here; runs where PyTorch sees one"
)
def test_on_a_card_its_own_memory_counts(tmp_path: Path):
    found = estimate_memory(saved(tmp_path, "llama"), device="cuda")
    assert 0 < found.free <= torch.cuda.get_device_properties(0).total_memory
    assert found.precision == "bfloat16"
