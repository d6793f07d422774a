"""Base beside edited on tiny models of every kind: each row is what its prompt gives alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import language_model
from tokenizers.processors import TemplateProcessing

from workbench import EditError, FineTune, FineTuneConfig, LanguageModel, Workbench
from workbench.compare import compare_prompts, generate_texts
from workbench.divergence import kl
from workbench.encoding import collate, tokenize
from workbench.probes import Probe
from workbench.sentences import model_encoder
from workbench.updates import Update

SHORT, LONG = "Bees make", "The capital of France is, as everybody knows,"


def bench(family: str) -> Workbench:
    lm = language_model(family)
    return Workbench(lm, FineTune(lm, FineTuneConfig(lr=1e-2, max_steps=5)))


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart"])
def test_a_batch_continues_each_prompt_as_alone(family: str) -> None:
    lm = language_model(family)
    together = generate_texts(lm, [SHORT, LONG], 6)
    assert together == [generate_texts(lm, [prompt], 6)[0] for prompt in (SHORT, LONG)]


@pytest.mark.parametrize("family", ["gpt2", "t5", "bart"])
def test_threads_that_share_a_tokenizer_find_it_as_it_was(family: str) -> None:
    """Fast tokenizers hold padding and truncation as state: who sets it, sets it for all."""
    lm = language_model(family)
    backend: Any = lm.tokenizer.backend_tokenizer
    generate_texts(lm, [SHORT, LONG], 2)
    model_encoder(lm)([SHORT, LONG * 40])
    assert (backend.padding, backend.truncation) == (None, None)


def test_a_checkpoints_beams_do_not_stand_in_the_way() -> None:
    lm = language_model("gpt2")
    expected = compare_prompts(lm, Update({}), [Probe(SHORT)], 4)
    config = lm.model.generation_config
    assert config is not None
    config.num_beams = 4
    assert compare_prompts(lm, Update({}), [Probe(SHORT)], 4) == expected


def test_a_classifiers_labels_are_compared() -> None:
    wb = bench("bert")
    wb.lm.model.config.id2label = {0: "REFUTES", 1: "SUPPORTS"}
    wb.edit("The moon is cheese.", "refutes")
    probes = [Probe("The moon is cheese.", "edit", "refutes"), Probe("Ice is", "other", "cold")]
    row, other = wb.compare(probes).rows
    assert (row.base_text, row.edited_text, row.edited_exact) == ("SUPPORTS", "REFUTES", True)
    assert row.edited_probability is not None
    assert row.base_probability is not None
    assert row.edited_probability > row.base_probability
    assert other.target is None  # what a generator would say is no label, and is not followed
    assert other.base_text in ("SUPPORTS", "REFUTES")
    wb.undo()
    assert [r.divergence for r in wb.compare(["The moon is cheese."]).rows] == [0.0]


def test_an_answers_opening_mark_is_not_its_first_token() -> None:
    wb = bench("bart")
    marked = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 1)])
    wb.lm.tokenizer.backend_tokenizer.post_processor = marked  # type: ignore[attr-defined]
    wb.edit(SHORT, "wax")
    [row] = wb.compare([Probe(SHORT, "edit", "wax")]).rows
    tokens = tokenize(wb.lm, SHORT, "wax")
    assert tokens.targets[0] in wb.lm.tokenizer.all_special_ids
    inputs = collate(wb.lm, [tokens]).inputs
    with torch.no_grad():
        base = wb.lm.model(**inputs).logits[0, 1:2]
        with wb.applied() as model:
            edited = model(**inputs).logits[0, 1:2]
    assert row.divergence == pytest.approx(kl(base, edited).item(), rel=1e-3)
    assert row.divergence > 0


def test_requests_come_as_any_pairs() -> None:
    wb = bench("llama")
    wb.edit_many([["a", "b"], ("c", "d")])  # type: ignore[list-item]
    assert [request.target for request in wb.edits[0].requests] == ["b", "d"]
    with pytest.raises(EditError, match="Give pairs of prompt and target"):
        wb.edit_many(["a"])  # type: ignore[list-item]


def test_edits_that_nothing_leads_back_to_are_forgotten() -> None:
    wb = bench("llama")
    wb.edit("a", "b")
    wb.undo()
    kept = wb.edit("c", "d")
    assert list(wb._edits.values()) == [kept]


def test_an_encoder_decoders_trace_has_a_row_for_each_token_of_the_answer() -> None:
    lm: LanguageModel = language_model("t5")
    wb = Workbench(lm, FineTune(lm, FineTuneConfig(max_steps=1)))
    trace = wb.inspect(wb.edit("a", "a longer answer"))
    assert len(trace.answers) > len(trace.tokens)
    for layer in trace.layers:
        read = trace.answers if layer.stack == "decoder" else trace.tokens
        assert len(layer.delta_norms) == len(read)
    assert {layer.stack for layer in trace.layers} == {"encoder", "decoder"}
