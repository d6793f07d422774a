"""Where prompts end and targets begin, and whose loss is whose."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch
import transformers as hf
from families import FAMILIES, PAD, VOCAB, language_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from torch.testing import assert_close

from workbench.encoding import (
    Tokens,
    collate,
    length_groups,
    padded,
    passes,
    per_sequence_mean,
    sequence_nll,
    tokenize,
    tokenize_text,
)
from workbench.errors import EditError
from workbench.models import LanguageModel
from workbench.views import target_logits

SPECIAL = ["<pad>", "</s>", "<s>", "<unk>"]
SENTENCES = [
    "The capital of France is Paris.",
    "The mother tongue of Danielle Darrieux is French.",
    "Zürich lies in Switzerland, Łódź in Poland.",
]

# Prompt, target, the text that both make, and what the target's tokens spell.
JOINS = [
    ("The capital of France is", "Lyon", "The capital of France is Lyon", " Lyon"),
    ("The capital of France is", " Lyon", "The capital of France is Lyon", " Lyon"),
    ("The capital of France is ", "Lyon", "The capital of France is Lyon", " Lyon"),
    ("Q: Where?\nA:", "\nIn Lyon", "Q: Where?\nA:\nIn Lyon", "\nIn Lyon"),
    ("2 + 2 =", "22", "2 + 2 = 22", " 22"),
    ("Łódź liegt in", "Österreich", "Łódź liegt in Österreich", " Österreich"),
    ("日本の首都は", "大阪です", "日本の首都は 大阪です", " 大阪です"),
    ("Столица Франции —", "Лион", "Столица Франции — Лион", " Лион"),
    ("Flags: 🇫🇷", "🇨🇭👩‍🚀", "Flags: 🇫🇷 🇨🇭👩‍🚀", " 🇨🇭👩‍🚀"),
    ("I", "a", "I a", " a"),
]


def trained(
    tokenizer: Tokenizer, trainer: trainers.Trainer, template: str
) -> hf.PreTrainedTokenizerFast:
    """A real tokenizer, trained on SENTENCES; the template says where its special tokens go."""
    tokenizer.train_from_iterator(SENTENCES, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in SPECIAL]
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), SPECIAL, strict=True)),
    )


def sentencepiece(template: str) -> hf.PreTrainedTokenizerFast:
    """As of T5 and Llama 2: words begin with a mark, the first one too."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=SPECIAL, show_progress=False)
    return trained(tokenizer, trainer, template)


def wordpiece() -> hf.PreTrainedTokenizerFast:
    """As of BERT: lower-cased, without accents."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCAB, special_tokens=SPECIAL, show_progress=False
    )
    return trained(tokenizer, trainer, "<s> $A </s>")


@cache
def model_for(family: str) -> LanguageModel:
    model = FAMILIES[family]()
    if family == "bert":
        model.config.id2label = {0: "REFUTES", 1: "SUPPORTS"}
        return LanguageModel.wrap(model, wordpiece())
    seq2seq = family in ("t5", "bart")
    return LanguageModel.wrap(model, sentencepiece("$A </s>") if seq2seq else tiny_tokenizer())


@pytest.fixture(params=["llama", "t5", "bart", "bert"])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return model_for(request.param)


@pytest.fixture
def causal() -> LanguageModel:
    return model_for("llama")


def spelled(lm: LanguageModel, ids: tuple[int, ...]) -> str:
    text = lm.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


# --- prompt and target of a decoder ----------------------------------------------------------


@pytest.mark.parametrize(("prompt", "target", "joined", "spells"), JOINS)
def test_the_default_tokenizer_splits_at_the_target(
    default_model: LanguageModel, prompt: str, target: str, joined: str, spells: str
) -> None:
    tokens = tokenize(default_model, prompt, target)
    whole = (*tokens.ids, tokens.targets[-1])
    assert whole == tuple(default_model.tokenizer(joined)["input_ids"])
    assert spelled(default_model, whole) == joined
    assert spelled(default_model, tokens.targets) == spells
    assert whole[-len(tokens.targets) :] == tokens.targets
    assert spelled(default_model, whole[: -len(tokens.targets)]) + spells == joined


words = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(words.filter(str.strip), words.filter(str.strip))
def test_any_prompt_and_target_make_one_text(prompt: str, target: str) -> None:
    """The target's tokens spell the target, and before it nothing but the joining space."""
    lm = model_for("llama")
    tokens = tokenize(lm, prompt, target)
    apart = not (prompt[-1].isspace() or target[0].isspace())
    assert spelled(lm, (*tokens.ids, tokens.targets[-1])) == prompt + " " * apart + target
    assert spelled(lm, tokens.targets) == " " * apart + target


@pytest.mark.parametrize("prompt", ["The capital of France is", "The"])
def test_a_token_before_the_text_is_no_target(prompt: str) -> None:
    lm = LanguageModel.wrap(FAMILIES["llama"](), sentencepiece("<s> $A"))
    tokens = tokenize(lm, prompt, "French")
    whole = (*tokens.ids, tokens.targets[-1])
    assert whole == tuple(lm.tokenizer(f"{prompt} French")["input_ids"])
    assert whole[0] == lm.tokenizer.bos_token_id
    assert spelled(lm, tokens.targets).strip() == "French"


def test_a_plain_text_is_its_own_target(causal: LanguageModel) -> None:
    tokens = tokenize_text(causal, "abcdef")
    assert spelled(causal, tokens.ids) == "abcde"
    assert spelled(causal, tokens.targets) == "bcdef"
    cut = tokenize_text(causal, "abcdef", max_tokens=3)
    assert spelled(causal, cut.ids) == "abc"
    assert spelled(causal, cut.targets) == "bcd"
    with pytest.raises(EditError, match="at least two tokens"):
        tokenize_text(causal, "a")


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("blank", ["", " ", "\n\t"])
@pytest.mark.parametrize("family", ["gpt2", "t5", "bert"])
def test_blank_prompts_and_targets_are_refused(family: str, blank: str) -> None:
    lm = language_model(family)
    with pytest.raises(EditError, match="target is empty"):
        tokenize(lm, "a prompt", blank)
    with pytest.raises(EditError, match="prompt is empty"):
        tokenize(lm, blank, "LABEL_0")


def test_a_target_without_tokens_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    lm = LanguageModel.wrap(FAMILIES["gpt2"](), tokenizer)
    assert tokenize(lm, "~a~", " ~b").targets == tokenize(lm, "a", " b").targets
    with pytest.raises(EditError, match="no token"):
        tokenize(lm, "prompt ", "~~")


def test_texts_longer_than_the_model_reads_are_refused(causal: LanguageModel) -> None:
    assert len(tokenize(causal, "x" * 60, "abcd").ids) == 64
    with pytest.raises(EditError, match="65 tokens; this model reads at most 64"):
        tokenize(causal, "x" * 60, "abcde")
    bart = language_model("bart")
    assert len(tokenize(bart, "x" * 64, "y" * 64).targets) == 64
    for prompt, target in (("x" * 65, "y"), ("x", "y" * 65)):
        with pytest.raises(EditError, match="65 tokens"):
            tokenize(bart, prompt, target)


# --- the other kinds of model ----------------------------------------------------------------


def test_labels_of_a_classifier() -> None:
    classifier, claim = model_for("bert"), "Zürich lies in Poland."
    tokens = tokenize(classifier, claim, "supports")
    assert tokens.ids == tuple(classifier.tokenizer(claim)["input_ids"])
    assert tokens.targets == (1,)
    assert tokenize(classifier, claim, " REFUTES ").targets == (0,)
    assert tokenize(classifier, claim, "false").targets == (0,)  # as the readers name a verdict
    with pytest.raises(EditError, match=r"'maybe' is no label.*REFUTES, SUPPORTS"):
        tokenize(classifier, claim, "maybe")


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_answer_of_an_encoder_decoder(family: str) -> None:
    seq2seq = model_for(family)
    tokens = tokenize(seq2seq, "The capital of France is", "Paris.")
    tokenizer, end = seq2seq.tokenizer, seq2seq.tokenizer.eos_token_id
    assert tokens.ids == tuple(tokenizer("The capital of France is")["input_ids"])
    assert tokens.ids[-1] == tokens.targets[-1] == end
    assert tokenizer.decode(list(tokens.targets), skip_special_tokens=True) == "Paris."


# --- batches ---------------------------------------------------------------------------------

PAIRS = [("The capital of France is", "Paris"), ("The mother", "tongue"), ("a", "b")]


def texts_for(lm: LanguageModel) -> list[Tokens]:
    label = "supports"
    return [tokenize(lm, p, label if lm.kind == "classifier" else t) for p, t in PAIRS]


@pytest.mark.parametrize("left", [False, True])
def test_texts_are_padded_as_their_tokenizer_would(left: bool) -> None:
    tokenizer = tiny_tokenizer()
    read = tokenizer(["abba", "a", "Bees make"])
    expected = tokenizer.pad(
        read, padding_side="left" if left else "right", return_tensors="pt", verbose=False
    )
    ids, mask = padded(read["input_ids"], PAD, left)
    assert_close(ids, expected["input_ids"])
    assert_close(mask, expected["attention_mask"])


def test_batches_are_padded_on_the_right(lm: LanguageModel) -> None:
    texts = texts_for(lm)
    batch = collate(lm, texts)
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    assert batch.size == len(texts)
    for row, text in enumerate(texts):
        length = len(text.ids)
        assert tuple(ids[row, :length].tolist()) == text.ids
        assert set(ids[row, length:].tolist()) <= {PAD}
        assert mask[row].tolist() == [1] * length + [0] * (ids.shape[1] - length)
        mine = batch.rows == row
        assert tuple(batch.targets[mine].tolist()) == text.targets
        # The token read one position after each but the last target position is its target.
        read = batch.inputs.get("decoder_input_ids", ids)
        after = read[row][batch.columns[mine][:-1] + 1]
        assert tuple(after.tolist()) == text.targets[:-1]
        if lm.kind == "seq2seq":
            assert read[row, 0] == lm.model.config.decoder_start_token_id


def test_losses_equal_transformers_own(lm: LanguageModel) -> None:
    texts = texts_for(lm)
    batch = collate(lm, texts)
    with torch.no_grad():
        found = sequence_nll(target_logits(lm, batch), batch)
        expected = []
        for text in texts:
            ids, labels = text.ids, text.targets
            if lm.kind == "causal":
                ids = (*text.ids, text.targets[-1])
                labels = (-100,) * (len(ids) - len(text.targets)) + text.targets
            read, wanted = torch.tensor([ids]), torch.tensor([labels])
            expected.append(lm.model(input_ids=read, labels=wanted).loss)
    assert found.shape == (len(texts),)
    assert_close(found, torch.stack(expected))


def test_means_over_sequences(causal: LanguageModel) -> None:
    batch = collate(causal, texts_for(causal))
    values = torch.arange(len(batch.rows), dtype=torch.float64)
    expected = [values[batch.rows == row].mean() for row in range(batch.size)]
    assert_close(per_sequence_mean(values, batch), torch.stack(expected))


# Batches of like lengths


def test_batches_are_those_of_the_device_that_is_named():
    lm = language_model("gpt2")
    texts = [Tokens((0,) * length, (0,)) for length in (2, 200)]
    assert passes(lm, texts) == passes(lm, texts, torch.device("cpu")) == [[0], [1]]
    assert passes(lm, texts, torch.device("cuda")) == [[0, 1]]


def cost_of(groups: list[list[int]], lengths: list[int], overhead: int) -> int:
    """What a split costs: tokens with their padding, and passes."""
    return sum(len(group) * max(lengths[i] for i in group) + overhead for group in groups)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 20))
def test_texts_are_split_into_the_cheapest_batches(lengths: list[int], overhead: int):
    texts = [Tokens((0,) * length, (0,)) for length in lengths]
    groups = length_groups(texts, overhead)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    # Whatever the split, its batches' longest texts bound it: try every assignment.
    cheapest = min(
        cost_of(
            [[i for i, g in enumerate(names) if g == name] for name in set(names)],
            lengths,
            overhead,
        )
        for names in product(range(len(lengths)), repeat=len(lengths))
    )
    assert cost_of(groups, lengths, overhead) == cheapest
