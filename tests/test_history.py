"""A workbench in a `with`: its edits last as long as that does."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from families import batch_for, language_model

from workbench import Workbench
from workbench.adapters import import_peft
from workbench.editors import FineTune, FineTuneConfig


def logits(wb: Workbench) -> torch.Tensor:
    with torch.no_grad(), wb.applied() as model:
        return model(**batch_for(wb.lm.model)).logits


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
def test_leaving_gives_the_base_model_back_and_touches_no_file(tmp_path: Path, fails: bool) -> None:
    lm = language_model("llama")
    wb = Workbench(lm, FineTune(lm, FineTuneConfig(max_steps=3)))
    base, checksum, seen = logits(wb), lm.checksum(), []
    with torch.no_grad():
        bare = lm.model(**batch_for(lm.model)).logits
    stop = wb.observe(lambda: seen.append(wb.history))
    with pytest.raises(RuntimeError) if fails else nullcontext(), wb as entered:
        assert entered is wb
        wb.edit("a", "b")
        wb.toggle(wb.edit("c", "d").id)
        edited = logits(wb)
        saved = {path: path.read_bytes() for path in wb.save(tmp_path).iterdir()}
        if fails:
            raise RuntimeError("from within")
    assert not torch.equal(edited, base)
    assert wb.history == seen[-1] == ()
    assert torch.equal(logits(wb), base)
    with torch.no_grad():
        assert torch.equal(lm.model(**batch_for(lm.model)).logits, bare)
    assert lm.checksum() == checksum
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == saved
    again = Workbench.load(tmp_path, workbench=wb)
    assert torch.equal(logits(again), edited)
    stop()


def test_many_fine_tunings_are_one_change_and_each_still_goes_exactly(tmp_path: Path) -> None:
    lm = language_model("llama")
    wb, never = (Workbench(lm, FineTune(lm, FineTuneConfig(max_steps=3))) for _ in range(2))
    edits = [wb.edit(*request) for request in (("a", "b"), ("c", "d"), ("e", "f"))]
    alone = edits[0].update.nbytes
    assert wb.update.nbytes == alone
    edited = logits(wb)
    assert torch.equal(logits(Workbench.load(wb.save(tmp_path / "session"), workbench=wb)), edited)
    adapter = import_peft(wb.to_peft(tmp_path / "adapter"), lm)
    for name, dense in wb.update.dense().items():
        assert torch.equal(adapter[name].dense(), dense)
    wb.remove(edits[1].id)
    never.edit("a", "b")
    never.edit("e", "f")
    assert torch.equal(logits(wb), logits(never))
    wb.undo()
    assert torch.equal(logits(wb), edited)
