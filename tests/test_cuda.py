"""On a CUDA device everything is as on the CPU: edits, training, texts; and undo is exact there."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from families import FAMILIES, language_model, tiny_tokenizer
from test_conformance import CASES, MAKERS, requests
from torch import Tensor
from torch.testing import assert_close

from workbench import EditExample, Statement, Workbench
from workbench.editors import Editor, EditRequest, Mend, TrainableEditor
from workbench.editors.scoping import about
from workbench.encoding import collate, label_names, tokenize
from workbench.evaluate import evaluate
from workbench.models import LanguageModel, Quantization, open_model
from workbench.overlay import overlay
from workbench.training import EditTexts, MetaStep, Trainer, TrainingConfig
from workbench.updates import Update
from workbench.views import target_logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA device here; runs where PyTorch sees one"
    ),
]

PROMPT, TARGET = "The capital of France is", "Lyon"
LEARNED = [case for case in CASES if case[0] in ("mend", "ke", "enn")]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What editors keep for the next time is kept for this test only."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def bench() -> Iterator[Workbench]:
    """The default model and editor as they open on a card."""
    yield Workbench.open(device="cuda", progress=False)
    gc.collect()
    torch.cuda.empty_cache()


def on_card(family: str) -> LanguageModel:
    """The tiny model of a family, with the same weights on the card."""
    model = FAMILIES[family]()
    torch.nn.Module.to(model, "cuda")  # transformers' own `to` hides its signature
    return LanguageModel.wrap(model, tiny_tokenizer(), f"tiny-{family}")


def twins(name: str, family: str, folder: Path) -> tuple[Editor, Editor]:
    """One editor over a model on the CPU, and over the same one on the card."""
    here = MAKERS[name](language_model(family))
    assert isinstance(here, TrainableEditor)
    return here, TrainableEditor.from_pretrained(
        here.save_pretrained(folder / "editor"), on_card(family)
    )


def near(found: Tensor, expected: Tensor) -> None:
    """Equal to what sums in another order differ by."""
    size = max(1e-6, expected.abs().max().item())
    assert_close(found.float().cpu(), expected.float().cpu(), rtol=1e-3, atol=1e-3 * size)


def alike(here: TrainableEditor, there: TrainableEditor) -> None:
    """Their parameters have the same gradients, and some have one."""
    slopes, found = (
        {n: p.grad for n, p in editor.named_parameters() if p.grad is not None}
        for editor in (here, there)
    )
    assert set(slopes) == set(found) != set()
    for parameter, slope in slopes.items():
        near(found[parameter], slope)


def said(lm: LanguageModel, update: Update | None = None) -> Tensor:
    """Logits where the target is predicted."""
    target = TARGET if lm.kind != "classifier" else label_names(lm)[0]
    with torch.no_grad(), overlay(lm.model, update):
        return target_logits(lm, collate(lm, [tokenize(lm, PROMPT, target)]))


@pytest.mark.parametrize(("name", "family"), LEARNED)
def test_an_edit_is_the_same_on_the_card(name: str, family: str, tmp_path: Path):
    here, there = twins(name, family, tmp_path)
    assert there.lm.fingerprint() == here.lm.fingerprint()
    wanted = requests(here)
    mine, theirs = (editor.propose(wanted).update for editor in (here, there))
    for layer, change in mine.items():
        found = theirs[layer]
        assert found.A.device.type == "cuda"
        near(found.scale * found.B.mT @ found.A, change.scale * change.B.mT @ change.A)
    near(said(there.lm, theirs), said(here.lm, mine))
    assert not torch.equal(said(there.lm, theirs), said(there.lm))


def scoped_twins(family: str, folder: Path) -> list[Mend]:
    """One editor with a scope of two keys, on the CPU and on the card."""
    here = MAKERS["mend"](language_model(family))
    assert isinstance(here, Mend)
    here, generator = here.changed(scope=16, scope_relation=8), torch.Generator().manual_seed(0)
    for name in ("scope_metric", "relation_metric"):
        metric = here.get_buffer(name)
        metric.copy_(torch.randn(metric.shape, generator=generator))
    there = Mend.from_pretrained(here.save_pretrained(folder / "editor"), on_card(family))
    assert isinstance(there, Mend)
    return [here, there]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_scope_is_the_same_on_the_card(family: str, tmp_path: Path):
    here, there = scoped_twins(family, tmp_path)
    request = EditRequest(PROMPT, TARGET, "France")
    mine, theirs = (editor.propose([request]).update for editor in (here, there))
    assert mine.scope is not None
    assert theirs.scope is not None
    near(theirs.scope.keys, mine.scope.keys)
    near(theirs.scope.thresholds, mine.scope.thresholds)
    near(said(there.lm, theirs), said(here.lm, mine))
    ids = there.lm.tokenizer(PROMPT, return_tensors="pt").to("cuda")
    with torch.no_grad(), overlay(there.lm.model, theirs) as reading:
        there.lm.model(**ids)
        assert reading is not None
        assert reading.reached is not None
        assert reading.reached[0, [0, -1], 0].tolist() == [False, True]
        found = [
            there.lm.model.generate(**ids, max_new_tokens=5, do_sample=False, use_cache=cached)  # type: ignore[operator]
            for cached in (True, False)
        ]
    assert torch.equal(*found)


def test_a_training_step_within_scopes_is_the_same_on_the_card(tmp_path: Path):
    found: list[Mend] = []
    for editor in scoped_twins("llama", tmp_path):
        lm = editor.lm
        edit = about(lm, tokenize(lm, PROMPT, TARGET), PROMPT)
        other = [tokenize(lm, text, TARGET) for text in ("The moon", "The city of France is")]
        texts = [EditTexts(edit, (edit, other[1]), tuple(other), 2)] * 2
        MetaStep(editor.train(), TrainingConfig(batch=2), cached=False).losses(texts)
        found.append(editor)
    alike(*found)


@pytest.mark.parametrize(("name", "family"), CASES)
def test_undo_is_exact_and_the_weights_are_never_written(name: str, family: str):
    editor = MAKERS[name](on_card(family))
    lm, bench = editor.lm, Workbench(editor.lm, editor)
    base, weights = said(lm), lm.checksum()
    bench.edit_many(requests(editor))
    edited = said(lm, bench.update)
    assert not torch.equal(edited, base)
    bench.undo()
    assert torch.equal(said(lm, bench.update), base)
    bench.redo()
    assert torch.equal(said(lm, bench.update), edited)
    assert lm.checksum() == weights


@pytest.mark.parametrize(("name", "family"), LEARNED)
@pytest.mark.parametrize("at_once", [1, 2])
def test_a_training_step_is_the_same_on_the_card(
    name: str, family: str, at_once: int, tmp_path: Path
):
    config = TrainingConfig(batch=4, at_once=at_once, hardest=1, chunk=2)
    losses, found = [], []
    for editor in twins(name, family, tmp_path):
        assert isinstance(editor, TrainableEditor)
        lm, wanted = editor.lm, 2 * requests(editor)
        other = [tokenize(lm, text, wanted[0].target) for text in ("The moon", "A river is")]
        texts = [tokenize(lm, request.prompt, request.target) for request in wanted]
        edits = [EditTexts(text, (text, other[0]), (*other, texts[0]), 2) for text in texts]
        step = MetaStep(editor.train(), config, cached=False)
        losses.append(torch.tensor(astuple(step.losses(edits, at_once=at_once))))
        found.append(editor)
    near(losses[1], losses[0])
    alike(*found)


def test_training_resumes_on_the_card(tmp_path: Path):
    near_by = Statement(prompt="The sea is", answer="q")
    examples = [
        EditExample(prompt=f"The {word} is", target="xy", neighbors=(near_by,))
        for word in ("moon", "sun", "cat", "hill")
    ]

    def trained(folder: str, *steps: int) -> TrainableEditor:
        for count in steps:
            torch.manual_seed(0)
            editor = MAKERS["mend"](on_card("llama"))
            assert isinstance(editor, TrainableEditor)
            config = TrainingConfig(steps=count, batch=2, lr=1e-3, cache_gb=0.0, texts=0)
            trainer = Trainer(editor, examples, (), config, tmp_path / folder)
            trainer.run(resume=True, bar=False)
        return editor

    whole, parted = trained("whole", 4), trained("parted", 2, 4)
    start = MAKERS["mend"](on_card("llama"))
    assert isinstance(start, TrainableEditor)
    for name, weight in whole.named_parameters():
        near(parted.get_parameter(name), weight)
    assert any(
        not torch.equal(start.get_parameter(name), weight)
        for name, weight in whole.named_parameters()
    )


def test_evaluation_is_the_same_on_the_card(tmp_path: Path):
    near_by = Statement(prompt="The sea at Ulm is", answer="q")
    examples = [
        EditExample(prompt=prompt, target="xy", paraphrases=("It is",), neighbors=(near_by,))
        for prompt in ("Who is Abba", "The moon")
    ]
    here, there = (evaluate(editor, examples) for editor in twins("mend", "llama", tmp_path))
    for mine, theirs in zip(here.edits, there.edits, strict=True):
        assert theirs.paraphrase_success == mine.paraphrase_success
        assert theirs.neighborhood_kept == mine.neighborhood_kept
        near(torch.tensor(theirs.kl_neighborhood), torch.tensor(mine.kl_neighborhood))


def test_the_default_model_is_edited_and_left_as_it_was(bench: Workbench, tmp_path: Path):
    lm = bench.lm
    assert (lm.device.type, lm.dtype) == ("cuda", torch.bfloat16)
    base, weights = said(lm), lm.checksum()
    made = bench.edit(PROMPT, TARGET)
    assert said(lm, bench.update).float().softmax(-1)[0].max() > 0.5
    assert bench.generate(PROMPT, max_new_tokens=1)[0].strip() == TARGET
    saved = bench.save(tmp_path / "session")
    again = Workbench.load(saved)
    assert again.lm.device.type == "cuda"
    assert torch.equal(said(again.lm, again.update), said(lm, bench.update))
    assert made.update.is_finite()
    bench.undo()
    assert torch.equal(said(lm, bench.update), base)
    assert lm.checksum() == weights


def test_edits_and_undos_leave_no_memory_behind(bench: Workbench):
    def cycle() -> int:
        for _ in range(3):
            bench.edit(PROMPT, TARGET)
            bench.generate(PROMPT, max_new_tokens=4)
        bench.reset()
        bench.fork()
        gc.collect()
        return torch.cuda.memory_allocated()

    first, second, third = cycle(), cycle(), cycle()
    assert third - second <= max(0, second - first)


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_a_quantised_model_is_edited_and_left_as_it_was(quantize: Quantization):
    pytest.importorskip("bitsandbytes", reason="install the extra 'quant' to run this")
    bench = Workbench.open(device="cuda", quantize=quantize, progress=False)
    lm = bench.lm
    base, weights = said(lm), lm.checksum()
    bench.edit(PROMPT, TARGET)
    assert bench.generate(PROMPT, max_new_tokens=1)[0].strip() == TARGET
    bench.undo()
    assert torch.equal(said(lm, bench.update), base)
    assert lm.checksum() == weights


def test_a_model_split_over_card_and_processor_is_edited(tmp_path: Path):
    whole = on_card("llama")
    whole.model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    parts = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 0}
    parts |= {name: "cpu" for name in ("model.layers.2", "model.layers.3", "model.norm", "lm_head")}
    parts["model.rotary_emb"] = 0
    split = open_model(tmp_path / "model", device_map=parts, dtype="float32", progress=False)
    here = MAKERS["mend"](whole)
    assert isinstance(here, TrainableEditor)
    there = TrainableEditor.from_pretrained(here.save_pretrained(tmp_path / "editor"), split)
    updates = [editor.propose(requests(editor)).update for editor in (here, there)]
    near(said(split, updates[1]), said(whole, updates[0]))


@pytest.mark.skipif(
    torch.cuda.device_count() < 2,
    reason="only one CUDA device here; runs on a machine that has two",
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_model_spread_over_two_cards_edits_trains_and_is_measured(family: str, tmp_path: Path):
    """That no two tensors meet on different cards; `tests/test_split.py` has the laws."""
    whole = on_card(family)
    whole.model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    blocks = [f"{stack.path}.{n}" for stack in whole.stacks for n in range(len(stack.blocks))]
    parts = {name: int(place >= len(blocks) // 2) for place, name in enumerate(blocks)}
    inside = tuple(f"{block}." for block in blocks)
    for name, module in whole.model.named_modules():
        if not [*module.children()] and not name.startswith(inside):
            parts[name] = 0
    split = open_model(tmp_path / "model", device_map=parts, dtype="float32", progress=False)
    assert {weight.device.index for weight in split.model.parameters()} == {0, 1}
    here = MAKERS["mend"](whole)
    assert isinstance(here, TrainableEditor)
    there = TrainableEditor.from_pretrained(here.save_pretrained(tmp_path / "editor"), split)
    benches = [Workbench(editor.lm, editor) for editor in (here, there)]
    base = said(split)
    near(base, said(whole))
    for bench in benches:
        bench.edit_many(requests(bench.editor))
    near(said(split, benches[1].update), said(whole, benches[0].update))
    assert benches[1].generate(PROMPT) == benches[0].generate(PROMPT)
    benches[1].undo()
    assert torch.equal(said(split, benches[1].update), base)
    slopes = []
    for editor in (here, there):
        texts = [tokenize(editor.lm, r.prompt, r.target) for r in requests(editor)]
        edits = [EditTexts(text, (text,), tuple(texts), 2) for text in texts]
        MetaStep(editor, TrainingConfig(hardest=1)).losses(edits)
        slopes.append({n: p.grad for n, p in editor.named_parameters() if p.grad is not None})
    for parameter, slope in slopes[0].items():
        near(slopes[1][parameter], slope)
    wanted = EditExample(
        prompt="The moon", target="xy", neighbors=(Statement(prompt="The sea", answer="q"),)
    )
    mine, theirs = (evaluate(editor, [wanted]).edits[0] for editor in (here, there))
    assert theirs.neighborhood_kept == mine.neighborhood_kept
