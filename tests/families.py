"""Tiny random models of real architectures, and inputs for them, shared by the tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import transformers as hf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from workbench.models import LanguageModel

VOCAB = 99
PAD, EOS, BOS, UNK = range(4)
SPECIAL = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}


def _build(
    model: type[hf.PreTrainedModel], config: Callable[..., hf.PretrainedConfig], **settings: object
) -> hf.PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = model(config(vocab_size=VOCAB, **(SPECIAL | settings)))
    return built.float().eval().requires_grad_(False)


_GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_BERT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_T5 = {
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_layers": 3,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "decoder_start_token_id": PAD,
}
_BART = {
    "d_model": 32,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 64,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "decoder_start_token_id": EOS,
    "forced_eos_token_id": None,
}

FAMILIES: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "gpt2": partial(_build, hf.GPT2LMHeadModel, hf.GPT2Config, **_GPT2),
    "gpt_neo": partial(
        _build,
        hf.GPTNeoForCausalLM,
        hf.GPTNeoConfig,
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=4,
        max_position_embeddings=64,
    ),
    "gptj": partial(_build, hf.GPTJForCausalLM, hf.GPTJConfig, rotary_dim=4, **_GPT2),
    "gpt_neox": partial(_build, hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, **_BERT),
    "bert": partial(_build, hf.BertForSequenceClassification, hf.BertConfig, num_labels=2, **_BERT),
    "t5": partial(_build, hf.T5ForConditionalGeneration, hf.T5Config, **_T5),
    "t5_gated": partial(
        _build,
        hf.T5ForConditionalGeneration,
        hf.T5Config,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        **_T5,
    ),
    "bart": partial(_build, hf.BartForConditionalGeneration, hf.BartConfig, **_BART),
    "llama": partial(_build, hf.LlamaForCausalLM, hf.LlamaConfig, **_LLAMA),
    "mistral": partial(_build, hf.MistralForCausalLM, hf.MistralConfig, sliding_window=4, **_LLAMA),
    "qwen3": partial(_build, hf.Qwen3ForCausalLM, hf.Qwen3Config, head_dim=8, **_LLAMA),
    "gemma3": partial(
        _build, hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, head_dim=8, sliding_window=4, **_LLAMA
    ),
    "phi3": partial(_build, hf.Phi3ForCausalLM, hf.Phi3Config, **_LLAMA),
    "olmo2": partial(_build, hf.Olmo2ForCausalLM, hf.Olmo2Config, **_LLAMA),
    "mixtral": partial(
        _build, hf.MixtralForCausalLM, hf.MixtralConfig, num_local_experts=4, **_LLAMA
    ),
    "qwen2_moe": partial(
        _build,
        hf.Qwen2MoeForCausalLM,
        hf.Qwen2MoeConfig,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        **_LLAMA,
    ),
}


# Chat templates as models have them, each with what joins an answer to the turn before it.
TEMPLATES = {
    "lines": (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>\n{{ m.content | trim }}</s>\n"
        "{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}",
        "",
    ),
    "spaced": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} "
        "[/INST]{% else %} {{ m.content }} </s>{% endif %}{% endfor %}",
        " ",
    ),
    "close": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}"
        "[/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}",
        "",
    ),
}


def tiny_tokenizer(said: str = "") -> hf.PreTrainedTokenizerFast:
    """One token per printable ASCII character: real, and of VOCAB tokens with the special ones.

    Args:
        said: A text that all tokens but small letters and blanks are decoded to, with their sign.
    """
    special = ["<pad>", "</s>", "<s>", "<unk>"]
    signs = [chr(code) for code in range(32, 127)]
    tokens = special + [sign if sign.islower() or sign == " " else said + sign for sign in signs]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
    )


def chat_tokenizer(template: str) -> hf.PreTrainedTokenizerFast:
    """The tiny tokenizer with a template, which begins texts with <s> by itself as Llama's does."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    tokenizer.chat_template = template
    return tokenizer


def chat_model(template: str = "lines") -> LanguageModel:
    """A tiny Llama, opened for chats, that reads 512 tokens."""
    model = FAMILIES["llama"]()
    model.config.max_position_embeddings = 512
    return LanguageModel.wrap(model, chat_tokenizer(TEMPLATES[template][0]), "tiny", chat=True)


def language_model(family: str) -> LanguageModel:
    """A tiny model of a family with the tiny tokenizer."""
    return LanguageModel.wrap(FAMILIES[family](), tiny_tokenizer(), f"tiny-{family}")


def kind_of(model: hf.PreTrainedModel) -> str:
    """ "causal", "seq2seq" or "classifier"."""
    if type(model).__name__.endswith("ForSequenceClassification"):
        return "classifier"
    return "seq2seq" if model.config.is_encoder_decoder else "causal"


def batch_for(
    model: hf.PreTrainedModel, batch: int = 3, length: int = 7, padding: str = "right"
) -> dict[str, Tensor]:
    """A padded batch: row r has max(2, length - r) tokens, each row others, the same at each call.

    Returns:
        input_ids and attention_mask (batch, length), and labels: (batch, length) for causal
        models (-100 at padding), (batch,) for classifiers, (batch, length - 2) for seq2seq models,
        with the decoder_input_ids that belong to them.
    """
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(UNK + 1, VOCAB, (batch, length), generator=generator)
    sizes = torch.tensor([max(2, length - row) for row in range(batch)])
    mask = (torch.arange(length) < sizes[:, None]).long()
    if padding == "left":
        mask = mask.flip(1)
    inputs = {"input_ids": ids.where(mask.bool(), PAD), "attention_mask": mask}
    if kind_of(model) == "classifier":
        inputs["labels"] = torch.arange(batch) % 2
    elif kind_of(model) == "causal":
        inputs["labels"] = ids.where(mask.bool(), -100)
    else:
        target = torch.randint(UNK + 1, VOCAB, (batch, max(1, length - 2)), generator=generator)
        start = torch.full((batch, 1), model.config.decoder_start_token_id)
        inputs["labels"] = target
        inputs["decoder_input_ids"] = torch.cat([start, target[:, :-1]], dim=1)
    return inputs
