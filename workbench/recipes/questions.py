"""Small T5 and BART models that answer questions, trained from random weights."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from workbench.corpus import relations
from workbench.corpus.edits import fill
from workbench.encoding import collate, tokenize
from workbench.evaluate import knows
from workbench.models import LanguageModel
from workbench.recipes.fitting import FitConfig, fit
from workbench.views import target_logits

VOCABULARY, POSITIONS, WIDTH = 6144, 128, 192
PAD, EOS, BOS = "<pad>", "</s>", "<s>"
_IDS: dict[str, Any] = {
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "vocab_size": VOCABULARY,
}


# As T5 v1.1: transformers ties the embeddings all the same, but scales no outputs.
_V11: dict[str, Any] = {"decoder_start_token_id": 0, "tie_word_embeddings": False}


@dataclass(frozen=True)
class Question:
    """A prompt with its answer."""

    prompt: str
    answer: str


# Answers are short, so that blocks of the decoder cost little: it has more of them.
def _t5(form: str, inner: int) -> PreTrainedModel:
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            **_IDS,
            d_model=WIDTH,
            d_kv=WIDTH // 4,
            d_ff=inner,
            num_heads=4,
            num_layers=2,
            num_decoder_layers=4,
            feed_forward_proj=form,
            dropout_rate=0.0,
            **_V11,
        )
    )
    # T5's own embeddings begin at std 1, which Adam moves too slowly for a training this short.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.02)
    return _without_cache(model)


def _bart() -> PreTrainedModel:
    model = transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            **_IDS,
            d_model=WIDTH,
            encoder_layers=2,
            decoder_layers=4,
            encoder_ffn_dim=768,
            decoder_ffn_dim=768,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            max_position_embeddings=POSITIONS,
            dropout=0.0,
            decoder_start_token_id=1,
            forced_eos_token_id=None,
        )
    )
    return _without_cache(model)


def _without_cache(model: PreTrainedModel) -> PreTrainedModel:
    """transformers 5 sizes the cache of generation by the encoder, which has fewer blocks."""
    model.generation_config.use_cache = False
    return model


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "t5-small-qa": lambda: _t5("gated-gelu", 512),
    "t5-small-qa-ungated": lambda: _t5("relu", 768),
    "bart-small-qa": _bart,
}


def questions() -> tuple[list[Question], list[Question]]:
    """Every true fact of the built-in corpus: in four wordings to learn, in a fifth held out.

    Facts come in an order that mixes the relations, each with its wordings together.
    """
    learned, held_out = [], []
    facts = (
        (r, s, zlib.crc32(f"{r.name}|{s}".encode())) for r in relations().values() for s in r.facts
    )
    for relation, subject, key in sorted(facts, key=lambda fact: (fact[2], fact[1])):
        for place, wording in enumerate(relation.wordings):
            question = Question(fill(wording, subject), relation.facts[subject])
            (held_out if place == key % len(relation.wordings) else learned).append(question)
    return learned, held_out


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; texts end in `</s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[PAD, EOS, BOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS,
        model_max_length=POSITIONS,
    )


def train(name: str, folder: Path, config: FitConfig) -> LanguageModel:
    """Train one of `BUILDERS` until its steps are done."""
    learned, _ = questions()
    torch.manual_seed(config.seed)
    tokenizer = train_tokenizer([text for q in learned for text in (q.prompt, q.answer)])
    lm = LanguageModel.wrap(BUILDERS[name](), tokenizer, name)
    tokens = [tokenize(lm, q.prompt, q.answer) for q in learned]
    lm.model.train().requires_grad_(True)

    def loss(indices: list[int]) -> torch.Tensor:
        batch = collate(lm, [tokens[index] for index in indices])
        return torch.nn.functional.cross_entropy(target_logits(lm, batch), batch.targets)

    lengths = [len(text.ids) for text in tokens]
    fit(dict(lm.model.named_parameters()), loss, lengths, config, folder, name)
    lm.model.eval().requires_grad_(False)
    return lm


def share_exact(lm: LanguageModel, asked: Sequence[Question]) -> float:
    """Share of questions whose answer the model gives exactly."""
    return sum(knows(lm, [(q.prompt, q.answer) for q in asked])) / len(asked)


def figures(lm: LanguageModel) -> dict[str, Any]:
    """Exact match in the wordings learned, and in those held out."""
    return {
        name: {"exact_match": round(share_exact(lm, asked), 4), "n": len(asked)}
        for name, asked in zip(("wordings learned", "wording held out"), questions(), strict=True)
    }
