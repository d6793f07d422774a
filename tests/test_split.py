"""A model spread over several devices edits, trains and speaks as on one.

Here blocks lie by turns in memory and on the disk, which the same hooks of accelerate serve: what
moves weights and activations is tested. Only a machine with several cards shows that no two tensors
meet on different ones: `tests/test_cuda.py` has those tests.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from families import FAMILIES, tiny_tokenizer
from runs import editor_for, edits_for, examples, requests_for
from torch.testing import assert_close

from workbench import Workbench
from workbench.__main__ import main
from workbench.editors import TrainableEditor
from workbench.editors.enn import Enn
from workbench.encoding import collate
from workbench.errors import EditorError, ModelError
from workbench.evaluate import EvaluationConfig, evaluate
from workbench.models import LanguageModel, open_model
from workbench.training import MetaStep, TrainingConfig
from workbench.views import target_logits

torch.set_num_threads(1)
# What lies beside the blocks: a tied head, two stacks, and neither.
PARTS = {
    "llama": ("model", ("embed_tokens", "norm", "rotary_emb"), ("layers",)),
    "gpt2": ("transformer", ("wte", "wpe", "ln_f"), ("h",)),
    "t5": ("", ("shared", "encoder.embed_tokens", "decoder.embed_tokens"), ("encoder", "decoder")),
}


class Pair(NamedTuple):
    """The same editor over a model in one place, and over the same model in parts."""

    whole: TrainableEditor
    split: TrainableEditor
    embedded: str


def places(family: str, embeddings: str) -> dict[str, str]:
    """Blocks by turns in memory and on the disk; embeddings, and a tied head, where that says."""
    if family == "t5":
        found = dict.fromkeys(PARTS["t5"][1], embeddings) | {"lm_head": embeddings}
        for stack in ("encoder", "decoder"):
            found |= {f"{stack}.block.{n}": "cpu" if n % 2 else "disk" for n in range(3)}
            found |= {f"{stack}.{part}": "cpu" for part in ("final_layer_norm", "dropout")}
        return found
    root, beside, (stack,) = PARTS[family]
    found = {f"{root}.{part}": "cpu" for part in beside}
    found |= {f"{root}.{stack}.{n}": "disk" if n % 2 else "cpu" for n in range(4)}
    head = embeddings if family == "gpt2" else "cpu"
    return found | {f"{root}.{beside[0]}": embeddings, "lm_head": head}


@pytest.fixture(scope="module", params=[(f, e) for f in PARTS for e in ("cpu", "disk")], ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    family, embeddings = request.param
    folder = tmp_path_factory.mktemp("split")
    FAMILIES[family]().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    whole = open_model(folder / "model", device="cpu", progress=False)
    split = open_model(folder / "model", device_map=places(family, embeddings), progress=False)
    editor = editor_for(family, whole, gate=0.1)
    MetaStep(editor.train(), TrainingConfig()).losses(edits_for(whole), backward=False)
    # No warning: the weights in parts have the fingerprint of the whole.
    again = TrainableEditor.from_pretrained(editor.eval().save_pretrained(folder / "editor"), split)
    return Pair(editor, again, embeddings)


def said(lm: LanguageModel) -> torch.Tensor:
    """Logits of several texts' targets."""
    texts = [text for edit in edits_for(lm) for text in edit.equivalents]
    with torch.no_grad():
        return target_logits(lm, collate(lm, texts))


def test_the_weights_and_what_they_say_are_the_same(pair: Pair):
    whole, split = pair.whole.lm, pair.split.lm
    away = {name for name, weight in split.model.named_parameters() if weight.is_meta}
    assert len(away) > 10
    assert any("emb" in n or "wte" in n or "shared" in n for n in away) == (pair.embedded == "disk")
    assert split.device == torch.device("cpu")
    assert split.fingerprint() == whole.fingerprint()
    assert split.checksum() == whole.checksum()
    assert_close(said(split), said(whole), rtol=1e-6, atol=1e-6)


def test_an_edit_is_the_same_and_undo_is_exact(pair: Pair):
    benches = [Workbench(editor.lm, editor) for editor in (pair.whole, pair.split)]
    for bench in benches:
        base, weights = said(bench.lm), bench.lm.checksum()
        bench.edit_many(requests_for(bench.lm))
        with bench.applied():
            assert not torch.equal(said(bench.lm), base)
        bench.undo()
        with bench.applied():
            assert torch.equal(said(bench.lm), base)
        bench.redo()
        assert bench.lm.checksum() == weights
    whole, split = benches
    assert_close(dict(split.update.dense()), dict(whole.update.dense()), rtol=1e-5, atol=1e-7)
    prompts = [request.prompt for request in requests_for(whole.lm)]
    assert split.generate(prompts) == whole.generate(prompts)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_is_the_same(pair: Pair, checkpointing: bool):
    config = TrainingConfig(hardest=1, checkpointing=checkpointing)
    losses, slopes = [], []
    for editor in pair[:2]:
        editor.zero_grad(set_to_none=True)
        found = MetaStep(editor, config).losses(edits_for(editor.lm))
        losses.append(asdict(found))
        slopes.append({name: weight.grad for name, weight in editor.named_parameters()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-5, abs=1e-7)
    assert_close(slopes[1], slopes[0], rtol=1e-4, atol=1e-6)
    assert any(slope.abs().max() > 0 for slope in slopes[0].values())


def test_evaluation_is_the_same(pair: Pair):
    found = [
        evaluate(editor, examples(3), EvaluationConfig(generate=True)).means()
        for editor in pair[:2]
    ]
    values = [
        {name: mean.value for name, mean in means.items() if "seconds" not in name}
        for means in found
    ]
    assert values[1] == pytest.approx(values[0], rel=1e-4, abs=1e-6)


def test_commands_spread_a_model(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Without a card "auto" is the CPU alone."""
    spread = ["--model", tiny_model, "--device-map", "auto"]
    assert main(["edit", "The sea is", "q", *spread, "--editor", "ft"]) == 0
    evaluation = ["evaluate", "--data", "facts", "--limit", "1", "--editors", "ft"]
    assert main([*evaluation, *spread, "--json", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["editors"]["ft"]["n"] == 1
    with pytest.raises(SystemExit):
        main(["edit", "The sea is", "q", "--model", tiny_model, "--device-map", "sideways"])
    assert "invalid choice: 'sideways'" in capsys.readouterr().err


def test_a_session_opens_again_in_parts(tmp_path: Path):
    FAMILIES["llama"]().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    bench = Workbench.open(tmp_path / "model", device="cpu", editor="ft", progress=False)
    bench.edit("The sea is", "q")
    saved = bench.save(tmp_path / "session")
    again = Workbench.load(saved, device_map=places("llama", "disk"), progress=False)
    with bench.applied(), again.applied():
        edited = said(again.lm)
        assert_close(edited, said(bench.lm), rtol=1e-6, atol=1e-6)
    assert not torch.equal(edited, said(again.lm))


def test_what_cannot_be_spread_is_refused(tmp_path: Path):
    FAMILIES["llama"]().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="'auto', 'balanced', 'balanced_low_0', 'sequential'"):
        open_model(tmp_path / "model", device_map="sideways", progress=False)
    split = open_model(tmp_path / "model", device_map=places("llama", "cpu"), progress=False)
    with pytest.raises(EditorError, match=r"as a dense matrix in memory.*on one device"):
        Enn(split)
