"""What opening a model will take, worked out from its configuration: no weight is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from workbench.errors import ModelError
from workbench.gguf import gguf_reader, quiet_loading, unpacked_gguf
from workbench.layers import is_conv1d
from workbench.models import (
    Quantization,
    auto_class,
    default_dtype,
    device_named,
    dtype_named,
    locate,
    readable_errors,
)

# Bytes of a quantised weight; 4-bit ones have a float32 scale for each 64.
_QUANTIZED = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}
_CGROUPS = Path("/sys/fs/cgroup")  # version 2
_ROWS, _TOKENS = 32, 64  # of a comparison: 16 prompts under both models, and their continuations


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory that a model needs once it is open, and what there is.

    Args:
        source: What would be opened.
        device: Where.
        precision: How the weights would be held: "4bit", "8bit", or the dtype's name.
        parameters: Number of weights.
        weights: Bytes they take on the device.
        working: Bytes beside them for an edit and a comparison.
        unpacking: Bytes of main memory that unpacking a GGUF file takes, this first time; else 0.
        free: Bytes free on the device.
        free_main: Bytes free in main memory.
    """

    source: str
    device: str
    precision: str
    parameters: int
    weights: int
    working: int
    unpacking: int
    free: int
    free_main: int

    @property
    def needed(self) -> int:
        """Bytes on the device, once the model is open and at work."""
        return self.weights + self.working

    @property
    def fits(self) -> bool:
        """Whether the device and the main memory have room."""
        return self.needed <= self.free and self.unpacking <= self.free_main

    def __str__(self) -> str:
        text = (
            f"{self.source} needs about {size(self.needed)} on {self.device}: "
            f"{size(self.weights)} for {self.parameters:,} weights in {self.precision}, "
            f"{size(self.working)} to work with. {size(self.free)} are free"
        )
        if self.unpacking:
            text += (
                f". Unpacking it, this first time, takes {size(self.unpacking)} of main memory; "
                f"{size(self.free_main)} are free"
            )
        return f"{text}."

    def check(self) -> None:
        """Refuse a model that does not fit.

        Raises:
            ModelError: It does not; the message says what it needs and what there is.
        """
        if not self.fits:
            raise ModelError(
                f"There is not enough memory, so nothing was opened. {self} {self.advice}"
            )

    @property
    def advice(self) -> str:
        """What to do where it does not fit."""
        smaller = [name for name in _QUANTIZED if _QUANTIZED[name] < self._bytes_each]
        ways = f"hold its weights in {' or '.join(smaller)}, " if smaller else ""
        return f"Free some, {ways}or open a smaller model."

    @property
    def _bytes_each(self) -> float:
        return _QUANTIZED.get(self.precision) or getattr(torch, self.precision).itemsize


def estimate_memory(
    source: str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str | None = None,
    quantize: Quantization | None = None,
    device_map: str | None = None,
) -> MemoryEstimate:
    """Estimate what `open_model` with the same arguments will take; nothing is opened.

    A hub id that is not in the local cache has its configuration fetched, no more.

    Args:
        source: None for the embedded default; a `.gguf` file; a folder; or a hub id.
        device: "auto" (CUDA if there is one, else the CPU), or any torch device.
        dtype: None for what `open_model` would take.
        quantize: "8bit", "4bit" or None.
        device_map: "auto", ...: all cards and main memory together count as the device.

    Raises:
        ModelError: The source cannot be found or read, or is no kind of model handled here.
    """
    device, dtype = device_named(device), dtype_named(dtype)
    name, location = locate(source)
    unpacking = 0
    if location.suffix == ".gguf":
        dtype = dtype or default_dtype(device)
        folder = unpacked_gguf(location, Path(name).stem, dtype)
        if folder is None:
            shape = _gguf_shape(location)
            # The dense weights, the file, and its largest tensor twice while it is unpacked.
            unpacking = shape.parameters * dtype.itemsize
            unpacking += location.stat().st_size + 2 * 4 * shape.largest
        else:
            shape, dtype = _shape(name, folder, dtype, device)
    else:
        shape, dtype = _shape(name, location, dtype, device)
    each = _QUANTIZED.get(quantize or "", dtype.itemsize)
    free_main = _free_main()
    cards = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return MemoryEstimate(
        source=name,
        device="all devices" if device_map else str(device),
        precision=quantize or str(dtype).removeprefix("torch."),
        parameters=shape.parameters,
        weights=int(shape.linear * each)
        + (shape.parameters - shape.linear - shape.single) * dtype.itemsize
        + shape.single * torch.float32.itemsize,
        # Keys and values, the next token's logits in float32 (three at a time), one matrix dense.
        working=_ROWS * (_TOKENS * shape.cache * dtype.itemsize + 3 * 4 * shape.vocabulary)
        + 4 * shape.largest,
        unpacking=unpacking,
        free=sum(map(free_on, cards), free_main) if device_map else free_on(device),
        free_main=free_main,
    )


@dataclass(frozen=True)
class _Shape:
    """Counts of a model's numbers: all weights, those that bitsandbytes quantises, those that stay
    in float32 in any case, the largest matrix's, keys and values of one token, the vocabulary."""

    parameters: int
    linear: int
    single: int
    largest: int
    cache: int
    vocabulary: int


def _shape(
    name: str, location: Path, dtype: torch.dtype | None, device: torch.device
) -> tuple[_Shape, torch.dtype]:
    """Counts from a model without memory, and the dtype its weights would have."""
    from transformers import AutoConfig

    with quiet_loading(bars=False), readable_errors(name, location):
        path = str(location) if location.is_dir() else name
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        dtype = dtype or default_dtype(device, config)
        with torch.device("meta"):
            model = auto_class(config)[1].from_config(config, trust_remote_code=False)
    text: Any = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1
    shared = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    counts = [parameter.numel() for parameter in model.parameters()]
    cache = 2 * text.num_hidden_layers * shared * width
    linear, single = _quantised(model), _in_float32(model, dtype)
    return _Shape(sum(counts), linear, single, max(counts), cache, text.vocab_size), dtype


def _quantised(model: Any) -> int:
    """Number of weights that bitsandbytes would quantise: T5's `wo`, for one, it leaves."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    left = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    return sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or is_conv1d(module)) and should_convert_module(name, left)
    )


def _in_float32(model: Any, dtype: torch.dtype) -> int:
    """Number of weights that transformers holds in float32 where all others have this dtype."""
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype)  # by patterns of names
    if not plan:
        return 0
    kept, *_ = build_glob_alternation(list(plan))
    return sum(p.numel() for name, p in model.named_parameters() if kept.search(name))


def _gguf_shape(file: Path) -> _Shape:
    """Counts from a GGUF file's header."""
    try:
        reader = gguf_reader(file)
        kind = reader.fields["general.architecture"].contents()

        def value(key: str) -> int:  # of the widest layer, where they differ
            return int(np.max(reader.fields[f"{kind}.{key}"].contents()))

        heads = value("attention.head_count")
        grouped = f"{kind}.attention.head_count_kv" in reader.fields
        shared = value("attention.head_count_kv") if grouped else heads
        cache = 2 * value("block_count") * shared * value("embedding_length") // heads
        counts = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
        largest = max(counts.values())
        vocabulary = len(reader.fields["tokenizer.ggml.tokens"].data)
    except Exception as error:  # of damaged files, anything
        raise ModelError(
            f"{file} cannot be read as a GGUF file ({error!r}): fetch it again, or give the "
            "model's safetensors folder instead."
        ) from None
    linear = sum(
        int(tensor.n_elements)
        for tensor in reader.tensors
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1
    )
    return _Shape(sum(counts.values()), linear, 0, largest, cache, vocabulary)


def free_on(device: torch.device) -> int:
    """Bytes free on a device; what PyTorch holds there unused counts as free."""
    if device.type != "cuda":
        return _free_main()
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def _free_main() -> int:
    """Bytes of main memory that are free: of the machine, or of the container where it has less."""
    free = psutil.virtual_memory().available
    own = _CGROUPS / _own_group()
    for group in (own, *own.parents):
        if not group.is_relative_to(_CGROUPS):
            break
        try:
            limit, used = (int((group / f"memory.{n}").read_text()) for n in ("max", "current"))
            stat = (group / "memory.stat").read_text()
        except (OSError, ValueError):  # no limit here
            continue
        cached = re.search(r"^inactive_file (\d+)$", stat, re.MULTILINE)  # given back when needed
        free = min(free, max(0, limit - used + int(cached[1] if cached else 0)))
    return free


def _own_group() -> str:
    try:
        return Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
    except OSError:
        return ""


def size(count: float) -> str:
    """Bytes as people write them, e.g. "513 MiB"."""
    mib = count / 2**20
    return f"{mib / 1024:,.1f} GiB" if mib >= 1024 else f"{mib:,.0f} MiB"
