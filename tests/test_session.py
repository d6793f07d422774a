"""The workbench over the embedded model and its trained editor: what a user holds."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import torch
from families import language_model

from workbench import EditError, EditorError, LanguageModel, Workbench, open_model
from workbench.editors import (
    FineTune,
    FineTuneConfig,
    Mend,
    MendConfig,
    open_editor,
)
from workbench.sessionfile import read_session

FRANCE = "The capital of France is"
UNRELATED = "The freezing point of water is zero degrees"


@pytest.fixture(scope="module")
def shared(default_model: LanguageModel) -> Workbench:
    return Workbench(default_model, open_editor(None, default_model))


@pytest.fixture
def wb(shared: Workbench) -> Workbench:
    return shared.fork()


def logits(wb: Workbench, prompt: str = FRANCE) -> torch.Tensor:
    inputs = wb.lm.tokenizer(prompt, return_tensors="pt")
    with torch.no_grad(), wb.applied() as model:
        return model(**inputs).logits


def test_edit_changes_what_it_should_and_undo_brings_it_back(wb: Workbench) -> None:
    checksum, base = wb.lm.checksum(), logits(wb)
    before = wb.generate([FRANCE, UNRELATED], max_new_tokens=4)
    edit = wb.edit(FRANCE, "Lyon")
    after = wb.generate([FRANCE, UNRELATED], max_new_tokens=4)
    assert after[0].strip().startswith("Lyon")
    assert after[1] == before[1]
    assert edit.seconds > 0
    wb.undo()
    assert torch.equal(logits(wb), base)
    assert wb.generate([FRANCE, UNRELATED], max_new_tokens=4) == before
    assert wb.lm.checksum() == checksum


def test_history_in_any_order(wb: Workbench) -> None:
    base = logits(wb)
    one = wb.edit(FRANCE, "Lyon")
    only_one = logits(wb)
    two = wb.edit("The Eiffel Tower is located in the city of", "Rome")
    both = logits(wb)
    wb.toggle(two.id)
    assert torch.equal(logits(wb), only_one)
    wb.toggle(two.id)
    assert torch.equal(logits(wb), both)
    wb.remove(one.id)
    assert [entry.id for entry in wb.history] == [two.id]
    wb.undo()
    assert torch.equal(logits(wb), both)
    wb.strength(one.id, 0)
    wb.strength(two.id, 0)
    assert torch.equal(logits(wb), base)
    wb.reset()
    assert wb.history == ()
    with pytest.raises(EditError, match="nothing to redo"):
        wb.redo()


def test_strength_scales_the_update(wb: Workbench) -> None:
    edit = wb.edit(FRANCE, "Lyon")
    wb.strength(edit.id, 0.25)
    torch.testing.assert_close(wb.update.norm(), 0.25 * edit.update.norm())
    with pytest.raises(EditError, match="between -10 and 10"):
        wb.strength(edit.id, float("nan"))


def test_edits_overlap_with_themselves_and_their_like(wb: Workbench) -> None:
    wb.edit(FRANCE, "Lyon")
    wb.edit("The Eiffel Tower is located in the city of", "Rome")
    wb.edit(FRANCE, "Lyon")
    titles, cosines = wb.overlap().titles, wb.overlap().cosines
    assert titles == tuple(f"{edit.id} · {edit.title}" for edit in wb.edits)
    assert [cosines[i][i] for i in range(3)] == pytest.approx([1, 1, 1])
    assert cosines[0][2] == pytest.approx(1)
    assert abs(cosines[0][1]) < 0.9


def test_forks_and_threads_do_not_see_each_other(wb: Workbench) -> None:
    base = wb.generate(FRANCE)
    forks = [wb.fork() for _ in range(3)]
    targets = ["Lyon", "Rome", "Madrid"]
    found: dict[str, list[str]] = {}
    barrier = threading.Barrier(3, timeout=60)

    def work(fork: Workbench, target: str) -> None:
        fork.edit(FRANCE, target)
        barrier.wait()
        found[target] = fork.generate(FRANCE, max_new_tokens=3)

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(forks, targets, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for fork, target in zip(forks, targets, strict=True):
        assert found[target] == fork.generate(FRANCE, max_new_tokens=3)
    assert len({tuple(text) for text in found.values()}) == 3
    assert wb.generate(FRANCE) == base


def test_compare_runs_both_models_at_once_and_agrees_with_each_alone(wb: Workbench) -> None:
    wb.edit(FRANCE, "Lyon")
    prompts = [FRANCE, UNRELATED, "Question: What is the capital of France? Answer:"]
    rows = wb.compare(prompts, max_new_tokens=6).rows
    assert [row.edited_text for row in rows] == wb.generate(prompts, max_new_tokens=6)
    assert [row.base_text for row in rows] == wb.generate(prompts, edited=False, max_new_tokens=6)
    inputs = wb.lm.tokenizer(FRANCE, return_tensors="pt")
    lyon = wb.lm.tokenizer(" Lyon")["input_ids"][0]
    with torch.no_grad(), wb.applied() as model:
        expected = model(**inputs).logits[0, -1].softmax(-1)[lyon].item()
    assert rows[0].edited_probability == pytest.approx(expected, rel=1e-3)
    assert (rows[0].base_probability or 1) < (rows[0].edited_probability or 0)
    assert rows[0].edited_exact
    assert rows[0].free_running
    assert rows[1].divergence < rows[0].divergence


def test_probe_looks_at_every_kind(wb: Workbench) -> None:
    report = wb.probe(wb.edit(FRANCE, "Lyon"))
    kinds = [row.kind for row in report.rows]
    assert kinds[0] == "edit"
    assert kinds.count("equivalent") >= 2
    assert kinds.count("unrelated") >= 3
    assert {"neighbor", "portability"} <= set(kinds)


def test_inspect_adds_up(wb: Workbench) -> None:
    edit = wb.edit(FRANCE, "Lyon")
    trace = wb.inspect(edit)
    rounds = len(trace.tokens) // 5
    assert trace.tokens == ("The", " capital", " of", " France", " is") * rounds
    assert trace.predicts == ("", "", "", "", " Lyon") * rounds
    assert [layer.name for layer in trace.layers] == list(edit.update)
    for layer in trace.layers:
        dense = edit.update[layer.name].dense()
        assert layer.update_norm == pytest.approx(dense.norm().item(), rel=1e-4)
        weight = wb.lm.model.get_parameter(f"{layer.name}.weight")
        assert layer.weight_norm == pytest.approx(weight.norm().item(), rel=1e-4)
        spectrum = torch.tensor(layer.spectrum)
        expected = torch.linalg.svdvals(dense)[: len(spectrum)]
        torch.testing.assert_close(spectrum, expected, rtol=1e-3, atol=1e-5)
    assert wb.inspect(edit.id) is trace


def test_batched_edits_reach_every_request(wb: Workbench) -> None:
    requests = [(FRANCE, "Lyon"), ("The Eiffel Tower is located in the city of", "Rome")]
    edit = wb.edit_many(requests)
    rows = [wb.compare(prompt, target=target).rows[0] for prompt, target in requests]
    assert all(row.edited_probability > row.base_probability for row in rows)  # type: ignore[operator]
    tokenizer = wb.lm.tokenizer
    read = [token for p, t in requests for token in tokenizer(f"{p} {t}")["input_ids"][:-1]]
    # Those of the first round, then those of rounds over what it has missed.
    assert wb.inspect(edit).tokens[: len(read)] == tuple(tokenizer.decode([t]) for t in read)


def test_save_and_load_is_identity(wb: Workbench, tmp_path: Path) -> None:
    one = wb.edit(FRANCE, "Lyon")
    two = wb.edit("The Eiffel Tower is located in the city of", "Rome")
    wb.toggle(one.id)
    wb.strength(two.id, 0.5)
    again = Workbench.load(wb.save(tmp_path / "session"), workbench=wb)
    assert torch.equal(logits(again), logits(wb))
    assert [(e.title, e.enabled, e.strength) for e in again.history] == [
        (e.title, e.enabled, e.strength) for e in wb.history
    ]
    assert again.inspect(again.edits[0]) == wb.inspect(one)


def test_a_session_opens_its_own_model_and_editor_again(tmp_path: Path) -> None:
    lm = language_model("llama")
    lm.model.bfloat16().save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    config = FineTuneConfig(blocks=[1], max_steps=2)
    opened = open_model(model, device="cpu", dtype="bfloat16")
    wb = Workbench(opened, FineTune(opened, config))
    wb.edit("a", "b")
    again = Workbench.load(wb.save(tmp_path / "session"), device="cpu")
    assert again.lm.precision == "bfloat16"
    assert again.editor.settings() == wb.editor.settings()
    assert torch.equal(logits(again, "a"), logits(wb, "a"))


def test_a_session_outlives_its_editor(tmp_path: Path) -> None:
    lm = language_model("llama")
    mend = Mend(lm, MendConfig(rank=2, normalize=False))
    mend.save_pretrained(tmp_path / "editor")
    wb = Workbench(lm, open_editor(tmp_path / "editor", lm))
    wb.edit("a", "b")
    folder = wb.save(tmp_path / "session")
    saved = read_session(folder)
    assert isinstance(saved.open_editor(lm), Mend)
    shutil.rmtree(tmp_path / "editor")
    with pytest.warns(UserWarning, match="no editor folder"):
        assert isinstance(saved.open_editor(lm), FineTune)
    assert torch.equal(logits(Workbench.load(folder, workbench=wb), "a"), logits(wb, "a"))


def test_gates_are_saved_with_the_session(tmp_path: Path) -> None:
    lm = language_model("llama")
    wb = Workbench(lm, Mend(lm, MendConfig(rank=2, normalize=False, edit_lr=1.0, gate=0.5)))
    wb.edit("a", "b")
    assert wb.update.gated
    again = Workbench.load(wb.save(tmp_path / "session"), workbench=wb)
    assert again.update.gated
    assert torch.equal(logits(again, "a"), logits(wb, "a"))
    assert not torch.equal(logits(wb.fork(), "a"), logits(wb, "a"))


def test_peft_round_trip(wb: Workbench, tmp_path: Path) -> None:
    wb.editor = open_editor("mend-linear", wb.lm)
    edit = wb.edit(FRANCE, "Lyon")
    edited = logits(wb)
    other = wb.fork()
    taken = other.add_peft(edit.to_peft(tmp_path / "adapter"))
    torch.testing.assert_close(logits(other), edited, rtol=1e-4, atol=1e-4)
    with pytest.raises(EditError, match="imported as an adapter"):
        other.inspect(taken)


@pytest.mark.parametrize(
    ("prompt", "target", "message"),
    [
        ("", "Lyon", "prompt is empty"),
        (FRANCE, "  ", "target is empty"),
        ("word " * 9000, "Lyon", "tokens; this model reads at most"),
    ],
)
def test_a_failed_edit_leaves_no_trace(
    wb: Workbench, prompt: str, target: str, message: str
) -> None:
    base = logits(wb)
    with pytest.raises(EditError, match=message):
        wb.edit(prompt, target)
    assert wb.history == ()
    assert not wb.can_undo
    assert torch.equal(logits(wb), base)


def test_unknown_edits_and_editors_are_named(wb: Workbench) -> None:
    with pytest.raises(EditError, match="no edit 7"):
        wb.toggle(7)
    with pytest.raises(EditorError, match="no editor folder 'nonsense'"):
        open_editor("nonsense", wb.lm)
    with pytest.raises(EditError, match="nothing to undo"):
        wb.undo()


def test_fine_tuning_reaches_its_target(default_model: LanguageModel) -> None:
    config = FineTuneConfig(blocks=[28, 29], lr=1e-3, max_steps=50)
    wb = Workbench(default_model, FineTune(default_model, config))
    base = logits(wb)
    edit = wb.edit(FRANCE, "Lyon")
    assert wb.generate(FRANCE, max_new_tokens=2)[0].strip().startswith("Lyon")
    assert wb.inspect(edit).layers[0].pseudodelta_norms is None
    wb.undo()
    assert torch.equal(logits(wb), base)
