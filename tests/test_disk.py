"""What is constant in training, on disk: the same run, nothing computed twice, damage healed."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from tests.runs import RUN, TEXTS, editor_for, edits_for, examples, opened
from workbench.__main__ import main
from workbench.disk import RowsOnDisk
from workbench.errors import FileError
from workbench.training import MetaStep, Trainer, TrainingConfig
from workbench.views import TrunkCache

CONFIG = TrainingConfig(cache_gb=0.0)


def losses(family: str, folder: Path | None, cached: bool = True) -> list[float]:
    editor = editor_for(family).train()
    step = MetaStep(editor, replace(CONFIG, cache_gb=1.0), cached, folder)
    found = step.losses(edits_for(editor.lm))
    slopes = [p.grad.norm().item() for p in editor.parameters() if p.grad is not None]
    return [*asdict(found).values(), *slopes]


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was computed, not looked up."""
    kinds = list[str]()
    for name in ("_hidden_rows", "_finals"):
        method = getattr(TrunkCache, name)

        def counted(self: TrunkCache, texts: object, name: str = name, method=method):
            kinds.append(name)
            return method(self, texts)

        monkeypatch.setattr(TrunkCache, name, counted)
    return kinds


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bert"])
def test_a_later_run_reads_what_an_earlier_one_kept(
    tmp_path: Path, family: str, computed: list[str]
):
    first = losses(family, tmp_path)
    kept = files(tmp_path)
    assert computed
    computed.clear()
    assert losses(family, tmp_path) == first
    assert not computed
    assert files(tmp_path) == kept
    assert losses(family, None) == first


def test_nothing_is_held_in_memory_that_has_no_room(tmp_path: Path, computed: list[str]):
    editor = editor_for("llama")
    step = MetaStep(editor, CONFIG, cache_folder=tmp_path)
    texts = [text for edit in edits_for(editor.lm) for text in edit.locality]
    first = step.cache.finals(texts)
    computed.clear()
    assert torch.equal(step.cache.finals(texts), first)
    assert not computed
    assert not step.cache._kept


def test_other_weights_and_other_layers_have_their_own(tmp_path: Path):
    lm = opened("llama")
    one, two = lm.layers(), lm.layers()[:1]
    folders = {RowsOnDisk(tmp_path, lm, layers).folder for layers in (one, two)}
    folders.add(RowsOnDisk(tmp_path, opened("gpt2"), opened("gpt2").layers()).folder)
    assert len(folders) == 3


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_a_damaged_file_counts_as_none(tmp_path: Path, content: bytes | None):
    expected = losses("gpt2", tmp_path)
    for path in files(tmp_path):
        path.write_bytes(path.read_bytes()[:-4] if content is None else content)
    assert losses("gpt2", tmp_path) == expected
    whole = files(tmp_path)
    assert all(path.stat().st_size > 50 for path in whole)


def test_a_folder_that_is_a_file_is_refused_by_name(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="file"):
        losses("gpt2", tmp_path / "file")


def test_a_run_is_the_same_with_it(tmp_path: Path):
    ends = []
    for name in ("with", "without"):
        editor = editor_for("llama")
        folder = tmp_path / "cache" if name == "with" else None
        config = replace(RUN, cache_gb=1.0)
        trainer = Trainer(editor, examples(8), TEXTS, config, tmp_path / name, cache_folder=folder)
        trainer.run(bar=False)
        ends.append([p.detach().clone() for p in editor.parameters()])
    assert files(tmp_path / "cache")
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_the_command_line_keeps_it(tiny_model: str, tmp_path: Path):
    run = ["train", "--model", tiny_model, "--data", "facts", "--limit", "4", "--steps", "1"]
    run += ["--batch", "2", "--rank", "4", "--validation", "1", "--cache-gb", "0"]
    assert main([*run, "--out", str(tmp_path / "run"), "--cache-folder", str(tmp_path / "c")]) == 0
    assert files(tmp_path / "c")
