"""The commands of `python -m workbench`, as a shell calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from workbench import commands, open_model
from workbench.__main__ import main
from workbench.data import read
from workbench.editors import Mend, MendConfig, TrainableEditor

FRANCE = "The capital of France is"
SETTINGS = [
    *("--rank", "4", "--steps", "2", "--batch", "2", "--validation", "2", "--validate-every", "2"),
    *("--health-after", "0", "--text-tokens", "8", "--lr", "1e-3"),
]


def test_training_leaves_an_editor_from_which_training_goes_on(
    tiny_model: str, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    command = ["train", "--model", tiny_model, "--data", "facts", "--limit", "9", *SETTINGS]
    assert main([*command, "--out", str(first)]) == 0
    passages = tmp_path / "passages.txt"
    passages.write_text("The river runs to the sea. " * 30)
    unrelated = ["--unrelated", f"passages:{passages}"]
    arguments = [*command, *unrelated, "--start", str(first), "--out", str(second), "--seed", "1"]
    assert main(arguments) == 0
    card = json.loads((second / "editor.json").read_text())["card"]
    assert card["edits_seen"] == 4
    assert card["start"]["edits_seen"] == 4
    assert card["start"]["training"]["seed"] == 0


def test_a_start_with_other_settings_is_refused(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--model", tiny_model, "--data", "facts", "--limit", "9", *SETTINGS]
    assert main([*command, "--out", str(tmp_path / "first")]) == 0
    other = ["--start", str(tmp_path / "first"), "--rank", "8", "--out", str(tmp_path / "second")]
    assert main([*command, *other]) == 2
    assert "{'rank': 8}" in capsys.readouterr().err
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize("name", ["ke", "enn"])
def test_other_editors_are_trained_and_take_their_own_settings_alone(
    tiny_model: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--editor", name, "--model", tiny_model, "--data", "facts", "--limit", "9"]
    own = {"ke": ["--lstm", "4", "--condition", "4"], "enn": ["--first-order"]}
    given = [*SETTINGS[2:], "--edit-lr", "0.2", *own[name]]
    assert main([*command, *given, "--out", str(tmp_path / "editor")]) == 0
    about = json.loads((tmp_path / "editor" / "editor.json").read_text())
    assert (about["editor"], about["settings"]["edit_lr"]) == (name, 0.2)
    assert main([*command, "--rank", "4", "--out", str(tmp_path / "no")]) == 2
    assert f"--rank: mend has such settings, {name} has not" in capsys.readouterr().err
    start = ["--start", str(tmp_path / "editor"), "--out", str(tmp_path / "no")]
    assert main(["train", "--model", tiny_model, "--data", "facts", "--limit", "9", *start]) == 2
    assert f"start from it with --editor {name}" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_evaluate_command_writes_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    arguments = ["evaluate", "--data", "facts", "--split", "dev", "--limit", "3"]
    assert main([*arguments, "--editors", "mend", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["settings"]["limit"] == 3
    mend = found["editors"]["mend"]
    assert mend["n"] == 3
    assert {"edit_success", "neighborhood_kept", "unrelated_kept", "seconds_per_edit"} <= set(mend)
    assert "edit_success" in capsys.readouterr().out


def test_resuming_other_results_is_refused_and_they_stay(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    command = ["evaluate", "--model", tiny_model, "--data", "facts", "--editors", "ft", "--resume"]
    assert main([*command, "--limit", "1"]) == 2
    assert "name it with --json" in capsys.readouterr().err
    assert main([*command, "--limit", "1", "--json", str(out)]) == 0
    before = out.read_text()
    assert main([*command, "--limit", "2", "--json", str(out)]) == 2
    assert "results of other settings: limit differ" in capsys.readouterr().err
    half = ["--limit", "1", "--dtype", "bfloat16"]
    assert main([*command, *half, "--json", str(out)]) == 2
    assert "results of other settings: " in (said := capsys.readouterr().err)
    assert "dtype" in said
    assert main([*command, "--limit", "1", "--dtype", "int8", "--json", str(out)]) == 2
    assert 'give "float32", "bfloat16" or "float16"' in capsys.readouterr().err
    assert out.read_text() == before
    out.write_text("[]")
    assert main([*command, "--limit", "1", "--json", str(out)]) == 2
    assert "holds no results of evaluate" in capsys.readouterr().err


def test_known_edits_only_what_the_model_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    arguments = ["evaluate", "--data", "facts", "--split", "dev", "--limit", "4", "--known"]
    assert main([*arguments, "--editors", "mend", "--json", str(out)]) == 0
    lm = open_model(device="cpu", progress=False)
    right = 0
    for example in read("facts", split="dev", limit=4):
        answer = f" {example.target_true}"
        ids = lm.tokenizer(example.prompt, return_tensors="pt")
        length = len(lm.tokenizer(answer)["input_ids"])
        written = lm.model.generate(**ids, max_new_tokens=length, do_sample=False)  # type: ignore[operator]
        right += lm.tokenizer.decode(written[0]) == example.prompt + answer
    assert json.loads(out.read_text())["editors"]["mend"]["n"] == right > 0
    assert f"knows {right} of 4" in capsys.readouterr().out


def test_passages_are_edited_to_samples(tiny_model: str, tmp_path: Path) -> None:
    passages, out = tmp_path / "passages.txt", tmp_path / "out.json"
    text = " ".join("abcdefgh"[i % 8] for i in range(60))
    passages.write_text("\n".join([text, text[::-1], *["c d " * 20] * 30]))
    arguments = ["evaluate", "--model", tiny_model, "--data", f"passages:{passages}", "--sample"]
    assert main([*arguments, "--editors", "ft", "--limit", "32", "--json", str(out)]) == 0
    found = json.loads(out.read_text())["editors"]["ft"]
    assert 0 < found["n"] <= 32
    assert "drawdown_perplexity" in found


def test_edit_command_saves_and_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session, adapter = tmp_path / "session", tmp_path / "adapter"
    linear = ["--editor", "mend-linear", "--save", str(session)]
    assert main(["edit", FRANCE, "Lyon", *linear]) == 0
    shown = capsys.readouterr().out
    assert shown.count("[equivalent]") == 2
    assert shown.count("[unrelated]") == 3
    assert main(["export", "--session", str(session), "--to-peft", str(adapter)]) == 0
    assert (adapter / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["edit", FRANCE, ""], "target is empty"),
        (["evaluate", "--data", "counterfacts:none"], "counterfact"),
        (["evaluate", "--data", "facts", "--limit", "1", "--editors", "mendd"], "mendd"),
        (["export", "--session", "nowhere", "--to-peft", "out"], "no file"),
    ],
)
def test_commands_explain_what_is_wrong(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_layers_are_chosen_by_name_or_number(tiny_model: str, tmp_path: Path) -> None:
    command = ["train", "--model", tiny_model, "--data", "facts", "--limit", "9", *SETTINGS]
    chosen = ["--matrices", "down_proj", "--blocks=-2", "--out", str(tmp_path)]
    assert main([*command, *chosen]) == 0
    about = json.loads((tmp_path / "editor.json").read_text())
    assert [name.rsplit(".", 1)[-1] for name in about["layers"]] == ["down_proj"]


def test_figures_are_packed_however_the_folder_is_named(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    editor, figures = tmp_path / "editor", tmp_path / "figures.json"
    command = ["train", "--model", tiny_model, "--data", "facts", "--limit", "9", *SETTINGS]
    assert main([*command, "--out", str(editor)]) == 0
    measured = ["--editors", str(editor), "--limit", "2", "--json", str(figures)]
    assert main(["evaluate", "--model", tiny_model, "--data", "facts", *measured]) == 0
    pack = ["pack", "--model", tiny_model, "--evaluation", str(figures)]
    other = f"{editor}/../editor"
    assert main([*pack, "--editor", other, "--out", str(tmp_path / "packed")]) == 0
    card = json.loads((tmp_path / "packed" / "editor.json").read_text())["card"]
    assert card["evaluation"]["figures"]["n"] == 2
    rounds = ["--rounds", "2", "--out", str(tmp_path / "no")]
    assert main([*pack, "--editor", other, *rounds]) == 2
    assert "with other weights or settings than are packed" in capsys.readouterr().err
    figures.write_text("{}")
    assert main([*pack, "--editor", other, "--out", str(tmp_path / "no")]) == 2
    assert "holds no figures of" in capsys.readouterr().err


def test_figures_stay_with_what_they_are_of(tiny_model: str, tmp_path: Path) -> None:
    lm = open_model(tiny_model, device="cpu", progress=False)
    for name in ("one", "two"):
        editor = Mend(lm, MendConfig(rank=2))
        editor.card = {"evaluation": {"figures": {"edit_success": 1.0}}}
        editor.save_pretrained(tmp_path / name)
    pack = ["pack", "--model", tiny_model, "--editor", str(tmp_path / "one")]
    for more, kept in (
        ([], True),
        (["--rounds", "1"], True),
        (["--rounds", "2"], False),
        (["--later-strength", "0.5"], False),
        (["--average", str(tmp_path / "two")], False),
    ):
        assert main([*pack, *more, "--out", str(tmp_path / "packed")]) == 0
        card = json.loads((tmp_path / "packed" / "editor.json").read_text())["card"]
        assert ("evaluation" in card) is kept


def test_an_editor_is_packed_with_more_rounds_and_other_shares(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--model", tiny_model, "--data", "facts", "--limit", "9", *SETTINGS[2:]]
    for name in ("mend", "ke"):
        assert main([*command, "--editor", name, "--out", str(tmp_path / name)]) == 0
    rounds = ["--model", tiny_model, "--rounds", "3", "--later-strength", "0.5"]
    out = ["--out", str(tmp_path / "packed")]
    shares = ["--scope-share", "0.4", "--scope-relation-share", "0.3"]
    assert main(["pack", "--editor", str(tmp_path / "mend"), *rounds, *shares, *out]) == 0
    lm = open_model(tiny_model, device="cpu", progress=False)
    settings = TrainableEditor.from_pretrained(tmp_path / "packed", lm).settings()
    assert (settings["rounds"], settings["later_strength"]) == (3, 0.5)
    assert (settings["scope_share"], settings["scope_relation_share"]) == (0.4, 0.3)
    assert main(["pack", "--editor", str(tmp_path / "ke"), *rounds, *out]) == 2
    assert "--later-strength, --rounds: mend has such settings" in capsys.readouterr().err


def test_an_editor_is_packed_with_its_gate_moved(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--model", tiny_model, "--data", "facts", "--limit", "9", *SETTINGS]
    for name, gate in (("gated", "0.3"), ("linear", "0")):
        assert main([*command, "--gate", gate, "--out", str(tmp_path / name)]) == 0
    lm = open_model(tiny_model, device="cpu", progress=False)
    pack = ["pack", "--model", tiny_model, "--gate-shift", "-0.5", "--editor"]
    for start, out in (("gated", "once"), ("once", "twice")):
        assert main([*pack, str(tmp_path / start), "--out", str(tmp_path / out)]) == 0
    found = [TrainableEditor.from_pretrained(tmp_path / name, lm) for name in ("gated", "twice")]
    shares = [editor.state_dict()["gate_logits"] for editor in found]
    torch.testing.assert_close(shares[1], shares[0] - 1, atol=1e-3, rtol=0)
    assert found[1].card["gate_shift"] == -1
    assert main([*pack, str(tmp_path / "linear"), "--out", str(tmp_path / "x")]) == 2
    assert "no gate whose shares could be moved" in capsys.readouterr().err


def test_cards_name_data_without_saying_where_it_lay() -> None:
    assert commands._file_name("zsre:/home/me/zsre.jsonl.gz") == "zsre:zsre.jsonl.gz"
    assert commands._file_name("facts") == "facts"


def test_editors_are_averaged_by_share(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--model", tiny_model, "--data", "facts", "--limit", "9", *SETTINGS]
    for name, seed in (("one", "0"), ("two", "1")):
        assert main([*command, "--seed", seed, "--out", str(tmp_path / name)]) == 0
    pack = ["pack", "--model", tiny_model, "--editor", str(tmp_path / "one")]
    mix = [*pack, "--average", str(tmp_path / "two")]
    assert main([*mix, "--share", "0.25", "--out", str(tmp_path / "mixed")]) == 0
    lm = open_model(tiny_model, device="cpu", progress=False)
    one, two, mixed = (
        dict(TrainableEditor.from_pretrained(tmp_path / name, lm).named_parameters())
        for name in ("one", "two", "mixed")
    )
    assert any(not torch.equal(one[name], two[name]) for name in one)
    for name, weight in mixed.items():
        torch.testing.assert_close(
            weight, 0.75 * one[name] + 0.25 * two[name], rtol=1e-3, atol=1e-3
        )
    again = ["--editor", str(tmp_path / "mixed"), "--average", str(tmp_path / "one")]
    assert main(["pack", "--model", tiny_model, *again, "--out", str(tmp_path / "both")]) == 0
    said = "0.25 of the weights come from two, then 0.5 of the weights come from one"
    assert TrainableEditor.from_pretrained(tmp_path / "both", lm).card["averaged"] == said
    assert main([*mix, "--share", "2", "--out", str(tmp_path / "no")]) == 2
    assert "got 2.0" in capsys.readouterr().err
