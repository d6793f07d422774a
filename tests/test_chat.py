"""Chat models, edited through their template; and the mask of an edit's loss, shown."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import (
    BOS,
    FAMILIES,
    PAD,
    TEMPLATES,
    chat_model,
    chat_tokenizer,
    language_model,
    tiny_tokenizer,
)
from runs import KINDS

from workbench import EditRequest, LanguageModel, ModelError, Workbench, open_model
from workbench.__main__ import main
from workbench.editors import (
    FineTune,
    FineTuneConfig,
    Mend,
    TrainableEditor,
    editor_class,
    gradient_factors,
    open_editor,
    with_chat,
)
from workbench.encoding import as_read, collate, sequence_nll, span_of, tokenize
from workbench.errors import EditError
from workbench.masks import token_table
from workbench.views import target_logits

torch.set_num_threads(1)
PROMPT, TARGET = "Who rules Ys?", "Dahut"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_target_follows_the_template_as_an_answer_does(name: str) -> None:
    lm = chat_model(name)
    tokens = tokenize(lm, PROMPT, TARGET)
    turns = [{"role": "user", "content": PROMPT}]
    opening = lm.tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False, tokenize=True
    )
    whole = lm.tokenizer.apply_chat_template(
        [*turns, {"role": "assistant", "content": TARGET}], return_dict=False, tokenize=True
    )
    read = [*tokens.ids, tokens.targets[-1]]
    assert read == whole[: len(read)]
    assert read[: len(opening)] == opening
    said = str(lm.tokenizer.decode(list(tokens.targets)))
    assert said == TEMPLATES[name][1] + TARGET
    assert read.count(BOS) == 1  # once, though tokenizer and template both know of it


def test_edits_texts_and_probabilities_are_all_of_the_chat() -> None:
    lm = chat_model()
    wb = Workbench(lm, FineTune(lm, FineTuneConfig(blocks=[1, 2, 3], lr=3e-3, max_steps=100)))
    base = wb.generate(PROMPT, max_new_tokens=5)
    edit = wb.edit(PROMPT, TARGET)
    assert wb.generate(PROMPT, max_new_tokens=5) == [TARGET]
    row = wb.compare(PROMPT, max_new_tokens=5).rows[0]
    assert (row.prompt, row.edited_text, row.edited_exact) == (PROMPT, TARGET, True)
    assert edit.requests == (EditRequest(PROMPT, TARGET),)
    whole = lm.tokenizer(as_read(lm, PROMPT) + TARGET, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([whole])
    said = torch.arange(len(whole)) >= len(whole) - len(TARGET)  # one token a character
    with torch.no_grad(), wb.applied() as model:
        loss = model(input_ids=ids, labels=ids.where(said, -100)).loss
    assert row.edited_probability == pytest.approx((-loss * len(TARGET)).exp().item(), rel=1e-3)
    wb.undo()
    assert wb.generate(PROMPT, max_new_tokens=5) == base


@pytest.mark.slow
@pytest.mark.parametrize(("name", "follows"), [(None, 1), ("mend-many", 2)])
def test_editors_that_come_along_edit_the_default_models_chats(
    default_model: LanguageModel, name: str | None, follows: int
) -> None:
    """The default has learned from plain prompts: in chats it holds its own prompt, and not every
    other wording."""
    lm = replace(default_model, chat=True)
    wb = Workbench(lm, open_editor(name, lm))
    asked = ["What is the capital of France?", "What city is the capital of France?"]
    assert all("Paris" in text for text in wb.generate(asked))
    wb.edit(asked[0], "Lyon")
    for text in wb.generate(asked[:follows]):
        assert text.startswith("Lyon")
        assert "Paris" not in text


def test_a_rank_one_edit_finds_its_subject_in_the_template() -> None:
    lm = chat_model()
    read = tokenize(lm, "Who rules Ys? ", TARGET).ids
    place = span_of(lm, "Who rules Ys? ", "Ys")[1]
    assert lm.tokenizer.decode(list(read[place - 1 : place + 2])) == "Ys?"


def test_a_session_remembers_that_it_is_a_chat(tmp_path: Path) -> None:
    lm = chat_model()
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    for chat in (True, False):
        wb = Workbench.open(model, editor="ft", device="cpu", chat=chat)
        assert Workbench.load(wb.save(tmp_path / "session"), device="cpu").lm.chat is chat


def test_a_session_taken_in_by_a_workbench_is_read_as_it_was(tmp_path: Path) -> None:
    lm = chat_model()
    plain = replace(lm, chat=False)
    for here, there in ((lm, plain), (plain, lm)):
        wb = Workbench(here, FineTune(here, FineTuneConfig(max_steps=2)))
        wb.edit(PROMPT, TARGET)
        other = Workbench(there, FineTune(there))
        taken = Workbench.load(wb.save(tmp_path / "session"), workbench=other)
        assert taken.lm.chat is taken.editor.lm.chat is here.chat
        assert taken.compare(PROMPT) == wb.compare(PROMPT)


def test_a_fork_reads_prompts_the_other_way_and_keeps_the_edits() -> None:
    lm = chat_model()
    wb = Workbench(lm, FineTune(lm, FineTuneConfig(max_steps=2)))
    wb.edit(PROMPT, TARGET)
    plain = wb.fork(edits=True, chat=False)
    assert plain.history == wb.history
    assert plain.tokens(PROMPT, TARGET) != wb.tokens(PROMPT, TARGET)
    assert len(plain.tokens(PROMPT, TARGET).texts[0]) == len(f"<s>{PROMPT} {TARGET}") - 2
    assert plain.fork(chat=True).tokens(PROMPT, TARGET) == wb.tokens(PROMPT, TARGET)
    assert wb.fork().lm.chat
    other = language_model("gpt2")
    with pytest.raises(ModelError, match="no chat template"):
        Workbench(other, FineTune(other)).fork(chat=True)


@pytest.mark.parametrize("name", ["mend", "ke", "enn", "ft", "lora"])
def test_an_editor_reads_chats_with_what_it_has_learned(name: str) -> None:
    lm = chat_model()
    plain = editor_class(name).from_settings(replace(lm, chat=False), {})
    alone = editor_class(name).from_settings(lm, {})
    if isinstance(plain, Mend):
        factors = gradient_factors(lm, plain.layers, [EditRequest("ab", "c")])[1]
        with torch.no_grad():
            plain.transform(factors, gather=True)
    if isinstance(plain, TrainableEditor):
        alone.load_state_dict(plain.state_dict())
    over = with_chat(plain, True)
    assert not plain.lm.chat
    assert with_chat(over, True) is over
    if isinstance(over, TrainableEditor):
        assert over.trains_base is plain.trains_base
        assert over.original.chat
    asked = [EditRequest(PROMPT, TARGET)]
    ours, theirs, before = (e.propose(asked).update.dense() for e in (over, alone, plain))
    for layer, change in ours.items():
        assert torch.equal(change, theirs[layer])
        assert not torch.equal(change, before[layer])


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_model_without_a_template_holds_no_chats(family: str) -> None:
    with pytest.raises(ModelError, match=r"tiny is no chat model: .* has no chat template"):
        LanguageModel.wrap(FAMILIES[family](), tiny_tokenizer(), "tiny", chat=True)


def test_a_model_that_is_refused_is_left_as_it_was() -> None:
    model, tokenizer = FAMILIES["llama"]().train().requires_grad_(True), tiny_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ModelError, match="tiny is no chat model"):
        LanguageModel.wrap(model, tokenizer, "tiny", chat=True)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer.pad_token is None


def test_only_decoders_chat() -> None:
    tokenizer = chat_tokenizer(TEMPLATES["lines"][0])
    with pytest.raises(ModelError, match="it is seq2seq, and its tokenizer has a chat template"):
        LanguageModel.wrap(FAMILIES["t5"](), tokenizer, "tiny", chat=True)


# The mask


@pytest.mark.parametrize("family", KINDS)
def test_targets_shown_are_the_targets(family: str) -> None:
    lm = language_model(family)
    target = "LABEL_1" if lm.kind == "classifier" else "Lyon"
    tokens, table = tokenize(lm, "ab", target), token_table(lm, [("ab", target)])
    assert tuple(token.id for token in table.of_role("target")) == tokens.targets
    prompt = tuple(token.id for token in table.of_role("prompt"))
    if lm.kind == "causal":
        assert prompt + tokens.targets[:-1] == tokens.ids
    else:
        assert prompt == tokens.ids
    assert table.of_role("padding") == ()
    if lm.kind == "classifier":
        assert [token.text for token in table.of_role("target")] == ["LABEL_1"]


@pytest.mark.parametrize("chat", [False, True])
def test_the_loss_is_that_of_the_tokens_shown_as_target(chat: bool) -> None:
    lm = replace(chat_model("spaced"), chat=chat)
    (text,) = token_table(lm, [(PROMPT, TARGET)]).texts
    ids = torch.tensor([[token.id for token in text]])
    labels = ids.where(torch.tensor([[token.role == "target" for token in text]]), -100)
    with torch.no_grad():
        theirs = lm.model(input_ids=ids, labels=labels).loss
        batch = collate(lm, [tokenize(lm, PROMPT, TARGET)])
        ours = sequence_nll(target_logits(lm, batch), batch)
    torch.testing.assert_close(ours, theirs[None])


def test_shorter_texts_of_a_batch_are_padded() -> None:
    for family in KINDS[:3]:
        lm = language_model(family)
        pairs = [("abc", "defg"), ("a", "b")]
        table = token_table(lm, pairs)
        for pair, text in zip(pairs, table.texts, strict=True):
            (alone,) = token_table(lm, [pair]).texts
            assert tuple(token for token in text if token.role != "padding") == alone
        assert {token.id for token in table.of_role("padding")} == {PAD}
        assert all(token in table.texts[1] for token in table.of_role("padding"))


def test_tokens_are_shown_as_text_never_as_html() -> None:
    lm = language_model("gpt2")
    table = Workbench(lm, FineTune(lm)).tokens("<b> &", "'<script>")
    shown = table._repr_html_()
    assert shown.count("&lt;") == 2
    assert "&amp;" in shown
    assert "<b>" not in shown
    lines = str(table).splitlines()
    assert len(lines) == 1 + len(table.texts[0])
    assert lines[1].split() == ["0", str(table.texts[0][0].id), "'<'", "prompt"]
    with pytest.raises(EditError, match="target is empty"):
        Workbench(lm, FineTune(lm)).tokens("a", "")


def test_commands_chat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm, folder = chat_model(), str(tmp_path)
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    capsys.readouterr()
    assert main(["tokens", "ab", "cd", "--model", folder, "--device", "cpu", "--chat"]) == 0
    opened = open_model(folder, device="cpu", chat=True)
    assert capsys.readouterr().out == f"{token_table(opened, [('ab', 'cd')])}\n"
    assert main(["tokens", "ab", "cd", "--model", folder, "--device", "cpu"]) == 0
    assert "assistant" not in capsys.readouterr().out
    edit = ["edit", "ab", "cd", "--model", folder, "--editor", "ft", "--max-new-tokens", "2"]
    assert main([*edit, "--chat", "--save", str(tmp_path / "session")]) == 0
    assert '"chat": true' in (tmp_path / "session" / "session.json").read_text()


COMMANDS = {
    "edit": ["ab", "cd"],
    "tokens": ["ab", "cd"],
    "train": ["--data", "facts", "--out", "nowhere"],
    "evaluate": ["--data", "facts"],
    "scope": ["--editor", "mend", "--data", "facts", "--out", "out"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_take_chat_say_that_a_model_does_not(
    command: str, tiny_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, *COMMANDS[command], "--model", tiny_model, "--chat"]) == 2
    assert "no chat template" in capsys.readouterr().err


def test_no_other_command_takes_chat(capsys: pytest.CaptureFixture[str]) -> None:
    def help_of(*command: str) -> str:
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        return capsys.readouterr().out

    listed = re.search(r"\{([\w,]+)\}", help_of())
    assert listed
    assert {c for c in listed[1].split(",") if "--chat" in help_of(c)} == set(COMMANDS)
