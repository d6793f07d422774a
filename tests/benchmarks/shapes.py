"""Shapes of large models, with random weights made where they are to run: no download."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import transformers as hf
from accelerate import init_empty_weights
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers.quantizers.auto import AutoHfQuantizer

from workbench import LanguageModel
from workbench.data import EditExample
from workbench.models import auto_class

PRECISIONS = ("bf16", "4bit", "float32")
_TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
SHAPES: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "tiny": partial(
        hf.LlamaConfig,
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        **_TOKENS,
    ),
    # That of Llama 3.2 1B.
    "1b": partial(
        hf.LlamaConfig,
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
        **_TOKENS,
    ),
    "gpt-j-6b": partial(
        hf.GPTJConfig,
        vocab_size=50400,
        n_positions=2048,
        n_embd=4096,
        n_layer=28,
        n_head=16,
        rotary_dim=64,
        tie_word_embeddings=False,
        **_TOKENS,
    ),
    # T5 1.1, as in the paper. Without a checkpoint, transformers ties its head (0.13B) to the
    # embeddings.
    "t5-xxl": partial(
        hf.T5Config,
        vocab_size=32128,
        d_model=4096,
        d_ff=10240,
        d_kv=64,
        num_heads=64,
        num_layers=24,
        num_decoder_layers=24,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        **_TOKENS,
    ),
}


def word_tokenizer(examples: Iterable[EditExample], size: int) -> hf.PreTrainedTokenizerFast:
    """A token for each word of the examples, whose texts so get about as long as in a real model.

    Args:
        examples: Whose prompts, targets and neighbours are read.
        size: Most tokens.
    """
    texts = [
        text
        for example in examples
        for text in (
            *(example.prompt, example.target, *example.paraphrases),
            *(text for near in example.neighbors for text in (near.prompt, near.answer or "")),
        )
    ]
    words = dict.fromkeys(word for text in texts for word in text.split())
    known = ["<pad>", "</s>", "<s>", "<unk>", *words][:size]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
    )


def outline(config: hf.PretrainedConfig, precision: str) -> hf.PreTrainedModel:
    """A model without weights, its linear layers of the class that the precision takes."""
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    with init_empty_weights(include_buffers=False):
        _, automatic = auto_class(config)
        model = automatic.from_config(config, dtype=dtype)
    if precision == "4bit":
        settings = hf.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
        quantizer: Any = AutoHfQuantizer.from_config(settings, pre_quantized=False)
        quantizer.preprocess_model(model, dtype=dtype, device_map={"": "meta"})
    model.tie_weights()
    return model


@torch.no_grad()
def filled(model: hf.PreTrainedModel, precision: str, device: torch.device) -> hf.PreTrainedModel:
    """Give an outline random weights on the device, and quantise them, one layer after another."""
    dtype = model.dtype
    held: dict[nn.Parameter, nn.Parameter] = {}  # tied weights are one
    for module in model.modules():
        for name, outlined in list(module.named_parameters(recurse=False)):
            if outlined not in held:
                held[outlined] = _held(outlined, _random(name, outlined.shape, dtype, device))
            module.register_parameter(name, held[outlined])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
    if precision == "4bit":
        model.is_loaded_in_4bit = True  # type: ignore[assignment]
    return model


def random_model(
    config: hf.PretrainedConfig,
    precision: str,
    device: torch.device,
    tokenizer: hf.PreTrainedTokenizerBase,
    source: str = "random",
) -> LanguageModel:
    """A frozen model of a shape, with random weights."""
    return LanguageModel.wrap(
        filled(outline(config, precision), precision, device), tokenizer, source
    )


def _random(name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    if len(shape) > 1:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02)
    make = torch.zeros if name == "bias" else torch.ones  # of a norm
    return make(shape, dtype=dtype, device=device)


def _held(outlined: nn.Parameter, weight: Tensor) -> nn.Parameter:
    """The weight as the outline's class of parameter holds it: 4-bit ones are packed here."""
    if type(outlined) is nn.Parameter:
        return nn.Parameter(weight, requires_grad=False)
    packing = {k: vars(outlined)[k] for k in ("quant_type", "compress_statistics", "quant_storage")}
    kind: Any = type(outlined)
    return kind(weight, requires_grad=False, **packing).to(weight.device)
