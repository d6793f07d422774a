"""A workbench in a `with`: its edits last as long as that does."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from families import batch_for, language_model

from workbench import Workbench
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
