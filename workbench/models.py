"""Open language models and keep them frozen: from the hub, a folder, a GGUF file, or embedded."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from workbench import parallel
from workbench.checks import path_of
from workbench.errors import ModelError
from workbench.gguf import DEFAULT_MODEL as DEFAULT_MODEL
from workbench.gguf import cache_folder as cache_folder
from workbench.gguf import default_gguf, quiet_loading, unpack_gguf
from workbench.layers import Blocks, EditableLayer, Matrices, Stack, find_layers, find_stacks
from workbench.shipped import NAMES, complete, small_model
from workbench.shortage import LESS, is_shortage

if TYPE_CHECKING:  # its import takes longer than torch's, and waits until a model is opened
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Kind = Literal["causal", "seq2seq", "classifier"]
Quantization = Literal["8bit", "4bit"]

_AUTO_CLASS: dict[Kind, str] = {
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classifier": "AutoModelForSequenceClassification",
}
_IDENTITY = ("model_type", "num_attention_heads", "num_key_value_heads", "hidden_act")
_WRONG_KIND = (
    "A {} neither generates text nor classifies sequences: open a causal, sequence-to-sequence "
    "or sequence-classification model."
)
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A frozen model with its tokenizer; its weights are never written.

    Attributes:
        model: the transformers model, in eval mode, no parameter requiring grad.
        tokenizer: its tokenizer, with a pad token.
        source: what it was opened from.
        kind: "causal", "seq2seq" or "classifier".
        quantization: None, "8bit" or "4bit".
        chat: whether prompts are a user's turns, read through the tokenizer's chat template.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    kind: Kind
    quantization: Quantization | None
    chat: bool = False

    def __post_init__(self) -> None:
        if self.chat and (self.kind != "causal" or not self.tokenizer.chat_template):
            raise ModelError(
                f"{self.source} is no chat model: it is {self.kind}, and its tokenizer has "
                f"{'a' if self.tokenizer.chat_template else 'no'} chat template. Leave chat=True "
                "(--chat) out, or open a causal model with one, often called -Instruct or -it."
            )

    @classmethod
    def wrap(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        source: str = "in-memory",
        *,
        chat: bool = False,
    ) -> LanguageModel:
        """Take a model that the caller already holds: freezes it and sets eval mode.

        Args:
            model: a causal, sequence-to-sequence or sequence-classification model.
            tokenizer: its tokenizer; gets a pad token (the end-of-text token) if it has none.
            source: the name to show for it.
            chat: read prompts as a user's turns, through the tokenizer's chat template.

        Raises:
            ModelError: the model is of another kind, or sharded; the tokenizer has neither token,
                or no chat template that is asked for; or the 4-bit weights have been repacked.
        """
        parallel.refuse_shards(model)
        four, eight = (getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
        held: Quantization | None = "4bit" if four else "8bit" if eight else None
        wrapped = cls(model, tokenizer, source, _kind_of_model(model), held, chat)
        model.eval().requires_grad_(False)
        _ensure_pad_token(model, tokenizer)
        if wrapped.quantization == "4bit":
            _keep_storage(model)
        elif wrapped.quantization == "8bit":
            logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_cast_message)
        return wrapped

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        embeddings: Any = self.model.get_input_embeddings()
        weight = next(embeddings.parameters())
        if weight.is_meta and hasattr(embeddings, "_hf_hook"):  # offloaded: where it runs
            return torch.device(embeddings._hf_hook.execution_device)
        return weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations."""
        return self.model.dtype

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """The model's blocks: one stack, or encoder and decoder."""
        return find_stacks(self.model)

    def layers(
        self, blocks: Blocks = None, matrices: Matrices = "mlp"
    ) -> tuple[EditableLayer, ...]:
        """The layers to edit; see `find_layers`."""
        return find_layers(self.model, blocks, matrices)

    @property
    def precision(self) -> str:
        """How the weights are held: "4bit", "8bit", or the dtype's name."""
        return self.quantization or str(self.dtype).removeprefix("torch.")

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters by name, offloaded ones as they lie in main memory or on the disk."""
        for name, tensor in self.model.named_parameters():
            path, _, key = name.rpartition(".")
            offloaded = getattr(
                getattr(self.model.get_submodule(path), "_hf_hook", None), "weights_map", None
            )
            yield name, offloaded[key] if tensor.is_meta and offloaded is not None else tensor

    def fingerprint(self) -> str:
        """Name the weights, quickly: precision, colon, 16 hex digits of shapes, sums and samples.

        Sums of the bits as integers do not depend on the order of summation, so the same weights
        in the same precision have the same fingerprint on every machine.
        """
        digest = hashlib.sha256(type(self.model).__name__.encode())
        identity = {key: getattr(self.model.config, key, None) for key in _IDENTITY}
        digest.update(json.dumps(identity, sort_keys=True).encode())
        for name, tensor in self._weights():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            if tensor.numel() and not tensor.is_meta:
                bits = _bits(tensor)
                digest.update(str(bits.sum(dtype=torch.int64).item()).encode())
                digest.update(bits[:: max(1, bits.numel() // 64)].cpu().numpy().tobytes())
        return f"{self.precision}:{digest.hexdigest()[:16]}"

    def checksum(self) -> str:
        """Hash every byte of every parameter and buffer (sha256, 64 hex digits)."""
        digest = hashlib.sha256()
        for name, tensor in (*self._weights(), *self.model.named_buffers()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            if tensor.numel() and not tensor.is_meta:
                digest.update(_bits(tensor).cpu().numpy().data)
        return digest.hexdigest()


def open_model(
    source: str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str | None = None,
    quantize: Quantization | None = None,
    device_map: str | dict[str, Any] | None = None,
    chat: bool = False,
    progress: bool = True,
) -> LanguageModel:
    """Open a model, frozen.

    Args:
        source: None for the embedded default; the name of a small model that comes along
            (`workbench.shipped`); a `.gguf` file; a folder; or a hub id.
        device: "auto" (CUDA if there is one, else the CPU), or any torch device.
        dtype: None for float32 on the CPU, and on other devices the checkpoint's own half
            precision or bfloat16.
        quantize: "8bit" or "4bit" with bitsandbytes.
        device_map: in place of `device`, to spread a large model: "auto" over the cards, then main
            memory; or a map of modules to devices, "cpu" or "disk", as transformers takes it.
        chat: read prompts as a user's turns, through the tokenizer's chat template.
        progress: show progress of downloads and of the first, slow opening of a GGUF file.

    Raises:
        ModelError: the source cannot be found or read, or is no kind of model handled here.
    """
    from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig

    device, dtype = device_named(device), dtype_named(dtype)
    if quantize not in (None, "8bit", "4bit"):
        raise ModelError(f'quantize={quantize!r} is not known: give None, "8bit" or "4bit".')
    name, location = locate(source)
    if location.suffix == ".gguf":
        gguf_dtype = dtype or default_dtype(device)
        location = unpack_gguf(location, Path(name).stem, gguf_dtype, progress)
    location = complete(location)
    local = location.is_dir()
    with quiet_loading(progress and not local), readable_errors(name, location):
        path = str(location) if local else name
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        kind, automatic = auto_class(config)
        dtype = dtype or default_dtype(device, config)
        quantization = BitsAndBytesConfig(
            load_in_8bit=quantize == "8bit",
            load_in_4bit=quantize == "4bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
        )
        model, info = automatic.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            device_map=device_map or {"": device},
            quantization_config=quantization if quantize else None,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        if info["missing_keys"]:
            raise ModelError(
                f"{name} lacks weights that a {kind} model needs, such as "
                f"{min(info['missing_keys'])}: they would be random. Open a checkpoint that was "
                "saved with its head."
            )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    return LanguageModel.wrap(model, tokenizer, name, chat=chat)


def locate(source: str | Path | None) -> tuple[str, Path]:
    """What a model is called, and where its file or folder is, or would be: a hub id has none.

    Args:
        source: as `open_model` takes it.

    Raises:
        ModelError: a `.gguf` file is named that is not there, or the default is not installed.
    """
    name = DEFAULT_MODEL if source is None else str(source)
    found = default_gguf() if name == DEFAULT_MODEL else small_model(name)
    location = path_of(found or name, ModelError)
    if location.suffix == ".gguf" and not location.is_file():
        raise ModelError(f"There is no file {location}: give the path of a .gguf file.")
    return name, location


def default_dtype(device: torch.device, config: PretrainedConfig | None = None) -> torch.dtype:
    """The dtype that weights are opened in where none is asked for; see `open_model`."""
    if device.type == "cpu":
        return torch.float32
    return config.dtype if config is not None and config.dtype in _HALF else torch.bfloat16


def _ensure_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                "The tokenizer has neither a pad nor an end-of-text token, so texts cannot be "
                "batched: set tokenizer.pad_token to one of its tokens."
            )
        tokenizer.pad_token = tokenizer.eos_token
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id


def _keep_storage(model: PreTrainedModel) -> None:
    """Stop 4-bit layers from repacking W in their first forward pass on AVX512-BF16 processors.

    Repacking writes the weights, and the kernel that reads them has no backward.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            state = getattr(module.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                raise ModelError(
                    "The model has already run on this CPU, where bitsandbytes then repacked its "
                    "4-bit weights, and packed weights give no gradient: open the model anew with "
                    'open_model(..., quantize="4bit"), or wrap it before its first use.'
                )
            module.support_avx512bf16_for_cpu = False


def _is_no_cast_message(record: logging.LogRecord) -> bool:
    """Drop what bitsandbytes says of every 8-bit layer in every forward pass."""
    return "inputs will be cast" not in record.msg


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's memory as a flat integer tensor, of the widest integer that fits."""
    octets = tensor.detach().contiguous().flatten().view(torch.uint8)
    return octets.view(torch.int64) if octets.numel() % 8 == 0 else octets


def device_named(device: str | torch.device) -> torch.device:
    """The device, checked; "auto" is CUDA where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ModelError(
            f'device={str(device)!r} cannot be used: {error}. Give "auto", "cpu" or a device that '
            "this PyTorch sees."
        ) from error
    return device


def dtype_named(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The floating-point dtype of that name."""
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(named, torch.dtype) and named.is_floating_point):
        raise ModelError(f'dtype={dtype!r} is not known: give "float32", "bfloat16" or "float16".')
    return named


def _kind_of_model(model: nn.Module) -> Kind:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"A transformers model is needed, not {type(model).__name__}. Merge a PEFT model "
            "first: model.merge_and_unload(). What is wrapped for training is in model.module."
        )
    if type(model).__name__.endswith("ForSequenceClassification"):
        return "classifier"
    if model.can_generate():
        return "seq2seq" if model.config.is_encoder_decoder else "causal"
    raise ModelError(_WRONG_KIND.format(type(model).__name__))


def auto_class(config: PretrainedConfig) -> tuple[Kind, Any]:
    """What kind of model a configuration describes, and the class of transformers that opens it.

    Raises:
        ModelError: it is no kind of model handled here.
    """
    import transformers

    architecture = (config.architectures or [""])[0]
    saved = getattr(transformers, architecture, None)
    kind: Kind = "seq2seq" if config.is_encoder_decoder else "causal"
    if architecture.endswith("ForSequenceClassification"):
        kind = "classifier"
    elif not (saved is None or architecture.endswith("Model") or saved.can_generate()):
        raise ModelError(_WRONG_KIND.format(architecture))
    return kind, getattr(transformers, _AUTO_CLASS[kind])


@contextmanager
def readable_errors(name: str, location: Path) -> Iterator[None]:
    """Turn the loader's errors into one that says what to do."""
    try:
        yield
    except ImportError as error:
        raise ModelError(f"Cannot open {name!r}: {str(error).strip()}") from error
    except ModelError:
        raise
    except Exception as error:  # of damaged files, anything
        if is_shortage(error):
            raise ModelError(
                f"There is not enough memory to open {name!r} ({error}). {LESS}"
            ) from None
        reason = str(error).strip().split("\n")[0].rstrip(".")
        if location.is_dir():
            pickles = [p.name for p in location.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
            if pickles and not any(location.glob("*.safetensors")):
                raise ModelError(
                    f"{name} holds its weights only as pickle ({pickles[0]}), which can run code "
                    "when read. Convert it to safetensors with `model.save_pretrained(folder)` "
                    "where you trust it, and open that folder."
                ) from error
            fix = (
                "The folder needs config.json and the tokenizer's files, *.safetensors, and an "
                "architecture that transformers itself contains: code in it is never run."
            )
        else:
            fix = (
                "It is no folder or .gguf file here; as a hub id it is unknown, private, without "
                "safetensors, in need of code of its own (which is never run), or the hub cannot "
                "be reached. Check the spelling, log in with `hf auth login`, or download the "
                f"model elsewhere and give its folder. These open offline: {', '.join(NAMES)}."
            )
        raise ModelError(f"Cannot open {name!r}: {reason}. {fix}") from error
